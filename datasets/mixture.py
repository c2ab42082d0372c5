"""Data sets mixed for training: which sample each position of an endless stream is, on any number of ranks."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from utils.distributed import Ranks
from utils.errors import DataError, TextSAMError

from .collate import Collate
from .reader import PhraseDataset
from .sample import Batch, Sample

Transform = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class Group:
    """Data sets that share a rate; each is as likely as the others."""

    sets: tuple[PhraseDataset, ...]
    rate: float = 1.0


class Mixture(Dataset[Sample | TextSAMError]):
    """An endless stream of samples: the same position is always the same sample.

    `sampling="random"` draws a group by rate, one of its sets, and an image with replacement, as EVF-SAM's training
    does. `sampling="shuffle"` takes every image of every set once before any comes again; rates then repeat groups.

    Args:
        phrases: how many phrases of an image are drawn, at most; without replacement.
        seed: another seed is another stream.
        transforms: applied to each sample one after the other, with a generator of its own.

    Raises:
        DataError: nothing to draw from, or rates that `shuffle` cannot honour.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        phrases: int = 3,
        sampling: str = "random",
        seed: int = 0,
        transforms: Sequence[Transform] = (),
    ) -> None:
        for group in groups:
            for dataset in group.sets:
                if not len(dataset):
                    raise DataError(f"{dataset.name} holds no image with a phrase. Leave it out, or check its files")
        if not groups:
            raise DataError("no data sets to train on. Name at least one in data.sets")
        self.groups, self.phrases, self.sampling, self.seed = tuple(groups), phrases, sampling, seed
        self.transforms = tuple(transforms)
        rates = np.array([group.rate for group in groups], dtype=np.float64)
        self._bounds = np.cumsum(rates / rates.sum())
        self._places = self._table(rates) if sampling == "shuffle" else None

    def _table(self, rates: np.ndarray) -> list[tuple[int, int]]:
        """Return (start of a data set in a pass, set) of every data set of a pass, repeated by rate."""
        repeats = rates / rates.min()
        if not np.allclose(repeats, repeats.round()):
            raise DataError(
                f"data.rates {rates.tolist()}: with data.sampling=shuffle each must be a whole multiple of the smallest"
            )
        self._sets = [
            s for group, n in zip(self.groups, repeats.round().astype(int), strict=True) for s in group.sets * n
        ]
        return list(np.cumsum([0, *map(len, self._sets)]))

    @property
    def pass_length(self) -> int:
        """How many samples go through the data once: images, those of repeated groups several times."""
        if self._places is not None:
            return self._places[-1]
        return sum(len(dataset) for group in self.groups for dataset in group.sets)

    def choose(self, position: int) -> tuple[PhraseDataset, int, list[int], np.random.Generator]:
        """Return the data set, image, phrases of a position, and the generator for what is random after that."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, position]))
        if self._places is None:
            group = self.groups[int(np.searchsorted(self._bounds, generator.random(), side="right"))]
            dataset = group.sets[generator.integers(len(group.sets))]
            index = int(generator.integers(len(dataset)))
        else:
            epoch, place = divmod(position, self.pass_length)
            place = int(shuffled(self.seed, epoch, self.pass_length)[place])
            which = int(np.searchsorted(self._places, place, side="right")) - 1
            dataset, index = self._sets[which], place - self._places[which]
        count = len(dataset.phrases(index))
        chosen = generator.permutation(count)[: self.phrases].tolist()
        return dataset, index, chosen, generator

    def __getitem__(self, position: int) -> Sample | TextSAMError:
        """Return the sample of a position, or what was wrong with its files: an error must leave a worker whole."""
        try:
            dataset, index, chosen, generator = self.choose(position)
            sample = dataset.load(index, chosen)
        except TextSAMError as error:
            return error
        for transform in self.transforms:
            sample = transform(sample, generator)
        return sample

    def describe(self) -> str:
        """Return a table of what is trained on."""
        rows = [f"{'set':40} {'rate':>6} {'images':>9} {'phrases':>9}"]
        for group in self.groups:
            for dataset in group.sets:
                share = group.rate / len(group.sets)
                rows.append(f"{dataset.name:40} {share:6.3g} {len(dataset):9,} {dataset.count_phrases():9,}")
        return "\n".join(rows)

    def add(self, transform: Transform) -> None:
        """Apply one more transform to each sample, after the others."""
        self.transforms += (transform,)

    def all_phrases(self) -> Iterator[str]:
        """Yield every text of every data set."""
        for group in self.groups:
            for dataset in group.sets:
                for index in range(len(dataset)):
                    yield from dataset.phrases(index)


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of one pass, int64 [length]."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[1, 0, 0, 0]))
    return generator.permutation(length)


@dataclass(frozen=True)
class ValueOrError:
    """Hands a worker's error to the training process as a value, so that its text stays one line."""

    collate: Collate

    def __call__(self, samples: list[Sample | TextSAMError]) -> Batch | TextSAMError:
        """Return the batch, or the first error among samples and packing."""
        for sample in samples:
            if isinstance(sample, TextSAMError):
                return sample
        try:
            return self.collate(samples)
        except TextSAMError as error:
            return error


@dataclass(frozen=True)
class Shares:
    """Which positions of the stream each forward of each rank takes.

    Step s takes the positions [s * G, (s + 1) * G), G = batch * world * forwards, whatever the number of ranks.

    * `batch`: images of one forward of one rank; `forwards`: forwards per step; `rank`, `world`: this process.
    """

    batch: int
    forwards: int
    rank: int
    world: int

    def positions(self, start: int, stop: int) -> list[list[int]]:
        """Return the positions of every forward of this rank from step `start` to before `stop`."""
        at_once = self.batch * self.world
        firsts = range(start * at_once * self.forwards, stop * at_once * self.forwards, at_once)
        return [list(range(first + self.rank * self.batch, first + (self.rank + 1) * self.batch)) for first in firsts]


def training_steps(
    mixture: Mixture, collate: Collate, shares: Shares, start: int, stop: int, workers: int, pin_memory: bool = False
) -> Iterator[list[Batch]]:
    """Yield the batches of each step, from `start` to before `stop`.

    Raises:
        TextSAMError: what was wrong with a file of a sample.
    """
    loader = DataLoader(
        mixture,
        batch_sampler=shares.positions(start, stop),
        collate_fn=ValueOrError(collate),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_stopping_to_parent,
        prefetch_factor=4 if workers else None,
    )
    batches = []
    for batch in raise_errors(loader):
        batches.append(batch)
        if len(batches) == shares.forwards:
            yield batches
            batches = []


def leave_stopping_to_parent(_: int) -> None:
    """Let a worker pass over SIGTERM, which torchrun sends to it too: the training process saves, then ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ErrorsAsValues(Dataset):
    """A data set that returns what is wrong with a sample instead of raising it in a worker."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset.load(index)
        except TextSAMError as error:
            return error


def raise_errors(batches: Iterable[Batch | TextSAMError]) -> Iterator[Batch]:
    """Yield the batches; raise what a worker handed over as an error."""
    for batch in batches:
        if isinstance(batch, TextSAMError):
            raise batch
        yield batch


def spread(dataset: PhraseDataset, images: int | None) -> list[int]:
    """Return the indices of all images, or of at most `images` of them, evenly spread."""
    count = len(dataset)
    if images is None or images >= count:
        return list(range(count))
    return np.linspace(0, count - 1, images).round().astype(int).tolist()


def evaluation_batches(
    dataset: Any,
    collate: Callable[[Sequence[Any]], Any],
    indices: Sequence[int],
    batch_size: int,
    ranks: Ranks,
    workers: int,
) -> Iterator[Any]:
    """Yield this rank's share of the batches of a pass.

    Batches are cut from the order of all images before ranks share them, so a batch is the same on any number of ranks.

    Raises:
        TextSAMError: what was wrong with a file of a sample.
    """
    starts = range(0, len(indices), batch_size)
    batches = ranks.share([list(indices[start : start + batch_size]) for start in starts])
    loader = DataLoader(
        ErrorsAsValues(dataset), batch_sampler=batches, collate_fn=ValueOrError(collate), num_workers=workers,
        worker_init_fn=leave_stopping_to_parent,
    )  # fmt: skip
    yield from raise_errors(loader)
