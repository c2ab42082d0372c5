"""Sprites: cut-out pictures of every kind of object, at a few sizes, ready to be composited."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.errors import DataError
from utils.files import atomic_path, write_json

from .fetch import NAMES, PICTURES, cache_folder, fetch, read_members
from .objects import Kind, list_kinds

CANVAS = 224
"""Side of a sprite's canvas in pixels, on which its longer side measures `EXTENT`."""
EXTENT = 208
LEVELS = 3
"""Sprites are kept at full, half and quarter size, so that shrinking never skips pixels."""


@dataclass(frozen=True)
class SpriteSet:
    """K kinds of object with their pictures.

    * `levels[l]`: premultiplied RGBA, uint8 [K, S, S, 4] with S = CANVAS / 2^l.
    * `fill`: opaque share of the square of side `EXTENT`, float [K]; thin things have little.
    * `digest`: hash of kinds and pictures.
    """

    kinds: tuple[Kind, ...]
    levels: tuple[np.ndarray, ...]
    fill: tuple[float, ...]
    digest: str

    def save(self, folder: Path) -> None:
        """Write the set to a folder, the description last."""
        for number, level in enumerate(self.levels):
            with atomic_path(folder / f"level{number}.npy") as temporary:
                np.save(temporary, level)
        kinds = [asdict(kind) for kind in self.kinds]
        write_json(folder / "sprites.json", {"kinds": kinds, "fill": self.fill, "digest": self.digest})

    @staticmethod
    def load(folder: Path) -> "SpriteSet":
        """Map a saved set into memory: processes share it.

        Raises:
            DataError: the folder holds no whole set.
        """
        try:
            text = json.loads((folder / "sprites.json").read_text(encoding="utf-8"))
            levels = tuple(np.load(folder / f"level{number}.npy", mmap_mode="r") for number in range(LEVELS))
            kinds = tuple(Kind(**kind) for kind in text["kinds"])
            return SpriteSet(kinds, levels, tuple(text["fill"]), text["digest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no sprites that can be read ({error}). Delete it and try again") from error

    @staticmethod
    def from_images(kinds: Sequence[Kind], images: Sequence[np.ndarray]) -> "SpriteSet":
        """Build a set from straight-alpha RGBA pictures, uint8 [H, W, 4] each, of any size.

        Raises:
            DataError: a picture is empty, or two kinds have one name.
        """
        if len({kind.name for kind in kinds}) != len(kinds):
            raise DataError("Two kinds of object have the same name")
        full = np.stack([_fit(kind, image) for kind, image in zip(kinds, images, strict=True)])
        levels = [full]
        for number in range(1, LEVELS):
            side = CANVAS >> number
            levels.append(np.stack([cv2.resize(s, (side, side), interpolation=cv2.INTER_AREA) for s in full]))
        fill = tuple(round(float((sprite[..., 3] >= 128).sum()) / EXTENT**2, 6) for sprite in full)
        names = json.dumps([asdict(kind) for kind in kinds], sort_keys=True).encode()
        digest = hashlib.sha256(names + full.tobytes()).hexdigest()
        return SpriteSet(tuple(kinds), tuple(levels), fill, digest)


def _fit(kind: Kind, image: np.ndarray) -> np.ndarray:
    """Crop a picture to what is opaque and fit it into the canvas, premultiplied."""
    rows, columns = np.nonzero(image[..., 3] >= 16)
    if not len(rows):
        raise DataError(f"The picture of {kind.name!r} is empty")
    crop = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float32)
    crop[..., :3] *= crop[..., 3:] / 255
    scale = EXTENT / max(crop.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in (crop.shape[1], crop.shape[0]))
    crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    canvas = np.zeros((CANVAS, CANVAS, 4), np.uint8)
    top, left = (CANVAS - crop.shape[0]) // 2, (CANVAS - crop.shape[1]) // 2
    canvas[top : top + crop.shape[0], left : left + crop.shape[1]] = crop.round().clip(0, 255)
    return canvas


def open_sprites(folder: Path | None = None) -> tuple[SpriteSet, Path]:
    """Return the published sprites and the folder they are cached in; fetched and prepared at the first call.

    Args:
        folder: holds, or is to hold, the packages; the user's cache folder where None.

    Raises:
        DataError: a package cannot be had, is not the published one or lacks an object of the list.
    """
    folder = folder or cache_folder()
    kinds = list_kinds()
    recipe = json.dumps([[asdict(kind) for kind in kinds], PICTURES.sha256, NAMES.sha256, CANVAS, EXTENT, LEVELS])
    prepared = folder / f"prepared-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if not (prepared / "sprites.json").is_file():
        SpriteSet.from_images(kinds, _read_pictures(kinds, folder)).save(prepared)
    return SpriteSet.load(prepared), prepared


def _read_pictures(kinds: Sequence[Kind], folder: Path) -> list[np.ndarray]:
    table_name = "package/data-by-emoji.json"
    names_path, pictures_path = fetch(NAMES, folder), fetch(PICTURES, folder)
    table = read_members(names_path, lambda name: name == table_name, NAMES.max_unpacked_bytes)
    emoji = {entry["name"].replace("\u2019", "'"): text for text, entry in json.loads(table[table_name]).items()}
    absent = [kind.unicode_name for kind in kinds if kind.unicode_name not in emoji]
    if absent:
        raise DataError(f"{names_path} names no {', '.join(absent)}: correct tools/synthetic/objects.py")
    codes = ["-".join(f"{ord(letter):04x}" for letter in emoji[kind.unicode_name]) for kind in kinds]
    files = [f"package/assets/{code}.webp" for code in codes]
    members = read_members(pictures_path, set(files).__contains__, PICTURES.max_unpacked_bytes)
    absent = [kind.name for kind, name in zip(kinds, files, strict=True) if name not in members]
    if absent:
        raise DataError(f"{pictures_path} has no picture of {', '.join(absent)}: correct tools/synthetic/objects.py")
    return [np.array(Image.open(BytesIO(members[name])).convert("RGBA")) for name in files]
