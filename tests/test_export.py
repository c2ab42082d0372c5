"""Exported graphs say what the model says, and what is not a sound export is refused."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from configs.export import ExportArgs
from configs.inference import InferenceArgs
from model import image_runner
from model.checkpoints.load import build_model, load_model, save_model
from model.evf import EVFModel
from model.export import build, onnx, pt2, tensorrt
from model.export.engine import load_engine, read_engine
from model.export.graphs import BATCH, POINTS, PointDecoder, Samples, build_graphs, embed_points
from model.export.programs import to_program
from model.export.verify import check
from model.predictor import ImagePredictor, load_predictor
from model.prompts import read_prompts, to_input
from model.registry import bundled_folder, model_config
from model.types import ImageFeatures, Prompts
from tests.conftest import ROOT, TOKENIZER, lively_model, make_picture
from utils.errors import CheckpointError, MissingPackageError, ModelError, PromptError

POINT_FAMILIES = ("sam", "sam2", "efficientvit_sam")
TOLERANCE = 1e-4

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="pip install -r requirements-dev.txt",
)


def points_model(family):
    """Return a model without phrases, as a plain file is loaded."""
    model = lively_model(family)
    name = model.config.segmenter_name
    return EVFModel(model_config(name), model.segmenter).eval()


def export(model, out, runtime, **options):
    checkpoint = out.with_name(out.name + "_model")
    save_model(model, checkpoint, None if model.encoder is None else TOKENIZER)
    text = build.run(ExportArgs(version=str(checkpoint), out=str(out), format=runtime, **options))
    assert "image_embeddings" in text
    return out


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Return a function from family, kind of prompt and runtime to an engine and its model; read only."""
    made = {}

    def make(family, kind, runtime):
        key = (family, kind, runtime)
        if key not in made:
            torch.set_num_threads(1)
            if family == "nano":
                model, out = load_model("nano", dtype=torch.float32), tmp_path_factory.mktemp("nano") / "engine"
                build.run(ExportArgs(version="nano", out=str(out), format=runtime))
            else:
                model = points_model(family) if kind == "points" else lively_model(family)
                out = export(model, tmp_path_factory.mktemp(family) / "engine", runtime)
            made[key] = (out, model)
        return made[key]

    return make


@pytest.fixture
def engine_copy(engines, tmp_path):
    """Return an engine of points that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(engines("efficientvit_sam", "points", "pt2")[0], folder)
    return folder


def same(one, other):
    assert np.abs(one.logits - other.logits).max() < TOLERANCE
    assert np.abs(one.scores - other.scores).max() < TOLERANCE
    assert np.abs(other.logits[one.masks != other.masks]).max(initial=0.0) < TOLERANCE


CASES = [
    pytest.param("efficientvit_sam", "points", "pt2"),
    pytest.param("nano", "phrases", "pt2"),
    pytest.param("efficientvit_sam", "points", "onnx", marks=needs_onnx),
    pytest.param("sam", "points", "pt2", marks=pytest.mark.slow),
    pytest.param("sam2", "points", "pt2", marks=pytest.mark.slow),
    pytest.param("sam2", "phrases", "pt2", marks=pytest.mark.slow),
    *(
        pytest.param(family, kind, "onnx", marks=[needs_onnx, pytest.mark.slow])
        for family, kind in (
            ("nano", "phrases"), ("sam", "points"), ("sam2", "points"), ("sam", "phrases"), ("sam2", "phrases"),
            ("efficient_sam", "phrases"), ("efficientvit_sam", "phrases"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "runtime"), CASES)
def test_an_engine_answers_as_its_model(engines, family, kind, runtime):
    folder, model = engines(family, kind, runtime)
    picture, other = make_picture(), make_picture()[::-1, :100].copy()
    words = None if kind == "points" else load_engine(folder).tokenizer
    eager, engine = ImagePredictor(model, words), load_engine(folder)
    eager.set_image(picture)
    engine.set_image(picture)
    if kind == "phrases":
        phrases = ["a red box", "the small blue one on the right of the other", "all"]
        same(engine.predict(phrases), eager.predict(phrases))
        same(engine.predict("a red box"), eager.predict("a red box"))
        images, several = [picture, other, picture], [["one", "two things"], ["the third"], ["a", "b"]]
        for one, expected in zip(
            engine.predict_batch(images, several), eager.predict_batch(images, several), strict=True
        ):
            same(one, expected)
        assert np.ptp(eager.predict(phrases).logits, axis=0).max() > 10 * TOLERANCE, "phrases make no difference"
        with pytest.raises(PromptError, match="phrases alone"):
            engine.predict(boxes=[10, 10, 80, 90])
        return
    prompts = (
        {"points": [[50.0, 40.0]]},
        {"points": [[50.0, 40.0], [120.0, 90.0]], "labels": [1, 0]},
        {"boxes": [30.0, 20.0, 90.0, 60.0]},
        {"boxes": [[30, 20, 90, 60], [100, 70, 150, 110]]},
        {"boxes": [30.0, 20.0, 90.0, 60.0], "points": [[50.0, 40.0]]},
    )
    found = [(engine.predict(**prompt), eager.predict(**prompt)) for prompt in prompts]
    for one, expected in found:
        same(one, expected)
    assert np.abs(found[0][1].logits - found[2][1].logits).max() > 10 * TOLERANCE, "prompts make no difference"
    with pytest.raises(PromptError, match="cannot use masks"):
        engine.predict(masks=found[0][0].low_res)


@pytest.mark.parametrize("family", POINT_FAMILIES)
class TestPointDecoder:
    """The wrapped module against the model's own prompt encoder, in float64, before anything is exported."""

    def setup(self, family, single_mask=False):
        model = points_model(family)
        first, *finer = (level.double() for level in Samples(model).features(1))
        decoder = PointDecoder(model.double().segmenter, single_mask)

        def decode(coords, labels):
            with torch.inference_mode():
                return decoder(first, torch.tensor(coords).double(), torch.tensor(labels).double(), *finer)

        def expected(sparse=None, **prompts):
            with torch.inference_mode():
                if sparse is None:
                    sparse, _ = model.segmenter.encode_prompts(Prompts(**prompts))
                return model.segmenter.decode(ImageFeatures(first, tuple(finer)), sparse)

        return model, decode, expected

    def test_a_lone_point_gets_its_padding(self, family):
        model, decode, expected = self.setup(family)
        coords, labels = [[[70.0, 55.0]]], [[1.0]]
        masks, iou = decode(coords, labels)
        wanted = expected(points=torch.tensor(coords).double(), labels=torch.tensor([[1]]))
        assert torch.allclose(masks, wanted.logits, atol=1e-12)
        assert torch.allclose(iou, wanted.iou, atol=1e-12)
        padded, _ = decode([[[70.0, 55.0], [0.0, 0.0]]], [[1.0, -1.0]])
        assert torch.allclose(padded, masks, atol=1e-12)
        bare = embed_points(model.segmenter, torch.tensor(coords).double(), torch.tensor(labels).double())
        assert (expected(bare).logits - masks).abs().max() > 1e-3

    def test_a_box_is_its_two_corners(self, family):
        _, decode, expected = self.setup(family)
        box = [30.0, 20.0, 170.0, 130.0]
        masks, _ = decode([[box[:2], box[2:]]], [[2.0, 3.0]])
        assert torch.allclose(masks, expected(boxes=torch.tensor([box]).double()).logits, atol=1e-12)
        both, _ = decode([[[70.0, 55.0], box[:2], box[2:]]], [[0.0, 2.0, 3.0]])
        wanted = expected(
            boxes=torch.tensor([box]).double(),
            points=torch.tensor([[[70.0, 55.0]]]).double(),
            labels=torch.tensor([[0]]),
        )
        assert torch.allclose(both, wanted.logits, atol=1e-12)

    def test_each_prompt_of_a_call_keeps_its_own_rule(self, family):
        _, decode, _ = self.setup(family)
        coords = [[[70.0, 55.0], [20.0, 90.0]], [[30.0, 20.0], [170.0, 130.0]], [[70.0, 55.0], [0.0, 0.0]]]
        labels = [[1.0, 0.0], [2.0, 3.0], [1.0, -1.0]]
        together, _ = decode(coords, labels)
        for row in range(3):
            alone, _ = decode(coords[row : row + 1], labels[row : row + 1])
            assert torch.allclose(together[row : row + 1], alone, atol=1e-12)

    def test_single_mask_is_the_best_of_all_four(self, family):
        _, decode, _ = self.setup(family)
        _, decode_one, _ = self.setup(family, single_mask=True)
        coords, labels = [[[70.0, 55.0]], [[20.0, 90.0]]], [[1.0], [1.0]]
        masks, iou = decode(coords, labels)
        one, score = decode_one(coords, labels)
        assert one.shape == (2, 1, *masks.shape[2:])
        for row in range(2):
            best = int(iou[row].argmax())
            assert torch.equal(one[row, 0], masks[row, best])
            assert score[row, 0] == iou[row, best]

    def test_the_model_is_left_as_it_was(self, family):
        model, decode, _ = self.setup(family)
        decode([[[70.0, 55.0]]], [[1.0]])
        assert not any(module._forward_pre_hooks for module in model.modules())


@needs_onnx
def test_the_published_names_and_dynamic_axes(engines):
    """mit-han-lab/efficientvit's export, with the number of prompts and points left open."""
    import onnxruntime

    folder, _ = engines("efficientvit_sam", "points", "onnx")
    stated = json.loads((folder / "engine.json").read_text())["graphs"]
    for name, graph in stated.items():
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        assert {value.name: value.shape for value in session.get_inputs()} == graph["inputs"]
        assert {value.name: value.shape for value in session.get_outputs()} == graph["outputs"]
    assert stated["image_encoder"]["inputs"] == {"input_image": ["batch_size", 3, 128, 128]}
    assert stated["decoder"]["inputs"] == {
        "image_embeddings": [1, 256, 16, 16],
        "point_coords": ["batch_size", "num_points", 2],
        "point_labels": ["batch_size", "num_points"],
    }
    assert stated["decoder"]["outputs"] == {
        "masks": ["batch_size", 4, 64, 64], "iou_predictions": ["batch_size", 4],
    }  # fmt: skip
    assert b"site-packages" not in (folder / "decoder.onnx").read_bytes(), "paths of this machine are in the file"


def test_what_was_seen_is_stored(engines):
    folder, _ = engines("efficientvit_sam", "points", "pt2")
    stated = json.loads((folder / "engine.json").read_text())
    assert stated["tolerance"] == 1e-4
    assert {one["sizes"].get("num_points") for one in stated["differences"]} == {None, 1, 2, 3}
    assert {one["output"] for one in stated["differences"]} == {"image_embeddings", "masks", "iou_predictions"}
    assert all(one["difference"] <= 1e-4 < one["largest"] for one in stated["differences"])
    assert stated["image"]["size"] == 128
    assert stated["prompt_frame"] == 256
    sizes = [file.stat().st_size for file in folder.glob("*.pt2")]
    weights = sum(p.nbytes for p in points_model("efficientvit_sam").parameters())
    assert sum(sizes) < 1.2 * weights, "weights are stored twice"


class TestVerification:
    def graphs(self):
        return build_graphs(points_model("efficientvit_sam"))

    def test_a_graph_of_other_weights_is_refused(self):
        other = points_model("efficientvit_sam")
        with torch.no_grad():
            other.segmenter.mask_decoder.iou_prediction_head.proj_out.bias.add_(1e-3)
        with pytest.raises(ModelError, match=r"decoder differs .* iou_predictions .*--tolerance"):
            check(self.graphs()[1], build_graphs(other)[1].module, 1e-4)
        assert check(self.graphs()[1], build_graphs(other)[1].module, 1e-2)

    @pytest.mark.parametrize("change", [lambda t: t * torch.nan, lambda t: t[:, :2], lambda t: t.double()])
    def test_no_numbers_other_shapes_and_types_are_refused(self, change):
        graph = self.graphs()[0]
        with pytest.raises(ModelError, match="image_encoder"):
            check(graph, lambda *inputs: tuple(change(one) for one in graph.module(*inputs)), 1e-4)

    def test_a_refused_export_leaves_nothing_behind(self, tmp_path, monkeypatch):
        def tampered(graph):
            program = to_program(graph)
            name = next(name for name, value in program.state_dict.items() if value.is_floating_point())
            program.state_dict[name] = torch.nn.Parameter(program.state_dict[name] + 0.1)
            return program

        monkeypatch.setattr(pt2, "to_program", tampered)
        save_model(points_model("efficientvit_sam"), tmp_path / "model")
        out = tmp_path / "deep" / "engine"
        with pytest.raises(ModelError, match="Nothing was written"):
            build.run(ExportArgs(version=str(tmp_path / "model"), out=str(out), format="pt2"))
        assert list((tmp_path / "deep").iterdir()) == []

    def test_every_case_of_the_decoder_has_points_boxes_and_padding(self):
        labels = Samples(points_model("sam")).points({BATCH: 3, POINTS: 3})[2]
        assert torch.isin(labels[0], torch.tensor([0.0, 1.0])).all()
        assert labels[1, :2].tolist() == [2.0, 3.0]
        assert labels[2, -1] == -1.0


class TestOptions:
    def refused(self, kind, match, **options):
        with pytest.raises(kind, match=match) as caught:
            build.run(ExportArgs(**{"version": "nano", "format": "pt2", **options}))
        assert "\n" not in str(caught.value)

    def test_folders(self, tmp_path, engine_copy):
        (tmp_path / "file").write_text("")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("")
        self.refused(ModelError, "exists. Give another folder, or replace it", out=str(engine_copy))
        self.refused(ModelError, "not an engine", out=str(tmp_path / "other"), overwrite=True)
        self.refused(ModelError, "not an engine", out=str(tmp_path / "file"), overwrite=True)
        self.refused(ModelError, "is a file", out=str(tmp_path / "file" / "engine"))

    def test_values(self, tmp_path):
        self.refused(ModelError, "--tolerance -1", out=str(tmp_path / "e"), tolerance=-1.0)
        self.refused(
            ModelError, "--single_mask is for models that take points", out=str(tmp_path / "e"), single_mask=True
        )
        self.refused(ModelError, "Unknown model", out=str(tmp_path / "e"), version="nanno")

    def test_a_segmenter_without_prompts(self, tmp_path):
        save_model(build_model(model_config("efficient-sam-pico")), tmp_path / "model")
        self.refused(ModelError, "takes no prompts", out=str(tmp_path / "e"), version=str(tmp_path / "model"))

    def test_overwrite_replaces_all_of_it(self, engine_copy, monkeypatch):
        def write(model, graphs, folder, *rest):
            assert (engine_copy / "old.onnx").is_file(), "gone before there is another"
            (folder / "engine.json").write_text("{}")
            return []

        monkeypatch.setattr(build, "write_engine", write)
        (engine_copy / "old.onnx").write_text("")
        build.run(ExportArgs(version="nano", out=str(engine_copy), format="pt2", overwrite=True))
        assert {path.name for path in engine_copy.iterdir()} == {"engine.json"}
        assert {path.name for path in engine_copy.parent.iterdir()} == {"copy"}

    def test_missing_packages_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
        self.refused(MissingPackageError, "pip install onnx onnxscript", out=str(tmp_path / "e"), format="onnx")
        assert not (tmp_path / "e").exists()

    def test_without_tensorrt_the_commands_are_named(self, tmp_path, monkeypatch):
        written = []
        monkeypatch.setattr(tensorrt, "is_installed", lambda: False)
        monkeypatch.setattr(build.onnx, "require", lambda packages, what: None)
        monkeypatch.setattr(build, "write_engine", lambda *given: written.append(given[4]) or [])
        save_model(points_model("efficientvit_sam"), tmp_path / "model")
        with pytest.raises(MissingPackageError) as caught:
            out = tmp_path / "e"
            build.run(ExportArgs(version=str(tmp_path / "model"), out=str(out), format="tensorrt"))
        assert written == ["onnx"]
        assert out.is_dir()
        text = str(caught.value)
        assert "--minShapes=input_image:1x3x128x128 --optShapes=input_image:4x3x128x128" in text
        assert (
            "--minShapes=point_coords:1x1x2,point_labels:1x1 --optShapes=point_coords:16x2x2,point_labels:16x2" in text
        )


class TestEngineFolder:
    def refused(self, folder, match):
        with pytest.raises(CheckpointError, match=match) as caught:
            load_engine(folder)
        assert "\n" not in str(caught.value)

    def test_no_engine(self, tmp_path):
        self.refused(tmp_path, "is not an engine")
        self.refused(bundled_folder("nano"), "is not an engine")
        (tmp_path / "engine.json").write_text("{")
        self.refused(tmp_path, "not JSON")
        (tmp_path / "engine.json").write_text("{}")
        self.refused(tmp_path, "format None")

    def test_another_graph(self, engine_copy):
        with (engine_copy / "decoder.pt2").open("ab") as file:
            file.write(b"x")
        self.refused(engine_copy, "SHA-256 differs")
        (engine_copy / "decoder.pt2").unlink()
        self.refused(engine_copy, "no file 'decoder.pt2'")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda d: d.pop("graphs"), "lacks 'graphs'"),
            (lambda d: d["graphs"].pop("decoder"), "lacks 'decoder'"),
            (lambda d: d["files"].pop("decoder.pt2"), "no SHA-256"),
            (lambda d: d["files"].update({"../model": "0"}), "no file '../model'"),
            (lambda d: d["graphs"]["decoder"].update(file="../decoder.pt2"), "no SHA-256"),
            (lambda d: d.update(runtime="openvino"), "unknown runtime"),
            (lambda d: d["model"].update(family="sam9"), "family"),
            (lambda d: d.update(version=2), "version 2"),
        ],
    )
    def test_another_description(self, engine_copy, change, match):
        path = engine_copy / "engine.json"
        stated = json.loads(path.read_text())
        change(stated)
        path.write_text(json.dumps(stated))
        self.refused(engine_copy, match)

    def test_a_plan_of_tensorrt_runs_elsewhere(self, engine_copy):
        path = engine_copy / "engine.json"
        path.write_text(path.read_text().replace('"runtime": "pt2"', '"runtime": "tensorrt"'))
        with pytest.raises(ModelError, match="TensorRT"):
            load_engine(engine_copy)


class TestHostilePrograms:
    """torch.export.load unpickles and evaluates what a file says; these never get so far."""

    def rewritten(self, folder, tmp_path, change, extra=()):
        with zipfile.ZipFile(folder / "image_encoder.pt2") as archive:
            files = {file.filename: archive.read(file) for file in archive.infolist()}
        root = next(iter(files)).split("/")[0]
        for name, content in extra:
            files[f"{root}/{name}"] = content
        path = tmp_path / "changed.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, change(content.decode()).encode() if name.endswith(".json") else content)
        return path

    @pytest.mark.parametrize(
        ("old", "new", "match"),
        [
            ('"use_pickle": false', '"use_pickle": true', "pickled"),
            ("Symbol('s", "__import__('os').system('true') or Symbol('s", "expression"),
            ("torch.ops.aten.conv2d.default", "torch.hub.load", "calls 'torch.hub.load'"),
            ("torch.ops.aten.conv2d.default", "torch.ops.aten.from_file.default", "calls"),
        ],
    )
    def test_code(self, engines, tmp_path, old, new, match):
        folder, _ = engines("efficientvit_sam", "points", "pt2")
        assert old in (folder / "image_encoder.pt2").read_bytes().decode("latin-1")
        path = self.rewritten(folder, tmp_path, lambda text: text.replace(old, new))
        with pytest.raises(CheckpointError, match=match):
            pt2.Pt2Runner(path, torch.device("cpu"))

    def test_files(self, engines, tmp_path):
        folder, _ = engines("efficientvit_sam", "points", "pt2")
        path = self.rewritten(folder, tmp_path, lambda text: text)
        assert pt2.check_archive(path) is None
        for name in ("data/sample_inputs/model.pt", "data/constants/custom_obj_0", "data/aotinductor/model/model.so"):
            path = self.rewritten(folder, tmp_path, lambda text: text, [(name, b"cos\nsystem\n")])
            with pytest.raises(CheckpointError, match="nothing that a program needs"):
                pt2.check_archive(path)
        path.write_bytes(b"PK no")
        with pytest.raises(CheckpointError, match=r"no \.pt2 file"):
            pt2.check_archive(path)


class TestInference:
    def options(self, engine, tmp_path, **values):
        return InferenceArgs(
            engine=str(engine), image_path=str(ROOT / "assets" / "scenes" / "koalas.jpg"),
            vis_save_path=str(tmp_path / "out"), **{"prompt": ("the koala on the left", "koalas"), **values},
        )  # fmt: skip

    @pytest.mark.parametrize("runtime", ["pt2", pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])])
    def test_an_engine_of_nano_finds_what_nano_finds(self, engines, tmp_path, runtime):
        folder, _ = engines("nano", "phrases", runtime)
        options = self.options(folder, tmp_path, save_logits=True)
        assert image_runner.run(options) == 0
        predictor = load_predictor("nano", "cpu")
        predictor.set_image(options.image_path)
        expected = predictor.predict(options.prompt)
        for k in range(2):
            logits = np.load(tmp_path / "out" / f"koalas_{k}_logits.npy")
            assert expected.masks[k].sum() > 1000
            assert ((logits > 0) != expected.masks[k]).sum() <= 4
            assert np.abs(logits - expected.logits[k]).max() < 1e-3

    def test_another_engine_does_it_again(self, engines, tmp_path):
        folder, _ = engines("efficientvit_sam", "points", "pt2")
        one = self.options(folder, tmp_path)
        digests = {
            image_runner.settings_digest(dataclasses.replace(one, engine=engine), [])
            for engine in (None, "x", one.engine)
        }
        assert len(digests) == 3

    @pytest.mark.parametrize(
        "values",
        [{"version": "nano-video"}, {"load_in_8bit": True}, {"load_in_4bit": True}, {"compile": True},
         {"precision": "fp16"}, {"image_size": 224}, {"model_type": "sam2"}],
    )  # fmt: skip
    def test_options_about_weights_are_refused(self, engines, tmp_path, monkeypatch, values):
        monkeypatch.setattr(image_runner, "require_bitsandbytes", lambda option: None)
        folder, _ = engines("efficientvit_sam", "points", "pt2")
        with pytest.raises(ModelError, match=f"--engine and --{next(iter(values))} exclude each other"):
            image_runner.run(self.options(folder, tmp_path, **values))
        assert not (tmp_path / "out").exists()

    def test_an_engine_of_points_takes_no_phrases(self, engines, tmp_path):
        folder, _ = engines("efficientvit_sam", "points", "pt2")
        with pytest.raises(ModelError, match="takes points, not --prompt"):
            image_runner.run(self.options(folder, tmp_path))
        assert not (tmp_path / "out").exists()

    def test_nothing_of_it_is_imported_for_a_checkpoint(self):
        code = (
            "import sys, model.image_runner\n"
            "assert not {'onnx', 'onnxruntime', 'model.export', 'torch.onnx._internal.exporter'} & sys.modules.keys()"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_read_engine_knows_what_it_takes(engines):
    engine = read_engine(engines("nano", "phrases", "pt2")[0])
    assert engine.takes_phrases
    assert set(engine.graphs) == {"image_encoder", "fusion", "decoder"}
    assert engine.config == model_config("nano")


@pytest.mark.slow
@pytest.mark.parametrize("family", POINT_FAMILIES)
def test_an_engine_of_single_masks(family, tmp_path):
    model = points_model(family)
    engine = load_engine(export(model, tmp_path / "engine", "pt2", single_mask=True))
    eager = ImagePredictor(model)
    for predictor in (engine, eager):
        predictor.set_image(make_picture())
    found = engine.predict(points=[[50.0, 40.0]])
    assert found.masks.shape == (1, 120, 160)
    given = read_prompts((120, 160), [[50.0, 40.0]], None, None, None, side=64)
    prompts = to_input(given, eager.prompt_spec, (120, 160), eager.model)
    with torch.inference_mode():
        iou = model(eager._image.features, prompts=prompts).prediction.iou
    assert abs(float(iou.max()) - found.scores[0]) < TOLERANCE


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("name", ["efficientvit-sam-l0", "evf-sam2-hiera-tiny-base"])
def test_published_sizes(name, tmp_path):
    torch.manual_seed(0)
    model = load_model(name, pretrained=False)
    for graph in build_graphs(model):
        path = tmp_path / f"{graph.name}.onnx"
        onnx.write(graph, path)
        found = check(graph, onnx.OnnxRunner(path, torch.device("cpu")), 1e-4)
        assert max(one.largest for one in found) > 0.01
        path.unlink()
