"""Numbers of masks with names (arXiv 2401.02955): every instance counts once, whatever its class."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .instance_metrics import InstanceResult

KINDS = ("base", "novel")
NAMES = ("miou", "base_iou", "novel_iou", "score", "base_score", "novel_score")


@dataclass(frozen=True)
class NamedResult(InstanceResult):
    """What was counted for one annotation, and the name that its mask got.

    * `answer`: the likeliest name, and its `probability`; `is_right`: it is that of the annotation.
    * `kind`: `base` or `novel`, '' for a class of neither.
    """

    answer: str = ""
    probability: float = 0.0
    is_right: bool = False
    kind: str = ""

    @property
    def merit(self) -> float:
        """IoU, and 1 more where the name is right."""
        return self.iou + self.is_right

    @property
    def caption(self) -> str:
        """The class and the name that was given."""
        return f"{self.phrase}: named {self.answer}, {self.probability:.0%}{'' if self.is_right else ' (wrong)'}"

    def to_json(self) -> dict[str, Any]:
        """Return a line of annotations.jsonl."""
        named = {"answer": self.answer, "probability": self.probability, "is_right": self.is_right, "kind": self.kind}
        return super().to_json() | named


@dataclass(frozen=True)
class NameMeans:
    """`NAMES` -> number, None where there is no instance: IoU in 0..1, share of right names in percent; and counts."""

    means: dict[str, float | None]
    counts: dict[str, int]

    @classmethod
    def of(cls, results: Iterable[NamedResult]) -> "NameMeans":
        """Return the means of results."""
        return cls.of_rows([(result.kind, result.iou, result.is_right) for result in results])

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[str, float, bool]]) -> "NameMeans":
        """Return the means of instances: kind, IoU, and whether the name is right."""
        means: dict[str, float | None] = {}
        counts = {}
        for kind in ("all", *KINDS):
            own = [(iou, is_right) for other, iou, is_right in rows if kind in ("all", other)]
            iou, score = ("miou", "score") if kind == "all" else (f"{kind}_iou", f"{kind}_score")
            means[iou] = math.fsum(iou for iou, _ in own) / len(own) if own else None
            means[score] = 100 * sum(is_right for _, is_right in own) / len(own) if own else None
            counts[kind] = len(own)
        return cls({name: means[name] for name in NAMES}, counts)

    def to_json(self) -> dict[str, Any]:
        """Return the published keys, and how many instances there are."""
        return {**self.means, "counts": self.counts}

    def text(self) -> str:
        """Return the line for the screen, with the published keys."""
        digits = {name: 2 if name.endswith("score") else 4 for name in NAMES}
        values = {name: "n/a" if (n := self.means[name]) is None else f"{n:.{digits[name]}f}" for name in NAMES}
        return ", ".join(f"{name}: {value}" for name, value in values.items())


class InstanceMetrics:
    """Mean IoU and share of right names over all instances, and over those of base and of novel classes.

    Args:
        base, novel: labels of either kind; an instance of neither counts in the overall means alone.
    """

    def __init__(self, base: Collection[int] = (), novel: Collection[int] = ()) -> None:
        self.kinds = dict.fromkeys(base, "base") | dict.fromkeys(novel, "novel")
        self._rows: list[tuple[str, float, bool]] = []

    def update(self, masks: Tensor, labels: Tensor, true_masks: Tensor, true_labels: Tensor) -> None:
        """Add the instances of an image.

        Args:
            masks, true_masks: bool [N, H, W] at the size of the image, in the same order.
            labels, true_labels: int64 [N].
        """
        rows = zip(true_labels.tolist(), mask_ious(masks, true_masks).tolist(), labels.tolist(), strict=True)
        self._rows += [(self.kinds.get(true, ""), iou, label == true) for true, iou, label in rows]

    def compute(self) -> dict[str, float]:
        """Return `miou`, `base_iou`, `novel_iou` in 0..1 and `score`, `base_score`, `novel_score` in percent.

        NaN where there is no instance.
        """
        means = NameMeans.of_rows(self._rows).means
        return {name: math.nan if value is None else value for name, value in means.items()}


def mask_ious(masks: Tensor, true_masks: Tensor) -> Tensor:
    """Return the IoU of each pair of masks bool [N, H, W], float64 [N]; 0 where both are empty."""
    both = (masks & true_masks).flatten(1).sum(1, dtype=torch.int64).double()
    either = (masks | true_masks).flatten(1).sum(1, dtype=torch.int64)
    return both / either.clamp(min=1)
