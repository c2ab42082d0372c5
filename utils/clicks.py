"""Simulated clicks: where a person would click next to correct a mask.

As in the evaluation of EfficientViT-SAM (arXiv 2402.05008), which follows RITM (arXiv 2102.06583): the place deepest
inside the larger of what is missing and what is too much.
"""

import cv2
import numpy as np

MAX_PIXELS = 1 << 26
"""Pixels whose distances are computed at once: 256 MB of float32."""


def next_clicks(truth: np.ndarray, predicted: np.ndarray, clicked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the next click on each mask.

    Where nothing is wrong that was not clicked before, the click is negative, at (0, 0).

    Args:
        truth: bool [n, H, W].
        predicted: bool [n, H, W].
        clicked: int64 [n, k, 2], x y of the earlier clicks; no place is clicked twice.

    Returns:
        x y in pixels, int64 [n, 2]; and which are positive, bool [n]: more is missing than too much.
    """
    count, height, width = truth.shape
    step = max(1, MAX_PIXELS // (2 * (height + 1) * (width + 2)))
    places, is_positive = np.zeros((count, 2), np.int64), np.zeros(count, bool)
    for start in range(0, count, step):
        part = slice(start, start + step)
        errors = np.stack([truth[part] & ~predicted[part], ~truth[part] & predicted[part]], axis=1)
        depths = depths_of(errors.reshape(-1, height, width)).reshape(errors.shape)
        rows = np.arange(len(errors))[:, None]
        depths[rows, :, clicked[part, :, 1], clicked[part, :, 0]] = 0
        flat = depths.reshape(*depths.shape[:2], -1)
        deepest = flat.argmax(axis=2)  # of several the first, row by row
        missing, extra = np.take_along_axis(flat, deepest[..., None], axis=2)[..., 0].T
        is_positive[part] = missing > extra
        chosen = np.where(is_positive[part], deepest[:, 0], deepest[:, 1])
        places[part] = np.stack([chosen % width, chosen // width], axis=1)
    return places, is_positive


def depths_of(masks: np.ndarray) -> np.ndarray:
    """Return how far each pixel is from the nearest one outside its mask, float32 [n, H, W], 0 outside.

    The outside begins at the edge of the image. One call serves all: a row of zeros keeps the masks apart.

    Args:
        masks: bool [n, H, W].
    """
    count, height, width = masks.shape
    rows = np.zeros((count * (height + 1) + 1, width + 2), np.uint8)
    rows[1:].reshape(count, height + 1, width + 2)[:, :-1, 1:-1] = masks
    depths = cv2.distanceTransform(rows, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return depths[1:].reshape(count, height + 1, width + 2)[:, :-1, 1:-1].copy()
