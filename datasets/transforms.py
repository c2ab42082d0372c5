"""What may be done to a sample before training. Nothing is, unless asked: strong augmentation hurts."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from utils.errors import DataError

from .phrases import is_unsure, names_side, swap_sides
from .sample import Sample

Transform = Callable[[Sample, np.random.Generator], Sample]
MARKED = 1 / 3
_WORD = re.compile(r"[^\W\d_]+")


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


@dataclass(frozen=True)
class StrayWords:
    """Puts one or two words into some phrases that no phrase of the data holds, so that nothing can be learned of them.

    A model that starts from random weights has no other way to learn that a word it does not know may be passed over.

    * `chance`: how likely a phrase gets them, 0 to 1.
    * `words`: what is drawn from; `marks`: what is drawn from every third time, where there are any, and put to the end
      of a word or into it.

    Raises:
        DataError: there are no words.
    """

    chance: float
    words: Sequence[str]
    marks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.words:
            raise DataError("data.stray_words: the data use every word of the tokenizer, none is left. Set it to 0")

    def __call__(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """Return the sample with other phrases."""
        return replace(sample, phrases=tuple(self._mix(phrase, generator) for phrase in sample.phrases))

    def _mix(self, phrase: str, generator: np.random.Generator) -> str:
        if generator.random() >= self.chance:
            return phrase
        words = phrase.split()
        for _ in range(generator.integers(1, 3)):
            if self.marks and generator.random() < MARKED:
                i, mark = generator.integers(len(words)), self.marks[generator.integers(len(self.marks))]
                cut = len(words[i]) if generator.random() < 0.5 else generator.integers(1, len(words[i]) + 1)
                words[i] = words[i][:cut] + mark + words[i][cut:]
            else:
                words.insert(generator.integers(len(words) + 1), self.words[generator.integers(len(self.words))])
        return " ".join(words)


def unused_words(words: Sequence[str], phrases: Iterable[str]) -> list[str]:
    """Return those words that no phrase holds, in any case of letters."""
    used = {word for phrase in phrases for word in _WORD.findall(phrase.lower())}
    return [word for word in words if word.lower() not in used]
