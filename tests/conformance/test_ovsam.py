"""Open-Vocabulary SAM against numbers of the published code."""

import copy
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.images import ImageCollate, ImageSample
from model.checkpoints.evf_sam import SEGMENTERS
from model.checkpoints.load import build_model
from model.checkpoints.ovsam import OVSAM as OVSAM_FORMAT
from model.checkpoints.rules import KeyMap, Section, named_tensors
from model.distill_step import DistillStep, Teacher
from model.encoders.clip_text import ClipText, tokenize
from model.losses import losses_at, name_losses
from model.name_step import NameStep, prepare_named_step
from model.named_eval import published_points
from model.predictor import ImagePredictor
from model.prompts import read_prompts, to_input
from model.recognizers.open_vocabulary import Recognizer, coarse_mask, mask_boxes, pyramid_level
from model.registry import model_config
from model.types import Prompts
from model.vocabulary import TEMPLATES, Vocabulary, make_vocabulary, wordings
from tests.conformance.support import OVSAM, fill_model, golden_tensor, manifest, needs_golden_data
from utils.centre_points import centre_points
from utils.class_lists import read_class_list
from utils.feature_cache import FlatFeatures
from utils.image import read_image
from utils.label_metrics import InstanceMetrics

pytestmark = needs_golden_data
FEATURES, LOGITS, AREA = 2e-5, 1e-3, 10
IMAGES = ("a480x640", "b640x427")
LISTS = Path(__file__).parents[2] / "assets" / "class_lists"


def read(name):
    with np.load(OVSAM / "cases" / f"{name}.npz") as arrays:
        return json.loads((OVSAM / "cases" / f"{name}.json").read_text()), dict(arrays)


def names(pattern):
    return sorted(path.stem for path in (OVSAM / "cases").glob(f"{pattern}.json")) or ["absent"]


def sampled(maps):
    """Return what the cases keep of [1, C, h, w]."""
    _, channels, height, width = maps.shape
    return maps[0, :: channels // 8, :: height // 16, :: width // 16].numpy()


def relative(found, golden):
    assert tuple(found.shape) == golden.shape
    return np.abs(np.asarray(found) - golden).max() / np.abs(golden).max()


def off(found, golden):
    assert tuple(found.shape) == golden.shape
    return np.abs(np.asarray(found) - golden).max()


@pytest.fixture(scope="module")
def model():
    section = Section("segmenter.", "", SEGMENTERS["ovsam"].plain)
    return fill_model(model_config("ovsam-rn50x16"), (section,), "ovsam-rn50x16-coco", 0).eval()


@pytest.fixture(scope="module")
def predictors(model):
    """Image -> a predictor that has encoded it."""
    found = {}
    for image in IMAGES:
        found[image] = ImagePredictor(model)
        found[image].set_image(read_image(OVSAM / "images" / f"{image}.png"))
    return found


def vocabulary(stated, **members):
    shape = (stated["classes"], stated["prototypes"], 768)
    vectors = F.normalize(golden_tensor(stated["seed"], "text_embedding", shape), dim=-1)
    return Vocabulary(tuple(f"name {i}" for i in range(len(vectors))), vectors, **members)


@pytest.mark.slow
@pytest.mark.parametrize("image", IMAGES)
@torch.inference_mode()
def test_features(image, model, predictors):
    case, arrays = read(f"{image}-features")
    segmenter, picture = model.segmenter, read_image(OVSAM / "images" / f"{image}.png")
    resized = read_image(OVSAM / "images" / f"{image}-resized.png")
    assert (segmenter.image_spec.resize_image(picture).permute(1, 2, 0).numpy() == resized).all()
    pixels = segmenter.image_spec(picture)[None]
    assert off(pixels[0, :, ::16, ::16], arrays["input"]) < 1e-6
    height, width = case["resized_size"]
    rows = slice(500, 508) if height == 1024 else slice(height - 4, height + 4)
    assert off(pixels[0, :, rows, width - 4 : width + 4], arrays["input_edge"]) < 1e-6
    assert pixels.double().sum().item() == pytest.approx(case["input_sum"], rel=1e-6)
    stages = segmenter.stages(pixels)
    features = predictors[image]._image.features
    for number in range(4):
        assert relative(sampled(stages[number]), arrays[f"stage{number + 1}"]) < FEATURES
        assert relative(sampled(features.high_res[number]), arrays[f"fpn{number + 1}"]) < FEATURES
        assert stages[number].mean().item() == pytest.approx(case["stage_means"][number], rel=1e-4)
        assert features.high_res[number].mean().item() == pytest.approx(case["fpn_means"][number], rel=1e-4)
    assert relative(features.high_res[4], stages[3].numpy()) < FEATURES
    assert relative(sampled(features.embedding), arrays["neck"]) < FEATURES
    assert features.embedding.abs().mean().item() == pytest.approx(case["neck_abs_mean"], rel=1e-5)
    assert relative(sampled(segmenter.positions(64, torch.float32)), arrays["dense_pe"]) < FEATURES


PROMPTED = [name for kind in ("coco-point", "coco-box", "coco-points3", "lvis-box") for name in names(f"*-{kind}")]


@cache
def members(kind):
    """Return which names the published code counts as base and as novel, by the weights it gave them in one case."""
    _, golden = read(f"b640x427-{kind}-box")
    head, clip = (torch.from_numpy(golden[f"{branch}_logits"]).log_softmax(-1) for branch in ("head", "clip"))
    shares = ((torch.from_numpy(golden["fused"]) - head) / (clip - head))[0, :-1]
    is_base, is_novel = ((shares - share).abs() < 0.02 for share in (0.1, 0.9))
    counts = {"coco": (48, 17), "lvis": (866, 337)}
    assert (int(is_base.sum()), int(is_novel.sum())) == counts[kind]
    return {"is_base": is_base, "is_novel": is_novel}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTED)
@torch.inference_mode()
def test_prompts(name, model, predictors):
    """Tokens, mask, its box, both branches, their fusion, and the mask at the size of the image."""
    case, golden = read(name)
    segmenter, predictor = model.segmenter, predictors[name.split("-")[0]]
    asked, features = case["prompts_resized"], predictor._image.features
    points = torch.tensor(asked["points"])[:, None] if "points" in asked else None
    labels = torch.ones(points.shape[:2], dtype=torch.long) if points is not None else None
    boxes = torch.tensor(asked["boxes"]).float() if "boxes" in asked else None
    if "points_original" in case:
        size, places = tuple(case["original_size"]), np.array(case["points_original"])[:, None]
        original = read_prompts(size, places, None, None, None, 256)
        ours = to_input(original, predictor.prompt_spec, size, model)
        assert off(ours.points, points.numpy()) < 1e-4
    sparse, dense = segmenter.encode_prompts(Prompts(points=points, labels=labels, boxes=boxes))
    assert off(sparse, golden["sparse"]) < 1e-5
    low = segmenter.decode(features, sparse, dense).logits[:, 0]
    assert off(low[:, ::2, ::2], golden["low_res_logits"]) < LOGITS
    assert torch.equal(mask_boxes(low), torch.from_numpy(golden["mask_boxes"]) * 4)
    assert off(coarse_mask(low), golden["mask32"]) < LOGITS

    known = vocabulary(case["vocabulary"], **members(case["vocabulary"]["kind"]))
    recognizer = Recognizer(segmenter, known, case["roi_output_size"])
    index = torch.zeros(len(low), dtype=torch.long)
    seen = recognizer.embed_regions(features, mask_boxes(low), index)
    assert off(seen, golden["region_embedding"]) < LOGITS
    head = recognizer.logits(seen)
    assert off(head, golden["head_logits"]) < LOGITS
    clip_seen = recognizer.embed_with_clip(features, torch.tensor(asked["clip_boxes"]).float(), index)
    assert off(clip_seen, golden["clip_embedding"]) < LOGITS
    clip = recognizer.logits(clip_seen)
    assert off(clip, golden["clip_logits"]) < LOGITS
    fused = recognizer.fuse(head, clip, low)
    assert off(fused, golden["fused"]) < LOGITS
    assert head.argmax(1).tolist() == case["head_label"]
    assert clip.argmax(1).tolist() == case["clip_label"]
    assert fused[:, :-1].argmax(1).tolist() == case["label"]
    chances = fused.softmax(-1)[range(len(low)), case["label"]]
    assert off(chances, np.array(case["fused_prob"])) < LOGITS

    [full] = segmenter.postprocess(low, [tuple(case["original_size"])], index)
    golden_masks = np.unpackbits(golden["masks"], axis=1).reshape(full.shape)
    assert np.abs((full > 0).flatten(1).sum(1).numpy() - np.array(case["mask_area"])).max() <= AREA
    assert ((full > 0).numpy() != golden_masks).sum() <= AREA * len(full)


@pytest.mark.slow
@pytest.mark.parametrize("name", names("*-rois"))
@torch.inference_mode()
def test_regions(name, model, predictors):
    """Boxes of every level, partly outside and empty ones, and boxes from masks."""
    case, golden = read(name)
    features = predictors[name.split("-")[0]]._image.features
    recognizer = Recognizer(model.segmenter, vocabulary(case["vocabulary"]), case["roi_output_size"])
    low = torch.full((4, 256, 256), -1.0)
    low[0, 20:40, 30:70] = low[1, 5, 9] = low[1, 100, 201] = low[2] = 1
    for kind, boxes in (("given", torch.from_numpy(golden["given_boxes"])), ("from_mask", mask_boxes(low))):
        index = torch.zeros(len(boxes), dtype=torch.long)
        assert torch.equal(boxes, torch.from_numpy(golden[f"{kind}_boxes"]))
        assert pyramid_level(boxes).tolist() == golden[f"{kind}_levels"].tolist()
        seen = recognizer.embed_regions(features, boxes, index)
        assert off(seen, golden[f"{kind}_embedding"]) < LOGITS
        assert off(recognizer.logits(seen), golden[f"{kind}_logits"]) < LOGITS
        if f"{kind}_clip_embedding" in golden:
            assert off(recognizer.embed_with_clip(features, boxes, index), golden[f"{kind}_clip_embedding"]) < LOGITS


@pytest.mark.slow
@torch.inference_mode()
def test_fusion(model, predictors):
    """Given logits of the head, and one mask that is empty."""
    case, golden = read("fusion")
    seed = case["weight_seed"]
    head = 8 * golden_tensor(seed, "head_logits", (3, 1, 81))[:, 0]
    low = golden_tensor(seed, "low_masks", (3, 1, 256, 256))[:, 0]
    low[1] -= 2
    recognizer = Recognizer(model.segmenter, vocabulary(case["vocabulary"], **members("coco")))
    boxes = torch.tensor(case["clip_boxes_resized"])
    features = predictors["a480x640"]._image.features
    clip = recognizer.logits(recognizer.embed_with_clip(features, boxes, torch.zeros(3, dtype=torch.long)))
    fused = recognizer.fuse(head, clip, low)
    assert off(fused, golden["fused"]) < LOGITS
    assert fused[:, :-1].argmax(1).tolist() == golden["label"].tolist()


def test_metric():
    case, golden = read("metric")
    metrics = InstanceMetrics(case["base"], case["novel"])
    for i in range(3):
        parts = (
            torch.from_numpy(golden[f"{name}{i}"]) for name in ("pred_masks", "pred_labels", "gt_masks", "gt_labels")
        )
        metrics.update(*parts)
    assert metrics.compute() == pytest.approx(case["result"], rel=1e-5)


def test_lists_of_base_and_novel_classes():
    """Those that we ship are the published ones, by the weights that the published code gave to their logits."""
    everything, *kinds = (read_class_list(LISTS / f"coco{kind}.txt").names for kind in ("", "_base", "_novel"))
    assert len(everything) == 80
    for names, is_member in zip(kinds, members("coco").values(), strict=True):
        assert names == tuple(name for name, known in zip(everything, is_member.tolist(), strict=True) if known)


def test_centre_points():
    _, golden = read("center-points")
    for suffix in ("", "_rescaled"):
        masks = torch.from_numpy(golden[f"masks{suffix}"])
        found = centre_points(masks, approximate=True)
        assert found.tolist() == golden[f"coords{suffix}"][:, 0].tolist()


def test_clicks_of_the_evaluation():
    """The masks are resized as the image was, then their centres are found."""
    case, golden = read("center-points")
    found = published_points(golden["masks"], tuple(case["rescale_shape"]))
    assert found.tolist() == golden["coords_rescaled"][:, 0].tolist()


@pytest.mark.slow
def test_text_classifier():
    """Tokens, prompt vectors and prototypes of four classes."""
    case, golden = read("text-classifier")
    phrases = [template.format(word) for name in case["classes"] for word in wordings(name) for template in TEMPLATES]
    assert phrases == case["descriptions"]
    assert [len(wordings(name)) for name in case["classes"]] == case["candidates"]
    assert torch.equal(tokenize(phrases), torch.from_numpy(golden["tokens"]).long())
    config = model_config("ovsam-rn50x16").segmenter
    with torch.device("meta"):
        text = ClipText(config.text_width, config.text_heads, config.text_layers, config.embed_width)
    shapes = manifest("openai-clip-rn50x16")
    state = {name: golden_tensor(case["weight_seed"], name, shapes[name]) for name in text.tower.state_dict()}
    text.tower.load_state_dict(state, assign=True)
    text.tower.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
    made = make_vocabulary(text.eval(), case["classes"])
    assert off(made.vectors, golden["classifier"]) < 2e-5


@pytest.mark.slow
def test_gradients_of_the_neck(tmp_path):
    """Loss and gradients of SAM2CLIP as train.py has them, its teacher read from a dump of the published kind."""
    case, golden = read("sam2clip-distill")
    seed, shapes = case["weight_seed"], manifest("sam2clip-vith-rn50x16")
    with torch.device("meta"):
        model = build_model(model_config("ovsam-rn50x16"))
    segmenter = model.segmenter
    tensors = {n: t for n, t in named_tensors(segmenter).items() if n.startswith(("backbone.", "neck."))}
    published = {ours: theirs[0] for ours, theirs in KeyMap(tensors, (Section("", "", OVSAM_FORMAT),)).theirs.items()}
    published = {ours: re.sub(r"^(backbone|neck)", r"\1_student", theirs) for ours, theirs in published.items()}
    assert set(published.values()) == set(shapes)
    for part in ("backbone", "neck"):
        state = {
            ours.removeprefix(f"{part}."): golden_tensor(seed, theirs, shapes[theirs])
            for ours, theirs in published.items()
            if ours.startswith(f"{part}.")
        }
        getattr(segmenter, part).load_state_dict(state, assign=True)
    pixels = segmenter.image_spec(read_image(OVSAM.joinpath("images", "a480x640.png")))[None]
    with torch.no_grad():
        stages = segmenter.stages(pixels)
    for number, stage in enumerate(stages, 1):
        assert relative(sampled(stage), golden[f"stage{number}"]) < FEATURES
    segmenter.neck.requires_grad_(True)
    with torch.no_grad():
        assert relative(sampled(segmenter.neck(stages)), golden["neck"]) < FEATURES
    torch.save(golden_tensor(seed, "teacher", (256, 64, 64)), tmp_path / "a480x640_vit_h_cache.pth")
    teacher = Teacher(None, segmenter.own_image_spec, "fp32", FlatFeatures(tmp_path, is_complete=True))
    sample = ImageSample(read_image(OVSAM.joinpath("images", "a480x640.png")), "images/a480x640.png", 0)
    batch = ImageCollate(segmenter.own_image_spec, teacher.spec, teacher.cache)([sample])
    loss = DistillStep(model)(*teacher(batch))[0, 0]
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    loss.backward()
    gradients = {published[name]: p.grad for name, p in segmenter.named_parameters() if p.grad is not None}
    for name, norm in case["grad_norm"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    assert relative(gradients["neck_student.neck.2.weight"][::16, ::16, 1, 1], golden["grad_out_conv"]) < 1e-3
    assert relative(gradients["neck_student.neck.3.bias"], golden["grad_out_bias"]) < 1e-3


@pytest.mark.slow
def test_gradients_of_masks_and_names(model):
    """Losses and gradients of CLIP2SAM, two instances prompted by box and two by point, at given points of masks."""
    case, golden = read("clip2sam-loss")
    whole = copy.deepcopy(model)
    segmenter = whole.segmenter
    probe = prepare_named_step(whole)
    assert {name.split(".")[2] for name in probe.idle} == {"iou_prediction_head"}  # published: a gradient of 0
    step = NameStep(whole, vocabulary(case["vocabulary"]), points=12544)
    pixels = segmenter.image_spec(read_image(OVSAM.joinpath("images", "a480x640.png")))[None]
    boxes, points = torch.tensor(case["boxes_resized"]), torch.tensor(case["points_resized"])[:, 0].float()
    by_box, index = torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.long)
    logits, named = step.predict(pixels, boxes, points, by_box, index)
    assert off(named.detach(), golden["cls_logits"]) < LOGITS
    assert off(logits[:, 0, ::4, ::4].detach(), golden["low_res_logits"]) < LOGITS
    height, width = golden["mask_hw"]
    masks = torch.from_numpy(np.unpackbits(golden["masks"], axis=1)).reshape(4, height, width).float()
    where = 0.5 + 0.5 * golden_tensor(case["weight_seed"], "points", (4, 12544, 2))
    masks = losses_at(logits, F.pad(masks, (0, 1024 - width, 0, 1024 - height)), where[:, None])[:, 0]
    names = name_losses(named, torch.tensor(case["labels"]))
    losses = {"loss_mask": 5 * masks[:, 0].mean(), "loss_dice": 5 * masks[:, 1].mean(), "loss_cls": 2 * names.mean()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(case["losses"], rel=1e-5)
    sum(losses.values()).backward()
    tensors = {f"segmenter.{name}": tensor for name, tensor in named_tensors(segmenter).items()}
    published = KeyMap(tensors, (Section("segmenter.", "", OVSAM_FORMAT),)).theirs
    gradients = {published[f"segmenter.{name}"][0]: parameter.grad for name, parameter in segmenter.named_parameters()}
    for name, norm in case["grad_norm"].items():
        if gradients[name] is None:
            assert norm == 0, name
        else:
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    assert relative(gradients["mask_decoder.mask_decoder.mask_tokens.weight"], golden["grad_mask_token"]) < 1e-4
    assert relative(gradients["mask_decoder.roi_conv.0.conv.weight"][::32, ::16, 0, 0], golden["grad_roi_conv"]) < 1e-4
