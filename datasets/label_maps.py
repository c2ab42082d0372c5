"""Data sets whose masks are label pictures: a value per pixel, a name per value."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.errors import DataError

from .index import Entry, Phrase, Scan
from .raster import read_labels
from .regions import label_part

WORTH_PROCESSES = 2000
"""From this many pictures on they are read in several processes: Pillow decodes PNG under the interpreter's lock."""

logger = logging.getLogger(__name__)


def scan_label_maps(
    folder: Path, root: Path, names: Mapping[int, str], phrases: Mapping[int, str], ignored: int, scan: Scan
) -> Iterator[Entry]:
    """Yield an entry per label picture with a phrase per value in it.

    Args:
        folder: of the label pictures `X.png`; the image is `X.jpg`.
        root: what the paths of the label pictures are stored relative to.
        names: value -> name, for phrase ids.
        phrases: value -> text.
        ignored: the value of pixels that count neither as object nor as background.
        scan: takes the regions.

    Raises:
        DataError: no picture, a colour picture, or a value without name.
    """
    pictures = sorted(folder.glob("*.png"))
    if not pictures:
        raise DataError(f"{folder} holds no .png. Put the label pictures there")
    for picture, (height, width, values) in zip(pictures, _read_all(pictures), strict=True):
        unknown = [value for value in values if value not in names and value != ignored]
        if unknown:
            raise DataError(
                f"{picture}: label {unknown[0]} has no name; allowed are {min(names)} to {max(names)}, "
                f"and {ignored} for pixels that count for nobody"
            )
        path = picture.relative_to(root).as_posix()
        found = [
            Phrase(phrases[value], f"{picture.stem}/{names[value]}", [scan.add([label_part(path, value, ignored)])])
            for value in values
            if value != ignored
        ]
        yield Entry(f"{picture.stem}.jpg", height, width, found)


def _read_all(pictures: Sequence[Path]) -> Iterator[tuple[int, int, list[int]]]:
    title = pictures[0].parent.name
    workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if len(pictures) < WORTH_PROCESSES or workers < 2:
        yield from tqdm(map(describe_labels, pictures), title, len(pictures), unit=" pictures", disable=None)
        return
    # Not forked: a process with threads of torch may hang in its child.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        results = pool.map(describe_labels, pictures, chunksize=64)
        yield from tqdm(results, title, len(pictures), unit=" pictures", disable=None)


def describe_labels(path: Path) -> tuple[int, int, list[int]]:
    """Return height, width and the values in a label picture.

    Raises:
        DataError: it cannot be read, or is a colour picture.
    """
    labels = read_labels(path, "label pictures")
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or int(labels.max(initial=0)) > 65535:
        raise DataError(f"{path} is not a label picture: needed is one number per pixel (grey or palette PNG)")
    counts = np.bincount(labels.reshape(-1))
    return *labels.shape, np.flatnonzero(counts).tolist()
