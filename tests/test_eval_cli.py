"""eval.py as a user runs it: its numbers against a slow computation, on any number of processes, and its errors."""

import importlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.catalog import open_dataset
from datasets.collate import Collate
from datasets.loading import evaluation_batches
from model.checkpoints.load import save_published
from model.predictor import build_predictor, load_predictor
from tests import dataset_layouts as layouts
from tests.conftest import PICO, ROOT, TOKENIZER, lively_model, make_picture
from utils import evaluator
from utils.distributed import Ranks
from utils.errors import CheckpointError, DataError, ImageError, ModelError, PromptError, TextSAMError, TrainingError
from utils.evaluator import evaluate
from utils.metrics import published_scores, summarise
from utils.tokenizer import PhraseTokenizer

PUBLISHED_OPTIONS = (
    "--version", "--vis_save_path", "--precision", "--image_size", "--model_max_length", "--local_rank",
    "--load_in_8bit", "--load_in_4bit", "--model_type", "--val_dataset", "--dataset_dir",
)  # fmt: skip
SPLITS = ["refcoco|unc|val", "refcoco|unc|testA", "refcoco|unc|testB", "refcoco+|unc|val", "refcoco+|unc|testA"]
SPLITS += ["refcoco+|unc|testB", "refcocog|umd|val", "refcocog|umd|test"]
VAL = "refcoco|unc|val"
HEIGHT, WIDTH = 48, 64
KINDS = ("Red", "Blue", "Big")


@pytest.fixture(autouse=True)
def _single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lively")
    save_published(lively_model("efficient_sam"), folder, TOKENIZER)
    return folder


def write_scenes(root, count=5):
    """Write refcoco|unc|val with `count` images of 1 to 3 phrases, and a polygon list that overlaps."""
    images = layouts.coco_images(count)
    annotations, refs = [], []
    for i, image in enumerate(images):
        image["height"], image["width"] = HEIGHT + i, WIDTH
        boxes = [layouts.box(4 + 3 * i, 5, 20, 14), layouts.box(30, 20 + i, 16, 18)]
        overlapping = [layouts.box(2, 2, 12, 12), layouts.box(8, 8, 14, 14)]
        for k, polygons in enumerate([[boxes[0]], [boxes[1]], overlapping][: 1 + i % 3]):
            number = 10 * i + k + 1
            annotations.append(layouts.annotation(number, image, polygons))
            refs.append(layouts.make_ref(number, number, image, "val", f"The {KINDS[k]} Thing {i}"))
        path = root / layouts.REFER["refcoco"] / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.roll(make_picture(), 17 * i, axis=1))
        picture.resize((image["width"], image["height"])).save(path, quality=95)
    content = refs, {"images": images, "annotations": annotations, "categories": []}
    layouts.write_refer(root, content=content, with_images=False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Return a root with refcoco|unc|val of five images, which two processes cannot share equally."""
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root)
    return root


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Return a root with miniatures of all layouts."""
    root = tmp_path_factory.mktemp("everything")
    layouts.write_everything(root)
    layouts.write_ade20k(root, "validation")
    return root


@pytest.fixture
def run(monkeypatch, capsys, checkpoint, scenes):
    """Return a function that runs eval.py here and gives back what it printed."""

    def run(*words, **options):
        given = {"version": checkpoint, "dataset_dir": scenes, "device": "cpu", "workers": 0} | options
        listed = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["eval.py", *listed, *map(str, words)])
        assert importlib.import_module("eval").main() == 0
        return capsys.readouterr().out

    return run


def script(*words, processes=0):
    """Run eval.py in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    return subprocess.run(
        [sys.executable, *launcher, "eval.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def read(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [json.loads(line) for line in (folder / "phrases.jsonl").read_text().splitlines()]
    return metrics, rows


def files(folder):
    """Return every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def slow_rows(checkpoint, root, name, lowercase):
    """Measure phrase by phrase with the predictor, and count pixel sets with numpy.

    Returns:
        per phrase (text, key, intersection, union).
    """
    predictor = load_predictor(checkpoint, "cpu", preprocessing="evaluation", max_length=62)
    dataset, rows = open_dataset(name, root), []
    for index in range(len(dataset)):
        sample = dataset.load(index)
        predictor.set_image(sample.image)
        for phrase, truth in zip(sample.phrases, sample.masks, strict=True):
            text = phrase.strip().lower() if lowercase else phrase
            predicted = predictor.predict(text).masks[0][truth != 255]
            target = truth[truth != 255] == 1
            rows.append((text, sample.key, int((predicted & target).sum()), int((predicted | target).sum())))
    return rows


def assert_equal_rows(rows, slow, tolerance=2):
    """Assert the same phrases in the same order; a few pixels may flip between one phrase and a batch of them."""
    assert [(row["phrase"], row["key"]) for row in rows] == [row[:2] for row in slow]
    for row, (*_, intersection, union) in zip(rows, slow, strict=True):
        assert abs(row["intersection"] - intersection) <= tolerance
        assert abs(row["union"] - union) <= tolerance
        assert row["iou"] == (row["intersection"] / row["union"] if row["union"] else 1.0)


class TestNumbers:
    def test_published_command_against_a_slow_computation(self, run, checkpoint, scenes, tmp_path):
        text = run(
            "--vis_save_path", tmp_path / "vis", "--precision", "fp32", "--image_size", 224, "--model_max_length", 62,
            "--local-rank", 0, "--model_type", "effi", "--val_dataset", VAL, "--out", tmp_path / "out",
        )  # fmt: skip
        metrics, rows = read(tmp_path / "out")
        slow = slow_rows(checkpoint, scenes, VAL, lowercase=True)
        assert len(slow) == 9
        assert_equal_rows(rows, slow)
        assert len({row["predicted"] for row in rows}) > 5, "the masks hardly differ: the test says little"
        found = metrics["datasets"][VAL]
        assert found["ciou"] == pytest.approx(sum(r[2] for r in slow) / sum(r[3] for r in slow), abs=1e-3)
        assert found["giou"] == pytest.approx(np.mean([r[2] / r[3] for r in slow]), abs=1e-3)
        assert (found["phrases"], found["images"], found["is_whole"]) == (9, 5, True)
        line = "giou: {:.4f}, ciou: {:.4f}".format(found["giou"], found["ciou"])
        assert text.splitlines()[-1] == line
        assert text.count("giou:") == 1
        assert not (tmp_path / "vis").exists()

    def test_polygons_that_overlap_count_as_published_with_the_reference_metric(self, run, tmp_path, scenes):
        run("--out", tmp_path / "ours")
        text = run("--out", tmp_path / "theirs", "--reference_metric")
        ours, theirs = read(tmp_path / "ours")[1], read(tmp_path / "theirs")[1]
        dataset = open_dataset(VAL, scenes, overlaps="sum")
        areas = [[int((mask == 1).sum()) for mask in dataset.load(i).masks] for i in range(len(dataset))]
        assert [row["target"] for row in theirs] == [area for image in areas for area in image]
        differs = [one["target"] != other["target"] for one, other in zip(ours, theirs, strict=True)]
        assert [i for i, is_so in enumerate(differs) if is_so] == [5], "only the phrase with two polygons"
        assert "published arithmetic of 1 processes" in text

    def test_two_processes_print_and_write_the_same_bytes(self, run, checkpoint, scenes, tmp_path):
        words = ["--version", checkpoint, "--dataset_dir", scenes, "--device", "cpu", "--val_dataset", VAL]
        done = script(*words, "--workers", 1, "--batch_size", 2, "--out", tmp_path / "two", processes=2)
        assert done.returncode == 0, done.stderr
        text = run("--val_dataset", VAL, "--batch_size", 2, "--out", tmp_path / "one")
        assert done.stdout == text
        assert sorted(files(tmp_path / "one")) == ["metrics.json", "phrases.jsonl", "worst.png"]
        assert files(tmp_path / "one") == files(tmp_path / "two")

    def test_two_processes_repeat_an_image_with_the_reference_metric(self, run, checkpoint, scenes, tmp_path):
        words = ["--version", checkpoint, "--dataset_dir", scenes, "--device", "cpu", "--workers", 0]
        done = script(*words, "--batch_size", 3, "--reference_metric", "--out", tmp_path / "two", processes=2)
        assert done.returncode == 0, done.stderr
        options = {"batch_size": 3, "out": tmp_path / "one"}
        assert done.stdout == run("--reference_metric", "--reference_world", 2, **options)
        assert files(tmp_path / "one") == files(tmp_path / "two")
        metrics, rows = read(tmp_path / "one")
        assert len(rows) == 9
        assert metrics["datasets"][VAL]["phrases"] == 10, "the first image, of one phrase, counts twice"

    @pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7, "workers": 2}])
    def test_batches_and_workers_change_nothing(self, run, tmp_path, options):
        run(out=tmp_path / "one", batch_size=4)
        run(out=tmp_path / "other", **options)
        one, other = read(tmp_path / "one")[1], read(tmp_path / "other")[1]
        for row, same in zip(one, other, strict=True):
            assert (row["id"], row["phrase"], row["target"]) == (same["id"], same["phrase"], same["target"])
            assert abs(row["intersection"] - same["intersection"]) <= 2
            assert abs(row["union"] - same["union"]) <= 2

    def test_low_precision(self, run, tmp_path):
        run(out=tmp_path / "full")
        run(out=tmp_path / "half", precision="bf16")
        full, half = (read(tmp_path / name)[0] for name in ("full", "half"))
        assert half["weights"] == "bfloat16"
        assert half["datasets"][VAL]["ciou"] == pytest.approx(full["datasets"][VAL]["ciou"], abs=0.05)
        assert half["datasets"] != full["datasets"]

    def test_eight_splits_their_mean_and_the_other_sets(self, run, checkpoint, everything, tmp_path):
        text = run(
            "--val_dataset", "all", "grefcoco|unc|val", "ade20k|validation", dataset_dir=everything, out=tmp_path
        )
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        found = metrics["datasets"]
        assert list(found) == [*SPLITS, "grefcoco|unc|val", "ade20k|validation"]
        assert metrics["mean"]["ciou"] == pytest.approx(np.mean([row["ciou"] for row in found.values()]), abs=1e-12)
        lines = text.splitlines()
        assert lines[-1].split() == ["mean", *(f"{100 * value:.2f}" for value in metrics["mean"].values())]
        assert lines[-12].split()[:3] == ["phrases", "cIoU", "gIoU"]
        assert sum(line.startswith("giou: ") for line in lines) == 10
        generalised = found["grefcoco|unc|val"]
        assert (generalised["empty_pixels"], generalised["no_target"]) == (50, 2)
        assert {"n_acc", "t_acc", "pr@0.7", "pr@0.8", "pr@0.9"} <= generalised.keys()
        assert "N-acc" in text
        assert found[VAL]["empty_pixels"] == 1
        assert "n_acc" not in found[VAL]
        for name in ("grefcoco|unc|val", "ade20k|validation"):
            folder = tmp_path / name.replace("|", "_")
            alone, rows = read(folder)
            assert alone["datasets"] == {name: found[name]}
            assert_equal_rows(rows, slow_rows(checkpoint, everything, name, lowercase=name.startswith("gref")))
        assert all(row["phrase"].startswith("[semantic] ") for row in rows)

    def test_own_data_keeps_its_phrases(self, run, checkpoint, tmp_path):
        layouts.write_image(tmp_path / "a.png", 3)
        polygon = layouts.box(5, 5, 20, 20)
        name = layouts.write_lines(
            tmp_path,
            {"image": "a.png", "phrase": "The Upper Half", "segmentation": [polygon]},
            {"image": "a.png", "phrase": "nothing", "segmentation": None},
        )
        text = run("--val_dataset", name, dataset_dir=tmp_path, out=tmp_path / "out")
        metrics, rows = read(tmp_path / "out")
        assert_equal_rows(rows, slow_rows(checkpoint, tmp_path, name, lowercase=False))
        assert rows[0]["phrase"] == "The Upper Half"
        assert metrics["datasets"][name]["no_target"] == 1
        assert "N-acc: " in text

    def test_large_images_are_resized_as_the_published_evaluation_does(self, run, checkpoint, tmp_path):
        side = load_predictor(checkpoint, "cpu").image_spec.size
        layouts.write_image(tmp_path / "a.png", 3, 2 * side, 2 * side + 100)
        record = {"image": "a.png", "phrase": "a cat", "segmentation": [layouts.box(50, 50, side, side)]}
        name = layouts.write_lines(tmp_path, record)
        run("--val_dataset", name, dataset_dir=tmp_path, out=tmp_path / "out")
        slow = slow_rows(checkpoint, tmp_path, name, lowercase=False)
        assert_equal_rows(read(tmp_path / "out")[1], slow, tolerance=20)
        predictor = load_predictor(checkpoint, "cpu", preprocessing="inference")
        predictor.set_image(tmp_path / "a.png")
        area = int(predictor.predict("a cat").masks.sum())
        assert abs(area - read(tmp_path / "out")[1][0]["predicted"]) > 1000, "the two ways of resizing hardly differ"


class TestOutput:
    def test_the_sheet_shows_the_worst(self, run, tmp_path, monkeypatch):
        from utils import evaluation_report

        shown = []
        draw = evaluation_report.draw_sheet
        monkeypatch.setattr(
            evaluation_report, "draw_sheet", lambda cases, *rest: shown.append(cases) or draw(cases, *rest)
        )
        monkeypatch.setattr(evaluation_report.WorstCases.__init__, "__defaults__", (4, 1))
        run(out=tmp_path, batch_size=2)
        _, rows = read(tmp_path)
        worst = sorted((row["iou"], -row["union"]) for row in rows)[:4]
        assert [(case.result.iou, -case.result.union) for case in shown[0]] == worst
        for case in shown[0]:
            assert evaluation_report.decode_rle(case.mask).sum() == case.result.predicted
        sheet = np.array(Image.open(tmp_path / "worst.png"))
        assert sheet.shape[1] > 1000
        assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100

    def test_a_phrase_that_was_left_out_is_an_error(self, run, monkeypatch, tmp_path):
        monkeypatch.setattr(evaluator, "evaluate", lambda *given, **named: evaluate(*given, **named)[:-1])
        with pytest.raises(TrainingError, match="8 of 9 phrases were measured"):
            run(out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_quick_look_says_so(self, run, tmp_path):
        text = run("--max_images", 2, out=tmp_path)
        assert "of the 5 that there are: NOT the score of the whole set" in text
        metrics, rows = read(tmp_path)
        assert metrics["datasets"][VAL]["images"] == 2
        assert not metrics["datasets"][VAL]["is_whole"]
        assert len({row["key"] for row in rows}) == 2

    def test_missing_images(self, run, tmp_path):
        write_scenes(tmp_path, 3)
        next((tmp_path / layouts.REFER["refcoco"]).iterdir()).unlink()
        with pytest.raises(DataError, match="no such image"):
            run(dataset_dir=tmp_path)
        text = run("--skip_missing", dataset_dir=tmp_path)
        assert "1 images missing: NOT the score of the whole set" in text

    def test_an_interrupted_run_leaves_nothing(self, run, tmp_path, monkeypatch):
        count = evaluator.count_pixels
        calls = []

        def interrupt(*masks):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return count(*masks)

        monkeypatch.setattr(evaluator, "count_pixels", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "kind", "parts"),
        [
            ({"val_dataset": "refcoco|unc|vall"}, DataError, ["'vall'", "Did you mean 'val'"]),
            ({"val_dataset": "refcocoo|unc|val"}, DataError, ["'refcocoo|unc|val'", "Did you mean 'refcoco|unc|val'"]),
            ({"val_dataset": "absent.jsonl"}, DataError, ["absent.jsonl"]),
            ({"dataset_dir": "/nowhere"}, DataError, ["refs(unc).p", "/nowhere"]),
            ({"model_type": "sam2"}, ModelError, ["--model_type sam2", PICO["efficient_sam"], "give effi"]),
            ({"version": "/nowhere/evf"}, CheckpointError, ["/nowhere/evf"]),
            ({"image_size": 448}, ModelError, ["--image_size 448", "224"]),
            ({"model_max_length": 5}, PromptError, ["allowed are 5", "the red thing"]),
            ({"batch_size": 0}, TrainingError, ["--batch_size 0", "at least 1"]),
            ({"max_images": 0}, TrainingError, ["--max_images 0"]),
            ({"workers": -1}, TrainingError, ["--workers -1"]),
            ({"reference_world": 2}, TrainingError, ["--reference_world", "--reference_metric"]),
            ({"max_pixels": 100}, ImageError, ["bound of 100"]),
            ({"precision": "fp32", "out": ROOT / "README.md"}, TrainingError, ["README.md is a file"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_value_is_named(self, run, tmp_path, options, kind, parts):
        with pytest.raises(TextSAMError) as caught:
            run(**({"out": tmp_path / "out"} | options))
        assert type(caught.value) is kind or issubclass(type(caught.value), kind)
        for part in parts:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_flags_that_exclude_each_other(self, run):
        with pytest.raises(TrainingError, match="exclude each other"):
            run("--load_in_8bit", "--load_in_4bit")
        with pytest.raises(TrainingError, match="whole splits"):
            run("--reference_metric", "--max_images", 3)

    def test_a_data_set_twice(self, run):
        with pytest.raises(TrainingError, match="twice"):
            run("--val_dataset", "all", VAL)

    def test_too_long_phrases_can_be_cut(self, run):
        assert "giou: " in run("--truncate", model_max_length=5)

    def test_a_damaged_image_in_a_worker_is_one_line_and_status_two(self, checkpoint, tmp_path):
        write_scenes(tmp_path, 3)
        path = sorted((tmp_path / layouts.REFER["refcoco"]).iterdir())[1]
        path.write_bytes(path.read_bytes()[:700])
        done = script(
            "--version", checkpoint, "--dataset_dir", tmp_path, "--device", "cpu", "--workers", 1,
            "--out", tmp_path / "out",
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert path.name in lines[0]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()

    def test_help_shows_the_published_options_and_needs_no_torch(self):
        done = script("--help")
        assert (done.returncode, done.stderr) == (0, "")
        for option in PUBLISHED_OPTIONS:
            assert option in done.stdout
        code = (
            "import sys; sys.argv = ['eval.py', '--help']\nimport eval, contextlib\n"
            "with contextlib.suppress(SystemExit): eval.main()\n"
            "assert not {'torch', 'transformers', 'numpy', 'cv2'} & sys.modules.keys()"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=sorted(PICO))
def model(request):
    return lively_model(request.param).eval()


class TestEvaluate:
    """The loop itself, as training calls it too."""

    def batches(self, model, root, size=5):
        dataset = open_dataset(VAL, root, lowercase=True)
        spec = model.segmenter.image_spec.for_evaluation()
        collate = Collate(spec, model.encoder.image_spec, PhraseTokenizer(TOKENIZER, 62))
        return list(evaluation_batches(dataset, collate, range(len(dataset)), size, Ranks(), 0))

    def test_every_family_against_its_predictor(self, model, scenes):
        predictor = build_predictor(model, PhraseTokenizer(TOKENIZER, 62), "evaluation")
        results = evaluate(model, self.batches(model, scenes), torch.device("cpu"))
        dataset = open_dataset(VAL, scenes, lowercase=True)
        assert [result.order for result in results] == [
            (i, k) for i in range(len(dataset)) for k in range(len(dataset.phrases(i)))
        ]
        for result in results:
            sample = dataset.load(result.image)
            predictor.set_image(sample.image)
            prediction = predictor.predict(result.phrase)
            truth = sample.masks[result.place] == 1
            assert result.id == sample.ids[result.place]
            assert abs(result.predicted - int(prediction.masks[0].sum())) <= 2
            assert abs(result.intersection - int((prediction.masks[0] & truth).sum())) <= 2
            assert result.target == int(truth.sum())
            assert result.score == pytest.approx(float(prediction.scores[0]), abs=1e-4)

    def test_small_chunks_change_nothing(self, model, scenes, monkeypatch):
        batches = self.batches(model, scenes)
        seen = []
        whole = evaluate(model, batches, torch.device("cpu"))
        monkeypatch.setattr(evaluator, "MAX_PROMPTS", 2)
        monkeypatch.setattr(evaluator, "MAX_LOGITS", 1)
        parts = evaluate(model, batches, torch.device("cpu"), on_batch=lambda *given: seen.append(given))
        for one, other in zip(whole, parts, strict=True):
            assert (one.order, one.id, one.target) == (other.order, other.id, other.target)
            assert abs(one.intersection - other.intersection) <= 2
        (batch, results, masks), *rest = seen
        assert not rest
        assert results == parts
        assert [tuple(mask.shape) for mask in masks] == [tuple(truth.shape) for truth in batch.masks]
        assert [int(row.sum()) for mask in masks for row in mask] == [result.predicted for result in parts]

    def test_features_can_be_given(self, model, scenes, monkeypatch):
        batches = self.batches(model, scenes)
        expected = evaluate(model, batches, torch.device("cpu"))
        with torch.inference_mode():
            features = model.segmenter.encode_image(batches[0].pixels)
        with monkeypatch.context() as patch:
            patch.setattr(model.segmenter, "encode_image", lambda _: pytest.fail("the images were encoded"))
            assert evaluate(model, batches, torch.device("cpu"), features_of=lambda _: features) == expected

    def test_progress_counts_images(self, scenes):
        model, done = lively_model("efficient_sam").eval(), []
        evaluate(model, self.batches(model, scenes, 2), torch.device("cpu"), progress=done.append)
        assert done == [2, 2, 1]

    def test_training_goes_on_afterwards(self, model, scenes):
        """Nothing that the loop leaves behind (caches made without gradients) may get into a graph."""
        batch = self.batches(model, scenes)[0]
        evaluate(model, [batch], torch.device("cpu"))
        output = model(batch.pixels, batch.encoder_pixels, batch.ids, batch.padding, batch.image_index)
        output.logits.sum().backward()
        assert model.projector.fc2.bias.grad.abs().sum() > 0
        model.zero_grad()

    def test_masks_that_are_not_finite_are_an_error(self, scenes):
        model = lively_model("efficient_sam").eval()
        with torch.no_grad():
            model.projector.fc2.bias.fill_(float("nan"))
        with pytest.raises(TrainingError, match=r"'the red thing 0'\) is not finite in torch.float32"):
            evaluate(model, self.batches(model, scenes), torch.device("cpu"))

    def test_results_travel_between_processes(self, scenes):
        model = lively_model("efficient_sam").eval()
        results = evaluate(model, self.batches(model, scenes), torch.device("cpu"))
        copied = pickle.loads(pickle.dumps(results))
        assert summarise(copied) == summarise(results)
        assert published_scores(copied, 2) == published_scores(results, 2)
