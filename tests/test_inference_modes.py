"""inference.py with points, boxes and everything: what it writes, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.inference import InferenceArgs
from model.everything import MaskGenerator
from model.image_runner import run
from model.predictor import load_predictor
from model.questions import read_numbers, smallest_on_top
from tests.conftest import PICO
from utils.errors import ModelError, PromptError
from utils.masks import decode_rle


@pytest.fixture
def options(pico_folders, picture_path, tmp_path):
    return InferenceArgs(
        version=str(pico_folders["sam2"]),
        image_path=str(picture_path),
        vis_save_path=str(tmp_path / "out"),
        device="cpu",
    )


@pytest.fixture
def predictor(pico_folders, picture):
    found = load_predictor(pico_folders["sam2"], device="cpu")
    found.set_image(picture)
    return found


def asked(options, **values):
    return dataclasses.replace(options, **values)


def written(options):
    assert run(options) == 0
    folder = options.vis_save_path
    [record] = json.loads(Path(folder, "results.json").read_text("utf-8"))
    return record["masks"], folder


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_points_mean_one_object(options, predictor, picture):
    masks, folder = written(asked(options, point=("30,40,1", "90,20,0"), save_mask=True))
    [mask] = masks
    expected = predictor.predict(points=[[30, 40], [90, 20]], labels=[1, 0])
    assert np.array_equal(decode_rle(mask["segmentation"]), expected.masks[0])
    assert mask["points"] == [[30, 40, 1], [90, 20, 0]]
    assert mask["score"] == pytest.approx(float(expected.scores[0]), abs=1e-5)
    assert names(folder) == ["picture_mask.png", "picture_vis.png", "results.json"]
    drawn = np.array(Image.open(f"{folder}/picture_vis.png"))
    assert drawn[40, 30].tolist() == [40, 180, 60]
    assert drawn[20, 90].tolist() == [220, 40, 40]


def test_a_mask_per_box(options, predictor):
    masks, folder = written(asked(options, box=("10,20,80,90", "50,30,150,110"), save_logits=True))
    expected = predictor.predict(boxes=[[10, 20, 80, 90], [50, 30, 150, 110]])
    for k, mask in enumerate(masks):
        assert np.array_equal(decode_rle(mask["segmentation"]), expected.masks[k])
        assert np.allclose(np.load(f"{folder}/picture_{k}_logits.npy"), expected.logits[k], atol=1e-5)
    assert [mask["prompt_box"] for mask in masks] == [[10, 20, 80, 90], [50, 30, 150, 110]]
    assert [name for name in names(folder) if "vis" in name] == [
        "picture_0_vis.png",
        "picture_1_vis.png",
        "picture_vis.png",
    ]


def test_three_masks_per_prompt(options, predictor):
    masks, _ = written(asked(options, box=("10,20,80,90", "50,30,150,110"), multimask=True))
    expected = predictor.predict(boxes=[[10, 20, 80, 90], [50, 30, 150, 110]], multimask=True)
    assert expected.masks.shape[:2] == (2, 3)
    assert [(mask["prompt_box"][0], mask["choice"]) for mask in masks] == [(x, k) for x in (10, 50) for k in range(3)]
    for mask, own in zip(masks, expected.masks.reshape(6, *expected.masks.shape[2:]), strict=True):
        assert np.array_equal(decode_rle(mask["segmentation"]), own)


def test_published_spelling_of_points(options):
    masks, _ = written(asked(options, mode="point", point=("[[30,40,1],[90,20,0]]",)))
    assert masks[0]["points"] == [[30, 40, 1], [90, 20, 0]]


def test_everything(options, pico_folders, picture):
    settings = {
        "points_per_side": 4,
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
        "box_nms_thresh": 1.0,
        "min_mask_region_area": 0,
    }
    masks, folder = written(asked(options, mode="all", save_mask=True, **settings))
    generator = MaskGenerator(load_predictor(pico_folders["sam2"], device="cpu"), **settings)
    expected = generator.generate(picture)
    assert len(masks) == len(expected) > 1
    stack = np.stack([row["segmentation"] for row in expected])
    for mask, row in zip(masks, expected, strict=True):
        assert np.array_equal(decode_rle(mask["segmentation"]), row["segmentation"])
    assert names(folder) == ["picture_labels.png", "picture_vis.png", "results.json"]
    labels = np.array(Image.open(f"{folder}/picture_labels.png"))
    assert labels.dtype == np.uint16
    areas = stack.sum((1, 2))
    for y, x in ((0, 0), (60, 80), (119, 159)):
        own = [k for k in range(len(stack)) if stack[k, y, x]]
        assert labels[y, x] == (min(own, key=lambda k: areas[k]) + 1 if own else 0) or (
            areas[labels[y, x] - 1] == min(areas[own])
        )


def test_nothing_found_is_a_result_that_is_said(options, caplog):
    masks, folder = written(asked(options, mode="all", points_per_side=1, pred_iou_thresh=1e6))
    assert "nothing was found on 1 of 1 images" in caplog.text and "--pred_iou_thresh" in caplog.text
    assert masks == []
    assert np.array_equal(
        np.array(Image.open(f"{folder}/picture_vis.png"))[0, 0], np.array(Image.open(options.image_path))[0, 0]
    )


def test_smaller_masks_are_seen():
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :2, :2], masks[1], masks[2, 1:, 1:] = True, True, True
    assert smallest_on_top(masks).tolist() == [[1, 1, 2, 2], [1, 1, 3, 3], [2, 3, 3, 3], [2, 3, 3, 3]]


def test_done_images_are_left_alone(options):
    first = asked(options, point=("30,40,1",))
    written(first)
    before = json.dumps(written(first)[0])
    assert json.dumps(written(asked(first, point=("31,40,1",)))[0]) != before


def test_a_place_that_one_image_lacks(options, picture, tmp_path, capsys):
    """Of a folder the others are done; a lone image is refused."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(picture).save(folder / "wide.png")
    Image.fromarray(picture[:, :60]).save(folder / "narrow.png")
    assert run(asked(options, image_path=str(folder), point=("100,50,1",))) == 1
    assert (
        "narrow.png: point (100, 50) lies outside the image, which is 60 wide and 120 high" in capsys.readouterr().err
    )
    with pytest.raises(PromptError, match="lies outside the image"):
        run(
            asked(
                options, image_path=str(folder / "narrow.png"), point=("100,50,1",), vis_save_path=str(tmp_path / "o")
            )
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"point": ("1,2,3",)}, "label 3"),
        ({"point": ("1",)}, "needed is x,y,label"),
        ({"point": ("a,b,1",)}, "needed is x,y,label"),
        ({"point": ("1,NaN,1",)}, "needed is x,y,label"),
        ({"box": ("1,2,3",)}, "needed is x1,y1,x2,y2"),
        ({"box": ("50,20,10,90",)}, "box 50,20,10,90 is empty"),
        ({"box": ("50,20,50,90",)}, "is empty"),
        ({"box": ("500,20,550,90",)}, "lies outside the image"),
        ({"mode": "point"}, "--mode point needs a point: --point"),
        ({"mode": "box"}, "--mode box needs a box: --box"),
        ({"mode": "all", "point": ("1,2,1",)}, "--point goes with --mode point, not with all"),
        ({"mode": "all", "save_logits": True}, "--save_logits"),
        ({"prompt": ("a cat",), "box": ("1,2,3,4",)}, "--box goes with --mode box, not with text"),
        ({"prompt": ("a cat",), "multimask": True}, "--multimask goes with points and boxes"),
        ({"point": ("1,2,1",), "semantic": True}, "--semantic"),
        ({"mode": "text"}, "no phrase"),
        ({}, "no phrase"),
    ],
)
def test_options_that_cannot_work(options, values, message, tmp_path):
    with pytest.raises(PromptError, match=message):
        run(asked(options, **values))
    assert not (tmp_path / "out").exists()


def test_a_model_without_points(options, pico_folders, tmp_path):
    other = asked(options, version=str(pico_folders["efficient_sam"]), point=("1,2,1",))
    with pytest.raises(ModelError, match=f"{PICO['efficient_sam']}, which takes no points. Give --version a SAM"):
        run(other)
    assert not (tmp_path / "out").exists()


def test_numbers():
    assert read_numbers("--box", "1,2,3,4.5", (4,), "") == [[1, 2, 3, 4.5]]
    assert read_numbers("--box", " [[1, 2, 3, 4], [5, 6, 7, 8]]", (4,), "") == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert read_numbers("--box", "[1,2,3,4]", (4,), "") == [[1, 2, 3, 4]]
