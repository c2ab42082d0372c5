"""Golden data of the published code: where it is, and models with the weights it was computed with."""

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from configs.schema import ModelConfig
from model.checkpoints import evf_sam
from model.checkpoints.files import write_bin_shards, write_safetensors
from model.checkpoints.load import build_model, fill_tensors
from model.checkpoints.rules import KeyMap, Section, named_tensors
from model.evf import EVFModel
from model.registry import model_config
from utils.files import write_json

CONFORMANCE = Path(__file__).parents[3] / "shared" / "conformance"
EVF, EFFICIENTVIT, OVSAM = (CONFORMANCE / name for name in ("evf-sam", "efficientvit-sam", "ovsam"))

needs_golden_data = pytest.mark.skipif(
    not EVF.is_dir(), reason="the golden data of the published code (../shared/conformance) is not here"
)

ARCHITECTURES = {
    "evf-sam": "evf-sam",
    "evf-sam2": "evf-sam2",
    "evf-effi-sam-l": "evf-effi-sam-l",
    "evf-effi-sam-b": "evf-effi-sam-b",
    "evf-sam2-tiny-base": "evf-sam2-hiera-tiny-base",
    "evf-sam2-tiny-large": "evf-sam2-hiera-tiny-large",
    "evf-sam2-large-base": "evf-sam2-hiera-large-base",
    "evf-sam-vitb-base": "evf-sam-vit-b-base",
}
"""Manifest name -> registry name."""

FULL_SIZE = {"evf-sam", "evf-sam2", "evf-effi-sam-l"}


@cache
def fill_module() -> ModuleType:
    """Return the module that regenerates the weights."""
    spec = importlib.util.spec_from_file_location("conformance_fill", CONFORMANCE / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a published checkpoint, in its order."""
    starts = {"efficientvit": EFFICIENTVIT, "ovsam": OVSAM, "clip2sam": OVSAM, "sam2clip": OVSAM, "openai-clip": OVSAM}
    root = next((root for start, root in starts.items() if name.startswith(start)), EVF)
    return {key: tuple(shape) for key, shape in json.loads((root / "manifests" / f"{name}.json").read_text())}


def golden_tensor(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return one regenerated tensor."""
    return torch.from_numpy(np.ascontiguousarray(fill_module().fill(seed, name, shape))).reshape(shape)


class ManifestCheckpoint:
    """Stands for a checkpoint file: makes each tensor when it is read."""

    def __init__(self, name: str, seed: int) -> None:
        self.source, self.seed = name, seed
        self.shapes = manifest(name)

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """Return the tensor of that name."""
        return golden_tensor(self.seed, name, self.shapes[name]).to(device, dtype)


def fill_model(config: ModelConfig, sections: tuple[Section, ...], name: str, seed: int) -> EVFModel:
    """Return a model with the weights of a manifest and seed."""
    with torch.device("meta"):
        model = build_model(config)
    targets = named_tensors(model)
    fill_tensors(model, targets, KeyMap(targets, sections), ManifestCheckpoint(name, seed), torch.device("cpu"), None)
    model.segmenter.restore_buffers()
    return model


def golden_model(architecture: str, seed: int) -> EVFModel:
    """Return an EVF model with the weights of a golden case."""
    config = model_config(ARCHITECTURES[architecture])
    return fill_model(config, evf_sam.sections(config.family), architecture, seed)


def published_folder(architecture: str, seed: int, folder: Path, shards: bool) -> Path:
    """Write a checkpoint folder as a user has it: config.json, weights, tokenizer."""
    tensors = {name: golden_tensor(seed, name, shape) for name, shape in manifest(architecture).items()}
    if shards:
        write_bin_shards(folder, tensors.items(), 400_000_000)
    else:
        write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", evf_sam.published_config(model_config(ARCHITECTURES[architecture])))
    for file in (CONFORMANCE / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def cases(pattern: str) -> list[Path]:
    """Return the .json files of golden cases, or a placeholder where the data is absent."""
    return sorted(EVF.glob(pattern)) or [Path("absent.json")]


def groups(pattern: str) -> list:
    """Return (architecture, seed) test parameters of all golden cases; full-size ones marked slow."""
    found = sorted({(path.parent.name, json.loads(path.read_text())["seed"]) for path in EVF.glob(pattern)})
    return [
        pytest.param(name, seed, id=f"{name}-s{seed}", marks=[pytest.mark.slow] if name in FULL_SIZE else [])
        for name, seed in found
    ] or [pytest.param("absent", 0)]


def read_case(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the description and the arrays of a golden case."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return json.loads(path.read_text()), dict(arrays)


def largest_difference(ours: torch.Tensor | np.ndarray, golden: np.ndarray) -> float:
    """Return the largest absolute difference; shapes must agree."""
    ours = np.asarray(ours)
    assert ours.shape == golden.shape
    return float(np.abs(ours - golden).max())


def flipped_pixels(ours: torch.Tensor | np.ndarray, bits: np.ndarray) -> int:
    """Return how many pixels of the mask logits > 0 differ from packed golden bits."""
    mine = np.packbits(np.asarray(ours) > 0)
    assert mine.shape == bits.shape
    return int(np.unpackbits(mine ^ bits).sum())
