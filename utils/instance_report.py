"""What an evaluation with points or boxes says and writes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation_report import METRICS, WORST, Case, WorstCases, draw_sheet
from .files import atomic_path, write_json
from .instance_metrics import InstanceResult, SizeMeans, percent
from .visualize import mark_boxes, mark_points, save_picture

ANNOTATIONS, RESULTS = "annotations.jsonl", "results.json"


def heading(name: str, prompt: str, counted: str, world: int | None, shortfall: str) -> str:
    """Return the first line for the screen."""
    parts = [f"{name}, {prompt}: {counted}"]
    parts += [f"published arithmetic of {world} processes"] if world else []
    return ", ".join(parts + ([shortfall] if shortfall else []))


def precision_text(found: dict[str, float | None]) -> str:
    """Return the line of average precision, in percent."""
    return ", ".join(f"{name}: {percent(value)}" for name, value in found.items())


def write_annotations(
    folder: Path, about: dict[str, Any], means: SizeMeans, results: Sequence[InstanceResult], cases: Sequence[Case],
    instances: Any,
) -> None:  # fmt: skip
    """Write metrics.json, annotations.jsonl and the sheet of the worst.

    Args:
        about: what metrics.json says beside the numbers.
        instances: the `datasets.instances.InstanceSet`, for the pictures.
    """
    _write_lines(folder / ANNOTATIONS, (result.to_json() for result in results))
    if cases:
        save_picture(folder / WORST, draw_sheet(cases, _WithPrompts(instances, cases)))
    write_json(folder / METRICS, about | means.to_json())


def write_detections(
    folder: Path, about: dict[str, Any], found: dict[str, float | None], results: Iterable[dict[str, Any]],
    cases: Sequence[Case], instances: Any,
) -> None:  # fmt: skip
    """Write metrics.json, results.json as COCO's and LVIS's servers take it, and what became of each annotation.

    Args:
        found: average precision.
        cases: every annotation with the detection that is closest to it.
        instances: the `datasets.instances.InstanceSet` without its detections, for the pictures.
    """
    worst = WorstCases.join([cases])
    _write_lines(folder / ANNOTATIONS, (case.result.to_json() for case in cases))
    if worst:
        save_picture(folder / WORST, draw_sheet(worst, _WithPrompts(instances, worst)))
    keys = ("image_id", "category_id", "score", "segmentation")
    with atomic_path(folder / RESULTS) as temporary, temporary.open("w", encoding="ascii") as file:
        file.write("[")
        for n, result in enumerate(results):
            file.write(("," if n else "") + "\n" + json.dumps({key: result[key] for key in keys}))
        file.write("\n]\n")
    write_json(folder / METRICS, about | found)


@dataclass(frozen=True)
class _WithPrompts:
    """Loads the images of cases with what was asked drawn on them."""

    instances: Any
    cases: Sequence[Case]

    def load(self, index: int, chosen: list[int]) -> Any:
        [result] = [case.result for case in self.cases if case.result.order == (index, *chosen)]
        sample = self.instances.load(index, chosen)
        return replace(sample, image=draw_prompt(sample.image, result.prompt))


def draw_prompt(image: np.ndarray, prompt: Sequence[Sequence[float]]) -> np.ndarray:
    """Return a copy of an image with a box or clicks; see `InstanceResult.prompt`."""
    if not prompt:
        return image.copy()
    if len(prompt[0]) == 2:
        return mark_boxes(image, np.array(prompt, np.float64).reshape(1, 4))
    return mark_points(image, np.array(prompt))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
