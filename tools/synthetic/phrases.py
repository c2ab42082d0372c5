"""Words for meanings: several ways to say each, with and without articles, as people write them for RefCOCO.

An entry that begins with `*` is a held-out paraphrase: only sets made with `paraphrases="held_out"` use it. Most of
them combine words that training knows in a way it does not.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from .objects import GROUPS, Kind
from .referring import (
    ANYTHING,
    EXTREMES,
    MIDDLE_OF_ROW,
    NEAREST,
    ORDERS,
    PLACES,
    SIDES,
    SIZES,
    SUPERLATIVES,
    Meaning,
)  # fmt: skip

Bank = Mapping[str, tuple[str, ...]]

CORNERS = {name: name.replace("_", " ") for name in PLACES if "_" in name}
_UPPER = {"top": "upper", "bottom": "lower"}


def _place_before() -> dict[str, tuple[str, ...]]:
    bank = {side: (side, side, f"{side} side") for side in ("left", "right")}
    bank = {side: (*words, f"*{side}-hand") for side, words in bank.items()}
    bank |= {"top": ("top", "upper", "*top side"), "bottom": ("bottom", "lower", "*bottom side")}
    for name, corner in CORNERS.items():
        up, side = corner.split()
        bank[name] = (corner, corner, f"{_UPPER[up]} {side}", f"{side} {up}", f"*{corner} corner")
    return bank | {"middle": ("middle", "center", "*central")}


def _place_after() -> dict[str, tuple[str, ...]]:
    bank: dict[str, tuple[str, ...]] = {}
    for side in ("left", "right"):
        bank[side] = (
            f"on the {side}", f"on the {side}", f"on {side}", f"to the {side}", f"on the {side} side", f"at the {side}",
            f"in the {side} half", f"on the {side} of the picture", f"on {side} side", side,
            f"towards the {side}", f"near the {side}", f"on the {side} of the image", f"at the {side} of the image",
            f"in the {side} part", f"on the {side} edge", f"in the half on the {side}", f"along the {side} side",
            f"*at the {side} side", f"*in the {side} half of the image", f"*on the {side} hand side",
        )  # fmt: skip
    for side in ("top", "bottom"):
        bank[side] = (
            f"at the {side}", f"at the {side}", f"at {side}", f"in the {side} half", f"near the {side}",
            f"at the {side} of the picture", f"at the {side} of the image", side,
            f"in the {_UPPER[side]} half", f"in the {_UPPER[side]} part", f"along the {side}", f"by the {side} edge",
            f"in the {side} part of the picture", f"near the {side} of the image",
            f"*on the {side} side", f"*in the {side} half of the picture", f"*towards the {side}",
        )  # fmt: skip
    for name, corner in CORNERS.items():
        up, side = corner.split()
        bank[name] = (
            f"in the {corner}", f"on the {corner}", f"at the {corner}", f"in the {corner} corner", f"in {corner}",
            f"at the {up} on the {side}", f"in the {_UPPER[up]} {side}", f"on {corner}", corner,
            f"near the {corner}", f"towards the {corner}", f"in the {corner} part of the image",
            f"near the {corner} of the picture", f"near the {_UPPER[up]} {side}", f"in the {side} {up} corner",
            f"in the {up} half on the {side}", f"to the {_UPPER[up]} {side}",
            f"*at the {_UPPER[up]} {side} corner", f"*in the {corner} of the picture", f"*on the {side} at the {up}",
        )  # fmt: skip
    bank["middle"] = (
        "in the middle", "in the middle", "in the center", "in middle", "in center", "at the center",
        "in the middle of the picture", "in the center of the image", "near the middle", "near the center",
        "at the center of the picture", "in the middle part", "*at the middle", "*in the middle of the image",
    )  # fmt: skip
    return bank


PLACE_BEFORE: Bank = _place_before()
PLACE_AFTER: Bank = _place_after()

SIZE: Bank = {"big": ("big", "large", "*bigger"), "small": ("small", "little", "tiny", "*smaller")}

SUPERLATIVE: Bank = {
    "biggest": ("biggest", "largest", "biggest", "single biggest", "single largest", "*very biggest"),
    "smallest": ("smallest", "smallest", "tiniest", "littlest", "single smallest", "*very smallest"),
}
COMPARATIVE: Bank = {"biggest": ("bigger", "larger"), "smallest": ("smaller", "littler")}
"""Where there are only two of them."""

EXTREME_BEFORE: Bank = {
    "leftmost": ("leftmost", "far left", "left most", "*furthest left"),
    "rightmost": ("rightmost", "far right", "right most", "*furthest right"),
    "topmost": ("topmost", "highest", "uppermost", "*top most"),
    "bottommost": ("bottommost", "lowest", "*bottom most"),
}
EXTREME_AFTER: Bank = {
    "leftmost": ("on the far left", "furthest to the left", "farthest left", "far left", "*at the far left"),
    "rightmost": ("on the far right", "furthest to the right", "farthest right", "far right", "*at the far right"),
    "topmost": ("at the very top", "closest to the top", "*nearest to the top"),
    "bottommost": ("at the very bottom", "closest to the bottom", "*nearest to the bottom"),
}

ROW_BEFORE: Bank = {MIDDLE_OF_ROW: ("middle", "center", "*central")}
ROW_AFTER: Bank = {
    MIDDLE_OF_ROW: ("in the middle of the row", "in the middle of the {number}", "*in the center of the row")
}

RELATION: Bank = {
    "left_of": ("left of", "to the left of", "to the left of", "on the left of", "on the left side of",
                "just left of", "directly left of", "to the left side of", "further left than",
                "*at the left of"),
    "right_of": ("right of", "to the right of", "to the right of", "on the right of", "on the right side of",
                 "just right of", "directly right of", "to the right side of", "further right than",
                 "*at the right of"),
    "above": ("above", "above", "over", "higher than", "just above", "directly above", "somewhere above",
              "up higher than", "*up above"),
    "below": ("below", "below", "under", "beneath", "lower than", "just below", "directly below",
              "somewhere below", "down below", "*underneath"),
    "next_to": ("next to", "next to", "beside", "by", "just beside", "alongside", "at the side of",
                "*side by side with"),
    NEAREST: ("closest to", "nearest to", "nearest", "the closest to", "that is closest to", "*close to"),
}  # fmt: skip

RANK: Mapping[int, tuple[str, ...]] = {
    1: ("first", "first", "1st"), 2: ("second", "second", "2nd"), 3: ("third", "third", "3rd"),
    4: ("fourth", "fourth", "4th"),
}  # fmt: skip
ORDER: tuple[str, ...] = (
    "{rank} {noun} from the {side}", "{rank} {noun} from the {side}", "{rank} {noun} from {side}",
    "{rank} {noun} counting from the {side}",
    "{rank} {noun} starting from the {side}", "{rank} {noun} as seen from the {side}",
    "{noun} {rank} from the {side}", "*{noun} {rank} from {side}", "*{rank} {noun} counted from the {side}",
)  # fmt: skip
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
JOIN = (
    "{one} and {other}", "{one} and {other}", "{one} and also {other}", "both {one} and {other}",
    "{one} as well as {other}", "{one} together with {other}", "*{one} plus {other}",
)  # fmt: skip
WHICH = (
    "that is",
    "which is",
    "that is",
    "which is",
    "located",
    "that lies",
    "lying",
    "that can be seen",
    "placed",
    "found",
    "*that's",
)
"""Before a place or relation that follows the noun, now and then."""
QUANTIFIED: Bank = {
    "all": (
        "all the {nouns}",
        "all {nouns}",
        "every {noun}",
        "all of the {nouns}",
        "every one of the {nouns}",
        "each of the {nouns}",
        "each one of the {nouns}",
        "*each {noun}",
    ),
    "bare": ("{nouns}", "the {nouns}"),
    "counted": ("the {number} {nouns}", "{number} {nouns}"),
    "many": ("all {number} {nouns}", "all of the {number} {nouns}"),
    "two": ("both {nouns}", "both {nouns}", "both of the {nouns}", "the two {nouns}", "the pair of {nouns}"),
}
ANYTHING_ALL = ("everything", "everything", "all things", "all objects", "every object", "*all the things")
ARTICLES = ("the", "the", "the", "the", "the", "", "", "", "")


class Speaker:
    """Puts meanings into words.

    Args:
        kinds: every kind that may be named.
        held_out: use held-out paraphrases where there are any, else never.
    """

    def __init__(self, kinds: tuple[Kind, ...], held_out: bool = False) -> None:
        self.plurals = {kind.name: kind.plural for kind in kinds} | GROUPS | {ANYTHING: "things"}
        self.held_out = held_out

    def say(self, rng: np.random.Generator, meaning: Meaning, count: int, pool: int) -> str:
        """Return one phrase.

        Args:
            count: how many things it means (several: quantified words); 0 and 1 give the singular.
            pool: how many things of the noun there are, for "bigger" and "in the middle of the three".
        """
        if meaning.also:
            one, other = (self.say(rng, part, 1, 0) for part in (_without_also(meaning), meaning.also))
            return self._tidy(self._pick(rng, JOIN).format(one=one, other=other))
        if count > 1:
            return self._tidy(self._several(rng, meaning, count))
        core = self._single(rng, meaning, pool)
        article = self._pick(rng, ARTICLES)
        if not meaning.filters and not meaning.selector and rng.random() < 0.12:
            article = "a" if core[0] not in "aeiou" else "an"
        return self._tidy(f"{article} {core}")

    def _single(self, rng: np.random.Generator, meaning: Meaning, pool: int) -> str:
        noun, selector = meaning.noun, meaning.selector
        if noun == ANYTHING:
            noun = self._pick(rng, ("thing", "object"))
        before, after = self._filters(rng, meaning)
        if selector in ORDERS:
            rank, _, side = selector.partition("_from_")
            noun = " ".join([*before, noun])
            words = self._pick(rng, ORDER).format(rank=self._pick(rng, RANK[int(rank)]), noun=noun, side=side)
            return " ".join([words, *after])
        if selector in SUPERLATIVES:
            compare = pool == 2 and not meaning.filters and rng.random() < 0.4
            before.insert(0, self._pick(rng, (COMPARATIVE if compare else SUPERLATIVE)[selector]))
        elif selector in EXTREMES or selector == MIDDLE_OF_ROW:
            front, back = (ROW_BEFORE, ROW_AFTER) if selector == MIDDLE_OF_ROW else (EXTREME_BEFORE, EXTREME_AFTER)
            if rng.random() < 0.55 or (selector == MIDDLE_OF_ROW and pool not in NUMBERS):
                before.insert(0, self._pick(rng, front[selector]))
            else:
                after.insert(0, self._pick(rng, back[selector]).format(number=NUMBERS.get(pool, "row")))
        elif selector == NEAREST and meaning.anchor:
            after.append(self._relation(rng, NEAREST, meaning.anchor))
        return " ".join([*before, noun, *after])

    def _filters(self, rng: np.random.Generator, meaning: Meaning, plural: bool = False) -> tuple[list[str], list[str]]:
        """Return the words before and after the noun: size, place, then relations, which would else catch the place."""
        names = [item.name for item in meaning.filters]
        sizes = [self._pick(rng, SIZE[name]) for name in names if name in SIZES]
        places = [name for name in names if name in PLACES]
        before, after = sizes, []
        bare = not plural and not any(item.anchor for item in meaning.filters)
        follow = meaning.noun == ANYTHING or meaning.selector in SUPERLATIVES
        for name in places:
            if not follow and rng.random() < (0.2 if plural else 0.45):
                words = self._pick(rng, PLACE_BEFORE[name])
                before = [*sizes, words] if rng.random() < 0.5 else [words, *sizes]
            else:
                bank = PLACE_AFTER[name]
                after.append(self._pick(rng, tuple(words for words in bank if " " in words or bare)))
        after += [self._relation(rng, item.name, item.anchor) for item in meaning.filters if item.anchor]
        first = after[0].split() if after and not plural else []
        if len(first) > 1 and first[0] in _PREPOSITIONS and rng.random() < (0.5 if self.held_out else 0.2):
            after[0] = f"{self._pick(rng, WHICH)} {after[0]}"
        return before, after

    def _relation(self, rng: np.random.Generator, name: str, anchor: Meaning) -> str:
        article = "the" if rng.random() < 0.75 else "" if rng.random() < 0.7 else "a"
        words = self._single(rng, anchor, 0)
        if article == "a" and (anchor.filters or anchor.selector):
            article = "the"
        if article == "a" and words[0] in "aeiou":
            article = "an"
        return f"{self._pick(rng, RELATION[name])} {article} {words}"

    def _several(self, rng: np.random.Generator, meaning: Meaning, count: int) -> str:
        nouns = self.plurals[meaning.noun]
        before, after = self._filters(rng, meaning, plural=True)
        if meaning.noun == ANYTHING:
            return " ".join([self._pick(rng, ANYTHING_ALL), *after])
        forms = (
            ["all", "counted"] + (["two", "two"] if count == 2 else []) + (["bare"] if nouns != meaning.noun else [])
        )
        template = self._pick(rng, QUANTIFIED[forms[int(rng.integers(len(forms)))]])
        front = " ".join(before)
        words = template.format(
            noun=f"{front} {meaning.noun}", nouns=f"{front} {nouns}", number=NUMBERS.get(count, "all")
        )
        return " ".join([words, *after])

    def _pick(self, rng: np.random.Generator, bank: tuple[str, ...]) -> str:
        kept = [words for words in bank if words.startswith("*") == self.held_out] or [
            words for words in bank if not words.startswith("*")
        ]
        return kept[int(rng.integers(len(kept)))].removeprefix("*")

    @staticmethod
    def _tidy(text: str) -> str:
        return " ".join(text.split())


_PREPOSITIONS = {
    "on",
    "to",
    "at",
    "in",
    "near",
    "towards",
    "along",
    "above",
    "below",
    "under",
    "beneath",
    "next",
    "beside",
    "left",
    "right",
}


def _without_also(meaning: Meaning) -> Meaning:
    return Meaning(meaning.noun, meaning.filters, meaning.selector, meaning.anchor)


def _banks() -> Iterator[str]:
    banks = (
        PLACE_BEFORE, PLACE_AFTER, SIZE, SUPERLATIVE, COMPARATIVE, EXTREME_BEFORE, EXTREME_AFTER, ROW_BEFORE, ROW_AFTER,
        RELATION, RANK, QUANTIFIED,
    )  # fmt: skip
    for bank in banks:
        for words in bank.values():
            yield from words
    yield from (*ORDER, *JOIN, *WHICH, *ANYTHING_ALL, *ARTICLES, *NUMBERS.values(), *SIDES, "a", "an", "object", "row")


def vocabulary(kinds: tuple[Kind, ...]) -> list[str]:
    """Return every word that a phrase about these kinds can hold, held-out paraphrases included, sorted."""
    words: set[str] = set()
    for template in _banks():
        words |= set(re.findall(r"[\w'-]+", re.sub(r"\{\w+\}", " ", template.removeprefix("*"))))
    for name in (
        *(n for kind in kinds for n in (kind.name, kind.plural)),
        *GROUPS,
        *GROUPS.values(),
        ANYTHING,
        "things",
    ):
        words |= set(name.split())
    return sorted(words)
