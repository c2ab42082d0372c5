"""Masks as RLE, boxes, areas and pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .files import atomic_path

IGNORE = 255
"""Mask value of pixels that count neither in a loss nor in a metric."""


def boxes_of_masks(masks: torch.Tensor) -> torch.Tensor:
    """Return the tight box around each mask.

    Args:
        masks: bool [N, H, W].

    Returns:
        float32 [N, 4], x1 y1 x2 y2 in pixels, x2 and y2 exclusive; zeros for an empty mask.
    """
    boxes = []
    for axis in (-2, -1):
        occupied = masks.any(dim=axis)
        first = occupied.float().argmax(dim=-1)
        last = occupied.shape[-1] - occupied.flip(-1).float().argmax(dim=-1)
        boxes += [first, last]
    x1, x2, y1, y2 = boxes
    return torch.stack([x1, y1, x2, y2], dim=-1).float() * masks.flatten(-2).any(-1, keepdim=True)


def encode_rle(masks: np.ndarray) -> list[dict]:
    """Return COCO run-length encodings with text counts.

    Args:
        masks: bool or uint8 [N, H, W].
    """
    from pycocotools import mask as coco_mask

    rles = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]


def decode_rle(rle: dict) -> np.ndarray:
    """Return the mask of a COCO run-length encoding, bool [H, W]."""
    from pycocotools import mask as coco_mask

    counts = rle["counts"]
    return coco_mask.decode({**rle, "counts": counts.encode() if isinstance(counts, str) else counts}).astype(bool)


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Write a bool mask [H, W] as an 8-bit PNG with values 0 and 255."""
    with atomic_path(path) as temporary:
        Image.fromarray(mask.astype(np.uint8) * 255).save(temporary)
