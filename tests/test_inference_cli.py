"""inference.py as a user runs it: what it writes, what it refuses and how, and that a stopped run goes on."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs.inference import InferenceArgs
from model import image_runner
from model.checkpoints.load import save_published
from model.image_runner import run
from model.predictor import load_predictor
from tests.conftest import PICO, ROOT, TOKENIZER, pico_model
from utils.errors import CheckpointError, ImageError, MissingPackageError, ModelError, PromptError
from utils.masks import decode_rle

PUBLISHED_OPTIONS = (
    "--version", "--vis_save_path", "--precision", "--image_size", "--model_max_length", "--local_rank",
    "--load_in_8bit", "--load_in_4bit", "--model_type", "--image_path", "--prompt",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _single_process(monkeypatch):
    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def options(pico_folders, picture_path, out):
    """Return options that work: one image, one phrase, the CPU; a test changes what it is about."""
    return InferenceArgs(
        version=str(pico_folders["efficient_sam"]),
        image_path=str(picture_path),
        prompt=("the zebra",),
        vis_save_path=str(out),
        device="cpu",
    )


@pytest.fixture
def images(picture, tmp_path):
    """Return a folder of five images that differ."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(5):
        Image.fromarray(np.roll(picture, 17 * k, axis=1)).save(folder / f"image{k}.png")
    return folder


def change(options, **values):
    return dataclasses.replace(
        options,
        **{key: value if isinstance(value, bool | int | tuple) else str(value) for key, value in values.items()},
    )


def refused(options, kind, *parts):
    """Assert that a run is refused on one line that holds every part, and that nothing was written."""
    with pytest.raises(kind) as caught:
        run(options)
    text = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in text
    for part in parts:
        assert part in text
    folder = options.vis_save_path
    assert not os.path.lexists(folder)


def script(*words, launcher=()):
    """Run inference.py in a process of its own."""
    return subprocess.run(
        [sys.executable, *launcher, "inference.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def tree_times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def fail_to_load(*_):
    pytest.fail("the model was loaded")


class TestProcess:
    """What needs a process of its own: exit status, stderr, torchrun."""

    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["--image_path", "absent.png"], ["no such image: absent.png", "Check the path"]),
            (["--version", "evf-sam2-mulitask"], ["'evf-sam2-mulitask'", "Did you mean 'evf-sam2-multitask'"]),
            (["--max_pixels", "1000"], ["160x120 = 19,200 pixels", "bound of 1,000", "Make it smaller"]),
            (["--promt", "a dog"], ["--promt", "--prompt"]),
            (["--precision", "fp8"], ["'fp8'", "'bf16'"]),
            (["--image_size", "large"], ["--image_size", "'large'"]),
        ],
        ids=lambda value: value[0] if value[0].startswith("--") else "",
    )
    def test_error_is_one_line_and_status_two(self, options, out, words, parts):
        base = {"--version": options.version, "--image_path": options.image_path, "--prompt": "the zebra"}
        given = [word for pair in base.items() if pair[0] not in words for word in pair]
        done = script(*given, "--vis_save_path", out, "--device", "cpu", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        for part in parts:
            assert part in done.stderr
        assert not out.exists()

    def test_missing_options_are_named(self):
        done = script("--version", "evf-sam2")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "--image_path" in done.stderr

    def test_help_shows_the_published_options(self):
        done = script("--help")
        assert (done.returncode, done.stderr) == (0, "")
        for option in PUBLISHED_OPTIONS:
            assert option in done.stdout
        assert "_" in "".join(PUBLISHED_OPTIONS)
        assert not {option.replace("_", "-") for option in PUBLISHED_OPTIONS if "_" in option} & set(
            done.stdout.split()
        )

    def test_dashes_and_underscores_are_the_same(self, options, out):
        done = script(
            "--version", options.version, "--image-path", options.image_path, "--prompt", "the zebra", "--prompt",
            "a dog", "--vis-save-path", out, "--save-mask", "--device", "cpu",
        )  # fmt: skip
        assert done.returncode == 0
        assert [mask["phrase"] for mask in results(out)[0]["masks"]] == ["the zebra", "a dog"]
        assert "picture_1_mask.png" in names(out)

    @pytest.mark.parametrize("unreadable", [False, True])
    def test_two_processes_share_a_folder(self, options, images, out, unreadable):
        if unreadable:
            (images / "image9.png").write_text("sixth: the second process meets it")
        done = script(
            "--version", options.version, "--image_path", images, "--prompt", "the zebra", "--vis_save_path", out,
            "--device", "cpu", launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        )  # fmt: skip
        assert (done.returncode != 0) == unreadable
        assert " 3/3 " in done.stderr  # the share of the first process, on its progress bar
        assert ("image9.png is not an image" in done.stderr) == unreadable
        assert [record["image"] for record in results(out)] == [str(images / f"image{k}.png") for k in range(5)]
        assert names(out) == [*(f"image{k}_vis.png" for k in range(5)), "results.json"]


class TestImagesRefused:
    def test_no_such_file(self, options, tmp_path):
        refused(change(options, image_path=tmp_path / "absent.png"), ImageError, "absent.png", "Check the path")

    def test_empty_folder(self, options, tmp_path):
        (tmp_path / "none").mkdir()
        refused(change(options, image_path=tmp_path / "none"), ImageError, "no images in folder", ".jpeg")

    def test_pattern_without_a_match(self, options, images):
        refused(change(options, image_path=images / "*.jpg"), ImageError, "*.jpg", "Quote the pattern")

    def test_text_named_jpg(self, options, tmp_path):
        (tmp_path / "notes.jpg").write_text("just text")
        refused(change(options, image_path=tmp_path / "notes.jpg"), ImageError, "notes.jpg", "Allowed: .bmp")

    @pytest.mark.parametrize("suffix", [".jpg", ".png"])
    def test_truncated(self, options, picture, tmp_path, suffix):
        path = tmp_path / f"cut{suffix}"
        Image.fromarray(picture).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refused(change(options, image_path=path), ImageError, f"cut{suffix}", "truncated", "Download it again")

    def test_empty_file(self, options, tmp_path):
        (tmp_path / "empty.png").touch()
        refused(change(options, image_path=tmp_path / "empty.png"), ImageError, "empty.png", "0 bytes", "again")

    def test_over_the_pixel_bound(self, options):
        refused(change(options, max_pixels=1000), ImageError, "19,200", "bound of 1,000", "Make it smaller")

    def test_same_stem_in_folders_of_the_same_name(self, options, picture, tmp_path):
        for above in ("x", "y"):
            (tmp_path / above / "shots").mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / above / "shots" / "a.png")
        refused(
            change(options, image_path=tmp_path / "*" / "shots" / "*.png"), ImageError, "shots_a_png", "one at a time"
        )

    def test_images_that_would_write_the_same_file(self, options, picture, images):
        Image.fromarray(picture).save(images / "image0_1.png")
        two = change(options, image_path=images, prompt=("the zebra", "a dog"))
        refused(two, ImageError, "image0_1_vis.png", "one at a time")


class TestOptionsRefused:
    @pytest.mark.parametrize(
        ("values", "kind", "parts"),
        [
            ({"prompt": ()}, PromptError, ["no phrase", "--prompt"]),
            ({"prompt": ("",)}, PromptError, ["empty phrase ''", "--prompt"]),
            ({"prompt": ("a dog", " \t")}, PromptError, [r"empty phrase ' \t'", "--prompt"]),
            ({"prompt": ("a dog", "a cat", "a dog")}, PromptError, ["--prompt", "Give each phrase once"]),
            ({"prompt": ("caf\udce9",)}, PromptError, [r"'caf\udce9'", "UTF-8"]),
            ({"version": "evf-sam3"}, ModelError, ["'evf-sam3'", "Did you mean 'evf-sam", "tools.list_models"]),
            ({"version": "evf-effi-sam-l"}, ModelError, ["evf-effi-sam-l", "no published weights", "folder"]),
            ({"version": "/nowhere/evf"}, CheckpointError, ["/nowhere/evf", "Pass a folder"]),
            ({"model_type": "sam2"}, ModelError, ["--model_type sam2", PICO["efficient_sam"], "give effi"]),
            ({"model_type": "ori"}, ModelError, ["--model_type ori", PICO["efficient_sam"], "give effi"]),
            ({"image_size": 448}, ModelError, ["--image_size 448", "224"]),
            ({"load_in_8bit": True, "load_in_4bit": True}, ModelError, ["--load_in_8bit and --load_in_4bit", "one"]),
            ({"model_max_length": 2}, ModelError, ["--model_max_length 2", "512"]),
            ({"device": "tpu"}, ModelError, ["'tpu'", "cpu, cuda"]),
            ({"precision": "fp8"}, ModelError, ["'fp8'", "bf16"]),
        ],
    )
    def test_value_is_named_with_a_remedy(self, options, values, kind, parts):
        refused(change(options, **values), kind, *parts)

    @pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
    def test_quantising_without_the_package(self, options, monkeypatch, bits):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        refused(change(options, **{bits: True}), MissingPackageError, f"--{bits}", "pip install bitsandbytes")

    @pytest.mark.parametrize(("limit", "allowed"), [(5, 5), (512, 62)])
    def test_phrase_that_is_too_long(self, options, limit, allowed):
        long = change(options, prompt=("dog " * 80,), model_max_length=limit)
        refused(long, PromptError, "82 tokens", f"allowed are {allowed}", "'dog dog", "Shorten it")

    def test_phrase_that_is_too_long_only_with_its_prefix(self, options):
        five = change(options, prompt=("dog dog dog",), model_max_length=5)
        refused(change(five, semantic=True), PromptError, "allowed are 5", "'[semantic] dog")
        assert run(five) == 0

    @pytest.mark.parametrize("below", [".", "new/folder"])
    def test_output_folder_that_is_a_file(self, options, out, below):
        out.write_text("mine")
        with pytest.raises(ModelError, match=r"--vis_save_path .* is a file\. Give a folder"):
            run(change(options, vis_save_path=out / below))
        assert out.read_text() == "mine"

    @pytest.mark.parametrize("content", ["no json", '{"a": 1}', "[1]", '[{"image": "a.png"}]', "3"])
    def test_results_of_something_else_are_left_alone(self, options, out, content):
        out.mkdir()
        (out / "results.json").write_text(content)
        with pytest.raises(ModelError, match=r"results\.json is not a list of results\. Move it away"):
            run(options)
        assert names(out) == ["results.json"]
        assert (out / "results.json").read_text() == content

    @pytest.mark.parametrize("values", [{"prompt": ("",)}, {"prompt": ("dog " * 80,)}, {"image_size": 448}])
    def test_options_are_checked_before_the_weights_are_read(self, options, monkeypatch, values):
        monkeypatch.setattr(image_runner, "fill_model", fail_to_load)
        with pytest.raises((PromptError, ModelError)):
            run(change(options, **values))


def edit_tensors(folder, edit):
    """Change the table of tensors of a checkpoint folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


PROJECTOR = "text_hidden_fcs.0.2.bias"


class RunsWhenLoaded:
    """Pickles to a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class TestCheckpointRefused:
    def test_without_config(self, options, pico_folder):
        (pico_folder / "config.json").unlink()
        refused(change(options, version=pico_folder), CheckpointError, str(pico_folder), "no config.json", "Needed is")

    @pytest.mark.parametrize("content", ["{'model_type': 'evf'}", "", "[1]"])
    def test_config_that_is_not_json(self, options, pico_folder, content):
        (pico_folder / "config.json").write_text(content)
        refused(
            change(options, version=pico_folder), CheckpointError, "config.json", "" if content == "[1]" else "JSON"
        )

    def test_config_of_another_model(self, options, pico_folder):
        (pico_folder / "config.json").write_text('{"model_type": "llama"}')
        refused(change(options, version=pico_folder), CheckpointError, "'llama'", "'evf'")

    def test_without_weights(self, options, pico_folder):
        (pico_folder / "model.safetensors").unlink()
        refused(change(options, version=pico_folder), CheckpointError, str(pico_folder), "model.safetensors")

    @pytest.mark.parametrize("kept", [0, 5, 10_000])
    def test_truncated_weights(self, options, pico_folder, kept):
        path = pico_folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        refused(change(options, version=pico_folder), CheckpointError, "model.safetensors", "Download it again")

    @pytest.mark.parametrize(
        ("edit", "parts"),
        [
            (lambda t: t.pop(PROJECTOR), ["1 missing", PROJECTOR, "projector from phrase to prompt"]),
            (
                lambda t: t.update({"lm_head.weight": torch.zeros(2)}),
                ["1 that the model does not have", "lm_head.weight"],
            ),
            (lambda t: t.update({PROJECTOR: torch.zeros(255)}), [PROJECTOR, "[255]", "needed [256]"]),
        ],
        ids=["missing", "extra", "mis-shaped"],
    )
    def test_tensor_that_does_not_fit(self, options, pico_folder, edit, parts):
        edit_tensors(pico_folder, edit)
        refused(change(options, version=pico_folder), CheckpointError, *parts, str(pico_folder), "again")

    def test_every_missing_tensor_is_named(self, options, pico_folder):
        gone = [f"mm_extractor.beit3.encoder.layers.{k}.ffn.A.fc1.bias" for k in range(4)]
        edit_tensors(pico_folder, lambda tensors: [tensors.pop(name) for name in gone])
        listed = "mm_extractor.beit3.encoder.layers.{0..3}.ffn.A.fc1.bias"
        refused(change(options, version=pico_folder), CheckpointError, "4 missing", listed)

    def test_missing_tokenizer(self, options, pico_folder):
        (pico_folder / "sentencepiece.bpe.model").unlink()
        refused(change(options, version=pico_folder), CheckpointError, "no tokenizer", "sentencepiece.bpe.model")

    def test_damaged_tokenizer(self, options, pico_folder):
        (pico_folder / "sentencepiece.bpe.model").write_bytes(b"")
        refused(change(options, version=pico_folder), CheckpointError, "sentencepiece", "Take the file")

    @pytest.mark.parametrize("save", [partial(pickle.dump, protocol=2), torch.save], ids=["pickle", "torch"])
    def test_pickle_that_would_run_code(self, options, pico_folder, tmp_path, save):
        (pico_folder / "model.safetensors").unlink()
        marker = tmp_path / "it ran"
        with (pico_folder / "pytorch_model.bin").open("wb") as file:
            save({"weight": RunsWhenLoaded(f"touch '{marker}'")}, file)
        refused(
            change(options, version=pico_folder), CheckpointError, "pytorch_model.bin", "tensors alone", "safetensors"
        )
        assert not marker.exists()

    def test_segmenter_alone_has_no_phrases(self, options, tmp_path):
        from model.checkpoints.evf_sam import SEGMENTERS
        from model.checkpoints.rules import KeyMap, Section, named_tensors

        targets = {f"segmenter.{name}": value for name, value in named_tensors(pico_model("sam").segmenter).items()}
        theirs = KeyMap(targets, (Section("segmenter.", "", SEGMENTERS["sam"].plain),)).theirs
        path = tmp_path / "sam.pth"
        torch.save({their: targets[our].detach() for our, (their, *_) in theirs.items()}, path)
        refused(change(options, version=path), ModelError, "sam.pth", "no phrase encoder", "EVF-SAM")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Return a folder with the SAM 2 pico weights in several .bin files; read only."""
    folder = tmp_path_factory.mktemp("shards")
    save_published(pico_model("sam2"), folder, TOKENIZER, bin_shard_bytes=20 << 20)
    return folder


@pytest.fixture
def shards_copy(shards, tmp_path):
    """Return the same folder with links to the shards, so that a test may remove one."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


class TestShards:
    def test_shards_and_safetensors_give_the_same(self, options, pico_folders, shards, tmp_path):
        assert len(list(shards.glob("pytorch_model-*.bin"))) > 2
        logits = []
        for version in (pico_folders["sam2"], shards):
            folder = tmp_path / f"out of {version.name}"
            assert run(change(options, version=version, vis_save_path=folder, save_logits=True)) == 0
            logits.append(np.load(folder / "picture_logits.npy"))
        np.testing.assert_allclose(*logits, atol=1e-6)

    def test_missing_shard(self, options, shards_copy):
        gone = sorted(shards_copy.glob("pytorch_model-*.bin"))[1]
        gone.unlink()
        refused(change(options, version=shards_copy), CheckpointError, gone.name, "is missing", "Download it into")

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x.bin"])
    def test_index_that_leaves_its_folder(self, options, shards_copy, name):
        index = shards_copy / "pytorch_model.bin.index.json"
        values = json.loads(index.read_text())
        values["weight_map"][PROJECTOR] = name
        index.unlink()
        index.write_text(json.dumps(values))
        refused(change(options, version=shards_copy), CheckpointError, repr(name), "beside its index")

    def test_index_without_shards(self, options, shards_copy):
        index = shards_copy / "pytorch_model.bin.index.json"
        index.unlink()
        index.write_text("{}")
        refused(change(options, version=shards_copy), CheckpointError, index.name, "names no shards", "Download")


class TestOneImage:
    @pytest.mark.parametrize("family", PICO)
    def test_files_of_one_phrase(self, options, pico_folders, picture, picture_path, out, family):
        whole = change(options, version=pico_folders[family], save_mask=True, save_logits=True)
        assert run(whole) == 0
        assert names(out) == ["picture_logits.npy", "picture_mask.png", "picture_vis.png", "results.json"]
        mask = Image.open(out / "picture_mask.png")
        values = np.array(mask)
        logits = np.load(out / "picture_logits.npy")
        assert (mask.mode, mask.size, set(np.unique(values))) == ("L", (160, 120), {0, 255})
        assert (logits.dtype, logits.shape) == (np.float32, (120, 160))
        np.testing.assert_array_equal(logits > 0, values == 255)
        shown = np.array(Image.open(out / "picture_vis.png"))
        assert shown.shape == picture.shape
        assert (shown != picture).any(axis=-1)[values == 255].mean() > 0.9
        (record,) = results(out)
        assert (record["image"], record["height"], record["width"]) == (str(picture_path), 120, 160)
        (found,) = record["masks"]
        y, x = np.nonzero(values)
        assert found["phrase"] == "the zebra"
        assert found["box"] == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert found["area"] == len(x)
        np.testing.assert_array_equal(decode_rle(found["segmentation"]), values == 255)

    def test_results_are_those_of_the_predictor(self, options, picture, out):
        assert run(change(options, save_logits=True)) == 0
        predictor = load_predictor(options.version, device="cpu")
        predictor.set_image(picture)
        prediction = predictor.predict("the zebra")
        np.testing.assert_allclose(np.load(out / "picture_logits.npy"), prediction.logits[0], atol=1e-5)
        assert results(out)[0]["masks"][0]["score"] == pytest.approx(float(prediction.scores[0]), abs=1e-5)

    def test_only_the_picture_without_further_options(self, options, out):
        assert run(options) == 0
        assert names(out) == ["picture_vis.png", "results.json"]

    def test_several_phrases(self, options, out, tmp_path):
        phrases = ("the zebra", "a dog", "the red car on the left")
        assert run(change(options, prompt=phrases, save_mask=True, save_logits=True)) == 0
        kinds = ("logits.npy", "mask.png", "vis.png")
        expected = [f"picture_{k}_{kind}" for k in range(3) for kind in kinds]
        assert names(out) == sorted([*expected, "picture_vis.png", "results.json"])
        masks = results(out)[0]["masks"]
        assert [mask["phrase"] for mask in masks] == list(phrases)
        for k, mask in enumerate(masks):
            saved = np.array(Image.open(out / f"picture_{k}_mask.png")) == 255
            np.testing.assert_array_equal(decode_rle(mask["segmentation"]), saved)
        assert Image.open(out / "picture_vis.png").height > Image.open(out / "picture_0_vis.png").height == 120
        alone = tmp_path / "alone"
        assert run(change(options, prompt=phrases[1:2], save_logits=True, vis_save_path=alone)) == 0
        np.testing.assert_allclose(
            np.load(out / "picture_1_logits.npy"), np.load(alone / "picture_logits.npy"), atol=1e-4
        )

    def test_semantic_prefix(self, options, tmp_path):
        logits = {}
        for name, phrase, semantic in [
            ("plain", "sky", False),
            ("flag", "sky", True),
            ("text", "[semantic] sky", False),
        ]:
            folder = tmp_path / name
            assert (
                run(change(options, prompt=(phrase,), semantic=semantic, vis_save_path=folder, save_logits=True)) == 0
            )
            logits[name] = np.load(folder / "picture_logits.npy")
            assert results(folder)[0]["masks"][0]["phrase"] == phrase
        np.testing.assert_array_equal(logits["flag"], logits["text"])
        assert np.abs(logits["flag"] - logits["plain"]).max() > 0

    def test_phrase_that_is_too_long_is_cut(self, options, caplog, out, tmp_path):
        cut = change(options, prompt=("dog " * 80,), model_max_length=5, truncate=True, save_logits=True)
        assert run(cut) == 0
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warnings
        assert all("82 tokens cut to 5" in text for text in warnings)
        whole = tmp_path / "whole"
        assert run(change(options, prompt=("dog dog dog",), save_logits=True, vis_save_path=whole)) == 0
        np.testing.assert_array_equal(np.load(out / "picture_logits.npy"), np.load(whole / "picture_logits.npy"))

    def test_fitting_model_type_is_accepted(self, options, pico_folders):
        for family, model_type in {"sam": "ori", "sam2": "sam2", "efficient_sam": "effi"}.items():
            assert run(change(options, version=pico_folders[family], model_type=model_type)) == 0

    @pytest.mark.parametrize("phrase", ["a\ndog", "chien élancé 狗", "a\u2028dog", "../../up"])
    def test_phrase_comes_back_as_it_was(self, options, out, phrase):
        assert run(change(options, prompt=(phrase,))) == 0
        assert results(out)[0]["masks"][0]["phrase"] == phrase
        assert names(out) == ["picture_vis.png", "results.json"]


class TestManyImages:
    def test_folder(self, options, images, out):
        (images / "notes.txt").write_text("not an image by its name")
        assert run(change(options, image_path=images)) == 0
        assert [record["stem"] for record in results(out)] == [f"image{k}" for k in range(5)]
        assert names(out) == [*(f"image{k}_vis.png" for k in range(5)), "results.json"]

    def test_unreadable_file_is_reported_and_passed_over(self, options, images, out, capfd):
        (images / "image2.png").write_text("just text")
        assert run(change(options, image_path=images)) == 1
        assert [record["stem"] for record in results(out)] == ["image0", "image1", "image3", "image4"]
        written = capfd.readouterr().err
        assert "1 of 5 images could not be used" in written
        assert "image2.png is not an image" in written

    def test_folder_of_one_unreadable_file_is_an_error(self, options, tmp_path):
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "a.png").write_text("just text")
        refused(change(options, image_path=tmp_path / "one"), ImageError, "a.png is not an image")

    def test_pattern(self, options, images, picture, out):
        (images / "deep" / "er").mkdir(parents=True)
        Image.fromarray(picture).save(images / "deep" / "er" / "other.jpg")
        assert run(change(options, image_path=images / "image[12].png")) == 0
        assert [record["stem"] for record in results(out)] == ["image1", "image2"]
        assert run(change(options, image_path=images / "**" / "*.jpg")) == 0
        assert {record["stem"] for record in results(out)} == {"image1", "image2", "other"}

    def test_name_that_looks_like_a_pattern(self, options, picture, tmp_path, out):
        Image.fromarray(picture).save(tmp_path / "a[1].png")
        assert run(change(options, image_path=tmp_path / "a[1].png")) == 0
        assert names(out) == ["a[1]_vis.png", "results.json"]

    def test_same_stem_gets_different_outputs(self, options, images, picture, out):
        Image.fromarray(picture[::-1]).save(images / "image1.jpg")
        assert run(change(options, image_path=images, save_mask=True)) == 0
        stems = [record["stem"] for record in results(out)]
        assert len(set(stems)) == 6
        assert {"image0", "images_image1_png", "images_image1_jpg"} <= set(stems)
        for record in results(out):
            saved = np.array(Image.open(out / f"{record['stem']}_mask.png")) == 255
            np.testing.assert_array_equal(decode_rle(record["masks"][0]["segmentation"]), saved)

    def test_file_name_that_is_not_unicode(self, options, picture, tmp_path, out):
        path = tmp_path / "caf\udce9.png"
        try:
            Image.fromarray(picture).save(path)
        except OSError:
            pytest.skip("this file system takes Unicode names only")
        assert run(change(options, image_path=path)) == 0
        assert results(out)[0]["image"] == str(path)


class TestAgain:
    """Runs after a finished or stopped one."""

    def test_what_is_done_is_passed_over(self, options, images, out, monkeypatch, caplog):
        caplog.set_level("INFO")
        whole = change(options, image_path=images)
        assert run(whole) == 0
        before = tree_times(out)
        monkeypatch.setattr(image_runner, "load", fail_to_load)
        assert run(whole) == 0
        assert tree_times(out) == before
        assert "5 images were already done" in caplog.text

    def test_only_new_images_are_done(self, options, images, picture, out):
        whole = change(options, image_path=images)
        assert run(whole) == 0
        before = tree_times(out)
        Image.fromarray(picture).save(images / "new.png")
        assert run(whole) == 0
        after = tree_times(out)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {"new_vis.png", "results.json"}
        assert len(results(out)) == 6

    @pytest.mark.parametrize(
        "values",
        [
            {"prompt": ("a dog",)},
            {"prompt": ("the zebra", "a dog")},
            {"semantic": True},
            {"precision": "bf16"},
            {"save_mask": True},
            {"overwrite": True},
        ],
        ids=lambda values: next(iter(values)),
    )
    def test_other_options_do_it_again(self, options, images, out, values):
        whole = change(options, image_path=images)
        assert run(whole) == 0
        before = tree_times(out)
        again = change(whole, **values)
        assert run(again) == 0
        after = tree_times(out)
        assert all(after[name] != before[name] for name in before)
        assert [[mask["phrase"] for mask in record["masks"]] for record in results(out)] == [list(again.prompt)] * 5

    def test_lost_file_is_written_again(self, options, images, out):
        whole = change(options, image_path=images)
        assert run(whole) == 0
        before = tree_times(out)
        (out / "image3_vis.png").unlink()
        assert run(whole) == 0
        after = tree_times(out)
        assert {name for name in after if after[name] != before[name]} == {"image3_vis.png", "results.json"}

    def test_changed_files_are_done_again(self, options, images, picture, pico_folder, out):
        """Another image under the same name, and other weights in the same folder, are not what was done."""
        whole = change(options, image_path=images, version=pico_folder)
        assert run(whole) == 0
        before = tree_times(out)
        Image.fromarray(picture[::-1]).save(images / "image3.png")
        assert run(whole) == 0
        changed = {name for name, time in tree_times(out).items() if time != before[name]}
        assert changed == {"image3_vis.png", "results.json"}
        before = tree_times(out)
        weights = pico_folder / "model.safetensors"
        os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
        assert run(whole) == 0
        assert all(time != before[name] for name, time in tree_times(out).items())

    def test_another_checkpoint_does_it_again(self, options, pico_folders, out):
        assert run(options) == 0
        first = results(out)
        assert run(change(options, version=pico_folders["sam"])) == 0
        assert results(out) != first

    @pytest.mark.parametrize("cut", ["", '{"image": "', "half a caf\u00e9".encode()[:-1]], ids=["clean", "cut", "byte"])
    def test_stopped_run_goes_on(self, options, images, out, monkeypatch, cut):
        whole = change(options, image_path=images)
        write = image_runner.Writer.write

        def stop_at_the_fourth(args, job, *rest):
            if job.stem == "image3":
                raise KeyboardInterrupt
            return write(args, job, *rest)

        monkeypatch.setattr(image_runner.Writer, "write", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            run(whole)
        assert not (out / "results.json").exists()
        with (out / "results.rank0.jsonl").open("ab") as file:
            file.write(cut if isinstance(cut, bytes) else cut.encode())
        before = tree_times(out)
        monkeypatch.setattr(image_runner.Writer, "write", write)
        assert run(whole) == 0
        after = tree_times(out)
        assert all(after[f"image{k}_vis.png"] == before[f"image{k}_vis.png"] for k in range(3))
        assert [record["stem"] for record in results(out)] == [f"image{k}" for k in range(5)]
        assert names(out) == [*(f"image{k}_vis.png" for k in range(5)), "results.json"]

    def test_stopped_run_with_other_options_does_not_win(self, options, images, out):
        """What a stopped run of two processes left must not replace what one process wrote after it."""
        first = change(options, image_path=images)
        assert run(first) == 0
        records = results(out)
        (out / "results.json").unlink()
        with (out / "results.rank1.jsonl").open("w") as file:
            file.writelines(json.dumps({**record, "written": 1.0}) + "\n" for record in records)
        assert run(change(first, prompt=("a dog",))) == 0
        assert [record["masks"][0]["phrase"] for record in results(out)] == ["a dog"] * 5
        assert all("written" not in record for record in results(out))

    def test_same_files_from_another_image(self, options, picture, tmp_path, out):
        """An image of the same name from elsewhere takes the files over; the first is then no longer done."""
        for k, name in enumerate(("first", "second")):
            (tmp_path / name).mkdir()
            Image.fromarray(np.roll(picture, 40 * k, axis=1)).save(tmp_path / name / "a.png")
        first, second = (change(options, image_path=tmp_path / name / "a.png") for name in ("first", "second"))
        assert run(first) == run(second) == 0
        assert [record["image"] for record in results(out)] == [second.image_path]
        shown = (out / "a_vis.png").read_bytes()
        assert run(first) == 0
        assert [record["image"] for record in results(out)] == [first.image_path]
        assert (out / "a_vis.png").read_bytes() != shown

    def test_failed_images_are_tried_again(self, options, images, picture, out):
        (images / "image2.png").write_text("just text")
        whole = change(options, image_path=images)
        assert run(whole) == 1
        Image.fromarray(picture).save(images / "image2.png")
        assert run(whole) == 0
        assert len(results(out)) == 5
