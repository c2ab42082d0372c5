"""Instances of COCO and LVIS: what was drawn on each image, or found there by a detector, to prompt with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.distributed import Ranks
from utils.errors import DataError
from utils.image import MAX_PIXELS, ImageSpec, read_image
from utils.instance_metrics import LVIS_DETECTIONS

from .annotations import CocoImage, by_id, coco_image, find, relative_path, require, stream_json, stream_list
from .mixture import ErrorsAsValues, ValueOrError, leave_stopping_to_parent, raise_errors, spread
from .raster import encode, rasterise
from .regions import Part, parse_segmentation
from .sample import move

Kind = Literal["coco", "lvis"]
FREQUENCIES = ("r", "c", "f")
"""How LVIS marks categories: rare, common, frequent."""
LEAST_AREA = 1.0
"""Annotations of a smaller area are not asked for, as published."""


class Instance(NamedTuple):
    """An annotation: `area` in pixels, `box` x y width height, `parts` of its mask."""

    id: int
    category: int
    area: float
    box: tuple[float, float, float, float]
    is_crowd: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Detections:
    """What a detector found, by image: that of image i is `[starts[i]:starts[i + 1]]`, in the order of its file.

    * `boxes`: float64 [D, 4], x1 y1 x2 y2; `scores`: float64 [D]; `categories`: int64 [D].
    """

    starts: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray


@dataclass(frozen=True)
class InstanceSample:
    """One image with n prompts.

    * `image`: uint8 RGB [H, W, 3]; `boxes`: float64 [n, 4], x1 y1 x2 y2.
    * `masks`: uint8 [n, H, W], 1 where the object is; none, [0, H, W], for detections.
    * `key`: path of the image; `index`: its place.
    """

    image: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    key: str
    index: int


@dataclass(frozen=True)
class InstanceBatch:
    """B images with N prompts in all, prompts of one image next to each other.

    * `pixels`: float32 [B, 3, S, S]; `boxes`: float64 [N, 4]; `image_index`: int64 [N]; `masks`: per image, on the CPU.
    """

    pixels: Tensor
    boxes: Tensor
    image_index: Tensor
    masks: tuple[np.ndarray, ...]
    sizes: tuple[tuple[int, int], ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> "InstanceBatch":
        """Return the batch with what the model reads on a device."""
        return replace(self, pixels=move(self.pixels, device), image_index=move(self.image_index, device))


class InstanceSet:
    """Images with instances; see `open_instances`."""

    def __init__(
        self,
        kind: Kind,
        path: Path,
        root: Path,
        images: Sequence[tuple[int, CocoImage, dict[str, Any]]],
        instances: dict[int, list[Instance]],
        categories: Sequence[dict[str, Any]],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.kind, self.path, self.root, self.max_pixels = kind, path, root, max_pixels
        self.images, self.categories = images, categories
        self.names = {category["id"]: category["name"] for category in categories}
        self.all = [tuple(instances.get(identity, ())) for identity, *_ in images]
        self.asked = [tuple(one for one in some if one.area >= LEAST_AREA) for some in self.all]
        self.detections: Detections | None = None

    @property
    def name(self) -> str:
        """What it is called on the screen."""
        return f"{self.kind} {self.path.name}"

    def __len__(self) -> int:
        return len(self.images)

    def spread(self, images: int | None) -> list[int]:
        """Return all images, or at most so many, evenly spread."""
        return spread(self, images)

    def count(self, index: int) -> int:
        """Return the number of prompts of an image."""
        if self.detections is None:
            return len(self.asked[index])
        return int(self.detections.starts[index + 1] - self.detections.starts[index])

    def load(self, index: int, chosen: Sequence[int] | None = None) -> InstanceSample:
        """Return an image with its prompts, or with some of them.

        Raises:
            DataError: the image is of another size than the annotations, or a mask does not fit it. ImageError: it
                cannot be read.
        """
        _, about, _ = self.images[index]
        path = self.root / about.path
        image = read_image(path, self.max_pixels)
        if image.shape[:2] != (about.height, about.width):
            raise DataError(
                f"{path} has {image.shape[1]}x{image.shape[0]} pixels upright, {self.path} says {about.width}x"
                f"{about.height}. Take the images that were annotated"
            )
        if self.detections is not None:
            own = slice(*self.detections.starts[index : index + 2])
            boxes, masks = self.detections.boxes[own], np.zeros((0, *image.shape[:2]), np.uint8)
            return InstanceSample(image, boxes if chosen is None else boxes[list(chosen)], masks, about.path, index)
        instances = self.asked[index]
        instances = instances if chosen is None else [instances[place] for place in chosen]
        boxes = np.array([one.box for one in instances], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = rasterise([one.parts for one in instances], *image.shape[:2], self.root, "union", partial(str, path))
        return InstanceSample(image, boxes, masks, about.path, index)

    def batches(
        self, spec: ImageSpec, indices: Sequence[int], batch_size: int, ranks: Ranks, workers: int
    ) -> Iterator[InstanceBatch]:
        """Yield this rank's share of the batches; a batch is the same on any number of ranks.

        Raises:
            TextSAMError: what was wrong with a file of an image.
        """
        batches = ranks.share([list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)])
        loader = DataLoader(
            ErrorsAsValues(self), batch_sampler=batches, collate_fn=ValueOrError(Pack(spec)), num_workers=workers,
            worker_init_fn=leave_stopping_to_parent,
        )  # fmt: skip
        yield from raise_errors(loader)

    def truth(self, indices: Sequence[int]) -> dict[str, list]:
        """Return a COCO file of some of the images, masks as compressed RLE: what average precision is measured by.

        Raises:
            DataError: a mask does not fit its image.
        """
        images, annotations = [], []
        for index in indices:
            identity, about, extra = self.images[index]
            images.append({"id": identity, "height": about.height, "width": about.width, **extra})
            for one in self.all[index]:
                name = partial("{}, annotation {}".format, self.path, one.id)
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # COCO's API takes an annotation 0 for none
                        "image_id": identity,
                        "category_id": one.category,
                        "area": one.area,
                        "iscrowd": int(one.is_crowd),
                        "bbox": list(one.box),
                        "segmentation": encode(one.parts, about.height, about.width, name),
                    }
                )
        return {"images": images, "annotations": annotations, "categories": [dict(c) for c in self.categories]}


@dataclass(frozen=True)
class Pack:
    """Turns samples into an `InstanceBatch`."""

    spec: ImageSpec

    def __call__(self, samples: Sequence[InstanceSample]) -> InstanceBatch:
        """Prepare the images and pack the prompts."""
        counts = torch.tensor([len(sample.boxes) for sample in samples])
        return InstanceBatch(
            pixels=torch.stack([self.spec(sample.image) for sample in samples]),
            boxes=torch.from_numpy(np.concatenate([sample.boxes for sample in samples])).float(),
            image_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
            masks=tuple(sample.masks for sample in samples),
            sizes=tuple(sample.image.shape[:2] for sample in samples),
            keys=tuple(sample.key for sample in samples),
            indices=tuple(sample.index for sample in samples),
        )


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
