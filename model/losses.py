"""The loss of EVF-SAM: binary cross-entropy and dice per mask, over every pixel of the image or at sampled points.

Source: EVF-SAM `model/evf_sam.py` (after LISA); the points follow PointRend (arXiv 1912.08193) and Mask2Former.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.image import ImageSpec
from utils.masks import IGNORE

DICE_SCALE, DICE_EPS = 1000.0, 1e-6
OVERSAMPLE, UNCERTAIN_SHARE = 3, 0.75
"""Points: this many times the candidates, and this share of the most uncertain ones among the points."""


def mask_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the two losses of each mask.

    Args:
        logits: float [N, ...], before the sigmoid.
        targets: uint8 [N, ...] of the same shape: 0, 1, or 255 where a pixel does not count.

    Returns:
        float32 [N, 2]: cross-entropy, mean over the pixels that count, in 0..inf; dice loss in 0..1.
    """
    logits, counts = logits.flatten(1).float(), None
    ignored = targets.flatten(1) == IGNORE
    truth = targets.flatten(1).float().masked_fill(ignored, 0.0)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").masked_fill(ignored, 0.0)
    counts = (~ignored).sum(1).clamp(min=1)
    chance = logits.sigmoid().masked_fill(ignored, 0.0)
    overlap = 2 * (chance / DICE_SCALE * truth).sum(1)
    area = (chance / DICE_SCALE).sum(1) + (truth / DICE_SCALE).sum(1)
    dice = 1 - (overlap + DICE_EPS) / (area + DICE_EPS)
    return torch.stack([entropy.sum(1) / counts, dice], dim=1)


def point_losses(logits: Tensor, targets: Tensor, spec: ImageSpec, points: int) -> Tensor:
    """Return the two losses of the masks of one image, at points of the low-resolution logits.

    Args:
        logits: float [n, h, w] of the segmenter, whose grid covers its square input.
        targets: uint8 [n, H, W] at the image's size, as in `mask_losses`.
        spec: how the image became that input.
        points: how many. Most lie where the logits are near 0, the rest anywhere in the image.

    Returns:
        float32 [n, 2]: cross-entropy and dice loss.
    """
    height, width = spec.resized_size(*targets.shape[-2:])
    share = torch.tensor([width / spec.size, height / spec.size], device=logits.device)
    with torch.no_grad():
        candidates = torch.rand(len(logits), points * OVERSAMPLE, 2, device=logits.device)
        doubt = -_sample(logits[:, None].float(), candidates * share, "bilinear").abs()
        count = int(points * UNCERTAIN_SHARE)
        best = doubt.topk(count, dim=1).indices[..., None].expand(-1, -1, 2)
        anywhere = torch.rand(len(logits), points - count, 2, device=logits.device)
        chosen = torch.cat([candidates.gather(1, best), anywhere], dim=1)
        truth = _sample(targets[:, None].float(), chosen, "nearest").to(torch.uint8)
    return mask_losses(_sample(logits[:, None].float(), chosen * share, "bilinear"), truth)


def _sample(maps: Tensor, where: Tensor, mode: str) -> Tensor:
    """Return [n, P]: maps [n, 1, h, w] at `where` [n, P, 2], x y from 0 to 1."""
    return F.grid_sample(maps, where[:, :, None] * 2 - 1, mode=mode, align_corners=False)[:, 0, :, 0]
