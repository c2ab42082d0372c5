"""ADE20K scene parsing (SceneParse150): "[semantic] wall" and all pixels of that class."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.errors import DataError
from utils.tokenizer import semantic_phrase

from .annotations import read_json
from .index import Entry, Scan, Source
from .label_maps import scan_label_maps

SPLITS = ("training", "validation")
IGNORED = 0


def ade20k_source(name: str, parts: Sequence[str], root: Path) -> Source:
    """Return a split of ADE20K: label 0 counts for nobody, label k is class k - 1 of `ade20k_classes.json`."""
    split = parts[1]
    classes = root / "ade20k" / "ade20k_classes.json"
    labels = root / "ade20k" / "annotations" / split

    def scan(scan: Scan) -> Iterator[Entry]:
        texts = read_json(classes)
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{classes}: needed is a list of class names")
        names = dict(enumerate(texts, start=1))
        phrases = {value: semantic_phrase(text) for value, text in names.items()}
        yield from scan_label_maps(labels, root, names, phrases, IGNORED, scan)

    return Source(name, root, root / "ade20k" / "images" / split, (classes, labels), scan)
