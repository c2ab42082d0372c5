"""Segment everything: a grid of points prompts a SAM-like decoder, and the masks that hold are kept.

Settings, names and order of the results are those of segment-anything's automatic mask generator (arXiv 2304.02643,
appendix B). Masks whose predicted IoU is too low are dropped before they are brought to the size of the image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from utils.errors import ModelError
from utils.image import ImageLike, read_image
from utils.masks import boxes_of_masks, decode_rle, encode_rle

from .predictor import ImagePredictor
from .prompts import to_input
from .types import ImageFeatures, Prompts

EDGE = 20.0
"""A mask whose box ends so close to the edge of its crop, in pixels, is cut off there; another crop has all of it."""
OUTPUTS = ("binary_mask", "coco_rle", "uncompressed_rle")

Output = Literal["binary_mask", "coco_rle", "uncompressed_rle"]


@dataclass
class _Found:
    """K masks: COCO RLE of the whole image; boxes x1 y1 x2 y2, last pixels included, float32 [K, 4]; and the rest."""

    rles: list[dict]
    boxes: Tensor
    scores: Tensor
    stability: Tensor
    points: Tensor
    crops: Tensor

    def pick(self, kept: Tensor) -> "_Found":
        """Return some of them, int64 [k], in that order."""
        tensors = (getattr(self, name)[kept] for name in ("boxes", "scores", "stability", "points", "crops"))
        return _Found([self.rles[i] for i in kept.tolist()], *tensors)

    @staticmethod
    def join(parts: Sequence["_Found"]) -> "_Found":
        """Return all of several."""
        names = ("boxes", "scores", "stability", "points", "crops")
        tensors = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return _Found([rle for part in parts for rle in part.rles], *tensors)


class MaskGenerator:
    """Finds all objects of an image.

    Args:
        predictor: of a model that takes points; its `threshold` says where a mask is. Open-Vocabulary SAM makes one
            mask of a point instead of three, and its stability stands for the predicted IoU.
        points_per_side: points of the grid along each side.
        points_per_batch: points that are decoded together.
        pred_iou_thresh: least predicted IoU; 0 or less keeps every mask.
        stability_score_thresh: least IoU of the masks at thresholds `stability_score_offset` above and below; 0 or less
            keeps every mask.
        box_nms_thresh, crop_nms_thresh: boxes of one crop, and of different crops, that overlap more are one object.
        crop_n_layers: so often the image is cut into 4, 16, ... overlapping parts, which are searched too.
        crop_overlap_ratio: by how much they overlap, relative to the image's shorter side.
        crop_n_points_downscale_factor: by this the grid gets coarser with each layer.
        min_mask_region_area: smaller islands are removed and smaller holes filled, in pixels; 0 changes nothing.
        output_mode: how masks are returned: `binary_mask`, `coco_rle` or `uncompressed_rle`.

    Raises:
        ModelError: a model that takes no points, or a setting that cannot be.
    """

    def __init__(
        self,
        predictor: ImagePredictor,
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        min_mask_region_area: int = 0,
        output_mode: Output = "binary_mask",
    ) -> None:
        self.predictor, self.model = predictor, predictor.model
        if "points" not in self.model.segmenter.prompt_kinds:
            raise ModelError(
                f"{self.model.config.name} takes no points, so it cannot segment everything. Take a SAM, SAM-2 or "
                "EfficientViT-SAM model"
            )
        counts = {"points_per_side": points_per_side, "points_per_batch": points_per_batch,
                  "crop_n_points_downscale_factor": crop_n_points_downscale_factor}  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ModelError(f"{name} {value}: needed is at least 1")
        for name, value in {"crop_n_layers": crop_n_layers, "min_mask_region_area": min_mask_region_area}.items():
            if value < 0:
                raise ModelError(f"{name} {value}: needed is 0 or more")
        if output_mode not in OUTPUTS:
            raise ModelError(f"output_mode {output_mode!r}: known are {', '.join(OUTPUTS)}")
        self.per_side, self.at_once = points_per_side, points_per_batch
        self.least_iou, self.least_stability, self.offset = (
            pred_iou_thresh, stability_score_thresh, stability_score_offset,
        )  # fmt: skip
        self.box_nms, self.crop_nms = box_nms_thresh, crop_nms_thresh
        self.layers, self.overlap, self.coarser = crop_n_layers, crop_overlap_ratio, crop_n_points_downscale_factor
        self.least_area, self.output_mode = min_mask_region_area, output_mode

    @torch.inference_mode()
    def generate(self, image: ImageLike) -> list[dict[str, Any]]:
        """Return the masks of an image, each as a dict; the predictor keeps the image, for its next question.

        * `segmentation`: bool [H, W], or an RLE, as `output_mode` says; `area`: its pixels.
        * `bbox`: x y width height in pixels, the difference of the first and last pixel; `crop_box`: of the crop it was
          found in, x y width height.
        * `predicted_iou`, `stability_score`: what was asked of it; `point_coords`: [[x, y]] that prompted it.

        Args:
            image: path, Pillow image, or RGB array uint8 [H, W, 3].

        Raises:
            ImageError: the image cannot be used.
        """
        picture = read_image(image)
        boxes, layers = crop_boxes(picture.shape[:2], self.layers, self.overlap)
        found = _Found.join([self._search(picture, box, layer) for box, layer in zip(boxes, layers, strict=True)])
        if len(boxes) > 1:
            x1, y1, x2, y2 = found.crops.unbind(1)
            found = found.pick(_nms(found.boxes, 1 / ((x2 - x1) * (y2 - y1)), self.crop_nms))
        if self.least_area and found.rles:
            found = self._clean(found)
        return self._describe(found)

    def _search(self, picture: np.ndarray, crop: tuple[int, int, int, int], layer: int) -> _Found:
        """Return what is found in one crop, in pixels of the whole image."""
        left, top, right, bottom = crop
        part = picture[top:bottom, left:right]
        size = part.shape[:2]
        if layer == 0:
            self.predictor.set_image(part)
            features = self.predictor._image.features
        else:
            features = self.predictor._encode([part]).features
        grid = point_grid(max(1, int(self.per_side / self.coarser**layer))) * np.array([size[1], size[0]])
        batches = [
            self._decode(features, points, size)
            for points in np.split(grid, range(self.at_once, len(grid), self.at_once))
        ]
        parts = [self._to_whole(batch, crop, picture.shape[:2]) for batch in batches]
        found = _Found.join(parts)
        return found.pick(_nms(found.boxes, found.scores, self.box_nms))

    def _decode(self, features: ImageFeatures, points: np.ndarray, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return masks bool [K, h, w], scores, stability [K] and points [K, 2] of a batch of points."""
        predictor, segmenter = self.predictor, self.model.segmenter
        coordinates = torch.from_numpy(points).float()
        prompts = Prompts(points=coordinates[:, None], labels=torch.ones(len(points), 1, dtype=torch.long))
        sparse, dense = segmenter.encode_prompts(to_input(prompts, predictor.prompt_spec, size, self.model))
        prediction = segmenter.decode(
            features, sparse, dense, torch.zeros(len(points), dtype=torch.long, device=sparse.device)
        )
        first = min(1, prediction.logits.shape[1] - 1)  # of four masks, the first is for clearer prompts
        choices = prediction.logits.shape[1] - first
        scores, low = prediction.iou[:, first:].flatten().float(), prediction.logits[:, first:].flatten(0, 1)
        coordinates = coordinates.repeat_interleave(choices, dim=0)
        if self.least_iou > 0:
            kept = scores > self.least_iou
            scores, low, coordinates = scores[kept], low[kept], coordinates[kept.cpu()]
        [logits] = segmenter.postprocess(low, [size], torch.zeros(len(low), dtype=torch.long, device=low.device))
        inner = (logits > predictor.threshold + self.offset).flatten(1).sum(1, dtype=torch.int32)
        outer = (logits > predictor.threshold - self.offset).flatten(1).sum(1, dtype=torch.int32)
        stability = inner / outer
        masks = logits > predictor.threshold
        if self.least_stability > 0:
            kept = stability >= self.least_stability
            masks, scores, stability, coordinates = masks[kept], scores[kept], stability[kept], coordinates[kept.cpu()]
        return masks, scores.cpu(), stability.cpu(), coordinates

    def _to_whole(self, batch: tuple[Tensor, ...], crop: tuple[int, int, int, int], size: tuple[int, int]) -> _Found:
        """Return a batch in pixels of the whole image, without what the edge of its crop cuts off."""
        masks, scores, stability, points = batch
        left, top, right, bottom = crop
        boxes = boxes_of_masks(masks).cpu()
        boxes[:, 2:] -= (boxes[:, 2:] > 0).float()  # the last pixel, not the one behind it
        shift = torch.tensor([left, top])
        boxes = boxes + shift.repeat(2)
        own, whole = torch.tensor(crop).float(), torch.tensor([0, 0, size[1], size[0]]).float()
        is_cut = (((boxes - own).abs() <= EDGE) & ((boxes - whole).abs() > EDGE)).any(1)
        kept = (~is_cut).nonzero()[:, 0]
        full = np.zeros((len(kept), *size), bool)
        full[:, top:bottom, left:right] = masks[kept.to(masks.device)].cpu().numpy()
        return _Found(
            encode_rle(full) if len(full) else [],
            boxes[kept], scores[kept], stability[kept], points[kept] + shift, own.expand(len(kept), 4),
        )  # fmt: skip

    def _clean(self, found: _Found) -> _Found:
        """Remove small islands and fill small holes; of masks that are alike then, unchanged ones come first."""
        masks = np.stack([decode_rle(rle) for rle in found.rles])
        masks, had_holes = fill_small(masks, self.least_area, holes=True)
        masks, had_islands = fill_small(masks, self.least_area, holes=False)
        is_changed = had_holes | had_islands
        boxes = boxes_of_masks(torch.from_numpy(masks))
        boxes[:, 2:] -= (boxes[:, 2:] > 0).float()
        kept = _nms(boxes, torch.from_numpy(~is_changed).float(), max(self.box_nms, self.crop_nms))
        changed = np.flatnonzero(is_changed)
        found.boxes[changed] = boxes[changed]
        for i, rle in zip(changed, encode_rle(masks[changed]) if len(changed) else [], strict=True):
            found.rles[i] = rle
        return found.pick(kept)

    def _describe(self, found: _Found) -> list[dict[str, Any]]:
        """Return the published list of dicts."""
        from pycocotools import mask as coco_mask

        areas = coco_mask.area([{**rle, "counts": rle["counts"].encode()} for rle in found.rles]).tolist()
        boxes, crops = (_with_sides(part).tolist() for part in (found.boxes, found.crops))
        rows = zip(
            found.rles, areas, boxes, found.scores.tolist(), found.points.tolist(), found.stability.tolist(), crops,
            strict=True,
        )  # fmt: skip
        return [
            {
                "segmentation": self._output(rle),
                "area": area,
                "bbox": box,
                "predicted_iou": score,
                "point_coords": [point],
                "stability_score": stability,
                "crop_box": crop,
            }
            for rle, area, box, score, point, stability, crop in rows
        ]

    def _output(self, rle: dict) -> Any:
        if self.output_mode == "coco_rle":
            return rle
        mask = decode_rle(rle)
        return mask if self.output_mode == "binary_mask" else {"size": rle["size"], "counts": _runs(mask)}


def point_grid(side: int) -> np.ndarray:
    """Return the centres of side x side cells of the unit square, x y, row by row, float64 [side * side, 2]."""
    centres = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], layers: int, overlap: float) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Return crops x1 y1 x2 y2 of an image of `size` (H, W), the whole first, and the layer of each."""
    height, width = size
    boxes, numbers = [(0, 0, width, height)], [0]
    for layer in range(1, layers + 1):
        count = 2**layer
        shared = int(overlap * min(height, width) * (2 / count))
        w, h = (math.ceil((shared * (count - 1) + length) / count) for length in (width, height))
        for x, y in product(*([int((side - shared) * i) for i in range(count)] for side in (w, h))):
            boxes.append((x, y, min(x + w, width), min(y + h, height)))
            numbers.append(layer)
    return boxes, numbers


def fill_small(masks: np.ndarray, area: int, holes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Fill small holes, or remove small islands; of a mask of small islands alone the largest stays.

    Args:
        masks: bool [K, H, W].
        area: parts of fewer pixels are small; pixels touch also at corners.

    Returns:
        bool [K, H, W], and which changed, bool [K].
    """
    count, height, width = masks.shape
    rows = np.zeros((count, height + 1, width), np.uint8)  # a row between masks keeps them apart
    rows[:, :-1] = masks ^ holes
    total, labels, stats, _ = cv2.connectedComponentsWithStats(rows.reshape(-1, width), connectivity=8)
    owner, sizes = stats[:, cv2.CC_STAT_TOP] // (height + 1), stats[:, cv2.CC_STAT_AREA]
    is_small = sizes < area
    is_small[0] = False
    is_changed = np.zeros(count, bool)
    is_changed[owner[is_small]] = True
    if not holes:
        keeps_some = np.zeros(count, bool)
        keeps_some[owner[1:][~is_small[1:]]] = True
        order = 1 + np.lexsort(
            (np.arange(1, total), -sizes[1:], owner[1:])
        )  # by mask, then the largest, then the first
        firsts = order[np.unique(owner[order], return_index=True)[1]] if total > 1 else order
        is_small[firsts[~keeps_some[owner[firsts]]]] = False
    small = is_small[labels].reshape(rows.shape)[:, :-1]
    return np.where(small, holes, masks), is_changed


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), threshold)


def _with_sides(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def _runs(mask: np.ndarray) -> list[int]:
    """Return the run lengths of a mask, column by column, the background first."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
