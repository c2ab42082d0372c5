"""CLIP's text tower: OpenAI's RN50x16.pt, a state dict as open_clip has it, or a file of ours."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import OVSAMConfig
from utils.errors import CheckpointError, compress_names

from ..encoders.clip_text import WORDS, ClipText
from .files import TensorFile, write_safetensors
from .ovsam import TEXT

TEXT_FILE = "text.safetensors"
"""Name of the text tower in a folder of ours."""
WORD_IDS = "token_embedding.ids"
"""Tensor beside the table of tokens that says which rows of CLIP's table a small tower has."""


def find_text(folder: Path) -> Path | None:
    """Return the text tower of a model's folder: ours, or OpenAI's file among published ones; None where it is not."""
    if not folder.is_dir():
        return None
    places = [folder / TEXT_FILE, *sorted(folder.glob("RN*.pt"))]
    return next((path for path in places if path.is_file()), None)


def load_text(config: OVSAMConfig, path: str | Path) -> ClipText:
    """Load the text tower that goes with a model, float32 on the CPU.

    Nothing in a file says which activation it was trained with: it is taken as QuickGELU, that of OpenAI's weights.

    Raises:
        CheckpointError: no such file, no text tower in it, or one of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}. Needed is OpenAI's CLIP (RN50x16.pt) with its text tower")
    file = TensorFile(path, ("state_dict", "model"))
    shapes = {name: shape for name, shape in file.shapes().items() if name.startswith(TEXT)}
    if "token_embedding.weight" not in shapes:
        raise CheckpointError(
            f"{path} holds no CLIP text tower. Needed are OpenAI's weights with QuickGELU: RN50x16.pt, or its state "
            "dict saved by open_clip from 'RN50x16-quickgelu'"
        )
    word_ids = file.read(WORD_IDS, torch.device("cpu"), None) if shapes.pop(WORD_IDS, None) else None
    words = WORDS if word_ids is None else len(word_ids)
    with torch.device("meta"):
        text = ClipText(config.text_width, config.text_heads, config.text_layers, config.embed_width, words)
    needed = {name: tuple(tensor.shape) for name, tensor in text.tower.state_dict().items()}
    wrong = sorted(name for name in shapes.keys() | needed.keys() if shapes.get(name) != needed.get(name))
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the model's text tower (width {config.text_width}, {config.text_layers} layers, "
            f"{config.embed_width} channels out): {compress_names(wrong)}. Take the CLIP that the model was made with"
        )
    state = {name: file.read(name, torch.device("cpu"), torch.float32) for name in needed}
    text.tower.load_state_dict(state, assign=True)
    text.tower.attn_mask = _causal(text.tower.num_pos)
    text.word_ids = word_ids
    return text.eval().requires_grad_(False)


def _causal(length: int) -> Tensor:
    """Return the mask that a build on the meta device leaves empty, float32 [length, length]."""
    return torch.full((length, length), -torch.inf).triu_(1)


def read_text(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the text tower in a file, float32, by CLIP's names."""
    file = TensorFile(path, ("state_dict", "model"))
    names = [name for name in file.shapes() if name.startswith(TEXT)]
    return {name: file.read(name, torch.device("cpu"), torch.float32) for name in names}


def save_text(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a text tower into a folder of ours."""
    write_safetensors(folder / TEXT_FILE, tensors)
