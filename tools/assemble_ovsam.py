"""Put Open-Vocabulary SAM together from the published files, as a folder that TextSAM loads.

python -m tools.assemble_ovsam --output FOLDER RN50x16.pt sam_vit_h_4b8939.pth sam2clip_*.pth clip2sam_*.pth
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from configs.cli import parse
from utils.errors import CheckpointError, run_main


@dataclass(frozen=True)
class Args:
    """Put Open-Vocabulary SAM together from the published files, as a folder that TextSAM loads."""

    files: Positional[tuple[Path, ...]]
    """CLIP (RN50x16.pt), SAM ViT-H, sam2clip_*.pth and clip2sam_*.pth in any order; of a part that two hold, the first
    counts."""
    output: Path
    """Folder to write; it must not exist, or be empty."""
    vocabulary: Path | None = None
    """Vocabulary of tools/make_vocabulary.py to lay beside the model."""
    for_training: bool = False
    """Take no clip2sam_*.pth: the mask decoder is SAM's, and what names regions is random. It is what the second stage
    of training starts from."""


def main() -> int:
    """Read the headers, check that every tensor is there once, write."""
    args = parse(Args, "tools/assemble_ovsam.py")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise CheckpointError(f"--output {args.output} exists and is not an empty folder. Give another")
    if not args.files:
        raise CheckpointError("no files. Give RN50x16.pt, sam_vit_h_4b8939.pth, sam2clip_*.pth and clip2sam_*.pth")
    from model.checkpoints.clip import save_text
    from model.checkpoints.load import assemble_ovsam, save_model
    from model.checkpoints.ovsam import VOCABULARY_FILE, PartFiles
    from model.ovsam_start import assemble_start
    from model.vocabulary import read_vocabulary

    parts = PartFiles(args.files)
    model = assemble_start(parts) if args.for_training else assemble_ovsam(parts)
    if args.vocabulary is not None:
        read_vocabulary(args.vocabulary).check_width(model.config.segmenter.embed_width)
    logger = logging.getLogger(__name__)
    text = parts.read_text()
    if text:
        save_text(args.output, text)
    else:
        logger.warning("no file has CLIP's text tower: the model can only use vocabulary files, not words")
    if args.vocabulary is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.vocabulary, args.output / VOCABULARY_FILE)
    save_model(model, args.output)  # last, for its config.json makes the folder a model
    logger.info("%s written to %s", model.config.name, args.output)
    return 0


if __name__ == "__main__":
    run_main(main)
