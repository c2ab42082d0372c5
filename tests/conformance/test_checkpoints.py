"""Key rules against the tensor lists of every published checkpoint, and the round trip through our layout."""

import json

import pytest
import torch

from model.checkpoints import evf_sam
from model.checkpoints.files import Checkpoint
from model.checkpoints.load import build_model, fill_model, load_model, resolve, save_model, save_published
from model.checkpoints.rules import KeyMap, Section, check_keys, named_tensors
from model.registry import model_config

from .support import (
    ARCHITECTURES,
    FULL_SIZE,
    golden_tensor,
    manifest,
    needs_golden_data,
    published_folder,
)

pytestmark = needs_golden_data

PLAIN_FILES = {
    "sam-vit-b": "sam-vit-b",
    "sam-vit-l": "sam-vit-l",
    "sam-vit-h": "sam-vit-h",
    "sam2-hiera-t": "sam2-hiera-tiny",
    "sam2-hiera-s": "sam2-hiera-small",
    "sam2-hiera-b+": "sam2-hiera-base-plus",
    "sam2-hiera-l": "sam2-hiera-large",
    "efficient-sam-t": "efficient-sam-t",
    "efficient-sam-s": "efficient-sam-s",
}


def assert_same_tensors(model, key_map, shapes):
    check_keys(key_map, shapes, "manifest")
    targets = named_tensors(model)
    for name, theirs in key_map.theirs.items():
        for their in theirs:
            expected = tuple(targets[name].shape) if len(theirs) == 1 else (1, *targets[name].shape[1:])
            assert shapes[their] == expected, (name, their)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evf_manifest(architecture):
    shapes = manifest(architecture)
    config = evf_sam.detect(evf_sam.published_config(model_config(ARCHITECTURES[architecture])), shapes, architecture)
    assert config.name == model_config(ARCHITECTURES[architecture]).name
    with torch.device("meta"):
        model = build_model(config)
    assert_same_tensors(model, KeyMap(named_tensors(model), evf_sam.sections(config.family)), shapes)


@pytest.mark.parametrize("file", PLAIN_FILES)
def test_segmenter_manifest(file):
    config = model_config(PLAIN_FILES[file])
    with torch.device("meta"):
        model = build_model(config)
    key_map = KeyMap(named_tensors(model), (Section("segmenter.", "", evf_sam.SEGMENTERS[config.family].plain),))
    assert_same_tensors(model, key_map, manifest(file))


@pytest.mark.parametrize("scale", ["base", "large"])
def test_beit3_manifest(scale):
    with torch.device("meta"):
        encoder = build_model(model_config(f"evf-sam2-hiera-tiny-{scale}")).encoder
    key_map = KeyMap(named_tensors(encoder), (Section("", "", evf_sam.BEIT3),))
    assert_same_tensors(encoder, key_map, manifest(f"beit3-{scale}"))


def test_beit3_file(tmp_path):
    """A BEiT-3 file with a head beside it fills the encoder of a registry name."""
    tensors = {name: torch.zeros(shape) for name, shape in manifest("beit3-base").items()}
    tensors["beit3.encoder.layer_norm.A.bias"] += 3
    path = tmp_path / "beit3_base.pth"
    torch.save({"model": tensors | {"mlm_head.weight": torch.zeros(2)}}, path)
    model = load_model("evf-efficient-sam-pico-base", encoder_checkpoint=path)
    assert (model.encoder.norm.A.bias == 3).all()


@pytest.mark.parametrize("extra_21", [False, True])
def test_sam2_file_and_its_version(tmp_path, extra_21, caplog):
    """Version 2.1 has two tensors more; a file without the memory makes a model without video."""
    shapes = manifest("sam2-hiera-t")
    if extra_21:
        shapes |= {
            "no_obj_embed_spatial": (1, 64),
            "obj_ptr_tpos_proj.weight": (64, 256),
            "obj_ptr_tpos_proj.bias": (64,),
        }
    path = tmp_path / "sam2.pt"
    tensors = {name: golden_tensor(0, name, shape) for name, shape in shapes.items()}
    torch.save({"model": tensors}, path)
    source = resolve(path)
    assert source.config.name == ("sam2.1-hiera-tiny" if extra_21 else "sam2-hiera-tiny")
    model = load_model(path)
    fused = model.segmenter.sam2.memory_encoder.memory_fuser.layers[0].scale
    assert torch.equal(fused, tensors["memory_encoder.fuser.layers.0.gamma"])
    points = model.segmenter.sam2.prompt_encoder.point_embed.weight
    assert torch.equal(points[3:4], tensors["sam_prompt_encoder.point_embeddings.3.weight"])

    video = ("memory_", "maskmem_", "no_mem_pos", "mask_downsample.", "obj_ptr", "no_obj", "sam_mask_decoder.pred_obj")
    still = {name: tensor for name, tensor in tensors.items() if not name.startswith(video)}
    torch.save({"model": still}, path)
    with caplog.at_level("INFO"):
        assert not load_model(path).config.segmenter.has_video
    assert "video does not" in caplog.text


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[pytest.mark.slow] if name in FULL_SIZE else []) for name in ARCHITECTURES
     if name in FULL_SIZE | {"evf-effi-sam-b", "evf-sam2-tiny-base"}],
)  # fmt: skip
def test_round_trip(architecture, tmp_path):
    """published -> ours -> published: every name, type and byte."""
    published = published_folder(architecture, 0, tmp_path / "published", shards=False)
    source = resolve(published)
    save_model(fill_model(source, torch.device("cpu"), None), tmp_path / "ours", published)
    ours = resolve(tmp_path / "ours")
    assert ours.config == source.config
    save_published(fill_model(ours, torch.device("cpu"), None), tmp_path / "back", published)
    before, after = Checkpoint(published), Checkpoint(tmp_path / "back")
    assert before.shapes == after.shapes
    for name in before.shapes:
        first, second = (c.read(name, torch.device("cpu"), None) for c in (before, after))
        assert first.dtype == second.dtype
        assert torch.equal(first.view(torch.int32), second.view(torch.int32)), name
    stated = json.loads((published / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == stated
