"""What a training on names measures of itself: IoU of the masks, share of right names, and a sheet of both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .distributed import Ranks
from .known_names import KnownNames
from .label_metrics import NameMeans
from .row_validation import RowValidation
from .visualize import overlay, thumbnail, with_legend

PICTURES, TILE, LINES = 6, 320, 6
"""Images on a sheet, the side of each of its tiles in pixels, and the things that are shown of an image."""


@dataclass(frozen=True)
class _Row:
    """What is kept of an image: IoU, label and true label of its n instances, and the first masks of the first images.

    * `shown`: bool [k, h, w], small.
    """

    order: int
    ious: np.ndarray
    labels: np.ndarray
    truth: np.ndarray
    shown: np.ndarray | None


class NameValidation(RowValidation):
    """Measures a `model.name_step.NameStep`, image by image.

    The numbers are those of `NameMeans`, of base and novel names where there are instances, and `named_iou`, the mean
    IoU where a wrong name counts as 0.

    Args:
        known: the names; the others as of `RowValidation`.
    """

    best_by = "named_iou"
    numbers = ("named_iou", "miou", "score")

    def __init__(self, known: KnownNames, sets: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
        super().__init__(sets, folder, ranks)
        self.known = known

    def rows(self, module: nn.Module, batch: Any) -> list[_Row]:
        """Return a row of each image; see `RowValidation.rows`."""
        masks, ious, labels = module.measure(batch)
        counts, rows = [len(part) for part in masks], []
        parts = zip(batch.indices, masks, *(x.split(counts) for x in (ious, labels, batch.labels)), strict=True)
        for index, found, *numbers in parts:
            shown = found[:LINES].cpu().numpy() if index < PICTURES else None
            rows.append(_Row(index, *(part.cpu().numpy() for part in numbers), shown))
        return rows

    def sheet(self, rows: Sequence[_Row], dataset: Any) -> np.ndarray:
        """Return `draw_sheet` of the first images."""
        return draw_sheet(rows, dataset, self.known.names)

    def summarise(self, rows: Sequence[_Row]) -> dict[str, float]:
        """Return the numbers of some images."""
        columns = (
            np.concatenate(part).tolist() for part in zip(*((r.truth, r.ious, r.labels) for r in rows), strict=True)
        )
        found = [(self.known.kind(true), iou, label == true) for true, iou, label in zip(*columns, strict=True)]
        named = math.fsum(iou * is_right for _, iou, is_right in found) / len(found)
        numbers = {"named_iou": named} | NameMeans.of_rows(found).means
        return {key: value for key, value in numbers.items() if value is not None}


def draw_sheet(rows: Sequence[_Row], dataset: Any, names: Sequence[str]) -> np.ndarray:
    """Return images with what was annotated on the left and what was found on the right, and both names, uint8 RGB."""
    sheet = []
    for row in (row for row in rows if row.shown is not None):
        item = dataset.load(row.order)
        pictures = [overlay(item.image, masks) for masks in (item.masks[:LINES] > 0, row.shown)]
        tiles = np.concatenate([thumbnail(picture, TILE) for picture in pictures], axis=1)
        pairs = list(zip(row.truth, row.labels, row.ious, strict=True))[:LINES]
        texts = [f"{names[truth]}: named {names[label]} (IoU {iou:.2f})" for truth, label, iou in pairs]
        sheet.append(with_legend(tiles, texts))
    return np.concatenate(sheet)
