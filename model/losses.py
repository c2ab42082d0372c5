"""The loss of EVF-SAM: binary cross-entropy and dice per mask, over every pixel of the image or at sampled points.

Source: EVF-SAM `model/evf_sam.py` (after LISA); the points follow PointRend (arXiv 1912.08193) and Mask2Former.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.image import ImageSpec
from utils.masks import IGNORE

DICE_SCALE, DICE_EPS = 1000.0, 1e-6
TEMPERATURE = 0.07
EACH_PATCH, NEVER = 3.0, -1e4
DISTANCE, CELL_SCALE = 10.0, 20.0
"""The code of a point gives its own cell a logit of `CELL_SCALE`."""
BACKGROUND = 0.1
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


def pointing_losses(fit: Tensor, masks: Tensor) -> Tensor:
    """Return how far the patches that the encoder marks are from those that are meant.

    Two cross-entropies: of each patch alone, and of the choice among all patches where something is meant. The first
    says how much, also that nothing is; the second, where, and does not drown in what is clearly not meant.

    Args:
        fit: logits of patches, float [n, g, g]; the grid covers the whole image.
        masks: uint8 [n, H, W] at the image's size, as `targets` of `mask_losses`.

    Returns:
        float32 [n], the first weighted by `EACH_PATCH`, each patch by its share of pixels that count.
    """
    share, counts = (part.flatten(1) for part in patch_shares(masks, fit.shape[-1]))
    fit, truth = fit.float().flatten(1), share / counts.clamp(min=1e-6)
    each = F.binary_cross_entropy_with_logits(fit, truth, reduction="none") * counts
    each = each.sum(1) / counts.sum(1).clamp(min=1e-6)
    where = fit.masked_fill(counts == 0, NEVER).log_softmax(1)
    where = -(where * share).sum(1) / share.sum(1).clamp(min=1e-6)
    return EACH_PATCH * each + where


def place_losses(prompts: Tensor, shares: Tensor, cells: Tensor) -> Tensor:
    """Return how far prompts are from saying where things are.

    The squared distance to the mean position code of what is meant, and the cross-entropy of the choice among the
    cells that the prompt is nearest to: the second teaches faster, the first gives what a segmenter can be taught with.

    Args:
        prompts: float [n, 256].
        shares: float [n, C], as `Segmenter.region_shares`; cells: float [C, 256], their codes.

    Returns:
        float32 [n], the first weighted by `DISTANCE`; the second is 0 where nothing is meant.
    """
    prompts = prompts.float()
    distance = (prompts - shares @ cells).square().mean(1)
    found = prompts @ cells.T * (CELL_SCALE / cells.square().sum(1))
    return DISTANCE * distance - (found.log_softmax(1) * shares).sum(1)


def patch_shares(masks: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return how much of each patch is meant, and how much of it counts, float [n, side, side] in 0..1."""
    return tuple(F.adaptive_avg_pool2d(part.float(), side) for part in (masks == 1, masks != IGNORE))


def contrast_losses(words: Tensor, patches: Tensor, image_index: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy of each phrase's search for its patches among those of all images.

    As the contrast of images and captions in CLIP (arXiv 2103.00020), with patches in the place of images.

    Args:
        words: float [N, D]; patches: float [B, P, D], rows of a square grid; image_index: int64 [N].
        masks: per image, as in `pointing_losses`.

    Returns:
        float32 [N], 0 for a phrase that means nothing.
    """
    count = patches.shape[1]
    found = F.normalize(words.float(), dim=-1) @ F.normalize(patches.float().flatten(0, 1), dim=-1).T
    share = torch.cat([patch_shares(part, math.isqrt(count))[0] for part in masks]).flatten(1)
    share = share / share.sum(1, keepdim=True).clamp(min=1e-6)
    own = (
        (found / TEMPERATURE)
        .log_softmax(1)
        .unflatten(1, (-1, count))[torch.arange(len(words), device=words.device), image_index]
    )
    return -(share * own).sum(1)


def iou_losses(scores: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
    """Return the squared errors of predicted IoU, float32 [n].

    Args:
        scores: predicted IoU, float [n].
        logits: float [n, H, W]; masks: uint8 of the same shape, as `targets` of `mask_losses`. Where nothing is meant
            the IoU is 0, whatever is predicted: the score says how likely the mask is what was asked for.
    """
    predicted, target = (logits > 0) & (masks != IGNORE), masks == 1
    both, either = ((predicted & target).flatten(1).sum(1), (predicted | target).flatten(1).sum(1))
    return (scores.float() - both / either.clamp(min=1)) ** 2


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


def hypothesis_losses(logits: Tensor, targets: Tensor, points: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the losses of several masks for each target, at points that are drawn for each mask alone.

    As EfficientViT-SAM's trainer, but for one thing: it resizes the logits to the network's input and samples those.

    Args:
        logits: float [n, M, h, w], on a grid over the square input.
        targets: float [n, S, S], 0..1, soft at the edges; the same input.
        points: how many. Most lie where the logits are near 0, the rest anywhere.
        generator: on the device of the logits; None takes the global one.

    Returns:
        float32 [n, M, 2]: cross-entropy, and dice loss smoothed by 1.
    """
    rows = logits.flatten(0, 1)[:, None].float()
    count = int(points * UNCERTAIN_SHARE)
    with torch.no_grad():
        random = partial(torch.rand, device=logits.device, generator=generator)
        where = choose_points(rows.detach(), random(len(rows), points * OVERSAMPLE, 2), count)
        where = torch.cat([where, random(len(rows), points - count, 2)], dim=1)
    return losses_at(logits, targets, where.unflatten(0, logits.shape[:2]))


def losses_at(logits: Tensor, targets: Tensor, where: Tensor) -> Tensor:
    """Return the losses of `hypothesis_losses` at given points, float32 [n, M, 2].

    Args:
        where: x y from 0 to 1, float [n, M, P, 2].
    """
    with torch.no_grad():
        truth = _sample(targets[:, None], where.flatten(1, 2), "bilinear").unflatten(1, where.shape[1:3])
    found = _sample(logits.flatten(0, 1)[:, None].float(), where.flatten(0, 1), "bilinear")
    return sampled_losses(found, truth.flatten(0, 1)).unflatten(0, logits.shape[:2])


def choose_points(logits: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Return those of the candidates at which logits [R, 1, h, w] are nearest to 0, [R, count, 2] of [R, P, 2]."""
    doubt = -_sample(logits, candidates, "bilinear").abs()
    best = doubt.topk(count, dim=1).indices
    return candidates.gather(1, best[..., None].expand(-1, -1, 2))


def sampled_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy and dice loss, smoothed by 1, of logits at points and targets 0..1, float32 [R, 2].

    Args:
        logits, targets: float [R, P].
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * targets).sum(1) + 1) / (chance.sum(1) + targets.sum(1) + 1)
    return torch.stack([entropy, dice], dim=1)


def name_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of names, float32 [N], 0 where the label is -1.

    Args:
        logits: float [N, K + 1], the last that of "none of them", which counts a tenth.
        labels: int64 [N].
    """
    weights = logits.new_ones(logits.shape[1], dtype=torch.float32)
    weights[-1] = BACKGROUND
    return F.cross_entropy(logits.float(), labels, weights, ignore_index=-1, reduction="none")


def least_losses(losses: Tensor, weights: Tensor) -> Tensor:
    """Return of the losses [n, M, L] of M hypotheses those whose weighted sum is least, [n, L]."""
    best = (losses.detach() @ weights).argmin(1)
    return losses[torch.arange(len(best), device=best.device), best]


def _sample(maps: Tensor, where: Tensor, mode: str) -> Tensor:
    """Return [n, P]: maps [n, 1, h, w] at `where` [n, P, 2], x y from 0 to 1."""
    return F.grid_sample(maps, where[:, :, None] * 2 - 1, mode=mode, align_corners=False)[:, 0, :, 0]
