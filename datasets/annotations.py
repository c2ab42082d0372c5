"""Annotation files: JSON read whole or piece by piece, with what every reader checks."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from utils.errors import DataError

_CHUNK = 1 << 24
_MAX_ELEMENT = 1 << 28
_KINDS = {"{": "an object", "[": "a list"}


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        DataError: no such file, or not JSON.
    """
    try:
        with path.open("rb") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}). It may be cut off: download it again") from None


def stream_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of a JSON object in the order of the file; of an array every element, one by one.

    A file of gigabytes is read in pieces, so that only one element is held.

    Raises:
        DataError: no such file, or not a JSON object.
    """
    with _one_line(path), path.open(encoding="utf-8") as file:
        yield from _Stream(file.read, path).walk()


def stream_list(path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON array, one by one; see `stream_json`.

    Raises:
        DataError: no such file, or not a JSON array.
    """
    with _one_line(path), path.open(encoding="utf-8") as file:
        yield from _Stream(file.read, path).all_elements()


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a file of JSON into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not JSON ({error}). It may be cut off: download it again") from None


class _Stream:
    """A cursor over the text of a JSON file, of which a piece is held."""

    def __init__(self, read: Callable[[int], str], path: Path) -> None:
        self.read, self.path = read, path
        self.text, self.at = "", 0
        self.decode = json.JSONDecoder().raw_decode

    def all_elements(self) -> Iterator[Any]:
        """Yield the elements of a file that is one array."""
        self.needs("[", "a list")
        yield from self.elements()

    def needs(self, character: str, kind: str) -> None:
        found = self.peek()
        if found != character and found in "{[":
            raise DataError(f"{self.path} holds {_KINDS[found]}; needed is {kind}. Is it the right file?")

    def walk(self) -> Iterator[tuple[str, Any]]:
        self.needs("{", "an object")
        self.expect("{")
        while self.peek() != "}":
            key = self.value()
            self.expect(":")
            if self.peek() == "[":
                yield from ((key, element) for element in self.elements())
            else:
                yield key, self.value()
            if self.peek() != "}":
                self.expect(",")
                if self.peek() == "}":
                    raise ValueError("a comma before the end of the object")

    def elements(self) -> Iterator[Any]:
        self.expect("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.expect(",")
        self.at += 1

    def more(self) -> bool:
        """Drop what was read, append the next piece; False at the end of the file."""
        piece = self.read(max(_CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """Return the next character that is not white space."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                raise ValueError("the file ends too early")

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"{character!r} expected, {self.peek()!r} found")
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end < len(self.text):  # a number at the end of the piece may go on
                    self.at = end
                    return value
            except ValueError:
                if len(self.text) - self.at > _MAX_ELEMENT:
                    raise
            if not self.more():
                raise ValueError("the file ends too early")


class CocoImage(NamedTuple):
    """An image of a COCO file."""

    path: str
    height: int
    width: int


def require(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return `record[key]`.

    Raises:
        DataError: the record is no object, has no such key, or its value is of another type.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: {type(record).__name__} found where an object with {key!r} is needed")
    if key not in record:
        raise DataError(f"{where}: no {key!r} among {', '.join(sorted(map(str, record)))}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {key} is {value!r:.60}; needed is {kinds}")
    return value


def by_id(records: Iterable[Any], key: str, what: str, path: Path) -> dict[int | str, Any]:
    """Return id -> record.

    Raises:
        DataError: an id is missing, no number or text, or there twice.
    """
    known: dict[int | str, Any] = {}
    for record in records:
        identity = require(record, key, (int, str), f"{path}, one of the {what}s")
        if identity in known:
            raise DataError(f"{path}: {what} {key} {identity!r} is there twice. Ids must be unique in a file")
        known[identity] = record
    return known


def find(known: Mapping[Any, Any], identity: Any, what: str, where: str) -> Any:
    """Return the record with an id.

    Raises:
        DataError: nothing has that id.
    """
    try:
        return known[identity]
    except (KeyError, TypeError):
        raise DataError(
            f"{where}: {what} {identity!r:.60} is not in the file, which has {len(known)} {what}s. "
            "Take the files of one release"
        ) from None


def relative_path(value: Any, where: str) -> str:
    """Return a file name from an annotation file that may not leave its folder.

    Raises:
        DataError: it is no text, absolute, or contains `..` or NUL.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        raise DataError(f"{where}: file name {value!r:.80}; needed is a path")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: file name {value!r:.80} leaves the image folder; needed is a path inside it")
    return str(path)


def read_coco(path: Path, keys: Iterable[str] = ("images", "annotations")) -> dict[str, list]:
    """Return a COCO file.

    Raises:
        DataError: not JSON, or one of the lists is missing.
    """
    content = read_json(path)
    for key in keys:
        require(content, key, list, str(path))
    return content


def coco_image(record: Any, path: Path) -> CocoImage:
    """Return an image record of the COCO file `path`.

    Raises:
        DataError: file name, height or width are missing or impossible.
    """
    where = f"{path}, image {record.get('id')}" if isinstance(record, Mapping) else str(path)
    name = relative_path(require(record, "file_name", str, where), where)
    height, width = (require(record, key, int, where) for key in ("height", "width"))
    if not (0 < height < 1 << 20 and 0 < width < 1 << 20):
        raise DataError(f"{where}: size {width}x{height}; needed are pixels")
    return CocoImage(name, height, width)


def coco_images(content: Mapping[str, list], path: Path) -> dict[int | str, CocoImage]:
    """Return id -> image of a COCO file.

    Raises:
        DataError: an id is there twice, or a record is incomplete.
    """
    images = by_id(content["images"], "id", "image", path)
    return {identity: coco_image(record, path) for identity, record in images.items()}
