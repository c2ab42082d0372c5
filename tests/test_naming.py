"""inference.py names masks: its own, those of other models, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from configs.inference import InferenceArgs
from model.checkpoints.clip import save_text
from model.checkpoints.load import load_model
from model.image_runner import run
from model.named_predictor import load_open_vocabulary
from model.predictor import ImagePredictor, load_predictor
from model.vocabulary import make_vocabulary, save_vocabulary
from tests.conftest import ROOT
from tests.ovsam_folder import make_text, write_ovsam
from utils.errors import CheckpointError, ImageError, ModelError, PromptError, VocabularyError
from utils.masks import decode_rle
from utils.visualize import fit_text, thickest_place, wrap_text, write_on_masks

NAMES = ("zebra", "tape_(sticky)", "cat, kitten")
OPEN = {
    "points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0,
    "min_mask_region_area": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def ovsam(tmp_path_factory):
    """Return the folder of a model with coco.safetensors beside it."""
    folder = write_ovsam(tmp_path_factory.mktemp("ovsam"))
    save_vocabulary(folder / "coco.safetensors", make_vocabulary(make_text(), NAMES))
    return folder


@pytest.fixture
def options(ovsam, picture_path, tmp_path):
    return InferenceArgs(
        version=str(ovsam), image_path=str(picture_path), vis_save_path=str(tmp_path / "out"), device="cpu",
        vocabulary="coco",
    )  # fmt: skip


@pytest.fixture
def named(ovsam, picture):
    found = load_open_vocabulary(ovsam, ovsam / "coco.safetensors", device="cpu")
    found.set_image(picture)
    return found


def asked(options, **values):
    return dataclasses.replace(options, **values)


def written(options):
    assert run(options) == 0
    folder = Path(options.vis_save_path)
    [record] = json.loads((folder / "results.json").read_text("utf-8"))
    return record["masks"], folder


def same_names(record, names, chances):
    assert [row["name"] for row in record["names"]] == names
    assert [row["probability"] for row in record["names"]] == pytest.approx(chances.tolist(), abs=1e-5)


class TestOwnMasks:
    def test_a_point(self, options, named):
        [mask], folder = written(asked(options, model_type="ovsam", point=("30,40,1", "90,20,0"), top_k=2))
        expected = named.predict(points=[[30, 40], [90, 20]], labels=[1, 0], top_k=2)
        assert np.array_equal(decode_rle(mask["segmentation"]), expected.masks[0])
        assert len(mask["names"]) == 2
        same_names(mask, expected.names[0], expected.probabilities[0])
        drawn = Image.open(folder / "picture_vis.png")
        assert drawn.height > 120, "the names are listed below"

    def test_boxes(self, options, named):
        masks, folder = written(asked(options, box=("10,20,80,90", "50,30,150,110")))
        expected = named.predict(boxes=[[10, 20, 80, 90], [50, 30, 150, 110]])
        for mask, *answer in zip(masks, expected.names, expected.probabilities, strict=True):
            same_names(mask, *answer)
        pictures = {path.name for path in folder.glob("*.png")}
        assert pictures == {"picture_0_vis.png", "picture_1_vis.png", "picture_vis.png"}

    def test_both_branches_and_another_grid(self, options, ovsam, picture):
        [mask], _ = written(asked(options, box=("10,20,80,90",), branch="both", roi_size=7))
        other = load_open_vocabulary(ovsam, ovsam / "coco.safetensors", device="cpu", branch="both", roi_size=7)
        other.set_image(picture)
        expected = other.predict(boxes=[10, 20, 80, 90])
        same_names(mask, expected.names[0], expected.probabilities[0])

    def test_everything_reads_the_image_once(self, options, named, monkeypatch):
        calls, encode = [], ImagePredictor._encode
        monkeypatch.setattr(ImagePredictor, "_encode", lambda self, images: calls.append(1) or encode(self, images))
        masks, _ = written(asked(options, mode="all", **OPEN))
        assert len(calls) == 1
        assert len(masks) > 1
        expected = named.name_masks(np.stack([decode_rle(mask["segmentation"]) for mask in masks]))
        for mask, *answer in zip(masks, expected.names, expected.probabilities, strict=True):
            same_names(mask, *answer)

    def test_more_words_than_a_path_may_have(self, options):
        words = ", ".join(f"animal number {number}" for number in range(40))
        [mask], _ = written(asked(options, point=("30,40,1",), vocabulary=words, top_k=40))
        assert len(mask["names"]) == 40

    def test_words_are_encoded(self, options, named):
        [mask], _ = written(asked(options, point=("30,40,1",), vocabulary="red panda, cat/kitten"))
        expected = named.predict(points=[[30, 40]], vocabulary=["red panda", "cat/kitten"])
        same_names(mask, expected.names[0], expected.probabilities[0])

    def test_files_of_names(self, options, named, tmp_path):
        (tmp_path / "names.txt").write_text("red panda\ncat, kitten\n")
        categories = [{"id": 7, "name": "cat, kitten"}, {"id": 3, "name": "red panda"}]
        (tmp_path / "names.json").write_text(json.dumps({"categories": categories}))
        expected = named.predict(points=[[30, 40]], vocabulary=["red panda", "cat, kitten"])
        for name in ("names.txt", "names.json"):
            [mask], _ = written(asked(options, point=("30,40,1",), vocabulary=str(tmp_path / name)))
            same_names(mask, expected.names[0], expected.probabilities[0])

    def test_the_vocabulary_beside_the_model(self, options, ovsam, tmp_path, caplog):
        folder = tmp_path / "model"
        folder.mkdir()
        for path in ovsam.iterdir():
            (folder / path.name).symlink_to(path)
        plain = asked(options, version=str(folder), point=("30,40,1",), vocabulary=None)
        [mask], _ = written(plain)
        assert "names" not in mask
        assert "no --vocabulary was given: masks get no names" in caplog.text
        (folder / "vocabulary.safetensors").symlink_to(ovsam / "coco.safetensors")
        [mask], _ = written(plain)
        assert sorted(row["name"] for row in mask["names"]) == sorted(NAMES)

    def test_other_names_do_it_again(self, options, tmp_path):
        names = tmp_path / "names.txt"
        for text in ("one\ntwo\n", "three\nfour\nfive\n"):
            names.write_text(text)
            [mask], _ = written(asked(options, point=("30,40,1",), vocabulary=str(names)))
            assert sorted(row["name"] for row in mask["names"]) == sorted(text.split())


class TestMasksOfOthers:
    @pytest.fixture
    def other(self, options, ovsam, pico_folders):
        return asked(options, version=str(pico_folders["sam2"]), name_with=str(ovsam))

    def check(self, masks, named):
        pictures = np.stack([decode_rle(mask["segmentation"]) for mask in masks])
        expected = named.name_masks(pictures)
        for mask, names, chances, picture in zip(masks, expected.names, expected.probabilities, pictures, strict=True):
            same_names(mask, names if picture.any() else [], chances if picture.any() else chances[:0])

    def test_of_phrases(self, other, named, pico_folders, picture):
        masks, folder = written(asked(other, prompt=("the zebra", "a cat")))
        predictor = load_predictor(pico_folders["sam2"], device="cpu")
        predictor.set_image(picture)
        expected = predictor.predict(["the zebra", "a cat"])
        assert [mask["phrase"] for mask in masks] == ["the zebra", "a cat"]
        assert np.array_equal(np.stack([decode_rle(mask["segmentation"]) for mask in masks]), expected.masks)
        self.check(masks, named)
        assert (folder / "picture_1_vis.png").is_file()

    def test_of_clicks_and_of_everything(self, other, named):
        self.check(written(asked(other, point=("30,40,1",), multimask=True))[0], named)
        self.check(written(asked(other, mode="all", **OPEN))[0], named)

    def test_nothing_found_has_no_names(self, other):
        masks, _ = written(asked(other, mode="all", points_per_side=1, pred_iou_thresh=1e6))
        assert masks == []


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "kind", "words"),
        [
            ({"vocabulary": "/nowhere/names.txt"}, VocabularyError, "no such class list: /nowhere/names.txt"),
            ({"vocabulary": "/nowhere/v.safetensors"}, VocabularyError, "no such vocabulary: /nowhere/v.safetensors"),
            ({"vocabulary": "cat,dog,cat"}, VocabularyError, "there twice: 'cat'"),
            ({"vocabulary": "cat,,dog"}, VocabularyError, "has an empty name"),
            ({"vocabulary": "  "}, VocabularyError, "--vocabulary is empty"),
            (
                {"vocabulary": "lvis"},
                VocabularyError,
                r"there is no .*lvis.safetensors. Make it: python -m",
            ),
            ({"vocabulary": "RN50x16_Coco.pth"}, VocabularyError, r"without names.*--published RN50x16_Coco.pth"),
            ({"top_k": 0}, PromptError, "--top_k 0: needed is at least 1"),
            ({"roi_size": 0}, PromptError, "--roi_size 0"),
            ({"point": ("161,40,1",)}, PromptError, "outside the image, which is 160 wide"),
            ({"model_type": "sam2"}, ModelError, "--model_type sam2 does not fit .* give ovsam"),
            ({"name_with": "nano"}, ModelError, "--name_with nano is .* which names nothing"),
            ({"name_with": "/nowhere/model.pth"}, CheckpointError, "no such checkpoint: /nowhere/model.pth"),
            ({"multimask": True}, PromptError, "makes one mask of a prompt"),
            ({"image_path": "/nowhere.jpg"}, ImageError, "no such image"),
        ],
    )
    def test_value_is_named(self, options, tmp_path, values, kind, words):
        with pytest.raises(kind, match=words) as caught:
            run(asked(options, **({"point": ("30,40,1",)} | values)))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("text", "words"), [("", "holds no names"), ("a\nb\na\n", r"names.txt: names that are there twice: 'a'")]
    )
    def test_lists_that_cannot_be(self, options, tmp_path, text, words):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(VocabularyError, match=words):
            run(asked(options, point=("30,40,1",), vocabulary=str(tmp_path / "names.txt")))

    def test_a_model_that_names_nothing(self, options, pico_folders):
        with pytest.raises(ModelError, match=r"--vocabulary: nano is .* which names nothing. Give --name_with"):
            run(asked(options, version="nano", prompt=("a cat",)))
        with pytest.raises(ModelError, match="an engine names nothing"):
            run(asked(options, engine="somewhere", version="nano", point=("30,40,1",)))

    def test_options_about_names_without_names(self, options, pico_folders):
        sam2 = asked(options, version=str(pico_folders["sam2"]), vocabulary=None, point=("30,40,1",))
        for values in ({"top_k": 2}, {"branch": "both"}, {"roi_size": 7}):
            with pytest.raises(ModelError, match=f"--{next(iter(values))} is about names.* Give --name_with"):
                run(asked(sam2, **values))
        with pytest.raises(ModelError, match=r"masks get none\. Give --vocabulary too"):
            run(asked(options, vocabulary=None, point=("30,40,1",), top_k=2))

    def test_words_without_a_text_tower(self, options, ovsam, tmp_path):
        folder = tmp_path / "model"
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(ovsam / name)
        with pytest.raises(VocabularyError, match=r"has no text tower .* cannot read words"):
            run(asked(options, version=str(folder), point=("30,40,1",), vocabulary="cat"))
        save_text(folder, {"visual.conv1.weight": torch.ones(1)})
        with pytest.raises(CheckpointError, match=r"no CLIP text tower\. Needed are OpenAI's weights with QuickGELU"):
            run(asked(options, version=str(folder), point=("30,40,1",), vocabulary="cat"))
        assert not (tmp_path / "out").exists()

    def test_a_part_that_is_absent(self, options, tmp_path):
        """Of the four published files, two are there."""
        torch.save({"neck_student.x": torch.ones(1)}, tmp_path / "sam2clip_vith_rn50x16.pth")
        torch.save({"prompt_encoder.x": torch.ones(1)}, tmp_path / "sam_vit_h_4b8939.pth")
        with pytest.raises(CheckpointError, match=r"is missing: CLIP ResNet, in OpenAI's RN50x16.pt; mask decoder"):
            run(asked(options, version=str(tmp_path), point=("30,40,1",)))

    def test_another_clip(self, options, ovsam, tmp_path):
        made = make_vocabulary(make_text(), NAMES)
        save_vocabulary(tmp_path / "v.safetensors", dataclasses.replace(made, vectors=made.vectors[..., :7].clone()))
        with pytest.raises(VocabularyError, match="have 7 channels, the model needs 48"):
            run(asked(options, point=("30,40,1",), vocabulary=str(tmp_path / "v.safetensors")))

    def test_one_line_and_status_two(self, picture_path):
        words = ["--image_path", picture_path, "--prompt", "a cat", "--vocabulary", "cat,dog", "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "inference.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "which names nothing. Give --name_with" in done.stderr


def test_a_model_without_names_imports_nothing_of_them(tmp_path):
    code = (
        "import sys, configs.inference, model.image_runner as runner\n"
        "args = configs.inference.InferenceArgs(image_path='assets/scenes/koalas.jpg', prompt=('koala',), device='cpu',"
        " vis_save_path=sys.argv[1])\n"
        "assert runner.run(args) == 0\n"
        "assert not {'open_clip', 'timm', 'transformers', 'torchvision'} & sys.modules.keys(), 'heavy import'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


class TestPictures:
    FONT = ImageFont.load_default(12)

    def test_texts_lie_in_their_masks(self):
        masks = np.zeros((3, 100, 200), bool)
        masks[0, 10:40, 5:95], masks[1, 50:90, 100:195] = True, True
        picture = np.full((130, 200, 3), 200, np.uint8)
        drawn = write_on_masks(picture, masks, ["cat 83%", "", "nothing"])
        changed = (drawn != picture).any(2)
        assert changed.any()
        assert not (changed[:100] & ~masks[0]).any()
        assert not changed[100:].any()

    def test_texts_do_not_cover_each_other(self):
        masks = np.ones((9, 140, 200), bool)
        picture = np.full((140, 200, 3), 200, np.uint8)
        one = (write_on_masks(picture, masks[:1], ["cat"]) == 20).all(2).sum()
        assert one > 50
        assert (write_on_masks(picture, masks, ["cat"] * 9) == 20).all(2).sum() == 5 * one, "further ones are left out"

    def test_thickest_place(self):
        mask = np.zeros((60, 80), bool)
        mask[10:50, 10:50] = mask[20, 50:] = True
        x, y = thickest_place(mask)
        assert abs(x - 29.5) <= 1
        assert abs(y - 29.5) <= 1
        thin = np.zeros((2000, 2000), bool)
        thin[1001, 7] = True
        assert thickest_place(thin) == (7, 1001)

    def test_lines(self):
        text = "a koala beside the very small suitcase"
        lines = wrap_text(text, self.FONT, 90)
        assert " ".join(lines) == text
        assert len(lines) > 2
        assert all(self.FONT.getlength(line) <= 90 for line in lines)
        assert wrap_text("", self.FONT, 50) == [""]
        assert fit_text("suitcasesuitcasesuitcase", self.FONT, 60).endswith("…")


def test_the_folder_is_a_model(ovsam):
    assert load_model(ovsam).config.name == "ovsam-pico"
