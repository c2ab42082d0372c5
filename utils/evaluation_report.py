"""What an evaluation says and writes: the published line, a table, JSON, and a sheet of the worst cases."""

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from .errors import TrainingError
from .files import atomic_path, write_json
from .masks import IGNORE, decode_rle, encode_rle
from .metrics import (
    GRES_EMPTY_PIXELS,
    THRESHOLDS,
    PhraseResult,
    mean_numbers,
    published_scores,
    summarise,
)
from .visualize import fit_text, overlay, save_picture

METRICS, PHRASES, WORST = "metrics.json", "phrases.jsonl", "worst.png"
CASES = 12
"""Cases on a sheet."""

TILE = (240, 320)
"""Height and width that an image of the sheet is fitted into."""


def find_empty_pixels(name: str, asked: int | None) -> int:
    """Return below how many pixels a prediction counts as empty on a data set; `asked` goes first."""
    return asked or (GRES_EMPTY_PIXELS if name.split("|")[0] == "grefcoco" else 1)


@dataclass(frozen=True)
class Case:
    """A phrase that went wrong, with the mask that was predicted, run-length encoded."""

    result: PhraseResult
    mask: dict[str, Any]

    @property
    def badness(self) -> tuple[float, int, int, int]:
        """What cases are ranked by: little merit, as a low IoU, then many wrong pixels, then the order of the set."""
        image, place = self.result.order
        return -self.result.merit, self.result.union, -image, -place

    def __lt__(self, other: "Case") -> bool:
        return self.badness < other.badness


class WorstCases:
    """Keeps the worst phrases of what `evaluate` hands over; give `add` to it as `on_batch`."""

    def __init__(self, count: int = CASES, empty_pixels: int = 1) -> None:
        self.count, self.empty_pixels = count, empty_pixels
        self.cases: list[Case] = []

    def add(self, batch: Any, results: Sequence[PhraseResult], masks: Sequence[Tensor]) -> None:
        """Look at the phrases of a batch; masks are copied only of those that are kept."""
        flat = [mask for image in masks for mask in image]
        for result, mask in zip(results, flat, strict=True):
            case = Case(result.clear_below(self.empty_pixels), {})
            if len(self.cases) < self.count or self.cases[0] < case:
                case = Case(case.result, encode_rle(mask[None].cpu().numpy())[0])
                (heapq.heappush if len(self.cases) < self.count else heapq.heapreplace)(self.cases, case)

    @staticmethod
    def join(parts: Sequence[Sequence[Case]], count: int = CASES) -> list[Case]:
        """Return the worst of several ranks' cases, the worst first."""
        return sorted((case for part in parts for case in part), reverse=True)[:count]


def draw_sheet(cases: Sequence[Case], dataset: Any) -> np.ndarray:
    """Return a picture of cases, uint8 RGB [H, W, 3]: per case the truth beside the prediction, below them the phrase.

    Pixels that do not count are dark.

    Args:
        dataset: a `datasets.reader.PhraseDataset`, which the images and true masks are read from.
    """
    height, width = TILE
    font, line = ImageFont.load_default(14), 22
    columns, rows = min(2, len(cases)), -(-len(cases) // 2)
    cell = (2 * width + 24, height + 2 * line + 12)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, case in enumerate(cases):
        left, top = 8 + i % 2 * cell[0], 6 + i // 2 * cell[1]
        sample = dataset.load(case.result.image, [case.result.place])
        truth, ignored = sample.masks[0] == 1, sample.masks[0] == IGNORE
        image = np.where(ignored[..., None], sample.image // 3, sample.image)
        for at, mask in ((left, truth), (left + width + 8, decode_rle(case.mask))):
            picture = Image.fromarray(overlay(image, mask[None]))
            sheet.paste(ImageOps.contain(picture, (width, height)), (at, top))
        words = f"{case.result.caption}   [{case.result.key}]"
        draw.text((left, top + height + 2), f"IoU {case.result.iou:.3f}   truth | prediction", fill="black", font=font)
        draw.text((left, top + height + 2 + line), fit_text(words, font, 2 * width), fill="black", font=font)
    return np.array(sheet)


def forms_of(dataset: Any, results: Sequence[PhraseResult], empty_pixels: int) -> dict[str, Any]:
    """Return `{"forms": {form: metrics}}` where the data set says what its phrases go by, else {}."""
    by_form: dict[str, list[PhraseResult]] = {}
    for result in results:
        by_form.setdefault(dataset.form(result.image, result.place), []).append(result)
    if set(by_form) <= {""}:
        return {}
    return {"forms": {form: summarise(by_form[form], empty_pixels).to_json() for form in sorted(by_form)}}


@dataclass(frozen=True)
class Measured:
    """One data set's result.

    * `metrics`: what metrics.json says about it; `shortfall`: why the numbers are not the whole set's, or "".
    """

    name: str
    metrics: dict[str, Any]
    shortfall: str

    def text(self) -> str:
        """Return the lines for the screen; the last is the published one."""
        found = self.metrics
        head = f"{self.name}: {found['phrases']} phrases of {found['images']} images"
        if "processes" in found:
            head += f", published arithmetic of {found['processes']} processes"
        lines = [head + (f", {self.shortfall}" if self.shortfall else "")]
        extra = [name for name in (*_PRECISION, "n_acc", "t_acc") if found.get(name) is not None]
        if extra:
            lines.append(", ".join(f"{_title(name)}: {found[name]:.4f}" for name in extra))
        lines += [
            f"  {form:12} {row['phrases']:>7} phrases  giou: {row['giou']:.4f}, ciou: {row['ciou']:.4f}"
            + (f", N-acc: {row['n_acc']:.4f}" if row.get("n_acc") is not None else "")
            for form, row in found.get("forms", {}).items()
        ]
        return "\n".join([*lines, f"giou: {found['giou']:.4f}, ciou: {found['ciou']:.4f}"])


_PRECISION = tuple(f"pr@{threshold}" for threshold in THRESHOLDS)


def _title(name: str) -> str:
    return {"ciou": "cIoU", "giou": "gIoU", "n_acc": "N-acc", "t_acc": "T-acc"}.get(name, name.capitalize())


class Report:
    """Collects the results of several data sets, and writes them where a folder is given.

    Args:
        folder: for the files, or None.
        settings: what the numbers depend on, for metrics.json.
        several: whether each data set gets a folder of its own.
    """

    def __init__(self, folder: str | None, settings: dict[str, Any], several: bool) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings, self.several = settings, several
        self.measured: list[Measured] = []

    def add(
        self,
        dataset: Any,
        results: Sequence[PhraseResult],
        cases: Sequence[Case],
        empty_pixels: int,
        published_world: int | None,
    ) -> str:
        """Measure a data set and write its files; return what to show.

        Args:
            dataset: a `datasets.reader.PhraseDataset`.
            results: of all ranks.
            cases: for the sheet.
            published_world: take the published arithmetic with so many processes; None takes ours.

        Raises:
            TrainingError: a phrase is missing, so that the numbers would be wrong.
        """
        images = len({result.image for result in results})
        if images == len(dataset) and len(results) != dataset.count_phrases():
            raise TrainingError(f"{dataset.name}: {len(results)} of {dataset.count_phrases()} phrases were measured")
        if published_world:
            metrics = published_scores(results, published_world) | {"images": images, "processes": published_world}
        else:
            metrics = summarise(results, empty_pixels).to_json() | {"empty_pixels": empty_pixels}
            metrics |= forms_of(dataset, results, empty_pixels)
        missing = len(dataset.missing)
        notes = [f"{missing} images missing"] if missing else []
        notes += [f"of the {len(dataset)} that there are"] if images < len(dataset) else []
        shortfall = ", ".join(notes) + ": NOT the score of the whole set" if notes else ""
        metrics |= {"is_whole": not notes, "missing": missing}
        measured = Measured(dataset.name, metrics, shortfall)
        self.measured.append(measured)
        if self.folder:
            self._write(measured, dataset, results, cases, empty_pixels if not published_world else 1)
        return measured.text()

    def _write(
        self,
        measured: Measured,
        dataset: Any,
        results: Sequence[PhraseResult],
        cases: Sequence[Case],
        empty_pixels: int,
    ) -> None:
        folder = self.folder / folder_name(measured.name) if self.several else self.folder
        with atomic_path(folder / PHRASES) as temporary, temporary.open("w", encoding="utf-8") as file:
            for result in results:
                file.write(json.dumps(result.clear_below(empty_pixels).to_json(), ensure_ascii=False) + "\n")
        save_picture(folder / WORST, draw_sheet(cases, dataset))
        write_json(folder / METRICS, self.settings | {"datasets": {measured.name: measured.metrics}})

    def finish(self) -> str:
        """Write metrics.json of all data sets; return the table to show where there are several, else ""."""
        if not self.several:
            return ""
        mean = mean_numbers([measured.metrics for measured in self.measured], ("ciou", "giou", *_PRECISION))
        if self.folder:
            datasets = {measured.name: measured.metrics for measured in self.measured}
            write_json(self.folder / METRICS, self.settings | {"datasets": datasets, "mean": mean})
        return self.table(mean)

    def table(self, mean: dict[str, float]) -> str:
        """Return a line per data set and their mean, in percent."""
        names = [
            n for n in ("ciou", "giou", *_PRECISION, "n_acc", "t_acc") if any(n in m.metrics for m in self.measured)
        ]
        width = max(len(measured.name) for measured in self.measured)
        lines = [" ".join([f"{'':{width}}", f"{'phrases':>8}", *(f"{_title(name):>6}" for name in names)])]
        for measured in self.measured:
            found = measured.metrics
            cells = [f"{found['phrases']:>8}", *(_percent(found.get(name)) for name in names)]
            lines.append(" ".join([f"{measured.name:{width}}", *cells]) + (" *" if measured.shortfall else ""))
        lines.append(" ".join([f"{'mean':{width}}", f"{'':8}", *(_percent(mean.get(name)) for name in names)]))
        if any(measured.shortfall for measured in self.measured):
            lines.append("* NOT the score of the whole set")
        return "".join(line.rstrip() + "\n" for line in ["", *lines])


def _percent(value: float | None) -> str:
    return f"{'':6}" if value is None else f"{100 * value:6.2f}"


def folder_name(name: str) -> str:
    """Return the name of a data set as a folder's: refcoco|unc|val becomes refcoco_unc_val."""
    return "".join(letter if letter.isalnum() or letter in "+-." else "_" for letter in name).strip(".") or "data"
