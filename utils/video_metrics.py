"""J and F of video object segmentation, as the DAVIS 2017 benchmark defines them (arXiv 1704.00675)."""

import math

import cv2
import numpy as np

TOLERANCE = 0.008
"""How far apart outlines may be and still match, as a share of the image's diagonal."""
CHANNELS = 512
"""Masks that OpenCV dilates in one call."""


def region_similarity(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return J, the IoU of each pair of masks, float64 [N]; 1 where both are empty.

    Args:
        predicted, truth: bool [N, H, W].
    """
    both, either = (predicted & truth).sum((1, 2)), (predicted | truth).sum((1, 2))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def contour_accuracy(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return F, how well the outlines of each pair of masks match, float64 [N]; 1 where both have none.

    Args:
        predicted, truth: bool [N, H, W].
    """
    if not len(predicted):
        return np.zeros(0)
    outlines = [_outlines(masks) for masks in (predicted, truth)]
    reach = math.ceil(TOLERANCE * math.hypot(*predicted.shape[1:]))
    near = [_dilate(lines, reach) for lines in outlines]
    counts = [lines.sum((1, 2)) for lines in outlines]
    precision = (outlines[0] & near[1]).sum((1, 2)) / np.maximum(counts[0], 1)
    recall = (outlines[1] & near[0]).sum((1, 2)) / np.maximum(counts[1], 1)
    precision, recall = np.where(counts[0] == 0, 1.0, precision), np.where(counts[1] == 0, 1.0, recall)
    return 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)


def _outlines(masks: np.ndarray) -> np.ndarray:
    """Return pixels that differ from the one to the right, below, or both, bool [N, H, W]."""
    padded = np.pad(masks, ((0, 0), (0, 1), (0, 1)), mode="edge")
    here, right, below, across = padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (here != right) | (here != below) | (here != across)


def _dilate(lines: np.ndarray, reach: int) -> np.ndarray:
    """Return pixels at most `reach` away from a line, bool [N, H, W]."""
    steps = np.arange(-reach, reach + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= reach**2).astype(np.uint8)
    grown = np.empty_like(lines)
    for start in range(0, len(lines), CHANNELS):
        part = np.ascontiguousarray(lines[start : start + CHANNELS].transpose(1, 2, 0)).astype(np.uint8)
        grown[start : start + CHANNELS] = cv2.dilate(part, disk).reshape(part.shape).transpose(2, 0, 1) > 0
    return grown
