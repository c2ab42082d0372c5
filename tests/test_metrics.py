"""Metrics: counts against a slow twin, what each number means, and that neither order nor ranks change a digit."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from utils.distributed import Ranks
from utils.errors import TrainingError
from utils.evaluation_report import forms_of
from utils.evaluator import gather_results
from utils.metrics import (
    GRES_EMPTY_PIXELS,
    IGNORE,
    THRESHOLDS,
    PhraseResult,
    count_pixels,
    mean_numbers,
    published_scores,
    published_share,
    summarise,
)


def result(intersection=0, target=0, predicted=0, image=0, place=0):
    """Return a result with the union that follows."""
    union = target + predicted - intersection
    return PhraseResult(f"{image}/{place}", "a", f"k{image}", image, place, intersection, union, target, predicted, 0.5)


def random_results(images=40, seed=0):
    generator = random.Random(seed)
    found = []
    for image in range(images):
        for place in range(generator.randint(1, 4)):
            target, predicted = generator.choice([0, generator.randint(1, 9000)]), generator.randint(0, 9000)
            found.append(result(generator.randint(0, min(target, predicted)), target, predicted, image, place))
    return found


def published_counts(predicted, truth):
    """Count one phrase pixel class by pixel class as the published code does: histograms over the values 0 and 1."""
    output, truth = predicted.astype(np.int64).ravel().copy(), truth.astype(np.int64).ravel()
    output[truth == 255] = 255
    areas = [np.histogram(part, bins=2, range=(0, 1))[0] for part in (output[output == truth], output, truth)]
    return areas[0][1], (areas[1] + areas[2] - areas[0])[1]


class TestCounting:
    @pytest.mark.parametrize("values", [(0, 1), (0, 1, IGNORE), (0, 1, 2), (0, 1, 2, 3, IGNORE), (IGNORE,), (0,)])
    def test_against_histograms(self, values):
        generator = np.random.default_rng(len(values))
        truth = generator.choice(np.array(values, np.uint8), (5, 23, 31))
        predicted = generator.random((5, 23, 31)) > 0.6
        counts = count_pixels(torch.from_numpy(predicted), torch.from_numpy(truth))
        assert counts.dtype == torch.int64
        for row, one, other in zip(counts.tolist(), predicted, truth, strict=True):
            assert tuple(row[:2]) == published_counts(one, other)
            assert row[2] == (other == 1).sum()
            assert row[3] == (one & (other != IGNORE)).sum()

    def test_no_phrase(self):
        assert count_pixels(torch.zeros(0, 4, 5, dtype=torch.bool), torch.zeros(0, 4, 5, dtype=torch.uint8)).shape == (
            0,
            4,
        )


class TestIoU:
    @pytest.mark.parametrize(
        ("values", "iou"),
        [((5, 10, 10), 1 / 3), ((0, 0, 0), 1.0), ((0, 0, 7), 0.0), ((0, 7, 0), 0.0), ((9, 9, 9), 1.0)],
    )
    def test_iou(self, values, iou):
        assert result(*values).iou == iou

    def test_a_few_pixels_count_as_none(self):
        few = result(30, 400, 49)
        assert few.clear_below(49) is few
        cleared = few.clear_below(50)
        assert (cleared.intersection, cleared.union, cleared.target, cleared.predicted) == (0, 400, 400, 0)
        assert result(0, 0, 49).clear_below(50).iou == 1.0


class TestSummary:
    def test_by_hand(self):
        scores = summarise([result(50, 100, 50), result(90, 100, 90, 1), result(0, 30, 0, 1, 1)])
        assert scores.ciou == 140 / 230
        assert scores.giou == (0.5 + 0.9 + 0.0) / 3
        assert scores.precision == {0.5: 2 / 3, 0.6: 1 / 3, 0.7: 1 / 3, 0.8: 1 / 3, 0.9: 1 / 3}
        assert (scores.phrases, scores.images, scores.no_target) == (3, 2, 0)
        assert (scores.n_acc, scores.t_acc) == (None, 2 / 3)
        assert list(scores.numbers()) == ["ciou", "giou", *(f"pr@{t}" for t in THRESHOLDS)]

    def test_no_target_samples_as_in_gres(self):
        """No target: 1 where little was predicted, else 0 and the area goes to the union; Pr@X is about the others."""
        found = [
            result(0, 0, GRES_EMPTY_PIXELS - 1),  # empty: counts as right, adds nothing
            result(0, 0, GRES_EMPTY_PIXELS, place=1),  # wrong
            result(0, 0, 0, place=2),
            result(80, 100, 80, 1),
            result(40, 60, 40, 1, 1),  # too few pixels: nothing predicted, the target is missed
        ]
        scores = summarise(found, GRES_EMPTY_PIXELS)
        assert scores.n_acc == 2 / 3
        assert scores.t_acc == 1 / 2
        assert scores.giou == pytest.approx((1 + 0 + 1 + 0.8 + 0) / 5, abs=1e-15)
        assert (scores.intersection, scores.union) == (80, 50 + 100 + 60)
        assert scores.precision[0.7] == scores.precision[0.8] == 1 / 2
        assert scores.precision[0.9] == 0
        assert scores.no_target == 3
        plain = summarise(found)
        assert (plain.n_acc, plain.t_acc) == (1 / 3, 1.0)

    def test_only_no_target(self):
        scores = summarise([result(0, 0, 0), result(0, 0, 5, place=1)])
        assert scores.precision == dict.fromkeys(THRESHOLDS)
        assert (scores.t_acc, scores.n_acc, scores.ciou) == (None, 0.5, 0.0)

    def test_sums_are_exact_where_float32_is_not(self):
        big = [result(2**24, 2**24, 2**24), *(result(1, 1, 1, image) for image in range(1, 4))]
        assert summarise(big).intersection == 2**24 + 3
        assert published_scores(big)["intersection"] == 2**24

    def test_order_does_not_matter(self):
        found = random_results()
        first = summarise(found)
        for seed in range(5):
            random.Random(seed).shuffle(found)
            assert summarise(found) == first

    def test_mean_leaves_out_what_not_all_have(self):
        rows = [{"ciou": 0.5, "n_acc": 0.1, "pr@0.5": None}, {"ciou": 0.7, "pr@0.5": 0.3}]
        assert mean_numbers(rows, ["ciou", "n_acc", "pr@0.5"]) == {"ciou": 0.6}


class TestPublished:
    @pytest.mark.parametrize("world", [1, 2, 3, 7, 16])
    @pytest.mark.parametrize("images", [1, 2, 5, 14])
    def test_share_is_the_samplers(self, images, world):
        for rank in range(world):
            sampler = DistributedSampler(range(images), world, rank, shuffle=False, drop_last=False)
            assert published_share(images, rank, world) == list(sampler)

    def test_ours_is_its_twin_without_quirks(self):
        found = random_results(200)
        ours, theirs = summarise(found), published_scores(found)
        assert ours.ciou == pytest.approx(theirs["ciou"], abs=1e-6)
        assert ours.giou == pytest.approx(theirs["giou"], abs=1e-6)
        assert ours.phrases == theirs["phrases"]

    def test_repeats_count(self):
        found = [result(10, 10, 10, 0), result(0, 10, 0, 1), result(0, 10, 0, 2)]
        assert published_scores(found, 2)["phrases"] == 4
        assert published_scores(found, 2)["giou"] == pytest.approx(0.5, abs=1e-5)
        assert published_scores(found, 3)["giou"] == pytest.approx(1 / 3, abs=1e-5)

    def test_order_of_arrival_does_not_matter(self):
        found = random_results()
        first = published_scores(found, 3)
        random.Random(1).shuffle(found)
        assert published_scores(found, 3) == first


class TestGathering:
    def test_sorted_by_image_and_phrase(self):
        found = random_results()
        shuffled = random.Random(0).sample(found, len(found))
        assert gather_results(shuffled, Ranks()) == found

    def test_a_phrase_counted_twice_is_an_error(self):
        with pytest.raises(TrainingError, match="phrase 1/0 of k1 was counted twice"):
            gather_results([result(image=1), result(), result(image=1)], Ranks())


class WithForms:
    """A data set that says of each phrase what it goes by."""

    def form(self, image, place):
        return "" if image == 9 else ("name", "order")[place % 2]


def test_scores_per_form():
    results = [result(50, 100, 60, place=0), result(0, 100, 40, place=1), result(80, 100, 80, place=2)]
    forms = forms_of(WithForms(), results, 1)["forms"]
    assert list(forms) == ["name", "order"]
    assert forms["name"] == summarise([results[0], results[2]]).to_json() and forms["order"]["ciou"] == 0
    assert forms_of(WithForms(), [result(1, 2, 3, image=9)], 1) == {}
