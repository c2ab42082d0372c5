"""The bundled Open-Vocabulary SAM: masks of boxes and clicks, and their names; floors fail on broken weights."""

import numpy as np
import pytest
import torch

from datasets.instance_files import open_instances
from model import load_open_vocabulary
from tests.conftest import ROOT
from utils.centre_points import centre_points
from utils.class_lists import read_class_list
from utils.errors import VocabularyError
from utils.label_metrics import mask_ious

SCENES = ROOT / "assets" / "named_scenes"
FLOORS = {"box": (0.6, 0.7), "point": (0.5, 0.6)}
"""Mean IoU, and share of right names of both branches together, on 12 scenes; the model card has the real figures."""
CHANCE = 1 / 65


@pytest.fixture(scope="module")
def scenes():
    return open_instances("coco", SCENES / "annotations" / "instances_val.json", SCENES / "images")


@pytest.fixture(scope="module")
def predictor():
    return load_open_vocabulary("ovsam-nano", device="cpu", branch="both")


@pytest.fixture(scope="module")
def found(scenes, predictor):
    """Return of every thing (IoU by box, IoU by point, name by box, name by point, true name)."""
    rows = []
    for index in range(len(scenes)):
        sample = scenes.load(index)
        truth = torch.from_numpy(sample.masks).bool()
        predictor.set_image(sample.image)
        by_box = predictor.predict(boxes=sample.boxes, top_k=1)
        by_point = predictor.predict(points=centre_points(truth)[:, None].numpy(), top_k=1)
        ious = [mask_ious(torch.from_numpy(one.masks), truth).tolist() for one in (by_box, by_point)]
        names = [[row[0] for row in one.names] for one in (by_box, by_point)]
        rows += zip(*ious, *names, [scenes.names[one.category] for one in scenes.asked[index]], strict=True)
    return rows


def test_its_names_are_those_of_the_scenes(scenes, predictor):
    vocabulary = predictor.vocabulary
    assert set(vocabulary.names) == set(scenes.names.values()) and len(vocabulary) == 65
    novel = [name for name, is_novel in zip(vocabulary.names, vocabulary.is_novel, strict=True) if is_novel]
    assert tuple(novel) == read_class_list(SCENES / "novel.txt").names
    assert int(vocabulary.is_base.sum()) == 48 and not (vocabulary.is_base & vocabulary.is_novel).any()


@pytest.mark.parametrize(("prompt", "column"), [("box", 0), ("point", 1)])
def test_masks_and_names_are_right_often_enough(found, prompt, column):
    iou = np.mean([row[column] for row in found])
    right = np.mean([row[column + 2] == row[4] for row in found])
    assert (iou > FLOORS[prompt][0], right > FLOORS[prompt][1]) == (True, True), (iou, right)


def test_novel_names_are_answered(found):
    novel = set(read_class_list(SCENES / "novel.txt").names)
    right = [row[2] == row[4] for row in found if row[4] in novel]
    assert len(right) >= 8 and np.mean(right) > 10 * CHANCE


def test_words_of_its_world_work_and_others_are_refused(scenes, predictor):
    sample = scenes.load(0)
    predictor.set_image(sample.image)
    before = predictor.vocabulary
    named = predictor.predict(boxes=sample.boxes[:1], vocabulary=["bus", "monkey", "penguin"], top_k=3)
    assert sorted(named.names[0]) == ["bus", "monkey", "penguin"]
    with pytest.raises(VocabularyError, match="never read"):
        predictor.set_vocabulary(["quasar"])
    predictor.set_vocabulary(before)
