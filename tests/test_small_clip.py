"""A small CLIP of one's own: it learns, goes on where it was, and is what Open-Vocabulary SAM is built on."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datasets.instance_files import open_instances
from model.checkpoints.clip import WORD_IDS, load_text, save_text
from model.checkpoints.load import load_model, save_model
from model.distill_step import take_decoder
from model.encoders.clip_text import rows_of, tokenize
from model.named_predictor import load_open_vocabulary
from model.ovsam_start import take_clip
from model.registry import model_config
from model.vocabulary import make_vocabulary, read_vocabulary, save_vocabulary
from tests.ovsam_layouts import PICO, write_scenes
from tools import convert_checkpoint, train_small_clip
from tools import make_vocabulary as make_vocabulary_tool
from utils.errors import VocabularyError, run_main

NAMES = ["car", "dog", "kite"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_scenes(root, 9)
    return root


def train(monkeypatch, data, output, *options):
    paths = ["--data", str(data), "--annotations", "scenes.json", "--images", "scenes", "--output", str(output)]
    size = ["--model", PICO, "--batch_size", "3"]
    monkeypatch.setattr(sys, "argv", ["train_small_clip.py", *paths, *size, *options])
    return train_small_clip.main()


@pytest.fixture(scope="module")
def clip(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, data, path, "--steps", "60", "--warmup", "5", "--save_every", "60") == 0
    return path


def test_it_learns_names(data, clip):
    """Crops of three kinds of thing: by chance a third of the names is right, and the loss is ln 3."""
    config = model_config(PICO).segmenter
    state = torch.load(clip, weights_only=True)
    word_ids = state.pop(WORD_IDS)
    model = train_small_clip.build_clip(config, len(word_ids)).eval()
    model.load_state_dict(state)
    crops = train_small_clip.Crops(open_instances("coco", data / "scenes.json", data / "scenes"), config)
    right = []
    with torch.no_grad():
        said = model.encode_text(
            rows_of(tokenize(["a photo of a " + name for name in NAMES]), word_ids), normalize=True
        )
        for seed in range(20):
            pixels, _ = crops.draw(np.random.default_rng(seed), 3)
            order = np.random.default_rng(seed).permutation(3)
            found = (model.encode_image(pixels, normalize=True) @ said.T).argmax(1)
            right += (found == torch.from_numpy(order)).tolist()
    assert crops.names == NAMES and np.mean(right) > 0.8


def test_it_goes_on_where_it_was(data, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.pt", tmp_path / "stopped.pt"
    options = ("--steps", "6", "--warmup", "2")
    train(monkeypatch, data, whole, *options, "--save_every", "6")
    save = torch.save

    def fail_after(kept, path):
        save(kept, path)
        if kept.get("step") == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail_after)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, data, stopped, *options, "--save_every", "2")
    monkeypatch.setattr(torch, "save", save)
    assert not stopped.exists()
    train(monkeypatch, data, stopped, *options, "--save_every", "2")
    first, second = (torch.load(path, weights_only=True) for path in (whole, stopped))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_texts_are_read_as_by_open_clip(clip):
    state = torch.load(clip, weights_only=True)
    word_ids = state.pop(WORD_IDS)
    model = train_small_clip.build_clip(model_config(PICO).segmenter, len(word_ids)).eval()
    model.load_state_dict(state)
    rows = rows_of(tokenize(["a photo of a car.", "kite", "There is the dog in the scene"]), word_ids)
    with torch.no_grad():
        torch.testing.assert_close(train_small_clip.encode_text(model, rows), model.encode_text(rows, normalize=True))


def test_what_is_built_on_it(clip, tmp_path, monkeypatch):
    """The ResNet goes into a model, the text tower makes vocabularies."""
    model = load_model(PICO, pretrained=False)
    text = take_clip(model, clip)
    state = torch.load(clip, weights_only=True)
    assert torch.equal(model.segmenter.backbone.conv1.weight, state["visual.conv1.weight"])
    assert torch.equal(text[WORD_IDS], state[WORD_IDS]) and text[WORD_IDS].dtype == torch.int64
    output = tmp_path / "v.safetensors"
    options = ["--text", str(clip), "--model", PICO, "--names", "dog", "car", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["make_vocabulary.py", *options])
    assert make_vocabulary_tool.main() == 0
    tower = load_text(model.config.segmenter, clip)
    assert torch.equal(read_vocabulary(output).vectors, make_vocabulary(tower, ["dog", "car"]).vectors)
    whole = torch.zeros(49408, state["token_embedding.weight"].shape[1])
    whole[state[WORD_IDS]] = state["token_embedding.weight"]
    large = tmp_path / "large.pt"
    torch.save({k: v for k, v in state.items() if k != WORD_IDS} | {"token_embedding.weight": whole}, large)
    torch.testing.assert_close(load_text(model.config.segmenter, large).encode(NAMES), tower.encode(NAMES))


def test_words_that_it_never_read_are_refused(clip):
    tower = load_text(model_config(PICO).segmenter, clip)
    with pytest.raises(VocabularyError, match=r"never read 'panda'.*knows \d+ pieces"):
        make_vocabulary(tower, ["dog", "panda"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0: needed is at least 1"),
        (["--model", "sam-vit-b"], "--model sam-vit-b has no CLIP"),
        (["--annotations", "none.json"], "none.json"),
    ],
)
def test_it_refuses_on_one_line(options, message, data, tmp_path, monkeypatch, capsys):
    def main():
        return train(monkeypatch, data, tmp_path / "clip.pt", *options)

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_state_of_another_run_is_refused(data, clip, monkeypatch):
    with pytest.raises(train_small_clip.TrainingError, match=r"state is of a run with .*'seed': 0.*Delete it"):
        train(monkeypatch, data, clip, "--seed", "1")


def test_names_go_along_when_a_model_is_converted(clip, tmp_path, monkeypatch):
    """The text tower in the new type, its words and vocabularies as they are; the model answers with words."""
    model = load_model(PICO, pretrained=False)
    text = take_clip(model, clip)
    save_model(model, tmp_path / "model")
    save_text(tmp_path / "model", text)
    vocabulary = make_vocabulary(load_text(model.config.segmenter, clip), NAMES)
    save_vocabulary(tmp_path / "model" / "vocabulary.safetensors", vocabulary)
    paths = ["--input", str(tmp_path / "model"), "--output", str(tmp_path / "half")]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *paths, "--to", "textsam", "--dtype", "fp16"])
    assert convert_checkpoint.main() == 0
    stored = load_file(tmp_path / "half" / "text.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name != WORD_IDS} == {torch.float16}
    assert torch.equal(stored[WORD_IDS], text[WORD_IDS])
    predictor = load_open_vocabulary(tmp_path / "half", device="cpu")
    assert torch.equal(predictor.vocabulary.vectors, vocabulary.vectors)
    predictor.set_vocabulary(["kite", "dog"])
    torch.testing.assert_close(predictor.vocabulary.vectors, vocabulary.vectors[[2, 1]], atol=5e-3, rtol=0)


def test_of_an_efficient_sam_what_fits_is_taken():
    """Its code of places, attention and last layers; the prompts and the label token stay."""
    torch.manual_seed(0)
    student, teacher = load_model(PICO, pretrained=False), load_model("efficient-sam-pico", pretrained=False)
    before = {name: tensor.clone() for name, tensor in student.segmenter.state_dict().items()}
    assert take_decoder(student, teacher)
    own, theirs = student.segmenter, teacher.segmenter
    assert torch.equal(own.position_matrix, theirs.position_matrix)
    ours, others = own.mask_decoder, theirs.mask_decoder
    pairs = [
        (ours.transformer.layers[1].self_attn.q_proj, others.transformer.layers[1].self_attn.q_proj),
        (ours.transformer.layers[0].layer_norm4, others.transformer.layers[0].norm4),
        (ours.transformer.layers[0].mlp.lin2, others.transformer.layers[0].mlp.layers[1]),
        (ours.transformer.layer_norm_final_attn, others.transformer.norm_final_attn),
        (ours.upscale_conv2, others.upscale2),
        (ours.upscale_layer_norm, others.upscale_norm),
        (ours.output_hypernetworks_mlps[0].proj_out, others.output_hypernetworks_mlps[0].layers[2]),
        (ours.output_hypernetworks_mlps[0].layers[0], others.output_hypernetworks_mlps[0].layers[1]),
    ]
    for mine, its in pairs:
        assert torch.equal(mine.weight, its.weight) and torch.equal(mine.bias, its.bias)
    assert torch.equal(ours.mask_tokens.weight, others.mask_tokens.weight[:1])
    same = [name for name, tensor in own.state_dict().items() if torch.equal(tensor, before[name])]
    kept = [name for name in same if name.startswith(("prompt_encoder.", "mask_decoder."))]
    starts = ("prompt_encoder.", "mask_decoder.iou_")
    assert [name for name in kept if name.endswith("weight") and "norm" not in name] == [
        name for name in before if name.startswith(starts) and name.endswith("weight") and "norm" not in name
    ]
