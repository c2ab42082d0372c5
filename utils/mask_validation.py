"""What a training on boxes and points measures of itself: loss, IoU and boundary IoU, and a sheet of masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .row_validation import RowValidation
from .visualize import overlay, thumbnail

BOUNDARY = 0.02
"""How deep the boundary of a mask goes, as a share of the image's diagonal (arXiv 2103.16562)."""
PICTURES, TILE = 6, 256
NAMES = ("iou", "boundary_iou", "loss")


@dataclass(frozen=True)
class _Row:
    """The numbers of a mask, in the order of `NAMES`; both masks of the first images, bool [h, w]."""

    order: tuple[int, int]
    values: tuple[float, ...]
    masks: tuple[np.ndarray, np.ndarray] | None


class MaskValidation(RowValidation):
    """Measures a segmenter, mask by mask: `iou`, `boundary_iou` and `loss`, means over the masks, then over the sets.

    The masks are those of boxes, the best of three by predicted IoU, at the resolution of the network's input.
    """

    best_by = "iou"
    numbers = NAMES

    def rows(self, module: nn.Module, batch: Any) -> list[_Row]:
        """Return a row of each mask; see `RowValidation.rows`."""
        logits, losses = module.measure(batch)
        rows = []
        parts = zip(logits.split([len(part) for part in batch.masks]), batch.masks, batch.sizes, strict=True)
        start = 0
        for index, (part, truth, (height, width)) in zip(batch.indices, parts, strict=True):
            full = F.interpolate(part[:, None].float(), truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            found, truth = full > 0, truth > 127
            values = torch.stack([mask_iou(found, truth), boundary_iou(found, truth)], 1).tolist()
            for place, row in enumerate(values):
                masks = None
                if index < PICTURES:
                    masks = (found[place, :height, :width].cpu().numpy(), truth[place, :height, :width].cpu().numpy())
                rows.append(_Row((index, place), (*row, float(losses[start + place])), masks))
            start += len(part)
        return rows

    def summarise(self, rows: Sequence[_Row]) -> dict[str, float]:
        """Return the means of some masks."""
        return dict(zip(NAMES, np.mean([row.values for row in rows], axis=0).tolist(), strict=True))

    def sheet(self, rows: Sequence[_Row], dataset: Any) -> np.ndarray:
        """Return images with the true masks on the left and those found on the right, a row each, uint8 RGB."""
        sheet, kept = [], [row for row in rows if row.masks]
        for index in dict.fromkeys(row.order[0] for row in kept):
            pairs = [row.masks for row in kept if row.order[0] == index]
            height, width = pairs[0][0].shape
            image = cv2.resize(dataset.load(index).item.image, (width, height), interpolation=cv2.INTER_AREA)
            pictures = [overlay(image, np.stack([pair[which] for pair in pairs])) for which in (1, 0)]
            sheet.append(np.concatenate([thumbnail(picture, TILE) for picture in pictures], axis=1))
        return np.concatenate(sheet)


def mask_iou(found: Tensor, truth: Tensor) -> Tensor:
    """Return the IoU of masks bool [N, H, W], float64 [N], in 0..1; 1 where both are empty."""
    both, either = ((part).flatten(1).sum(1).double() for part in (found & truth, found | truth))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def boundary_iou(found: Tensor, truth: Tensor) -> Tensor:
    """Return the IoU of the boundaries of masks bool [N, H, W] (arXiv 2103.16562), float64 [N]."""
    return mask_iou(boundaries(found), boundaries(truth))


def boundaries(masks: Tensor) -> Tensor:
    """Return the pixels of masks bool [N, H, W] near their edge or that of the image: what erosion takes away."""
    depth = max(1, round(BOUNDARY * float(np.hypot(*masks.shape[-2:]))))
    outside = F.pad((~masks).float(), (depth,) * 4, value=1.0)[:, None]
    window = 2 * depth + 1  # a square is eroded by its rows, then by its columns
    near = F.max_pool2d(F.max_pool2d(outside, (1, window), 1), (window, 1), 1)[:, 0]
    return masks & (near > 0)
