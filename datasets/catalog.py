"""Opening a data set by name: the one table of what there is."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import DataError, nearest
from utils.image import MAX_PIXELS

from .ade20k import ade20k_source
from .human_parsing import human_parsing_source
from .index import Source
from .objects365 import objects365_source
from .own_data import SUFFIXES, own_source
from .parts import partimagenet_source, pascal_part_source
from .raster import Overlaps
from .reader import PhraseDataset
from .refer import grefcoco_source, refer_source


class Family(NamedTuple):
    """Data sets that one function opens: the parts of a name after the first, as people split them, and what it is."""

    source: Callable[[str, Sequence[str], Path], Source]
    variants: Sequence[str]
    description: str


def _splits(by: str, *splits: str) -> tuple[str, ...]:
    return tuple(f"{by}|{split}" for split in splits)


_UNC = _splits("unc", "train", "val", "testA", "testB")
_UMD = _splits("umd", "train", "val", "test")
_REFCLEF = (*_UNC, "unc|testC", *_splits("berkeley", "train", "val", "test"))
_GOOGLE = _splits("google", "train", "val")

FAMILIES = {
    "refclef": Family(refer_source, _REFCLEF, "RefCLEF: phrases about objects in SAIAPR TC-12"),
    "refcoco": Family(refer_source, (*_UNC, *_GOOGLE, "google|test"), "RefCOCO"),
    "refcoco+": Family(refer_source, _UNC, "RefCOCO+: no words of place"),
    "refcocog": Family(refer_source, (*_UMD, *_GOOGLE), "RefCOCOg: long phrases"),
    "grefcoco": Family(grefcoco_source, _UNC, "gRefCOCO: several objects or none"),
    "ade20k": Family(ade20k_source, ("training", "validation"), "ADE20K: 150 classes"),
    "obj365": Family(objects365_source, ("",), "Objects365: categories with one object in the image"),
    "partimagenet": Family(partimagenet_source, ("train", "val"), "PartImageNet: parts of animals and things"),
    "pascal_part": Family(pascal_part_source, ("train", "val"), "Pascal-Part: parts of 20 classes"),
    "humanparsing": Family(human_parsing_source, ("",), "Human parsing: clothes and limbs"),
}

GROUPS = {
    "refer_seg": ("refclef|unc|train", "refcoco|unc|train", "refcoco+|unc|train", "refcocog|umd|train"),
    "all": (
        "refcoco|unc|val", "refcoco|unc|testA", "refcoco|unc|testB",
        "refcoco+|unc|val", "refcoco+|unc|testA", "refcoco+|unc|testB",
        "refcocog|umd|val", "refcocog|umd|test",
    ),
}  # fmt: skip
"""Names for several sets: the published training mixture, and the eight splits of the published evaluation."""


def list_datasets() -> list[str]:
    """Return the name of every published data set and split."""
    return [f"{family}|{variant}".rstrip("|") for family, entry in FAMILIES.items() for variant in entry.variants]


def describe(name: str) -> str:
    """Return what a data set is, in a few words."""
    family = name.split("|")[0]
    return FAMILIES[family].description if family in FAMILIES else "your own data"


def expand(name: str) -> list[str]:
    """Return the data sets a name stands for: those of a group, or itself."""
    return list(GROUPS.get(name, (name,)))


def list_present(root: str | Path) -> list[str]:
    """Return the published data sets whose annotation files lie below `root`."""
    return [name for name in list_datasets() if _is_present(name, Path(root))]


def open_dataset(
    name: str,
    root: str | Path = "dataset",
    *,
    lowercase: bool = False,
    overlaps: Overlaps = "union",
    skip_missing: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> PhraseDataset:
    """Open a data set.

    Args:
        name: as in `list_datasets()`, or the path of your own `.json` or `.jsonl` file, relative to `root`.
        root: folder of all data sets.
        lowercase: strip and lower-case the phrases, as the published evaluation does.
        overlaps: `union`, or `sum` for the published count of overlapping polygons.
        skip_missing: leave out images whose files are absent.
        max_pixels: bound on height * width of an image.

    Raises:
        DataError: the name is unknown, a file is missing, or it holds what cannot be a mask or a phrase.
    """
    return PhraseDataset(
        find_source(name, Path(root)),
        lowercase=lowercase,
        overlaps=overlaps,
        skip_missing=skip_missing,
        max_pixels=max_pixels,
    )


def find_source(name: str, root: Path) -> Source:
    """Return where a data set lies and how it is read.

    Raises:
        DataError: the name is unknown, or an annotation file is missing.
    """
    if name.endswith(SUFFIXES):
        return own_source(name, root / name)
    parts = name.split("|")
    family = FAMILIES.get(parts[0])
    if family is None:
        raise _unknown(name, [*list_datasets(), *GROUPS])
    lengths = {len([part for part in variant.split("|") if part]) + 1 for variant in family.variants}
    # Who split it is free: any refs(….).p will do. A set whose splits are a file or folder has no others.
    is_known = len(parts) == 3 if lengths == {3} else "|".join(parts[1:]) in family.variants
    if not is_known or not all(parts):
        raise _unknown(name, [known for known in list_datasets() if known.split("|")[0] == parts[0]])
    return family.source(name, parts, root)


def _unknown(name: str, known: Iterable[str]) -> DataError:
    known = list(known)
    return DataError(
        f"unknown data set {name!r}. Known: {', '.join(known)}; or a path to your own .json or .jsonl."
        f"{nearest(name, known)}"
    )


def _is_present(name: str, root: Path) -> bool:
    try:
        return all(file.exists() for file in find_source(name, root).files)
    except DataError:
        return False
