"""Loading is strict and says what is wrong; converting there and back changes nothing."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoints.files import Checkpoint
from model.checkpoints.load import EXACT, build_model, find_source, load_model, resolve, save_model, save_published
from model.checkpoints.rules import named_tensors
from model.registry import BUNDLED, list_models, model_config
from utils.errors import CheckpointError, ModelError

from .conftest import PICO, ROOT, TOKENIZER, pico_model

CPU = torch.device("cpu")


def tensors_of(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name, CPU, None) for name in checkpoint.shapes}


def assert_equal_tensors(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("family", sorted(PICO))
@pytest.mark.parametrize("shard_bytes", [None, 5_000_000])
def test_round_trip(family, shard_bytes, pico_folders, tmp_path):
    published = pico_folders[family]
    model = load_model(published)
    save_model(model, tmp_path / "ours", published)
    ours = load_model(tmp_path / "ours")
    assert ours.config == model.config
    save_published(ours, tmp_path / "back", tmp_path / "ours", bin_shard_bytes=shard_bytes)
    assert_equal_tensors(tensors_of(published), tensors_of(tmp_path / "back"))
    for name in ("config.json", "sentencepiece.bpe.model"):
        assert (published / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    if shard_bytes:
        assert len(list((tmp_path / "back").glob("pytorch_model-*.bin"))) > 3


def test_convert_command(pico_folders, tmp_path):
    def convert(source, target, *options):
        command = [sys.executable, "-m", "tools.convert_checkpoint", "--input", str(source), "--output", str(target)]
        return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert convert(pico_folders["sam"], tmp_path / "ours", "--to", "textsam").returncode == 0
    assert convert(tmp_path / "ours", tmp_path / "back", "--to", "evf-sam", "--bin").returncode == 0
    assert_equal_tensors(tensors_of(pico_folders["sam"]), tensors_of(tmp_path / "back"))
    assert convert(pico_folders["sam"], tmp_path / "half", "--to", "textsam", "--dtype", "fp16").returncode == 0
    stored = {
        name: tensor.dtype for name, tensor in tensors_of(tmp_path / "half").items() if tensor.is_floating_point()
    }
    assert {name for name, dtype in stored.items() if dtype != torch.float16} == {
        name
        for name in stored
        if name.endswith("positional_embedding")  # of which no digit is given up
    }
    refused = convert(pico_folders["sam"], tmp_path / "ours", "--to", "textsam")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "not an empty folder" in refused.stderr


def test_sharing_a_file_does_not_change_it(pico_folder):
    """Weights are private mappings of the file: training in place must not write to it."""
    before = (pico_folder / "model.safetensors").read_bytes()
    model = load_model(pico_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (pico_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_on_the_fly(dtype, pico_folders, monkeypatch):
    monkeypatch.setattr("model.checkpoints.files.RELEASE_BYTES", 1_000_000)  # close and open the file again and again
    exact, cast = load_model(pico_folders["sam2"]), load_model(pico_folders["sam2"], dtype=dtype)
    for name, tensor in named_tensors(exact).items():
        other = named_tensors(cast)[name]
        assert other.dtype == (torch.float32 if name.endswith(EXACT) else dtype)
        assert torch.equal(tensor.detach().to(other.dtype), other.detach()), name


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_extra_and_mis_shaped_tensors_are_all_named(pico_folder):
    def change(tensors):
        for layer in (1, 2, 3):
            del tensors[f"mm_extractor.beit3.encoder.layers.{layer}.ffn.A.fc1.bias"]
        tensors["visual_model.adapter.weight"] = torch.zeros(2)

    damage(pico_folder, change)
    with pytest.raises(CheckpointError) as error:
        load_model(pico_folder)
    text = str(error.value)
    assert "3 missing (BEiT-3 encoder: mm_extractor.beit3.encoder.layers.{1..3}.ffn.A.fc1.bias)" in text
    assert "1 that the model does not have (no part of this model: visual_model.adapter.weight)" in text
    assert "\n" not in text


def test_mis_shaped_tensor(pico_folder):
    damage(pico_folder, lambda tensors: tensors.update({"text_hidden_fcs.0.2.bias": torch.zeros(255)}))
    with pytest.raises(CheckpointError, match=r"text_hidden_fcs\.0\.2\.bias is \[255\], needed \[256\]"):
        load_model(pico_folder)


def test_half_of_the_video_memory_is_not_no_memory(pico_folder):
    damage(pico_folder, lambda tensors: tensors.pop("visual_model.obj_ptr_proj.layers.0.weight"))
    with pytest.raises(CheckpointError, match="object pointers"):
        load_model(pico_folder)


def test_video_parts_may_be_partly_gone(pico_folder, caplog):
    """The published demo deletes the memory of a loaded model; what it leaves of the rest is not used."""
    memory = ("visual_model.memory_encoder.", "visual_model.memory_attention.")
    damage(pico_folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(memory)])
    with caplog.at_level("INFO"):
        model = load_model(pico_folder)
    assert not model.config.segmenter.has_video
    assert "tensors stay unused" in caplog.text


def test_integer_weights_are_refused(pico_folder):
    name = "text_hidden_fcs.0.2.bias"
    damage(pico_folder, lambda tensors: tensors.update({name: torch.zeros(256, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"text_hidden_fcs\.0\.2\.bias holds torch\.int32"):
        load_model(pico_folder)


def test_shared_storage_becomes_two_parameters(pico_folders, tmp_path):
    tensors = tensors_of(pico_folders["sam"])
    twin = "text_hidden_fcs.0.0.bias"
    tensors[twin] = tensors["mm_extractor.beit3.encoder.layer_norm.A.bias"]
    for file in pico_folders["sam"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = load_model(tmp_path)
    with torch.no_grad():
        model.encoder.norm.A.bias.add_(1)
    assert torch.equal(model.projector.fc1.bias, tensors[twin])
    save_model(model, tmp_path / "ours", TOKENIZER)


@pytest.mark.parametrize("name", ["evf-sam2-hiera-pico-pico", "sam-vit-pico"])
def test_models_that_cannot_be_saved(name, tmp_path):
    model = load_model(name, pretrained=False)
    if model.encoder is not None:
        model.quantized_bits = 8
    with pytest.raises(ModelError, match=r"8 bit|no encoder"):
        save_published(model, tmp_path / "out", TOKENIZER)
    assert not (tmp_path / "out").exists()


def test_published_folder_gets_the_files_that_transformers_reads(pico_folders):
    names = {file.name for file in pico_folders["sam"].iterdir()}
    assert {"tokenizer_config.json", "special_tokens_map.json", "sentencepiece.bpe.model"} <= names


@pytest.mark.parametrize("content", ['{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "{}"])
def test_index_that_is_no_index(content, pico_folder):
    (pico_folder / "model.safetensors").rename(pico_folder / "other.safetensors")
    (pico_folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(pico_folder)


def test_config_that_disagrees_with_the_tensors(pico_folder):
    config = json.loads((pico_folder / "config.json").read_text())
    for key, value, word in (("hidden_size", 77, "77"), ("mm_extractor_scale", "huge", "huge"),
                             ("model_type", "llama", "llama"), ("sam_scale", "tiny", "tiny")):  # fmt: skip
        (pico_folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=word):
            resolve(pico_folder)


def test_our_config_with_an_unknown_key(pico_folders, tmp_path):
    save_model(load_model(pico_folders["sam"]), tmp_path, TOKENIZER)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["segmenter"]["widht"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="widht"):
        load_model(tmp_path)


def test_parts_fill_a_registry_name(pico_folders, tmp_path):
    """SAM and BEiT-3 files of their own releases become the parts of an untrained pairing."""
    tensors = tensors_of(pico_folders["sam"])
    parts = {"visual_model.": tmp_path / "sam.pth", "mm_extractor.": tmp_path / "beit3.pth"}
    for prefix, path in parts.items():
        part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        torch.save({"model": part} if prefix == "mm_extractor." else part, path)
    sam, beit3 = parts.values()
    model = load_model(PICO["sam"], segmenter_checkpoint=sam, encoder_checkpoint=beit3)
    whole = load_model(pico_folders["sam"])
    for name, tensor in named_tensors(whole).items():
        same = torch.equal(tensor, named_tensors(model)[name])
        assert same == (not name.startswith("projector.")), name
    alone = load_model(tmp_path / "sam.pth")
    assert alone.encoder is None
    assert alone.config.name == "sam-vit-pico"
    with pytest.raises(CheckpointError, match=r"sam-vit-pico, but .* needs sam2-hiera-pico"):
        load_model(PICO["sam2"], segmenter_checkpoint=tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match="encoder_checkpoint"):
        load_model(tmp_path / "beit3.pth")


def test_old_pickle_format(pico_folders, tmp_path):
    tensors = tensors_of(pico_folders["efficient_sam"])
    part = {k.removeprefix("visual_model."): v for k, v in tensors.items() if k.startswith("visual_model.")}
    torch.save({"model": part}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / "old.pt").config.name == "efficient-sam-pico"


def test_names():
    assert {"evf-sam", "evf-sam2", "evf-effi-sam-b", "evf-sam2-hiera-tiny-base", "evf-sam-vit-b-base"} <= set(
        list_models()
    )
    assert all(name.startswith("evf-sam2") for name in list_models("evf-sam2*"))
    assert model_config("evf-sam").name == "evf-sam-vit-h-large"
    with pytest.raises(ModelError, match=r"sam2_l.*Did you mean 'evf-sam2"):
        model_config("evf-sam2_l")
    with pytest.raises(ModelError, match="no published weights"):
        load_model("evf-effi-sam-b")


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds(name):
    with torch.device("meta"):
        model = build_model(model_config(name))
    assert model.config.name.startswith(("evf-", "sam", "efficient", "ovsam"))
    assert (model.encoder is not None) == (name.startswith("evf-") or bool(name in BUNDLED and BUNDLED[name][1]))


def test_untrained_model_is_reproducible():
    torch.manual_seed(3)
    first = load_model(PICO["sam2"], pretrained=False)
    torch.manual_seed(3)
    second = load_model(PICO["sam2"], pretrained=False)
    assert_equal_tensors(named_tensors(first), named_tensors(second))
    assert not torch.equal(named_tensors(first)["projector.fc1.weight"], pico_model("sam2").projector.fc1.weight)


def test_published_efficientvit_sam_by_name(tmp_path, monkeypatch):
    """The published commands keep the files in one place below where they run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"efficientvit_sam_xl1\.pt, which is not there"):
        find_source("efficientvit-sam-xl1")
    file = tmp_path / "assets" / "checkpoints" / "efficientvit_sam" / "efficientvit_sam_xl1.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_source("efficientvit-sam-xl1").resolve() == file
    with pytest.raises(ModelError, match="no published weights"):
        find_source("evf-efficientvit-sam-xl1-base")
