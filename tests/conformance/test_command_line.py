"""Whole cases through inference.py: a checkpoint folder, an image and a phrase to the recorded logits."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from utils.masks import decode_rle

from .support import (
    CONFORMANCE,
    EVF,
    cases,
    flipped_pixels,
    largest_difference,
    needs_golden_data,
    published_folder,
    read_case,
)

pytestmark = needs_golden_data
MODEL_TYPES = {"evf-effi-sam-b": "effi", "evf-sam2-tiny-base": "sam2"}


@pytest.mark.parametrize("shards", [False, True], ids=["safetensors", "bin-shards"])
@pytest.mark.parametrize("path", cases("e2e/*.json"), ids=lambda path: path.stem)
def test_recorded_logits(path, shards, tmp_path):
    case, golden = read_case(path)
    folder = published_folder(case["arch"], case["seed"], tmp_path / "checkpoint", shards)
    command = [sys.executable, "inference.py", "--version", str(folder), "--vis_save_path", str(tmp_path / "infer"),
               "--precision", "fp32", "--model_type", MODEL_TYPES[case["arch"]], "--image_path",
               str(EVF / "images" / case["image"]), "--prompt", case["phrase"], "--save_mask", "--save_logits",
               "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    stem = case["image"].split(".")[0]
    written = {file.name for file in (tmp_path / "infer").iterdir()}
    assert written == {f"{stem}_vis.png", f"{stem}_mask.png", f"{stem}_logits.npy", "results.json"}
    logits = np.load(tmp_path / "infer" / f"{stem}_logits.npy")
    assert logits.dtype == np.float32
    assert list(logits.shape) == case["hw"]
    assert largest_difference(logits[::4, ::4], golden["logits_s4"]) < 1e-3
    assert flipped_pixels(logits, golden["mask_bits"]) <= 8
    result = json.loads((tmp_path / "infer" / "results.json").read_text())[0]["masks"][0]
    assert np.array_equal(decode_rle(result["segmentation"]), logits > 0)
    assert abs(result["area"] - case["area"]) <= 8


def test_token_ids():
    """The ids that the published tokenizer gives to the phrases of the cases."""
    from utils.tokenizer import PhraseTokenizer

    tokenizer = PhraseTokenizer(CONFORMANCE / "tokenizer")
    for path in cases("e2e/*.json"):
        case = json.loads(path.read_text())
        assert tokenizer.encode(case["phrase"]) == case["input_ids"]
