"""What Open-Vocabulary SAM starts from before it is trained: CLIP's ResNet, and of SAM the prompts, masks and places.

Source: arXiv 2401.02955. Of SAM's mask decoder the first mask is kept; what predicts an IoU is dropped.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import CheckpointError

from .checkpoints import evf_sam, ovsam
from .checkpoints.load import fill_tensors, load_model
from .checkpoints.rules import KeyMap, Section, named_tensors, rename
from .evf import EVFModel
from .registry import find_config

BACKBONE = "segmenter.backbone."
START = {"backbone.": BACKBONE, "neck.": "segmenter.neck.", "pe.": "segmenter.prompt_encoder."}
"""What the second stage starts from, as the published files and as we begin the names of tensors."""
SLOWEST = 10_000.0
"""Longest wave of `sine_table`, in cells over 2 pi."""

EFFICIENT_SAM = (
    (r"^prompt_encoder\.position_matrix$", "prompt_encoder.shared_embedding.positional_embedding"),
    (r"\bnorm(\d|_final_attn)\.", r"layer_norm\1."),
    (r"^mask_decoder\.upscale(\d)\.", r"mask_decoder.upscale_conv\1."),
    (r"^mask_decoder\.upscale_norm\.", "mask_decoder.upscale_layer_norm."),
    (r"\bmlp\.layers\.0\.", "mlp.lin1."),
    (r"\bmlp\.layers\.1\.", "mlp.lin2."),
    (r"(mlps\.\d)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d)\.layers\.2\.", r"\1.proj_out."),
)
"""What stands in EfficientSAM's mask decoder where SAM has something alike."""

logger = logging.getLogger(__name__)


def take_clip(model: EVFModel, path: str | Path) -> dict[str, Tensor]:
    """Put CLIP's ResNet into a model, and return the text tower's tensors, {} where the file has none.

    Raises:
        CheckpointError: no such file, not CLIP, or one of another shape.
    """
    parts = ovsam.PartFiles([Path(path)])
    others = sorted({name.split(".")[0] for name in parts.shapes if not name.startswith("backbone.")})
    if others or not parts.shapes:
        raise CheckpointError(
            f"{path} is no CLIP with its image tower (it holds {', '.join(others) or 'none'}). Needed is OpenAI's "
            "RN50x16.pt, or a state dict as open_clip has it"
        )
    _fill(model, parts, (BACKBONE,))
    return parts.read_text()


def assemble_start(parts: ovsam.PartFiles) -> EVFModel:
    """Put together what the second stage starts from: published CLIP, neck and prompts, and SAM's first mask.

    What names regions has random weights.

    Raises:
        CheckpointError: a part is missing, or does not fit the others.
    """
    parts.require_all(START)
    parts.keep(tuple(START))
    config = find_config("ovsam", *evf_sam.segmenter_shape(parts.shapes, "", "ovsam"), None)
    model = load_model(config.name, pretrained=False)
    _fill(model, parts, tuple(START.values()))
    sam = load_model(parts.file_of("pe."))
    own, theirs = (dict(one.segmenter.state_dict(keep_vars=True)) for one in (model, sam))
    own, theirs = fit_decoder(own, theirs)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(theirs[name])
    return model


def _fill(model: EVFModel, parts: ovsam.PartFiles, starts: tuple[str, ...]) -> None:
    """Put tensors of files into those of a model whose names begin so."""
    targets = {name: tensor for name, tensor in named_tensors(model).items() if name.startswith(starts)}
    key_map = KeyMap(targets, (Section("segmenter.", "", evf_sam.SEGMENTERS["ovsam"].plain),))
    fill_tensors(model, targets, key_map, parts, torch.device("cpu"), None)


def fit_decoder(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return those tensors of a model that makes one mask which it may take from SAM, and SAM's, cut to the first mask.

    Args:
        own, theirs: what is not of the image encoder, by name.
    """
    table = "mask_decoder.mask_tokens.weight"
    kept = {
        name: tensor
        for name, tensor in own.items()
        if name.startswith(("prompt_encoder.", "mask_decoder.")) and not name.startswith("mask_decoder.iou_")
    }
    taken = {name: theirs[name] for name in kept if name in theirs}
    if table in taken:
        taken[table] = taken[table][: len(kept[table])]
    return kept, taken


def fit_efficient_sam(
    own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return as `fit_decoder` what has the same shape in EfficientSAM's decoder.

    That is no SAM: it has other activations and shortcuts, and nothing that codes points or boxes. What is taken (the
    code of places above all) is where a training begins, not a decoder that works.
    """
    renamed = {rename(name, EFFICIENT_SAM): tensor for name, tensor in theirs.items()}
    kept, taken = fit_decoder(own, renamed)
    fitting = [name for name in kept if name in taken and taken[name].shape == kept[name].shape]
    logger.info("of an EfficientSAM %d of %d tensors of the mask decoder and prompts fit", len(fitting), len(kept))
    return {name: kept[name] for name in fitting}, {name: taken[name] for name in fitting}


@torch.no_grad()
def set_positions(model: EVFModel, teacher: EVFModel | None) -> None:
    """Give a neck that has no position table SAM's, or sines where no teacher has one of its shape."""
    positions = model.segmenter.neck.positions
    if positions.any():
        return
    table = dict(teacher.segmenter.named_parameters()).get("image_encoder.pos_embed") if teacher else None
    if table is None or table.shape != positions.shape:
        logger.info("no teacher has a table of positions as the neck's, %s: it gets sines", list(positions.shape))
        table = sine_table(positions.shape[1], positions.shape[-1])
    positions.copy_(table)


def sine_table(side: int, width: int) -> Tensor:
    """Return a code of the cells of a grid, float32 [1, side, side, width]: half of it sines of y, half of x."""
    half = width // 2
    rates = torch.exp(-math.log(SLOWEST) * torch.arange(0, half, 2) / half)
    angles = torch.arange(side)[:, None] * rates
    along = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :half]
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    table = torch.cat([rows, columns], dim=-1)
    return torch.nn.functional.pad(table, (0, width - table.shape[-1]))[None]
