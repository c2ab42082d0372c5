"""Segment everything, on small models with random weights."""

import cv2
import numpy as np
import pytest
import torch

from model.everything import MaskGenerator, crop_boxes, fill_small, point_grid
from model.predictor import ImagePredictor
from tests.conftest import make_picture, pico_model
from utils.errors import ModelError
from utils.masks import decode_rle

OPEN = {"points_per_side": 4, "pred_iou_thresh": -1.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
FAMILIES = ("sam", "sam2", "efficientvit_sam")


def make_predictor(family, **options):
    model = pico_model(family).eval()
    model.encoder = None  # as a plain SAM file is loaded
    return ImagePredictor(model, **options)


@pytest.fixture(scope="module")
def picture():
    return make_picture()


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a["segmentation"], b["segmentation"])
        assert {k: v for k, v in a.items() if k != "segmentation"} == pytest.approx(
            {k: v for k, v in b.items() if k != "segmentation"}, nan_ok=True
        ) or (a["bbox"], a["area"]) == (b["bbox"], b["area"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_and_choice_where_nothing_is_filtered(family, picture):
    found = MaskGenerator(make_predictor(family), **OPEN).generate(picture)
    assert len(found) == 4 * 4 * 3
    assert [one["predicted_iou"] for one in found] == sorted((one["predicted_iou"] for one in found), reverse=True)
    points = {tuple(one["point_coords"][0]) for one in found}
    assert points == {(x, y) for x in (20.0, 60.0, 100.0, 140.0) for y in (15.0, 45.0, 75.0, 105.0)}
    for one in found:
        mask = one["segmentation"]
        assert mask.dtype == bool
        assert mask.shape == (120, 160)
        assert one["area"] == mask.sum()
        assert one["crop_box"] == [0, 0, 160, 120]
        if mask.any():
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), columns.max() - columns.min(), rows.max() - rows.min()]
            assert one["bbox"] == box


def test_it_answers_as_points_one_by_one(picture):
    """The masks of a point are the best of three that `predict` chooses among, for a lone point."""
    predictor = make_predictor("sam")
    found = MaskGenerator(predictor, **OPEN).generate(picture)
    predictor.set_image(picture)
    for point in ((20.0, 15.0), (100.0, 75.0)):
        alone = predictor.predict(points=[point])
        best = max((one for one in found if tuple(one["point_coords"][0]) == point), key=lambda o: o["predicted_iou"])
        assert best["predicted_iou"] == pytest.approx(float(alone.scores[0]), abs=1e-4)
        assert (best["segmentation"] != alone.masks[0]).sum() <= 3


def test_batches_do_not_matter(picture):
    one, other = (MaskGenerator(make_predictor("sam2"), **OPEN, points_per_batch=n).generate(picture) for n in (64, 5))
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a["segmentation"] != b["segmentation"]).mean() < 1e-3


def test_filters(picture):
    predictor = make_predictor("sam")
    everything = MaskGenerator(predictor, **OPEN).generate(picture)
    middle = float(np.median([one["predicted_iou"] for one in everything]))
    sure = MaskGenerator(predictor, **(OPEN | {"pred_iou_thresh": max(middle, 1e-6)})).generate(picture)
    assert [one["predicted_iou"] for one in sure] == [
        one["predicted_iou"] for one in everything if one["predicted_iou"] > max(middle, 1e-6)
    ]
    stable = MaskGenerator(predictor, **(OPEN | {"stability_score_thresh": 0.5})).generate(picture)
    assert all(one["stability_score"] >= 0.5 for one in stable)
    assert len(stable) < len(everything)
    apart = MaskGenerator(predictor, **(OPEN | {"box_nms_thresh": 0.5})).generate(picture)
    assert 0 < len(apart) < len(everything)
    assert MaskGenerator(predictor, **(OPEN | {"pred_iou_thresh": 1e6})).generate(picture) == []


def test_outputs_say_the_same(picture):
    predictor = make_predictor("sam2")
    masks, rles, runs = (
        MaskGenerator(predictor, **OPEN, output_mode=mode).generate(picture)
        for mode in ("binary_mask", "coco_rle", "uncompressed_rle")
    )
    for mask, rle, run in zip(masks, rles, runs, strict=True):
        assert np.array_equal(decode_rle(rle["segmentation"]), mask["segmentation"])
        values = np.repeat(np.arange(len(run["segmentation"]["counts"])) % 2, run["segmentation"]["counts"])
        assert np.array_equal(values.reshape(160, 120).T == 1, mask["segmentation"])


def test_crops_are_searched_too(picture):
    predictor = make_predictor("sam")
    predictor.set_image(picture)
    logits = predictor.predict(points=[[80, 60]]).logits
    predictor.threshold = float(np.quantile(logits, 0.995))  # small masks: others reach the edges of their crops
    found = MaskGenerator(predictor, **OPEN, crop_n_layers=1, crop_nms_thresh=1.0).generate(picture)
    crops = {tuple(one["crop_box"]) for one in found}
    assert len(crops) > 1
    assert (0, 0, 160, 120) in crops
    for one in found:
        x, y, width, height = map(int, one["crop_box"])
        outside = one["segmentation"].copy()
        outside[y : y + height, x : x + width] = False
        assert not outside.any()


def test_crop_boxes():
    boxes, layers = crop_boxes((100, 200), 2, 0.25)
    assert boxes[0] == (0, 0, 200, 100)
    assert [layers.count(n) for n in (0, 1, 2)] == [1, 4, 16]
    for layer in (1, 2):
        cover = np.zeros((100, 200), int)
        for (x1, y1, x2, y2), number in zip(boxes, layers, strict=True):
            if number == layer:
                cover[y1:y2, x1:x2] += 1
        assert cover.min() >= 1  # nothing is left out
        assert cover.max() >= 2  # neighbours overlap


def test_grid():
    assert point_grid(1).tolist() == [[0.5, 0.5]]
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def slow_fill(mask, area, holes):
    """Do what `fill_small` does, for one mask and in loops."""
    total, labels, stats, _ = cv2.connectedComponentsWithStats((mask ^ holes).astype(np.uint8), connectivity=8)
    sizes = [stats[i, cv2.CC_STAT_AREA] for i in range(1, total)]
    small = [i + 1 for i, size in enumerate(sizes) if size < area]
    if not small:
        return mask, False
    if holes:
        return mask | np.isin(labels, small), True
    kept = [i for i in range(1, total) if i not in small] or [int(np.argmax(sizes)) + 1]
    return np.isin(labels, kept), True


@pytest.mark.parametrize("holes", [True, False])
def test_small_regions_all_masks_at_once(holes):
    rng = np.random.default_rng(0)
    noise = np.stack([cv2.GaussianBlur(rng.random((40, 50)), (5, 5), 0) for _ in range(12)])
    masks = noise > np.linspace(0.4, 0.6, 12)[:, None, None]
    masks[3], masks[4] = False, True
    for area in (1, 4, 30, 10_000):
        found, changed = fill_small(masks, area, holes)
        for i, mask in enumerate(masks):
            expected, is_changed = slow_fill(mask, area, holes)
            assert np.array_equal(found[i], expected), (i, area)
            assert changed[i] == is_changed


def test_clean_masks_have_no_small_parts(picture):
    found = MaskGenerator(make_predictor("sam"), **OPEN, min_mask_region_area=40).generate(picture)
    assert found
    for one in found:
        islands = cv2.connectedComponentsWithStats(one["segmentation"].astype(np.uint8), connectivity=8)[2][1:, -1]
        assert len(islands) <= 1 or islands.min() >= 40
        assert one["area"] == one["segmentation"].sum()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"points_per_side": 0}, "points_per_side 0"),
        ({"points_per_batch": 0}, "points_per_batch 0"),
        ({"crop_n_layers": -1}, "crop_n_layers -1"),
        ({"min_mask_region_area": -5}, "min_mask_region_area -5"),
        ({"output_mode": "png"}, "output_mode 'png'"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ModelError, match=text):
        MaskGenerator(make_predictor("sam"), **settings)


def test_a_model_without_points():
    with pytest.raises(ModelError, match="takes no points"):
        MaskGenerator(ImagePredictor(pico_model("efficient_sam")))


def test_bf16(picture):
    predictor = make_predictor("sam")
    exact = MaskGenerator(predictor, **OPEN).generate(picture)
    predictor.model.to(torch.bfloat16)
    rough = MaskGenerator(predictor, **OPEN).generate(picture)
    assert len(rough) == len(exact)
