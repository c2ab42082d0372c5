"""Training on clips: a phrase prompts the first frame, SAM 2's memory finds its object on the others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.training import LossArgs
from utils.masks import IGNORE

from .evf import EVFModel
from .losses import mask_losses, point_losses
from .segmenters.base import best_of_three, pick_images
from .tracker import Found, ObjectMemory, Tracker
from .types import ImageFeatures, MaskPrediction


class ClipStep(nn.Module):
    """A model with its loss over clips: what engines wrap, as `model.training.TrainingStep` for images.

    Of the decoder's masks 1 to 3 the best learns, as in SAM 2 (arXiv 2408.00714, section D). What is remembered of a
    frame is what was found on it, but whether the object is there is told: else nothing would be found at first.

    Args:
        drawn: share of the objects whose first frame is remembered as it was drawn; see `DataArgs.clip_masks`.

    Raises:
        ModelError: not SAM 2, or without memory.
    """

    def __init__(self, model: EVFModel, loss: LossArgs, drawn: float = 0.0) -> None:
        super().__init__()
        self.model, self.loss, self.drawn = model, loss, drawn
        self.tracker = Tracker(model.segmenter)
        self.spec = model.segmenter.image_spec.for_video()
        parts = {model.segmenter.part_of(name) for name, p in model.segmenter.named_parameters() if p.requires_grad}
        self.has_frozen_images = "image_encoder" not in parts
        self.has_frozen_phrases = not any(
            p.requires_grad for part in (model.encoder, model.projector) for p in part.parameters()
        )

    def forward(
        self,
        pixels: Tensor,
        encoder_pixels: Tensor,
        ids: Tensor,
        padding: Tensor | None,
        clip_index: Tensor,
        masks: Sequence[Tensor],
    ) -> Tensor:
        """Return the losses of each phrase, means over frames, float32 [N, L], in the order of `LossArgs.terms`.

        Args:
            pixels: of all frames, float [B, T, 3, S, S], made by `spec`.
            encoder_pixels: of the first frames, float [B, 3, s, s].
            ids, padding: N phrases; clip_index: int64 [N], the clip of each.
            masks: per clip uint8 [n_i, T, H_i, W_i] of 0, 1 and 255 (does not count), in the order of the phrases.
        """
        frames = pixels.shape[1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_frozen_images):
            encoded = self.model.segmenter.encode_frame(pixels.flatten(0, 1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_frozen_phrases):
            prompt, _ = self.model.encode_phrases(encoder_pixels, ids, padding, clip_index)
        memories, rows = [ObjectMemory() for _ in range(len(prompt))], []
        for frame in range(frames):
            features = _frame_of(encoded, clip_index * frames + frame, len(prompt))
            truths = [part[:, frame] for part in masks]
            is_there = torch.cat([(part == 1).flatten(1).any(1) for part in truths])
            prediction = self.tracker.look(features, None if frame else prompt[:, None], memories, frame)
            rows.append(self._losses(prediction, truths, is_there))
            index = best_of_three(prediction)
            found = self.tracker.settle(prediction, index, index, is_there)
            if self.drawn and not frame:
                found = self._with_drawn(found, features, truths)
            for memory, kept in zip(memories, self.tracker.remember(features, found, not frame), strict=True):
                if frame:
                    memory.keep(frame, kept, 1)
                else:
                    memory.prompted[frame] = kept
        losses, counts = (torch.stack(part) for part in zip(*rows, strict=True))
        return losses.sum(0) / counts.sum(0).clamp(min=1)[:, None]

    def _with_drawn(self, found: Found, features: ImageFeatures, truths: Sequence[Tensor]) -> Found:
        """Return what was found, some of it as it was drawn: which objects is drawn at random.

        Args:
            truths: as `_losses`.
        """
        size = (self.spec.size, self.spec.size)
        sized = [F.interpolate((part == 1)[:, None].float(), size, mode="bilinear", antialias=True) for part in truths]
        taken = self.tracker.take(features, torch.cat(sized)[:, 0] > 0.5)
        is_taken = torch.rand(len(found.scores), device=found.scores.device) < self.drawn
        return taken.where(is_taken, found)

    def _losses(self, prediction: MaskPrediction, truths: Sequence[Tensor], is_there: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of a frame, float32 [N, L], and which objects count, float32 [N].

        Args:
            truths: per clip uint8 [n_i, H_i, W_i]; an object whose mask nobody drew does not count.
        """
        logits, scores = prediction.logits[:, 1:], prediction.iou[:, 1:].float()
        choices, is_known = logits.shape[1], torch.cat([(part != IGNORE).flatten(1).any(1) for part in truths])
        parts = []
        for part, truth in zip(logits.split([len(part) for part in truths]), truths, strict=True):
            repeated = truth.repeat_interleave(choices, dim=0)
            if self.loss.points:
                pair = point_losses(part.flatten(0, 1), repeated, self.spec, self.loss.points)
            else:
                size = tuple(truth.shape[-2:])
                sized = F.interpolate(part.flatten(0, 1)[:, None].float(), size, mode="bilinear", align_corners=False)
                pair = mask_losses(sized[:, 0], repeated)
            parts.append(pair.unflatten(0, (-1, choices)))
        masks = torch.cat(parts)
        best = (masks @ masks.new_tensor([self.loss.bce, self.loss.dice])).argmin(1)
        counts = is_known.float()
        seen = (counts * is_there)[:, None]
        columns = [masks[torch.arange(len(best), device=best.device), best] * seen]
        if self.loss.iou:
            error = (scores - _overlaps(logits, truths)).square().mean(1, keepdim=True)
            columns.append(error * seen)
        if self.loss.presence:
            wrong = F.binary_cross_entropy_with_logits(
                prediction.object_score.float(), is_there.float(), reduction="none"
            )
            columns.append((wrong * counts)[:, None])
        return torch.cat(columns, dim=1), counts


def _frame_of(encoded: ImageFeatures, rows: Tensor, count: int) -> ImageFeatures:
    """Return the features of one frame for each object."""
    return ImageFeatures(
        pick_images(encoded.embedding, rows, count),
        tuple(pick_images(level, rows, count) for level in encoded.high_res),
    )


@torch.no_grad()
def _overlaps(logits: Tensor, truths: Sequence[Tensor]) -> Tensor:
    """Return the IoU of each mask, float32 [N, M], on the grid of the logits [N, M, h, w]."""
    shape = logits.shape[-2:]
    target = torch.cat([F.adaptive_avg_pool2d((part == 1).float(), shape) for part in truths])[:, None] > 0.5
    predicted = logits > 0
    both, either = ((part).flatten(2).sum(2) for part in (predicted & target, predicted | target))
    return both / either.clamp(min=1)
