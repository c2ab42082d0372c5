"""Parts of regions to masks, all of one image together."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from utils.errors import DataError
from utils.image import MAX_PIXELS
from utils.masks import IGNORE

from .regions import LABEL, PICTURE, POLYGON, RLE, Part, check_inside, check_runs, unpack_counts

Overlaps = Literal["union", "sum"]
_MOST = IGNORE - 1


def rasterise(
    targets: Sequence[Sequence[Part]], height: int, width: int, root: Path, overlaps: Overlaps, name: Callable[[], str]
) -> np.ndarray:
    """Return masks uint8 [len(targets), height, width] with values as in `Sample`.

    Args:
        targets: the parts of each mask; none for a phrase without target.
        height: of the image in pixels.
        width: likewise.
        root: folder of label and mask pictures.
        overlaps: `sum` counts how many polygons or encodings lie on a pixel, at most 254.
        name: says which data set and image this is, for errors.

    Raises:
        DataError: a label or mask picture is missing, damaged or of another size; an encoding or polygon is not
            about this image.
    """
    masks = np.zeros((len(targets), height, width), np.uint8)
    rles = [_outlines(parts, height, width, name) for parts in targets]
    filled = [i for i, some in enumerate(rles) if some]
    if filled and overlaps == "union":
        merged = [rles[i][0] if len(rles[i]) == 1 else coco_mask.merge(rles[i]) for i in filled]
        masks[filled] = _decode(merged)
    elif filled:
        for i in filled:
            masks[i] = _decode(rles[i]).sum(0, dtype=np.uint32).clip(max=_MOST)
    pictures: dict[str, np.ndarray] = {}
    for mask, parts in zip(masks, targets, strict=True):
        for part in parts:
            if part.kind in (LABEL, PICTURE):
                _draw_picture(mask, part, root, pictures, name)
    return masks


def encode(parts: Sequence[Part], height: int, width: int, name: Callable[[], str]) -> dict:
    """Return polygons and encodings of one mask as a single run-length encoding.

    Raises:
        DataError: one of them is not about this image.
    """
    rles = _outlines(parts, height, width, name)
    merged = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def _outlines(parts: Sequence[Part], height: int, width: int, name: Callable[[], str]) -> list[dict]:
    """Return the encodings of the polygons and encodings among the parts of one mask."""
    polygons = [np.frombuffer(part.data) for part in parts if part.kind == POLYGON]
    rles = [{"size": [height, width], "counts": part.data} for part in parts if part.kind == RLE]
    for rle in rles:  # again here: an image that was not there to measure was not compared when it was scanned
        check_runs(unpack_counts(rle["counts"], name()), (height, width), name())
    if polygons:
        check_inside([polygon.reshape(-1, 2) for polygon in polygons], height, width, name())
        rles += coco_mask.frPyObjects(polygons, height, width)
    return rles


def _decode(rles: list[dict]) -> np.ndarray:
    """Return uint8 [len(rles), H, W]."""
    return coco_mask.decode(rles).transpose(2, 0, 1)


def _draw_picture(
    mask: np.ndarray, part: Part, root: Path, pictures: dict[str, np.ndarray], name: Callable[[], str]
) -> None:
    text = part.data.decode("utf-8", "surrogateescape")
    value, ignored, path = text.split(" ", 2) if part.kind == LABEL else ("", "", text)
    if path not in pictures:
        pictures[path] = read_labels(root / path, name())
    picture = pictures[path]
    if picture.shape[:2] != mask.shape:
        size, needed = (f"{shape[1]}x{shape[0]}" for shape in (picture.shape, mask.shape))
        raise DataError(f"{name()}: {root / path} has {size} pixels, the image has {needed}. Make the sizes equal")
    if part.kind == PICTURE:
        mask[(picture if picture.ndim == 2 else picture.any(-1)) != 0] = 1
        return
    mask[picture == int(value)] = 1
    if int(ignored) >= 0:
        mask[picture == int(ignored)] = IGNORE


def read_labels(path: Path, name: str) -> np.ndarray:
    """Return the values of a label or mask picture [H, W] (a palette gives its indices), or [H, W, 3] of a colour one.

    Raises:
        DataError: the file is missing, damaged or too large.
    """
    if not path.is_file():
        raise DataError(f"{name}: no such mask picture: {path}. Put it there, or correct the path")
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{name}: {path} has over {MAX_PIXELS:,} pixels. Make it smaller first")
            if picture.mode in ("RGBA", "LA", "PA", "CMYK", "YCbCr"):
                return np.asarray(picture.convert("RGB"))
            return np.asarray(picture)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise what they stumble on
        raise DataError(f"{name}: {path} cannot be decoded ({error}). Export it again") from None
