"""CLIP2SAM, the second stage of Open-Vocabulary SAM: the mask decoder and what names regions learn together.

Source: arXiv 2401.02955. CLIP, the neck and the prompt encoder rest.
"""

from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import OVSAMConfig
from utils.errors import ModelError
from utils.label_metrics import mask_ious

from .evf import EVFModel
from .freeze import Probe, leave_out_unreached
from .losses import hypothesis_losses, name_losses
from .recognizers.open_vocabulary import embed_regions, mask_boxes, name_logits
from .types import ImageFeatures, MaskPrediction, Prompts
from .vocabulary import Vocabulary

TRAINED = ("mask_decoder", "recognizer")
"""Parts that are trained."""
ROI_SIZE = 12
"""Side of the grid that the head reads of a region while it is trained."""
AT_ONCE = 32
"""Masks that are made at the size of an image together, when they are measured."""


class NameStep(nn.Module):
    """Open-Vocabulary SAM with its loss: what engines wrap, as `model.training.TrainingStep` for phrases.

    Args:
        model: what is trained.
        vocabulary: the names; labels are places in it.
        points: of each mask at which its loss is computed.
    """

    def __init__(self, model: EVFModel, vocabulary: Vocabulary, points: int) -> None:
        super().__init__()
        self.model, self.points = model, points
        self.register_buffer("vectors", vocabulary.vectors.float(), persistent=False)

    def encode(self, pixels: Tensor) -> ImageFeatures:
        """Return the features of images [B, 3, S, S]; gradients reach the pyramid alone."""
        segmenter = self.model.segmenter
        with torch.no_grad():
            stages = segmenter.stages(pixels)
            embedding = segmenter.neck(stages)
        return ImageFeatures(embedding, (*segmenter.pyramid(stages), stages[-1]))

    def decode(
        self, features: ImageFeatures, boxes: Tensor | None, points: Tensor | None, image_index: Tensor
    ) -> MaskPrediction:
        """Return one mask of each prompt: boxes [N, 4], or points [N, 2], in pixels of the input."""
        return self.model.segmenter.decode(features, self.tokens(boxes, points), None, image_index)

    @torch.no_grad()
    def tokens(self, boxes: Tensor | None, points: Tensor | None) -> Tensor:
        """Return the tokens of boxes [N, 4] or of single points [N, 2]; both have two, so that they go together."""
        if points is None:
            return self.model.segmenter.encode_prompts(Prompts(boxes=boxes))[0]
        labels = torch.ones(len(points), 1, dtype=torch.long, device=points.device)
        return self.model.segmenter.encode_prompts(Prompts(points=points[:, None], labels=labels))[0]

    def forward(
        self,
        pixels: Tensor,
        masks: Tensor,
        mask_index: Tensor,
        boxes: Tensor,
        points: Tensor,
        by_box: Tensor,
        labels: Tensor,
        image_index: Tensor,
        seeds: tuple[int, ...],
    ) -> Tensor:
        """Return cross-entropy and dice of each mask, and the cross-entropy of its name, float32 [N, 3].

        Args: the fields of a `datasets.named.NamedBatch`.
        """
        logits, named = self.predict(pixels, boxes, points, by_box, image_index)
        counts = image_index.bincount(minlength=len(seeds)).tolist()
        parts = zip(logits.split(counts), mask_index.split(counts), seeds, strict=True)
        losses = torch.cat([self.mask_losses(some, masks[index], seed) for some, index, seed in parts])
        return torch.cat([losses, name_losses(named, labels)[:, None]], dim=1)

    def predict(
        self, pixels: Tensor, boxes: Tensor, points: Tensor, by_box: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the mask [N, 1, h, w] of each prompt, and the logits [N, K + 1] of the names of what its box shows."""
        segmenter, features = self.model.segmenter, self.encode(pixels)
        sparse = torch.where(by_box[:, None, None], self.tokens(boxes, None), self.tokens(None, points))
        logits = segmenter.decode(features, sparse, None, image_index).logits
        seen = embed_regions(segmenter, features, boxes, image_index, ROI_SIZE)
        # A level that no box is read from has a gradient of 0, not none: other processes may read it.
        unread = sum(parameter.sum() for parameter in segmenter.pyramid.parameters()) * 0
        return logits, name_logits(seen + unread, self.vectors)

    def mask_losses(self, logits: Tensor, masks: Tensor, seed: int) -> Tensor:
        """Return cross-entropy and dice of masks [n, 1, h, w] against uint8 [n, S, S], 0 and 1: float32 [n, 2]."""
        generator = torch.Generator(logits.device).manual_seed(seed)
        return hypothesis_losses(logits, masks.float(), self.points, generator)[:, 0]

    @torch.no_grad()
    def measure(self, batch: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return per image the masks, bool [n_i, H_i, W_i], and of all N their IoU and labels.

        The names are those of what the box around the predicted mask shows, as where the model is used.

        Args:
            batch: a `datasets.named.MeasuredBatch` on the device.
        """
        segmenter, features = self.model.segmenter, self.encode(batch.pixels)
        masks: list[list[Tensor]] = [[] for _ in batch.sizes]
        labels, order = [], torch.arange(len(batch.image_index), device=batch.pixels.device)
        for rows in order.split(AT_ONCE):
            index = batch.image_index[rows]
            prompts = (None if part is None else part[rows] for part in (batch.boxes, batch.points))
            low_res = self.decode(features, *prompts, index).logits[:, 0]
            seen = embed_regions(segmenter, features, mask_boxes(low_res), index, ROI_SIZE)
            labels.append(name_logits(seen, self.vectors)[:, :-1].argmax(1))
            for place, part in enumerate(segmenter.postprocess(low_res, list(batch.sizes), index)):
                masks[place].append(part > 0)
        whole = [torch.cat(parts) for parts in masks]
        ious = [mask_ious(found, truth) for found, truth in zip(whole, batch.masks, strict=True)]
        return whole, torch.cat(ious), torch.cat(labels)


def prepare_named_step(model: EVFModel) -> Probe:
    """Let the gradient into the mask decoder and what names regions.

    Raises:
        ModelError: the model gives no names.
    """
    if not isinstance(model.config.segmenter, OVSAMConfig) or model.encoder is not None:
        raise ModelError(f"{model.config.name} gives no names. Train an ovsam model, such as ovsam-rn50x16")
    model.requires_grad_(False)
    for name, parameter in model.segmenter.named_parameters():
        parameter.requires_grad_(model.segmenter.part_of(name) in TRAINED)
    return leave_out_unreached(model, _read_all)


def _read_all(shapes: EVFModel) -> list[Tensor]:
    """Return what the losses read: a mask, the pyramid, and the weights that its regions are multiplied with."""
    segmenter, side = shapes.segmenter, shapes.segmenter.image_spec.size
    with torch.device("meta"):
        features = segmenter.encode_image(torch.empty(1, 3, side, side))
        sparse, dense = segmenter.encode_prompts(Prompts(boxes=torch.empty(1, 4)))
    logits = segmenter.decode(features, sparse, dense).logits
    return [logits, *features.high_res[:-1], segmenter.region_conv.weight]


def named_inputs(batch: Any) -> tuple[Any, ...]:
    """Return the arguments of `NameStep.forward` for a `datasets.named.NamedBatch` on the model's device."""
    return (
        batch.pixels, batch.masks, batch.mask_index, batch.boxes, batch.points, batch.by_box, batch.labels,
        batch.image_index, batch.seeds,
    )  # fmt: skip
