"""Points and boxes on COCO and LVIS: numbers against slow computations and by hand, files, and errors."""

import importlib
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.instance_files import LVIS_DETECTIONS, open_instances
from model.checkpoints.load import load_model, save_model
from model.predictor import load_predictor, to_input
from model.types import Prompts
from tests import instance_layouts as layouts
from tests.conftest import ROOT, TOKENIZER, lively_model
from utils import clicks as clicks_module
from utils.clicks import depths_of, next_clicks
from utils.errors import DataError, ImageError, ModelError, TextSAMError, TrainingError
from utils.instance_metrics import (
    InstanceResult,
    average_precision,
    closest_detections,
    count_rles,
    in_published_order,
    mean_by_size,
    published_mean_by_size,
)
from utils.instance_report import draw_prompt
from utils.masks import decode_rle
from utils.visualize import NEGATIVE, POSITIVE

MODELS = {"sam": "sam-vit-pico", "sam2": "sam2-hiera-pico", "efficientvit_sam": "efficientvit-sam-pico"}
"""Family -> a segmenter alone that takes points and boxes."""

LVIS_API = {
    "ap": 0.21497834552631084, "ap50": 0.4383455717852737, "ap75": 0.18106416760626348,
    "ap_small": 0.2027587283635095, "ap_medium": 0.7275983322035197, "ap_large": None,
    "ap_rare": 0.20842318165165252, "ap_common": 0.18039072725121374, "ap_frequent": 0.2593987096133954,
    "ar_300": 0.7607753218344194, "ar_small": 0.7510797690921915, "ar_medium": 0.9222222222222223, "ar_large": None,
}  # fmt: skip
"""What LVIS's own API (lvis 0.5.3) says about `layouts.random_instances()`."""


@pytest.fixture(autouse=True)
def _single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory):
    """Return family -> folder of a segmenter alone."""
    folders = {}
    for family, name in MODELS.items():
        folders[family] = tmp_path_factory.mktemp(family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            save_model(load_model(name, pretrained=False), folders[family])
    return folders


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return layouts.write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def lvis(tmp_path_factory):
    return layouts.write_lvis(tmp_path_factory.mktemp("lvis"))


@pytest.fixture(scope="module")
def found_boxes(tmp_path_factory):
    return layouts.write(tmp_path_factory.mktemp("detector") / "found.json", layouts.detections())


def words(files, **options):
    path, root = files
    given = {"dataset": "coco", "annotation_json_file": path, "image_root": root, "device": "cpu", "workers": 0}
    return [str(part) for name, value in (given | options).items() for part in (f"--{name}", value)]


@pytest.fixture
def run(monkeypatch, capsys, segmenters, coco):
    """Return a function that runs eval.py here and gives back what it printed."""

    def run(*flags, files=coco, **options):
        listed = words(files, **({"version": segmenters["efficientvit_sam"]} | options))
        monkeypatch.setattr(sys, "argv", ["eval.py", *listed, *map(str, flags)])
        assert importlib.import_module("eval").main() == 0
        return capsys.readouterr().out

    return run


def torchrun(processes, *given):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "eval.py",
         *map(str, given)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def read(folder):
    lines = (folder / "annotations.jsonl").read_text().splitlines()
    return json.loads((folder / "metrics.json").read_text()), [json.loads(line) for line in lines]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Slow:
    """Prompts one by one, on images that are encoded for each of them, with masks of pycocotools."""

    def __init__(self, checkpoint, files):
        self.predictor = load_predictor(checkpoint, "cpu", preprocessing="evaluation")
        self.path, self.root = files
        self.coco = COCO(str(self.path))

    def image(self, image_id):
        about = self.coco.imgs[image_id]
        name = about.get("file_name") or "/".join(about["coco_url"].split("/")[-2:])
        return np.array(Image.open(self.root / name).convert("RGB"))

    @torch.inference_mode()
    def mask(self, image_id, clicks=None, box=None):
        """Return the mask, bool [H, W], of the best of three."""
        image, segmenter = self.image(image_id), self.predictor.model.segmenter
        if box is None:
            points = torch.tensor([[[float(x), float(y)] for x, y, _ in clicks]])
            prompts = Prompts(points=points, labels=torch.tensor([[int(positive) for *_, positive in clicks]]))
        else:
            x, y, w, h = box
            prompts = Prompts(boxes=torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32))
        scaled = to_input(prompts, self.predictor.prompt_spec, image.shape[:2], self.predictor.model)
        prediction = segmenter.decode(self.predictor._encode([image]).features, *segmenter.encode_prompts(scaled))
        best = max((1, 2, 3), key=lambda i: float(prediction.iou[0, i]))
        [logits] = segmenter.postprocess(prediction.logits[:, best], [image.shape[:2]], torch.zeros(1))
        return logits[0].numpy() > 0

    def asked(self):
        """Return the annotations that are measured, image by image, images in the order of their names."""
        order = sorted(self.coco.imgs, key=lambda i: (self.coco.imgs[i].get("file_name", ""), i))
        return [one for i in order for one in self.coco.imgToAnns[i] if one["area"] >= 1]


def slow_depths(mask):
    """Measure the distance to every pixel outside, one pixel at a time."""
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    depths = np.zeros(mask.shape)
    for y, x in np.argwhere(mask):
        depths[y, x] = np.sqrt(((outside - (y, x)) ** 2).sum(1).min())
    return depths


def slow_click(truth, predicted, clicked):
    missing, extra = slow_depths(truth & ~predicted), slow_depths(predicted & ~truth)
    for x, y in clicked:
        missing[y, x] = extra[y, x] = 0
    is_positive = missing.max() > extra.max()
    depths = missing if is_positive else extra
    y, x = np.argwhere(depths == depths.max())[0]
    return x, y, is_positive


class TestClicks:
    def blobs(self, count, height, width, seed):
        rng = np.random.default_rng(seed)
        return np.stack([cv2.GaussianBlur(rng.random((height, width)), (5, 5), 0) > 0.5 for _ in range(count)])

    @pytest.mark.parametrize("at_once", [1 << 26, 1, 2000])
    def test_against_one_pixel_at_a_time(self, monkeypatch, at_once):
        monkeypatch.setattr(clicks_module, "MAX_PIXELS", at_once)
        truth, predicted = self.blobs(9, 21, 17, 0), np.zeros((9, 21, 17), bool)
        truth[1] = True  # to all four edges
        truth[2] = False
        clicked = np.zeros((9, 0, 2), np.int64)
        for number in range(4):
            places, is_positive = next_clicks(truth, predicted, clicked)
            for n in range(9):
                expected = slow_click(truth[n], predicted[n], clicked[n])
                assert (*places[n], is_positive[n]) == expected, (number, n)
            clicked = np.concatenate([clicked, places[:, None]], axis=1)
            predicted = self.blobs(9, 21, 17, number + 1)
            predicted[3] = truth[3]

    def test_depths_are_exact_and_masks_do_not_touch(self):
        masks = self.blobs(6, 15, 40, 3)
        masks[2], masks[3] = True, True
        found = depths_of(masks)
        for mask, depths in zip(masks, found, strict=True):
            assert depths == pytest.approx(slow_depths(mask), abs=1e-5)

    def test_equal_depths_are_negative(self):
        truth, predicted = np.zeros((2, 1, 9, 20), bool)
        truth[0, 2:7, 1:6] = True
        predicted[0, 2:7, 11:16] = True
        places, is_positive = next_clicks(truth, predicted, np.zeros((1, 0, 2), np.int64))
        assert (places.tolist(), is_positive.tolist()) == ([[13, 4]], [False])

    def test_no_masks(self):
        places, is_positive = next_clicks(*np.zeros((2, 0, 8, 9), bool), np.zeros((0, 3, 2), np.int64))
        assert places.shape == (0, 2)
        assert is_positive.shape == (0,)


def result(iou, area, image=0):
    """Return a result of a union of 1000 pixels."""
    return InstanceResult(f"{image}", "car", "k", image, 0, round(1000 * iou), 1000, 0, 0, 0.5, area)


class TestMeans:
    def test_each_annotation_is_in_one_size(self):
        rows = [result(0.1, 1023.9), result(0.2, 1024.0), result(0.4, 9215.9), result(0.8, 9216.0)]
        found = mean_by_size(rows)
        assert found.means == pytest.approx({"all": 0.375, "small": 0.1, "medium": 0.3, "large": 0.8})
        assert found.counts == {"all": 4, "small": 1, "medium": 2, "large": 1}

    def test_published_sizes_share_their_ends(self):
        rows = [result(0.1, 1023.9), result(0.2, 1024.0), result(0.4, 9215.9), result(0.8, 9216.0)]
        found = published_mean_by_size(rows, 1, 1)
        assert found.means == pytest.approx({"all": 0.375, "small": 0.15, "medium": 1.4 / 3, "large": 0.8})
        assert found.counts == {"all": 4, "small": 2, "medium": 3, "large": 1}

    @pytest.mark.parametrize("measure", [mean_by_size, lambda rows: published_mean_by_size(rows, 1, 1)])
    def test_a_size_that_nothing_has(self, measure):
        found = measure([result(0.5, 5000.0)])
        assert found.text() == "all: 50.000, large: n/a, medium: 50.000, small: n/a"
        assert found.to_json()["miou"]["large"] is None
        assert measure([]).means["all"] is None

    def test_published_processes_repeat_images(self):
        rows = [result(iou, 1.0, image) for image, iou in ((0, 0.1), (0, 0.2), (1, 0.4), (4, 0.9))]
        found = published_mean_by_size(rows, 5, 3)  # 0 3 | 1 4 | 2 0
        assert found.counts["all"] == 6
        assert found.means["all"] == pytest.approx((2 * (0.1 + 0.2) + 0.4 + 0.9) / 6)
        order = [row.image for row in in_published_order(rows, lambda row: row.image, 5, 3)]
        assert order == [0, 0, 1, 4, 0, 0]

    def test_nothing_drawn_and_nothing_predicted(self):
        assert InstanceResult("a", "car", "k", 0, 0, 0, 0, 0, 0, 0.5, 3.0).iou == 0.0


class TestPrecision:
    def test_coco_against_pycocotools(self):
        truth, found = layouts.random_instances(30, 40)
        truth["annotations"][0]["iscrowd"] = truth["annotations"][5]["iscrowd"] = 1
        known = COCO()
        [known.dataset, theirs] = layouts.copied(truth, found)
        known.createIndex()
        slow = COCOeval(known, known.loadRes(theirs), "segm")
        slow.evaluate()
        slow.accumulate()
        slow.summarize()
        ours = average_precision(*layouts.copied(truth, found), "coco")
        names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100", "ar_small"]
        for name, value in zip([*names, "ar_medium", "ar_large"], slow.stats, strict=True):
            assert ours[name] == (None if value == -1 else pytest.approx(value, abs=1e-12)), name
        assert 0.05 < ours["ap"] < 0.95

    def test_lvis_against_its_own_api(self):
        truth, found = layouts.random_instances()
        counts = [sum(one["image_id"] == image["id"] for one in found) for image in truth["images"]]
        assert max(counts) > LVIS_DETECTIONS
        ours = average_precision(truth, found, "lvis")
        assert ours == {name: value and pytest.approx(value, abs=1e-12) for name, value in LVIS_API.items()}

    def test_no_detection_is_right_or_there(self):
        truth, _ = layouts.random_instances(10, 1)
        assert average_precision(*layouts.copied(truth, []), "coco")["ap"] == 0.0


class TestClosest:
    def one(self, category, *corner):
        return {"category_id": category, "segmentation": layouts.rle(layouts.box_mask(corner))}

    def test_of_its_category_the_one_that_overlaps_most(self):
        drawn = [
            self.one(1, 0, 0, 10, 10),
            self.one(2, 20, 20, 10, 10),
            self.one(3, 5, 5, 4, 4),
            self.one(1, 30, 0, 9, 9),
        ]
        found = [
            self.one(2, 0, 0, 10, 10),
            self.one(1, 0, 0, 9, 9),
            self.one(1, 0, 0, 10, 9),
            self.one(2, 22, 20, 10, 10),
        ]
        assert closest_detections(drawn, found) == [2, 3, None, None]
        assert closest_detections(drawn, []) == [None] * 4

    def test_counts(self):
        truth, mask = (self.one(1, *corner)["segmentation"] for corner in ((0, 0, 10, 10), (5, 0, 10, 4)))
        assert count_rles(truth, mask) == (20, 120, 100, 40)


class TestReader:
    @pytest.mark.parametrize("kind", ["coco", "lvis"])
    def test_every_kind_of_mask(self, kind, coco, lvis):
        path, root = coco if kind == "coco" else lvis
        instances, known = open_instances(kind, path, root), COCO(str(path))
        assert len(instances) == 5
        assert [instances.count(i) for i in range(5)] == [3, 1, 1, 0, 2]
        for index, (identity, about, _) in enumerate(instances.images):
            sample = instances.load(index)
            asked = [one for one in known.imgToAnns[identity] if one["area"] >= 1]
            assert sample.image.shape == (about.height, about.width, 3)
            assert [one.id for one in instances.asked[index]] == [one["id"] for one in asked]
            for mask, box, one in zip(sample.masks, sample.boxes, asked, strict=True):
                assert np.array_equal(mask, known.annToMask(one))
                assert mask.max() == 1
                x, y, w, h = one["bbox"]
                assert box.tolist() == [x, y, x + w, y + h]

    def test_truth_keeps_crowds_and_small_ones(self, coco):
        instances, known = open_instances("coco", *coco), COCO(str(coco[0]))
        found = instances.truth([0, 1])
        assert [image["id"] for image in found["images"]] == [9, 19]
        theirs = [one for identity in (9, 19) for one in known.imgToAnns[identity]]
        assert [one["iscrowd"] for one in found["annotations"]] == [0, 1, 0, 0, 0]
        assert [one["id"] for one in found["annotations"]] == [1, 2, 3, 4, 5], "COCO's API takes 0 for nothing"
        for one, other in zip(found["annotations"], theirs, strict=True):
            assert [one[key] for key in ("category_id", "area", "bbox")] == [
                other[key] for key in ("category_id", "area", "bbox")
            ]
            assert np.array_equal(decode_rle(one["segmentation"]), known.annToMask(other) == 1)

    def test_detections_by_image_in_the_order_of_the_file(self, coco, tmp_path):
        found = layouts.detections()[::-1]
        path = layouts.write(tmp_path / "found.json", found)
        instances = open_instances("coco", *coco, path)
        for index, (identity, *_) in enumerate(instances.images):
            own = [one for one in found if one["image_id"] == identity]
            rows = slice(*instances.detections.starts[index : index + 2])
            assert instances.count(index) == len(own)
            assert instances.detections.scores[rows].tolist() == [one["score"] for one in own]
            assert instances.detections.categories[rows].tolist() == [one["category_id"] for one in own]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in own)]
            assert instances.load(index).boxes.tolist() == boxes

    def test_of_lvis_the_best_300_are_asked(self, lvis, tmp_path):
        rng = np.random.default_rng(0)
        found = [
            {"image_id": 9, "category_id": 3, "bbox": [1, 1, 5, 5], "score": round(float(s), 2)}
            for s in rng.random(700)
        ]
        found += [{"image_id": 29, "category_id": 7, "bbox": [2, 2, 5, 5], "score": 0.001}]
        instances = open_instances("lvis", *lvis, layouts.write(tmp_path / "found.json", found))
        assert [instances.count(i) for i in range(5)] == [300, 0, 1, 0, 0]
        best = sorted(range(700), key=lambda n: -found[n]["score"])[:300]
        assert instances.detections.scores[:300].tolist() == [found[n]["score"] for n in sorted(best)]


def damaged(change):
    """Return annotations of COCO with the first one changed."""
    _, annotations = layouts.contents()
    change(annotations[0])
    return annotations


def without(key):
    return lambda one: one.pop(key)


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("{}", ["no images and no annotations and no categories", "nothing"]),
            ('{"info": {}, "images": [], "refs": [1]}', ["no images", "info, refs", "COCO's or LVIS's"]),
            ("[1, 2]", ["holds a list; needed is an object"]),
            ("12", ["is not JSON"]),
            ('{"images": [{"id": 1', ["is not JSON", "cut off"]),
            ('{"images": {"id": "a"}, "annotations": 4, "categories": [1]}', ["an annotation", "int found"]),
        ],
    )
    def test_not_coco(self, tmp_path, text, parts):
        path = tmp_path / "instances.json"
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            open_instances("coco", path, tmp_path)
        for part in [str(path), *parts]:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            *((without(key), f"no '{key}'") for key in ("id", "image_id", "category_id")),
            *((without(key), f"no '{key}'") for key in ("area", "bbox", "segmentation")),
            (lambda one: one.update(image_id=4), "image 4 is not in the file"),
            (lambda one: one.update(category_id=4), "category 4, which is not in the file"),
            (lambda one: one.update(id=1), "annotation 1 is there twice"),
            (lambda one: one.update(area=float("nan")), "area nan"),
            (lambda one: one.update(area=-1), "area -1"),
            (lambda one: one.update(bbox=[1, 2, 3]), "bbox [1, 2, 3]"),
            (lambda one: one.update(bbox=[1, 2, 3, -4]), "bbox [1, 2, 3, -4]"),
            (lambda one: one.update(bbox=[1, 2, 3, "4"]), "bbox [1, 2, 3, '4']"),
            (lambda one: one.update(bbox=[1, 2, float("inf"), 4]), "bbox"),
            (lambda one: one.update(segmentation=[[1, 2, 3, 4]]), "at least 3 points"),
        ],
    )  # fmt: skip
    def test_damaged_annotation(self, tmp_path, change, part):
        files = layouts.write_coco(tmp_path, damaged(change))
        with pytest.raises(DataError) as caught:
            open_instances("coco", *files)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_masks_of_another_image(self, tmp_path):
        files = layouts.write_coco(
            tmp_path, damaged(lambda one: one.update(segmentation={"size": [8, 8], "counts": [64]}))
        )
        instances = open_instances("coco", *files)
        with pytest.raises(DataError, match="4096"):
            instances.load(0)
        with pytest.raises(DataError, match="annotation 0"):
            instances.truth([0])

    def test_coco_is_not_lvis(self, coco, lvis):
        with pytest.raises(DataError, match="no 'coco_url'"):
            open_instances("lvis", *coco)
        with pytest.raises(DataError, match="no 'file_name'"):
            open_instances("coco", *lvis)

    def test_a_path_that_leaves_the_folder(self, tmp_path):
        path, root = layouts.write_lvis(tmp_path)
        content = json.loads(path.read_text())
        content["images"][0]["coco_url"] = "http://host/../../etc/../passwd"
        with pytest.raises(DataError, match="leaves the image folder"):
            open_instances("lvis", layouts.write(path, content), root)

    def test_missing_images(self, coco, tmp_path):
        with pytest.raises(
            DataError, match=r"5 of 5 images of .* are missing, the first: .*000000000000\.png.*--image_root"
        ):
            open_instances("coco", coco[0], tmp_path)

    def test_an_image_of_another_size(self, tmp_path):
        path, root = layouts.write_coco(tmp_path)
        Image.new("RGB", (30, 20)).save(root / "000000000000.png")
        with pytest.raises(DataError, match=r"30x20 pixels upright, .* says 64x64"):
            open_instances("coco", path, root).load(0)

    @pytest.mark.parametrize(
        ("found", "part"),
        [
            ([], "no detections"),
            ({"a": 1}, "holds an object; needed is a list"),
            ([{"image_id": 9}], "no 'category_id'"),
            ([{"image_id": 4, "category_id": 3, "bbox": [1, 1, 2, 2], "score": 0.5}], "image 4 is not in the file"),
            ([{"image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}], "category 1 is not in"),
            ([{"image_id": 9, "category_id": 3, "bbox": [1, 1, 2], "score": 0.5}], "bbox [1, 1, 2]"),
            ([{"image_id": 9, "category_id": 3, "bbox": [1, 1, 2, 2]}], "no 'score'"),
            ([{"image_id": 9, "category_id": 3, "bbox": [1, 1, 2, 2], "score": float("nan")}], "detection 0: NaN"),
        ],
    )
    def test_damaged_detections(self, coco, tmp_path, found, part):
        with pytest.raises(DataError) as caught:
            open_instances("coco", *coco, layouts.write(tmp_path / "found.json", found))
        assert part in str(caught.value)


class TestNumbers:
    @pytest.mark.parametrize("family", MODELS)
    def test_boxes_against_one_by_one(self, run, segmenters, coco, tmp_path, family):
        text = run(version=segmenters[family], out=tmp_path, batch_size=2)
        self.check(segmenters[family], coco, tmp_path, text)

    def test_lvis(self, run, segmenters, lvis, tmp_path):
        text = run(version=segmenters["sam"], files=lvis, dataset="lvis", out=tmp_path)
        self.check(segmenters["sam"], lvis, tmp_path, text)

    def test_the_segmenter_of_a_model_with_phrases(self, run, coco, tmp_path):
        save_model(lively_model("sam2"), tmp_path / "evf", TOKENIZER)
        text = run(version=tmp_path / "evf", out=tmp_path / "out", model_type="sam2")
        self.check(tmp_path / "evf", coco, tmp_path / "out", text)

    def check(self, checkpoint, files, folder, text):
        metrics, rows = read(folder)
        slow = Slow(checkpoint, files)
        asked = slow.asked()
        assert [row["id"] for row in rows] == [str(one["id"]) for one in asked]
        ious = []
        for row, one in zip(rows, asked, strict=True):
            truth, mask = slow.coco.annToMask(one) == 1, slow.mask(one["image_id"], box=one["bbox"])
            assert row["target"] == truth.sum()
            assert abs(row["intersection"] - (truth & mask).sum()) <= 2
            assert abs(row["union"] - (truth | mask).sum()) <= 4
            ious.append(row["intersection"] / row["union"])
        assert len({row["predicted"] for row in rows}) > 4, "the masks hardly differ: the test says little"
        small = [iou for iou, one in zip(ious, asked, strict=True) if one["area"] < 1024]
        assert metrics["miou"]["all"] == pytest.approx(np.mean(ious), abs=1e-12)
        assert metrics["miou"]["small"] == pytest.approx(np.mean(small), abs=1e-12)
        assert metrics["counts"] == {"all": 7, "large": 1, "medium": 2, "small": 4}
        shown = "all: {:.3f}, large: {:.3f}, medium: {:.3f}, small: {:.3f}".format(
            *(100 * metrics["miou"][name] for name in ("all", "large", "medium", "small"))
        )
        assert text.splitlines()[-1] == shown

    @pytest.mark.parametrize("family", MODELS)
    def test_clicks_against_one_by_one(self, run, segmenters, coco, tmp_path, family):
        run(version=segmenters[family], out=tmp_path, prompt_type="point", num_click=3)
        metrics, rows = read(tmp_path)
        assert metrics["num_click"] == 3
        slow = Slow(segmenters[family], coco)
        for row, one in zip(rows, slow.asked(), strict=True):
            truth, clicks = slow.coco.annToMask(one) == 1, row["prompt"]
            mask = np.zeros_like(truth)
            assert len(clicks) == 3
            for number, (x, y, is_positive) in enumerate(clicks):
                errors = {1: truth & ~mask, 0: mask & ~truth}
                depths = {kind: cv2.distanceTransform(np.pad(error, 1).astype(np.uint8), cv2.DIST_L2, 0)[1:-1, 1:-1]
                          for kind, error in errors.items()}  # fmt: skip
                for x0, y0, _ in clicks[:number]:
                    depths[0][y0, x0] = depths[1][y0, x0] = 0
                # a pixel may flip between one prompt and a batch of them: then another place is as deep
                assert depths[is_positive][y, x] >= max(part.max() for part in depths.values()) - 1
                mask = slow.mask(one["image_id"], clicks=clicks[: number + 1])
            assert abs(row["intersection"] - (truth & mask).sum()) <= 2
            assert abs(row["predicted"] - mask.sum()) <= 4
            x, y, is_positive = slow_click(truth, np.zeros_like(truth), [])
            assert clicks[0] == [x, y, is_positive]

    def test_one_click_is_the_default(self, run, tmp_path):
        assert run(prompt_type="point") == run(prompt_type="point", num_click=1, out=tmp_path)
        assert all(len(row["prompt"]) == 1 for row in read(tmp_path)[1])

    @pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 5, "workers": 2}])
    def test_batches_and_workers_change_nothing(self, run, tmp_path, options):
        run(out=tmp_path / "one", batch_size=2)
        run(out=tmp_path / "other", **options)
        for row, same in zip(read(tmp_path / "one")[1], read(tmp_path / "other")[1], strict=True):
            assert (row["id"], row["target"], row["prompt"]) == (same["id"], same["target"], same["prompt"])
            assert abs(row["intersection"] - same["intersection"]) <= 2

    def test_small_chunks_change_nothing(self, run, tmp_path, monkeypatch):
        from model import prompted_eval

        run(out=tmp_path / "one", prompt_type="point", num_click=2)
        monkeypatch.setattr(prompted_eval, "PROMPTS_ON_CPU", 7)
        monkeypatch.setattr(prompted_eval, "MAX_LOGITS", 1)
        run(out=tmp_path / "other", prompt_type="point", num_click=2)
        for row, same in zip(read(tmp_path / "one")[1], read(tmp_path / "other")[1], strict=True):
            assert abs(row["intersection"] - same["intersection"]) <= 2

    def test_every_image_is_encoded_once(self, run, monkeypatch):
        from model.segmenters.efficientvit_sam import EfficientViTSAMSegmenter

        counts, encode = [], EfficientViTSAMSegmenter.encode_image
        monkeypatch.setattr(
            EfficientViTSAMSegmenter, "encode_image", lambda self, x: counts.append(len(x)) or encode(self, x)
        )
        run(prompt_type="point", num_click=3, batch_size=2)
        assert counts == [2, 2], "the image without annotations needs no features"

    def test_sizes_as_published(self, run, tmp_path):
        text = run("--reference_metric", out=tmp_path, reference_world=2)
        metrics, rows = read(tmp_path)
        assert len(rows) == 7
        assert metrics["processes"] == 2
        # the first image, of three annotations, counts twice; one area is 32^2, another 96^2
        assert metrics["counts"] == {"all": 10, "large": 1, "medium": 3, "small": 8}
        assert "published arithmetic of 2 processes" in text
        total = sum((1 + (row["key"] == rows[0]["key"])) * row["intersection"] / row["union"] for row in rows)
        assert metrics["miou"]["all"] == pytest.approx(total / 10, abs=1e-9)

    def test_bf16(self, run, tmp_path):
        run(out=tmp_path / "full")
        run(out=tmp_path / "half", precision="bf16")
        full, half = (read(tmp_path / name)[0] for name in ("full", "half"))
        assert (full["weights"], half["weights"]) == ("float32", "bfloat16")
        assert half["miou"]["all"] == pytest.approx(full["miou"]["all"], abs=0.05)
        assert half["miou"] != full["miou"]


def answered(checkpoint, files):
    """Return annotations whose masks are what the model answers to their boxes, so that it is right about them."""
    slow, (_, annotations) = Slow(checkpoint, files), layouts.contents()
    for one in annotations:
        mask = slow.mask(one["image_id"], box=one["bbox"]).astype(np.uint8)
        assert mask.sum() > 20
        one.update(segmentation=layouts.rle(mask), area=float(mask.sum()), iscrowd=0)
    return annotations


class TestDetections:
    """With annotations that the model is right about, average precision can be told by hand."""

    def command(self, tmp_path, checkpoint, kind):
        write = layouts.write_coco if kind == "coco" else layouts.write_lvis
        files = write(tmp_path / "data", answered(checkpoint, write(tmp_path / "plain")))
        found = layouts.write(tmp_path / "found.json", layouts.detections())
        return {"files": files, "dataset": kind, "prompt_type": "box_from_detector", "source_json_file": found}

    @pytest.mark.parametrize("kind", ["coco", "lvis"])
    def test_by_hand(self, run, segmenters, tmp_path, kind):
        checkpoint = segmenters["sam"]
        options = self.command(tmp_path, checkpoint, kind)
        text = run(version=checkpoint, out=tmp_path / "out", **options)
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        # five cars and three kites are found, after one that is none; LVIS did not look for kites where that one is
        cars, kites = 5 / 6, 3 / 4 if kind == "coco" else 1.0
        assert metrics["ap"] == pytest.approx((cars + kites) / 2, abs=1e-9)
        assert metrics["ap50"] == metrics["ap75"] == metrics["ap"]
        if kind == "lvis":
            assert (metrics["ap_frequent"], metrics["ap_rare"]) == (pytest.approx(cars), pytest.approx(kites))
            assert metrics["ap_common"] is None
            assert "ap_common: n/a" in text
        assert f"ap: {100 * metrics['ap']:.3f}, " in text
        rows = read(tmp_path / "out")[1]
        assert all(row["iou"] > 0.98 for row in rows)
        assert {row["id"]: row["score"] for row in rows}["3"] == pytest.approx(0.25)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        by_image = sorted(layouts.detections(), key=lambda one: one["image_id"])
        assert [one["score"] for one in results] == [one["score"] for one in by_image], "the detector's, unchanged"
        assert all(one.keys() == {"image_id", "category_id", "score", "segmentation"} for one in results)

    def test_the_written_results_say_the_same_to_pycocotools(self, run, segmenters, tmp_path, capsys):
        options = self.command(tmp_path, segmenters["sam"], "coco")
        run(version=segmenters["sam"], out=tmp_path / "out", **options)
        content = json.loads(options["files"][0].read_text())
        for one in content["annotations"]:
            one["id"] += 1
        known = COCO(str(layouts.write(tmp_path / "known.json", content)))
        slow = COCOeval(known, known.loadRes(str(tmp_path / "out" / "results.json")), "segm")
        slow.evaluate()
        slow.accumulate()
        slow.summarize()
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        found = [metrics[name] for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10")]
        assert found == [None if value == -1 else pytest.approx(value, abs=1e-12) for value in slow.stats[:8]]

    def test_published_processes_repeat_detections(self, run, coco, found_boxes):
        options = {"prompt_type": "box_from_detector", "source_json_file": found_boxes}
        assert "10 detections of 5 images" in run(**options)
        assert "13 detections of 5 images" in run("--reference_metric", reference_world=2, **options)


class TestProcesses:
    @pytest.mark.parametrize("prompt", ["point", pytest.param("box_from_detector", marks=pytest.mark.slow)])
    def test_two_print_and_write_the_same_bytes(self, run, segmenters, coco, found_boxes, tmp_path, prompt):
        extra = {"num_click": 2} if prompt == "point" else {"source_json_file": found_boxes}
        options = {"version": segmenters["efficientvit_sam"], "prompt_type": prompt, "batch_size": 2, **extra}
        done = torchrun(2, *words(coco, **options, out=tmp_path / "two"))
        assert done.returncode == 0, done.stderr
        assert done.stdout == run(**options, out=tmp_path / "one")
        assert files(tmp_path / "one") == files(tmp_path / "two")
        names = {"point": ["annotations.jsonl", "metrics.json", "worst.png"],
                 "box_from_detector": ["annotations.jsonl", "metrics.json", "results.json", "worst.png"]}  # fmt: skip
        assert sorted(files(tmp_path / "one")) == names[prompt]


class TestOutput:
    def test_the_sheet(self, run, tmp_path, monkeypatch):
        from utils import instance_report

        drawn, draw = [], instance_report.draw_prompt
        monkeypatch.setattr(
            instance_report, "draw_prompt", lambda image, prompt: drawn.append(prompt) or draw(image, prompt)
        )
        run(out=tmp_path)
        worst = sorted(read(tmp_path)[1], key=lambda row: row["iou"])
        assert [[list(corner) for corner in prompt] for prompt in drawn] == [row["prompt"] for row in worst]
        sheet = np.array(Image.open(tmp_path / "worst.png"))
        assert sheet.shape[1] > 1000
        assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100

    def test_prompts_are_drawn(self):
        image = np.zeros((100, 120, 3), np.uint8)
        boxed = draw_prompt(image, ((10.2, 20.0), (60.0, 80.0)))
        assert tuple(boxed[20, 30]) == tuple(boxed[50, 10]) == POSITIVE
        assert not boxed[50, 30].any()
        clicked = draw_prompt(image, ((30, 40, 1), (90, 70, 0)))
        assert (tuple(clicked[40, 30]), tuple(clicked[70, 90])) == (POSITIVE, NEGATIVE)
        assert not image.any()

    def test_a_quick_look_says_so(self, run, tmp_path):
        text = run(max_images=2, out=tmp_path)
        assert "of 2 images, of the 5 that there are: NOT the score of the set" in text
        assert not read(tmp_path)[0]["is_whole"]

    def test_a_quick_look_at_detections(self, run, found_boxes):
        text = run(prompt_type="box_from_detector", source_json_file=found_boxes, max_images=2)
        assert "5 detections of 2 images" in text

    def test_a_damaged_image_leaves_nothing(self, run, tmp_path):
        path, root = layouts.write_coco(tmp_path)
        image = root / "000000000004.png"
        image.write_bytes(image.read_bytes()[:300])
        with pytest.raises(ImageError, match=r"000000000004\.png"):
            run(files=(path, root), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestRefused:
    def test_a_model_without_points(self, run):
        for prompt in ("point", "box"):
            with pytest.raises(ModelError, match=r"nano.* takes no .*Take a SAM, SAM-2 or EfficientViT-SAM model"):
                run(version="nano", prompt_type=prompt)

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"num_click": 2}, ["--num_click", "--prompt_type point, not box"]),
            ({"num_click": 0, "prompt_type": "point"}, ["--num_click 0", "at least 1"]),
            ({"prompt_type": "box_from_detector"}, ["--source_json_file"]),
            ({"source_json_file": "a.json"}, ["--source_json_file", "box_from_detector"]),
            ({"source_json_file": "a.json", "prompt_type": "point"}, ["--source_json_file", "box_from_detector"]),
            ({"val_dataset": "refcoco|unc|testA"}, ["--val_dataset", "--dataset"]),
            ({"image_size": 224}, ["--image_size", "for phrases"]),
            ({"empty_pixels": 3}, ["--empty_pixels", "for phrases"]),
            ({"model_type": "ori"}, ["--model_type ori", "give efficientvit"]),
            ({"reference_world": 2}, ["--reference_world", "--reference_metric"]),
            ({"annotation_json_file": "/nowhere/a.json"}, ["/nowhere/a.json", "cannot be read"]),
            ({"image_root": "/nowhere"}, ["/nowhere", "--image_root"]),
            ({"version": "/nowhere/l0.pt"}, ["/nowhere/l0.pt"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_value_is_named(self, run, tmp_path, options, parts):
        with pytest.raises(TextSAMError) as caught:
            run(**({"out": tmp_path / "out"} | options))
        for part in parts:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_files_are_needed(self, monkeypatch):
        for given, part in (
            (["--dataset", "coco"], "--dataset coco needs --annotation_json_file"),
            (["--dataset", "lvis", "--annotation_json_file", "a.json"], "--dataset lvis needs --image_root"),
            (["--image_root", "a"], "--image_root goes with --dataset"),
            (["--prompt_type", "point"], "--prompt_type goes with --dataset"),
        ):
            monkeypatch.setattr(sys, "argv", ["eval.py", *given])
            with pytest.raises(TrainingError, match=part):
                importlib.import_module("eval").main()
