"""What a data set gives and what a model takes: `Sample` is one image, `Batch` is several, packed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image with N phrases.

    * `image`: uint8 RGB [H, W, 3].
    * `phrases`: N texts, as the model reads them. `ids`: N stable names, unique in the data set.
    * `masks`: uint8 [N, H, W]: 0 background, 1 object, `IGNORE` neither. All 0 where a phrase has no target. Only a
      data set opened with `overlaps="sum"` holds other values: the published count of overlapping polygons.
    * `key`: stable name of the image, unique over all data sets; `index`: its place in the data set.
    """

    image: np.ndarray
    phrases: tuple[str, ...]
    ids: tuple[str, ...]
    masks: np.ndarray
    key: str
    index: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[:2]


@dataclass(frozen=True)
class Batch:
    """B images with N phrases in all; phrase n is about image `image_index[n]`, phrases of one image follow each other.

    * `pixels`: float32 [b, 3, S, S], the segmenter's input of the b images without `features`, in their order.
    * `features`: per image the cached tensors of the segmenter's encoder without batch dimension, or None;
      `feature_names`: what the cache calls the images, or () where there is no cache.
    * `encoder_pixels`: float32 [B, 3, s, s].
    * `ids`: int64 [N, T], right-padded; `padding`: bool [N, T], True at padding.
    * `masks`: per image uint8 [n_i, H_i, W_i], values as in `Sample`.
    * `sizes`: (H, W) of each image; `keys`: name of each image; `indices`: place of each in its data set.
    * `phrases`, `phrase_ids`: N texts and names.
    """

    pixels: Tensor
    features: tuple[Mapping[str, Tensor] | None, ...]
    feature_names: tuple[str, ...]
    encoder_pixels: Tensor
    ids: Tensor
    padding: Tensor
    image_index: Tensor
    masks: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]
    phrases: tuple[str, ...]
    phrase_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with every tensor on a device."""
        return replace(self, **{field.name: move(getattr(self, field.name), device) for field in fields(self)})

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; `torch.utils.data.DataLoader` calls it where asked to."""
        return replace(self, **{field.name: pin(getattr(self, field.name)) for field in fields(self)})


def move(value: Any, device: torch.device) -> Any:
    """Return a value with every tensor in it on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: move(item, device) for name, item in value.items()}
    return tuple(move(item, device) for item in value) if isinstance(value, tuple) else value


def pin(value: Any) -> Any:
    """Return a value with every tensor in it in page-locked memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, Mapping):
        return {name: pin(item) for name, item in value.items()}
    return tuple(pin(item) for item in value) if isinstance(value, tuple) else value
