"""SA-1B: images with many masks, in folders or in .tar shards (arXiv 2304.02643).

A folder is that of EfficientViT-SAM's repository, `images/sa_{id}.jpg`, `masks/sa_{id}.json` and `sa_images_ids.txt`,
or one as SA-1B unpacks, each .jpg beside its .json. A shard is a .tar of the latter; its files are read where they lie.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from utils.errors import DataError
from utils.files import write_json
from utils.image import MAX_PIXELS, decode_image, read_image

from .regions import check_runs, unpack_counts

MAX_IMAGE_BYTES, MAX_JSON_BYTES = 256 << 20, 64 << 20
"""Larger files are refused before they are read; those of SA-1B have up to 5 MB."""
MAX_HEADER_BYTES = 1 << 20
IDS = "sa_images_ids.txt"
_ID = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class MaskImage:
    """An image with K masks as they are stored.

    * `image`: uint8 RGB [H, W, 3]; `rles`: COCO RLE of that size; `boxes`: float32 [K, 4], x y width height in pixels.
    * `ids`: of the masks; `key`: names the image; `index`: its place in the data set.
    """

    image: np.ndarray
    rles: tuple[dict, ...]
    boxes: np.ndarray
    ids: tuple[str, ...]
    key: str
    index: int


class MaskFolder:
    """A folder of SA-1B; which of the two layouts, its `sa_images_ids.txt` says.

    Raises:
        DataError: no such folder, no images, an image without masks, or an id that is no name.
    """

    in_order = False

    def __init__(self, name: str, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        if not folder.is_dir():
            raise DataError(f"no such folder or .tar of SA-1B: {folder}. data.sets are names below data.root")
        self.name, self.folder, self.max_pixels = name, folder, max_pixels
        self._has_ids = (folder / IDS).is_file()
        self.stems = self._read_ids() if self._has_ids else self._find()
        if not self.stems:
            raise DataError(f"{folder} holds neither {IDS} nor sa_*.jpg beside sa_*.json. Unpack SA-1B there")

    def _read_ids(self) -> list[str]:
        ids = (self.folder / IDS).read_text("utf-8", errors="replace").split()
        wrong = next((one for one in ids if not _ID.fullmatch(one)), None)
        if wrong is not None:
            raise DataError(f"{self.folder / IDS}: {wrong!r} is no id. Needed are numbers, one per line")
        return [one if one.startswith("sa_") else f"sa_{one}" for one in ids]

    def _find(self) -> list[str]:
        images = {path.relative_to(self.folder).with_suffix("") for path in self.folder.rglob("sa_*.jpg")}
        truths = {path.relative_to(self.folder).with_suffix("") for path in self.folder.rglob("sa_*.json")}
        if lonely := sorted(images ^ truths):
            raise DataError(
                f"{self.folder}: {len(lonely)} images or masks have no partner, {lonely[0]} among them: needed are "
                ".jpg and .json of each. Unpack the shard again"
            )
        return sorted(map(str, images))

    def __len__(self) -> int:
        return len(self.stems)

    def load(self, index: int) -> MaskImage:
        """Return an image with its masks; see `datasets.images.Items.load`."""
        stem = self.stems[index]
        image, truth = (
            (f"images/{stem}.jpg", f"masks/{stem}.json") if self._has_ids else (f"{stem}.jpg", f"{stem}.json")
        )
        path = self.folder / truth
        if not path.is_file():
            raise DataError(f"no such file of masks: {path}. Unpack it there, or take its id out of {IDS}")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{path} has over {MAX_JSON_BYTES >> 20} MB: no masks of one image need that")
        pixels = read_image(self.folder / image, self.max_pixels)
        return parse(path.read_bytes(), pixels, f"{self.name}/{stem}", str(path), index)


class MaskShard:
    """A .tar of SA-1B, read in the order of its files; nothing is unpacked.

    Args:
        index_folder: keeps where the files lie, so that the shard need not be looked through again.

    Raises:
        DataError: no such file, not a .tar, or with a member that has no business in it; the member is named.
    """

    in_order = True

    def __init__(self, name: str, path: Path, max_pixels: int = MAX_PIXELS, index_folder: str | None = None) -> None:
        if not path.is_file():
            raise DataError(f"no such .tar: {path}. data.sets are names below data.root")
        self.name, self.path, self.max_pixels = name, path, max_pixels
        self.members = _indexed(path, index_folder)
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def load(self, index: int) -> MaskImage:
        """Return an image with its masks; see `datasets.images.Items.load`."""
        stem, *places = self.members[index]
        where = f"{self.path}, {stem}"
        image, truth = self._read(*places[:2], f"{where}.jpg"), self._read(*places[2:], f"{where}.json")
        pixels = decode_image(image, f"{where}.jpg", self.max_pixels)
        return parse(truth, pixels, f"{self.name}/{stem}", f"{where}.json", index)

    def _read(self, offset: int, size: int, name: str) -> bytes:
        """Return the bytes of a member. Workers share the file, which `pread` does not mind."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise DataError(f"{name} is cut off. Download the shard again")
        return data


def _indexed(path: Path, folder: str | None) -> list[tuple]:
    """Return what `scan` does, from a file in `folder` where it is there and of this very shard."""
    if folder is None:
        return scan(path)
    status = path.stat()
    name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=12).hexdigest()
    stamp, kept = [path.name, status.st_size, status.st_mtime_ns], Path(folder) / f"{name}.json"
    if kept.is_file():
        content = json.loads(kept.read_text("utf-8"))
        if content["shard"] == stamp:
            return [tuple(row) for row in content["members"]]
    members = scan(path)
    write_json(kept, {"shard": stamp, "members": members})
    return members


def scan(path: Path) -> list[tuple[str, int, int, int, int]]:
    """Return name, and offset and size of .jpg and .json, of every image of a shard, in the order of the .jpg.

    Raises:
        DataError: not a .tar; a member with a path that leaves the folder, a link or a device, over the bounds, twice
            there, or without partner.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    whole = path.stat().st_size
    with path.open("rb") as file:
        try:
            archive = tarfile.open(fileobj=_Headers(file, path), mode="r:")  # noqa: SIM115
            for member in archive:
                archive.members = []  # else it keeps every header of a shard
                name = PurePosixPath(member.name)
                _check_member(member, name, path, whole)
                if name.suffix in (".jpg", ".json") and not member.isdir():
                    places = found.setdefault(str(name.with_suffix("")), {})
                    if name.suffix in places:
                        raise DataError(f"{path}: {member.name} is there twice. Download the shard again")
                    places[name.suffix] = (member.offset_data, member.size)
            file.seek(archive.offset)
            is_whole = not any(file.read(tarfile.BLOCKSIZE) or b"?")  # tarfile takes damage for the end
        except (tarfile.TarError, EOFError, OverflowError, UnicodeError) as error:
            raise DataError(
                f"{path} is no whole .tar ({error}). Needed is an uncompressed one; download it again"
            ) from None
    if not is_whole:
        raise DataError(f"{path} is damaged after {len(found)} images, or cut off. Download the shard again")
    lonely = [stem for stem, places in found.items() if len(places) < 2]
    if lonely or not found:
        what = f"{lonely[0]} has no partner: needed are .jpg and .json of each" if lonely else "it holds no .jpg"
        raise DataError(f"{path}: {what}. Download the shard again")
    rows = [(stem, *places[".jpg"], *places[".json"]) for stem, places in found.items()]
    return sorted(rows, key=lambda row: row[1])


class _Headers:
    """A file of which headers alone are read: a header may ask for as much as its file is long."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Return some bytes."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise DataError(f"{self._path} has a header of {size:,} bytes. This is no shard of SA-1B; do not unpack it")
        return self._file.read(size)


def _check_member(member: tarfile.TarInfo, name: PurePosixPath, path: Path, whole: int) -> None:
    bound = MAX_JSON_BYTES if name.suffix == ".json" else MAX_IMAGE_BYTES
    reason = None
    if name.is_absolute() or ".." in name.parts:
        reason = "has a path that leads out of the folder"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        reason = "is a link, a device or a sparse file"
    elif member.size > bound:
        reason = f"has {member.size:,} bytes, over the bound of {bound:,}"
    elif member.offset_data + member.size > whole:
        reason = "is cut off"
    if reason:
        raise DataError(f"{path}: member {member.name!r} {reason}. This is no shard of SA-1B; do not unpack it")


def parse(data: bytes, image: np.ndarray, key: str, where: str, index: int) -> MaskImage:
    """Return an image with the masks of its .json.

    Raises:
        DataError: not JSON of SA-1B, of another image, or without a mask.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({' '.join(str(error).split())[:100]}). Unpack it again") from None
    rows = content.get("annotations") if isinstance(content, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}: 'annotations' is no list of masks, or empty. Leave the image out")
    size = list(image.shape[:2])
    boxes, rles, ids = [], [], []
    for number, row in enumerate(rows):
        rle, box = (row.get("segmentation"), row.get("bbox")) if isinstance(row, Mapping) else (None, None)
        if not isinstance(rle, Mapping) or rle.get("size") != size or not isinstance(rle.get("counts"), str):
            raise DataError(
                f"{where}: mask {number} is no RLE of an image of {size[0]} x {size[1]} pixels (height x width). It is "
                "damaged, or of another image"
            )
        if not _is_box(box):
            raise DataError(f"{where}: 'bbox' of mask {number} is {box!r}; needed are x, y, width and height")
        boxes.append(box)
        rles.append({"size": size, "counts": rle["counts"].encode("utf-8", "replace")})
        ids.append(f"{key}/{row.get('id', number)}")
    return MaskImage(image, tuple(rles), np.array(boxes, np.float32), tuple(ids), key, index)


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, Sequence)
        and len(box) == 4
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e6 for n in box)
        and box[2] >= 0 <= box[3]
    )


def decode_masks(rles: Sequence[dict], where: str) -> np.ndarray:
    """Return the masks of encodings of one size, uint8 [K, H, W].

    Raises:
        DataError: the runs of one do not add up to its pixels, which the decoder would not notice.
    """
    from pycocotools import mask as coco_mask

    for rle in rles:
        check_runs(unpack_counts(rle["counts"], where), rle["size"], where)
    return coco_mask.decode(list(rles)).transpose(2, 0, 1)
