"""The recognition of Open-Vocabulary SAM: the region around a mask is compared with the vectors of names.

Source: arXiv 2401.02955. Two branches see a region: the trained head, and CLIP as it is. The published demonstration
uses the head alone, the published evaluation both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from utils.masks import boxes_of_masks

from ..segmenters.ovsam import OVSAMSegmenter
from ..types import ImageFeatures
from ..vocabulary import Vocabulary

LOGIT_SCALE = 100.00296020507812
"""exp(4.6052) in float32: CLIP's temperature, a constant here."""
FINEST_SIDE = 56
"""Boxes whose sides are below twice this many input pixels are read from the finest level of the pyramid."""
MASK_SIDE = 32
"""Side of the grid that decides whether CLIP has anything of the mask to see."""
BASE_SHARE, NOVEL_SHARE = 0.1, 0.9
"""Weight of CLIP for names that the head was trained with, and for all others."""
NEVER = -1000.0
"""Fused logit of names that a vocabulary counts neither as base nor as novel."""
AT_ONCE = 32
"""Regions that are looked at together, so that memory stays bounded."""


class Recognizer:
    """Compares regions with the names of a vocabulary.

    Args:
        segmenter: what encoded the images; it holds the weights.
        vocabulary: the names.
        roi_size: side of the grid that the head reads: 12 in training, and in the published evaluation on COCO; 7 in
            that on LVIS and in the published demonstration.
    """

    def __init__(self, segmenter: OVSAMSegmenter, vocabulary: Vocabulary, roi_size: int = 12) -> None:
        self.segmenter, self.roi_size = segmenter, roi_size
        self.set_vocabulary(vocabulary)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Compare with other names from now on.

        Raises:
            VocabularyError: vectors of another width than the model's.
        """
        vocabulary.check_width(self.segmenter.config.embed_width)
        self.vocabulary = vocabulary
        device = self.segmenter.region_conv.weight.device
        self._vectors = vocabulary.vectors.to(device, torch.float32)
        self._share = vocabulary.shares(BASE_SHARE, NOVEL_SHARE).to(device)
        self._never = self._share.isnan()

    def embed_regions(self, features: ImageFeatures, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Return what the head sees in boxes, float32 [N, D], 0 or more; zeros where a box is empty.

        Args:
            boxes: float [N, 4], x1 y1 x2 y2 in input pixels.
            image_index: int64 [N].
        """
        return embed_regions(self.segmenter, features, boxes, image_index, self.roi_size)

    def embed_with_clip(self, features: ImageFeatures, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Return what CLIP sees in boxes, float32 [N, D]; not zero where a box is empty. Arguments as above."""
        backbone, side = self.segmenter.backbone, self.segmenter.config.pool_side
        kind = backbone.attnpool.q_proj.weight.dtype
        parts = [
            backbone.attnpool(_align(features.high_res[-1], some, index, 32, side).to(kind))
            for some, index in zip(boxes.split(AT_ONCE), image_index.split(AT_ONCE), strict=True)
        ]
        return torch.cat(parts).float()

    def logits(self, embedding: Tensor) -> Tensor:
        """Return the logits of the K names and of the background, float32 [N, K + 1], of embeddings [N, D]."""
        return name_logits(embedding, self._vectors)

    def fuse(self, head: Tensor, clip: Tensor, low_res: Tensor) -> Tensor:
        """Return the logits of both branches together, float32 [N, K + 1].

        Args:
            head, clip: logits of each, [N, K + 1].
            low_res: mask logits float [N, 4h, 4w]. Where nothing of a mask is left on a coarse grid, the head alone
                counts. The grid is sampled, as published, so that a large mask with holes can count as nothing.
        """
        is_seen = (coarse_mask(low_res) > 0).flatten(1).any(1)
        share = torch.where(is_seen[:, None], self._share.nan_to_num(), 0.0)
        fused = head.log_softmax(-1) * (1 - share) + clip.log_softmax(-1) * share
        return fused.masked_fill(self._never, NEVER)


def embed_regions(
    segmenter: OVSAMSegmenter, features: ImageFeatures, boxes: Tensor, image_index: Tensor, roi_size: int
) -> Tensor:
    """Return what the head sees in boxes; see `Recognizer.embed_regions`. Gradients reach the pyramid and the head."""
    levels, conv = pyramid_level(boxes), segmenter.region_conv
    found = boxes.new_zeros(len(boxes), conv.out_channels)
    for number, maps in enumerate(features.high_res[:-1]):
        for rows in (levels == number).nonzero()[:, 0].split(AT_ONCE):
            regions = _align(maps, boxes[rows], image_index[rows], 4 * 2**number, roi_size)
            with torch.autocast(regions.device.type, enabled=False):
                grid = F.conv2d(regions, conv.weight.float()).relu()
            found = found.index_copy(0, rows, grid.mean((2, 3)))
    return found


def name_logits(embedding: Tensor, vectors: Tensor) -> Tensor:
    """Return the logits of K names and of the background, float32 [N, K + 1]; see `Recognizer.logits`.

    Args:
        embedding: float [N, D]; vectors: float32 [K, P, D], unit vectors.
    """
    with torch.autocast(embedding.device.type, enabled=False):  # bf16 would round logits to halves
        alike = torch.einsum("nd,kpd->nkp", F.normalize(embedding.float(), dim=-1), vectors).amax(-1)
    return LOGIT_SCALE * F.pad(alike, (0, 1))


def coarse_mask(low_res: Tensor) -> Tensor:
    """Return mask logits [N, 4h, 4w] on the coarse grid that `Recognizer.fuse` looks at, not antialiased."""
    side = (MASK_SIDE, MASK_SIDE)
    return F.interpolate(low_res[:, None].float(), side, mode="bilinear", align_corners=False)[:, 0]


def mask_boxes(low_res: Tensor) -> Tensor:
    """Return the boxes around masks in input pixels, float32 [N, 4]; zeros where a mask is empty.

    Args:
        low_res: mask logits [N, 4h, 4w]; a pixel of them is four of the input.
    """
    return boxes_of_masks(low_res > 0) * 4


def pyramid_level(boxes: Tensor) -> Tensor:
    """Return the level of the pyramid that each box [N, 4] is read from, int64 [N] in 0..3."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return (area.sqrt() / FINEST_SIDE + 1e-6).log2().floor().clamp(0, 3).long()


def _align(maps: Tensor, boxes: Tensor, image_index: Tensor, stride: int, side: int) -> Tensor:
    """Return maps [B, C, h, w] under boxes in input pixels, float32 [N, C, side, side]."""
    places = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1).float()
    return roi_align(maps.float(), places, side, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)
