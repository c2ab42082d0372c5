"""Training on boxes and points: images with many masks, all prompts of a batch in one call of the decoder.

Source of the recipe: mit-han-lab/efficientvit, the SAM trainer (the second stage of EfficientViT-SAM).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.training import LossArgs
from utils.errors import ModelError

from .checkpoints import evf_sam
from .checkpoints.rules import KeyMap, Section, named_tensors
from .evf import EVFModel
from .freeze import Probe, leave_out_unreached
from .losses import hypothesis_losses, least_losses
from .segmenters.base import Segmenter, best_of_three
from .types import MaskPrediction, Prompts

SHARED_PARTS = ("image_encoder", "mask_decoder")
"""Parts that every prompt goes through; what is left encodes prompts of one kind or the other."""
KINDS = ("points", "boxes")


class PromptStep(nn.Module):
    """A segmenter with its loss: what engines wrap, as `model.training.TrainingStep` for phrases."""

    def __init__(self, model: EVFModel, loss: LossArgs) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        segmenter = model.segmenter
        named = segmenter.named_parameters()
        self._of_kinds = [p for name, p in named if p.requires_grad and segmenter.part_of(name) not in SHARED_PARTS]

    def predict(
        self, pixels: Tensor, boxes: Tensor | None, points: Tensor | None, image_index: Tensor
    ) -> MaskPrediction:
        """Return four masks of each of N prompts: one call of the image encoder, one of the decoder.

        Args:
            pixels: float [B, 3, S, S].
            boxes: x1 y1 x2 y2 on the frame of prompts, float [N, 4], or None; points: all inside, float [N, P, 2].
            image_index: int64 [N].
        """
        segmenter = self.model.segmenter
        features = segmenter.encode_image(pixels)
        labels = None if points is None else torch.ones(points.shape[:2], dtype=torch.long, device=points.device)
        sparse, dense = segmenter.encode_prompts(Prompts(points=points, labels=labels, boxes=boxes))
        # What this kind of prompt does not read has a gradient of 0, not none: other processes may read it.
        sparse = sparse + sum(parameter.sum() for parameter in self._of_kinds) * 0
        return segmenter.decode(features, sparse, dense, image_index)

    def forward(
        self,
        pixels: Tensor,
        boxes: Tensor | None,
        points: Tensor | None,
        image_index: Tensor,
        masks: Sequence[Tensor],
        multi: Sequence[bool],
        seeds: Sequence[int],
    ) -> Tensor:
        """Return the losses of each mask, float32 [N, L], in the order of `LossArgs.terms`.

        Args:
            pixels, boxes, points, image_index: as `predict`.
            masks: per image uint8 [n_i, S, S], 0..255; multi: per image whether the best of three masks learns, else
                the single one; seeds: per image, of the points at which the loss is computed.
        """
        prediction = self.predict(pixels, boxes, points, image_index)
        counts = [len(part) for part in masks]
        parts = zip(prediction.logits.split(counts), prediction.iou.split(counts), masks, multi, seeds, strict=True)
        return torch.cat([self._losses(*part) for part in parts])

    def _losses(self, logits: Tensor, scores: Tensor, masks: Tensor, is_multi: bool, seed: int) -> Tensor:
        """Return the losses of the masks of one image, float32 [n, L]."""
        chosen = slice(1, None) if is_multi else slice(0, 1)
        columns = [least_losses(self.mask_losses(logits[:, chosen], masks, seed), self._weights(logits))]
        if self.loss.iou:
            error = scores[:, chosen].float() - overlaps(logits[:, chosen], masks)
            columns.append(error.square().mean(1, keepdim=True))
        return torch.cat(columns, dim=1)

    def mask_losses(self, logits: Tensor, masks: Tensor, seed: int) -> Tensor:
        """Return cross-entropy and dice of masks [n, M, h, w] against uint8 [n, S, S], 0..255: float32 [n, M, 2]."""
        generator = torch.Generator(logits.device).manual_seed(seed)
        return hypothesis_losses(logits, masks.float() / 255, self.loss.points, generator)

    def _weights(self, like: Tensor) -> Tensor:
        return torch.tensor([self.loss.bce, self.loss.dice], device=like.device)

    @torch.no_grad()
    def measure(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the mask of 1 to 3 with the highest predicted IoU, float [N, h, w], and its weighted loss, [N].

        Args:
            batch: of `datasets.prompts.PromptBatch`, on the device.
        """
        prediction = self.predict(batch.pixels, batch.boxes, batch.points, batch.image_index)
        logits, _ = prediction.chosen(best_of_three(prediction))
        parts = zip(logits.split([len(part) for part in batch.masks]), batch.masks, batch.seeds, strict=True)
        losses = torch.cat([self.mask_losses(part[:, None], truth, seed) for part, truth, seed in parts])[:, 0]
        return logits, losses @ self._weights(logits)


@torch.no_grad()
def overlaps(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the IoU of masks float [n, M, h, w] with uint8 [n, S, S], 0..255, on the grid of the logits: [n, M]."""
    truth = F.adaptive_avg_pool2d(masks[:, None].float(), logits.shape[-2:]) > 127.5
    found = logits > 0
    both, either = ((part).flatten(2).sum(2) for part in (found & truth, found | truth))
    return both / either.clamp(min=1)


def prepare_prompted(model: EVFModel, loss: LossArgs) -> Probe:
    """Let the gradient into all that a loss of boxes and points reaches.

    Raises:
        ModelError: the model takes no boxes and points, or has a phrase encoder.
    """
    missing = [kind for kind in KINDS if kind not in model.segmenter.prompt_kinds]
    if missing:
        raise ModelError(
            f"{model.config.name} takes no {' and no '.join(missing)}: train SAM, SAM-2 or EfficientViT-SAM on them"
        )
    if model.segmenter.masks_per_prompt == 1:
        raise ModelError(
            f"{model.config.name} makes one mask of a prompt, and this training needs three to choose from"
        )
    model.requires_grad_(True)
    return leave_out_unreached(model, partial(_read_both, has_scores=loss.iou > 0))


def _read_both(shapes: EVFModel, has_scores: bool) -> list[Tensor]:
    """Return what a loss reads of one box and of one point."""
    segmenter, side = shapes.segmenter, shapes.segmenter.image_spec.size
    with torch.device("meta"):
        pixels, box, point = torch.empty(1, 3, side, side), torch.empty(1, 4), torch.empty(1, 1, 2)
        label = torch.ones(1, 1, dtype=torch.long)
    features, read = segmenter.encode_image(pixels), []
    for prompts in (Prompts(boxes=box), Prompts(points=point, labels=label)):
        prediction = segmenter.decode(features, *segmenter.encode_prompts(prompts))
        read += [prediction.logits, *([prediction.iou] if has_scores else [])]
    return read


def prompt_inputs(batch: Any) -> tuple[Any, ...]:
    """Return the arguments of `PromptStep.forward` for a `datasets.prompts.PromptBatch` on the model's device."""
    return batch.pixels, batch.boxes, batch.points, batch.image_index, batch.masks, batch.multi, batch.seeds


def published_names(segmenter: Segmenter, family: str) -> Mapping[str, str]:
    """Return what the published checkpoint of a segmenter calls its tensors, by our names."""
    section = Section("", "", evf_sam.SEGMENTERS[family].plain)
    return {name: theirs[0] for name, theirs in KeyMap(named_tensors(segmenter), (section,)).theirs.items()}
