"""Instances of COCO and LVIS: what was drawn on each image, or found there by a detector, to prompt with."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.distributed import Ranks
from utils.errors import DataError
from utils.image import MAX_PIXELS, ImageSpec, read_image

from .annotations import CocoImage
from .mixture import evaluation_batches, spread
from .raster import encode, rasterise
from .regions import Part
from .sample import move

Kind = Literal["coco", "lvis"]
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
    """Images with instances; see `instance_files.open_instances`."""

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
        """Return this rank's share of the batches; see `evaluation_batches`.

        Raises:
            TextSAMError: what was wrong with a file of an image.
        """
        return evaluation_batches(self, Pack(spec), indices, batch_size, ranks, workers)

    def truth(self, indices: Sequence[int]) -> dict[str, list]:
        """Return a COCO file of some of the images, masks as compressed RLE: what average precision is measured by.

        Raises:
            DataError: a mask does not fit its image.
        """
        images, annotations = [], []
        for index in indices:
            identity, about, extra = self.images[index]
            images.append({"id": identity, "height": about.height, "width": about.width, **extra})
            annotations += self.encoded(index, self.all[index])
        for number, one in enumerate(annotations, 1):
            one["id"] = number  # COCO's API takes an annotation 0 for none
        return {"images": images, "annotations": annotations, "categories": [dict(c) for c in self.categories]}

    def encoded(self, index: int, instances: Sequence[Instance]) -> list[dict[str, Any]]:
        """Return annotations of an image as COCO has them, masks as compressed RLE.

        Raises:
            DataError: a mask does not fit its image.
        """
        identity, about, _ = self.images[index]
        return [
            {
                "id": one.id,
                "image_id": identity,
                "category_id": one.category,
                "area": one.area,
                "iscrowd": int(one.is_crowd),
                "bbox": list(one.box),
                "segmentation": encode(
                    one.parts, about.height, about.width, partial("{}, annotation {}".format, self.path, one.id)
                ),
            }
            for one in instances
        ]

    def without_crowds(self) -> "InstanceSet":
        """Return the same without asking for crowds: they are no instances, and have no one name."""
        plain = copy.copy(self)
        plain.asked = [tuple(one for one in some if not one.is_crowd) for some in self.asked]
        return plain

    def annotated(self) -> "InstanceSet":
        """Return the same without detections: images with what was annotated."""
        plain = copy.copy(self)
        plain.detections = None
        return plain


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
