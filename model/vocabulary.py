"""Vocabularies: the names that regions are compared with, and their vectors in CLIP's common space.

Source of the rules and templates: arXiv 2401.02955 and ViLD (arXiv 2104.13921).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import VocabularyError, compress_names

from .checkpoints.files import load_tensors, write_safetensors
from .encoders.clip_text import ClipText

TEMPLATES = (
    "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene", "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(
        text.replace("{}", f"{size} {{}}")
        for text, size in product(
            ("a photo of a {}.", "This is a photo of a {}.", "There is a {} in the scene."),
            ("small", "medium", "large"),
        )
    ),
)  # fmt: skip
"""What is said of each name; capitals and full stops as published, they bear on the vectors."""

MAX_NAMES = 100_000


@dataclass(frozen=True)
class Vocabulary:
    """K names and their vectors.

    * `names`: as they are shown, all different.
    * `vectors`: float32 [K, P, D], unit vectors; a name has up to P wordings, one with fewer repeats its first.
    * `is_base`, `is_novel`: bool [K], whether the recogniser was trained with a name, or not but may answer it. None
      counts every name as novel. A name that is neither is never answered by both branches together.
    """

    names: tuple[str, ...]
    vectors: Tensor
    is_base: Tensor | None = None
    is_novel: Tensor | None = None

    def __post_init__(self) -> None:
        check_names(self.names)
        if self.vectors.ndim != 3 or len(self.vectors) != len(self.names):
            raise VocabularyError(
                f"class list and vocabulary disagree: {len(self.names)} names, but vectors {list(self.vectors.shape)}. "
                "Needed is one row of vectors for each name, in the same order"
            )
        for members in (self.is_base, self.is_novel):
            if members is not None and (members.dtype != torch.bool or members.shape != (len(self.names),)):
                raise VocabularyError(
                    f"base or novel names are {members.dtype} {list(members.shape)}; needed: bool [{len(self.names)}]"
                )
        if not self.vectors.isfinite().all():
            raise VocabularyError("the vocabulary's vectors hold infinite numbers or NaN. Make it again")

    def __len__(self) -> int:
        return len(self.names)

    def check_width(self, width: int) -> None:
        """Refuse vectors of another width than a model's.

        Raises:
            VocabularyError: names both.
        """
        if self.vectors.shape[-1] != width:
            raise VocabularyError(
                f"the vocabulary's vectors have {self.vectors.shape[-1]} channels, the model needs {width}: it was "
                "made with another CLIP. Make it with this model's text tower (tools/make_vocabulary.py)"
            )

    def shares(self, base: float, novel: float) -> Tensor:
        """Return a weight for each name and the background (as base), float32 [K + 1]; NaN for names of neither."""
        count = len(self)
        if self.is_base is None and self.is_novel is None:
            return torch.tensor([novel] * count + [base])
        shares = torch.full((count + 1,), torch.nan)
        for members, value in ((self.is_novel, novel), (self.is_base, base)):
            if members is not None:
                shares[:count][members] = value
        shares[count] = base
        return shares


def check_names(names: Sequence[str]) -> None:
    """Refuse no names, too many, empty ones and repeated ones.

    Raises:
        VocabularyError: the first that is wrong.
    """
    if not names:
        raise VocabularyError("the vocabulary is empty. Give at least one name")
    if len(names) > MAX_NAMES:
        raise VocabularyError(f"{len(names)} names: allowed are up to {MAX_NAMES}")
    seen: set[str] = set()
    twice = [name for name in names if name in seen or seen.add(name)]
    if twice:
        raise VocabularyError(f"names that are there twice: {', '.join(map(repr, twice[:5]))}. Give each once")
    for number, name in enumerate(names, 1):
        if not any(wordings(name)):
            raise VocabularyError(f"name {number} is {name!r}, which says nothing. Leave it out")


def wordings(name: str) -> list[str]:
    """Return the wordings of a class string by the published rule.

    `_or_`, `/` and commas separate wordings, `_` is a space, and all is lower case: `car_(automobile)` becomes
    `car (automobile)`, and `bicycle,bike` two wordings.
    """
    text = name.replace("_or_", ",").replace("/", ",").replace("_", " ").lower()
    return [part.strip() for part in text.split(",") if part.strip()]


def make_vocabulary(
    text: ClipText,
    names: Iterable[str],
    is_base: Tensor | None = None,
    is_novel: Tensor | None = None,
) -> Vocabulary:
    """Encode names: every wording in every template, averaged.

    Args:
        names: class strings; see `wordings`.

    Raises:
        VocabularyError: no names, or one that is empty or repeated.
    """
    names = tuple(names)
    check_names(names)
    listed = [wordings(name) for name in names]
    phrases = [template.format(wording) for group in listed for wording in group for template in TEMPLATES]
    vectors = F.normalize(text.encode(phrases), dim=-1).unflatten(0, (-1, len(TEMPLATES))).mean(1)
    groups = F.normalize(vectors, dim=-1).split([len(group) for group in listed])
    most = max(map(len, groups))
    rows = [torch.cat([group, group[:1].expand(most - len(group), -1)]) for group in groups]
    return Vocabulary(names, torch.stack(rows).cpu(), is_base, is_novel)


def save_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Write a vocabulary as safetensors, its names in the header."""
    tensors = {"vectors": vocabulary.vectors.float()}
    for name in ("is_base", "is_novel"):
        members = getattr(vocabulary, name)
        if members is not None:
            tensors[name] = members
    write_safetensors(path, tensors, {"names": json.dumps(vocabulary.names)})


def read_vocabulary(path: str | Path, names: Sequence[str] | None = None) -> Vocabulary:
    """Read a vocabulary: a file of `save_vocabulary`, or a published .pth file, which holds vectors alone.

    Args:
        names: of the rows, needed for a .pth file, and compared with those in a file of ours.

    Raises:
        VocabularyError: no such file, not a vocabulary, or names that do not fit it.
    """
    path = Path(path)
    if not path.is_file():
        raise VocabularyError(f"no such vocabulary: {path}. Make it with tools/make_vocabulary.py")
    if path.stat().st_size == 0:
        raise VocabularyError(f"{path} is empty (0 bytes). Make it again with tools/make_vocabulary.py")
    if path.suffix != ".safetensors":
        return _published(path, names)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            stated = json.loads((file.metadata() or {}).get("names", "null"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise VocabularyError(f"{path} is damaged ({error}). Make it again with tools/make_vocabulary.py") from None
    unknown = tensors.keys() - {"vectors", "is_base", "is_novel"}
    is_listed = isinstance(stated, list) and all(isinstance(name, str) for name in stated)
    if "vectors" not in tensors or unknown or not is_listed:
        extra = f", and it holds {compress_names(sorted(unknown))}" if unknown else ""
        raise VocabularyError(f"{path} is no vocabulary: needed are 'vectors' and their names{extra}")
    if names is not None and tuple(names) != tuple(stated):
        reason = f"{len(names)} and {len(stated)} names"
        if len(names) == len(stated):
            reason = "{!r} and {!r}".format(
                *next(pair for pair in zip(names, stated, strict=True) if len(set(pair)) > 1)
            )
        raise VocabularyError(f"class list and vocabulary {path} disagree: {reason}. Make the vocabulary of the list")
    return Vocabulary(tuple(stated), tensors["vectors"].float(), tensors.get("is_base"), tensors.get("is_novel"))


def _published(path: Path, names: Sequence[str] | None) -> Vocabulary:
    vectors = load_tensors(path)
    if not isinstance(vectors, Tensor) or vectors.ndim != 3 or not vectors.is_floating_point():
        raise VocabularyError(f"{path} is no vocabulary: needed is one tensor [names, wordings, channels]")
    if names is None:
        raise VocabularyError(f"{path} holds the vectors of {len(vectors)} names, but not the names. Give them too")
    return Vocabulary(tuple(names), vectors.float())
