"""Folders of images, and streams of samples in which every image comes once before any comes again."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from configs.training import TrainConfig
from utils.errors import DataError, TextSAMError
from utils.feature_cache import FeatureCache, FlatFeatures
from utils.image import IMAGE_SUFFIXES, MAX_PIXELS, ImageSpec, read_image

from .mixture import shuffled, spread
from .sample import move, pin


class Items(Protocol):
    """What a stream draws from: samples by index.

    * `in_order`: whether reading them one after the other is much faster than anyhow, as of a .tar file.
    """

    name: str
    in_order: bool

    def __len__(self) -> int: ...

    def load(self, index: int) -> Any:
        """Return a sample.

        Raises:
            TextSAMError: its files are missing or damaged; it names them.
        """


@dataclass(frozen=True)
class ImageSample:
    """One image, uint8 RGB [H, W, 3]; `key`: its name; `index`: its place in the data set."""

    image: np.ndarray
    key: str
    index: int


class ImageFolder:
    """All images below a folder, sorted by path; hidden files are passed over.

    Raises:
        DataError: no such folder, or no image in it.
    """

    in_order = False

    def __init__(self, name: str, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        if not folder.is_dir():
            raise DataError(f"no such folder of images: {folder}. data.sets are folders below data.root")
        self.name, self.folder, self.max_pixels = name, folder, max_pixels
        self.paths = sorted(_find_images(folder))
        if not self.paths:
            allowed = ", ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{folder} holds no image, nor do its folders. Their names must end in one of {allowed}")

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> ImageSample:
        """Return an image; see `Items.load`."""
        path = self.paths[index]
        return ImageSample(read_image(self.folder / path, self.max_pixels), f"{self.name}/{path}", index)


def _find_images(folder: Path) -> Iterator[str]:
    """Yield the paths of images relative to a folder; a link that leads back up is followed once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        folders[:] = [] if here in seen else [name for name in folders if not name.startswith(".")]
        if here in seen:
            continue
        seen.add(here)
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES:
                yield str(path.relative_to(folder))


class Part:
    """Some items of another data set."""

    def __init__(self, whole: Items, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices
        self.name, self.in_order = whole.name, whole.in_order

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Any:
        """Return an item; its `index` is its place in this part."""
        return replace(self.whole.load(self.indices[index]), index=index)


class Joined:
    """Several data sets as one."""

    in_order = False

    def __init__(self, name: str, sets: Sequence[Items]) -> None:
        self.name, self.sets = name, tuple(sets)
        self._ends = list(accumulate(map(len, sets)))

    def __len__(self) -> int:
        return self._ends[-1]

    def load(self, index: int) -> Any:
        """Return an item; its `index` is its place in all of them."""
        which = bisect_right(self._ends, index)
        own = index - (self._ends[which] - len(self.sets[which]))
        return replace(self.sets[which].load(own), index=index)


def hold_out(items: Items, share: float, at_end: bool) -> tuple[Part, Part]:
    """Return what is trained on and what is measured.

    Args:
        share: of the items that are measured, at least one; 0 measures none.
        at_end: take the last, as published for SA-1B, instead of items spread over all.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = len(items)
    held = max(1, round(count * share)) if share else 0
    if held >= count:
        raise DataError(f"{items.name} has {count} images, of which {held} are held out. Add images, or set val.sets")
    last = range(count - held, count)
    measured = last if at_end else spread(range(count), held) if held else []
    kept = sorted(set(range(count)).difference(measured))
    return Part(items, kept), Part(items, list(measured))


class Stream(Dataset):
    """Every item of every set once before any comes again: the same position is always the same sample.

    Sets that are best read in order are taken one after the other, drawn anew for each pass, their items in order; the
    others are one lot that is shuffled.

    Args:
        finish: an item and a generator of its own -> the sample; what is random about it.
        measured: what is held out of it, to be measured.

    Raises:
        DataError: a set is empty.
    """

    def __init__(
        self,
        sets: Sequence[Items],
        finish: Callable[[Any, np.random.Generator], Any],
        seed: int = 0,
        measured: Sequence[Items] = (),
    ) -> None:
        for one in sets:
            if not len(one):
                raise DataError(f"{one.name} is empty. Leave it out, or check its files")
        self.sets, self.finish, self.seed, self.measured = tuple(sets), finish, seed, tuple(measured)
        loose = [one for one in sets if not one.in_order]
        self._lots = [[one] for one in sets if one.in_order] + ([loose] if loose else [])
        self._sizes = [sum(map(len, lot)) for lot in self._lots]

    @property
    def pass_length(self) -> int:
        """How many samples go through the data once."""
        return sum(self._sizes)

    def choose(self, position: int) -> tuple[Items, int]:
        """Return the data set and the index in it of a position."""
        epoch, place = divmod(position, self.pass_length)
        order = shuffled(self.seed, epoch, len(self._lots))
        ends = list(accumulate(self._sizes[i] for i in order))
        turn = bisect_right(ends, place)
        lot, place = self._lots[order[turn]], place - (ends[turn] - self._sizes[order[turn]])
        if lot[0].in_order:
            return lot[0], place
        place = int(shuffled(self.seed, epoch, self._sizes[order[turn]])[place])
        ends = list(accumulate(map(len, lot)))
        which = bisect_right(ends, place)
        return lot[which], place - (ends[which] - len(lot[which]))

    def __getitem__(self, position: int) -> Any:
        """Return the sample of a position, or what was wrong with its files: an error must leave a worker whole."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, position]))
        try:
            items, index = self.choose(position)
            return self.finish(items.load(index), generator)
        except TextSAMError as error:
            return error

    def describe(self) -> str:
        """Return a table of what is trained on."""
        rows = [*((one, "") for one in self.sets), *((one, " measured") for one in self.measured)]
        return "\n".join([f"{'set':40} {'images':>9}", *(f"{one.name:40} {len(one):9,}{note}" for one, note in rows)])


def open_image_stream(config: TrainConfig) -> Stream:
    """Return the images of a distillation, with those that are held out.

    Raises:
        DataError: a folder is missing or empty.
    """
    data, val = config.data, config.val
    sets = [one for name in data.sets for one in open_images(name, data.root, data.max_pixels)]
    open_measured = partial(open_images, root=val.root or data.root, max_pixels=data.max_pixels)
    if config.distill.features:
        check_stems([*sets, *(one for name in val.sets for one in open_measured(name))])
    return split(sets, config, open_measured, Mirror(data.flip), at_end=False)


def check_stems(sets: Sequence[ImageFolder]) -> None:
    """Refuse two images that a flat folder of features would take for one."""
    stems: dict[str, Path] = {}
    for path in (one.folder / path for one in sets for path in one.paths):
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise DataError(f"distill.features knows images by name, but there are {other} and {path}. Rename one")


def open_images(name: str, root: str, max_pixels: int = MAX_PIXELS) -> list[ImageFolder]:
    """Return what one name in `data.sets` stands for."""
    return [ImageFolder(name, Path(root) / name, max_pixels)]


def split(
    sets: Sequence[Items],
    config: TrainConfig,
    open_items: Callable[[str], Sequence[Items]],
    finish: Callable[[Any, np.random.Generator], Any],
    at_end: bool,
) -> Stream:
    """Return a stream of sets, with what is measured: `val.sets`, or a share of each set that is held out.

    Args:
        open_items: a name in `val.sets` -> what it stands for.
        at_end: as `hold_out`.
    """
    data, val = config.data, config.val
    if val.sets:
        measured = [one for name in val.sets for one in open_items(name)]
    else:
        pairs = [hold_out(one, data.held_out, at_end) for one in sets]
        sets, held = [kept for kept, _ in pairs], [part for _, part in pairs if len(part)]
        measured = [Joined("held out", held)] if held else []
    chosen = [Part(one, spread(range(len(one)), val.max_images)) for one in measured]
    return Stream(sets, finish, config.run.seed, chosen)


@dataclass(frozen=True)
class Mirror:
    """Mirrors an image with a chance."""

    chance: float

    def __call__(self, sample: ImageSample, generator: np.random.Generator) -> ImageSample:
        """Return the sample or its mirror image."""
        if self.chance and generator.random() < self.chance:
            return replace(sample, image=np.ascontiguousarray(sample.image[:, ::-1]))
        return sample


@dataclass(frozen=True)
class ImageBatch:
    """B images for a student and its teacher.

    * `pixels`: of the student, float32 [B, 3, S, S]; `teacher_pixels`: of the b images without `features`, in order.
    * `features`: per image the cached tensors of the teacher without batch dimension, or None; `feature_names`: what
      the cache calls the images, or () where there is none.
    * `keys`: name of each image; `indices`: place of each in its data set. `phrases`, `phrase_ids`: the names again,
      for what counts and lists what a step is about.
    """

    pixels: Tensor
    teacher_pixels: Tensor
    features: tuple[Mapping[str, Tensor] | None, ...]
    feature_names: tuple[str, ...]
    keys: tuple[str, ...]
    indices: tuple[int, ...]

    @property
    def phrases(self) -> tuple[str, ...]:
        """One per image."""
        return self.keys

    @property
    def phrase_ids(self) -> tuple[str, ...]:
        """One per image."""
        return self.keys

    def to(self, device: torch.device) -> "ImageBatch":
        """Return the batch with every tensor on a device."""
        return replace(self, **{field.name: move(getattr(self, field.name), device) for field in fields(self)})

    def pin_memory(self) -> "ImageBatch":
        """Return the batch in page-locked memory; `torch.utils.data.DataLoader` calls it where asked to."""
        return replace(self, **{field.name: pin(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class ImageCollate:
    """Turns images into an `ImageBatch`; `spec` and `teacher_spec`: how student and teacher see an image."""

    spec: ImageSpec
    teacher_spec: ImageSpec
    cache: FeatureCache | FlatFeatures | None = None

    def __call__(self, samples: Sequence[ImageSample]) -> ImageBatch:
        """Pack images; those whose features the cache holds are not prepared for the teacher."""
        names = tuple(self.cache.name(sample.image, sample.key) for sample in samples) if self.cache else ()
        features = tuple(map(self.cache.read, names)) if self.cache else (None,) * len(samples)
        fresh = [self.teacher_spec(s.image) for s, known in zip(samples, features, strict=True) if known is None]
        side = self.teacher_spec.size
        return ImageBatch(
            pixels=torch.stack([self.spec(sample.image) for sample in samples]),
            teacher_pixels=torch.stack(fresh) if fresh else torch.empty(0, 3, side, side),
            features=features,
            feature_names=names,
            keys=tuple(sample.key for sample in samples),
            indices=tuple(sample.index for sample in samples),
        )
