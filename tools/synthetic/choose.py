"""Which phrases a scene gets: every meaning that picks clearly, then a balanced choice of forms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .objects import GROUPS, Kind
from .phrases import Speaker
from .referring import (
    ANYTHING,
    EXTREMES,
    MIDDLE_OF_ROW,
    NEAREST,
    OPPOSITE,
    ORDERS,
    PLACES,
    RELATIONS,
    SIDES,
    SIZES,
    SUPERLATIVES,
    Filter,
    Meaning,
    View,
    is_held_out,
)  # fmt: skip

SINGLE_WEIGHTS = {
    "name": 3.0, "place": 2.0, "extreme": 1.5, "size": 2.0, "relation": 2.5, "nearest": 1.5, "order": 2.5,
    "combination": 2.5, "group": 0.8,
}  # fmt: skip
SEVERAL_WEIGHTS = {"all": 2.0, "all_place": 1.5, "all_group": 1.0, "everything": 0.8, "pair": 1.5}
NONE_WEIGHTS = {"absent": 2.0, "no_anchor": 1.0, "no_relation": 1.5, "no_place": 1.2, "no_order": 0.7}
"""How much each form is wanted where a scene offers several; rare ones weigh more."""
MAX_TARGETS, MAX_SENTENCES = 4, 3


@dataclass(frozen=True)
class Phrase:
    """One phrase of a scene: its words, its form (a key of the weights above), its meaning and the things it means."""

    text: str
    form: str
    meaning: Meaning
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A meaning that picks clearly."""

    form: str
    meaning: Meaning
    targets: tuple[int, ...]


def choose_phrases(
    rng: np.random.Generator, view: View, kinds: Sequence[Kind], speaker: Speaker, held_out: bool
) -> list[Phrase]:
    """Return phrases for one thing each, then for several, then for none.

    Args:
        kinds: every kind of the data set; absent ones are named by phrases without target.
        held_out: only meanings with a held-out pair (testB); else only meanings without.
    """
    singles, several, none = [], [], []
    seen: set[tuple[str, Meaning]] = set()
    for form, meaning in _meanings(rng, view, kinds):
        if (form, meaning) in seen or is_held_out(meaning) != held_out:
            continue
        seen.add((form, meaning))
        found = view.resolve(meaning)
        if found is None or _says_too_little(view, meaning):
            continue
        candidate = Candidate(form, meaning, tuple(thing.index for thing in found))
        if form in NONE_WEIGHTS:
            none += [candidate] if not found else []
        elif form in SEVERAL_WEIGHTS:
            several += [candidate] if len(found) >= 2 else []
        elif len(found) == 1:
            singles.append(candidate)
    chosen = _choose_singles(rng, singles)
    chosen += _pick_forms(rng, several, SEVERAL_WEIGHTS, int(rng.integers(1, 3)))
    chosen += _pick_forms(rng, none, NONE_WEIGHTS, int(rng.integers(1, 3)))
    return _say(rng, view, speaker, chosen)


def _say(rng: np.random.Generator, view: View, speaker: Speaker, chosen: Sequence[Candidate]) -> list[Phrase]:
    phrases: list[Phrase] = []
    texts: set[str] = set()
    for candidate in chosen:
        pool = view.of_noun(candidate.meaning.noun) or ()
        text = speaker.say(rng, candidate.meaning, len(candidate.targets), len(pool))
        if text not in texts:
            texts.add(text)
            phrases.append(Phrase(text, candidate.form, candidate.meaning, candidate.targets))
    return phrases


def _says_too_little(view: View, meaning: Meaning) -> bool:
    """Whether a size or extreme is claimed of the only one of its kind: "the biggest cat" of one cat."""
    names = {item.name for item in meaning.filters} | {meaning.selector}
    return bool(names & {*SIZES, *SUPERLATIVES, *EXTREMES}) and len(view.of_noun(meaning.noun) or ()) == 1


def _choose_singles(rng: np.random.Generator, singles: Sequence[Candidate]) -> list[Candidate]:
    by_target: dict[int, list[Candidate]] = {}
    for candidate in singles:
        by_target.setdefault(candidate.targets[0], []).append(candidate)
    chosen: list[Candidate] = []
    targets = sorted(by_target)
    for position in rng.permutation(len(targets))[:MAX_TARGETS]:
        offered = by_target[targets[int(position)]]
        chosen += _pick_forms(rng, offered, SINGLE_WEIGHTS, int(rng.integers(1, MAX_SENTENCES + 1)))
    return chosen


def _pick_forms(
    rng: np.random.Generator, offered: Sequence[Candidate], weights: dict[str, float], count: int
) -> list[Candidate]:
    """Return up to `count` candidates of different forms."""
    by_form: dict[str, list[Candidate]] = {}
    for candidate in offered:
        by_form.setdefault(candidate.form, []).append(candidate)
    forms = sorted(by_form)
    if not forms:
        return []
    wanted = np.array([weights[form] for form in forms])
    picked = rng.choice(len(forms), size=min(count, len(forms)), replace=False, p=wanted / wanted.sum())
    return [by_form[forms[i]][int(rng.integers(len(by_form[forms[i]])))] for i in picked]


def _meanings(rng: np.random.Generator, view: View, kinds: Sequence[Kind]) -> Iterator[tuple[str, Meaning]]:
    nouns = sorted({thing.noun for thing in view.things})
    counts = {noun: sum(thing.noun == noun for thing in view.things) for noun in nouns}
    anchors = [Meaning(noun) for noun in nouns if counts[noun] == 1]
    anchors += [Meaning(noun, selector=name) for noun in nouns if counts[noun] > 1 for name in SUPERLATIVES]
    for noun in nouns:
        yield "name", Meaning(noun)
        yield from _of_one(rng, noun, counts[noun], [anchor for anchor in anchors if anchor.noun != noun])
        yield from _of_several(noun)
    groups = sorted({thing.group for thing in view.things if thing.group in GROUPS})
    for group in groups:
        yield "group", Meaning(group)
        yield "all_group", Meaning(group)
        for place in (*PLACES, *RELATIONS):
            for anchor in [None] if place in PLACES else anchors:
                yield "group", Meaning(group, (Filter(place, anchor),))
                yield "all_group", Meaning(group, (Filter(place, anchor),))
    for place in PLACES:
        yield "everything", Meaning(ANYTHING, (Filter(place),))
    for place in RELATIONS:
        yield from (("everything", Meaning(ANYTHING, (Filter(place, anchor),))) for anchor in anchors)
    yield from _pairs(rng, view, nouns)
    yield from _of_none(rng, view, kinds, nouns, anchors)


def _of_one(
    rng: np.random.Generator, noun: str, count: int, anchors: Sequence[Meaning]
) -> Iterator[tuple[str, Meaning]]:
    places = [Filter(place) for place in PLACES]
    sizes = [Filter(size) for size in SIZES] if count > 1 else []
    relations = [Filter(name, anchor) for name in RELATIONS for anchor in anchors]
    plain = [relation for relation in relations if relation.anchor and relation.anchor.selector is None]
    yield from (("place", Meaning(noun, (place,))) for place in places)
    yield from (("size", Meaning(noun, (size,))) for size in sizes)
    for relation in relations:
        yield ("relation" if relation in plain else "combination"), Meaning(noun, (relation,))
    if count < 2:
        return
    yield from (("extreme", Meaning(noun, selector=name)) for name in EXTREMES)
    yield from (("size", Meaning(noun, selector=name)) for name in SUPERLATIVES)
    yield from (("nearest", Meaning(noun, selector=NEAREST, anchor=anchor)) for anchor in anchors)
    if count > 2:
        yield from (("order", Meaning(noun, selector=name)) for name in (*ORDERS, MIDDLE_OF_ROW))
    for place in places:
        yield from (("combination", Meaning(noun, (size, place))) for size in sizes)
        yield from (("combination", Meaning(noun, (place,), name)) for name in SUPERLATIVES)
    some = [plain[i] for i in rng.permutation(len(plain))[:6]]
    for relation in some:
        yield from (("combination", Meaning(noun, (size, relation))) for size in sizes)
        yield from (("combination", Meaning(noun, (place, relation))) for place in places)


def _of_several(noun: str) -> Iterator[tuple[str, Meaning]]:
    yield "all", Meaning(noun)
    yield from (("all_place", Meaning(noun, (Filter(place),))) for place in PLACES)


def _pairs(rng: np.random.Generator, view: View, nouns: Sequence[str]) -> Iterator[tuple[str, Meaning]]:
    """Yield "the cat and the dog", each part with its place or size where there are several."""
    parts: list[Meaning] = []
    for noun in nouns:
        if len(view.of_noun(noun) or ()) == 1:
            parts.append(Meaning(noun))
            continue
        offered = [Meaning(noun, (Filter(side),)) for side in SIDES]
        offered += [Meaning(noun, selector=name) for name in SUPERLATIVES]
        clear = [meaning for meaning in offered if len(view.resolve(meaning) or ()) == 1]
        parts += [clear[int(rng.integers(len(clear)))]] if clear else []
    for first in parts:
        for second in parts:
            if first != second:
                yield "pair", Meaning(first.noun, first.filters, first.selector, first.anchor, also=second)


def _of_none(
    rng: np.random.Generator, view: View, kinds: Sequence[Kind], nouns: Sequence[str], anchors: Sequence[Meaning]
) -> Iterator[tuple[str, Meaning]]:
    """Yield phrases that match nothing: a kind or anchor that is not there, a place or relation that does not hold."""
    families = {thing.family for thing in view.things}
    groups = {thing.group for thing in view.things}
    away = [kind for kind in kinds if kind.family not in families]
    close = [kind for kind in away if kind.group in groups]
    absent = [pool[int(rng.integers(len(pool)))].name for pool in (away, away, close, close) if pool]
    for noun in absent:
        yield "absent", Meaning(noun)
        yield "absent", Meaning(noun, (Filter(PLACES[int(rng.integers(len(PLACES)))]),))
        yield "absent", Meaning(noun, selector=SUPERLATIVES[int(rng.integers(2))])
        for anchor in anchors[:4]:
            relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
            yield "absent", Meaning(noun, (Filter(relation, anchor),))
    for noun in nouns:
        here = view.of_noun(noun) or ()
        for kind in absent:
            relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
            yield "no_anchor", Meaning(noun, (Filter(relation, Meaning(kind)),))
        for name in RELATIONS:
            for anchor in (anchor for anchor in anchors if anchor.noun != noun):
                if name == "next_to" or _all_are(view, noun, Filter(OPPOSITE[name], anchor)):
                    yield "no_relation", Meaning(noun, (Filter(name, anchor),))
        if len(here) == 1:  # of two cats on the right, "the left cat" would still be one of them
            for place in PLACES:
                if any(_all_are(view, noun, Filter(OPPOSITE[side])) for side in place.split("_") if side in OPPOSITE):
                    yield "no_place", Meaning(noun, (Filter(place),))
        if len(here) in (2, 3):
            yield from (("no_order", Meaning(noun, selector=name)) for name in ORDERS)


def _all_are(view: View, noun: str, opposite: Filter) -> bool:
    """Whether the opposite holds for all of a noun: only then is a place or relation denied, not at a near miss."""
    return len(view.resolve(Meaning(noun, (opposite,))) or ()) == len(view.of_noun(noun) or ())
