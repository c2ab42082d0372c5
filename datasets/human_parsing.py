"""Human parsing (ATR, 17,706 pictures): "[semantic] left arm" and its pixels, left and right as the viewer's."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.tokenizer import semantic_phrase

from .index import Entry, Scan, Source
from .label_maps import scan_label_maps

NAMES = (
    "background", "hat", "hair", "sunglasses", "upper clothes", "skirt", "pants", "dress", "belt", "right shoe",
    "left shoe", "face", "right leg", "left leg", "right arm", "left arm", "bag", "scarf",
)  # fmt: skip
"""Name of each label. Left and right are swapped against the original labels, which mean the person's own."""

IGNORED = 255


def human_parsing_source(name: str, parts: Sequence[str], root: Path) -> Source:
    """Return the human parsing set; the background is a phrase too."""
    folder = root / "humanparsing"
    labels = folder / "SegmentationClassAug"
    names = dict(enumerate(NAMES))
    phrases = {value: semantic_phrase(text) for value, text in names.items()}

    def scan(scan: Scan) -> Iterator[Entry]:
        yield from scan_label_maps(labels, root, names, phrases, IGNORED, scan)

    return Source(name, root, folder / "JPEGImages", (labels,), scan)
