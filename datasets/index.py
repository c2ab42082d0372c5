"""The index of a data set: its annotation files, scanned once and packed into arrays that are mapped into memory.

One file: magic, length of a JSON header, header (what arrays there are), arrays. Nothing in it is ever executed, and a
file that is not whole is written anew. Its name holds a digest of the size and time of every annotation file, so that
a changed one is scanned again.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils.errors import DataError
from utils.files import atomic_path

from .regions import Part

FORMAT = 2
"""Increase it whenever the scanners or the arrays change, so that nobody reads an index of old code."""

_MAGIC = b"TextSAM\n"
_ALIGN = 64
_FOLDER = ".textsam_index"
logger = logging.getLogger(__name__)


class Phrase(NamedTuple):
    """A text, its stable name in the data set, and the numbers of its regions: none for a phrase without target.

    `form` says what the phrase goes by (a name, a place, ...) where the annotation file says it.
    """

    text: str
    id: str
    regions: Sequence[int]
    form: str = ""


class Entry(NamedTuple):
    """An image (path relative to the image folder; height and width 0 where it could not be measured), its phrases."""

    path: str
    height: int
    width: int
    phrases: Sequence[Phrase]


Add = Callable[[Sequence[Part]], int]
"""Stores a region and returns its number."""


@dataclass
class Scan:
    """What a scanner is given: `add` stores a region and returns its number, `notes` is what the user should know."""

    add: Add
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Where a data set lies and how it is read.

    * `name`: as the user gave it. `root`: what label and mask pictures are relative to. `images`: the image folder.
    * `files`: the annotation files; a change of one of them makes the index out of date.
    * `scan`: yields one entry per image.
    """

    name: str
    root: Path
    images: Path
    files: Sequence[Path]
    scan: Callable[[Scan], Iterable[Entry]]


class Texts:
    """Texts as bytes with offsets: `add` while building, `[i]` while reading."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.offsets = array("q", [0])
        self._known: dict[str, int] = {}

    def add(self, text: str) -> None:
        """Append a text; a file name may hold bytes that are not UTF-8."""
        self.data += text.encode("utf-8", "surrogateescape")
        self.offsets.append(len(self.data))

    def number(self, text: str) -> int:
        """Return the place of a text; it is appended only once. Not to be mixed with `add`."""
        place = self._known.setdefault(text, len(self._known))
        if place == len(self.offsets) - 1:
            self.add(text)
        return place


class Index:
    """Arrays of a data set, read only, shared between processes by the operating system."""

    def __init__(self, path: Path) -> None:
        """Open an index file.

        Raises:
            ValueError: it is not whole, or of another format. OSError: it cannot be opened.
        """
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._map[: len(_MAGIC)] != _MAGIC:
            raise ValueError("not an index")
        start = len(_MAGIC) + 8
        end = start + int.from_bytes(self._map[len(_MAGIC) : start], "little")
        header = json.loads(self._map[start:end])
        if header["format"] != FORMAT or header["bytes"] != len(self._map):
            raise ValueError("another format, or not whole")
        self.notes: list[str] = header["notes"]
        self._arrays = {
            name: np.frombuffer(self._map, dtype, count, offset)
            for name, (dtype, count, offset) in header["arrays"].items()
        }

    def __len__(self) -> int:
        return len(self._arrays["heights"])

    @property
    def phrase_count(self) -> int:
        """Phrases of all images."""
        return len(self._arrays["phrase_texts"])

    @property
    def phrase_starts(self) -> np.ndarray:
        """int64 [images + 1]: phrases of image i are `phrase_starts[i]` to `phrase_starts[i + 1]`."""
        return self._arrays["phrase_starts"]

    @property
    def part_counts(self) -> np.ndarray:
        """int64 [phrases]: how many parts the mask of a phrase has; 0 where there is no target."""
        counts = np.diff(self._arrays["part_starts"])[self._arrays["targets"]]
        return np.diff(np.concatenate(([0], np.cumsum(counts)))[self._arrays["target_starts"]])

    def image(self, i: int) -> tuple[str, int, int]:
        """Return path, height and width of an image."""
        return self._text("path", i), int(self._arrays["heights"][i]), int(self._arrays["widths"][i])

    def path_of(self, i: int) -> str:
        """Return the path of an image."""
        return self._text("path", i)

    def text(self, phrase: int) -> str:
        """Return the text of a phrase."""
        return self._text("text", int(self._arrays["phrase_texts"][phrase]))

    def id(self, phrase: int) -> str:
        """Return the name of a phrase."""
        return self._text("id", phrase)

    def form(self, phrase: int) -> str:
        """Return the form of a phrase, "" where the data set does not say it."""
        return self._text("form", int(self._arrays["phrase_forms"][phrase]))

    def regions(self, phrase: int) -> tuple[int, ...]:
        """Return the numbers of the regions of a phrase."""
        start, end = self._arrays["target_starts"][phrase : phrase + 2]
        return tuple(self._arrays["targets"][start:end].tolist())

    def parts(self, region: int) -> list[Part]:
        """Return the parts of a region."""
        start, end = self._arrays["part_starts"][region : region + 2].tolist()
        kinds = self._arrays["part_kinds"][start:end].tolist()
        offsets = self._arrays["part_offsets"][start : end + 1].tolist()
        data = self._arrays["part_data"]
        return [
            Part(kind, data[first:last].tobytes())
            for kind, first, last in zip(kinds, offsets[:-1], offsets[1:], strict=True)
        ]

    def _text(self, kind: str, i: int) -> str:
        first, last = self._arrays[f"{kind}_offsets"][i : i + 2].tolist()
        return self._arrays[f"{kind}_data"][first:last].tobytes().decode("utf-8", "surrogateescape")


class _Builder:
    """Packs entries into arrays; the data of regions goes to a temporary file."""

    def __init__(self, spill: BinaryIO) -> None:
        self.spill = spill
        self.heights, self.widths = array("i"), array("i")
        self.phrase_starts, self.target_starts = array("q", [0]), array("q", [0])
        self.phrase_texts, self.phrase_forms, self.targets = array("i"), array("i"), array("q")
        self.part_starts, self.part_offsets, self.part_kinds = array("q", [0]), array("q", [0]), array("B")
        self.paths, self.texts, self.forms, self.ids = Texts(), Texts(), Texts(), Texts()

    def add_region(self, parts: Sequence[Part]) -> int:
        for part in parts:
            self.spill.write(part.data)
            self.part_kinds.append(part.kind)
            self.part_offsets.append(self.part_offsets[-1] + len(part.data))
        self.part_starts.append(len(self.part_kinds))
        return len(self.part_starts) - 2

    def add_entries(self, entries: Iterable[Entry], name: str) -> None:
        """Pack entries; images without phrases are left out.

        Raises:
            DataError: an image comes twice, or two phrases of one image have the same name.
        """
        seen: set[str] = set()
        for entry in entries:
            if not entry.phrases:
                continue
            if entry.path in seen:
                raise DataError(f"{name}: image {entry.path} is listed under two ids. Give each image one id")
            seen.add(entry.path)
            self.paths.add(entry.path)
            self.heights.append(entry.height)
            self.widths.append(entry.width)
            for phrase in entry.phrases:
                self._add_phrase(phrase)
            self.phrase_starts.append(len(self.phrase_texts))

    def _add_phrase(self, phrase: Phrase) -> None:
        self.phrase_texts.append(self.texts.number(phrase.text))
        self.phrase_forms.append(self.forms.number(phrase.form))
        self.ids.add(phrase.id)
        self.targets.extend(phrase.regions)
        self.target_starts.append(len(self.targets))

    def write(self, path: Path, name: str, notes: list[str]) -> None:
        arrays: dict[str, Any] = {
            key: np.asarray(getattr(self, key))
            for key in ("heights", "widths", "phrase_starts", "target_starts", "phrase_texts", "phrase_forms",
                        "targets",
                        "part_starts", "part_offsets", "part_kinds")
        }  # fmt: skip
        for key, texts in (("path", self.paths), ("text", self.texts), ("form", self.forms), ("id", self.ids)):
            arrays[f"{key}_offsets"] = np.asarray(texts.offsets)
            arrays[f"{key}_data"] = np.frombuffer(texts.data, np.uint8)
        sizes = {key: (value.dtype.str, value.size, value.nbytes) for key, value in arrays.items()}
        sizes["part_data"] = ("|u1", self.part_offsets[-1], self.part_offsets[-1])
        header = _header(name, notes, sizes)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for value in arrays.values():
                file.write(value.tobytes())
                file.write(bytes(-file.tell() % _ALIGN))
            self.spill.seek(0)
            shutil.copyfileobj(self.spill, file, 1 << 20)


def _header(name: str, notes: list[str], sizes: dict[str, tuple[str, int, int]]) -> bytes:
    """Return magic, length and header; it names where each array lies, so its own length is found by trying."""
    length = 1024
    while True:
        arrays, offset = {}, length
        for key, (dtype, count, size) in sizes.items():
            offset += -offset % _ALIGN
            arrays[key] = (dtype, count, offset)
            offset += size
        header = {"format": FORMAT, "name": name, "notes": notes, "bytes": offset, "arrays": arrays}
        text = json.dumps(header).encode()
        needed = len(_MAGIC) + 8 + len(text)
        if needed <= length:
            text += b" " * (length - needed)
            return _MAGIC + len(text).to_bytes(8, "little") + text
        length = needed + (-needed % _ALIGN) + _ALIGN


def open_index(source: Source) -> Index:
    """Return the index of a data set; scan the annotation files where there is none or they have changed.

    Raises:
        DataError: an annotation file is missing, or holds something that cannot be a mask or a phrase; no folder for
            the index can be written.
    """
    name = f"{_safe(source.name)}-{_digest(source)}.index"
    folders = _folders(source.root)
    for folder in folders:
        if (index := _try_open(folder / name)) is not None:
            return index
    folder = _first_writable(folders)
    with _locked(folder / f"{_safe(source.name)}.lock"):
        path = folder / name
        index = _try_open(path)  # another process may have scanned meanwhile
        return index if index is not None else _build(source, path)


def _build(source: Source, path: Path) -> Index:
    logger.info("%s: scanning the annotation files, once", source.name)
    with tempfile.TemporaryFile(dir=path.parent) as spill:
        builder = _Builder(spill)
        scan = Scan(builder.add_region)
        builder.add_entries(source.scan(scan), source.name)
        if not builder.phrase_texts:
            files = ", ".join(str(file) for file in source.files[:2])
            raise DataError(f"{source.name}: no phrase in {files}. Check that the file is complete")
        builder.write(path, source.name, scan.notes)
    for note in scan.notes:
        logger.warning("%s: %s", source.name, note)
    for old in path.parent.glob(f"{_safe(source.name)}-*.index"):
        if old.name != path.name:
            old.unlink(missing_ok=True)
    return Index(path)


def _try_open(path: Path) -> Index | None:
    try:
        return Index(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("%s is not used: %s", path, error)
        return None


def _digest(source: Source) -> str:
    """Return a digest of name, format, and the size and time of every annotation file."""
    facts: list[Any] = [FORMAT, source.name]
    for file in source.files:
        try:
            state = file.stat()
        except OSError:
            raise DataError(
                f"{source.name}: no such file: {file}. Put it there, or give another --root / dataset folder"
            ) from None
        if file.is_dir():
            with os.scandir(file) as entries:
                facts += sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file())
        else:
            facts.append((file.name, state.st_size, state.st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "backslashreplace")).hexdigest()[:20]


def _safe(name: str) -> str:
    """Return a file name for a data set; two names never give the same one."""
    readable = re.sub(r"[^A-Za-z0-9+_.]+", "_", name)[-60:]
    return f"{readable}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _folders(root: Path) -> list[Path]:
    """Return where an index may lie: beside the data, or in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [root / _FOLDER, Path(cache) / "textsam" / "index" / place]


def _first_writable(folders: Sequence[Path]) -> Path:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise DataError(
        f"the index can be written neither to {folders[0]} nor to {folders[1]}. "
        "Make one of them writable, or set XDG_CACHE_HOME to a folder that is"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process scan while the others wait. Where there are no locks, all scan: files are replaced whole."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
