"""The point inside a mask that is farthest from its edge, the click of the published evaluation of OVSAM."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 0.35
"""Of the approximate transform: how closely its soft minimum follows the nearest edge."""


def centre_points(masks: Tensor, approximate: bool = False) -> Tensor:
    """Return the place farthest from the edge of each mask; the border of the picture counts as an edge.

    Args:
        masks: bool [N, H, W].
        approximate: take the approximate transform of the published evaluation, which misses the true maximum by up
            to a tenth: its points are needed to compare numbers with it.

    Returns:
        int64 [N, 2], x y; 0 0 for an empty mask.
    """
    framed = F.pad(masks, (1, 1, 1, 1))
    if approximate:
        distances = approximate_distances(framed)
    else:
        pictures = framed.cpu().numpy().astype(np.uint8)
        found = [cv2.distanceTransform(one, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for one in pictures]
        distances = torch.from_numpy(np.stack(found)) if found else torch.zeros(framed.shape)
    inner = distances[:, 1:-1, 1:-1]
    best = inner.flatten(1).argmax(1)
    return torch.stack([best % masks.shape[2], best // masks.shape[2]], dim=1)


def approximate_distances(masks: Tensor) -> Tensor:
    """Return roughly how far each pixel of a mask is from the nearest one outside, float32 [N, H, W].

    The convolutional transform of arXiv 1906.01376 and kornia: pixel by pixel the outside grows, and each step adds a
    soft minimum over the 3x3 neighbours.
    """
    outside = (~masks)[:, None].float()
    steps = torch.tensor([-1.0, 0.0, 1.0], device=masks.device)
    kernel = torch.exp(-torch.hypot(steps[:, None], steps[None]) / SHARPNESS)[None, None]
    distances = torch.zeros_like(outside)
    for step in range(max(masks.shape[-2:])):
        spread = F.conv2d(F.pad(outside, (1, 1, 1, 1), mode="replicate"), kernel)
        near = -SHARPNESS * torch.log(spread)
        near = near.masked_fill(near.isinf(), 0.0)
        is_new = near > 0
        if not is_new.any():
            break
        distances += (step + near) * is_new
        outside = outside.masked_fill(is_new, 1.0)
    return distances[:, 0]
