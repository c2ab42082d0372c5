"""The published eval.py's metric: its counts, its two numbers, and the samples its processes share."""

import json

import numpy as np
import pytest
import torch

from utils.metrics import PhraseResult, count_pixels, published_scores, published_share, summarise

from .support import EVF, needs_golden_data

pytestmark = needs_golden_data

BLOCKS = {
    "all": ([0, 1, 2, 3, 4], 1),
    "without_images_3_and_4": ([0, 1, 2], 1),
    "all_with_world_2(image 0 counted twice)": ([0, 1, 2, 3, 4], 2),
}
"""Block -> its images, and how many processes it was computed by."""


@pytest.fixture(scope="module")
def expected():
    return json.loads((EVF / "metric" / "expected.json").read_text())


@pytest.fixture(scope="module")
def counts():
    """Return image -> our counts of its phrases."""
    with np.load(EVF / "metric" / "masks.npz") as arrays:
        pairs = [(arrays[f"pred_{i}"], arrays[f"gt_{i}"]) for i in range(5)]
    return {
        i: count_pixels(torch.from_numpy(logits) > 0, torch.from_numpy(truth)).tolist()
        for i, (logits, truth) in enumerate(pairs)
    }


def results_of(counts, images):
    return [
        PhraseResult(f"{image}/{place}", "", "", image, place, *row, 0.0)
        for image in images
        for place, row in enumerate(counts[image])
    ]


@pytest.mark.parametrize("block", BLOCKS)
def test_published_arithmetic_to_the_last_bit(block, expected, counts):
    images, world = BLOCKS[block]
    golden = expected[block]
    scores = published_scores(results_of(counts, images), world)
    order = [images[place] for rank in range(world) for place in published_share(len(images), rank, world)]
    rows = [[float(row[0]), float(row[1])] for image in order for row in counts[image]]
    assert rows == golden["per_ref_foreground_intersection_union"]
    assert scores["phrases"] == golden["n_refs"]
    assert scores["intersection"] == golden["foreground_intersection"]
    assert scores["union"] == golden["foreground_union"]
    assert scores["ciou"] == golden["ciou"]
    assert scores["giou"] == golden["giou"]


def test_only_empty_pairs(expected, counts):
    golden = expected["only_empty_pairs"]
    empty = [result for result in results_of(counts, range(5)) if not result.union]
    assert len(empty) == golden["n_refs"] == 1
    scores = published_scores(empty)
    assert (scores["ciou"], scores["giou"]) == (golden["ciou"], golden["giou"])
    ours = summarise(empty)
    assert (ours.ciou, ours.giou, ours.n_acc) == (1.0, 1.0, 1.0)


def test_processes_share_images(expected):
    golden = expected["distributed_sampler_indices(n=5, world 2)"]
    assert [published_share(5, rank, 2) for rank in range(2)] == golden


@pytest.mark.parametrize("block", ["all", "without_images_3_and_4"])
def test_our_metric_differs_only_by_rounding(block, expected, counts):
    golden = expected[block]
    ours = summarise(results_of(counts, BLOCKS[block][0]))
    pairs = golden["per_ref_foreground_intersection_union"]
    assert (ours.intersection, ours.union) == (golden["foreground_intersection"], golden["foreground_union"])
    assert ours.ciou == golden["foreground_intersection"] / golden["foreground_union"]
    assert ours.ciou == pytest.approx(golden["ciou"], abs=1e-7)
    assert ours.giou == pytest.approx(np.mean([i / u if u else 1.0 for i, u in pairs]), abs=1e-15)
    assert ours.giou == pytest.approx(golden["giou"], abs=2e-5 / len(pairs))
