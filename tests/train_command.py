"""Running train.py from tests, and reading what it logged."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from .conftest import ROOT


def train(*options):
    """Run train.py in this process, which spares its start; return its status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        return importlib.import_module("train").main()


def train_processes(*options, ranks=1):
    """Run train.py as a user does."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return subprocess.run(
        [*launcher, "train.py", *map(str, options)], cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def records(folder, group="train"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == group]


def curve(folder):
    return np.array([[row["loss"], row["grad_norm"]] for row in records(folder)])
