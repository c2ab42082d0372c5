"""Metrics of referring segmentation, from whole-number pixel counts per phrase.

cIoU, gIoU and Pr@X as in EVF-SAM's and LAVT's evaluation; no-target samples as in GRES (arXiv 2306.00968).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .masks import IGNORE

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""IoU from which on a phrase counts as found, for Pr@X."""

GRES_EMPTY_PIXELS = 50
"""A prediction of fewer pixels counts as empty on gRefCOCO.

The rule of GRES (arXiv 2306.00968, the benchmark of section 5) for models that have no output of their own for "nothing
there"; ReLA's `refer_evaluation.py` scores what is left. Elsewhere a prediction is empty where it has no pixel.
"""


@dataclass(frozen=True)
class PhraseResult:
    """What was counted for one phrase.

    * `id`: unique in its data set; `key`: name of the image.
    * `image`: place of the image in its data set; `place`: of the phrase in its image. They give the order.
    * `intersection`, `union`: pixels, without those that are ignored; `target`, `predicted`: pixels of either mask.
    * `score`: the IoU that the model predicted.
    """

    id: str
    phrase: str
    key: str
    image: int
    place: int
    intersection: int
    union: int
    target: int
    predicted: int
    score: float

    @property
    def iou(self) -> float:
        """IoU in 0..1: 1 where nothing is there and nothing was predicted, 0 where only one of them is empty."""
        return self.intersection / self.union if self.union else 1.0

    @property
    def merit(self) -> float:
        """How good it is; the worst are shown."""
        return self.iou

    @property
    def caption(self) -> str:
        """What a picture of it says."""
        return self.phrase

    @property
    def order(self) -> tuple[int, int]:
        """What results are sorted by."""
        return self.image, self.place

    def clear_below(self, pixels: int) -> "PhraseResult":
        """Return the result with a prediction of fewer than `pixels` pixels taken as empty."""
        if self.predicted >= pixels:
            return self
        return replace(self, intersection=0, union=self.target, predicted=0)

    def to_json(self) -> dict[str, Any]:
        """Return a line of phrases.jsonl."""
        return {
            "id": self.id,
            "phrase": self.phrase,
            "key": self.key,
            "intersection": self.intersection,
            "union": self.union,
            "target": self.target,
            "predicted": self.predicted,
            "iou": self.iou,
            "score": self.score,
        }


@dataclass(frozen=True)
class Scores:
    """Metrics of a set of phrases, in 0..1; None where no phrase says anything about it.

    * `ciou`: sum of intersections / sum of unions; `giou`: mean of the IoUs.
    * `precision`: threshold -> share of the phrases with a target whose IoU reaches it.
    * `n_acc`: share of the phrases without a target for which nothing was predicted; `t_acc`: share of those with a
      target for which something was.
    """

    ciou: float
    giou: float
    precision: dict[float, float | None]
    n_acc: float | None
    t_acc: float | None
    phrases: int
    images: int
    no_target: int
    intersection: int
    union: int

    def numbers(self) -> dict[str, float | None]:
        """Return the metrics by name: `ciou`, `giou`, `pr@0.5` ... and, where phrases have no target, their two."""
        found = {"ciou": self.ciou, "giou": self.giou}
        found |= {f"pr@{threshold}": share for threshold, share in self.precision.items()}
        return found | ({"n_acc": self.n_acc, "t_acc": self.t_acc} if self.no_target else {})

    def to_json(self) -> dict[str, Any]:
        """Return the metrics and what they were made of."""
        counts = ("phrases", "images", "no_target", "intersection", "union")
        return self.numbers() | {name: getattr(self, name) for name in counts}


def count_pixels(predicted: Tensor, masks: Tensor) -> Tensor:
    """Count where the tensors are: intersection, union, target, prediction, int64 [n, 4].

    A value of the ground truth that is neither 0, 1 nor `IGNORE` (2: two polygons that overlap, in the published
    loader) counts as the published evaluation counts it, as something that no prediction is equal to.

    Args:
        predicted: bool [n, H, W].
        masks: uint8 [n, H, W] of 0, 1 and `IGNORE`.
    """
    target = masks == 1
    predicted = predicted & (masks != IGNORE)
    areas = [part.flatten(1).sum(1) for part in (predicted & target, target, predicted)]
    intersection, of_target, of_prediction = areas
    return torch.stack([intersection, of_target + of_prediction - intersection, of_target, of_prediction], dim=1)


def summarise(results: Iterable[PhraseResult], empty_pixels: int = 1) -> Scores:
    """Return the metrics of phrases: each counts once, sums are exact, the order does not matter.

    Args:
        empty_pixels: a prediction of fewer pixels counts as empty; see `GRES_EMPTY_PIXELS`.
    """
    results = [result.clear_below(empty_pixels) for result in results]
    with_target = [result for result in results if result.target]
    intersection, union = sum(r.intersection for r in results), sum(r.union for r in results)
    predicted = sum(r.predicted > 0 for r in with_target)
    empty = sum(not r.predicted for r in results if not r.target)
    no_target = len(results) - len(with_target)
    return Scores(
        ciou=intersection / union if union else 1.0,
        giou=math.fsum(r.iou for r in results) / max(1, len(results)),
        precision={t: _share(sum(r.iou >= t for r in with_target), len(with_target)) for t in THRESHOLDS},
        n_acc=_share(empty, no_target),
        t_acc=_share(predicted, len(with_target)),
        phrases=len(results),
        images=len({r.image for r in results}),
        no_target=no_target,
        intersection=intersection,
        union=union,
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def mean_numbers(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """Return the mean over data sets of those metrics that all of them have; each set has the same weight."""
    shared = [name for name in names if all(row.get(name) is not None for row in rows)]
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in shared}


def over_sets(rows: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the one set there is; of several the means of some, and all of each as `set/metric`.

    Args:
        rows: set -> metrics.
        names: of the metrics that have a mean.
    """
    if len(rows) < 2:
        return dict(next(iter(rows.values()), {}))
    mean = mean_numbers(list(rows.values()), names)
    return mean | {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}


def published_scores(results: Sequence[PhraseResult], world: int = 1) -> dict[str, float | int]:
    """Return cIoU and gIoU by the arithmetic of the published eval.py, quirks included.

    Sums and quotients are float32 (pixel sums above 2**24 are rounded); the divisors have 1e-10 and 1e-5 added; and
    where the number of images does not divide by the number of processes, images from the start count twice.
    The slow twin of `summarise`, but for those quirks.

    Args:
        results: of the images 0..n-1, at least one phrase each.
        world: how many processes the published evaluation would have had.
    """
    ordered = sorted(results, key=lambda result: result.order)
    images = [list(group) for _, group in groupby(ordered, key=lambda result: result.image)]
    total, count = np.zeros(3, np.float32), 0
    for rank in range(world):
        of_rank = np.zeros(3, np.float32)
        for place in published_share(len(images), rank, world):
            of_image = np.zeros(3, np.float32)
            for result in images[place]:
                of_image += _published_terms(result)
            of_rank += of_image
            count += len(images[place])
        total += of_rank
    intersection, union, iou = total
    return {
        "ciou": float(intersection / (union + np.float32(1e-10))),
        "giou": float(iou / np.float32(count + 1e-5)),
        "phrases": count,
        "intersection": float(intersection),
        "union": float(union),
    }


def _published_terms(result: PhraseResult) -> np.ndarray:
    intersection, union = np.float32(result.intersection), np.float32(result.union)
    iou = intersection / (union + np.float32(1e-10)) + np.float32(result.union == 0)
    return np.array([intersection, union, iou], np.float32)


def published_share(images: int, rank: int, world: int) -> list[int]:
    """Return the images that one process of the published evaluation takes, in its order.

    As torch's `DistributedSampler(shuffle=False, drop_last=False)`: images from the start come again until the number
    divides by `world`.
    """
    padded = math.ceil(images / world) * world
    return [place % images for place in range(padded)][rank::world]
