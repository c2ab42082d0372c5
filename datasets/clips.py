"""Clips for training: a few frames of a video with the masks of some phrases, at any position of an endless stream."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import DataError, TextSAMError
from utils.image import ImageSpec
from utils.masks import IGNORE
from utils.tokenizer import PhraseTokenizer

from .mixture import shuffled
from .sample import move
from .videos import Clip, Expression, VideoSet


@dataclass(frozen=True)
class ClipSample:
    """T frames with N phrases.

    * `frames`: uint8 RGB [T, H, W, 3].
    * `masks`: uint8 [N, T, H, W]: 0, 1, or `IGNORE` on frames whose mask nobody drew.
    * `phrases`, `ids`: N texts and stable names; `key`: names the clip and its frames.
    """

    frames: np.ndarray
    masks: np.ndarray
    phrases: tuple[str, ...]
    ids: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class ClipBatch:
    """B clips with N phrases in all; phrase n is about clip `clip_index[n]`.

    * `pixels`: float32 [B, T, 3, S, S]; `encoder_pixels`: of the first frames, float32 [B, 3, s, s].
    * `ids`: int64 [N, L], right-padded; `padding`: bool [N, L], True at padding.
    * `masks`: per clip uint8 [n_i, T, H_i, W_i], values as in `ClipSample`.
    * `phrases`, `phrase_ids`: N texts and names; `keys`: name of each clip.
    """

    pixels: Tensor
    encoder_pixels: Tensor
    ids: Tensor
    padding: Tensor
    clip_index: Tensor
    masks: tuple[Tensor, ...]
    phrases: tuple[str, ...]
    phrase_ids: tuple[str, ...]
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> "ClipBatch":
        """Return the batch with every tensor on a device."""
        return replace(self, **{field.name: move(getattr(self, field.name), device) for field in fields(self)})


class ClipMixture(Dataset[ClipSample | TextSAMError]):
    """Clips of video sets, each video once before any comes again: the same position is always the same sample.

    Phrases are taken whose object is seen on the first frame, as long as there are any.

    Args:
        frames: of a clip; a shorter video repeats its last frame.
        phrases: how many of a video are taken, at most.
        stride: largest distance between the frames of a clip.
        start: `random` or `first`: where in a video a clip begins.

    Raises:
        DataError: a set whose labels are hidden, or without videos.
    """

    def __init__(
        self, sets: Sequence[VideoSet], frames: int, phrases: int, stride: int = 1, start: str = "random", seed: int = 0
    ) -> None:
        for one in sets:
            if one.truth is None or not one.clips:
                raise DataError(f"{one.name} has no masks to learn from. Give a split with labels, such as its train")
        self.sets, self.frames, self.phrases, self.stride = tuple(sets), frames, phrases, stride
        self.start, self.seed = start, seed
        self._clips = [(one, clip) for one in sets for clip in one.clips]

    @property
    def pass_length(self) -> int:
        """How many samples go through the videos once."""
        return len(self._clips)

    def describe(self) -> str:
        """Return a table of what is trained on."""
        rows = [f"{'set':40} {'videos':>9} {'phrases':>9}"]
        for one in self.sets:
            phrases = sum(len(clip.expressions) for clip in one.clips)
            rows.append(f"{one.name:40} {len(one.clips):9,} {phrases:9,}")
        return "\n".join(rows)

    def __getitem__(self, position: int) -> ClipSample | TextSAMError:
        """Return the sample of a position, or what was wrong with its files: an error must leave a worker whole."""
        epoch, place = divmod(position, len(self._clips))
        owner, clip = self._clips[int(shuffled(self.seed, epoch, len(self._clips))[place])]
        generator = np.random.Generator(np.random.Philox(key=[self.seed, position]))
        try:
            return self._cut(owner, clip, generator)
        except TextSAMError as error:
            return error

    def _cut(self, owner: VideoSet, clip: Clip, generator: np.random.Generator) -> ClipSample:
        length = len(clip.frames)
        longest = max(1, (length - 1) // (self.frames - 1))
        stride = int(generator.integers(1, min(self.stride, longest) + 1))
        room = max(0, length - 1 - stride * (self.frames - 1))
        first = 0 if self.start == "first" else int(generator.integers(room + 1))
        numbers = [min(first + stride * i, length - 1) for i in range(self.frames)]
        read = {number: clip.frames[number] for number in numbers}
        frames = np.stack([read[number] for number in numbers])
        chosen, masks = self._choose(owner, clip, numbers, frames.shape[1:3], generator)
        return ClipSample(
            frames=frames,
            masks=masks,
            phrases=tuple(expression.text for expression in chosen),
            ids=tuple(f"{clip.name}/{expression.id}" for expression in chosen),
            key=f"{owner.name}/{clip.name}#{first}+{stride}",
        )

    def _choose(
        self, owner: VideoSet, clip: Clip, numbers: Sequence[int], size: tuple[int, int], generator: np.random.Generator
    ) -> tuple[list[Expression], np.ndarray]:
        """Return some phrases and their masks, uint8 [N, T, H, W]."""
        order = [clip.expressions[i] for i in generator.permutation(len(clip.expressions))]
        nothing = np.full(size, IGNORE, np.uint8)
        found: list[tuple[bool, Expression, list[np.ndarray]]] = []
        seen = 0
        for expression in order:
            truth = owner.truth(clip, expression)
            first = truth(numbers[0])
            is_seen = first is not None and bool(first.any())
            drawn = [first, *(truth(number) for number in numbers[1:])] if is_seen or not found else [first]
            found.append((is_seen, expression, [nothing if m is None else m.astype(np.uint8) for m in drawn]))
            seen += is_seen
            if seen == self.phrases:
                break
        kept = [entry for entry in found if entry[0]] or found[:1]
        return [expression for _, expression, _ in kept], np.stack([np.stack(masks) for _, _, masks in kept])


@dataclass(frozen=True)
class ClipCollate:
    """Turns clips into a `ClipBatch`; `image_spec`: how the segmenter sees a frame, `encoder_spec`: the encoder."""

    image_spec: ImageSpec
    encoder_spec: ImageSpec
    tokenizer: PhraseTokenizer

    def __call__(self, samples: Sequence[ClipSample]) -> ClipBatch:
        """Pack clips.

        Raises:
            PromptError: a phrase is empty.
        """
        phrases = tuple(phrase for sample in samples for phrase in sample.phrases)
        ids, padding = self.tokenizer(phrases)
        counts = torch.tensor([len(sample.phrases) for sample in samples])
        return ClipBatch(
            pixels=torch.stack([torch.stack([self.image_spec(f) for f in sample.frames]) for sample in samples]),
            encoder_pixels=torch.stack([self.encoder_spec(sample.frames[0]) for sample in samples]),
            ids=ids,
            padding=padding,
            clip_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
            masks=tuple(torch.from_numpy(sample.masks) for sample in samples),
            phrases=phrases,
            phrase_ids=tuple(name for sample in samples for name in sample.ids),
            keys=tuple(sample.key for sample in samples),
        )
