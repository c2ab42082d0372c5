"""Key rules: how our tensor names map to a published format, and back.

Rules are written in one direction, ours -> theirs. A `KeyMap` applies them to the names that a model really has, so the
way back is the inverse of a finite table and cannot disagree with the way there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from utils.errors import CheckpointError, compress_names

Rules = tuple[tuple[str, str], ...]
"""(regular expression, replacement) pairs, applied in order to a name."""


def rename(name: str, rules: Rules) -> str:
    """Apply rules to a name."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Format:
    """A published key layout of one part of a model.

    * `rules`: ours -> theirs.
    * `split`: our name -> (template with `{}`, rows): the rows of our tensor are stored one by one, numbered.
    * `parts`: (start of their names, what it belongs to), for messages; the first match counts.
    """

    rules: Rules
    split: dict[str, tuple[str, int]] = field(default_factory=dict)
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """Where a format sits: below `ours` in our names and below `theirs` in the published ones."""

    ours: str
    theirs: str
    format: Format


OURS = (Section("", "", Format(())),)
"""The layout of our own folders: every name as it is."""


class KeyMap:
    """The finite table between the tensors of one model and one published layout."""

    def __init__(self, names: Iterable[str], sections: tuple[Section, ...]) -> None:
        self.sections = sections
        self.theirs = {name: self._translate(name) for name in names}
        self.ours = {their: our for our, theirs in self.theirs.items() for their in theirs}
        if len(self.ours) != sum(map(len, self.theirs.values())):
            raise ValueError("key rules map two of our names to one of theirs")

    def _translate(self, name: str) -> tuple[str, ...]:
        section = next(section for section in self.sections if name.startswith(section.ours))
        rest = name.removeprefix(section.ours)
        if rest in section.format.split:
            template, rows = section.format.split[rest]
            return tuple(section.theirs + template.format(i) for i in range(rows))
        return (section.theirs + rename(rest, section.format.rules),)

    def describe(self, their_name: str) -> str:
        """Return what a published tensor belongs to, in words."""
        for section in self.sections:
            rest = their_name.removeprefix(section.theirs)
            if their_name.startswith(section.theirs):
                for start, part in section.format.parts:
                    if rest.startswith(start):
                        return part
        return "no part of this model"

    def describe_all(self, their_names: Iterable[str]) -> str:
        """Return every name, grouped by what it belongs to, on one line."""
        groups: dict[str, list[str]] = {}
        for name in their_names:
            groups.setdefault(self.describe(name), []).append(name)
        return "; ".join(f"{part}: {compress_names(names)}" for part, names in groups.items())


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers by name, a tensor with two names once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def check_keys(key_map: KeyMap, found: Iterable[str], source: str) -> None:
    """Compare the keys of a file with those that the model needs.

    Raises:
        CheckpointError: names every missing and every extra key and what it belongs to.
    """
    found = set(found)
    missing = [name for name in key_map.ours if name not in found]
    extra = sorted(found - key_map.ours.keys())
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing ({key_map.describe_all(missing)})")
        if extra:
            parts.append(f"{len(extra)} that the model does not have ({key_map.describe_all(extra)})")
        raise CheckpointError(
            f"{source} does not fit the model: tensors {' and '.join(parts)}. "
            "Download the checkpoint again, or name the architecture it was made for"
        )
