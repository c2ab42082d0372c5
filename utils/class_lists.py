"""Lists of class names as users have them: an annotation file of COCO or LVIS, or a text file with one name a line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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


@dataclass(frozen=True)
class KnownNames:
    """The names of a vocabulary file; `base`, `novel`: places of either kind, or None where it does not say."""

    names: tuple[str, ...]
    base: frozenset[int] | None
    novel: frozenset[int] | None

    @property
    def trained(self) -> frozenset[int]:
        """The names that a recogniser may be trained with."""
        if self.base is not None:
            return self.base
        return frozenset(range(len(self.names))) - (self.novel or frozenset())

    @property
    def measured(self) -> frozenset[int]:
        """The names that a recogniser may be asked for: base and novel ones, or all."""
        if self.base is None or self.novel is None:
            return frozenset(range(len(self.names)))
        return self.base | self.novel

    def place(self, name: str, where: str) -> int:
        """Return the place of a class: of its name, or of the only one whose first wording it is.

        Raises:
            VocabularyError: there is none, or more than one.
        """
        found = [i for i, known in enumerate(self.names) if known == name]
        found = found or [i for i, known in enumerate(self.names) if known.split(",")[0].strip() == name]
        if len(found) != 1:
            reason = "the first wording of several names" if found else "not in it"
            raise VocabularyError(
                f"class list and annotations disagree: {name!r}, a category of {where}, is {reason} of the vocabulary."
                f"{nearest(name, self.names)} Make the vocabulary of all its classes"
            )
        return found[0]


def read_known_names(path: str | Path) -> KnownNames:
    """Read the names of a vocabulary file of tools/make_vocabulary.py, without their vectors.

    Raises:
        VocabularyError: no such file, or not a vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise VocabularyError(f"no such vocabulary: {path}. Make it with tools/make_vocabulary.py")
    if path.suffix != ".safetensors":
        raise VocabularyError(
            f"{path} is no .safetensors file, and has no names. Convert it: make_vocabulary --published"
        )
    try:
        with safe_open(path, "np") as file:
            names = json.loads((file.metadata() or {}).get("names", "null"))
            members = {key: file.get_tensor(key) for key in ("is_base", "is_novel") if key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise VocabularyError(f"{path} is damaged ({error}). Make it again with tools/make_vocabulary.py") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise VocabularyError(f"{path} is no vocabulary: it has no names. Make it with tools/make_vocabulary.py")
    places = {key: frozenset(rows.nonzero()[0].tolist()) for key, rows in members.items()}
    return KnownNames(tuple(names), places.get("is_base"), places.get("is_novel"))


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
