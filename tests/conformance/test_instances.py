"""Points and boxes on COCO and LVIS: the published IoU, sizes and clicks."""

import json

import numpy as np
import pytest
import torch

from datasets.instances import InstanceSample, Pack
from model.predictor import ImagePredictor
from model.prompted_eval import PromptedEvaluator
from utils.clicks import next_clicks
from utils.instance_metrics import SIZES, InstanceResult, published_mean_by_size
from utils.metrics import count_pixels

from .support import EFFICIENTVIT, needs_golden_data
from .test_efficientvit_sam import TOLERANCE, golden, inputs

pytestmark = needs_golden_data
HELPERS = EFFICIENTVIT / "helpers" / "helpers.json"


@pytest.fixture(scope="module")
def expected():
    return json.loads(HELPERS.read_text())


@pytest.fixture(scope="module")
def arrays():
    with np.load(HELPERS.with_suffix(".npz")) as found:
        return dict(found)


def unpack(bits, *shape):
    return np.unpackbits(bits)[: np.prod(shape)].reshape(shape).astype(bool)


def result(intersection, union, area=1.0, image=0):
    return InstanceResult("a", "car", "k", image, 0, intersection, union, 0, 0, 0.5, area)


def test_iou(expected, arrays):
    truth, predicted = (
        torch.from_numpy(unpack(arrays[name], *expected["iou"]["shape"])) for name in ("iou_a", "iou_b")
    )
    counts = count_pixels(predicted, truth.byte()).tolist()
    for (intersection, union, *_), value in zip(counts, expected["iou"]["values"], strict=True):
        found = published_mean_by_size([result(intersection, union)], 1, 1)
        assert 100 * found.means["all"] == pytest.approx(value, abs=1e-12)
        assert 100 * result(intersection, union).iou == pytest.approx(value, abs=1e-6)


def test_sizes(expected):
    golden, union = expected["size_buckets"], 10**9
    rows = [result(round(row["iou"] / 100 * union), union, row["area"]) for row in golden["results"]]
    found = published_mean_by_size(rows, 1, 1)
    for name in SIZES:
        assert 100 * found.means[name] == pytest.approx(golden["metric"][name], abs=1e-9)
    assert {name: found.counts[name] for name in golden["counts"]} == golden["counts"]


def test_clicks(expected, arrays):
    """All recorded masks of a size advance together."""
    cases = expected["clicks"]
    assert {(tuple(case["shape"]), case["n_preds"]) for case in cases} == {((60, 80), 5)}
    truth = np.stack([unpack(arrays[f"click{n}_gt"], 60, 80) for n in range(len(cases))])
    predicted = np.stack([unpack(arrays[f"click{n}_preds"], 5, 60, 80) for n in range(len(cases))])
    golden = np.array([case["clicks_x_y_positive"] for case in cases])
    clicked = np.zeros((len(cases), 0, 2), np.int64)
    for number in range(5):
        places, is_positive = next_clicks(truth, predicted[:, number], clicked)
        assert np.array_equal(places, golden[:, number, :2])
        assert np.array_equal(is_positive, golden[:, number, 2] == 1)
        clicked = np.concatenate([clicked, places[:, None]], axis=1)


@pytest.mark.parametrize("case", ["clicks_full", "clicks_one"])
def test_clicks_on_a_mask_that_is_right(expected, case):
    truth = np.array(expected[case]["gt"], bool)[None]
    clicked = np.zeros((1, 0, 2), np.int64)
    for number, recorded in enumerate(expected[case]["clicks_x_y_positive"]):
        places, is_positive = next_clicks(truth, truth if number else np.zeros_like(truth), clicked)
        assert [*places[0], is_positive[0]] == recorded
        clicked = np.concatenate([clicked, places[:, None]], axis=1)


@pytest.mark.slow
@torch.inference_mode()
def test_boxes_of_images_of_several_sizes_together():
    """The best of the three recorded masks of every image's box: its area and its predicted IoU."""
    ask = PromptedEvaluator(ImagePredictor(golden("l0", 11), None, "evaluation"), None)
    samples, expected = [], []
    for number, path in enumerate(sorted((EFFICIENTVIT / "cases").glob("l0_s11_img_*.json"))):
        case = json.loads(path.read_text())
        image, prompts, _ = inputs(case["image"])
        box, none = np.array([prompts["box"]["box"]]), np.zeros((0, *image.shape[:2]), np.uint8)
        samples.append(InstanceSample(image, box, none, case["image"], number))
        expected.append(case["prompts"]["box"]["multi"])
    answer = ask(Pack(ask.predictor.image_spec)(samples))
    assert len({mask.shape for mask in answer.masks}) > 1
    for masks, score, recorded in zip(answer.masks, answer.scores.tolist(), expected, strict=True):
        best = int(np.argmax(recorded["iou_predictions"]))
        assert score == pytest.approx(recorded["iou_predictions"][best], abs=TOLERANCE)
        assert abs(int(masks.sum()) - recorded["areas"][best]) <= max(4, recorded["pixels_within_1e3_of_0"][best])
