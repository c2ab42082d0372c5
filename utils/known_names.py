"""The names of a vocabulary file, for what reads annotations: which class of theirs is which name."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import VocabularyError, nearest


@dataclass(frozen=True)
class KnownNames:
    """The names of a vocabulary file; `base`, `novel`: places of either kind, or None where it does not say."""

    names: tuple[str, ...]
    base: frozenset[int] | None
    novel: frozenset[int] | None

    def kind(self, place: int) -> str:
        """Return `base`, `novel`, or '' for a name of neither."""
        return "base" if place in (self.base or ()) else "novel" if place in (self.novel or ()) else ""

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
        found = found or [i for i, known in enumerate(self.names) if re.split("[,/]", known)[0].strip() == name]
        if len(found) != 1:
            reason = "the first wording of several names of" if found else "not in"
            raise VocabularyError(
                f"class list and annotations disagree: {name!r}, a category of {where}, is {reason} the vocabulary."
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
