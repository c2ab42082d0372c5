"""A phrase follows its object through a video: read on one frame, carried by SAM 2's memory through the others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import ImageError, ModelError, PromptError
from utils.image import ImageLike, read_image
from utils.tokenizer import PhraseTokenizer

from .evf import EVFModel
from .prompts import check_places, read_boxes, read_labels, read_points, to_input
from .tracker import Found, ObjectMemory, Remembered, Tracker, fill_holes
from .types import ImageFeatures, Prompts

HOLE_AREA = 8
"""Holes of at most this many cells of the low-resolution mask are filled, as in the published video predictor."""


@dataclass(frozen=True)
class VideoFrame:
    """The masks of N objects on one frame.

    * `index`: which frame; `ids`: which objects, in the order they were first asked for.
    * `image`: the frame, uint8 RGB [H, W, 3].
    * `masks`: bool [N, H, W]; `scores`: float32 [N], predicted IoU in 0..1, 0 where the object is not seen.
    """

    index: int
    ids: tuple[int, ...]
    image: np.ndarray
    masks: np.ndarray
    scores: np.ndarray


@dataclass
class _Target:
    """One object: what it is called, what is remembered of it, and its masks on frames where it was asked for."""

    phrase: str | None = None
    memory: ObjectMemory = field(default_factory=ObjectMemory)
    answers: dict[int, Found] = field(default_factory=dict)


Ask = Callable[[np.ndarray, ImageFeatures, Sequence[ObjectMemory], int], Found]
"""Says what is meant on a frame: image, features, memories of the objects, and which frame it is."""


@dataclass(frozen=True)
class _Request:
    frame: int
    ids: tuple[int, ...]
    ask: Ask


class VideoPredictor:
    """Follows any number of objects through a video or a stream of frames.

    Memory does not grow with the length: a frame is read when it is needed, and what no later frame reads is dropped.

    Args:
        model: SAM 2 with video weights, in evaluation mode, on its device; with an encoder it takes phrases.
        tokenizer: needed for phrases.
        hole_area: fill holes of at most so many cells of the low-resolution mask; 0 fills none.
        redetect: read the phrase again every so many frames, and follow what it finds where the object was lost; None,
            as published, never does.
        offload: keep what is remembered in CPU memory.

    Raises:
        ModelError: a model without memory modules, or `redetect` below 1.
    """

    def __init__(
        self,
        model: EVFModel,
        tokenizer: PhraseTokenizer | None = None,
        hole_area: int = HOLE_AREA,
        redetect: int | None = None,
        offload: bool = False,
    ) -> None:
        if redetect is not None and redetect < 1:
            raise ModelError(f"redetect {redetect}: needed is at least 1, or None for never")
        self.model, self.tokenizer, self.hole_area, self.redetect = model, tokenizer, hole_area, redetect
        self.tracker = Tracker(model.segmenter, offload)
        self.image_spec = model.segmenter.image_spec.for_video()
        self.on_broken: Callable[[int, ImageError], None] | None = None
        """Called with a frame that cannot be read, which is then left out; None raises the error."""
        self._source: Sequence[ImageLike] | None = None
        self._stream: Iterator[ImageLike] | None = None
        self._reset()

    def _reset(self) -> None:
        self._targets: dict[int, _Target] = {}
        self._waiting: list[_Request] = []
        self._cached: tuple[int, np.ndarray, ImageFeatures] | None = None
        self._size: tuple[int, int] | None = None
        self._passed: tuple[int, int] | None = None

    def start(self, source: Sequence[ImageLike] | Iterable[ImageLike]) -> None:
        """Begin a video; objects of an earlier one are forgotten.

        Args:
            source: frames that can be read in any order, or an iterator over a stream of unknown length: then phrases
                may be added for frames that did not come yet.
        """
        self._reset()
        is_random = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        self._source, self._stream = (source, None) if is_random else (None, iter(source))
        if is_random and not len(source):
            raise ImageError("the video has no frame")

    @property
    def length(self) -> int | None:
        """How many frames there are, None for a stream."""
        return None if self._source is None else len(self._source)

    def add_phrase(self, text: str, frame: int = 0, object_id: int | None = None) -> VideoFrame | None:
        """Ask for an object; see `add_phrases`."""
        return self.add_phrases([text], frame, None if object_id is None else [object_id])

    def add_phrases(
        self, texts: Sequence[str], frame: int = 0, object_ids: Sequence[int] | None = None
    ) -> VideoFrame | None:
        """Ask for objects on a frame, by one phrase each.

        Args:
            object_ids: an id that is known already is corrected; by default new ids from 1.

        Returns:
            their masks on that frame; None in a stream, where the frame comes later.

        Raises:
            PromptError: no video, a frame out of range or already passed, an empty phrase, or an id twice.
        """
        self._check_frame(frame)
        if self.model.encoder is None or self.tokenizer is None:
            raise PromptError("this model has no phrase encoder or no tokenizer: give points, a box or a mask instead")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise PromptError(f"empty phrase {text!r}. Describe the object, for example 'the zebra on the left'")
            self.tokenizer.encode(text)
        fresh = max(self._targets, default=0) + 1
        ids = tuple(range(fresh, fresh + len(texts)) if object_ids is None else object_ids)
        if len(ids) != len(texts) or len(set(ids)) != len(ids):
            raise PromptError(f"object ids {list(ids)} for {len(texts)} phrases. Give each its own")
        for number, text in zip(ids, texts, strict=True):
            self._targets.setdefault(number, _Target()).phrase = text
        return self._request(frame, ids, partial(self._read_phrases, tuple(texts)))

    def add_points(
        self,
        points: np.ndarray | Sequence,
        labels: np.ndarray | Sequence | None = None,
        frame: int = 0,
        object_id: int | None = None,
    ) -> VideoFrame | None:
        """Point at an object on a frame.

        Args:
            points: x y in pixels of the frame, [P, 2]; all of them, also those of an earlier call for this frame.
            labels: 1 on the object, 0 not, [P]; default all 1.
            frame, object_id, returns, raises: as `add_phrases`.
        """
        values = read_points(points)
        marks = read_labels(labels, values)
        return self._add(frame, object_id, partial(self._read_points, Prompts(points=values, labels=marks)))

    def add_box(self, box: np.ndarray | Sequence, frame: int = 0, object_id: int | None = None) -> VideoFrame | None:
        """Draw a box around an object on a frame.

        Args:
            box: x1 y1 x2 y2 in pixels of the frame, [4].
            frame, object_id, returns, raises: as `add_phrases`.
        """
        values = read_boxes(box)
        return self._add(frame, object_id, partial(self._read_points, Prompts(boxes=values)))

    def add_mask(self, mask: np.ndarray, frame: int = 0, object_id: int | None = None) -> VideoFrame | None:
        """Say what an object is on a frame; the mask is kept as it is, at the resolution of the memory.

        Args:
            mask: bool [H, W], at the size of the frame.
            frame, object_id, returns, raises: as `add_phrases`.
        """
        values = np.asarray(mask)
        if values.ndim != 2 or values.dtype not in (bool, np.uint8):
            raise PromptError(f"mask is {values.dtype} {list(values.shape)}; needed bool [H, W], at the frame's size")
        return self._add(frame, object_id, partial(self._take_mask, values.astype(bool)))

    def _add(self, frame: int, object_id: int | None, ask: Ask) -> VideoFrame | None:
        self._check_frame(frame)
        number = max(self._targets, default=0) + 1 if object_id is None else object_id
        self._targets.setdefault(number, _Target())
        return self._request(frame, (number,), ask)

    @torch.inference_mode()
    def _request(self, frame: int, ids: tuple[int, ...], ask: Ask) -> VideoFrame | None:
        request = _Request(frame, ids, ask)
        if self._stream is not None:
            self._waiting.append(request)
            return None
        image, features = self._read(frame)
        return self._frame(frame, image, self._answer(request, image, features))

    def propagate(
        self, start: int | None = None, stop: int | None = None, reverse: bool = False
    ) -> Iterator[VideoFrame]:
        """Yield the masks of all objects, frame by frame.

        Args:
            start: first frame; by default the first with a phrase, or the last one in reverse.
            stop: last frame, included; by default the end of the video in that direction.
            reverse: go backwards in time; a stream cannot.

        Raises:
            PromptError: nothing was asked for, or frames out of range.
        """
        if not self._targets:
            raise PromptError("nothing to follow. Call add_phrase first")
        if self._stream is not None:
            if reverse or start is not None:
                raise PromptError("a stream comes as it comes: leave start and reverse out")
            yield from self._follow_stream(stop)
            return
        asked = [frame for target in self._targets.values() for frame in target.answers]
        first = (max(asked) if reverse else min(asked)) if start is None else start
        last = (0 if reverse else self.length - 1) if stop is None else stop
        for name, value in (("start", first), ("stop", last)):
            if not 0 <= value < self.length:
                raise PromptError(f"{name} {value}: the video has the frames 0 to {self.length - 1}")
        step = -1 if reverse else 1
        if self._passed != (first - step, step):
            for target in self._targets.values():
                target.memory.tracked.clear()
        for index in range(first, last + step, step):
            try:
                image, features = self._read(index)
            except ImageError as error:
                if self.on_broken is None:
                    raise
                self.on_broken(index, error)
                self._passed = (index, step)
                continue
            yield self._advance(index, image, features, step)

    def state(self) -> dict[str, Any]:
        """Return what is needed to go on after the last frame: tensors and numbers alone."""
        return {
            "passed": self._passed,
            "targets": {
                number: {
                    "phrase": target.phrase,
                    "prompted": {frame: vars(kept) for frame, kept in target.memory.prompted.items()},
                    "tracked": {frame: vars(kept) for frame, kept in target.memory.tracked.items()},
                    "answers": {frame: vars(found) for frame, found in target.answers.items()},
                }
                for number, target in self._targets.items()
            },
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned, after `start` with the same video."""
        device, at = self.model.device, "cpu" if self.tracker.offload else self.model.device

        def kept(values: dict[str, Tensor | None]) -> Remembered:
            map_ = values["map"]
            return Remembered(None if map_ is None else map_.to(at), values["pointer"].to(device))

        self._passed = tuple(state["passed"])
        for number, values in state["targets"].items():
            prompted, tracked = (
                {frame: kept(part) for frame, part in values[name].items()} for name in ("prompted", "tracked")
            )
            answers = {
                frame: Found(**{name: tensor.to(device) for name, tensor in part.items()})
                for frame, part in values["answers"].items()
            }
            self._targets[number] = _Target(values["phrase"], ObjectMemory(prompted, tracked), answers)

    def _follow_stream(self, stop: int | None) -> Iterator[VideoFrame]:
        index = 0 if self._passed is None else self._passed[0] + 1
        while stop is None or index <= stop:
            try:
                image = read_image(next(self._stream))
            except StopIteration:
                return
            features = self._encode(index, image)
            with torch.inference_mode():
                for request in self._waiting:
                    if request.frame == index:
                        self._answer(request, image, features)
            self._waiting = [request for request in self._waiting if request.frame > index]
            yield self._advance(index, image, features, 1)
            index += 1

    @torch.inference_mode()
    def _advance(self, index: int, image: np.ndarray, features: ImageFeatures, step: int) -> VideoFrame:
        """Follow every object to a frame, remember it, and return its masks."""
        known = {number: target for number, target in self._targets.items() if target.answers}
        answers = {number: target.answers[index] for number, target in known.items() if index in target.answers}
        followed = {number: target for number, target in known.items() if number not in answers}
        if followed:
            memories = [target.memory for target in followed.values()]
            found = self.tracker.track(features, memories, index, step, self.length)
            kept = self.tracker.remember(features, found, is_prompted=False)
            for memory, remembered in zip(memories, kept, strict=True):
                memory.keep(index, remembered, step)
            answers |= zip(followed, self._filled(found).rows(), strict=True)
            if self.redetect and index % self.redetect == 0:
                answers |= self._find_lost(index, image, features, followed, answers)
        self._passed = (index, step)
        return self._frame(index, image, {number: answers[number] for number in known})

    def _find_lost(
        self,
        index: int,
        image: np.ndarray,
        features: ImageFeatures,
        followed: dict[int, _Target],
        answers: dict[int, Found],
    ) -> dict[int, Found]:
        """Read the phrases of lost objects again; return the answers that found them, after anchoring there."""
        lost = {
            number: target
            for number, target in followed.items()
            if target.phrase is not None and not answers[number].is_seen()
        }
        if not lost:
            return {}
        phrases = [target.phrase for target in lost.values()]
        found = self._filled(self._read_phrases(phrases, image, features, [ObjectMemory()] * len(lost), index))
        kept = self.tracker.remember(features, found, is_prompted=True)
        again = {}
        for (number, target), answer, remembered in zip(lost.items(), found.rows(), kept, strict=True):
            if answer.is_seen():
                del target.memory.tracked[index]
                for earlier in target.memory.prompted.keys() - target.answers.keys():
                    del target.memory.prompted[earlier]  # of anchors that were found, the newest is enough
                target.memory.prompted[index] = remembered
                again[number] = answer
        return again

    def _answer(self, request: _Request, image: np.ndarray, features: ImageFeatures) -> dict[int, Found]:
        """Find what a request means, and remember it. As published, only a frame already passed is seen with memory."""
        targets = [self._targets[number] for number in request.ids]
        was_tracked = [target.memory.tracked.pop(request.frame, None) is not None for target in targets]
        memories = [
            target.memory if tracked else ObjectMemory() for target, tracked in zip(targets, was_tracked, strict=True)
        ]
        found = self._filled(request.ask(image, features, memories, request.frame))
        kept = self.tracker.remember(features, found, is_prompted=True)
        for target, answer, remembered in zip(targets, found.rows(), kept, strict=True):
            target.memory.prompted[request.frame] = remembered
            target.answers[request.frame] = answer
        return dict(zip(request.ids, found.rows(), strict=True))

    def _read_phrases(
        self,
        phrases: Sequence[str],
        image: np.ndarray,
        features: ImageFeatures,
        memories: Sequence[ObjectMemory],
        frame: int,
    ) -> Found:
        model = self.model
        ids, padding = self.tokenizer(phrases)
        pixels = model.encoder.image_spec(image)[None].to(model.device, model.encoder.vision_embed.proj.weight.dtype)
        padding = padding.to(model.device) if padding.any() else None
        text, _ = model.encode_phrases(pixels, ids.to(model.device), padding)
        sparse = text[:, None].to(features.embedding.dtype)
        return self.tracker.prompt(features, sparse, memories, frame, self._step, self.length)

    def _read_points(
        self,
        prompts: Prompts,
        image: np.ndarray,
        features: ImageFeatures,
        memories: Sequence[ObjectMemory],
        frame: int,
    ) -> Found:
        is_single = prompts.boxes is not None or prompts.points.shape[1] > 1
        check_places(prompts, image.shape[:2])
        placed = to_input(prompts, self.image_spec, image.shape[:2], self.model)
        sparse, _ = self.model.segmenter.encode_prompts(placed)
        sparse = sparse.to(features.embedding.dtype)
        return self.tracker.prompt(features, sparse, memories, frame, self._step, self.length, is_single)

    def _take_mask(
        self,
        mask: np.ndarray,
        image: np.ndarray,
        features: ImageFeatures,
        _memories: Sequence[ObjectMemory],
        frame: int,
    ) -> Found:
        if mask.shape != image.shape[:2]:
            raise PromptError(f"mask of {list(mask.shape)} for frame {frame} of {list(image.shape[:2])}. Give one size")
        return self.tracker.take(features, torch.from_numpy(mask)[None].to(self.model.device))

    @property
    def _step(self) -> int:
        return 1 if self._passed is None else self._passed[1]

    def _filled(self, found: Found) -> Found:
        return found.with_logits(fill_holes(found.logits.float(), self.hole_area))

    @torch.inference_mode()
    def _read(self, frame: int) -> tuple[np.ndarray, ImageFeatures]:
        if self._cached is None or self._cached[0] != frame:
            self._encode(frame, read_image(self._source[frame]))
        return self._cached[1], self._cached[2]

    @torch.inference_mode()
    def _encode(self, frame: int, image: np.ndarray) -> ImageFeatures:
        """Encode a frame and keep it until the next one.

        Raises:
            ImageError: it has another size than the first one.
        """
        self._size = self._size or image.shape[:2]
        if image.shape[:2] != self._size:
            sizes = ["x".join(map(str, size[::-1])) for size in (image.shape[:2], self._size)]
            raise ImageError(f"frame {frame} is {sizes[0]}, the first one {sizes[1]}. All must have one size")
        pixels = self.image_spec(image)[None].to(self.model.device, self.model.dtype)
        self._cached = (frame, image, self.model.segmenter.encode_frame(pixels))
        return self._cached[2]

    def _frame(self, index: int, image: np.ndarray, answers: dict[int, Found]) -> VideoFrame:
        size = image.shape[:2]
        if not answers:
            return VideoFrame(index, (), image, np.zeros((0, *size), bool), np.zeros(0, np.float32))
        logits = torch.cat([answer.logits for answer in answers.values()])[:, None].float()
        masks = F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0] > 0
        scores = torch.cat([answer.scores * (answer.object_scores > 0) for answer in answers.values()])
        return VideoFrame(index, tuple(answers), image, masks.cpu().numpy(), scores.float().cpu().numpy())

    def _check_frame(self, frame: int) -> None:
        if self._source is None and self._stream is None:
            raise PromptError("no video. Call start(source) first")
        if self.length is not None and not 0 <= frame < self.length:
            raise PromptError(f"frame {frame}: the video has the frames 0 to {self.length - 1}")
        if self._stream is not None and frame <= (-1 if self._passed is None else self._passed[0]):
            raise PromptError(f"frame {frame} of the stream has passed. Give a later one")
