"""The one reader of all data sets: images with phrases and masks, from an index on disk."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import DataError
from utils.image import MAX_PIXELS, read_image

from .index import Index, Source, open_index
from .raster import Overlaps, rasterise
from .sample import Sample

logger = logging.getLogger(__name__)


class PhraseDataset:
    """Images that have at least one phrase. Picklable; processes share the memory of the index.

    Args:
        source: where it lies and how it is read.
        lowercase: strip and lower-case the phrases, as the published evaluation does.
        overlaps: `union` gives masks of 0, 1 and `IGNORE`; `sum` counts overlapping polygons, as published.
        skip_missing: leave out images whose files are absent; `missing` lists them.
        max_pixels: bound on height * width of an image.

    Raises:
        DataError: an annotation file is missing or holds what cannot be a mask or a phrase; no image is left.
    """

    def __init__(
        self,
        source: Source,
        *,
        lowercase: bool = False,
        overlaps: Overlaps = "union",
        skip_missing: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if overlaps not in ("union", "sum"):
            raise DataError(f"overlaps {overlaps!r}: known are 'union' and 'sum'")
        self.name = source.name
        self.root, self.images = source.root, source.images
        self.lowercase, self.overlaps, self.max_pixels = lowercase, overlaps, max_pixels
        self.missing: list[Path] = []
        self._index = open_index(source)
        self._places: np.ndarray | None = None
        if skip_missing:
            self._leave_out_missing()

    def __len__(self) -> int:
        return len(self._index) if self._places is None else len(self._places)

    def __getitem__(self, index: int) -> Sample:
        return self.load(index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": self._index.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self._index = Index(state["_index"])
        except (OSError, ValueError):
            raise DataError(
                f"{self.name}: the index {state['_index']} has gone: the annotation files were changed during the run. "
                "Start again"
            ) from None

    @property
    def notes(self) -> list[str]:
        """What scanning found that the user should know: annotations left out, phrases that repeat."""
        return self._index.notes

    def phrases(self, index: int) -> list[str]:
        """Return the texts of an image."""
        return [self._text(phrase) for phrase in self._rows(index)]

    def form(self, index: int, place: int) -> str:
        """Return what a phrase of an image goes by (a name, a relation, ...), "" where the data set does not say it."""
        return self._index.form(self._rows(index)[place])

    def count_phrases(self) -> int:
        """Return the number of phrases of all images."""
        return self._index.phrase_count if self._places is None else int(self._counts()[self._places].sum())

    def count_untargeted(self) -> int:
        """Return the number of phrases that name no object."""
        untargeted = np.concatenate(([0], np.cumsum(self._index.part_counts == 0)))
        counts = np.diff(untargeted[self._index.phrase_starts])
        return int(counts.sum() if self._places is None else counts[self._places].sum())

    def image_path(self, index: int) -> Path:
        """Return where an image lies."""
        return self.images / self._index.path_of(self._place(index))

    def key(self, index: int) -> str:
        """Return the name of an image, unique over all data sets."""
        return f"{self.name}/{self._index.path_of(self._place(index))}"

    def load(self, index: int, chosen: Sequence[int] | None = None) -> Sample:
        """Return an image with phrases and masks.

        Args:
            index: 0 to `len(self)` - 1.
            chosen: which of its phrases, in this order; all of them where it is None.

        Raises:
            DataError: the image is missing or has another size than the annotations say, or a mask picture is damaged.
            ImageError: the image cannot be read. IndexError: there is no such image or phrase.
        """
        rows: Sequence[int] = self._rows(index)
        if chosen is not None:
            rows = [rows[i] for i in chosen]
        image = self._read_image(index)
        return Sample(
            image=image,
            phrases=tuple(self._text(row) for row in rows),
            ids=tuple(self._index.id(row) for row in rows),
            masks=self._masks(index, rows, *image.shape[:2]),
            key=self.key(index),
            index=index,
        )

    def _read_image(self, index: int) -> np.ndarray:
        path, height, width = self._index.image(self._place(index))
        path = self.images / path
        if not path.is_file():
            raise DataError(
                f"{self._where(index)}: no such image. Put it there, or leave missing images out: skip_missing"
            )
        image = read_image(path, self.max_pixels)
        if height and width and image.shape[:2] != (height, width):
            raise DataError(
                f"{self._where(index)} has {image.shape[1]}x{image.shape[0]} pixels upright, the annotations are for "
                f"{width}x{height}. Take the image they were made on, or correct the annotation file"
            )
        return image

    def _masks(self, index: int, rows: Sequence[int], height: int, width: int) -> np.ndarray:
        """Return uint8 [rows, H, W]; sentences about the same object are rasterised once."""
        targets = [self._index.regions(row) for row in rows]
        numbers = {regions: i for i, regions in enumerate(dict.fromkeys(targets))}
        parts = [[part for region in regions for part in self._index.parts(region)] for regions in numbers]
        masks = rasterise(parts, height, width, self.root, self.overlaps, partial(self._where, index))
        return masks if len(numbers) == len(rows) else masks[[numbers[regions] for regions in targets]]

    def _where(self, index: int) -> str:
        return f"{self.name}, image {index}: {self.image_path(index)}"

    def _rows(self, index: int) -> range:
        place = self._place(index)
        start, end = self._index.phrase_starts[place : place + 2].tolist()
        return range(start, end)

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has images 0 to {len(self) - 1}; {index} was asked for")
        return index if self._places is None else int(self._places[index])

    def _text(self, phrase: int) -> str:
        text = self._index.text(phrase)
        return text.strip().lower() if self.lowercase else text

    def _counts(self) -> np.ndarray:
        return np.diff(self._index.phrase_starts)

    def _leave_out_missing(self) -> None:
        paths = [self.images / self._index.path_of(i) for i in range(len(self._index))]
        present = np.array([path.is_file() for path in paths])
        self.missing = [path for path, there in zip(paths, present, strict=True) if not there]
        if not present.any():
            raise DataError(f"{self.name}: all {len(paths)} images are missing, the first: {paths[0]}")
        if self.missing:
            self._places = np.flatnonzero(present)
            logger.warning(
                "%s: %d of %d images are missing and left out, the first: %s",
                self.name, len(self.missing), len(paths), self.missing[0],
            )  # fmt: skip
