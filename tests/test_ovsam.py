"""Open-Vocabulary SAM: names of regions, vocabularies, and models put together from several files."""

import io
import json
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import named_predictor
from model.checkpoints import ovsam
from model.checkpoints.clip import load_text, save_text
from model.checkpoints.load import build_model, load_model, save_model
from model.checkpoints.rules import KeyMap, Section, named_tensors
from model.checkpoints.torchscript import is_torchscript, read_torchscript
from model.encoders.clip_text import ClipText
from model.everything import MaskGenerator
from model.named_predictor import OpenVocabularyPredictor, load_open_vocabulary
from model.predictor import ImagePredictor
from model.recognizers.open_vocabulary import LOGIT_SCALE, Recognizer, coarse_mask, mask_boxes, pyramid_level
from model.registry import model_config
from model.vocabulary import TEMPLATES, Vocabulary, make_vocabulary, read_vocabulary, save_vocabulary, wordings
from tools import assemble_ovsam as assemble_tool
from tools import make_vocabulary as vocabulary_tool
from utils.class_lists import read_class_list
from utils.errors import CheckpointError, ModelError, PromptError, VocabularyError
from utils.masks import encode_rle

PICO = "ovsam-pico"
WIDTH = 48


def lively(module, seed=0):
    """Give zeros, such as position tables and CLIP's last norms, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            if not tensor.any():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 - 0.1)
    return module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = build_model(model_config(PICO))
    for name, parameter in built.segmenter.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return lively(built)


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(1)
    config = model_config(PICO).segmenter
    tower = ClipText(config.text_width, config.text_heads, config.text_layers, config.embed_width)
    with torch.no_grad():
        tower.tower.token_embedding.weight.mul_(20)  # fresh, all phrases are nearly alike
    return tower.eval()


def random_vocabulary(names=5, prototypes=2, seed=0, **members):
    vectors = torch.randn(names, prototypes, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Vocabulary(tuple(f"thing {i}" for i in range(names)), F.normalize(vectors, dim=-1), **members)


@pytest.fixture
def predictor(model, text, picture):
    made = OpenVocabularyPredictor(model, random_vocabulary(), text)
    made.set_image(picture)
    return made


BOXES = torch.tensor(
    [[3.0, 5, 40, 60], [0, 0, 256, 256], [100, 20, 250, 200], [30, 30, 30, 30], [-20, 200, 60, 300], [9, 9, 12, 13]]
)


@torch.no_grad()
def test_regions_together_equal_one_by_one(model):
    """Boxes of several levels on two images, against a loop that reads one level for one box."""
    features = model.segmenter.encode_image(torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)))
    recognizer = Recognizer(model.segmenter, random_vocabulary(), 7)
    boxes = torch.cat([BOXES, torch.tensor([[0.0, 0, 1024, 1024]])])
    index = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    assert pyramid_level(boxes).tolist() == [0, 2, 1, 0, 0, 0, 3]
    seen, with_clip = (
        embed(features, boxes, index) for embed in (recognizer.embed_regions, recognizer.embed_with_clip)
    )
    assert (seen >= 0).all()
    assert not seen[3].any()
    assert with_clip[3].any()
    for i, image in enumerate(index):
        one = features[int(image)]
        zero = torch.zeros(1, dtype=torch.long)
        assert torch.allclose(recognizer.embed_regions(one, boxes[i : i + 1], zero)[0], seen[i], atol=1e-5)
        assert torch.allclose(recognizer.embed_with_clip(one, boxes[i : i + 1], zero)[0], with_clip[i], atol=1e-5)
    logits = recognizer.logits(seen)
    assert logits.shape == (7, 6)
    assert not logits[3].any()
    for i, embedding in enumerate(seen):
        for k, vectors in enumerate(recognizer.vocabulary.vectors):
            best = max(F.cosine_similarity(embedding, vector, dim=0) for vector in vectors)
            assert logits[i, k].item() == pytest.approx(LOGIT_SCALE * best.item(), abs=1e-3)


def test_fusion_by_hand(model):
    """Weights by kind of name, names of neither, and an empty mask."""
    is_base, is_novel = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 0, 1, 0]).bool()
    recognizer = Recognizer(model.segmenter, random_vocabulary(4, is_base=is_base, is_novel=is_novel))
    generator = torch.Generator().manual_seed(0)
    head, clip = (3 * torch.randn(2, 5, generator=generator) for _ in range(2))
    low = torch.full((2, 64, 64), -1.0)
    low[0, 10:50, 10:50] = 1
    fused = recognizer.fuse(head, clip, low)
    for row, weights in enumerate(([0.1, 0.1, 0.9, 0.0, 0.1], [0.0] * 5)):
        for k, weight in enumerate(weights):
            chances = head[row].softmax(0)[k].log() * (1 - weight) + clip[row].softmax(0)[k].log() * weight
            assert fused[row, k].item() == pytest.approx(-1000 if k == 3 else chances.item(), abs=1e-4)
    assert coarse_mask(low).shape == (2, 32, 32)
    alone = Recognizer(model.segmenter, random_vocabulary(4))
    assert alone._share.tolist() == pytest.approx([0.9] * 4 + [0.1])


def test_points_and_boxes_get_names(predictor):
    found = predictor.predict(points=[[[40, 30]], [[120, 90]]], top_k=3)
    assert found.masks.shape == (2, 120, 160)
    assert found.low_res.shape == (2, 64, 64)
    assert [len(names) for names in found.names] == [3, 3]
    assert found.probabilities.shape == (2, 3)
    assert (np.diff(found.probabilities) <= 0).all()
    assert (found.probabilities.sum(1) <= 1).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    alone = predictor.predict(points=[[120, 90]], top_k=99)
    assert alone.names[0][:3] == found.names[1]
    assert len(alone.names[0]) == 5
    boxed = predictor.predict(boxes=[20, 20, 100, 100])
    assert boxed.names != []


def test_both_branches_differ_from_the_head(model, picture):
    answers = []
    for branch in ("head", "both"):
        predictor = OpenVocabularyPredictor(model, random_vocabulary(), branch=branch)
        predictor.set_image(picture)
        answers.append(predictor.predict(points=[[40, 30]], top_k=5).probabilities)
    assert not np.allclose(*answers, atol=1e-3)


def test_other_names_do_not_read_the_image_again(predictor, model, monkeypatch):
    calls = []
    original = model.segmenter.encode_image
    monkeypatch.setattr(model.segmenter, "encode_image", lambda pixels: calls.append(1) or original(pixels))
    found = predictor.predict(points=[[40, 30]], vocabulary=["red panda", "Teapot/kettle"], top_k=2)
    assert sorted(found.names[0]) == ["Teapot/kettle", "red panda"]
    assert predictor.predict(points=[[40, 30]], vocabulary=["a", "b", "c"]).probabilities.shape == (1, 3)
    assert not calls


def test_masks_of_another_model_get_names(predictor, monkeypatch):
    """The same as for a mask of its own, where the box is the same; from arrays and from RLE."""
    found = predictor.predict(boxes=[20, 20, 100, 100], top_k=5)
    given = np.zeros((2, 120, 160), bool)
    given[0, 20:60, 30:90] = True
    monkeypatch.setattr(named_predictor, "AT_ONCE", 1)
    named = predictor.name_masks(given, top_k=5)
    scale = 256 / 160
    recognizer = predictor._recognizer
    boxes = torch.tensor([[30.0, 20, 90, 60]]) * scale
    with torch.no_grad():
        features = predictor.predictor._image.features
        logits = recognizer.logits(recognizer.embed_regions(features, boxes, torch.zeros(1, dtype=torch.long)))
    best = logits.softmax(-1)[0, :-1].sort(descending=True)
    assert named.names[0] == [predictor.vocabulary.names[i] for i in best.indices]
    assert named.probabilities[0] == pytest.approx(best.values.numpy(), abs=1e-5)
    assert named.probabilities[1] == pytest.approx([1 / 6] * 5)  # an empty mask, and "none of them"
    assert found.names[0]
    again = predictor.name_masks([{"segmentation": rle} for rle in encode_rle(given)], top_k=5)
    assert again.names == named.names
    plain = {"size": [120, 160], "counts": [20 * 160, 120 * 160 - 20 * 160]}
    assert predictor.name_masks([{"segmentation": plain}]).probabilities.shape == (1, 5)
    assert predictor.name_masks([]).probabilities.shape == (0, 5)
    with pytest.raises(PromptError, match="masks of another image"):
        predictor.name_masks([{"segmentation": given[0, :9]}])
    low = predictor._to_low_res(torch.from_numpy(given), (192, 256))
    assert low.shape == (2, 64, 64)
    assert mask_boxes(low)[0].tolist() == pytest.approx((boxes[0]).tolist(), abs=4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"points": [[161, 20]]}, PromptError, "outside the image, which is 160 wide"),
        ({"points": [[16, 20]], "top_k": 0}, PromptError, "top_k 0"),
        ({"points": [[16, 20]], "vocabulary": []}, VocabularyError, "empty"),
        ({"points": [[16, 20]], "vocabulary": ["cat", "dog", "cat"]}, VocabularyError, "there twice: 'cat'"),
        ({"points": [[16, 20]], "vocabulary": ["cat", " , "]}, VocabularyError, "name 2 is ' , '"),
        ({"points": [[16, 20]], "vocabulary": "cat"}, VocabularyError, "is the text 'cat'"),
        ({}, PromptError, "nothing to look for"),
    ],
)
def test_bad_questions(predictor, arguments, error, words):
    with pytest.raises(error, match=words):
        predictor.predict(**arguments)


def test_what_the_model_cannot_do(model, picture):
    with pytest.raises(PromptError, match="makes one mask of a prompt"):
        plain = ImagePredictor(model)
        plain.set_image(picture)
        plain.predict(points=[[40, 30]], multimask=True)
    with pytest.raises(ModelError, match="gives no names"):
        OpenVocabularyPredictor(build_model(model_config("sam-vit-pico")))
    with pytest.raises(ModelError, match="'clip': known are"):
        OpenVocabularyPredictor(model, branch="clip")
    silent = OpenVocabularyPredictor(model)
    with pytest.raises(VocabularyError, match="text tower, which was not loaded"):
        silent.set_vocabulary(["cat"])
    with pytest.raises(VocabularyError, match="no vocabulary set"):
        silent.predict(points=[[1, 1]])
    with pytest.raises(PromptError, match="no image set"):
        OpenVocabularyPredictor(model, random_vocabulary()).name_masks(np.zeros((2, 2), bool))
    narrow = Vocabulary(("a",), torch.ones(1, 1, 7))
    with pytest.raises(VocabularyError, match="7 channels, the model needs 48"):
        OpenVocabularyPredictor(model, narrow)


def test_everything_with_one_mask_per_point(model, picture):
    """All masks of the grid where nothing is filtered; the image stays set, so that they can be named."""
    named = OpenVocabularyPredictor(ImagePredictor(model), random_vocabulary())
    settings = {"points_per_side": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1.0}
    found = MaskGenerator(named.predictor, **settings).generate(picture)
    plain = ImagePredictor(model)
    plain.set_image(picture)
    for row in found:
        [point] = row["point_coords"]
        alone = plain.predict(points=[point])
        assert (row["segmentation"] != alone.masks[0]).sum() <= 2
        assert row["predicted_iou"] == pytest.approx(float(alone.scores[0]), abs=1e-3)
    assert len(found) > 1
    assert named.name_masks(found).probabilities.shape == (len(found), 5)


def test_masks_of_another_size(predictor):
    with pytest.raises(PromptError, match=r"needed is bool \[N, 120, 160\]"):
        predictor.name_masks(np.zeros((1, 10, 10), bool))


def test_the_resnet_stays_in_evaluation(model):
    """Its batch norms keep CLIP's statistics in training too."""
    segmenter = model.segmenter.train()
    assert not any(module.training for module in segmenter.backbone.modules())
    assert segmenter.neck.training
    segmenter.eval()


def test_wordings():
    assert wordings("tape_(sticky_cloth_or_paper)") == ["tape (sticky cloth", "paper)"]
    assert wordings("Bicycle,bikes/ bike ") == ["bicycle", "bikes", "bike"]
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 14


def test_vocabulary_equals_phrase_by_phrase(text):
    names = ("cat,kitten,puss", "dog")
    made = make_vocabulary(text, names)
    assert made.vectors.shape == (2, 3, WIDTH)
    for name, vectors in zip(names, made.vectors, strict=True):
        words = wordings(name)
        for number in range(3):
            word = words[number] if number < len(words) else words[0]
            parts = [F.normalize(text.encode([template.format(word)])[0], dim=0) for template in TEMPLATES]
            assert torch.allclose(vectors[number], F.normalize(torch.stack(parts).mean(0), dim=0), atol=1e-5)
    assert not torch.allclose(made.vectors[0], made.vectors[1], atol=1e-2)


def test_vocabulary_files(tmp_path):
    whole = random_vocabulary(3, is_base=torch.tensor([True, False, False]), is_novel=torch.tensor([False, True, True]))
    save_vocabulary(tmp_path / "v.safetensors", whole)
    read = read_vocabulary(tmp_path / "v.safetensors", whole.names)
    assert read.names == whole.names
    for name in ("vectors", "is_base", "is_novel"):
        assert torch.equal(getattr(read, name), getattr(whole, name))
    torch.save(whole.vectors, tmp_path / "published.pth")
    assert torch.equal(read_vocabulary(tmp_path / "published.pth", ["a", "b", "c"]).vectors, whole.vectors)
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901")
    torch.save({"a": torch.ones(2)}, tmp_path / "table.pth")
    for name, names, words in (
        ("none.safetensors", None, "no such vocabulary"),
        ("empty.safetensors", None, "is empty"),
        ("broken.safetensors", None, "is damaged"),
        ("published.pth", None, "not the names"),
        ("published.pth", ["a", "b"], "class list and vocabulary disagree: 2 names"),
        ("published.pth", ["a", "b", "a"], "there twice: 'a'"),
        ("table.pth", ["a"], "needed is one tensor"),
        ("v.safetensors", ["a", "b", "c"], "disagree: 'a' and 'thing 0'"),
        ("v.safetensors", ["a"], "disagree: 1 and 3 names"),
    ):
        with pytest.raises(VocabularyError, match=words):
            read_vocabulary(tmp_path / name, names)


class Clip(nn.Module):
    """What OpenAI's file holds: both towers and a few settings, halved."""

    def __init__(self, model, text):
        super().__init__()
        self.visual = model.segmenter.backbone
        for name, child in text.tower.named_children():
            setattr(self, name, child)
        self.positional_embedding, self.text_projection = text.tower.positional_embedding, text.tower.text_projection
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.register_buffer("input_resolution", torch.tensor(64))

    def forward(self, pixels):
        used = (self.positional_embedding, self.text_projection, self.logit_scale, self.input_resolution)
        used += (self.token_embedding.weight, *self.transformer.parameters(), *self.ln_final.parameters())
        return self.visual(pixels) + sum(tensor.sum() for tensor in used) * 0


@pytest.fixture(scope="module")
def published(model, text, tmp_path_factory):
    """The four files as they were published, CLIP's as a TorchScript archive."""
    folder = tmp_path_factory.mktemp("published")
    tensors = {f"segmenter.{name}": tensor for name, tensor in named_tensors(model.segmenter).items()}
    names = KeyMap(tensors, (Section("segmenter.", "", ovsam.OVSAM),)).theirs
    whole = {theirs[0]: tensors[ours].detach() for ours, theirs in names.items()}
    clip = Clip(model, text).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(clip, torch.randn(1, 3, 64, 64), check_trace=False).save(folder / "RN50x16.pt")
    sam = {n.replace("pe.", "prompt_encoder.", 1): t for n, t in whole.items() if n.startswith("pe.")}
    sam |= {"image_encoder.pos_embed": torch.ones(2), "mask_decoder.transformer.x": torch.ones(2)}
    torch.save(sam | {"mask_decoder.mask_tokens.weight": torch.ones(4, 256)}, folder / "sam_vit_h_4b8939.pth")
    neck = {n.replace("neck.", "neck_student.", 1): t for n, t in whole.items() if n.startswith("neck.")}
    torch.save({"state_dict": neck, "meta": {}}, folder / "sam2clip_vith_rn50x16.pth")
    rest = {n: t for n, t in whole.items() if n.startswith(("fpn_neck.", "mask_decoder."))}
    torch.save(rest, folder / "clip2sam_coco_rn50x16.pth")
    torch.save(whole, folder.parent / "whole.pth")
    return folder


def assert_same(found, model):
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_published_files_make_the_model(published, model, text):
    assert_same(load_model(published), model)
    assert_same(load_model(published.parent / "whole.pth"), model)
    tower = load_text(model.config.segmenter, published / "RN50x16.pt")
    phrases = ["a photo of a cat.", "There is a dog in the scene"]
    assert torch.allclose(tower.encode(phrases), text.encode(phrases), atol=1e-6)


def test_a_missing_part_is_named(published, tmp_path):
    files = sorted(published.iterdir())
    for file in files:
        parts = ovsam.PartFiles([other for other in files if other != file])
        with pytest.raises(CheckpointError, match="is missing: ") as error:
            parts.require_all()
        published_as = {"RN50x16": "RN50x16.pt", "sam_vit": "sam_vit_h", "sam2clip": "sam2clip", "clip2sam": "clip2sam"}
        assert next(text for start, text in published_as.items() if file.name.startswith(start)) in str(error.value)
    with pytest.raises(ModelError, match="published in four files"):
        load_model("ovsam-rn50x16")
    with pytest.raises(CheckpointError, match=r"one part of Open-Vocabulary SAM.*assemble_ovsam"):
        load_model(published / "sam2clip_vith_rn50x16.pth")
    torch.save({"neck_student.x": torch.ones(1), "other.y": torch.ones(1)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors of no part of Open-Vocabulary SAM: other\.y"):
        ovsam.PartFiles([tmp_path / "odd.pth"])
    lacking = torch.load(published / "clip2sam_coco_rn50x16.pth")
    del lacking["fpn_neck.fpn_convs.1.conv.bias"]
    torch.save(lacking, tmp_path / "clip2sam.pth")
    with pytest.raises(CheckpointError, match=r"CLIP2SAM feature pyramid: fpn_neck\.fpn_convs\.1\.conv\.bias"):
        from model.checkpoints.load import assemble_ovsam

        assemble_ovsam(ovsam.PartFiles([tmp_path / "clip2sam.pth", *files]))


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    return tool.main()


def test_commands_make_a_folder_that_answers(published, model, tmp_path, monkeypatch, picture):
    """Four files and a list of names become one folder, which gives a mask and a name."""
    (tmp_path / "names.txt").write_text("red panda\nteapot, kettle\n\ncar_(automobile)\n")
    words, listed = tmp_path / "v.safetensors", ("--classes", tmp_path / "names.txt")
    list_and_text = (*listed, "--text", published, "--model", PICO)
    assert run(vocabulary_tool, monkeypatch, "--output", words, *list_and_text) == 0
    out = tmp_path / "folder"
    files = sorted(published.iterdir())
    assert run(assemble_tool, monkeypatch, *files, "--output", out, "--vocabulary", words) == 0
    assert_same(load_model(out), model)
    again = tmp_path / "again.safetensors"
    assert run(vocabulary_tool, monkeypatch, "--output", again, *listed, "--text", out) == 0
    assert read_vocabulary(again).vectors.equal(read_vocabulary(words).vectors), "the folder says which model it is"
    predictor = load_open_vocabulary(out, device="cpu")
    predictor.set_image(picture)
    found = predictor.predict(points=[[40, 30]])
    assert sorted(found.names[0]) == ["car_(automobile)", "red panda", "teapot, kettle"]
    predictor.set_vocabulary(["one", "two"])
    assert len(predictor.predict(points=[[40, 30]]).names[0]) == 2
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        run(assemble_tool, monkeypatch, *files, "--output", out)
    with pytest.raises(VocabularyError, match="no text tower"):
        run(vocabulary_tool, monkeypatch, "--output", words, "--names", "a", "--text", tmp_path, "--model", PICO)
    with pytest.raises(ModelError, match="gives no names"):
        load_open_vocabulary("nano", device="cpu")


def test_class_lists(tmp_path, monkeypatch):
    lvis = [{"id": 2, "name": "zebra", "frequency": "f"}, {"id": 1, "name": "apple", "frequency": "r"}]
    (tmp_path / "lvis.json").write_text(json.dumps({"categories": lvis}))
    found = read_class_list(tmp_path / "lvis.json")
    assert found.names == ("apple", "zebra")
    assert found.rare == (True, False)
    torch.save(random_vocabulary(2).vectors, tmp_path / "published.pth")
    output = tmp_path / "v.safetensors"
    rest = ("--published", tmp_path / "published.pth", "--model", PICO, "--classes", tmp_path / "lvis.json")
    assert run(vocabulary_tool, monkeypatch, "--output", output, *rest) == 0
    read = read_vocabulary(output)
    assert read.is_novel.tolist() == [True, False]
    assert read.is_base.tolist() == [False, True]
    (tmp_path / "base.txt").write_text("zebra\n")
    assert run(vocabulary_tool, monkeypatch, "--output", output, *rest, "--base", tmp_path / "base.txt") == 0
    assert read_vocabulary(output).is_novel is None
    (tmp_path / "base.txt").write_text("zebras\n")
    with pytest.raises(VocabularyError, match="Did you mean 'zebra'"):
        run(vocabulary_tool, monkeypatch, "--output", output, *rest, "--base", tmp_path / "base.txt")
    for name, content, words in (
        ("a.json", "{", "not an annotation file"), ("b.json", "{}", "no 'categories'"), ("c.txt", "\n", "no names"),
        ("d.json", '{"categories": [{"id": 1}]}', "no 'categories'"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(VocabularyError, match=words):
            read_class_list(tmp_path / name)
    with pytest.raises(VocabularyError, match="no such class list"):
        read_class_list(tmp_path / "none.txt")


def test_a_text_tower_that_does_not_fit(published, tmp_path, model, text):
    config = model.config.segmenter
    with pytest.raises(CheckpointError, match=r"no CLIP text tower. Needed are OpenAI's weights with QuickGELU"):
        load_text(config, published / "clip2sam_coco_rn50x16.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        load_text(config, tmp_path / "none.pt")
    state = dict(text.tower.state_dict())
    save_text(tmp_path, state)
    assert torch.equal(load_text(config, tmp_path / "text.safetensors").encode(["cat"]), text.encode(["cat"]))
    del state["ln_final.bias"]
    save_text(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"width 32, 2 layers, 48 channels out\): ln_final\.bias"):
        load_text(config, tmp_path / "text.safetensors")


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def archive(path, content, **records):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/constants.pkl", b"")
        file.writestr("a/data.pkl", content)
        for name, data in records.items():
            file.writestr(f"a/data/{name}", data)


def test_hostile_archives_are_refused(published, tmp_path, capsys):
    assert is_torchscript(published / "RN50x16.pt")
    assert not is_torchscript(published / "clip2sam_coco_rn50x16.pth")
    path = tmp_path / "evil.pt"
    archive(path, pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match=r"print', which no file of weights needs"):
        read_torchscript(path)
    assert "code was run" not in capsys.readouterr().out
    for count, data in ((1 << 40, b"1234"), (1, b"12345678")):
        content = io.BytesIO()
        pickler = pickle.Pickler(content, protocol=2)
        pickler.persistent_id = lambda value, n=count: (
            ("storage", "FloatStorage", "0", "cpu", n) if value is Ellipsis else None
        )
        pickler.dump([...])
        archive(path, content.getvalue(), **{"0": data})
        with pytest.raises(CheckpointError, match="numbers in the"):
            read_torchscript(path)
    archive(path, b"\x80\x02broken")
    with pytest.raises(CheckpointError, match="damaged TorchScript archive"):
        read_torchscript(path)
    save = (published / "RN50x16.pt").read_bytes()
    path.write_bytes(save[: len(save) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(path)


def test_our_folder_comes_back(model, tmp_path):
    save_model(model, tmp_path)
    assert_same(load_model(tmp_path), model)
