"""Lists of class names as users have them: an annotation file of COCO or LVIS, or a text file with one name a line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import VocabularyError, nearest

MAX_TEXT, MAX_JSON = 16 << 20, 4 << 30
"""Bounds on the bytes of a list and of an annotation file; LVIS has 1.1 GB."""


@dataclass(frozen=True)
class ClassList:
    """Names, in the order of the file's ids; of LVIS also which are rare: the usual novel classes."""

    names: tuple[str, ...]
    rare: tuple[bool, ...] | None = None


def read_class_list(path: str | Path) -> ClassList:
    """Read class names: the categories of a COCO or LVIS annotation file (.json) by id, else one name a line.

    A line may hold several wordings of a class, parted by commas.

    Raises:
        VocabularyError: no such file, one that holds no names, or too large.
    """
    path = Path(path)
    if not path.is_file():
        raise VocabularyError(f"no such class list: {path}. Needed is a text file or an annotation file (.json)")
    is_json, size = path.suffix == ".json", path.stat().st_size
    bound = MAX_JSON if is_json else MAX_TEXT
    if size > bound:
        raise VocabularyError(f"{path} has {size:,} bytes, over the bound of {bound:,}")
    try:
        text = path.read_text("utf-8")
        if is_json:
            return _categories(json.loads(text), path)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        kind = "an annotation file" if is_json else "text"
        raise VocabularyError(f"{path} is not {kind} ({error}). Check the file") from None
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise VocabularyError(f"{path} holds no names. Write one a line")
    return ClassList(names)


def members(names: Sequence[str], path: str | Path) -> list[bool]:
    """Return for each name whether a class list holds it.

    Raises:
        VocabularyError: as `read_class_list`, or the list holds something that is not a name.
    """
    chosen = set(read_class_list(path).names)
    if unknown := sorted(chosen - set(names)):
        raise VocabularyError(f"{path}: {unknown[0]!r} is not in the class list.{nearest(unknown[0], names)}")
    return [name in chosen for name in names]


def listed_words(text: str) -> tuple[str, ...]:
    """Return the names of a list in one line, parted by commas: `cat/kitten, dog` are two, the first with two wordings.

    Raises:
        VocabularyError: one is empty.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise VocabularyError(f"{text!r} has an empty name. Part names by single commas: 'cat,dog'")
    return names


def _categories(content: Any, path: Path) -> ClassList:
    categories = content.get("categories") if isinstance(content, dict) else None
    is_right = isinstance(categories, list) and all(
        isinstance(one, dict) and isinstance(one.get("id"), int) and isinstance(one.get("name"), str)
        for one in categories
    )
    if not categories or not is_right:
        raise VocabularyError(f"{path} holds no 'categories' with ids and names. Take a COCO or LVIS annotation file")
    categories = sorted(categories, key=lambda one: one["id"])
    names = tuple(one["name"] for one in categories)
    if not all("frequency" in one for one in categories):
        return ClassList(names)
    return ClassList(names, tuple(one["frequency"] == "r" for one in categories))
