"""Metrics of instances prompted one by one: mean IoU by size, and average precision of a detector's boxes as masks.

Source: the evaluation of EfficientViT-SAM (arXiv 2402.05008), COCO's and LVIS's APIs.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from .metrics import PhraseResult, published_share

SMALL, LARGE = 32**2, 96**2
"""Areas in pixels from which on an instance is medium and large."""
SIZES = ("all", "large", "medium", "small")
LVIS_DETECTIONS = 300
"""Detections of an image that count on LVIS, of all categories together."""

_AP = {
    "ap": "AP_all", "ap50": "AP_50", "ap75": "AP_75",
    "ap_small": "AP_small", "ap_medium": "AP_medium", "ap_large": "AP_large",
}  # fmt: skip
_AR = {"ar_small": "AR_small", "ar_medium": "AR_medium", "ar_large": "AR_large"}
_NAMES = {
    "coco": _AP | {"ar_1": "AR_all", "ar_10": "AR_second", "ar_100": "AR_third"} | _AR,
    "lvis": _AP | {"ap_rare": "APr", "ap_common": "APc", "ap_frequent": "APf", "ar_300": "AR_all"} | _AR,
}
"""Our name of a metric -> the library's."""

Of = TypeVar("Of")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstanceResult(PhraseResult):
    """What was counted for one annotation: as a `PhraseResult` whose phrase is the name of the category.

    * `area`: as the annotation states it, in pixels; it decides what is small and large.
    * `prompt`: a box [[x1, y1], [x2, y2]], or the clicks [[x, y, 1 or 0], ...], 1 for positive;
      empty where no detection comes near.
    """

    area: float = 0.0
    prompt: tuple[tuple[float, ...], ...] = ()

    @property
    def iou(self) -> float:
        """IoU in 0..1; 0 where nothing was drawn and nothing predicted: an annotation stands for something."""
        return self.intersection / self.union if self.union else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a line of annotations.jsonl."""
        found = super().to_json()
        category = found.pop("phrase")
        return {**found, "category": category, "area": self.area, "prompt": self.prompt}


@dataclass(frozen=True)
class SizeMeans:
    """Mean IoU in 0..1 of all, large, medium and small instances, None where there are none; and how many there are."""

    means: dict[str, float | None]
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return both."""
        return {"miou": self.means, "counts": self.counts}

    def text(self) -> str:
        """Return the published line, in percent."""
        return ", ".join(f"{name}: {percent(self.means[name])}" for name in SIZES)


def percent(value: float | None) -> str:
    """Return a number in 0..1 as percent with three decimals, or `n/a`."""
    return "n/a" if value is None else f"{100 * value:.3f}"


def mean_by_size(results: Iterable[InstanceResult]) -> SizeMeans:
    """Return the mean IoU; each annotation counts once, in one size: small < 32^2 <= medium < 96^2 <= large."""
    tests = {"large": lambda area: area >= LARGE, "medium": lambda area: SMALL <= area < LARGE,
             "small": lambda area: area < SMALL}  # fmt: skip
    return _mean([(result.area, result.iou) for result in results], tests)


def published_mean_by_size(results: Iterable[InstanceResult], images: int, world: int) -> SizeMeans:
    """Return the mean IoU by the published arithmetic, the slow twin of `mean_by_size` but for its quirks.

    1e-7 is added to each union; an area of 32^2 is small and medium, one of 96^2 medium and large; and where the number
    of images does not divide by the number of processes, the annotations of the first images count twice.

    Args:
        images: how many there are, with those that have no annotation.
        world: how many processes the published evaluation would have had.
    """
    tests = {"large": lambda area: area >= LARGE, "medium": lambda area: SMALL <= area <= LARGE,
             "small": lambda area: area <= SMALL}  # fmt: skip
    repeated = in_published_order(results, lambda result: result.image, images, world)
    return _mean([(result.area, result.intersection / (result.union + 1e-7)) for result in repeated], tests)


def in_published_order(results: Iterable[Of], image_of: Callable[[Of], int], images: int, world: int) -> list[Of]:
    """Return results as so many processes of the published evaluation gather them: some images come twice.

    Args:
        results: those of one image next to each other.
        image_of: which image a result is of.
    """
    by_image = {image: list(group) for image, group in groupby(results, key=image_of)}
    places = (place for rank in range(world) for place in published_share(images, rank, world))
    return [result for place in places for result in by_image.get(place, ())]


def _mean(rows: Sequence[tuple[float, float]], tests: Mapping[str, Callable[[float], bool]]) -> SizeMeans:
    tests = {"all": lambda _: True, **tests}
    ious = {name: [iou for area, iou in rows if test(area)] for name, test in tests.items()}
    return SizeMeans(
        {name: math.fsum(values) / len(values) if values else None for name, values in ious.items()},
        {name: len(values) for name, values in ious.items()},
    )


def average_precision(truth: dict[str, list], detections: list[dict[str, Any]], style: str) -> dict[str, float | None]:
    """Return AP and AR of masks, in 0..1; None where no annotation says anything about it.

    Args:
        truth: a COCO or LVIS file of the images that were measured, masks as compressed RLE; it is changed.
        detections: a COCO list of results without boxes, so that areas are those of the masks; it is changed. For
            LVIS, at most 300 per image are looked at.
        style: `coco` (at most 100 detections of an image and category) or `lvis`.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    if style == "lvis":
        detections = limit_per_image(detections)
    known = COCO(truth, print_function=logger.debug)
    measure = COCOeval_faster(
        known, known.loadRes(detections), "segm", print_function=logger.debug, lvis_style=style == "lvis"
    )
    if style == "lvis":
        measure.params.maxDets = [LVIS_DETECTIONS]
    measure.run()
    found = measure.stats_as_dict
    return {ours: None if found[theirs] == -1 else found[theirs] for ours, theirs in _NAMES[style].items()}


def limit_per_image(detections: Sequence[dict[str, Any]], most: int = LVIS_DETECTIONS) -> list[dict[str, Any]]:
    """Return the detections with the highest scores of each image, of equal ones the first."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for detection in detections:
        by_image.setdefault(detection["image_id"], []).append(detection)
    return [one for group in by_image.values() for one in sorted(group, key=lambda d: -d["score"])[:most]]


def closest_detections(annotations: Sequence[dict[str, Any]], detections: Sequence[dict[str, Any]]) -> list[int | None]:
    """Return for each annotation of an image which detection of its category overlaps it most, None where none does.

    Args:
        annotations: with `category_id` and `segmentation`, compressed RLE.
        detections: likewise, of the same image.
    """
    from pycocotools import mask as coco_mask

    found: list[int | None] = [None] * len(annotations)
    for category in {one["category_id"] for one in annotations}:
        rows, own = (
            [n for n, one in enumerate(some) if one["category_id"] == category] for some in (annotations, detections)
        )
        if own:
            masks = [detections[n]["segmentation"] for n in own], [annotations[n]["segmentation"] for n in rows]
            as_bytes = ([{**rle, "counts": rle["counts"].encode("ascii")} for rle in some] for some in masks)
            overlaps = coco_mask.iou(*as_bytes, [0] * len(rows))
            for n, best, overlap in zip(rows, overlaps.argmax(0), overlaps.max(0), strict=True):
                found[n] = own[best] if overlap > 0 else None
    return found


def count_rles(truth: dict[str, Any], mask: dict[str, Any]) -> tuple[int, int, int, int]:
    """Count pixels of two compressed RLEs as `count_pixels` does: intersection, union, target, prediction."""
    from pycocotools import mask as coco_mask

    pair = [{**rle, "counts": rle["counts"].encode("ascii")} for rle in (truth, mask)]
    target, predicted = (int(area) for area in coco_mask.area(pair))
    intersection = int(coco_mask.area(coco_mask.merge(pair, intersect=True)))
    return intersection, target + predicted - intersection, target, predicted
