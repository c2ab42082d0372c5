"""Files of COCO and LVIS instances, and of what a detector found, checked as they are read."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from utils.errors import DataError
from utils.image import MAX_PIXELS
from utils.instance_metrics import LVIS_DETECTIONS

from .annotations import CocoImage, by_id, coco_image, find, relative_path, require, stream_json, stream_list
from .instances import Detections, Instance, InstanceSet, Kind
from .regions import parse_segmentation

FREQUENCIES = ("r", "c", "f")
"""How LVIS marks categories: rare, common, frequent."""


def open_instances(
    kind: Kind, annotations: str | Path, root: str | Path, detections: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> InstanceSet:  # fmt: skip
    """Open COCO or LVIS instances.

    Args:
        annotations: the JSON file.
        root: where the images lie: COCO's by `file_name`, LVIS's by the last two parts of `coco_url`.
        detections: a COCO list of results (image_id, category_id, bbox x y width height, score); None prompts with what
            was annotated.

    Raises:
        DataError: a file is missing or is something else; an image is missing; ids do not fit.
    """
    path, root = Path(annotations), Path(root)
    lists = _read(path)
    categories = _categories(lists["categories"], kind, path)
    records = by_id(lists["images"], "id", "image", path)
    images = [
        (_whole(identity, f"{path}, an image"), *_image(record, kind, path)) for identity, record in records.items()
    ]
    if kind == "coco":  # the published code lists the folder
        images.sort(key=lambda image: image[1].path)
    instances: dict[int, list[Instance]] = {}
    seen = set()
    for image_id, one in lists["annotations"]:
        find(records, image_id, "image", f"{path}, annotation {one.id}")
        if one.category not in categories or one.id in seen:
            what = "is there twice" if one.id in seen else f"has category {one.category}, which is not in the file"
            raise DataError(f"{path}: annotation {one.id} {what}. Download it again")
        seen.add(one.id)
        instances.setdefault(image_id, []).append(one)
    found = InstanceSet(kind, path, root, images, instances, list(categories.values()), max_pixels)
    _check_images(found)
    if detections is not None:
        found.detections = read_detections(Path(detections), found)
    return found


def read_detections(path: Path, instances: InstanceSet) -> Detections:
    """Read a COCO list of results; of LVIS those that count, the best 300 of each image.

    Raises:
        DataError: it is something else, or is about other images or categories.
    """
    places = {identity: place for place, (identity, *_) in enumerate(instances.images)}
    known = {category["id"] for category in instances.categories}
    rows, numbers = [], []
    for n, record in enumerate(stream_list(path)):
        where = f"{path}, detection {n}"
        category = require(record, "category_id", int, where)
        if category not in known:
            raise DataError(f"{where}: category {category} is not in {instances.path}. Take the ids of its categories")
        place = find(places, require(record, "image_id", int, where), "image", where)
        score = require(record, "score", (int, float), where)
        rows.append((place, category))
        numbers.append((*_box(record, where), score))
    if not rows:
        raise DataError(f"{path} holds no detections. Needed is a list of image_id, category_id, bbox and score")
    table, values = np.array(rows, np.int64), np.array(numbers, np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{path}, detection {int((~np.isfinite(values)).any(1).argmax())}: NaN or infinity")
    order = np.argsort(table[:, 0], kind="stable")
    if instances.kind == "lvis":
        order = _best(order, table[:, 0], values[:, 4])
    table, values = table[order], values[order]
    starts = np.searchsorted(table[:, 0], np.arange(len(instances) + 1))
    boxes = values[:, :4].copy()
    boxes[:, 2:] += boxes[:, :2]
    return Detections(starts, boxes, values[:, 4], table[:, 1])


def _best(order: np.ndarray, places: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the rows in `order` without those that more than 299 of the same image go before."""
    ranked = np.lexsort((np.arange(len(places)), -scores, places))
    firsts = np.searchsorted(places[ranked], places[ranked])
    kept = np.zeros(len(places), bool)
    kept[ranked[np.arange(len(ranked)) - firsts < LVIS_DETECTIONS]] = True
    return order[kept[order]]


def _read(path: Path) -> dict[str, list]:
    """Return the lists of a COCO file, annotations as (image id, `Instance`).

    Raises:
        DataError: one is missing, or the file is something else.
    """
    lists: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    read: dict[str, Callable] = {"annotations": partial(_instance, path=path)}
    others = set()
    for key, record in stream_json(path):
        if key in lists:
            lists[key].append(read[key](record) if key in read else record)
        else:
            others.add(key)
    missing = [key for key, records in lists.items() if not records]
    if missing:
        there = ", ".join(sorted(others | {key for key in lists if lists[key]})) or "nothing"
        raise DataError(
            f"{path} has no {' and no '.join(missing)}, but {there:.200}. Needed is the JSON file of COCO's or LVIS's "
            "instances"
        )
    return lists


def _instance(record: Any, path: Path) -> tuple[int, Instance]:
    where = f"{path}, an annotation"
    identity = require(record, "id", int, where)
    where = f"{path}, annotation {identity}"
    area = float(require(record, "area", (int, float), where))
    if not 0 <= area < 1e12:
        raise DataError(f"{where}: area {area}; needed is a number of pixels")
    parts = parse_segmentation(require(record, "segmentation", (list, dict), where), 0, 0, where)
    return require(record, "image_id", int, where), Instance(
        identity,
        require(record, "category_id", int, where),
        area,
        _box(record, where),
        bool(record.get("iscrowd", 0)),
        tuple(parts),
    )


def _box(record: Any, where: str) -> tuple[float, float, float, float]:
    box = require(record, "bbox", list, where)
    if len(box) != 4 or not all(type(n) in (int, float) and -1e9 < n < 1e9 for n in box) or min(box[2:]) < 0:
        raise DataError(f"{where}: bbox {box!r:.80}; needed are x, y, width and height in pixels")
    return tuple(map(float, box))


def _image(record: Any, kind: Kind, path: Path) -> tuple[CocoImage, dict[str, Any]]:
    """Return an image and, of LVIS, which categories are known to be absent or not drawn in full."""
    if kind == "coco":
        return coco_image(record, path), {}
    where = f"{path}, image {record['id']}"
    name = "/".join(PurePosixPath(urlsplit(require(record, "coco_url", str, where)).path).parts[-2:])
    extra = {key: require(record, key, list, where) for key in ("neg_category_ids", "not_exhaustive_category_ids")}
    return coco_image({**record, "file_name": relative_path(name, where)}, path), extra


def _categories(records: Sequence[Any], kind: Kind, path: Path) -> dict[int, dict[str, Any]]:
    known = {}
    for identity, record in by_id(records, "id", "category", path).items():
        where = f"{path}, category {identity}"
        kept = {"id": _whole(identity, where), "name": require(record, "name", str, where)}
        if kind == "lvis":
            kept["frequency"] = require(record, "frequency", str, where)
            if kept["frequency"] not in FREQUENCIES:
                raise DataError(f"{where}: frequency {kept['frequency']!r:.40}; allowed are {', '.join(FREQUENCIES)}")
        known[identity] = kept
    return known


def _whole(identity: int | str, where: str) -> int:
    if not isinstance(identity, int):
        raise DataError(f"{where}: id {identity!r:.60}; needed is a whole number")
    return identity


def _check_images(instances: InstanceSet) -> None:
    paths = [instances.root / about.path for _, about, _ in instances.images]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} images of {instances.path} are missing, the first: {missing[0]}. "
            "Give the folder they lie in as --image_root"
        )
