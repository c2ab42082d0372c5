"""From options to data: the training mixture, and the loaders that measure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from configs.evaluation import EvalArgs
from configs.training import DataArgs, TrainConfig, ValidationArgs
from utils.distributed import Ranks
from utils.errors import DataError, TrainingError

from .catalog import expand, open_dataset
from .clips import ClipCollate, ClipMixture
from .collate import Collate
from .images import ImageCollate, Stream, open_image_stream
from .mixture import Group, Mixture, Shares, evaluation_batches, spread, training_steps
from .named import NamedCollate, open_named_stream
from .prompts import PromptCollate, open_prompt_stream
from .reader import PhraseDataset
from .sample import Batch
from .transforms import HorizontalFlip, StrayWords, unused_words
from .videos import VideoSet, open_video_set

LOWERCASED = frozenset({"refclef", "refcoco", "refcoco+", "refcocog", "grefcoco"})
"""Families whose phrases the published evaluation lower-cases."""


def open_mixture(config: TrainConfig) -> Mixture | ClipMixture | Stream:
    """Open every training set.

    Raises:
        DataError: one is unknown, incomplete or damaged.
    """
    args, seed = config.data, config.run.seed
    if config.kind == "distill":
        return open_image_stream(config)
    if config.kind == "prompts":
        return open_prompt_stream(config)
    if config.kind == "names":
        return open_named_stream(config)
    if args.clip_frames:
        videos = [open_video_set(name, args.root) for text in args.sets for name in text.split(",")]
        return ClipMixture(videos, args.clip_frames, args.phrases_per_image, args.clip_stride, args.clip_start, seed)
    groups = []
    rates = args.rates or (1.0,) * len(args.sets)
    for text, rate in zip(args.sets, rates, strict=True):
        names = [name for part in text.split(",") for name in expand(part.strip())]
        options = {"skip_missing": args.skip_missing, "max_pixels": args.max_pixels}
        groups.append(Group(tuple(open_dataset(name, args.root, **options) for name in names), rate))
    flip = (HorizontalFlip(args.flip, args.flip_words),) if args.flip else ()
    return Mixture(groups, args.phrases_per_image, args.sampling, seed, flip)


def open_collate(config: TrainConfig, task: Any) -> Callable[[Sequence[Any]], Any]:
    """Return what packs samples of the training sets.

    Args:
        task: a `model.tasks.Task`, which says how images and phrases are read.
    """
    if config.kind == "distill":
        return ImageCollate(task.spec, task.other_spec, task.cache)
    if config.kind == "prompts":
        return PromptCollate(task.spec, task.prompt_side)
    if config.kind == "names":
        names = config.names
        return NamedCollate(task.spec, names.proposals, names.least_pixels, names.val_prompt)
    if config.kind == "clips":
        return ClipCollate(task.spec, task.other_spec, task.tokenizer)
    return Collate(task.spec, task.other_spec, task.tokenizer, task.cache)


def training_batches(
    mixture: Mixture | ClipMixture | Stream,
    collate: Callable[[Sequence[Any]], Any],
    args: DataArgs,
    ranks: Ranks,
    forwards: int,
    pin_memory: bool,
) -> Callable[[int, int], Iterator[list[Batch]]]:
    """Return what the trainer asks for batches: (start, stop) -> the batches of each step of this rank."""
    shares = Shares(args.batch_size, forwards, ranks.rank, ranks.world)
    if args.stray_words:
        words = unused_words(collate.tokenizer.words(), mixture.all_phrases())
        mixture.add(StrayWords(args.stray_words, words, collate.tokenizer.unknown_marks()))

    def steps(start: int, stop: int) -> Iterator[list[Batch]]:
        return training_steps(mixture, collate, shares, start, stop, args.workers, pin_memory)

    return steps


@dataclass(frozen=True)
class ValidationSet:
    """A data set, and what begins a pass over this rank's batches of it."""

    dataset: Any
    batches: Callable[[], Iterator[Any]]


def open_validation(
    config: TrainConfig, mixture: Mixture | ClipMixture | Stream, collate: Callable[[Sequence[Any]], Any], ranks: Ranks
) -> dict[str, ValidationSet] | list[VideoSet]:
    """Open the sets that are measured while training, by name; where clips are trained on, a list of video sets.

    Args:
        mixture: what is trained on; without phrases, it may have held out images to measure.

    Raises:
        DataError: one is unknown, incomplete or damaged, or its labels are hidden.
    """
    args, data = config.val, config.data
    if isinstance(mixture, Stream):
        collate = collate.measuring if isinstance(collate, NamedCollate) else collate
        return {
            items.name: ValidationSet(
                items,
                partial(evaluation_batches, items, collate, range(len(items)), args.batch_size, ranks, data.workers),
            )
            for items in mixture.measured
        }
    if data.clip_frames:
        return _open_videos(args, data)
    sets = {}
    for text in args.sets:
        for name in expand(text):
            lowercase = name.split("|")[0] in LOWERCASED
            dataset = open_dataset(name, args.root or data.root, lowercase=lowercase, max_pixels=data.max_pixels)
            indices = spread(dataset, args.max_images)
            begin = partial(evaluation_batches, dataset, collate, indices, args.batch_size, ranks, data.workers)
            sets[name] = ValidationSet(dataset, begin)
    return sets


def _open_videos(args: ValidationArgs, data: DataArgs) -> list[VideoSet]:
    sets = [open_video_set(name, args.root or data.root) for name in args.sets]
    for videos in sets:
        if videos.truth is None:
            raise DataError(f"val.sets: the labels of {videos.name} are hidden. Name a split that has them")
    return sets


def open_measured(args: EvalArgs, as_published: bool) -> list[PhraseDataset]:
    """Open the data sets that `--val_dataset` names.

    Args:
        as_published: count overlapping polygons as published.

    Raises:
        DataError: one is unknown, incomplete or damaged. TrainingError: one is named twice.
    """
    names = [name for text in args.val_dataset for name in expand(text)]
    if len(set(names)) < len(names):
        raise TrainingError(f"--val_dataset names a data set twice: {' '.join(names)}. Name each once")
    return [
        open_dataset(
            name,
            args.dataset_dir,
            lowercase=name.split("|")[0] in LOWERCASED,
            overlaps="sum" if as_published else "union",
            skip_missing=args.skip_missing,
            max_pixels=args.max_pixels,
        )
        for name in names
    ]
