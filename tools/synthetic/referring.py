"""What a phrase means, and which things of a scene it means: three-valued, so that every margin is kept.

A predicate says yes, no, or None where people could disagree (a cat a little left of the middle). `resolve` returns the
things a meaning picks only when nobody could disagree about any of them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .objects import ARGUABLE, GROUPS
from .scene import CLEAR, Placed

ANYTHING = "thing"
HELD_OUT_SHARE = 8
"""One in so many pairs of an object and a place, size, order or relation is kept for testB."""

SIDE_YES, SIDE_NO = 0.40, 0.53
MIDDLE_YES, MIDDLE_NO = 0.13, 0.24
EXTREME_GAP, ORDER_GAP, ROW_GAP, EDGE_GAP = 0.10, 0.07, 0.10, 0.02
SIZE_FACTOR, SEEN_FACTOR, BIG_FACTOR = 1.35, 1.25, 1.55
BESIDE_GAP, NOT_BESIDE_GAP, NEAREST_GAP = 0.12, 0.28, 0.15

PLACES = ("left", "right", "top", "bottom", "top_left", "top_right", "bottom_left", "bottom_right", "middle")
SIZES = ("big", "small")
RELATIONS = ("left_of", "right_of", "above", "below", "next_to")
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost")
SUPERLATIVES = ("biggest", "smallest")
SIDES = ("left", "right", "top", "bottom")
OPPOSITE = {
    "left": "right", "right": "left", "top": "bottom", "bottom": "top", "left_of": "right_of", "right_of": "left_of",
    "above": "below", "below": "above",
}  # fmt: skip
ORDERS = tuple(f"{rank}_from_{side}" for side in SIDES for rank in (1, 2, 3, 4))
MIDDLE_OF_ROW = "middle_of_row"
NEAREST = "nearest"


@dataclass(frozen=True)
class Filter:
    """Keeps the things of which a predicate is true; relations have an anchor."""

    name: str
    anchor: "Meaning | None" = None


@dataclass(frozen=True)
class Meaning:
    """What a phrase says, without its words.

    * `noun`: a kind's name, a group's name, or `ANYTHING`.
    * `selector`: picks one of what the filters keep: an extreme, a superlative, an order or `NEAREST` (to `anchor`).
    * `also`: a second meaning, for "the cat and the dog".
    """

    noun: str
    filters: tuple[Filter, ...] = ()
    selector: str | None = None
    anchor: "Meaning | None" = None
    also: "Meaning | None" = None

    def pairs(self) -> set[tuple[str, str]]:
        """Return every (kind, place, size, order or relation) it combines, also inside anchors."""
        found = set()
        if self.noun not in GROUPS and self.noun != ANYTHING:
            found = {(self.noun, item.name) for item in self.filters}
            if self.selector:
                found.add((self.noun, self.selector))
        for inner in (*(item.anchor for item in self.filters), self.anchor, self.also):
            found |= inner.pairs() if inner else set()
        return found

    def to_plain(self) -> dict:
        """Return it as plain data."""
        plain: dict = {"noun": self.noun}
        if self.filters:
            plain["filters"] = [
                {"name": item.name} | ({"anchor": item.anchor.to_plain()} if item.anchor else {})
                for item in self.filters
            ]
        if self.selector:
            plain["selector"] = self.selector
        for name in ("anchor", "also"):
            if (inner := getattr(self, name)) is not None:
                plain[name] = inner.to_plain()
        return plain


def is_held_out(meaning: Meaning) -> bool:
    """Return whether it holds a pair that training never sees; the same pairs for every seed."""
    return any(
        hashlib.sha256(f"{noun}|{name}".encode()).digest()[0] % HELD_OUT_SHARE == 0 for noun, name in meaning.pairs()
    )


@dataclass(frozen=True)
class Thing:
    """A thing as predicates see it: all lengths in shares of the image (x, y) or of its shorter side (sizes, gaps).

    * `x`, `y`: middle of the box of the visible part; `box`: x1 y1 x2 y2 in shares of the shorter side.
    * `size`: square root of the whole thing's area; `seen`: of its visible part's.
    """

    index: int
    noun: str
    group: str
    family: str
    x: float
    y: float
    box: tuple[float, float, float, float]
    size: float
    seen: float
    doubtful: bool


Verdict = bool | None


@dataclass
class View:
    """The things of one scene."""

    things: tuple[Thing, ...]
    _cache: dict[Meaning, "tuple[Thing, ...] | None"] = field(default_factory=dict)

    @staticmethod
    def of(things: Sequence[Placed], height: int, width: int) -> "View":
        """Look at placed things."""
        unit = min(height, width)
        seen = []
        for index, thing in enumerate(things):
            x1, y1, x2, y2 = thing.box
            box = (x1 / unit, y1 / unit, x2 / unit, y2 / unit)
            x, y = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
            size, visible = thing.full_area**0.5 / unit, thing.area**0.5 / unit
            kind = thing.kind
            doubtful = thing.visible < CLEAR
            seen.append(Thing(index, kind.name, kind.group, kind.family, x, y, box, size, visible, doubtful))
        return View(tuple(seen))

    def of_noun(self, noun: str) -> tuple[Thing, ...] | None:
        """Return the things a noun names, or None where it is arguable: some hardly visible, or doubtful members."""
        if noun == ANYTHING:
            pool = self.things
        elif noun in GROUPS:
            pool = tuple(thing for thing in self.things if thing.group == noun)
            if any(thing.noun in ARGUABLE.get(noun, ()) for thing in self.things):
                return None
        else:
            pool = tuple(thing for thing in self.things if thing.noun == noun)
        return None if any(thing.doubtful for thing in pool) else pool

    def resolve(self, meaning: Meaning) -> tuple[Thing, ...] | None:
        """Return the things it means, in order of their index: none, one or several; None where that is arguable."""
        if meaning not in self._cache:
            self._cache[meaning] = self._resolve(meaning)
        return self._cache[meaning]

    def _resolve(self, meaning: Meaning) -> tuple[Thing, ...] | None:
        pool = self.of_noun(meaning.noun)
        if pool is None:
            return None
        verdicts: list[list[Verdict]] = [[] for _ in pool]
        for item in meaning.filters:
            anchor = self._anchor(item.anchor) if item.anchor else ()
            if anchor is None:
                return None
            for thing, said in zip(pool, verdicts, strict=True):
                lacks_anchor = item.anchor is not None and not anchor
                said.append(False if lacks_anchor else _judge(item.name, thing, pool, *anchor))
        kept = []
        for thing, said in zip(pool, verdicts, strict=True):
            if False in said:
                continue
            if None in said:
                return None
            kept.append(thing)
        if meaning.selector in ORDERS and len(kept) < int(meaning.selector[0]):
            kept = []
        if meaning.selector and kept:
            anchor = self._anchor(meaning.anchor) if meaning.anchor else ()
            if anchor is None or (meaning.anchor and not anchor) or len(kept) < 2:
                return None
            chosen = _select(meaning.selector, kept, *anchor)
            if chosen is None:
                return None
            kept = [chosen]
        if meaning.also:
            others = self.resolve(meaning.also)
            if not others or not kept or {t.index for t in others} & {t.index for t in kept}:
                return None
            kept = sorted([*kept, *others], key=lambda thing: thing.index)
        return tuple(kept)

    def _anchor(self, meaning: Meaning) -> tuple[Thing, ...] | None:
        """Return the one thing it means, or nothing where there is none; None where that is arguable."""
        found = self.resolve(meaning)
        return found if found is not None and len(found) <= 1 else None


def _side(position: float, low: bool) -> Verdict:
    position = position if low else 1 - position
    return True if position < SIDE_YES else False if position > SIDE_NO else None


def _and(first: Verdict, second: Verdict) -> Verdict:
    if first is False or second is False:
        return False
    return True if first and second else None


def _judge(name: str, thing: Thing, pool: Sequence[Thing], anchor: Thing | None = None) -> Verdict:
    if anchor is not None:
        return False if anchor.index == thing.index else RELATION[name](thing, anchor)
    if name in SIZES:
        return _gradable(thing, pool, name == "big")
    if name == "middle":
        return _middle(thing, pool)
    verdict: Verdict = True
    for side in name.split("_"):
        verdict = _and(verdict, _side(thing.x if side in ("left", "right") else thing.y, side in ("left", "top")))
    return verdict


def _middle(thing: Thing, pool: Sequence[Thing]) -> Verdict:
    """In the middle of the image, and where there are three or more, not with another one in their middle."""
    aside = max(abs(thing.x - 0.5), abs(thing.y - 0.5))
    verdict = True if aside < MIDDLE_YES else False if aside > MIDDLE_NO else None
    if verdict and len(pool) >= 3 and len(pool) % 2:
        wide = _spread([t.x for t in pool]) >= _spread([t.y for t in pool])
        order = sorted(pool, key=lambda t: t.x if wide else t.y)
        return True if order[len(pool) // 2].index == thing.index else None
    return verdict


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _gradable(thing: Thing, pool: Sequence[Thing], big: bool) -> Verdict:
    """Big or small among its kind: near one end of sizes that differ clearly."""
    ends = [(min(values), max(values)) for values in ([t.size for t in pool], [t.seen for t in pool])]
    if any(high < BIG_FACTOR * low for low, high in ends):
        return None
    verdicts: set[Verdict] = set()
    for value, (low, high) in zip((thing.size, thing.seen), ends, strict=True):
        below, over = (high / value, value / low) if big else (value / low, high / value)
        # A third size half-way is neither: no only where it is nearer to the other end.
        verdicts.add(True if below < 1.12 else False if below > max(SIZE_FACTOR, 1.15 * over) else None)
    return verdicts.pop() if len(verdicts) == 1 else None


def _beyond(thing: Thing, anchor: Thing, axis: int, sign: int) -> Verdict:
    """Left of (axis 0, sign -1), right of, above (axis 1, sign -1) or below: clear of the anchor and not aslant."""
    one, other = (thing.x, thing.y), (anchor.x, anchor.y)
    along = sign * (one[axis] - other[axis])
    across = abs(one[1 - axis] - other[1 - axis])
    if along < -0.02:
        return False
    edge = anchor.box[axis] if sign < 0 else anchor.box[axis + 2]
    middle = (thing.box[axis] + thing.box[axis + 2]) / 2
    clear = sign * (middle - edge) > 0 and along > 0.12 and across < 0.6 * along
    return True if clear else None


def _gap(one: Thing, other: Thing) -> float:
    """Distance of two boxes, in shares of the shorter side; 0 where they touch."""
    dx = max(one.box[0] - other.box[2], other.box[0] - one.box[2], 0.0)
    dy = max(one.box[1] - other.box[3], other.box[1] - one.box[3], 0.0)
    return (dx * dx + dy * dy) ** 0.5


def _next_to(thing: Thing, anchor: Thing) -> Verdict:
    """Side by side, with little room between."""
    gap = _gap(thing, anchor)
    if gap > NOT_BESIDE_GAP:
        return False
    heights = [t.box[3] - t.box[1] for t in (thing, anchor)]
    shared = min(thing.box[3], anchor.box[3]) - max(thing.box[1], anchor.box[1])
    beside = abs(thing.x - anchor.x) > 1.2 * abs(thing.y - anchor.y)
    return True if gap < BESIDE_GAP and beside and shared > 0.5 * min(heights) else None


RELATION: dict[str, Callable[[Thing, Thing], Verdict]] = {
    "left_of": lambda thing, anchor: _beyond(thing, anchor, 0, -1),
    "right_of": lambda thing, anchor: _beyond(thing, anchor, 0, 1),
    "above": lambda thing, anchor: _beyond(thing, anchor, 1, -1),
    "below": lambda thing, anchor: _beyond(thing, anchor, 1, 1),
    "next_to": _next_to,
}


def _select(selector: str, kept: Sequence[Thing], anchor: Thing | None = None) -> Thing | None:
    if selector in EXTREMES:
        return _ranked(kept, selector.removesuffix("most"), 1, EXTREME_GAP)
    if selector in SUPERLATIVES:
        return _superlative(kept, selector == "biggest")
    if selector == MIDDLE_OF_ROW:
        return _middle_of_row(kept)
    if selector == NEAREST:
        if anchor is None:
            return None
        order = sorted(kept, key=lambda thing: _gap(thing, anchor))
        centres = sorted(kept, key=lambda thing: (thing.x - anchor.x) ** 2 + (thing.y - anchor.y) ** 2)
        clear = _gap(order[1], anchor) - _gap(order[0], anchor) > NEAREST_GAP and anchor not in kept
        return order[0] if clear and centres[0].index == order[0].index else None
    rank, _, side = selector.partition("_from_")
    return _ranked(kept, side, int(rank), ORDER_GAP) if len(kept) >= 3 else None


def _ranked(kept: Sequence[Thing], side: str, rank: int, gap: float) -> Thing | None:
    """Return the rank-th from a side, from 1, where nobody could count otherwise up to the one behind it."""
    sign, axis = (1 if side in ("left", "top") else -1), (0 if side in ("left", "right") else 1)
    order = sorted(kept, key=lambda t: sign * (t.y if axis else t.x))
    if rank > len(order):
        return None
    for before, after in pairwise(order[: rank + 1]):
        edges = [sign * (after.box[i] - before.box[i]) for i in (axis, axis + 2)]
        step = sign * (after.y - before.y if axis else after.x - before.x)
        if step < gap or min(edges) < EDGE_GAP:
            return None
    # Behind the one in question the order is free, but none may stick out beyond it.
    last = order[rank - 1]
    if any(min(sign * (t.box[i] - last.box[i]) for i in (axis, axis + 2)) < EDGE_GAP for t in order[rank:]):
        return None
    return last


def _superlative(kept: Sequence[Thing], biggest: bool) -> Thing | None:
    order = sorted(kept, key=lambda t: t.size, reverse=biggest)
    for values, factor in (([t.size for t in order], SIZE_FACTOR), ([t.seen for t in order], SEEN_FACTOR)):
        second = max(values[1:]) if biggest else min(values[1:])
        if (values[0] / second if biggest else second / values[0]) < factor:
            return None
    return order[0]


def _middle_of_row(kept: Sequence[Thing]) -> Thing | None:
    """Return the one between the others of three or five in a row or column, if it is nearest to the image's middle."""
    if len(kept) not in (3, 5):
        return None
    across, along = _spread([t.y for t in kept]), _spread([t.x for t in kept])
    wide = along > across
    if max(across, along) < 1.8 * min(across, along):
        return None
    order = sorted(kept, key=lambda t: t.x if wide else t.y)
    places = [t.x if wide else t.y for t in order]
    if any(after - before < ROW_GAP for before, after in pairwise(places)):
        return None
    middle = order[len(order) // 2]
    aside = [(t.x - 0.5) ** 2 + (t.y - 0.5) ** 2 for t in order]
    return middle if min(aside) == aside[len(order) // 2] else None
