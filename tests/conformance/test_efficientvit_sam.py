"""EfficientViT-SAM against numbers of the published code."""

import json
import re

import numpy as np
import pytest
import torch

from model.checkpoints.evf_sam import SEGMENTERS
from model.checkpoints.load import load_model
from model.checkpoints.rules import Section
from model.everything import MaskGenerator
from model.predictor import ImagePredictor
from model.prompts import read_prompts, to_input
from model.registry import model_config
from tests.conformance.support import EFFICIENTVIT, fill_model, golden_tensor, manifest, needs_golden_data
from utils.image import read_image
from utils.masks import decode_rle

pytestmark = needs_golden_data
TOLERANCE = 3e-5
QUICK = ("l0",)


def golden(name, seed):
    section = Section("segmenter.", "", SEGMENTERS["efficientvit_sam"].plain)
    return fill_model(model_config(f"efficientvit-sam-{name}"), (section,), f"efficientvit-sam-{name}", seed).eval()


def groups():
    found = sorted({path.stem.rsplit("_img_", 1)[0] for path in (EFFICIENTVIT / "cases").glob("*.json")})
    return [
        pytest.param(*group.split("_s"), id=group, marks=[] if group.split("_s")[0] in QUICK else [pytest.mark.slow])
        for group in found
    ] or [pytest.param("l0", "11", id="absent")]


def inputs(image):
    """Return an image of the cases, its prompts, and its mask input."""
    folder = EFFICIENTVIT / "inputs"
    mask = np.load(folder / f"{image}_mask_input.npz")["mask_input"]
    return read_image(folder / f"{image}.png"), json.loads((folder / f"{image}_prompts.json").read_text()), mask


def asked(prompt, mask):
    """Return the arguments of `ImagePredictor` for a recorded prompt."""
    arguments = {"points": prompt.get("points"), "labels": prompt.get("labels"), "boxes": prompt.get("box")}
    return arguments | {"masks": mask[0] if prompt.get("mask") else None}


@torch.inference_mode()
@pytest.mark.parametrize(("name", "seed"), groups())
def test_recorded_cases(name, seed):
    """Input, stages, embedding, and for every prompt all masks at both sizes and their scores."""
    model = golden(name, int(seed))
    segmenter, predictor = model.segmenter, ImagePredictor(model)
    for path in sorted((EFFICIENTVIT / "cases").glob(f"{name}_s{seed}_img_*.json")):
        case, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
        image, prompts, mask = inputs(case["image"])
        pixels, step = segmenter.image_spec(image), case["input_step"]
        assert np.abs(pixels[:, ::step, ::step].numpy() - arrays["input_s"]).max() < 1e-5
        found = pixels[None]
        for number, stage in enumerate(segmenter.image_encoder.backbone):
            found = stage(found)
            flat = found.flatten()[:: case["stages"][f"stage{number}"]["flat_step"]][:400]
            recorded = arrays[f"feat_stage{number}"]  # up to 200 in the XL sizes
            assert np.abs(flat.numpy() - recorded).max() < TOLERANCE * max(1, np.abs(recorded).max())
        predictor.set_image(image)
        embedding = predictor._image.features.embedding[0]
        assert np.abs(embedding[::4, ::4, ::4].numpy() - arrays["embedding_s4"]).max() < TOLERANCE
        assert np.abs(embedding.flatten()[::61].numpy() - arrays["embedding_flat61"]).max() < TOLERANCE
        for kind, prompt in prompts.items():
            size = image.shape[:2]
            given = read_prompts(size, **asked(prompt, mask), side=256)
            sparse, dense = segmenter.encode_prompts(to_input(given, predictor.prompt_spec, size, model))
            if sparse is None:
                sparse = embedding.new_zeros(1, 0, 256)
            prediction = segmenter.decode(predictor._image.features, sparse, dense)
            answer = predictor.predict(**asked(prompt, mask), multimask=True)
            assert np.abs(answer.low_res[0, :, ::7, ::7] - arrays[f"{kind}_multi_low_s7"]).max() < TOLERANCE
            for mode, rows in (("multi", slice(1, 4)), ("single", slice(0, 1))):
                low, stem = prediction.logits[0, rows], f"{kind}_{mode}"
                assert np.abs(low[:, ::7, ::7].numpy() - arrays[f"{stem}_low_s7"]).max() < TOLERANCE
                assert np.abs(prediction.iou[0, rows].numpy() - arrays[f"{stem}_iou"]).max() < TOLERANCE
                [full] = segmenter.postprocess(low, [size], torch.zeros(len(low), dtype=torch.long))
                assert np.abs(full[:, ::16, ::16].numpy() - arrays[f"{stem}_up_s16"]).max() < TOLERANCE
                recorded = case["prompts"][kind][mode]
                for one, area, unsure in zip(full, recorded["areas"], recorded["pixels_within_1e3_of_0"], strict=True):
                    assert abs(int((one > 0).sum()) - area) <= max(4, unsure)


@torch.inference_mode()
def test_every_small_constant_matters():
    """Weights that are rescaled so that the epsilons of norms and attention decide the numbers."""
    path = EFFICIENTVIT / "probe" / "l0_s11_img_a_probe.json"
    case, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    model = golden("l0", case["seed"])
    published = model_tensors_by_published_name(model)
    for name, tensor in published.items():
        rule = next((factor for pattern, factor in case["rules"] if re.search(pattern, name)), None)
        if rule == "qk1e-4":
            tensor[torch.arange(len(tensor)) % 96 < 64] *= 1e-4
        elif rule is not None:
            tensor *= rule
    image, prompts, mask = inputs(case["image"])
    predictor = ImagePredictor(model)
    predictor.set_image(image)
    embedding = predictor._image.features.embedding[0]
    assert np.abs(embedding[::4, ::4, ::4].numpy() - arrays["embedding_s4"]).max() < TOLERANCE
    assert np.abs(embedding.flatten()[::61].numpy() - arrays["embedding_flat61"]).max() < TOLERANCE
    size = image.shape[:2]
    given = read_prompts(size, **asked(prompts[case["prompt"]], mask), side=256)
    sparse, _ = model.segmenter.encode_prompts(to_input(given, predictor.prompt_spec, size, model))
    prediction = model.segmenter.decode(predictor._image.features, sparse)
    assert np.abs(prediction.logits[0, 1:, ::7, ::7].numpy() - arrays["low_s7"]).max() < TOLERANCE
    assert np.abs(prediction.iou[0, 1:].numpy() - arrays["iou"]).max() < TOLERANCE


def model_tensors_by_published_name(model):
    from model.checkpoints.rules import KeyMap, named_tensors

    tensors = named_tensors(model)
    section = Section("segmenter.", "", SEGMENTERS["efficientvit_sam"].plain)
    names = KeyMap(tensors, (section,)).theirs
    return {their: tensors[ours].data[i : i + 1] if len(theirs) > 1 else tensors[ours].data
            for ours, theirs in names.items() for i, their in enumerate(theirs)}  # fmt: skip


@pytest.mark.parametrize("entry", [None, "state_dict"])
def test_a_published_file_loads(entry, tmp_path):
    """Bare or below `state_dict`, beside what a trainer adds."""
    state = {n: golden_tensor(11, n, shape) for n, shape in manifest("efficientvit-sam-l0").items()}
    content = state if entry is None else {entry: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "l0.pt")
    model = load_model(tmp_path / "l0.pt")
    assert model.config.name == "efficientvit-sam-l0"
    expected = golden("l0", 11).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["l0", "l1", "l2", "xl0", "xl1"])
def test_architectures_are_told_apart(name):
    from model.checkpoints.evf_sam import family_of, segmenter_shape
    from model.registry import find_config

    shapes = manifest(f"efficientvit-sam-{name}")
    family = family_of(shapes, "")
    assert family == "efficientvit_sam"
    assert find_config(family, *segmenter_shape(shapes, "", family), None).name == f"efficientvit-sam-{name}"


AMG = EFFICIENTVIT / "amg" / "l0_s11_img_a.json"


@pytest.fixture(scope="module")
def l0():
    return golden("l0", 11)


@pytest.mark.parametrize("run", sorted(json.loads(AMG.read_text())["runs"]) if AMG.is_file() else ["absent"])
def test_everything(run, l0):
    """The masks of the published generator: order, boxes, areas, scores, where they were found."""
    recorded = json.loads(AMG.read_text())["runs"][run]
    image, _, _ = inputs("img_a")
    predictor = ImagePredictor(l0, threshold=recorded["mask_threshold"])
    found = MaskGenerator(predictor, **recorded["settings"]).generate(image)
    assert abs(len(found) - recorded["count"]) <= (run == "thresholds")
    for mine, theirs in zip(found, recorded["masks"], strict=len(found) == recorded["count"]):
        assert abs(mine["area"] - theirs["area"]) <= 4
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=1)
        assert mine["crop_box"] == theirs["crop_box"]
        assert mine["point_coords"][0] == pytest.approx(theirs["point_coords"][0], abs=1e-3)
        assert mine["predicted_iou"] == pytest.approx(theirs["predicted_iou"], abs=TOLERANCE)
        stability = np.nan if theirs["stability_score"] is None else theirs["stability_score"]
        assert mine["stability_score"] == pytest.approx(stability, abs=2e-3, nan_ok=True)
        if "segmentation" in theirs:
            difference = decode_rle(mine["segmentation"]) != decode_rle(theirs["segmentation"])
            assert difference.sum() <= 4
