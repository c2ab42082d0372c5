"""Boxes and points for the masks of SA-1B: what is drawn of each image, and its batches.

Source of the recipe: mit-han-lab/efficientvit, the SAM trainer's data provider.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.training import TrainConfig
from utils.errors import DataError
from utils.image import ImageSpec

from .images import Items, Stream, split
from .sa1b import MaskFolder, MaskImage, MaskShard, decode_masks
from .sample import move, pin

AT_ONCE = 1 << 25
"""Pixels of masks that are resized together: 128 MB of float32."""


@dataclass(frozen=True)
class DrawnImage:
    """An image, and what is drawn for its masks.

    * `chosen`: which of its masks, int64 [K]; `is_mirrored`: whether it is shown mirrored.
    * `points`: how many points prompt each mask, 0 for its box; `chances`: 0..1, float64 [K, `points`], where they lie.
    * `is_multi`: whether the best of three masks learns; `seed`: of the points at which the loss is computed.
    """

    item: MaskImage
    chosen: np.ndarray
    is_mirrored: bool
    points: int
    chances: np.ndarray
    is_multi: bool
    seed: int

    @property
    def index(self) -> int:
        """Place of the image in its data set."""
        return self.item.index


@dataclass(frozen=True)
class Draw:
    """Draws masks and prompts of an image.

    * `masks`: how many; fewer are repeated. `boxes`, `multimask`, `mirror`: chances; `points`: most points of a mask.
    """

    masks: int
    boxes: float
    points: int
    multimask: float
    mirror: float

    def __call__(self, item: MaskImage, generator: np.random.Generator) -> DrawnImage:
        """Return an image with what was drawn."""
        points = 0 if generator.random() < self.boxes else int(generator.integers(1, self.points + 1))
        is_mirrored, is_multi = (bool(generator.random() < chance) for chance in (self.mirror, self.multimask))
        return DrawnImage(
            item,
            choose(len(item.rles), self.masks, generator),
            is_mirrored,
            points,
            generator.random((self.masks, points)),
            is_multi,
            int(generator.integers(2**62)),
        )


def choose(count: int, needed: int, generator: np.random.Generator) -> np.ndarray:
    """Return `needed` of `count` things, int64: none twice where there are enough, else all as often as they go."""
    whole = np.tile(np.arange(count), needed // count)
    rest = generator.permutation(count)[: needed - len(whole)]
    return np.concatenate([whole, rest]) if len(whole) else rest


class Measured:
    """Images whose first masks are measured, prompted with their boxes."""

    def __init__(self, items: Items, masks: int) -> None:
        self.items, self.masks = items, masks
        self.name, self.in_order = items.name, items.in_order

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> DrawnImage:
        """Return an image; see `Items.load`."""
        item = self.items.load(index)
        count = min(self.masks, len(item.rles))
        return DrawnImage(item, np.arange(count), False, 0, np.zeros((count, 0)), True, index)


@dataclass(frozen=True)
class PromptBatch:
    """B images with N masks in all; mask n is of image `image_index[n]`, those of one image follow each other.

    * `pixels`: float32 [B, 3, S, S]; `masks`: per image uint8 [n_i, S, S], how much of each pixel is in it, 0..255.
    * `boxes`: x1 y1 x2 y2, float32 [N, 4]; or `points`: x y, float32 [N, P, 2]; the other is None. Both lie on the
      frame of prompts.
    * `image_index`: int64 [N]; `multi`: per image whether the best of three masks learns; `seeds`: per image.
    * `sizes`: (h, w) of each image in `pixels`, without what is padded; `keys`: its name; `indices`: its place.
    * `phrases`, `phrase_ids`: what prompts each mask, in words, and its name.
    """

    pixels: Tensor
    masks: tuple[Tensor, ...]
    boxes: Tensor | None
    points: Tensor | None
    image_index: Tensor
    multi: tuple[bool, ...]
    seeds: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]
    phrases: tuple[str, ...]
    phrase_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "PromptBatch":
        """Return the batch with every tensor on a device."""
        return replace(self, **{field.name: move(getattr(self, field.name), device) for field in fields(self)})

    def pin_memory(self) -> "PromptBatch":
        """Return the batch in page-locked memory; `torch.utils.data.DataLoader` calls it where asked to."""
        return replace(self, **{field.name: pin(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class PromptCollate:
    """Turns drawn images into a `PromptBatch`.

    All images of a batch are prompted alike, with boxes or with as many points as the first of them asks for, so that
    they go through the decoder together; published: drawn for each image. Where a mask has fewer pixels than points
    are asked for, boxes are taken.

    * `spec`: how the segmenter sees an image; `prompt_side`: of the frame that prompts lie on, in pixels.
    """

    spec: ImageSpec
    prompt_side: int

    def __call__(self, samples: Sequence[DrawnImage]) -> PromptBatch:
        """Pack images.

        Raises:
            DataError: a mask cannot be decoded.
        """
        masks = [prepare_masks(sample, self.spec) for sample in samples]
        count, scale = samples[0].points, self.prompt_side / self.spec.size
        points = count and draw_points(np.concatenate([part.numpy() for part in masks]), _chances(samples, count))
        word = "box" if points is None or not count else f"{count} points"
        boxes = np.concatenate([prepare_boxes(sample, self.spec) for sample in samples])
        counts = torch.tensor([len(part) for part in masks])
        return PromptBatch(
            pixels=torch.stack([self.spec(_mirrored(sample)) for sample in samples]),
            masks=tuple(masks),
            boxes=torch.from_numpy(boxes * scale).float() if word == "box" else None,
            points=None if word == "box" else torch.from_numpy(points * scale).float(),
            image_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
            multi=tuple(sample.is_multi for sample in samples),
            seeds=tuple(sample.seed for sample in samples),
            sizes=tuple(self.spec.resized_size(*sample.item.image.shape[:2]) for sample in samples),
            keys=tuple(sample.item.key for sample in samples),
            indices=tuple(sample.index for sample in samples),
            phrases=(word,) * int(counts.sum()),
            phrase_ids=tuple(sample.item.ids[i] for sample in samples for i in sample.chosen),
        )


def _mirrored(sample: DrawnImage) -> np.ndarray:
    image = sample.item.image
    return np.ascontiguousarray(image[:, ::-1]) if sample.is_mirrored else image


def _chances(samples: Sequence[DrawnImage], count: int) -> np.ndarray:
    """Return 0..1 for each point of each mask, float64 [N, count]; images that asked for others draw anew."""
    rows = [
        s.chances if s.points == count else np.random.Generator(np.random.Philox(s.seed)).random((len(s.chosen), count))
        for s in samples
    ]
    return np.concatenate(rows)


def prepare_masks(sample: DrawnImage, spec: ImageSpec) -> Tensor:
    """Return how much of each pixel of the network's input is in each mask, uint8 [K, S, S], 0..255.

    Resized as the image is, antialiased: masks get soft edges. Whatever is above 0 stays above 0.
    """
    item = sample.item
    size = spec.resized_size(*item.image.shape[:2])
    step, parts = max(1, AT_ONCE // item.image[..., 0].size), []
    for start in range(0, len(sample.chosen), step):
        decoded = decode_masks([item.rles[i] for i in sample.chosen[start : start + step]], item.key)
        decoded = decoded[..., ::-1] if sample.is_mirrored else decoded
        parts.append(resize_masks(torch.from_numpy(np.ascontiguousarray(decoded)).float(), size).mul_(255))
    soft = torch.cat(parts)
    padded = torch.zeros(len(soft), spec.size, spec.size, dtype=torch.uint8)
    padded[:, : size[0], : size[1]] = torch.where(soft > 0, soft.round().clamp(1, 255), 0).to(torch.uint8)
    return padded


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks float [K, H, W] resized to `size`, bilinear and antialiased."""
    return F.interpolate(masks[:, None], size, mode="bilinear", align_corners=False, antialias=True)[:, 0]


def prepare_boxes(sample: DrawnImage, spec: ImageSpec) -> np.ndarray:
    """Return the boxes of the chosen masks in pixels of the network's input, x1 y1 x2 y2, float32 [K, 4]."""
    height, width = sample.item.image.shape[:2]
    x, y, w, h = sample.item.boxes[sample.chosen].T
    x = width - x - w if sample.is_mirrored else x
    resized = spec.resized_size(height, width)
    return np.stack([x, y, x + w, y + h], 1) * np.float32([resized[1] / width, resized[0] / height] * 2)


def draw_points(masks: np.ndarray, chances: np.ndarray) -> np.ndarray | None:
    """Return pixels of masks, each as likely as the others, no pixel twice.

    Args:
        masks: [N, H, W]; a pixel is in the mask where it is not 0.
        chances: 0..1, float64 [N, P].

    Returns:
        x y, float64 [N, P, 2]; None where a mask has fewer than P pixels.
    """
    flat = masks.reshape(len(masks), -1)
    inside = np.flatnonzero(flat)
    ends = np.searchsorted(inside, np.arange(1, len(flat) + 1) * flat.shape[1])
    starts = np.concatenate([[0], ends[:-1]])
    counts = ends - starts
    if (counts < chances.shape[1]).any():
        return None
    ranks = distinct_ranks(counts, chances)
    pixels = inside[starts[:, None] + ranks] % flat.shape[1]
    return np.stack([pixels % masks.shape[2], pixels // masks.shape[2]], axis=-1).astype(np.float64)


def distinct_ranks(counts: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Return P different numbers of 0..count - 1 for each count, int64 [N, P]: any such choice is as likely.

    The k-th is drawn from count - k that are left, and moved past those that are gone, smallest first.
    """
    ranks = np.empty(chances.shape, np.int64)
    for k in range(chances.shape[1]):
        rank = np.minimum((chances[:, k] * (counts - k)).astype(np.int64), counts - k - 1)
        for gone in np.sort(ranks[:, :k], axis=1).T:
            rank += rank >= gone
        ranks[:, k] = rank
    return ranks


def open_prompt_stream(config: TrainConfig) -> Stream:
    """Return the images of a training on boxes and points, with those that are held out: the last of each set.

    Raises:
        DataError: a folder or shard is missing, empty or hostile.
    """
    data, asked = config.data, config.prompts
    draw = Draw(asked.masks, asked.boxes, asked.points, asked.multimask, data.flip)
    options = {"max_pixels": data.max_pixels, "index_folder": data.shard_index}
    sets = [one for name in data.sets for one in open_sets(name, data.root, **options)]
    open_measured = partial(open_sets, root=config.val.root or data.root, **options)
    stream = split(sets, config, open_measured, draw, at_end=True)
    stream.measured = tuple(Measured(one, asked.val_masks) for one in stream.measured)
    return stream


def open_sets(name: str, root: str, max_pixels: int, index_folder: str | None) -> list[Any]:
    """Return what a name in `data.sets` stands for: a folder, a .tar, or several by a pattern such as `sa_*.tar`.

    Raises:
        DataError: nothing of that name.
    """
    if name.endswith(".tar"):
        paths = sorted(Path(root).glob(name)) if any(mark in name for mark in "*?[") else [Path(root) / name]
        if not paths:
            raise DataError(f"no .tar fits {name!r} below {root}. Check data.root and data.sets")
        return [MaskShard(str(path.relative_to(root)), path, max_pixels, index_folder) for path in paths]
    return [MaskFolder(name, Path(root) / name, max_pixels)]
