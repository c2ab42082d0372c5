"""Annotated things with names, prompted with boxes and points: the data of Open-Vocabulary SAM's second stage.

Source of the recipe: arXiv 2401.02955. What is prompted twice, or left out of too many, is drawn; published: the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from configs.training import TrainConfig
from utils.centre_points import centre_points
from utils.errors import DataError
from utils.image import ImageSpec
from utils.known_names import KnownNames, read_known_names
from utils.masks import boxes_of_masks

from .images import Stream, split
from .instance_files import open_instances
from .instances import InstanceSet
from .prompts import choose
from .sample import move, pin

TRIES = 10
"""Cuts of an image that are drawn; the first that shows an instance counts, else the whole image."""
AT_ONCE = 1 << 24
"""Pixels of masks that are counted together: 64 MB of float32."""


@dataclass(frozen=True)
class NamedImage:
    """An image with n instances.

    * `image`: uint8 RGB [H, W, 3]; `masks`: uint8 [n, H, W], 1 where the thing is.
    * `boxes`: x1 y1 x2 y2, float64 [n, 4].
    * `labels`: places of their names in the vocabulary, int64 [n]; `names`, `ids`: of each.
    * `key`: path of the image; `index`: its place.
    """

    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    ids: tuple[str, ...]
    key: str
    index: int


class NamedSet:
    """Images of COCO or LVIS with those instances whose names are asked for; others are not there, nor are crowds.

    Raises:
        VocabularyError: a category is not in the vocabulary. DataError: nothing is left.
    """

    in_order = False

    def __init__(self, instances: InstanceSet, known: KnownNames, asked: frozenset[int]) -> None:
        self.instances, self.known, self.name = instances, known, instances.name
        self.labels = {number: known.place(name, str(instances.path)) for number, name in instances.names.items()}
        kept = [
            (index, [i for i, one in enumerate(some) if not one.is_crowd and self.labels[one.category] in asked])
            for index, some in enumerate(instances.asked)
        ]
        self.images = [(index, places) for index, places in kept if places]
        if not self.images:
            raise DataError(
                f"{instances.path} has no instance of the {len(asked)} names that are asked for. Check the base names "
                "of the vocabulary"
            )

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> NamedImage:
        """Return an image; see `datasets.images.Items.load`."""
        place, chosen = self.images[index]
        sample = self.instances.load(place, chosen)
        some = [self.instances.asked[place][i] for i in chosen]
        labels = [self.labels[one.category] for one in some]
        return NamedImage(
            sample.image,
            sample.masks,
            sample.boxes,
            np.array(labels, np.int64),
            tuple(self.known.names[label] for label in labels),
            tuple(str(one.id) for one in some),
            sample.key,
            index,
        )


@dataclass(frozen=True)
class DrawnView:
    """An image, and what is drawn of it.

    * `views`: cuts to try, float64 [T, 3]: size relative to the input's side, and place from 0 to 1, x and y.
    * `seed`: of the instances and points that are drawn, and of the points at which the loss is computed.
    """

    item: NamedImage
    is_mirrored: bool
    views: np.ndarray
    seed: int


@dataclass(frozen=True)
class DrawView:
    """Draws cuts of an image: `resize`, between which sizes; `mirror`, a chance."""

    resize: tuple[float, float]
    mirror: float

    def __call__(self, item: NamedImage, generator: np.random.Generator) -> DrawnView:
        """Return an image with what was drawn."""
        views = generator.random((TRIES, 3))
        views[:, 0] = self.resize[0] + views[:, 0] * (self.resize[1] - self.resize[0])
        return DrawnView(item, bool(generator.random() < self.mirror), views, int(generator.integers(2**62)))


@dataclass(frozen=True)
class View:
    """Where a cut lies: an image is resized to `size` (h, w), and shown from `top`, `left` on, up to `side` pixels."""

    source: tuple[int, int]
    size: tuple[int, int]
    top: int
    left: int
    side: int

    @classmethod
    def of(cls, source: tuple[int, int], side: int, drawn: Sequence[float]) -> "View":
        """Return the cut of an image of `source` (H, W) that a row of `DrawnView.views` says."""
        factor, across, down = drawn
        scale = factor * side / max(source)
        height, width = (max(1, int(length * scale + 0.5)) for length in source)
        top, left = (int(place * (max(0, n - side) + 1)) for place, n in ((down, height), (across, width)))
        return cls(source, (height, width), top, left, side)

    def places(self, axis: int) -> np.ndarray:
        """Return the pixel of the image that each row (axis 0) or column (axis 1) of the cut shows, int64."""
        first, size = (self.top, self.left)[axis], self.size[axis]
        shown = np.arange(first, min(size, first + self.side))
        return np.minimum(((shown + 0.5) * (self.source[axis] / size)).astype(np.int64), self.source[axis] - 1)

    def image(self, image: np.ndarray) -> np.ndarray:
        """Return what the cut shows of an image, uint8 RGB [h, w, 3], bilinear."""
        resized = cv2.resize(image, self.size[::-1], interpolation=cv2.INTER_LINEAR)
        return resized[self.top : self.top + self.side, self.left : self.left + self.side]

    def masks(self, masks: np.ndarray) -> np.ndarray:
        """Return what it shows of masks, uint8 [n, h, w], by the nearest pixel."""
        return masks[:, self.places(0)][:, :, self.places(1)]

    def count(self, masks: np.ndarray) -> np.ndarray:
        """Return how many pixels it shows of each mask, int64 [n], without making them."""
        rows, columns = (np.bincount(self.places(axis), minlength=self.source[axis]) for axis in (0, 1))
        columns = columns.astype(np.float32)
        step = max(1, AT_ONCE // (masks.shape[1] * masks.shape[2]))
        starts = range(0, len(masks), step)
        parts = [masks[start : start + step].astype(np.float32) @ columns @ rows for start in starts]
        return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True)
class NamedBatch:
    """B images with N prompts in all; prompt n is about image `image_index[n]`, those of one image follow each other.

    * `pixels`: float32 [B, 3, S, S]; `masks`: uint8 [U, S, S], 1 where one of U things is; `mask_index`: int64 [N].
    * `boxes`: around each mask, x1 y1 x2 y2 in pixels of the input, float32 [N, 4]; `points`: on it, float32 [N, 2].
    * `by_box`: bool [N], whether the box prompts, else the point; `labels`: int64 [N]; `image_index`: int64 [N].
    * `seeds`: per image; `keys`: its name; `indices`: its place.
    * `phrases`, `phrase_ids`: the name of each thing, and its annotation.
    """

    pixels: Tensor
    masks: Tensor
    mask_index: Tensor
    boxes: Tensor
    points: Tensor
    by_box: Tensor
    labels: Tensor
    image_index: Tensor
    seeds: tuple[int, ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]
    phrases: tuple[str, ...]
    phrase_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "NamedBatch":
        """Return the batch with every tensor on a device."""
        return replace(self, **{field.name: move(getattr(self, field.name), device) for field in fields(self)})

    def pin_memory(self) -> "NamedBatch":
        """Return the batch in page-locked memory; `torch.utils.data.DataLoader` calls it where asked to."""
        return replace(self, **{field.name: pin(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class NamedCollate:
    """Turns drawn images into a `NamedBatch`.

    * `spec`: how the segmenter sees an image; `proposals`: prompts of each; `least`: pixels of the least instance.
    * `measured_by`: `box` or `point`, what prompts the masks that are measured.
    """

    spec: ImageSpec
    proposals: int
    least: int
    measured_by: str = "box"

    def __call__(self, samples: Sequence[DrawnView]) -> NamedBatch:
        """Cut and pack images.

        Raises:
            DataError: an image shows nothing.
        """
        shown = [self.show(sample) for sample in samples]
        counts = [len(part["masks"]) for part in shown]
        first = np.cumsum([0, *counts[:-1]])
        joined = {
            key: torch.from_numpy(np.concatenate([part[key] for part in shown]))
            for key in ("masks", "boxes", "points", "labels")
        }
        each = len(shown[0]["points"])
        return NamedBatch(
            pixels=torch.stack([part["pixels"] for part in shown]),
            mask_index=torch.from_numpy(
                np.concatenate([part["chosen"] + start for part, start in zip(shown, first, strict=True)])
            ),
            by_box=(torch.arange(each) < each // 2 + 1).repeat(len(samples)),
            image_index=torch.arange(len(samples)).repeat_interleave(each),
            seeds=tuple(sample.seed for sample in samples),
            keys=tuple(sample.item.key for sample in samples),
            indices=tuple(sample.item.index for sample in samples),
            phrases=tuple(name for part in shown for name in part["names"]),
            phrase_ids=tuple(name for part in shown for name in part["ids"]),
            **joined,
        )

    def show(self, sample: DrawnView) -> dict:
        """Return the fields of one image: the network's input, u things, and its prompts."""
        item = sample.item
        flip = slice(None, None, -1 if sample.is_mirrored else 1)
        image, masks = item.image[:, flip], item.masks[:, :, flip]
        view, kept = self._choose_view(sample, masks)
        generator = np.random.Generator(np.random.Philox(sample.seed))
        drawn = kept[generator.permutation(choose(len(kept), self.proposals, generator))]
        things, chosen = np.unique(drawn, return_inverse=True)
        cut = view.masks(masks[things])
        padded = np.zeros((len(things), self.spec.size, self.spec.size), np.uint8)
        padded[:, : cut.shape[1], : cut.shape[2]] = cut
        pixels = torch.from_numpy(np.ascontiguousarray(view.image(np.ascontiguousarray(image)))).permute(2, 0, 1)
        return {
            "pixels": self.spec.normalise(pixels),
            "masks": padded,
            "chosen": chosen.astype(np.int64),
            "boxes": boxes_of_masks(torch.from_numpy(padded) > 0).numpy()[chosen],
            "points": draw_pixels(padded, chosen, generator.random(len(chosen))),
            "labels": item.labels[drawn],
            "names": [item.names[i] for i in drawn],
            "ids": [item.ids[i] for i in drawn],
        }

    def _choose_view(self, sample: DrawnView, masks: np.ndarray) -> tuple[View, np.ndarray]:
        """Return the first cut that shows an instance, and which it shows, int64 [k]."""
        size = masks.shape[1:]
        for drawn in sample.views:
            view = View.of(size, self.spec.size, drawn)
            kept = (view.count(masks) >= self.least).nonzero()[0]
            if len(kept):
                return view, kept
        view = View.of(size, self.spec.size, (1.0, 0.0, 0.0))
        kept = (view.count(masks) > 0).nonzero()[0]
        if not len(kept):
            raise DataError(f"{sample.item.key}: none of its {len(masks)} annotations has a pixel. Leave them out")
        return view, kept

    @property
    def measuring(self) -> "MeasuredCollate":
        """What packs images that are measured."""
        return MeasuredCollate(self.spec, self.measured_by)


def draw_pixels(masks: np.ndarray, chosen: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Return a pixel of some masks, each of its pixels as likely, x y, float32 [N, 2].

    Args:
        masks: uint8 [U, H, W], none of them empty; chosen: which, int64 [N]; chances: 0..1, float64 [N].
    """
    inside = np.flatnonzero(masks)
    area = masks[0].size
    ends = np.searchsorted(inside, np.arange(1, len(masks) + 1) * area)
    starts = np.concatenate([[0], ends[:-1]])
    ranks = (chances * (ends - starts)[chosen]).astype(np.int64)
    pixels = inside[starts[chosen] + ranks] % area
    return np.stack([pixels % masks.shape[2], pixels // masks.shape[2]], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class MeasuredBatch:
    """B whole images with N prompts in all, to be measured.

    * `pixels`: float32 [B, 3, S, S]; `boxes`: float32 [N, 4], or `points`: float32 [N, 2], in pixels of the input; the
      other is None. `image_index`: int64 [N]; `labels`: int64 [N].
    * `masks`: per image bool [n_i, H_i, W_i]; `sizes`: (H, W) of each; `keys`: its name; `indices`: its place.
    """

    pixels: Tensor
    boxes: Tensor | None
    points: Tensor | None
    image_index: Tensor
    labels: Tensor
    masks: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]

    def to(self, device: torch.device) -> "MeasuredBatch":
        """Return the batch with every tensor on a device."""
        return replace(self, **{field.name: move(getattr(self, field.name), device) for field in fields(self)})


@dataclass(frozen=True)
class MeasuredCollate:
    """Turns images into a `MeasuredBatch`; `prompt`: `box` or `point`, in the middle of the mask."""

    spec: ImageSpec
    prompt: str

    def __call__(self, samples: Sequence[NamedImage]) -> MeasuredBatch:
        """Prepare and pack images."""
        masks = tuple(torch.from_numpy(sample.masks) > 0 for sample in samples)
        sizes = tuple(sample.image.shape[:2] for sample in samples)
        scales = [np.divide(self.spec.resized_size(*size), size)[::-1] for size in sizes]
        if self.prompt == "box":
            places = [np.tile(scale, 2) * sample.boxes for sample, scale in zip(samples, scales, strict=True)]
        else:
            pairs = zip(masks, scales, strict=True)
            places = [(centre_points(part).numpy() + 0.5) * scale - 0.5 for part, scale in pairs]
        prompts = torch.from_numpy(np.concatenate(places)).float()
        counts = torch.tensor([len(part) for part in masks])
        return MeasuredBatch(
            pixels=torch.stack([self.spec(sample.image) for sample in samples]),
            boxes=prompts if self.prompt == "box" else None,
            points=None if self.prompt == "box" else prompts,
            image_index=torch.arange(len(samples)).repeat_interleave(counts),
            labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
            masks=masks,
            sizes=sizes,
            keys=tuple(sample.key for sample in samples),
            indices=tuple(sample.index for sample in samples),
        )


def open_named_stream(config: TrainConfig) -> Stream:
    """Return the images of a training on names, with those that are measured.

    Raises:
        TextSAMError: a file is missing or is something else, or classes and vocabulary disagree.
    """
    data, val, asked = config.data, config.val, config.names
    known = read_known_names(asked.vocabulary)
    options = {"kind": asked.kind, "known": known, "max_pixels": data.max_pixels}
    trained = partial(_open, root=data.root, images=asked.images, **options)
    val_images = asked.images if asked.val_images is None else asked.val_images
    measured = partial(_open, root=val.root or data.root, images=val_images, asked=known.measured, **options)
    sets = [one for name in data.sets for one in trained(name, asked=known.trained)]
    return split(sets, config, measured, DrawView(asked.resize, data.flip), at_end=False)


def _open(
    name: str, root: str, images: str, kind: str, known: KnownNames, asked: frozenset[int], max_pixels: int
) -> list[NamedSet]:
    instances = open_instances(kind, Path(root, name), Path(root, images), max_pixels=max_pixels)
    return [NamedSet(instances, known, asked)]
