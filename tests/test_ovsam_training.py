"""Training of Open-Vocabulary SAM: what it starts from, dumped features, what is drawn, the step, and train.py."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import datasets.named
from configs.nested import from_values
from configs.training import LossArgs, OptimArgs, TrainConfig
from datasets.images import ImageCollate, ImageFolder
from datasets.named import NamedCollate, View, draw_pixels, open_named_stream
from model.checkpoints.evf_sam import SEGMENTERS
from model.checkpoints.load import build_model, load_model, save_model
from model.checkpoints.rules import KeyMap, Section, named_tensors
from model.distill_step import DistillStep, Teacher, take_decoder
from model.losses import losses_at, name_losses
from model.name_step import NameStep, named_inputs, prepare_named_step
from model.named_predictor import load_open_vocabulary
from model.ovsam_start import set_positions, sine_table, take_clip
from model.recognizers.open_vocabulary import name_logits
from model.registry import model_config
from model.training import optimizer_groups
from model.vocabulary import read_vocabulary
from tests.conftest import ROOT, make_picture
from tests.instance_layouts import write_lvis
from tests.ovsam_layouts import COLOURS, PICO, ovsam, write_clip, write_scenes, write_vocabulary
from tests.train_command import curve, records, train, train_processes
from tools import assemble_ovsam, dump_features
from utils.errors import CheckpointError, DataError, ModelError, TrainingError, VocabularyError
from utils.feature_cache import FlatFeatures
from utils.image import ImageSpec, read_image
from utils.known_names import read_known_names
from utils.run_folder import RunFolder
from utils.trainer import Schedule

BASE = {"is_base": [True, True, False], "is_novel": [False, False, True]}


def segmenter(name, seed=0):
    torch.manual_seed(seed)
    return build_model(model_config(name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with scenes, their annotations, CLIP, a teacher and a vocabulary in which dogs are novel."""
    root = tmp_path_factory.mktemp("data")
    write_scenes(root)
    write_clip(root / "clip.pt")
    write_vocabulary(root / "v.safetensors", **BASE)
    save_model(segmenter("sam-vit-pico", 3), root / "teacher")
    return root


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """Return a folder that stands for the result of the first stage."""
    folder = tmp_path_factory.mktemp("start")
    model = ovsam()
    set_positions(model, None)
    save_model(model, folder)
    return folder


def config(data, /, **changes):
    values = {
        "model": {"checkpoint": "x"},
        "data": {"root": str(data), "sets": ["scenes.json"], "workers": 0, "batch_size": 2, "held_out": 0.0},
        "names": {"vocabulary": str(data / "v.safetensors"), "images": "scenes", "proposals": 8},
        "loss": {"names": 2, "points": 256},
    }
    for group, change in changes.items():
        values[group] = values.get(group, {}) | change
    return from_values(TrainConfig, values, "test")


# what it starts from


def test_clip_is_taken_and_the_rest_stays(data, tmp_path):
    model, clip = ovsam(1), torch.load(data / "clip.pt")
    before = {name: tensor.clone() for name, tensor in model.segmenter.state_dict().items()}
    text = take_clip(model, data / "clip.pt")
    assert text and all(torch.equal(tensor, clip[name]) for name, tensor in text.items())
    for name, tensor in model.segmenter.state_dict().items():
        expected = clip[name.replace("backbone.", "visual.")] if name.startswith("backbone.") else before[name]
        assert torch.equal(tensor, expected), name
    lacking = {name: tensor for name, tensor in clip.items() if name != "visual.layer3.0.conv1.weight"}
    for content, words in (
        (lacking, r"CLIP ResNet: backbone\.layer3\.0\.conv1\.weight"),
        ({"neck_student.x": torch.ones(1)}, r"no CLIP with its image tower \(it holds neck\)"),
        ({name: tensor for name, tensor in clip.items() if "visual" not in name}, "it holds none"),
    ):
        torch.save(content, tmp_path / "clip.pt")
        with pytest.raises(CheckpointError, match=words):
            take_clip(model, tmp_path / "clip.pt")


def test_of_sam_the_first_mask_is_taken():
    student, teacher = ovsam(), segmenter("sam-vit-pico", 1)
    before = {name: tensor.clone() for name, tensor in student.segmenter.state_dict().items()}
    assert take_decoder(student, teacher)
    theirs = teacher.segmenter.state_dict()
    for name, tensor in student.segmenter.state_dict().items():
        stays = not name.startswith(("prompt_encoder.", "mask_decoder.")) or name.startswith("mask_decoder.iou_")
        assert torch.equal(tensor, before[name] if stays else theirs[name][: len(tensor)]), name
    other = segmenter("sam2-hiera-pico")
    assert take_decoder(student, other)
    theirs = other.segmenter.sam2.mask_decoder
    for part in ("mask_tokens", "upscale_conv1"):
        own = getattr(student.segmenter.mask_decoder, part).weight
        assert torch.equal(own, getattr(theirs, part).weight[: len(own)]), part


def test_places_are_sams_or_sines():
    student, teacher = ovsam(), segmenter("sam-vit-pico", 1)
    set_positions(student, teacher)  # whose table has another shape
    table = student.segmenter.neck.positions
    assert torch.equal(table, sine_table(16, 64)) and len(table.flatten(0, 2).unique(dim=0)) == 256
    shape = (1, 4, 4, 6)
    teacher.segmenter.image_encoder.pos_embed = torch.nn.Parameter(torch.randn(shape))
    other = ovsam()
    other.segmenter.neck.positions = torch.zeros(shape)
    set_positions(other, teacher)
    assert torch.equal(other.segmenter.neck.positions, teacher.segmenter.image_encoder.pos_embed)
    kept = other.segmenter.neck.positions.clone()
    set_positions(other, None)  # a trained neck knows its own
    assert torch.equal(other.segmenter.neck.positions, kept)
    assert sine_table(3, 7).shape == (1, 3, 3, 7)


def test_the_second_stage_starts_from_published_files(data, tmp_path, monkeypatch):
    neck, sam = ovsam(5), segmenter("sam-vit-pico", 6)
    set_positions(neck, None)

    def published(segmenter, family, path, starts):
        tensors = {f"segmenter.{name}": tensor for name, tensor in named_tensors(segmenter).items()}
        names = KeyMap(tensors, (Section("segmenter.", "", SEGMENTERS[family].plain),)).theirs
        torch.save({theirs[0]: tensors[n] for n, theirs in names.items() if theirs[0].startswith(starts)}, path)
        return path

    def assemble(*files):
        monkeypatch.setattr(
            sys, "argv", ["tool", *map(str, files), "--output", str(tmp_path / "out"), "--for_training"]
        )
        return assemble_ovsam.main()

    files = [
        data / "clip.pt",
        published(neck.segmenter, "ovsam", tmp_path / "sam2clip.pth", "neck."),
        published(sam.segmenter, "sam", tmp_path / "sam.pth", ""),
    ]
    with pytest.raises(CheckpointError, match=r"is missing: SAM2CLIP neck, in sam2clip_\*\.pth\. Add"):
        assemble(files[0], files[2])
    assert assemble(*files) == 0
    found, clip = load_model(tmp_path / "out").segmenter.state_dict(), torch.load(data / "clip.pt")
    for name, tensor in found.items():
        part, theirs = name.split(".")[0], None
        if part == "backbone":
            theirs = clip[name.replace("backbone.", "visual.")]
        elif part == "neck":
            theirs = neck.segmenter.state_dict()[name]
        elif part in ("prompt_encoder", "mask_decoder") and not name.startswith("mask_decoder.iou_"):
            theirs = sam.segmenter.state_dict()[name][: len(tensor)]
        assert theirs is None or torch.equal(tensor, theirs), name
    out = tmp_path / "run"
    assert train(*second_stage(data, tmp_path / "out", out, "--val.max_images", 1, "--optim.drops", 1, steps=1)) == 0
    assert (out / "best" / "text.safetensors").is_file()


# dumped features


def test_a_published_dump_is_read_unchanged(data, tmp_path):
    """A bare tensor, in a flat folder, by the name of the image; the loss is the mean over all of it."""
    spec = ovsam().segmenter.own_image_spec
    target = torch.randn(256, 16, 16)
    torch.save(target, tmp_path / "0_vit_h_cache.pth")
    teacher = Teacher(None, spec, "fp32", FlatFeatures(tmp_path, is_complete=True))
    folder = ImageFolder("scenes", data / "scenes")
    collate = ImageCollate(spec, teacher.spec, teacher.cache)
    batch = collate([folder.load(0)])
    step = DistillStep(ovsam())
    losses = step(*teacher(batch))
    with torch.no_grad():
        expected = F.mse_loss(step.model.segmenter.encode_image(batch.pixels).embedding[0], target)
    assert losses[0, 0].item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(TrainingError, match=r"no such embedding: .*1_vit_h_cache\.pth"):
        collate([folder.load(1)])
    torch.save(torch.randn(256, 8, 16), tmp_path / "1_vit_h_cache.pth")
    with pytest.raises(TrainingError, match=r"0\.png is \[256, 16, 16\], that of .*1\.png \[256, 8, 16\]"):
        teacher.targets(collate([folder.load(0), folder.load(1)]))


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Evil(), "no file of torch.save with a tensor alone"),
        ({"embedding": torch.ones(1)}, "is no embedding"),
        (torch.ones(256, 4), "is no embedding"),
        (torch.ones(1 << 24, 1, 1), "over 64 MB"),
    ],
)
def test_files_that_are_no_embedding(content, text, tmp_path, capsys):
    torch.save(content, tmp_path / "a_vit_h_cache.pth")
    with pytest.raises(TrainingError, match=text):
        FlatFeatures(tmp_path).read("a")
    assert "code was run" not in capsys.readouterr().out


def test_a_dump_is_what_the_teacher_says(data, tmp_path, monkeypatch):
    def dump(*folders):
        command = ["--teacher", data / "teacher", "--images", *folders, "--output", tmp_path / "out", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, command), "--batch_size", "4"])
        return dump_features.main()

    assert dump(data / "scenes") == 0
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [f"{n}_vit_h_cache.pth" for n in range(6)]
    teacher = Teacher(load_model(data / "teacher"), ImageSpec(256, "letterbox"), "fp32")
    found = torch.load(tmp_path / "out" / files[2], weights_only=True)
    alone = teacher.embed(teacher.spec(read_image(data / "scenes" / "2.png"))[None])[0]
    assert found.dtype == torch.float32 and torch.allclose(found, alone, atol=1e-4)
    torch.save(found * 0, tmp_path / "out" / files[2])
    assert dump(data / "scenes") == 0  # what is there is kept
    assert not torch.load(tmp_path / "out" / files[2], weights_only=True).any()
    teacher.cache = FlatFeatures(tmp_path / "trained")
    batch = ImageCollate(teacher.spec, teacher.spec, teacher.cache)([ImageFolder("s", data / "scenes").load(2)])
    with torch.autocast("cpu", torch.bfloat16):  # as in a training: the file is in float32 all the same
        assert torch.allclose(teacher.targets(batch)[0], found, atol=1e-4)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "2.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"there are .*2\.png and .*2\.jpg"):
        dump(data / "scenes", tmp_path / "more")


# what is drawn


@pytest.mark.parametrize("at_once", [datasets.named.AT_ONCE, 1])
def test_a_cut_shows_the_same_of_image_and_masks(at_once, monkeypatch):
    monkeypatch.setattr(datasets.named, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 80, 120), np.uint8)
    masks[0, 20:50, 30:90], masks[1, 5:15, 100:115], masks[2, 0, 0] = 1, 1, 1
    image = np.where(masks[0, ..., None] > 0, 255, 0).astype(np.uint8).repeat(3, axis=2)
    for drawn in [(0.5, 0.3, 0.9), (2.0, 1.0, 0.0), *rng.uniform((0.1, 0, 0), (2, 1, 1), (20, 3))]:
        view = View.of((80, 120), 64, drawn)
        shown, cut = view.image(image), view.masks(masks)
        assert shown.shape[:2] == cut.shape[1:] and max(cut.shape[1:]) <= 64
        assert np.array_equal(view.count(masks), cut.sum((1, 2)))
        edge = (shown[..., 0] > 127) != (cut[0] > 0)
        assert edge.sum() <= sum(cut.shape[1:])  # the two differ by rounding on the outline alone
    whole = View.of((80, 120), 64, (1.0, 0.5, 0.5))
    assert whole.size == (43, 64) and (whole.top, whole.left) == (0, 0)


def test_pixels_are_drawn_from_each_mask():
    masks = np.zeros((3, 6, 9), np.uint8)
    masks[0, 2:4, 3:8], masks[1, 5, 1], masks[2, 0, :] = 1, 1, 1
    chosen = np.random.default_rng(0).integers(0, 3, 3000)
    drawn = draw_pixels(masks, chosen, np.random.default_rng(1).random(3000)).astype(int)
    assert all(masks[which, y, x] for which, (x, y) in zip(chosen, drawn, strict=True))
    counts = np.bincount(drawn[chosen == 0] @ [1, 9], minlength=54)
    assert (counts > 0).sum() == 10 and counts.max() < 1.4 * counts[counts > 0].min()


def batch_of(data, positions=(0, 1), /, **changes):
    asked = config(data, **changes)
    stream = open_named_stream(asked)
    spec = model_config(PICO).segmenter.image_size
    collate = NamedCollate(ImageSpec(spec, "letterbox", "cv2-linear"), asked.names.proposals, asked.names.least_pixels)
    return stream, collate([stream[position] for position in positions])


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_prompts_lie_on_what_they_name(data, flip):
    """The colour below a point, and below all of a mask, is that of its name; boxes come first."""
    _, batch = batch_of(data, range(6), data={"flip": flip})
    assert batch.by_box.view(6, 8).tolist() == [[True] * 5 + [False] * 3] * 6
    assert batch.pixels.shape == (6, 3, 256, 256)
    spec, reds = ImageSpec(256), {COLOURS[name]: name for name in COLOURS}
    mean, std = (torch.tensor(value)[:, None] for value in (spec.mean, spec.std))
    for n, image in enumerate(batch.image_index):
        mask, (x, y) = batch.masks[batch.mask_index[n]] > 0, batch.points[n].long()
        assert mask[y, x]
        inside = (batch.pixels[image][:, mask] * std + mean).round().median(1).values
        assert reds[tuple(int(value) for value in inside)] == batch.phrases[n].split(",")[0]
        ys, xs = mask.nonzero().T
        assert batch.boxes[n].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert ("car", "kite, toy").index(batch.phrases[n]) == batch.labels[n]
    assert batch.phrases.count("kite, toy") > 0


def test_novel_things_crowds_and_empty_images_are_not_there(data, tmp_path):
    stream, _ = batch_of(data)
    assert stream.pass_length == 4  # two of six scenes have a dog alone
    assert set(stream[0].item.labels) <= {0, 1}
    write_vocabulary(tmp_path / "v.safetensors")  # every name may be learned
    all_names = {"names": {"vocabulary": str(tmp_path / "v.safetensors")}}
    assert batch_of(data, **all_names)[0].pass_length == 6
    write_scenes(tmp_path, crowd=True)
    with pytest.raises(DataError, match="has no instance of the 2 names"):
        batch_of(data, data={"root": str(tmp_path)})


def test_lvis_names_its_images_and_rare_classes(tmp_path):
    """Images by `coco_url` below one folder; a vocabulary made of the file counts rare classes as novel."""
    path, _ = write_lvis(tmp_path)
    write_vocabulary(tmp_path / "v.safetensors", ("car", "kite"), is_base=[True, False], is_novel=[False, True])
    asked = config(
        tmp_path,
        data={"sets": [path.name], "held_out": 0.4},
        names={"kind": "lvis", "images": "", "vocabulary": str(tmp_path / "v.safetensors"), "resize": [0.1, 2.0]},
    )
    stream = open_named_stream(asked)
    assert stream.pass_length == 2 and len(stream.measured[0]) == 1
    assert {name for i in range(2) for name in stream[i].item.names} == {"car"}
    collate = NamedCollate(ImageSpec(64, "letterbox", "cv2-linear"), 8, 4)
    assert collate([stream[0], stream[1]]).masks.any()
    batch = collate.measuring([stream.measured[0].load(0)])
    assert batch.boxes.shape == (len(batch.masks[0]), 4) and batch.labels.tolist() == [0] * len(batch.boxes)
    centred = replace(collate, measured_by="point").measuring([stream.measured[0].load(0)])
    height, width = batch.sizes[0]
    places = (centred.points * max(height, width) / 64).long()
    assert all(mask[y, x] for mask, (x, y) in zip(batch.masks[0], places, strict=True))


def test_instances_that_are_too_small_are_left_out(data):
    stream, _ = batch_of(data)
    collate = NamedCollate(ImageSpec(256, "letterbox", "cv2-linear"), 8, 32)
    sample = next(stream[i] for i in range(4) if len(stream[i].item.labels) > 1)
    masks = np.zeros_like(sample.item.masks)
    masks[0, 10:40, 10:40] = 1
    masks[1, 0, 0] = 1
    item = replace(sample.item, masks=masks)
    drawn = replace(sample, item=item, views=np.array([[2.0, 1.0, 1.0]]))  # which shows the corner without either
    batch = collate([drawn])
    assert len(batch.masks) == 2  # so the whole image counts, with all that has a pixel
    batch = collate([replace(drawn, views=np.array([[1.0, 0.0, 0.0]]))])
    assert len(batch.masks) == 1 and set(batch.phrases) == {item.names[0]}
    with pytest.raises(DataError, match="none of its 2 annotations has a pixel"):
        collate([replace(drawn, item=replace(item, masks=masks * 0))])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("car", "kite", "cat"), r"disagree: 'dog', a category of .*scenes\.json, is not in the vocab"),
        (("car", "kite, a", "kite, b", "dog"), "is the first wording of several names"),
        (("cars", "kite", "dog"), "Did you mean 'cars'"),
    ],
)
def test_classes_and_annotations_that_disagree(names, text, data, tmp_path):
    vocabulary = write_vocabulary(tmp_path / "v.safetensors", names)
    with pytest.raises(VocabularyError, match=text):
        batch_of(data, names={"vocabulary": str(vocabulary)})


def test_files_that_cannot_be_used(data, tmp_path):
    (tmp_path / "v.pth").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901")
    for name, text in (
        ("none.safetensors", "no such vocabulary"),
        ("v.pth", "--published"),
        ("broken.safetensors", "damaged"),
    ):
        with pytest.raises(VocabularyError, match=text):
            read_known_names(tmp_path / name)
    save_model(ovsam(), tmp_path / "model")
    with pytest.raises(VocabularyError, match="no names"):
        read_known_names(tmp_path / "model" / "model.safetensors")
    (tmp_path / "notes.json").write_text(json.dumps([{"caption": "a dog"}]))
    (tmp_path / "captions.json").write_text(json.dumps({"images": [{}], "captions": ["a dog"]}))
    for name, text in (("none.json", "none.json"), ("notes.json", "notes.json"), ("captions.json", "no annotations")):
        with pytest.raises(DataError, match=text):
            batch_of(data, data={"root": str(tmp_path), "sets": [name]})


# the step


def named_step(points=256, vocabulary=None):
    model = ovsam()
    prepare_named_step(model)
    return NameStep(model, vocabulary, points)


@pytest.fixture(scope="module")
def vocabulary(data):
    return read_vocabulary(data / "v.safetensors")


def test_what_is_trained_gets_a_gradient_whatever_is_shown(data, vocabulary):
    """Processes whose boxes are of one level of the pyramid meet others: none may wait for a gradient."""
    step = named_step(vocabulary=vocabulary)
    _, batch = batch_of(data)
    losses = step(*named_inputs(batch))
    assert losses.shape == (16, 3) and losses.isfinite().all()
    losses.sum().backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name.split(".")[2] for name, p in step.named_parameters() if p.requires_grad}
    assert trained == {"mask_decoder", "pyramid", "region_conv"}
    assert not any("iou_prediction_head" in name for name, p in step.named_parameters() if p.requires_grad)
    assert step.get_parameter("model.segmenter.region_conv.weight").grad.any()
    assert step.get_parameter("model.segmenter.mask_decoder.iou_token.weight").grad.any()
    assert "vectors" not in step.state_dict()


def test_all_images_together_are_what_they_are_alone(data, vocabulary):
    step = named_step(vocabulary=vocabulary)
    with torch.no_grad():
        together = step(*named_inputs(batch_of(data)[1]))
        alone = [step(*named_inputs(batch_of(data, (i,))[1])) for i in (0, 1)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-3)


def test_boxes_and_points_go_together(data, vocabulary):
    """In one call of the decoder, each prompt as if it were alone."""
    step = named_step(vocabulary=vocabulary)
    _, batch = batch_of(data)
    calls = []
    step.model.segmenter.mask_decoder.transformer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        logits, _ = step.predict(batch.pixels, batch.boxes, batch.points, batch.by_box, batch.image_index)
        assert len(calls) == 1
        features = step.encode(batch.pixels)
        boxed = step.decode(features, batch.boxes, None, batch.image_index).logits
        pointed = step.decode(features, None, batch.points, batch.image_index).logits
    assert torch.allclose(logits[batch.by_box], boxed[batch.by_box], atol=1e-5)
    assert torch.allclose(logits[~batch.by_box], pointed[~batch.by_box], atol=1e-5)
    assert not torch.allclose(boxed, pointed, atol=1e-3)


def test_names_are_compared_in_float32_whatever_the_precision(data, vocabulary):
    step = named_step(vocabulary=vocabulary)
    inputs = named_inputs(batch_of(data, (0,))[1])
    with torch.no_grad():
        exact, seen = step(*inputs), torch.rand(3, 48)
        logits = name_logits(seen, step.vectors)
        with torch.autocast("cpu", torch.bfloat16):
            rough = step(*inputs)
            assert torch.equal(name_logits(seen, step.vectors), logits)
    assert rough.dtype == torch.float32 and torch.allclose(rough, exact, atol=0.5)


def test_losses_by_hand():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6), torch.tensor([0, 5, -1, 3])
    by_hand = -logits.log_softmax(1)
    expected = [by_hand[0, 0], 0.1 * by_hand[1, 5], torch.zeros(()), by_hand[3, 3]]
    assert torch.allclose(name_losses(logits, labels), torch.stack(expected))
    masks = torch.zeros(2, 8, 8)
    masks[0, :4], masks[1, :, 2:] = 1, 1
    found = torch.randn(2, 1, 8, 8)
    centres = (torch.tensor([[1, 2], [5, 0], [7, 7]]) + 0.5) / 8  # x y, of pixels: nothing is interpolated
    losses = losses_at(found, masks, centres.expand(2, 1, 3, 2))[:, 0]
    for n in range(2):
        values = torch.stack([found[n, 0, y, x] for x, y in ((1, 2), (5, 0), (7, 7))])
        truth = torch.stack([masks[n, y, x] for x, y in ((1, 2), (5, 0), (7, 7))])
        chance = values.sigmoid()
        assert losses[n, 0].item() == pytest.approx(F.binary_cross_entropy(chance, truth).item(), rel=1e-5)
        dice = 1 - (2 * (chance * truth).sum() + 1) / (chance.sum() + truth.sum() + 1)
        assert losses[n, 1].item() == pytest.approx(dice.item(), rel=1e-5)


def test_it_can_be_learned(data, vocabulary):
    step = named_step(vocabulary=vocabulary)
    inputs = named_inputs(batch_of(data, (0,), names={"resize": [1.0, 1.0]})[1])
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        losses = step(*inputs).mean(0)
        (losses @ torch.tensor([5.0, 5.0, 2.0])).backward()
        optimizer.step()
        found.append(losses.detach())
    first, last = torch.stack(found[:2]).mean(0), torch.stack(found[-2:]).mean(0)
    assert last[2] < 0.2 * first[2] and last[0] < 0.9 * first[0]


def test_what_decays_goes_by_the_kind_of_layer(vocabulary):
    """SAM's norm over channels is none of torch's own: it decays, as published."""
    step = named_step(vocabulary=vocabulary)
    groups = optimizer_groups(step, OptimArgs(weight_decay=0.05, decay="layers"))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    decoder = step.model.segmenter.mask_decoder
    assert decays[id(decoder.upscale_layer_norm.weight)] == 0.05
    assert decays[id(decoder.upscale_conv1.bias)] == 0.05
    assert decays[id(decoder.transformer.layers[0].layer_norm1.weight)] == 0
    assert decays[id(decoder.iou_token.weight)] == 0.05


def test_schedules():
    drops = Schedule("drops", 4, 100, (50, 80))
    assert [drops.factor(step) for step in (0, 4, 49, 50, 80)] == pytest.approx([0.2, 1, 1, 0.1, 0.01])
    cosine = Schedule("cosine", 0, 100, final=0.01)
    assert [cosine.factor(step) for step in (0, 50, 100)] == pytest.approx([1, 0.505, 0.01])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"distill": {"teacher": "x"}}, "ask for different trainings"),
        ({"loss": {"iou": 1}}, r"loss\.iou: names know bce, dice, names alone"),
        ({"loss": {"points": 0}}, r"loss\.points 0: names need"),
        ({"data": {"feature_cache": "x"}}, r"data\.feature_cache"),
        ({"data": {"sampling": "shuffle"}}, r"data\.sampling: not read where names\.vocabulary"),
        (
            {"model": {"checkpoint": None, "clip_checkpoint": "x"}},
            r"model\.clip_checkpoint is read in the distillation",
        ),
        ({"names": {"proposals": 0}}, r"names\.proposals 0"),
        ({"names": {"resize": [2, 1]}}, r"names\.resize"),
        ({"names": {"vocabulary": None}}, r"loss\.names needs names\.vocabulary"),
        ({"optim": {"drops": [5]}}, "each needs the other"),
        ({"optim": {"schedule": "drops"}}, "each needs the other"),
        ({"optim": {"final": 2}}, r"optim\.final 2"),
    ],
)
def test_options_that_do_not_fit(change, text, data):
    with pytest.raises(TrainingError, match=text):
        config(data, **change)


def test_dumps_know_images_by_name():
    values = {"distill": {"features": "x", "teacher": "y"}}
    with pytest.raises(TrainingError, match="knows images by name"):
        from_values(TrainConfig, values | {"data": {"flip": 0.5}}, "f.yaml")
    with pytest.raises(TrainingError, match=r"--distill\.no_take_decoder"):
        from_values(TrainConfig, {"distill": {"features": "x"}}, "f.yaml")
    assert from_values(TrainConfig, values, "f.yaml").kind == "distill"
    assert LossArgs(names=2).terms()["names"] == 2


# train.py


def first_stage(data, out, *more, steps=4):
    return [
        "--model.name", PICO, "--model.clip_checkpoint", data / "clip.pt", "--distill.teacher", data / "teacher",
        "--data.root", data, "--data.sets", "scenes", "--data.held_out", "0.2", "--data.workers", 0,
        "--optim.global_batch", 2, "--optim.steps", steps, "--optim.lr", "3e-3", "--optim.warmup", 1,
        "--optim.decay", "layers", "--optim.schedule", "constant", "--optim.clip", 5, "--run.out", out,
        "--run.log_every", 1, "--run.device", "cpu", *more,
    ]  # fmt: skip


def second_stage(data, start, out, *more, batch=1, steps=4):
    return [
        "--model.checkpoint", start, "--names.vocabulary", data / "v.safetensors", "--names.images", "scenes",
        "--names.proposals", 4, "--data.root", data, "--data.sets", "scenes.json", "--val.sets", "scenes.json",
        "--data.workers", 0, "--data.batch_size", batch, "--data.flip", "0.5", "--loss.bce", 5, "--loss.dice", 5,
        "--loss.names", 2, "--loss.points", 256, "--optim.global_batch", 2, "--optim.steps", steps,
        "--optim.lr", "1e-3", "--optim.warmup", 0, "--optim.clip", "0.01", "--optim.schedule", "drops",
        "--optim.drops", 3, "--optim.weight_decay", "0.05", "--optim.decay", "layers",
        "--run.out", out, "--run.log_every", 1, "--run.device", "cpu", "--val.every", 2, *more,
    ]  # fmt: skip


def test_both_stages_and_a_model_that_names(data, tmp_path):
    """From CLIP and SAM to clicks with names; words need CLIP's text tower, which went along."""
    neck, named = tmp_path / "neck", tmp_path / "named"
    features = ["--distill.features", tmp_path / "features"]
    assert train(*first_stage(data, neck, *features)) == 0
    assert curve(neck)[-1, 0] < curve(neck)[0, 0]
    assert len(list((tmp_path / "features").glob("*_vit_h_cache.pth"))) == 6
    clip, trained = torch.load(data / "clip.pt"), load_model(neck / "best").segmenter.state_dict()
    for name, tensor in trained.items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, clip[name.replace("backbone.", "visual.")]), name
    alone = ["--distill.teacher", "None", "--distill.no_take_decoder", "--val.sets", "scenes"]
    assert train(*first_stage(data, tmp_path / "alone", *features, *alone, steps=1)) == 0  # all is dumped already

    assert train(*second_stage(data, neck / "best", named)) == 0
    rows = records(named)
    expected = 5 * rows[0]["bce"] + 5 * rows[0]["dice"] + 2 * rows[0]["names"]
    assert rows[0]["loss"] == pytest.approx(expected) and rows[3]["lr"] == pytest.approx(1e-4)
    for row in records(named, "val"):
        assert row["named_iou"] <= row["miou"] <= 1 and 0 <= row["score"] <= 100
        assert {"base_iou", "novel_iou", "base_score", "novel_score"} <= row.keys()
    shown = read_image(named / "pictures" / "coco_scenes.json" / "step_00000004.png")
    assert shown.shape[1] == 2 * 320
    after = load_file(named / "best" / "model.safetensors")
    for name, tensor in trained.items():
        stays = name.startswith(("backbone.", "neck.", "prompt_encoder.", "mask_decoder.iou_prediction_head."))
        assert torch.equal(after[f"segmenter.{name}"], tensor) == stays, name
    predictor = load_open_vocabulary(named / "best", device="cpu")
    predictor.set_image(make_picture())
    assert set(predictor.predict(points=[[40, 30]]).names[0]) == {"car", "kite, toy", "dog"}
    assert set(predictor.predict(points=[[40, 30]], vocabulary=["teapot", "cup"]).names[0]) == {"teapot", "cup"}


def test_it_goes_on_as_if_it_had_never_stopped(data, start, tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for steps in (2, 4):
        assert train(*second_stage(data, start, cut, "--val.max_images", 2, batch=2, steps=steps)) == 0
    assert train(*second_stage(data, start, whole, "--val.max_images", 2, batch=2)) == 0
    assert np.array_equal(curve(cut), curve(whole))
    assert records(cut, "val") == records(whole, "val")
    mine, theirs = (load_file(RunFolder(run).checkpoint(4) / "model.safetensors") for run in (cut, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_give_the_curve_of_one(data, start, tmp_path, stage):
    alone, two = tmp_path / "alone", tmp_path / "two"
    runs = [
        first_stage(data, out, "--data.batch_size", 1) if stage == 1 else second_stage(data, start, out)
        for out in (alone, two)
    ]
    assert train(*runs[0]) == 0
    done = train_processes(*runs[1], ranks=2)
    assert done.returncode == 0, done.stderr
    assert np.abs(curve(two) - curve(alone)).max() < 1e-3 * np.abs(curve(alone)).max()
    for mine, theirs in zip(records(two, "val"), records(alone, "val"), strict=True):
        assert mine.pop("group") == theirs.pop("group") and mine == pytest.approx(theirs, rel=1e-3, abs=1e-3)


def test_other_trainings_import_no_clip():
    code = "import sys, model.tasks; assert not {'open_clip', 'ftfy', 'timm'} & sys.modules.keys(), 'heavy import'"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_what_it_starts_from_nothing_begins(data, start, tmp_path):
    out = tmp_path / "run"
    without = [
        option for option in first_stage(data, out) if option not in ("--model.clip_checkpoint", data / "clip.pt")
    ]
    for command, kind, text in (
        (without, TrainingError, r"built on a CLIP.*--model\.clip_checkpoint RN50x16\.pt"),
        (first_stage(data, out, "--model.clip_checkpoint", tmp_path / "none.pt"), CheckpointError, "no such file"),
        (first_stage(data, out, "--model.name", "efficientvit-sam-pico"), TrainingError, "not built on a CLIP"),
        (second_stage(data, tmp_path / "none", out), CheckpointError, "no such checkpoint"),
        (second_stage(data, "None", out), TrainingError, "second stage.*--model.checkpoint"),
        (second_stage(data, data / "teacher", out), ModelError, "sam-vit-pico gives no names"),
        (second_stage(data, start, out, "--names.vocabulary", "none"), VocabularyError, "no such vocabulary"),
    ):
        with pytest.raises(kind, match=text):
            train(*command)
        assert not out.exists()
    lacking = load_file(start / "model.safetensors")
    part = {name: tensor for name, tensor in lacking.items() if not name.startswith("segmenter.neck.")}
    from safetensors.torch import save_file

    (tmp_path / "part").mkdir()
    save_file(part, tmp_path / "part" / "model.safetensors")
    (tmp_path / "part" / "config.json").write_bytes((start / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"segmenter\.neck\."):
        train(*second_stage(data, tmp_path / "part", out))
