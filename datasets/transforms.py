"""What may be done to a sample before training. Nothing is, unless asked: strong augmentation hurts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from utils.errors import DataError

from .phrases import is_unsure, names_side, swap_sides
from .sample import Sample

Transform = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors image and masks with a probability, and keeps the phrases true.

    * `words`: `swap` exchanges left and right in the phrases; `skip` does not mirror an image whose phrases hold such
      words. In both, an image whose phrases say "3 o'clock", "clockwise", "far l" or "east" is not mirrored.

    Writing in the picture is mirrored too. A mirrored sample has another key. One random number is drawn per sample.

    Raises:
        DataError: the probability is not within 0..1, or `words` is unknown.
    """

    probability: float = 0.5
    words: Literal["swap", "skip"] = "swap"

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise DataError(f"flip probability {self.probability}; allowed: 0 to 1")
        if self.words not in ("swap", "skip"):
            raise DataError(f"words {self.words!r}: known are 'swap' and 'skip'")

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """Return the sample, or its mirror image."""
        is_kept = is_unsure if self.words == "swap" else names_side
        if generator.random() >= self.probability or any(map(is_kept, sample.phrases)):
            return sample
        return replace(
            sample,
            image=np.ascontiguousarray(sample.image[:, ::-1]),
            masks=np.ascontiguousarray(sample.masks[:, :, ::-1]),
            phrases=tuple(swap_sides(phrase) for phrase in sample.phrases),
            key=f"{sample.key}#flip",
        )
