"""Make the vocabulary of Open-Vocabulary SAM: the vectors of names, by CLIP's text tower in 14 templates.

python -m tools.make_vocabulary --text RN50x16.pt --names "red panda" teapot --output mine.safetensors
python -m tools.make_vocabulary --text RN50x16.pt --classes lvis_v1_val.json --output lvis.safetensors
python -m tools.make_vocabulary --published RN50x16_LVISV1Dataset.pth --classes lvis_v1_val.json --output l.safetensors
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from configs.cli import parse
from utils.class_lists import ClassList, members, read_class_list
from utils.errors import ModelError, VocabularyError, run_main


@dataclass(frozen=True)
class Args:
    """Make the vocabulary of Open-Vocabulary SAM: the vectors of names, by CLIP's text tower in 14 templates."""

    output: Path
    """File to write, .safetensors."""
    names: tuple[str, ...] = ()
    """The names; wordings of one parted by commas, or `_or_` and `/`."""
    classes: Path | None = None
    """File with the names: a COCO or LVIS annotation file, or a text file with one name a line. The rare classes of
    LVIS count as novel, the others as base."""
    base: Path | None = None
    """Text or annotation file with the names that the recogniser was trained with."""
    novel: Path | None = None
    """The same of those that it was not trained with, but may answer."""
    text: Path | None = None
    """CLIP's weights with its text tower (RN50x16.pt), or the folder of a model that has it."""
    published: Path | None = None
    """Published .pth vocabulary, to be given its names instead of being made."""
    model: str | None = None
    """The model that the vocabulary is for; by default the one in the folder of --text, else ovsam-rn50x16."""


def main() -> int:
    """Read the names, encode them, write."""
    args = parse(Args, "tools/make_vocabulary.py")
    if args.output.suffix != ".safetensors":
        raise VocabularyError(f"--output {args.output}: needed is a name that ends in .safetensors")
    if bool(args.names) == (args.classes is not None):
        raise VocabularyError("give the names either as --names or as --classes FILE")
    if (args.text is None) == (args.published is None):
        raise VocabularyError("give either --text (CLIP's weights) or --published (a .pth vocabulary)")
    listed = ClassList(args.names) if args.classes is None else read_class_list(args.classes)
    import torch

    from configs.schema import OVSAMConfig
    from model.checkpoints.clip import find_text, load_text
    from model.checkpoints.load import resolve
    from model.registry import model_config
    from model.vocabulary import check_names, make_vocabulary, read_vocabulary, save_vocabulary

    name, folder = args.model, args.text
    if name is None and folder is not None and (folder / "config.json").is_file():
        config = resolve(folder).config
    else:
        config = model_config(name or "ovsam-rn50x16")
    if not isinstance(config.segmenter, OVSAMConfig):
        given = f"--text {folder}: {config.name}" if name is None else f"--model {name}"
        raise ModelError(f"{given} gives no names. Take ovsam-rn50x16 or another of its family")
    config = config.segmenter
    check_names(listed.names)
    is_base, is_novel = (None if path is None else members(listed.names, path) for path in (args.base, args.novel))
    if listed.rare is not None and args.base is None and args.novel is None:
        is_novel = list(listed.rare)
        is_base = [not rare for rare in is_novel]
    kinds = {
        name: None if values is None else torch.tensor(values)
        for name, values in (("is_base", is_base), ("is_novel", is_novel))
    }
    if args.published is not None:
        vocabulary = replace(read_vocabulary(args.published, listed.names), **kinds)
        vocabulary.check_width(config.embed_width)
    else:
        weights = find_text(args.text) if args.text.is_dir() else args.text
        if weights is None:
            raise VocabularyError(f"--text {args.text} has no text tower (text.safetensors or RN50x16.pt) in it")
        vocabulary = make_vocabulary(load_text(config, weights), listed.names, **kinds)
    save_vocabulary(args.output, vocabulary)
    logging.getLogger(__name__).info("%d names written to %s", len(vocabulary), args.output)
    return 0


if __name__ == "__main__":
    run_main(main)
