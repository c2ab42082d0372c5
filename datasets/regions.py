"""Regions: what an annotation marks, checked when it is read and rasterised when it is needed.

A region is a list of parts. A part is a polygon, a run-length encoding, a value in a label picture or a mask picture;
several parts of one region are a union. Polygons and encodings follow COCO, as pycocotools rasterises them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from utils.errors import DataError

POLYGON, RLE, LABEL, PICTURE = range(4)
"""Kinds of parts. Data: float64 x y x y …; compressed counts; `value ignored path`; path of a mask picture."""

NOTHING_IGNORED = -1


class Part(NamedTuple):
    """One piece of a region: its kind and its data, as listed above."""

    kind: int
    data: bytes


def parse_segmentation(value: Any, height: int, width: int, where: str) -> list[Part]:
    """Return the parts of a COCO segmentation: polygons, one encoding, or a list of either.

    Args:
        value: as parsed from JSON or a pickle.
        height: of the image in pixels; 0 where height and width are not known yet.
        width: likewise.
        where: file and id, for errors.

    Raises:
        DataError: empty, fewer than 3 points, not finite, wholly outside the image, an encoding of another size or
            whose runs do not add up, or neither of the two forms.
    """
    if isinstance(value, Mapping):
        return [_parse_rle(value, height, width, where)]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: segmentation is {type(value).__name__}; allowed: polygons, or a run-length encoding")
    if not value:
        raise DataError(f"{where}: the segmentation is empty. Give at least one polygon, or remove the annotation")
    if all(isinstance(part, Mapping) for part in value):
        return [_parse_rle(part, height, width, where) for part in value]
    if all(isinstance(part, int | float) for part in value):  # one polygon that was not put into a list
        value = [value]
    polygons = [_parse_polygon(part, where) for part in value]
    if height and width:
        check_inside(polygons, height, width, where)
    return [Part(POLYGON, polygon.tobytes()) for polygon in polygons]


def check_inside(polygons: Sequence[np.ndarray], height: int, width: int, where: str) -> None:
    """Check polygons of one region against the image.

    Raises:
        DataError: no polygon touches the image, or a point is farther from it than its longer side. Polygons that
            leave the image otherwise are clipped.
    """
    points = np.concatenate(polygons)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    box = f"box x {left:g} to {right:g}, y {top:g} to {bottom:g}, image {width}x{height}"
    side = max(height, width)
    if min(left, top) < -side or max(right, bottom) > 2 * side:
        raise DataError(f"{where}: a polygon reaches far outside the image ({box}). Coordinates are pixels, x first")
    if all(_is_outside(polygon, height, width) for polygon in polygons):
        raise DataError(f"{where}: the polygons lie outside the image ({box}). Coordinates are pixels, x first")


def _is_outside(polygon: np.ndarray, height: int, width: int) -> bool:
    (left, top), (right, bottom) = polygon.min(0), polygon.max(0)
    return bool(right <= 0 or bottom <= 0 or left >= width or top >= height)


def _parse_polygon(value: Any, where: str) -> np.ndarray:
    """Return float64 [points, 2]."""
    allowed = "allowed: x1, y1, x2, y2, … of at least 3 points, in pixels"
    try:
        polygon = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: a polygon holds something else than numbers; {allowed}") from None
    if polygon.ndim == 2 and polygon.shape[1] == 2:
        polygon = polygon.reshape(-1)
    if polygon.ndim != 1 or polygon.size % 2 or polygon.size < 6:
        shape = f"{polygon.size} numbers" if polygon.ndim == 1 else f"shape {list(polygon.shape)}"
        raise DataError(f"{where}: a polygon has {shape}; {allowed}")
    if not np.isfinite(polygon).all():
        raise DataError(f"{where}: a polygon holds NaN or infinity; {allowed}")
    return polygon.reshape(-1, 2)


def _parse_rle(value: Mapping, height: int, width: int, where: str) -> Part:
    if not {"size", "counts"} <= value.keys():
        raise DataError(
            f'{where}: segmentation has {sorted(map(str, value))}; a run-length encoding has "size" and "counts"'
        )
    size, counts = value["size"], value["counts"]
    is_size = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    if not is_size or (height and width and list(size) != [height, width]):
        image = f"the image has {[height, width]}" if height and width else "needed are two numbers"
        raise DataError(f"{where}: the run-length encoding is for size {size}, {image} ([height, width])")
    if isinstance(counts, str | bytes):
        data = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
        runs = unpack_counts(data, where)
    else:
        runs = _parse_counts(counts, where)
        data = None
    check_runs(runs, size, where)
    return Part(RLE, pack_counts(runs, size) if data is None else data)


def check_runs(runs: np.ndarray, size: Sequence[int], where: str) -> None:
    """Check run lengths against [height, width].

    Raises:
        DataError: one is negative, or they do not add up to the pixels.
    """
    if (runs < 0).any() or runs.sum() != math.prod(size):
        raise DataError(
            f"{where}: the runs of the encoding add up to {runs.sum()}, size {list(size)} has {math.prod(size)} "
            "pixels. It is damaged, or of another image"
        )


def _parse_counts(counts: Any, where: str) -> np.ndarray:
    if not isinstance(counts, Sequence) or not all(isinstance(n, int) and 0 <= n < 1 << 32 for n in counts):
        raise DataError(f"{where}: the counts of the run-length encoding are neither text nor a list of run lengths")
    return np.array(counts, dtype=np.int64)


def unpack_counts(data: bytes, where: str) -> np.ndarray:
    """Return the run lengths, int64, of COCO's compressed counts (`rleFrString` of pycocotools).

    Raises:
        DataError: a byte outside the alphabet, an unfinished number, or a number no image has.
    """
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise DataError(f"{where}: the counts of the run-length encoding are damaged or cut off")
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise DataError(f"{where}: the counts of the run-length encoding are damaged: a run over 2^32 pixels")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    # From the fourth run on, the difference to the run two before is stored.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def pack_counts(runs: np.ndarray, size: Sequence[int]) -> bytes:
    """Return COCO's compressed counts of run lengths that were checked."""
    from pycocotools import mask as coco_mask

    return coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)["counts"]


def label_part(path: str, value: int, ignored: int = NOTHING_IGNORED) -> Part:
    """Return the part "pixels with this value in a label picture"; `ignored` is the value that counts for nobody."""
    return Part(LABEL, f"{value} {ignored} {path}".encode("utf-8", "surrogateescape"))


def picture_part(path: str) -> Part:
    """Return the part "pixels of a mask picture that are not zero"."""
    return Part(PICTURE, path.encode("utf-8", "surrogateescape"))
