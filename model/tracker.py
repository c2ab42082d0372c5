"""SAM 2's memory on the transformers modules: masks of N objects on a frame, from what earlier frames left behind.

All objects that remember equally many frames go through one call. What a frame leaves behind is one small map and one
vector per object, and only the newest are kept: memory does not grow with the video. Source: arXiv 2408.00714; the
settings are those that EVF-SAM runs SAM 2 with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoPositionEmbeddingSine, get_1d_sine_pe

from utils.errors import ModelError

from .segmenters import sam2_memory
from .segmenters.base import PROMPT_WIDTH, best_of_three
from .segmenters.sam2 import SAM2Segmenter
from .types import ImageFeatures, MaskPrediction, Prompts

MAPS, POINTERS = 7, 16
"""How many frames an object's maps and pointers come from, prompted ones not counted beyond the first."""
NO_OBJECT = -1024.0
MASK_SCALE, MASK_BIAS = 20.0, -10.0
HOLE_LOGIT = 0.1


@dataclass(frozen=True)
class Remembered:
    """What an object keeps of one frame.

    * `map`: bfloat16 [h * w, 64]; None where the frame is too long ago.
    * `pointer`: float [256].
    """

    map: Tensor | None
    pointer: Tensor


@dataclass
class ObjectMemory:
    """What an object keeps, by frame: of all frames with a prompt, and of the newest without."""

    prompted: dict[int, Remembered] = field(default_factory=dict)
    tracked: dict[int, Remembered] = field(default_factory=dict)

    def keep(self, frame: int, remembered: Remembered, step: int) -> None:
        """Add a frame without a prompt, and drop what no later frame reads.

        Args:
            step: 1 forwards, -1 backwards in time.
        """
        self.tracked[frame] = remembered
        for earlier in list(self.tracked):
            age = (frame - earlier) * step
            if not 0 <= age < POINTERS - 1:
                del self.tracked[earlier]
            elif age >= MAPS - 1:
                self.tracked[earlier] = replace(self.tracked[earlier], map=None)


@dataclass(frozen=True)
class Found:
    """Masks of N objects on one frame.

    * `logits`: float [N, 4h, 4w], `NO_OBJECT` everywhere where the object is not seen.
    * `scores`: predicted IoU, float [N]; `object_scores`: logits that the object is there, float [N].
    * `pointers`: float [N, 256].
    """

    logits: Tensor
    scores: Tensor
    object_scores: Tensor
    pointers: Tensor

    def rows(self) -> list["Found"]:
        """Return each object by itself, N = 1."""
        parts = (getattr(self, name).split(1) for name in ("logits", "scores", "object_scores", "pointers"))
        return [Found(*row) for row in zip(*parts, strict=True)]

    def where(self, choice: Tensor, other: "Found") -> "Found":
        """Return these objects where `choice`, bool [N], is true, and those of another elsewhere."""

        def pick(mine: Tensor, its: Tensor) -> Tensor:
            return torch.where(choice.view(-1, *[1] * (mine.ndim - 1)), mine, its.to(mine.dtype))

        return Found(*(pick(getattr(self, key.name), getattr(other, key.name)) for key in fields(Found)))

    def with_logits(self, logits: Tensor) -> "Found":
        """Return the same with other masks."""
        return replace(self, logits=logits)

    def is_seen(self) -> bool:
        """Return whether any object is there and its mask not empty."""
        return bool((self.object_scores > 0).any()) and bool((self.logits > 0).any())


@dataclass(frozen=True)
class _Recall:
    """Which frames an object reads: (offset in time, frame) of maps, the same of pointers. Offset 0: prompted."""

    maps: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]

    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the offsets: objects that share them can be stacked."""
        return tuple(o for o, _ in self.maps), tuple(o for o, _ in self.pointers)


class Tracker:
    """Masks, frame by frame.

    Args:
        offload: keep what is remembered in CPU memory.

    Raises:
        ModelError: not SAM 2, or weights without the memory modules.
    """

    def __init__(self, segmenter: SAM2Segmenter, offload: bool = False) -> None:
        if not isinstance(segmenter, SAM2Segmenter) or not segmenter.config.has_video:
            raise ModelError(
                "this model has no memory to follow an object with. Take a SAM-2 model with video weights, as evf-sam2"
            )
        self.segmenter, self.sam2, self.offload = segmenter, segmenter.sam2, offload
        self._positions = Sam2VideoPositionEmbeddingSine(num_position_features=PROMPT_WIDTH // 2, normalize=True)

    def prompt(
        self,
        features: ImageFeatures,
        sparse: Tensor,
        objects: Sequence[ObjectMemory],
        frame: int,
        step: int = 1,
        length: int | None = None,
        is_single: bool = False,
    ) -> Found:
        """Find the objects that prompts mean on a frame; one that is known already is looked for with its memory.

        Args:
            features: of the frame, as `SAM2Segmenter.encode_frame`.
            sparse: float [N, P, 256], prompt tokens.
            is_single: the prompts are clear (a box, several points), so that the mask is not one of three.
        """
        prediction = self.look(features, sparse, objects, frame, step, length)
        index = self.segmenter.select_for_prompts(prediction, False) if is_single else best_of_three(prediction)
        return self.settle(prediction, index, torch.zeros_like(index) if is_single else index)

    def look(
        self,
        features: ImageFeatures,
        sparse: Tensor | None,
        objects: Sequence[ObjectMemory],
        frame: int,
        step: int = 1,
        length: int | None = None,
    ) -> MaskPrediction:
        """Return all masks of the decoder.

        Args:
            features: of the frame; or of a frame for each object, N rows, where all remember equally old frames.
            sparse: as `prompt`; None where memory alone says what is meant.
        """
        seen = self._condition(features, objects, frame, step, length)
        if sparse is None:
            return self._decode_nothing(seen, features)
        return self.segmenter.decode(ImageFeatures(seen, features.high_res), sparse)

    def take(self, features: ImageFeatures, masks: Tensor) -> Found:
        """Take masks as they are; a decoder that is shown them says what to remember.

        Args:
            masks: bool [N, H, W], of the whole frame.
        """
        side = self.segmenter.config.image_size
        dtype = features.embedding.dtype
        share = F.interpolate(masks[:, None].float(), (side, side), mode="bilinear", antialias=True)
        logits = F.interpolate(share * MASK_SCALE + MASK_BIAS, (side // 4,) * 2, mode="bilinear", antialias=True)
        _, dense = self.segmenter.encode_prompts(Prompts(masks=self.sam2.mask_downsample(share.to(dtype))))
        prediction = self._decode_nothing(features.embedding.expand(len(masks), -1, -1, -1), features, dense)
        is_there = masks.flatten(1).any(1)
        first = torch.zeros(len(masks), dtype=torch.long, device=masks.device)
        seen = self.settle(prediction, first, first)
        pointers = torch.where(is_there[:, None], seen.pointers, self.sam2.no_object_pointer)
        scores = MASK_SCALE * is_there.to(dtype) + MASK_BIAS
        return Found(logits[:, 0], torch.ones_like(scores), scores, pointers)

    def _decode_nothing(self, seen: Tensor, features: ImageFeatures, dense: Tensor | None = None) -> MaskPrediction:
        """Decode without points: the encoder writes an empty one, and pads it with another."""
        nothing = self.sam2.prompt_encoder.not_a_point_embed.weight.expand(len(seen), 2, -1)
        return self.segmenter.decode(ImageFeatures(seen, features.high_res), nothing, dense)

    def track(
        self, features: ImageFeatures, objects: Sequence[ObjectMemory], frame: int, step: int = 1,
        length: int | None = None,
    ) -> Found:  # fmt: skip
        """Find known objects on a frame.

        Args:
            step: 1 forwards, -1 backwards in time.
            length: frames of the video where that is known; SAM 2.1 scales the age of pointers by it.
        """
        prediction = self.look(features, None, objects, frame, step, length)
        index = best_of_three(prediction)
        return self.settle(prediction, index, index)

    def remember(self, features: ImageFeatures, found: Found, is_prompted: bool) -> list[Remembered]:
        """Return what each object keeps of a frame.

        Args:
            is_prompted: the masks count as certain, so that each pixel is in or out.
        """
        side = self.segmenter.config.image_size
        logits = F.interpolate(found.logits[:, None].float(), (side, side), mode="bilinear", align_corners=False)
        share = (logits > 0).float() if is_prompted else logits.sigmoid()
        image = features.embedding
        maps = sam2_memory.remember(self.sam2.memory_encoder, image, (share * MASK_SCALE + MASK_BIAS).to(image.dtype))
        hidden = self.sam2.occlusion_spatial_embedding_parameter
        if hidden is not None:
            maps = maps + (found.object_scores <= 0).to(maps.dtype)[:, None, None, None] * hidden[..., None, None]
        maps = maps.to(torch.bfloat16).flatten(2).transpose(1, 2)
        maps = maps.cpu() if self.offload else maps
        return [Remembered(*pair) for pair in zip(maps, found.pointers, strict=True)]

    def settle(
        self, prediction: MaskPrediction, index: Tensor, pointer_index: Tensor, is_there: Tensor | None = None
    ) -> Found:
        """Take one mask per object.

        Args:
            index: int64 [N], which; `pointer_index`: whose token becomes the pointer.
            is_there: bool [N], for training; by default as the decoder says.
        """
        logits, scores = prediction.chosen(index)
        is_there = (prediction.object_score > 0 if is_there is None else is_there)[:, None]
        tokens = prediction.tokens[torch.arange(len(index), device=index.device), pointer_index]
        pointers = torch.where(is_there, self.sam2.object_pointer_proj(tokens), self.sam2.no_object_pointer)
        logits = logits.masked_fill(~is_there[..., None], NO_OBJECT)
        return Found(logits, scores, prediction.object_score, pointers)

    def _condition(
        self, features: ImageFeatures, objects: Sequence[ObjectMemory], frame: int, step: int, length: int | None
    ) -> Tensor:
        """Return the frame as each object sees it, [N, 256, h, w]."""
        recalls = [_recall(memory, frame, step, length) for memory in objects]
        groups: dict[tuple, list[int]] = {}
        for i, recall in enumerate(recalls):
            groups.setdefault(recall.shape(), []).append(i)
        rows: list[Tensor] = [features.embedding] * len(objects)
        for members in groups.values():
            part = self._attend(features, [(objects[i], recalls[i]) for i in members], length)
            for i, row in zip(members, part.split(1), strict=True):
                rows[i] = row
        return torch.cat(rows)

    def _attend(
        self, features: ImageFeatures, members: Sequence[tuple[ObjectMemory, _Recall]], length: int | None
    ) -> Tensor:
        """Return the frame as objects see it that read equally old frames, [n, 256, h, w]."""
        embedding, recall = features.embedding, members[0][1]
        if not recall.maps:
            fresh = embedding + self.sam2.no_memory_embedding.view(1, -1, 1, 1)
            return fresh.expand(len(members), -1, -1, -1)
        dtype, shape = embedding.dtype, embedding.shape
        maps = torch.stack([torch.cat([_look_up(memory, at).map for _, at in own.maps]) for memory, own in members])
        maps = maps.to(embedding.device)
        grid = torch.Size((1, maps.shape[-1], *shape[-2:]))
        places = self.sam2.memory_encoder.position_encoding(grid, embedding.device, dtype).flatten(2).transpose(1, 2)[0]
        times = self.sam2.memory_temporal_positional_encoding[:, 0, 0]
        places = torch.cat([places + times[offset - 1] for offset, _ in recall.maps])
        pointers = torch.stack(
            [torch.stack([_look_up(memory, at).pointer for _, at in own.pointers]) for memory, own in members]
        ) if recall.pointers else maps.new_zeros(len(members), 0, PROMPT_WIDTH)  # fmt: skip
        splits = PROMPT_WIDTH // maps.shape[-1]
        ages = self._pointer_ages([offset for offset, _ in recall.pointers], length, places)
        keys = torch.cat([maps.to(dtype), pointers.to(dtype).reshape(len(members), -1, maps.shape[-1])], dim=1)
        places = torch.cat([places, ages.repeat_interleave(splits, dim=0)])
        own_places = self._positions(shape, embedding.device, dtype).flatten(2).transpose(1, 2)
        flat, tokens = embedding.flatten(2).transpose(1, 2), splits * len(recall.pointers)
        seen = sam2_memory.attend(self.sam2.memory_attention, flat, own_places, keys, places, tokens)
        return seen.transpose(1, 2).reshape(len(members), *shape[1:])

    def _pointer_ages(self, offsets: Sequence[int], length: int | None, places: Tensor) -> Tensor:
        """Return the time code of pointers, [P, 64]: 0 in SAM 2.0."""
        if not self.sam2.config.enable_temporal_pos_encoding_for_object_pointers or not offsets:
            return places.new_zeros(len(offsets), places.shape[-1])
        oldest = max(1, min(length or POINTERS, POINTERS) - 1)
        ages = torch.tensor(offsets, device=places.device, dtype=torch.float32) / oldest
        codes = get_1d_sine_pe(ages, dim=PROMPT_WIDTH).to(places.dtype)
        return self.sam2.temporal_positional_encoding_projection_layer(codes)


def _recall(memory: ObjectMemory, frame: int, step: int, length: int | None) -> _Recall:
    maps = [(0, at) for at in memory.prompted]
    for offset in range(MAPS - 1, 0, -1):
        at = frame - offset * step
        if at in memory.tracked and memory.tracked[at].map is not None:
            maps.append((offset, at))
    pointers = [((frame - at) * step, at) for at in memory.prompted if (frame - at) * step >= 0]
    newest = min(length or POINTERS, POINTERS)
    pointers += [
        (offset, frame - offset * step) for offset in range(1, newest) if frame - offset * step in memory.tracked
    ]
    return _Recall(tuple(maps), tuple(pointers))


def _look_up(memory: ObjectMemory, frame: int) -> Remembered:
    return memory.prompted[frame] if frame in memory.prompted else memory.tracked[frame]


def fill_holes(logits: Tensor, area: int) -> Tensor:
    """Return logits with small holes filled: background of at most `area` pixels that touch, also at corners.

    Args:
        logits: float [N, h, w].
        area: 0 leaves everything as it is.
    """
    if not area or not len(logits):
        return logits
    outside = (logits <= 0).cpu().numpy()
    rows = np.pad(outside, ((0, 0), (0, 1), (0, 0))).astype(np.uint8)  # a row between masks keeps them apart
    _, labels, stats, _ = cv2.connectedComponentsWithStats(rows.reshape(-1, rows.shape[-1]), connectivity=8)
    is_hole = stats[:, cv2.CC_STAT_AREA] <= area
    is_hole[0] = False
    holes = is_hole[labels].reshape(rows.shape)[:, :-1]
    return logits.masked_fill(torch.from_numpy(holes).to(logits.device), HOLE_LOGIT)
