"""The second stage of EfficientViT-SAM: losses, points, boundary IoU, transforms and the schedule."""

import json

import numpy as np
import pytest
import torch

from datasets.prompts import DrawnImage, prepare_boxes, prepare_masks, resize_masks
from datasets.sa1b import MaskImage
from model.losses import choose_points, hypothesis_losses, least_losses, sampled_losses
from utils.image import ImageSpec
from utils.mask_validation import boundaries, boundary_iou, mask_iou
from utils.masks import encode_rle
from utils.trainer import Schedule

from .support import EFFICIENTVIT, largest_difference, needs_golden_data

pytestmark = needs_golden_data

EXACT = 2e-6


@pytest.fixture(scope="module")
def golden():
    """Return the numbers and the arrays of the published helpers."""
    folder = EFFICIENTVIT / "helpers"
    with np.load(folder / "helpers.npz") as arrays:
        return json.loads((folder / "helpers.json").read_text()), dict(arrays)


def masks_of(arrays):
    logits = torch.from_numpy(arrays["loss_logits"])
    truth = np.unpackbits(arrays["loss_targets"])[: logits.numel()].reshape(logits.shape)
    return logits, torch.from_numpy(truth)


def test_losses(golden):
    numbers, arrays = golden
    expected = numbers["losses"]
    found = sampled_losses(torch.from_numpy(arrays["loss_point_logits"]), torch.from_numpy(arrays["loss_point_labels"]))
    assert largest_difference(found[:, 0], np.array(expected["bce_none"], np.float32)) < EXACT
    assert largest_difference(found[:, 1], np.array(expected["dice_none"], np.float32)) < EXACT


def test_points_and_their_losses(golden):
    numbers, arrays = golden
    logits, truth = masks_of(arrays)
    expected = numbers["loss_masks_torch_seed_0"]
    torch.manual_seed(0)
    candidates, anywhere = torch.rand(4, 37632, 2), torch.rand(4, 3136, 2)
    points = torch.cat([choose_points(logits, candidates, 9408), anywhere], 1)
    assert list(points.shape) == expected["points_shape"]
    assert largest_difference(points[0, :3], np.array(expected["points_first3"], np.float32)) < EXACT
    assert largest_difference(points[-1, -2:], np.array(expected["points_last2"], np.float32)) < EXACT
    assert largest_difference(points.mean((0, 1)), np.array(expected["points_mean"], np.float32)) < EXACT
    torch.manual_seed(0)
    losses = hypothesis_losses(logits, truth[:, 0].float(), 12544)[:, 0]
    assert largest_difference(losses[:, 0], np.array(expected["bce"], np.float32)) < EXACT
    assert largest_difference(losses[:, 1], np.array(expected["dice"], np.float32)) < EXACT


def test_least_of_the_hypotheses(golden):
    expected = golden[0]["min_of_hypotheses"]
    losses = torch.tensor(expected["loss"])[..., None]
    assert float(least_losses(losses, torch.ones(1)).mean()) == pytest.approx(expected["reduced"], abs=EXACT)


def test_iou_and_boundary_iou(golden):
    numbers, arrays = golden
    logits, truth = masks_of(arrays)
    found, truth, expected = logits[:, 0] > 0, truth[:, 0] > 0, numbers["train_iou"]
    assert largest_difference(mask_iou(found, truth), np.array(expected["per_mask"])) < EXACT
    assert boundaries(truth).sum((1, 2)).tolist() == expected["boundary_pixels"]
    assert largest_difference(boundary_iou(found, truth), np.array(expected["boundary_per_mask"])) < EXACT
    assert float(boundary_iou(found, truth).mean()) == pytest.approx(expected["boundary_iou"], abs=EXACT)


def drawn(golden, is_mirrored):
    numbers, arrays = golden
    image = arrays["tf_image"].transpose(1, 2, 0)
    masks = np.unpackbits(arrays["tf_masks"])[: 2 * 30 * 40].reshape(2, 30, 40)
    boxes = np.float32(numbers["transforms"]["bboxs_xywh"])
    rles = tuple({**rle, "counts": rle["counts"].encode()} for rle in encode_rle(masks))
    item = MaskImage(np.ascontiguousarray(image), rles, boxes, ("0", "1"), "x", 0)
    return DrawnImage(item, np.arange(2), is_mirrored, 0, np.zeros((2, 0)), False, 0), masks


def corners(boxes):
    x, y, w, h = np.float32(boxes).T
    return np.stack([x, y, x + w, y + h], 1)


def test_resizing(golden):
    numbers, arrays = golden
    expected = numbers["transforms"]
    spec = ImageSpec(expected["target"], "letterbox", "torch-antialias")
    sample, masks = drawn(golden, False)
    assert list(spec.resized_size(30, 40)) == expected["resize"]["image_shape"][1:]
    assert largest_difference(prepare_boxes(sample, spec), corners(expected["resize"]["bboxs"])) < 1e-5
    soft = resize_masks(torch.from_numpy(masks).float(), (48, 64))
    assert largest_difference(soft, arrays["tf_resized_masks"]) < EXACT
    prepared = prepare_masks(sample, spec)
    assert list(prepared.shape) == expected["final"]["masks_shape"]
    assert np.abs(prepared[:, :48].numpy() / 255 - arrays["tf_resized_masks"]).max() < 1 / 255
    assert ((prepared[:, :48].numpy() > 0) == (arrays["tf_resized_masks"] > 0)).all()
    resized = spec.resize_image(sample.item.image)
    assert np.abs(resized.numpy() - arrays["tf_resized_image"]).max() < 2e-4
    final = spec(sample.item.image)
    assert list(final.shape) == expected["final"]["image_shape"]
    assert largest_difference(final[:, ::3, ::3], arrays["tf_final_image_s3"]) < 1e-5


def test_mirroring(golden):
    sample, masks = drawn(golden, True)
    spec = ImageSpec(40, "letterbox", "torch-antialias")
    assert np.array_equal(prepare_boxes(sample, spec), corners(golden[0]["transforms"]["flip"]["bboxs"]))
    assert np.array_equal(prepare_masks(sample, spec)[:, :30].numpy() > 0, masks[..., ::-1] > 0)


def test_the_size_of_a_resized_image(golden):
    for height, width, side, *expected in golden[0]["resize_shapes"]:
        assert list(ImageSpec(side, "letterbox").resized_size(height, width)) == expected


def test_the_learning_rate(golden):
    expected = golden[0]["cosine"]
    (steps,) = expected["decay_steps"]
    schedule = Schedule("cosine", expected["warmup_steps"], steps)
    for step, rate in expected["lr_at"].items():
        assert expected["base"] * schedule.factor(int(step)) == pytest.approx(rate, rel=1e-6, abs=1e-20)
