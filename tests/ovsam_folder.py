"""A small Open-Vocabulary SAM with random weights and CLIP's text tower, as a folder."""

from pathlib import Path

import torch
from torch import nn

from model.checkpoints.clip import save_text
from model.checkpoints.load import build_model, save_model
from model.encoders.clip_text import ClipText
from model.registry import model_config

PICO = "ovsam-pico"


def make_text(seed=1):
    """Return a text tower for the pico model, whose vectors differ between phrases."""
    config = model_config(PICO).segmenter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = ClipText(config.text_width, config.text_heads, config.text_layers, config.embed_width).eval()
    with torch.no_grad():
        text.tower.token_embedding.weight.mul_(20)
    return text


def make_model(seed=0):
    """Return a model that makes masks of parts of an image; fresh ones are all or nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(model_config(PICO))
        with torch.no_grad():
            for name, tensor in model.segmenter.named_parameters():
                if name.endswith("bn3.weight"):
                    nn.init.ones_(tensor)
                elif "prompt_encoder" in name:
                    tensor.mul_(3)
                elif not tensor.any():
                    tensor.uniform_(-0.1, 0.1)
    return model


def write_ovsam(folder):
    """Write a model with its text tower, without a vocabulary; return the folder."""
    folder = Path(folder)
    save_text(folder, dict(make_text().tower.state_dict()))
    save_model(make_model(), folder)
    return folder
