"""What a distillation measures of itself: how near the student's embeddings are to the teacher's, and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from .distributed import Ranks
from .row_validation import RowValidation
from .visualize import thumbnail

PICTURES, TILE = 6, 192
"""Images on a sheet, and the side of each of its tiles in pixels."""
COLUMNS = ("mse", "relative", "cosine")


@dataclass(frozen=True)
class _Row:
    """What is kept of an image.

    * `values`: of `COLUMNS`; `sums`: of the target over places by channel, float64 [C]; `squares`: of all its numbers.
    * `count`: places of the target; `maps`: student's and teacher's embedding, float32 [C, h, w], of the first images.
    """

    order: int
    values: tuple[float, ...]
    sums: np.ndarray
    squares: float
    count: int
    maps: tuple[np.ndarray, np.ndarray] | None


class EmbeddingValidation(RowValidation):
    """Measures a student, image by image: `mse`, `relative`, `cosine` and `explained`.

    `explained` is the share of the teacher's variance that the student explains: 1 is a perfect copy, 0 is no better
    than the mean of each channel. It grows as `mse` falls.

    Args:
        teacher: a `model.distill_step.Teacher`: batch -> the arguments of the step; the others as of `RowValidation`.
    """

    best_by = "explained"
    numbers = ("explained", *COLUMNS)

    def __init__(self, teacher: Any, sets: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
        super().__init__(sets, folder, ranks)
        self.teacher = teacher

    def summarise(self, rows: Sequence[_Row]) -> dict[str, float]:
        """Return `summarise` of some images."""
        return summarise(rows)

    def sheet(self, rows: Sequence[_Row], dataset: Any) -> np.ndarray:
        """Return `draw_sheet` of the first images."""
        return draw_sheet([(dataset.load(row.order).image, *row.maps) for row in rows if row.maps])

    def rows(self, module: nn.Module, batch: Any) -> list[_Row]:
        """Return a row of each image; see `RowValidation.rows`."""
        pixels, target = self.teacher(batch)
        student = module.embed(pixels).float()
        target = module.fit_grid(target.float(), student)
        values = module.compare(student, target)
        sums, squares = target.double().sum((2, 3)).cpu().numpy(), target.double().square().sum((1, 2, 3)).tolist()
        return [
            _Row(
                index,
                tuple(values[i].tolist()),
                sums[i],
                squares[i],
                target[i, 0].numel(),
                (student[i].cpu().numpy(), target[i].cpu().numpy()) if index < PICTURES else None,
            )
            for i, index in enumerate(batch.indices)
        ]


def summarise(rows: Sequence[_Row]) -> dict[str, float]:
    """Return the numbers of some images: means, and the share of the targets' variance that is explained."""
    numbers = dict(zip(COLUMNS, np.mean([row.values for row in rows], axis=0).tolist(), strict=True))
    count, channels = sum(row.count for row in rows), len(rows[0].sums)
    means = np.sum([row.sums for row in rows], axis=0) / count
    variance = sum(row.squares for row in rows) / count / channels - float(np.square(means).mean())
    return {"explained": 1 - numbers["mse"] / max(variance, 1e-12), **numbers}


def draw_sheet(rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return images, the student's and the teacher's embedding side by side, a row each, uint8 RGB.

    Args:
        rows: of image, student and teacher, uint8 [H, W, 3] and float [C, h, w] twice. An embedding's colours are its
            first three principal components, those of all the teacher's together.
    """
    to_colours = principal_colours(np.concatenate([teacher.reshape(len(teacher), -1).T for _, _, teacher in rows]))
    return np.concatenate(
        [
            np.concatenate([thumbnail(image, TILE), *(_enlarge(to_colours(one)) for one in (student, teacher))], axis=1)
            for image, student, teacher in rows
        ]
    )


def principal_colours(vectors: np.ndarray) -> Any:
    """Return what paints embeddings float [C, h, w] as uint8 RGB [h, w, 3] by three main directions of vectors [n, C].

    The middle 98% of the vectors span the brightness of each colour.
    """
    tensor = torch.from_numpy(vectors).double()
    mean = tensor.mean(0)
    _, directions = torch.linalg.eigh((tensor - mean).T @ (tensor - mean))
    axes = directions[:, -3:].flip(1)
    # The sign of a direction is anybody's choice: here its largest part is positive.
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0)[None]))
    low, high = torch.quantile((tensor - mean) @ axes, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)

    def paint(embedding: np.ndarray) -> np.ndarray:
        parts = (torch.from_numpy(embedding).double().permute(1, 2, 0) - mean) @ axes
        return ((parts - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255).round().byte().numpy()

    return paint


def _enlarge(colours: np.ndarray) -> np.ndarray:
    return cv2.resize(colours, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
