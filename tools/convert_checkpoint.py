"""Convert checkpoint folders: published EVF-SAM layout <-> TextSAM layout, tensor for tensor.

python -m tools.convert_checkpoint --input FOLDER --output FOLDER --to textsam
python -m tools.convert_checkpoint --input FOLDER --output FOLDER --to evf-sam      # the published code loads this
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import FlagCreatePairsOff

from configs.cli import parse
from utils.errors import CheckpointError, run_main

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Args:
    """Convert checkpoint folders: published EVF-SAM layout <-> TextSAM layout, tensor for tensor."""

    input: str
    """Folder of either layout, a plain SAM, SAM-2 or EfficientSAM file, a hub id or a released name."""
    output: Path
    """Folder to write; it must not exist, or be empty."""
    to: Literal["textsam", "evf-sam"]
    """Layout to write."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Type of the weights in the output; fp16 halves a file of fp32."""
    bin: FlagCreatePairsOff[bool] = False
    """Write pytorch_model-*.bin shards instead of safetensors (evf-sam only)."""
    shard_mb: int = 5000
    """Largest shard in MB, with --bin."""


def main() -> int:
    """Read, translate the names, write."""
    args = parse(Args, "tools/convert_checkpoint.py")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise CheckpointError(f"--output {args.output} exists and is not an empty folder. Give another")
    if args.bin and args.to != "evf-sam":
        raise CheckpointError("--bin goes with --to evf-sam; TextSAM folders hold safetensors")
    if args.bin and args.shard_mb < 1:
        raise CheckpointError(f"--shard_mb {args.shard_mb}: needed is at least 1")
    import torch

    from model.checkpoints.load import fill_model, resolve, save_model, save_published
    from utils.precision import DTYPES
    from utils.tokenizer import find_tokenizer

    source = resolve(args.input)
    if args.to == "evf-sam" and source.config.encoder is None:
        raise CheckpointError(f"{args.input} is {source.config.name} without an encoder: the EVF-SAM layout needs one")
    model = fill_model(source, torch.device("cpu"), None if args.dtype == "keep" else DTYPES[args.dtype])
    tokenizer = find_tokenizer(source.path) if source.config.encoder is not None else None
    if args.to == "textsam":
        _keep_names(source.path, args.output, DTYPES.get(args.dtype))
        save_model(model, args.output, tokenizer)
    else:
        save_published(model, args.output, tokenizer, args.shard_mb * 1_000_000 if args.bin else None)
    logging.getLogger(__name__).info("%s written to %s (%s layout)", source.config.name, args.output, args.to)
    return 0


def _keep_names(source: Path, output: Path, dtype: "torch.dtype | None") -> None:
    """Take along what lies beside a model that gives names: CLIP's text tower, and vocabularies as they are."""
    from model.checkpoints.clip import find_text, read_text, save_text

    if text := find_text(source):
        tensors = read_text(text).items()
        save_text(output, {name: t.to(dtype if t.is_floating_point() else t.dtype) for name, t in tensors})
    for path in sorted(source.glob("*.safetensors")) if text else ():
        if path.name not in ("model.safetensors", text.name):
            shutil.copyfile(path, output / path.name)


if __name__ == "__main__":
    run_main(main)
