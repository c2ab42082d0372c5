"""Numbers of masks with names (arXiv 2401.02955): every instance counts once, whatever its class."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor


class InstanceMetrics:
    """Mean IoU and share of right names over all instances, and over those of base and of novel classes.

    Args:
        base, novel: labels of either kind; an instance of neither counts in the overall means alone.
    """

    def __init__(self, base: Collection[int] = (), novel: Collection[int] = ()) -> None:
        self.members = {"base": np.array(sorted(base), int), "novel": np.array(sorted(novel), int)}
        self._labels: list[np.ndarray] = []
        self._ious: list[np.ndarray] = []
        self._hits: list[np.ndarray] = []

    def update(self, masks: Tensor, labels: Tensor, true_masks: Tensor, true_labels: Tensor) -> None:
        """Add the instances of an image.

        Args:
            masks, true_masks: bool [N, H, W] at the size of the image, in the same order.
            labels, true_labels: int64 [N].
        """
        ious = mask_ious(masks, true_masks)
        self.add(*(part.cpu().numpy() for part in (ious, labels == true_labels, true_labels)))

    def add(self, ious: np.ndarray, hits: np.ndarray, true_labels: np.ndarray) -> None:
        """Add instances that were compared already: IoU, whether the name is right, and label of each."""
        self._ious.append(ious)
        self._hits.append(hits)
        self._labels.append(true_labels)

    def compute(self) -> dict[str, float]:
        """Return `miou`, `base_iou`, `novel_iou` in 0..1 and `score`, `base_score`, `novel_score` in percent.

        NaN where there is no instance.
        """
        labels, ious, hits = (np.concatenate([[], *parts]) for parts in (self._labels, self._ious, self._hits))
        everything = np.ones(len(labels), bool)
        groups = {"": everything} | {f"{kind}_": np.isin(labels, some) for kind, some in self.members.items()}
        found = {}
        for kind, rows in groups.items():
            found["miou" if kind == "" else f"{kind}iou"] = float(ious[rows].mean()) if rows.any() else float("nan")
            found[f"{kind}score"] = 100 * float(hits[rows].mean()) if rows.any() else float("nan")
        return found


def mask_ious(masks: Tensor, true_masks: Tensor) -> Tensor:
    """Return the IoU of each pair of masks bool [N, H, W], float64 [N]; 0 where both are empty."""
    both = (masks & true_masks).flatten(1).sum(1, dtype=torch.int64).double()
    either = (masks | true_masks).flatten(1).sum(1, dtype=torch.int64)
    return both / either.clamp(min=1)
