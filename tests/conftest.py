"""What the tests share: tiny checkpoints of every family in the published layout, and an image."""

import copy
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoints.load import build_model, save_published
from model.registry import model_config

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "assets" / "tokenizer"
PICO = {
    "sam": "evf-sam-vit-pico-pico",
    "sam2": "evf-sam2-hiera-pico-pico",
    "efficient_sam": "evf-efficient-sam-pico-pico",
    "efficientvit_sam": "evf-efficientvit-sam-pico-pico",
    "ovsam": "evf-ovsam-pico-pico",
}
"""Family -> registry name of a model that is small enough to run in a test."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@cache
def _pico_model(family: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(model_config(PICO[family]))


def pico_model(family: str):
    """Return a pico model of one's own, always with the same random weights."""
    return copy.deepcopy(_pico_model(family))


def lively_model(family, seed=1):
    """Return a model whose masks differ between phrases: a fresh one maps all of them to nearly one prompt."""
    model = pico_model(family)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("encoder.", "projector.")) and parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 * 2)
            elif "prompt_encoder" in name:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="session")
def pico_folders(tmp_path_factory):
    """Family -> checkpoint folder in the published layout; read only."""
    folders = {}
    for family in PICO:
        folders[family] = tmp_path_factory.mktemp(family)
        save_published(pico_model(family), folders[family], TOKENIZER)
    return folders


@pytest.fixture
def pico_folder(pico_folders, tmp_path):
    """Return a checkpoint folder of SAM 2 pico that a test may damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(pico_folders["sam2"], folder)
    return folder


def make_picture():
    """Return an image with structure, uint8 RGB [120, 160, 3]."""
    y, x = np.mgrid[:120, :160]
    image = np.stack([x * 255 // 159, y * 255 // 119, (x + y) % 256], axis=-1).astype(np.uint8)
    image[20:60, 30:90] = (220, 40, 40)
    image[70:110, 100:150] = (30, 60, 200)
    return image


@pytest.fixture(scope="session")
def picture():
    """Return the image of `make_picture`."""
    return make_picture()


@pytest.fixture(scope="session")
def picture_path(picture, tmp_path_factory):
    """Return the same image as a PNG file."""
    path = tmp_path_factory.mktemp("images") / "picture.png"
    Image.fromarray(picture).save(path)
    return path
