"""Objects365 with masks made from its boxes: the category name, where the image has a single object of it."""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.errors import DataError

from .annotations import CocoImage, coco_image, find, require, stream_json
from .index import Entry, Phrase, Scan, Source
from .regions import parse_segmentation

FOLDER = "Object365/raw/Objects365_v1/2019-08-02"


def objects365_source(name: str, parts: Sequence[str], root: Path) -> Source:
    """Return Objects365, whose annotation file holds 10 million records: it is read in pieces."""
    folder = root / FOLDER
    path = folder / "o365_res_instances.json"

    def scan(scan: Scan) -> Iterator[Entry]:
        yield from scan_objects365(path, scan)

    return Source(name, root, folder / "train", (path,), scan)


def scan_objects365(path: Path, scan: Scan) -> Iterator[Entry]:
    """Yield the images of a COCO file with the categories that have one object in the image.

    The file is read twice: to count the objects, then for the masks of those that are alone.

    Raises:
        DataError: not a COCO file, an id there twice or unknown, or a segmentation that is no mask.
    """
    images, names, table = _count(path)
    keep = alone(table["image"], table["category"], table["crowd"])
    regions = np.full(len(keep), -1, np.int64)
    for number, annotation in enumerate(_records(path, "annotations", "masks")):
        if keep[number]:
            where = f"{path}, annotation {annotation['id']}"
            image = find(images, annotation["image_id"], "image", where)
            segmentation = require(annotation, "segmentation", (list, dict), where)
            regions[number] = scan.add(parse_segmentation(segmentation, image.height, image.width, where))
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(table["image"][kept], kind="stable")]
    for group in np.split(kept, np.flatnonzero(np.diff(table["image"][kept])) + 1):
        identity = int(table["image"][group[0]]) if len(group) else -1
        phrases = [
            Phrase(names[int(table["category"][i])], f"{identity}/{int(table['id'][i])}", [int(regions[i])])
            for i in group
        ]
        if phrases:
            image = images[identity]
            yield Entry(image.path, image.height, image.width, phrases)


def _count(path: Path) -> tuple[dict[int, CocoImage], dict[int, str], dict[str, np.ndarray]]:
    """Return id -> image, id -> category name, and a column of numbers per field of the annotations."""
    images: dict[int, CocoImage] = {}
    names: dict[int, str] = {}
    columns = {field: array("q") for field in ("id", "image", "category", "crowd")}
    for key, record in tqdm(stream_json(path), f"{path.name}: objects", unit=" records", disable=None):
        if key not in ("images", "annotations", "categories"):
            continue
        what = {"images": "image", "annotations": "annotation", "categories": "category"}[key]
        identity = require(record, "id", int, f"{path}, one of the {key}")
        where = f"{path}, {what} {identity}"
        if key == "annotations":
            columns["id"].append(identity)
            columns["image"].append(require(record, "image_id", int, where))
            columns["category"].append(require(record, "category_id", int, where))
            columns["crowd"].append(bool(record.get("iscrowd")))
            continue
        if identity in (images if key == "images" else names):
            raise _twice(path, what, identity)
        if key == "images":
            images[identity] = coco_image(record, path)
        else:
            names[identity] = require(record, "name", str, where)
    table = {field: np.frombuffer(column, np.int64) for field, column in columns.items()}
    _check_ids(path, table, images, names)
    return images, names, table


def _check_ids(path: Path, table: dict[str, np.ndarray], images: dict[int, Any], names: dict[int, Any]) -> None:
    ids, counts = np.unique(table["id"], return_counts=True)
    if (counts > 1).any():
        raise _twice(path, "annotation", int(ids[counts > 1][0]))
    for field, known in (("image", images), ("category", names)):
        unknown = ~np.isin(table[field], np.fromiter(known, np.int64, len(known)))
        if unknown.any():
            first = int(np.flatnonzero(unknown)[0])
            find(known, int(table[field][first]), field, f"{path}, annotation {int(table['id'][first])}")


def alone(images: np.ndarray, categories: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """Return bool [n]: which annotations are the only one of their category in their image, and no crowd."""
    # One number per pair: sorting pairs themselves would take several times the memory of 10 million annotations.
    (_, image), (known, category) = (np.unique(values, return_inverse=True) for values in (images, categories))
    _, inverse, counts = np.unique(image * len(known) + category, return_inverse=True, return_counts=True)
    return (counts[inverse] == 1) & (crowds == 0)


def _records(path: Path, wanted: str, title: str) -> Iterator[Any]:
    records = tqdm(stream_json(path), f"{path.name}: {title}", unit=" records", disable=None)
    return (record for key, record in records if key == wanted)


def _twice(path: Path, what: str, identity: int) -> DataError:
    return DataError(f"{path}: {what} id {identity!r} is there twice. Ids must be unique in a file")
