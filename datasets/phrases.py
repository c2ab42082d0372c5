"""Words of left and right in phrases, for flipped images."""

import re

_STEMS = {"left": "right", "lft": "rgt", "lt": "rt"}
_SWAP = {**_STEMS, **{right: left for left, right in _STEMS.items()}}
_BEFORE = r"(?:top|bottom|upper|lower|far|front|back|mid|middle|center|centre|outer|inner|the)"
_AFTER = r"(?:s|most|hand|handed|hander|side|ward|wards|y|ie|ies|er|ish)"
# Letters around a word end it, not digits or underscores; "bright", "upright" and "leftover" are other words.
_SIDE = re.compile(
    rf"(?<![^\W\d_]){_BEFORE}?(left|right)(?={_AFTER}?(?![^\W\d_]))|(?<![^\W\d_])(lft|rgt|lt|rt)(?![^\W\d_])",
    re.IGNORECASE,
)
_UNSURE = re.compile(
    r"clock|\b\d{1,2}:\d\d\b|\b[lr]\b|\bportside\b|\bstarboard\b|\b(?:north|south)?(?:east|west)(?:ern)?\b",
    re.IGNORECASE,
)
"""Words that turn with the image but have no counterpart to write: "3 o'clock", "clockwise", "far l", "east"."""


def names_side(phrase: str) -> bool:
    """Say whether a phrase holds a word that a mirrored image would make wrong."""
    return bool(_SIDE.search(phrase)) or is_unsure(phrase)


def is_unsure(phrase: str) -> bool:
    """Say whether a phrase holds such a word that cannot be swapped."""
    return bool(_UNSURE.search(phrase))


def swap_sides(phrase: str) -> str:
    """Return the phrase for the mirrored image: left becomes right and right left, in the same case.

    "topleft", "left-hand", "rightmost", "lefty" are swapped too. A "right" that means "correct" is swapped as well: it
    cannot be told apart, and twice swapped is as before.
    """

    def swap(match: re.Match) -> str:
        group = 1 if match[1] else 2
        word = match[group]
        swapped = _in_case_of(word, _SWAP[word.lower()])
        return match[0][: match.start(group) - match.start()] + swapped

    return _SIDE.sub(swap, phrase)


def _in_case_of(model: str, word: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word
