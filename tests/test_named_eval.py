"""Masks and their names on COCO and LVIS: against the predictor one by one, as published, by hand, and errors."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools.coco import COCO

from model.named_eval import published_points
from model.named_predictor import load_open_vocabulary
from model.recognizers.open_vocabulary import mask_boxes
from model.types import Prompts
from model.vocabulary import make_vocabulary, save_vocabulary
from tests import instance_layouts as layouts
from tests.conftest import ROOT
from tests.ovsam_folder import make_text, write_ovsam
from utils.centre_points import centre_points
from utils.errors import ModelError, TextSAMError, TrainingError, VocabularyError
from utils.label_metrics import NamedResult, NameMeans

NAMES = ("kite, toy kite", "car")
"""In another order than the categories, and with a wording that they lack."""


@pytest.fixture(autouse=True)
def _single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def ovsam(tmp_path_factory):
    return write_ovsam(tmp_path_factory.mktemp("ovsam"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return layouts.write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def lvis(tmp_path_factory):
    return layouts.write_lvis(tmp_path_factory.mktemp("lvis"))


@pytest.fixture(scope="module")
def vocabulary(ovsam, coco, tmp_path_factory):
    """Return a vocabulary file that says what is base and novel; either name is what the model sees of one thing."""
    made = make_vocabulary(make_text(), NAMES)
    slow, seen = Slow(ovsam, coco, made), {}
    for one, truth in slow.asked():
        points = centre_points(torch.from_numpy(truth)[None]).tolist()
        low = torch.from_numpy(slow.named.predict(points=points).low_res)
        features = slow.named.predictor._image.features
        with torch.no_grad():
            found = slow.named._recognizer.embed_regions(features, mask_boxes(low), torch.zeros(1, dtype=torch.long))
        seen.setdefault((slow.category(one), one["image_id"]), found[0])
    vectors = F.normalize(torch.stack([seen["kite", 49], seen["car", 9]]), dim=1)
    flags = {"is_base": torch.tensor([False, True]), "is_novel": torch.tensor([True, False])}
    path = tmp_path_factory.mktemp("names") / "v.safetensors"
    save_vocabulary(path, replace(made, vectors=vectors[:, None].expand_as(made.vectors).contiguous(), **flags))
    return path


def words(files, **options):
    path, root = files
    given = {"dataset": "coco", "annotation_json_file": path, "image_root": root, "device": "cpu", "workers": 0}
    return [str(part) for name, value in (given | options).items() for part in (f"--{name}", value)]


@pytest.fixture
def run(monkeypatch, capsys, ovsam, coco):
    """Return a function that runs eval.py here and gives back what it printed."""

    def run(*flags, files=coco, **options):
        monkeypatch.setattr(sys, "argv", ["eval.py", *words(files, **({"version": ovsam} | options)), *flags])
        assert importlib.import_module("eval").main() == 0
        return capsys.readouterr().out

    return run


def read(folder):
    lines = (folder / "annotations.jsonl").read_text().splitlines()
    return json.loads((folder / "metrics.json").read_text()), [json.loads(line) for line in lines]


class Slow:
    """One annotation after the other, through the predictor that users have."""

    def __init__(self, ovsam, files, vocabulary, **options):
        self.named = load_open_vocabulary(ovsam, vocabulary, device="cpu", **options)
        self.root, self.coco = files[1], COCO(str(files[0]))

    def asked(self):
        order = sorted(self.coco.imgs, key=lambda i: (self.coco.imgs[i].get("file_name", ""), i))
        for identity in order:
            about = self.coco.imgs[identity]
            name = about.get("file_name") or "/".join(about["coco_url"].split("/")[-2:])
            self.named.set_image(np.array(Image.open(self.root / name).convert("RGB")))
            for one in self.coco.imgToAnns[identity]:
                if one["area"] >= 1 and not one.get("iscrowd", 0):
                    yield one, self.coco.annToMask(one) == 1

    def category(self, one):
        return self.coco.cats[one["category_id"]]["name"]


def check_means(metrics, rows):
    for kind, iou, score in (("all", "miou", "score"), *((k, f"{k}_iou", f"{k}_score") for k in ("base", "novel"))):
        own = [row for row in rows if kind in ("all", row["kind"])]
        assert metrics["counts"][kind] == len(own) > 0
        assert metrics[iou] == pytest.approx(np.mean([row["iou"] for row in own]), abs=1e-12)
        assert metrics[score] == pytest.approx(100 * np.mean([row["is_right"] for row in own]), abs=1e-12)


class TestNumbers:
    @pytest.mark.parametrize(("prompt", "branch"), [("box", "both"), ("point", "head"), ("point", "both")])
    def test_against_the_predictor(self, run, ovsam, coco, vocabulary, tmp_path, prompt, branch):
        text = run(vocabulary=vocabulary, out=tmp_path, prompt_type=prompt, branch=branch, batch_size=3)
        metrics, rows = read(tmp_path)
        slow, answers, names = Slow(ovsam, coco, vocabulary, branch=branch), set(), set()
        for row, (one, truth) in zip(rows, slow.asked(), strict=True):
            x, y, w, h = one["bbox"]
            place = {"boxes": [x, y, x + w, y + h]}
            if prompt == "point":
                place = {"points": centre_points(torch.from_numpy(truth)[None]).tolist()}
                assert row["prompt"] == [[*place["points"][0], 1]]
            found = slow.named.predict(**place, top_k=1)
            assert row["id"] == str(one["id"])
            assert abs(row["intersection"] - (found.masks[0] & truth).sum()) <= 2
            assert row["probability"] == pytest.approx(float(found.probabilities[0, 0]), rel=0.02)
            assert row["answer"] == found.names[0][0]
            assert row["is_right"] == (row["answer"].split(",")[0] == slow.category(one))
            assert row["kind"] == {"car": "base", "kite": "novel"}[row["category"]]
            answers.add(row["predicted"])
            names.add(row["answer"])
        assert len(answers) > 3, "the masks hardly differ: the test says little"
        assert names == set(NAMES) or branch == "both", "all get one name: the test says little"
        check_means(metrics, rows)
        assert (metrics["branch"], metrics["roi_size"], metrics["counts"]["all"]) == (branch, 12, 6)
        assert f"miou: {metrics['miou']:.4f}, base_iou: {metrics['base_iou']:.4f}, " in text
        assert text.rstrip().endswith(f"novel_score: {metrics['novel_score']:.2f}")

    @torch.inference_mode()
    @pytest.mark.parametrize("prompt", ["box", "point"])
    def test_as_published(self, run, ovsam, coco, vocabulary, tmp_path, prompt):
        """CLIP sees the annotated boxes: rescaled with boxes, not with points. These are of the resized mask."""
        run("--reference_metric", vocabulary=vocabulary, out=tmp_path, prompt_type=prompt)
        metrics, rows = read(tmp_path)
        assert metrics["metric"] == "published"
        slow = Slow(ovsam, coco, vocabulary)
        recognizer, segmenter = slow.named._recognizer, slow.named.predictor.model.segmenter
        for row, (one, truth) in zip(rows, slow.asked(), strict=True):
            height, width = slow.named.predictor.prompt_spec.resized_size(*truth.shape)
            scale = torch.tensor([width / truth.shape[1], height / truth.shape[0]])
            x, y, w, h = one["bbox"]
            box = torch.tensor([[x, y, x + w, y + h]])
            if prompt == "box":
                box = box * scale.repeat(2)
                prompts = Prompts(boxes=box)
            else:
                resized = F.interpolate(torch.from_numpy(truth)[None, None].float(), (height, width))[0] == 1
                point = centre_points(resized, approximate=True)
                assert row["prompt"][0][:2] == pytest.approx((point[0] / scale).tolist(), abs=1e-4)
                prompts = Prompts(points=point[:, None].float(), labels=torch.ones(1, 1, dtype=torch.long))
            features, index = slow.named.predictor._image.features, torch.zeros(1, dtype=torch.long)
            low = segmenter.decode(features, *segmenter.encode_prompts(prompts)).logits[:, 0]
            head = recognizer.logits(recognizer.embed_regions(features, mask_boxes(low), index))
            clip = recognizer.logits(recognizer.embed_with_clip(features, box, index))
            chances = recognizer.fuse(head, clip, low).softmax(-1)[0, :-1]
            assert row["answer"] == NAMES[chances.argmax()]
            assert row["probability"] == pytest.approx(float(chances.max()), rel=0.02)
            [full] = segmenter.postprocess(low, [truth.shape], index)
            assert abs(row["intersection"] - ((full[0] > 0).numpy() & truth).sum()) <= 2
        check_means(metrics, rows)

    def test_lvis_by_its_frequencies(self, run, lvis, tmp_path):
        """Without a vocabulary the categories are encoded; rare ones are novel, and the head reads a grid of 7."""
        run(files=lvis, dataset="lvis", out=tmp_path)
        metrics, rows = read(tmp_path)
        assert metrics["roi_size"] == 7
        assert {(row["category"], row["kind"]) for row in rows} == {("car", "base"), ("kite", "novel")}
        check_means(metrics, rows)

    def test_base_and_novel_from_files(self, run, tmp_path):
        (tmp_path / "base.txt").write_text("kite\n")
        (tmp_path / "none.txt").write_text("car\n")
        run(base=tmp_path / "base.txt", novel=tmp_path / "none.txt", out=tmp_path / "out")
        assert {(row["category"], row["kind"]) for row in read(tmp_path / "out")[1]} == {
            ("kite", "base"),
            ("car", "novel"),
        }

    def test_without_base_and_novel(self, run, tmp_path):
        text = run(out=tmp_path)
        metrics, _ = read(tmp_path)
        assert metrics["novel_iou"] is metrics["base_score"] is None
        assert "base_iou: n/a, novel_iou: n/a, score: " in text

    def test_several_clicks(self, run, tmp_path):
        run(out=tmp_path, prompt_type="point", num_click=2)
        assert {len(row["prompt"]) for row in read(tmp_path)[1]} == {2}

    @pytest.mark.parametrize("name", ["coco", "vocabulary"])
    def test_the_file_beside_the_model(self, run, ovsam, vocabulary, tmp_path, name):
        folder = tmp_path / "model"
        folder.mkdir()
        for path in ovsam.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / f"{name}.safetensors").symlink_to(vocabulary)
        assert run(version=folder) == run(vocabulary=vocabulary)
        (folder / f"{name}.safetensors").unlink()
        save_vocabulary(folder / f"{name}.safetensors", make_vocabulary(make_text(), ["car", "zebra"]))
        with pytest.raises(VocabularyError, match=rf"{name}.safe.* 'kite'.* is not in .*--output .*coco.safe"):
            run(version=folder)

    def test_two_processes_write_the_same_bytes(self, run, ovsam, coco, vocabulary, tmp_path):
        options = {"vocabulary": vocabulary, "prompt_type": "point", "batch_size": 2}
        one, two = tmp_path / "one", tmp_path / "two"
        alone = run(out=one, **options)
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "eval.py"]
        done = subprocess.run(
            [sys.executable, "-m", *launch, *words(coco, version=ovsam, out=two, **options)], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone
        written = [{path.name: path.read_bytes() for path in sorted(out.iterdir())} for out in (one, two)]
        assert written[0] == written[1]
        assert sorted(written[0]) == ["annotations.jsonl", "metrics.json", "worst.png"]


def result(iou, is_right, kind=""):
    values = {"answer": "cat", "probability": 0.5, "is_right": is_right, "kind": kind, "area": 5.0}
    return NamedResult("1", "car", "k", 0, 0, round(1000 * iou), 1000, 0, 0, 0.5, **values)


def test_means_by_hand():
    found = NameMeans.of([result(0.2, True, "base"), result(0.4, False, "base"), result(0.9, True)])
    assert found.means["miou"] == pytest.approx(0.5)
    assert found.means["score"] == pytest.approx(200 / 3)
    assert (found.means["base_iou"], found.means["base_score"]) == (pytest.approx(0.3), 50.0)
    assert (found.means["novel_iou"], found.counts) == (None, {"all": 3, "base": 2, "novel": 0})
    assert found.text() == (
        "miou: 0.5000, base_iou: 0.3000, novel_iou: n/a, score: 66.67, base_score: 50.00, novel_score: n/a"
    )


def test_what_the_sheet_says():
    wrong, right = result(0.9, False), result(0.1, True)
    assert wrong.merit < right.merit
    assert (wrong.caption, right.caption) == ("car: named cat, 50% (wrong)", "car: named cat, 50%")


def test_published_clicks_are_those_of_the_whole_picture():
    """What is around a mask has no bearing on where it is deepest: at a border, in parts, with a hole, empty."""
    masks = np.zeros((5, 40, 60), bool)
    masks[0, 3:21, 10:17] = masks[0, 12:18, 10:44] = masks[1, :13, 50:] = masks[2, 30, 5] = True
    masks[3] = True
    masks[3, 10:20, 20:50] = False
    rows, columns = np.arange(80) * 40 // 80, np.arange(120) * 60 // 120
    whole = centre_points(torch.from_numpy(masks[:, rows][:, :, columns]), approximate=True)
    assert published_points(masks, (80, 120)).equal(whole)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "kind", "words"),
        [
            (
                {"vocabulary": "cat,car"},
                VocabularyError,
                "cat,car: .* 'kite', a category of .*instances.json, is not in",
            ),
            ({"vocabulary": "car,kite,cat"}, VocabularyError, "car,kite,cat: .* disagree: 'cat' is no category of"),
            ({"vocabulary": "car,kite,car"}, VocabularyError, "there twice: 'car'"),
            ({"vocabulary": "/nowhere/v.safetensors"}, VocabularyError, "no such vocabulary"),
            ({"vocabulary": "lvis"}, VocabularyError, "there is no .*lvis.safetensors. Make it"),
            ({"base": "/nowhere/b.txt"}, TrainingError, "--base goes with --novel"),
            ({"base": "/nowhere/b.txt", "novel": "/nowhere/n.txt"}, VocabularyError, "no such class list: /nowhere/b"),
            ({"roi_size": 0}, TrainingError, "--roi_size 0"),
            ({"version": "nano", "vocabulary": "coco"}, ModelError, "--vocabulary is about names, which nano"),
            ({"version": "nano", "branch": "head"}, ModelError, "--branch is about names, which nano"),
            ({"model_type": "sam2"}, ModelError, "--model_type sam2 does not fit .* give ovsam"),
        ],
    )
    def test_value_is_named(self, run, tmp_path, options, kind, words):
        with pytest.raises(kind, match=words) as caught:
            run(out=tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_lists_that_do_not_fit(self, run, tmp_path):
        for name, text in (("car", "car\n"), ("both", "car\nkite\n"), ("cars", "cars\n")):
            (tmp_path / f"{name}.txt").write_text(text)
        for base, novel, words in (("car", "both", "'car' is in --base"), ("cars", "car", "Did you mean 'car'")):
            with pytest.raises(VocabularyError, match=words):
                run(base=tmp_path / f"{base}.txt", novel=tmp_path / f"{novel}.txt")

    def test_published_evaluation(self, run):
        for options, words in (
            ({"num_click": 2, "prompt_type": "point"}, "has one click"),
            ({"reference_world": 2}, "counts no image twice"),
        ):
            with pytest.raises(TrainingError, match=words):
                run("--reference_metric", **options)

    def test_without_a_text_tower(self, run, ovsam, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(ovsam / name)
        with pytest.raises(VocabularyError, match=r"coco.safetensors. Make it: python -m tools.make_vocabulary"):
            run(version=folder)

    def test_names_need_a_dataset(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--vocabulary", "coco"])
        with pytest.raises(TextSAMError, match="--vocabulary goes with --dataset coco"):
            importlib.import_module("eval").main()
