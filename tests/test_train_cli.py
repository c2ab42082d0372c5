"""train.py as a user runs it: strategies agree, a run that was killed goes on, errors are one line."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import PICO, ROOT, TOKENIZER
from tests.own_scenes import write_own
from tests.test_synthetic import draw_sprites
from tools.synthetic.generate import Recipe, generate
from utils.errors import run_main
from utils.run_folder import RunFolder

STEPS = 6
MEASURED = ("--val.sets", "own.jsonl", "--val.every", "3", "--val.max_images", "3", "--val.batch_size", "1")
"""Three batches: of two ranks one has more than the other."""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def experiment(own, tmp_path_factory):
    """Return a configuration file: a step of four images in two forwards, checkpoints at 2, 4 and 6."""
    values = {
        "model": {"name": PICO["efficient_sam"], "tokenizer": str(TOKENIZER), "max_length": 62},
        "data": {"root": str(own), "sets": ["own.jsonl"], "batch_size": 2, "workers": 0},
        "optim": {"steps": STEPS, "warmup": 2, "lr": 1e-3, "global_batch": 4},
        "run": {"device": "cpu", "save_every": 2, "log_every": 1},
    }
    path = tmp_path_factory.mktemp("experiment") / "toy.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def environment(threads=1):
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return kept | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}


def command(*options, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, "train.py", *map(str, options)]


def train(*options, ranks=1):
    """Run train.py and return the finished process."""
    return subprocess.run(
        command(*options, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def curve(folder):
    """Return loss and gradient norm of every step, [steps, 2]."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    records = [record for record in records if record["group"] == "train"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return np.array([[record["loss"], record["grad_norm"]] for record in records])


def scores(folder):
    """Return what was measured on the way."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"val"' in line]


@pytest.fixture(scope="module")
def reference(experiment, own, tmp_path_factory):
    """Return the folder of a whole run of one process, with validation."""
    out = tmp_path_factory.mktemp("reference")
    done = train(experiment, "--run.out", out, *MEASURED)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_what_it_should(reference, own, tmp_path):
    out, done = reference
    assert RunFolder(out).steps() == [4, 6]
    losses = curve(out)[:, 0]
    assert losses[-1] < losses[0]
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["optim"]["betas"] == [0.9, 0.999] and resolved["val"]["max_images"] == 3
    assert [score["step"] for score in scores(out)] == [3, 6]
    assert all(0 <= score["ciou"] <= 1 for score in scores(out))
    assert sorted(path.name for path in (out / "pictures" / "own.jsonl").iterdir()) == [
        "step_00000003.png",
        "step_00000006.png",
    ]
    assert list((out / "tensorboard").iterdir())
    assert "mask_decoder" in done.stderr and "own.jsonl" in done.stderr
    answer = subprocess.run(
        [sys.executable, "inference.py", "--version", out / "best", "--image_path", own / "0.png",
         "--prompt", "the red box", "--model_max_length", "62", "--vis_save_path", tmp_path, "--device", "cpu"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "0_vis.png").is_file()


STRATEGIES = {"ddp": 1e-6, "fsdp": 2e-5, "zero2": 2e-5, "zero3": 2e-5}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_give_the_curve_of_one(strategy, experiment, reference, tmp_path):
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (requirements-gpu.txt)")
    done = train(experiment, "--run.out", tmp_path, "--run.strategy", strategy, *MEASURED, ranks=2)
    assert done.returncode == 0, done.stderr
    assert np.abs(curve(tmp_path) - curve(reference[0])).max() < STRATEGIES[strategy]
    for mine, theirs in zip(scores(tmp_path), scores(reference[0]), strict=True):
        assert abs(mine["ciou"] - theirs["ciou"]) < 1e-3 and abs(mine["giou"] - theirs["giou"]) < 1e-3
    assert RunFolder(tmp_path).steps() == [4, 6]


def test_bf16_stays_near_the_curve_of_fp32(experiment, reference, tmp_path):
    done = train(experiment, "--run.out", tmp_path, "--optim.precision", "bf16")
    assert done.returncode == 0, done.stderr
    difference = np.abs(curve(tmp_path)[:, 0] - curve(reference[0])[:, 0]).max()
    assert 0 < difference < 0.02
    weights = load_file(RunFolder(tmp_path).checkpoint(STEPS) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}  # sums are kept whole


def start_and_kill(options, out, is_time, with_signal, ranks=1):
    """Start a run, send a signal when `is_time()`, and return the exit status."""
    process = subprocess.Popen(
        command(*options, "--run.out", out, ranks=ranks), cwd=ROOT, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 120
    while process.poll() is None and not is_time():
        assert time.monotonic() < end
        time.sleep(0.001)
    assert process.poll() is None, "the run ended before it could be killed"
    if with_signal == signal.SIGKILL:
        os.killpg(process.pid, with_signal)
    else:
        process.send_signal(with_signal)
    return process.wait(timeout=120)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_while_saving_it_goes_on_as_if_nothing_had_happened(ranks, experiment, reference, tmp_path):
    partial = RunFolder(tmp_path).partial(4)
    start_and_kill([experiment], tmp_path, lambda: (partial / "config.json").is_file() or (
        partial.is_dir() and any(partial.iterdir())), signal.SIGKILL)  # fmt: skip
    assert RunFolder(tmp_path).steps() == [2], "the kill came too late to be in the middle of a save"
    done = train(experiment, "--run.out", tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    difference = np.abs(curve(tmp_path) - curve(reference[0])).max()
    assert difference == 0 if ranks == 1 else difference < 1e-6
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_saves_and_exits(ranks, experiment, reference, tmp_path):
    """Also with workers, which torchrun sends the signal to as well."""
    log = tmp_path / "log.jsonl"
    status = start_and_kill([experiment, "--data.workers", "1"], tmp_path, log.is_file, signal.SIGTERM, ranks)
    assert status == 143 or ranks > 1  # torchrun has a status of its own
    saved = RunFolder(tmp_path).steps()[-1]
    assert saved < STEPS
    assert train(experiment, "--run.out", tmp_path).returncode == 0
    assert np.abs(curve(tmp_path) - curve(reference[0])).max() <= (0 if ranks == 1 else 1e-6)


def test_a_cache_that_is_warm_changes_nothing(experiment, tmp_path):
    options = (experiment, "--data.feature_cache", tmp_path / "features", "--loss.points", "200")
    for name in ("cold", "warm"):
        done = train(*options, "--run.out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert np.array_equal(curve(tmp_path / "cold"), curve(tmp_path / "warm"))
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 6


def test_lora_goes_on_where_it_was(experiment, tmp_path):
    options = (experiment, "--model.lora_rank", "2", "--run.out")
    assert train(*options, tmp_path / "whole").returncode == 0
    assert start_and_kill(
        [*options[:-1]], tmp_path / "cut", lambda: RunFolder(tmp_path / "cut").steps(), signal.SIGKILL
    ) == -signal.SIGKILL  # fmt: skip
    assert train(*options, tmp_path / "cut").returncode == 0
    assert np.array_equal(curve(tmp_path / "cut"), curve(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_stops_the_run(experiment, tmp_path):
    done = train(experiment, "--run.out", tmp_path, "--loss.bce", "1e38", "--loss.dice", "1e38", "--optim.lr", "1e30")
    assert done.returncode == 2
    (dump,) = tmp_path.glob("nan.*.json")
    assert "not a finite number" in done.stderr and str(dump) in done.stderr
    content = json.loads(dump.read_text())
    assert content["phrases"][0]["phrase"].startswith("the ") and content["images"]
    assert not [line for line in done.stderr.splitlines() if line.startswith("Traceback")]


def test_dry_run_says_what_would_be_trained_and_trains_nothing(experiment, tmp_path):
    done = train(experiment, "--run.out", tmp_path, "--dry_run")
    assert done.returncode == 0 and "no gradient" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--optim.lr", "0"], "optim.lr 0.0: needed is a positive number"),
        (["--data.sets", "refcoco|unc|trian"], "unknown split 'trian'"),
        (["--data.sets", "none.jsonl"], "no such file"),
        (["--model.name", "evf-sam3"], "Unknown model 'evf-sam3'"),
        (["--model.tokenizer", "nowhere"], "no tokenizer"),
        (["--run.strategy", "zero9"], "unknown strategy 'zero9'"),
        (["--run.resume", "nowhere"], "no checkpoint"),
        (["--optim.global_batch", "3"], "Nearest: 2"),
        (["--optim.global_batch", "-4"], "needed is at least 1"),
        (["--val.sets", "none.jsonl"], "no such file"),
        (["--run.device", "cuda:77"], "cuda"),
    ],
)
def test_errors_are_one_line(options, message, experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", str(experiment), "--run.out", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit) as stop:
        run_main(importlib.import_module("train").main)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ") and message in line], lines
    assert "Traceback" not in str(lines) and not (tmp_path / "run").exists()


def test_a_run_goes_on_only_as_it_was(experiment, reference):
    options = ("--run.out", reference[0], "--optim.steps", STEPS + 2)
    done = train(experiment, *options, "--optim.global_batch", 2)
    assert done.returncode == 2 and "Give --optim.global_batch 4" in done.stderr


def test_resume_never_keeps_an_old_run(experiment, reference):
    done = train(experiment, "--run.out", reference[0], "--run.resume", "never")
    assert done.returncode == 2 and "holds checkpoints up to step 6" in done.stderr


def test_the_smoke_experiment_runs_from_scenes_to_score(tmp_path):
    """configs/experiment/smoke.yaml, as the README's three commands, on scenes of drawn shapes."""
    generate(tmp_path / "data", Recipe(seed=0, scenes=(24, 8, 8, 8), width=128, height=128), draw_sprites())
    smoke = ROOT / "configs" / "experiment" / "smoke.yaml"
    done = train(smoke, "--data.root", tmp_path / "data", "--run.out", tmp_path / "run", "--run.device", "cpu")
    assert done.returncode == 0, done.stderr
    command = ["--version", tmp_path / "run" / "best", "--dataset_dir", tmp_path / "data", "--device", "cpu"]
    command += ["--val_dataset", "refcoco|unc|testA", "grefcoco|unc|testA", "--model_max_length", "62"]
    score = subprocess.run(
        [sys.executable, "eval.py", *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert score.returncode == 0, score.stderr
    assert "giou: " in score.stdout and "n-acc" in score.stdout.lower()


def test_help_needs_no_torch():
    start = time.perf_counter()
    done = train("--help")
    assert done.returncode == 0 and "--optim.lr" in done.stdout
    assert time.perf_counter() - start < 10
