"""Mirrored samples: pixels and words turn together."""

import re

import numpy as np
import pytest

from datasets.phrases import names_side, swap_sides
from datasets.sample import Sample
from datasets.transforms import HorizontalFlip, StrayWords, unused_words
from tests.conftest import TOKENIZER
from utils.errors import DataError
from utils.tokenizer import UNK, PhraseTokenizer

SWAPPED = {
    "the man on the left": "the man on the right",
    "Left RIGHT leftmost Rightmost": "Right LEFT rightmost Leftmost",
    "second from left, right hand up": "second from right, left hand up",
    "left-hand lefthand lefty lefts": "right-hand righthand righty rights",
    "topleft bottomright upperleft": "topright bottomleft upperright",
    "lft guy, rt corner": "rgt guy, lt corner",
    "left's, (right) left/right": "right's, (left) right/left",
    "left_paw": "right_paw",
    "[semantic] left arm": "[semantic] right arm",
}
UNCHANGED = ["bright upright copyright leftover righteous", "alright", "the cat", "leftist", "cleft", "art", "", "lift"]
UNSURE = ["at 3 o'clock", "4 oclock", "2:00 position", "clockwise", "far l", "R most chair", "the east gate", "western"]


@pytest.mark.parametrize(("phrase", "expected"), SWAPPED.items())
def test_words_are_swapped_and_back(phrase, expected):
    assert swap_sides(phrase) == expected
    assert swap_sides(expected) == phrase
    assert names_side(phrase)


@pytest.mark.parametrize("phrase", UNCHANGED)
def test_other_words_stay(phrase):
    assert swap_sides(phrase) == phrase
    assert not names_side(phrase)


def make_sample(*phrases):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (4, 6, 3), dtype=np.uint8)
    masks = generator.integers(0, 2, (len(phrases), 4, 6), dtype=np.uint8)
    return Sample(image, phrases, tuple(f"{i}" for i in range(len(phrases))), masks, "set/1.jpg", 5)


def test_pixels_masks_words_and_key():
    sample = make_sample("left cup", "a cup")
    flipped = HorizontalFlip(1.0)(sample, np.random.default_rng(0))
    assert flipped.phrases == ("right cup", "a cup")
    assert np.array_equal(flipped.image, np.fliplr(sample.image))
    assert np.array_equal(flipped.masks, sample.masks[:, :, ::-1])
    assert flipped.image.flags.c_contiguous
    assert flipped.masks.flags.c_contiguous
    assert (flipped.key, flipped.ids, flipped.index) == ("set/1.jpg#flip", sample.ids, 5)


@pytest.mark.parametrize("phrase", UNSURE)
def test_what_cannot_be_swapped_is_not_mirrored(phrase):
    sample = make_sample("left cup", phrase)
    for words in ("swap", "skip"):
        assert HorizontalFlip(1.0, words)(sample, np.random.default_rng(0)) is sample


def test_skip_leaves_images_with_such_words():
    flip = HorizontalFlip(1.0, "skip")
    sample = make_sample("left cup", "a cup")
    assert flip(sample, np.random.default_rng(0)) is sample
    assert flip(make_sample("a cup"), np.random.default_rng(0)).key.endswith("#flip")


def test_probability_and_one_number_per_sample():
    generator, twin = np.random.default_rng(1), np.random.default_rng(1)
    flips = [HorizontalFlip(0.3, "skip")(make_sample("a"), generator).key.endswith("#flip") for _ in range(1000)]
    assert 250 < sum(flips) < 350
    twin.random(1000)
    for phrase in ("left", "3 o'clock", "a"):
        HorizontalFlip(0.5)(make_sample(phrase), generator)
    twin.random(3)
    assert generator.random() == twin.random()
    assert not HorizontalFlip(0.0)(make_sample("a"), generator).key.endswith("#flip")


def test_options():
    with pytest.raises(DataError, match=r"probability 2\.0; allowed: 0 to 1"):
        HorizontalFlip(2.0)
    with pytest.raises(DataError, match="words 'drop': known are"):
        HorizontalFlip(0.5, "drop")


def test_stray_words_are_put_in_and_nothing_is_lost():
    sample = make_sample(*["the cup on the left"] * 200)
    mixed = StrayWords(0.5, ("zorb", "quill"))(sample, np.random.default_rng(0))
    assert mixed.masks is sample.masks
    counts = [len(phrase.split()) - 5 for phrase in mixed.phrases]
    assert set(counts) == {0, 1, 2}
    assert 70 < sum(count > 0 for count in counts) < 130
    assert all(" ".join(w for w in p.split() if w not in ("zorb", "quill")) == sample.phrases[0] for p in mixed.phrases)
    firsts, lasts = {p.split()[0] for p in mixed.phrases}, {p.split()[-1] for p in mixed.phrases}
    assert firsts == {"the", "zorb", "quill"}
    assert lasts == {"left", "zorb", "quill"}
    assert StrayWords(0.0, ("zorb",))(sample, np.random.default_rng(0)).phrases == sample.phrases


def test_stray_marks_are_put_to_words():
    sample = make_sample(*["the cup on the left"] * 200)
    mixed = StrayWords(1.0, ("zorb",), ("!", "'"))(sample, np.random.default_rng(0))
    marked = [phrase for phrase in mixed.phrases if "!" in phrase or "'" in phrase]
    assert 60 < len(marked) < 140
    cleaned = {" ".join(w for w in re.sub("[!']", "", phrase).split() if w != "zorb") for phrase in mixed.phrases}
    assert cleaned == {"the cup on the left"}
    assert any(re.search(r"\w['!]\w", phrase) for phrase in marked)
    assert any(re.search(r"\w['!]( |$)", phrase) for phrase in marked)


def test_marks_that_the_tokenizer_does_not_know():
    words = PhraseTokenizer(TOKENIZER)
    marks = words.unknown_marks()
    assert marks
    assert all(UNK in words.encode(f"cup{mark}") for mark in marks)
    assert UNK not in words.encode("the red cup")


def test_stray_words_are_those_that_no_phrase_holds():
    assert unused_words(["cup", "Left", "zorb", "hand"], ["the left-hand CUP, please"]) == ["zorb"]
    with pytest.raises(DataError, match=r"data\.stray_words.*Set it to 0"):
        StrayWords(0.1, [])
