"""Open data sets, count what they hold, find what is missing, and draw a few samples of each.

python -m tools.check_data --root dataset                                   # every set that is there
python -m tools.check_data --root dataset --names 'refcoco|unc|val' my/cups.jsonl
"""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import FlagCreatePairsOff

from configs.cli import parse
from utils.errors import EXIT_BAD_INPUT, DataError, TextSAMError, run_main

if TYPE_CHECKING:
    import numpy as np

    from datasets.reader import PhraseDataset
    from datasets.sample import Sample

TILE = 480
COLUMNS = 3
PHRASES_PER_TILE = 4
PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Args:
    """Open data sets, count what they hold, find what is missing, and draw a few samples of each."""

    root: Path = Path("dataset")
    """Folder of all data sets."""
    names: tuple[str, ...] = ()
    """Data sets; default: every published one whose annotation files are below the root."""
    out: Path = Path("check_data")
    """Folder for a picture per set."""
    samples: int = 6
    """Random images per set that are loaded and drawn."""
    all: FlagCreatePairsOff[bool] = False
    """Load every image, not only the ones that are drawn."""
    seed: int = 0
    """Of the choice of samples."""


@dataclass
class Report:
    """What was found in a data set."""

    name: str
    images: int = 0
    phrases: int = 0
    untargeted: int = 0
    missing: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sheet: Path | None = None

    def row(self) -> str:
        """Return a line of the table."""
        per_image = self.phrases / self.images if self.images else 0.0
        return (
            f"{self.name:36} {self.images:>9,} {self.phrases:>10,} {per_image:>10.2f} {self.untargeted:>9,} "
            f"{len(self.missing):>8,} {self.seconds:>8.2f}"
        )


HEADER = f"{'set':36} {'images':>9} {'phrases':>10} {'per image':>10} {'no target':>9} {'missing':>8} {'open s':>8}"


def check(name: str, args: Args) -> Report | None:
    """Open one data set, count, load samples, write its picture; None for a split nobody asked for and nobody has."""
    import numpy as np

    from datasets.catalog import open_dataset
    from datasets.refer import UnknownSplitError

    report = Report(name)
    start = time.perf_counter()
    try:
        dataset = open_dataset(name, args.root)
    except TextSAMError as error:
        if isinstance(error, UnknownSplitError) and not args.names:
            return None
        report.problems.append(str(error))
        return report
    report.seconds = time.perf_counter() - start
    report.images, report.phrases = len(dataset), dataset.count_phrases()
    report.untargeted, report.notes = dataset.count_untargeted(), dataset.notes
    paths = [dataset.image_path(i) for i in range(len(dataset))]
    present = [i for i, path in enumerate(paths) if path.is_file()]
    report.missing = [paths[i] for i in sorted(set(range(len(paths))) - set(present))]
    order = np.random.default_rng(args.seed).permutation(present).tolist()
    drawn = [sample for i in order[: args.samples] if (sample := _load(dataset, i, report)) is not None]
    for i in order[args.samples :] if args.all else ():
        _load(dataset, i, report)
    if drawn:
        report.sheet = args.out / f"{re.sub(r'[^A-Za-z0-9+_.-]+', '_', name)}.png"
        _draw(drawn, report.sheet)
    return report


def _load(dataset: "PhraseDataset", index: int, report: Report) -> "Sample | None":
    try:
        return dataset.load(index)
    except TextSAMError as error:
        report.problems.append(str(error))
        return None


def _draw(samples: list["Sample"], path: Path) -> None:
    """Write a grid of samples with masks in colour and phrases below."""
    import numpy as np

    from utils.visualize import save_picture

    tiles = [_tile(sample) for sample in samples]
    rows = []
    for start in range(0, len(tiles), COLUMNS):
        row = tiles[start : start + COLUMNS]
        height = max(tile.shape[0] for tile in row)
        row += [np.full((1, TILE, 3), 255, np.uint8)] * (COLUMNS - len(row) if start else 0)
        rows.append(np.concatenate([_pad_to(tile, height) for tile in row], axis=1))
    save_picture(path, np.concatenate(rows))


def _tile(sample: "Sample") -> "np.ndarray":
    """Return an image of width `TILE` with its first phrases."""
    import cv2
    import numpy as np

    from utils.visualize import overlay, with_legend

    scale = TILE / sample.image.shape[1]
    size = (TILE, max(1, round(sample.image.shape[0] * scale)))
    image = cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    masks = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) == 1 for mask in sample.masks[:PHRASES_PER_TILE]]
    texts = [
        text if mask.any() else f"{text} (no target)"
        for text, mask in zip(sample.phrases, sample.masks == 1, strict=True)
    ]
    return with_legend(overlay(image, np.stack(masks)), texts[:PHRASES_PER_TILE])


def _pad_to(tile: "np.ndarray", height: int) -> "np.ndarray":
    import numpy as np

    return np.pad(tile, ((0, height - tile.shape[0]), (0, 0), (0, 0)), constant_values=255)


def _print_details(report: Report) -> None:
    for note in report.notes:
        print(f"{report.name}: note: {note}")
    for kind, lines in (("missing", report.missing), ("problem", report.problems)):
        for line in lines[:PROBLEMS_SHOWN]:
            print(f"{report.name}: {kind}: {line}")
        if len(lines) > PROBLEMS_SHOWN:
            print(f"{report.name}: and {len(lines) - PROBLEMS_SHOWN} more of these")
    if report.sheet:
        print(f"{report.name}: samples drawn in {report.sheet}")


def main() -> int:
    """Print the table; 1 where files are missing, 2 where a set cannot be read."""
    args = parse(Args, "tools/check_data.py")
    from datasets.catalog import expand, list_present

    if not args.root.is_dir():
        raise DataError(f"--root {args.root} is not a folder. Give the folder that holds refer_seg/, ade20k/ and so on")
    if args.samples < 0:
        raise DataError(f"--samples {args.samples}: needed is 0 or more")
    names = [name for given in args.names for name in expand(given)] or list_present(args.root)
    if not names:
        raise DataError(f"no published data set in {args.root}. Give --names, or put one there: see the README")
    print(HEADER)
    reports = []
    for name in names:
        if (report := check(name, args)) is not None:
            reports.append(report)
            print(report.row(), flush=True)
    for report in reports:
        _print_details(report)
    if any(report.problems for report in reports):
        return EXIT_BAD_INPUT
    return 1 if any(report.missing for report in reports) else 0


if __name__ == "__main__":
    run_main(main)
