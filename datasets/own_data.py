"""Your own data: a COCO file with a phrase per annotation, or a line of JSON per phrase.

    {"image": "images/1.jpg", "phrase": "the red cup", "segmentation": [[x1, y1, x2, y2, ...]]}

`segmentation` is polygons, a run-length encoding, the path of a mask picture (not zero = object), or null for a phrase
that nothing in the image fits. Paths are relative to the folder of the file.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from PIL import Image

from utils.errors import DataError, nearest

from .annotations import by_id, find, read_coco, require
from .index import Entry, Phrase, Scan, Source
from .regions import parse_segmentation, picture_part

TEXT_KEYS = ("phrase", "caption")
LINE_KEYS = (*TEXT_KEYS, "image", "segmentation", "id")
SUFFIXES = (".json", ".jsonl")
_TURNED = (5, 6, 7, 8)
_ORIENTATION = 0x0112


def own_source(name: str, path: Path) -> Source:
    """Return the data set in a `.json` (COCO) or `.jsonl` file.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}. A data set of your own is a path to .json or .jsonl")

    def scan(scan: Scan) -> Iterator[Entry]:
        yield from _Collector(path, scan).entries()

    return Source(name, path.parent, path.parent, (path,), scan)


class _Size(NamedTuple):
    height: int
    width: int


class _Collector:
    """Collects the phrases of each image of a file."""

    def __init__(self, path: Path, scan: Scan) -> None:
        self.path, self.scan = path, scan
        self.sizes: dict[str, _Size] = {}
        self.phrases: dict[str, list[Phrase]] = {}
        self.ids: set[str] = set()

    def entries(self) -> Iterator[Entry]:
        """Yield an entry per image, in the order in which the file first names it."""
        if self.path.suffix == ".jsonl":
            self.read_lines()
        else:
            self.read_coco()
        repeated = [
            (image, text)
            for image, phrases in self.phrases.items()
            for text, count in Counter(phrase.text for phrase in phrases).items()
            if count > 1
        ]
        if repeated:
            image, text = repeated[0]
            self.scan.notes.append(
                f"{len(repeated)} phrases come several times on one image, each with its own mask, as {text!r} on "
                f"{image}. If they mean all of the objects, write one record with all the polygons"
            )
        for image, phrases in self.phrases.items():
            yield Entry(image, *self.sizes[image], phrases)

    def read_lines(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} cannot be read as UTF-8 ({error}). Save it as UTF-8") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON ({error}). Write one object per line") from None
            image = self.image_name(require(record, "image", str, where), where)
            unknown = [key for key in record if key not in LINE_KEYS]
            if unknown:
                raise DataError(
                    f"{where}: nobody reads {unknown[0]!r}; known: {', '.join(LINE_KEYS)}."
                    f"{nearest(unknown[0], LINE_KEYS)}"
                )
            if image not in self.sizes:
                self.sizes[image] = measure(self.path.parent / image)
            identity = require(record, "id", (int, str), where) if "id" in record else number
            self.add(image, record, identity, where)

    def read_coco(self) -> None:
        content = read_coco(self.path)
        images = by_id(content["images"], "id", "image", self.path)
        names = {}
        for identity, record in images.items():
            where = f"{self.path}, image {identity}"
            name = names[identity] = self.image_name(require(record, "file_name", str, where), where)
            if name in self.sizes:
                raise DataError(f"{where}: {name} has another id already. Give each image one id")
            if "height" in record and "width" in record:
                self.sizes[name] = _Size(*(require(record, key, int, where) for key in ("height", "width")))
            else:
                self.sizes[name] = measure(self.path.parent / name)
        for number, record in enumerate(content["annotations"]):
            require(record, "image_id", (int, str), f"{self.path}, annotation number {number}")
            identity = record.get("id", number)
            where = f"{self.path}, annotation {identity}"
            image = find(names, record["image_id"], "image", where)
            self.add(image, record, require({"id": identity}, "id", (int, str), where), where)

    def image_name(self, value: str, where: str) -> str:
        if not value.strip() or "\0" in value:
            raise DataError(f"{where}: image {value!r:.80}; needed is a path relative to {self.path.parent}")
        return PurePath(value).as_posix()

    def add(self, image: str, record: Mapping, identity: int | str, where: str) -> None:
        """Add the phrases of an annotation; all of them share its mask."""
        if str(identity) in self.ids:
            raise DataError(f"{where}: id {identity!r} is there twice. Ids must be unique in a file")
        self.ids.add(str(identity))
        texts = read_texts(record, where)
        regions = self.read_regions(image, record, where)
        phrases = self.phrases.setdefault(image, [])
        for i, text in enumerate(texts):
            phrases.append(Phrase(text, f"{identity}/{i}" if len(texts) > 1 else str(identity), regions))

    def read_regions(self, image: str, record: Mapping, where: str) -> list[int]:
        if "segmentation" not in record:
            raise DataError(f"{where}: no 'segmentation'. Give polygons, an encoding, a path, or null for no target")
        value = record["segmentation"]
        if value is None:
            return []
        if isinstance(value, str):
            return [self.scan.add([picture_part(self.image_name(value, where))])]
        return [self.scan.add(parse_segmentation(value, *self.sizes[image], where))]


def read_texts(record: Mapping[str, Any], where: str) -> list[str]:
    """Return the phrases of a record: `phrase` or `caption`, a text or a list of texts.

    Raises:
        DataError: neither or both are there, or a text is empty.
    """
    present = [key for key in TEXT_KEYS if key in record]
    if len(present) != 1:
        found = " and ".join(map(repr, present)) or f"only {', '.join(sorted(map(str, record)))}"
        raise DataError(f"{where}: needed is 'phrase' or 'caption', found {found}")
    value = require(record, present[0], (str, list), where)
    texts = [value] if isinstance(value, str) else value
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where}: the {present[0]} {value!r:.60} is empty. Describe the object")
    return texts


def measure(path: Path) -> _Size:
    """Return the size of an image from its head, upright; 0 and 0 where that fails: loading it will say why."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return _Size(width, height) if image.getexif().get(_ORIENTATION) in _TURNED else _Size(height, width)
    except Exception:  # Pillow's decoders raise what they stumble on
        return _Size(0, 0)
