"""The graphs that a model is cut into, each a module from tensors to tensors with names and dynamic axes.

A model that reads phrases has three: `image_encoder`, `fusion` and `decoder`. One without has two, with the names and
shapes of EfficientViT-SAM's published export: `image_encoder`, and a `decoder` that takes points.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import ModelError
from utils.image import ImageSpec
from utils.tokenizer import BOS, EOS, PAD, UNK

from ..evf import EVFModel
from ..segmenters.base import PROMPT_WIDTH, Segmenter
from ..types import ImageFeatures

BATCH, POINTS, IMAGES, PHRASES, TOKENS = "batch_size", "num_points", "num_images", "num_phrases", "num_tokens"
"""Names of the dynamic axes; a batch is of images for the encoder, and of prompts for the decoder of points."""
LEVELS = ("image_embeddings", "high_res_0", "high_res_1")
"""Names of the tensors of `ImageFeatures`."""
MASKS = 4
"""Mask tokens of every family's decoder."""
CORNERS = (2.0, 3.0)
"""Labels of a box's upper left and lower right corner."""

Levels = Mapping[str, tuple[int, ...]]
"""Names and shapes of the tensors of `ImageFeatures`, for one image."""


@dataclass(frozen=True)
class Graph:
    """One graph.

    * `name`: of the graph and its file; `module`: from the inputs, in their order, to the outputs, in theirs.
    * `inputs`, `outputs`: name -> shape; a text stands for a dynamic axis of that name.
    * `example`: sizes of the dynamic axes -> inputs that could be real.
    * `limits`: dynamic axis -> largest size; missing: any.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    example: Callable[[Mapping[str, int]], tuple[Tensor, ...]]
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def axes(self) -> list[str]:
        """Names of the dynamic axes of the inputs, in the order of their first use."""
        return list(dict.fromkeys(size for shape in self.inputs.values() for size in shape if isinstance(size, str)))


class ImageEncoder(nn.Module):
    """Segmenter pixels [B, 3, S, S] to the image embedding, and finer levels where the family has them."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, input_image: Tensor) -> tuple[Tensor, ...]:
        """See `Segmenter.encode_image`."""
        features = self.segmenter.encode_image(input_image)
        return (features.embedding, *features.high_res)


class Fusion(nn.Module):
    """Encoder pixels and phrases to the prompt embedding of each phrase, [N, 256]."""

    def __init__(self, model: EVFModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, encoder_image: Tensor, token_ids: Tensor, padding_mask: Tensor, image_index: Tensor) -> Tensor:
        """See `EVFModel.encode_phrases`; padding is always given, all False where there is none."""
        return self.model.encode_phrases(encoder_image, token_ids, padding_mask, image_index)[0]


class PhraseDecoder(nn.Module):
    """Image embeddings and the prompt embedding of each phrase to four masks and their IoU."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(
        self,
        image_embeddings: Tensor,
        prompt_embeddings: Tensor,
        image_index: Tensor,
        high_res_0: Tensor | None = None,
        high_res_1: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode prompts [N, 256] on the images [B, ...] that `image_index` [N] names; see `Segmenter.decode`."""
        features = ImageFeatures(image_embeddings, _given(high_res_0, high_res_1))[image_index]
        prediction = self.segmenter.decode(features, prompt_embeddings[:, None])
        return prediction.logits, prediction.iou


class PointDecoder(nn.Module):
    """One image's embedding and points to masks and their IoU, as EfficientViT-SAM's published graph.

    What the published graph leaves to its caller is done here: points get SAM's padding point. Points that come with a
    box (labels 2 and 3) or with a padding point of their own (label -1) do not, so that one call may mix them all.

    Args:
        single_mask: return the one mask of all four with the highest predicted IoU.
    """

    def __init__(self, segmenter: Segmenter, single_mask: bool) -> None:
        super().__init__()
        self.segmenter, self.single_mask = segmenter, single_mask

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        high_res_0: Tensor | None = None,
        high_res_1: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts of P points each on one image.

        Args:
            image_embeddings: [1, 256, h, w]; high_res_0, high_res_1: its finer levels.
            point_coords: float [N, P, 2], x y in pixels of the frame that prompts live on.
            point_labels: float [N, P], 1 foreground, 0 background, 2 and 3 a box's corners, -1 padding.
        """
        levels = (image_embeddings, *_given(high_res_0, high_res_1))
        first, *finer = (level.expand(point_coords.shape[0], -1, -1, -1) for level in levels)
        coords = F.pad(point_coords, (0, 0, 0, 1))
        labels = F.pad(point_labels, (0, 1), value=-1.0)
        has_own_end = (point_labels < 0) if self.segmenter.pads_boxes else (point_labels < 0) | (point_labels > 1)
        with _without_last_key(self.segmenter, has_own_end.any(dim=1)):
            prediction = self.segmenter.decode(
                ImageFeatures(first, tuple(finer)), embed_points(self.segmenter, coords, labels)
            )
        masks, iou = prediction.logits, prediction.iou
        if self.single_mask:
            best = iou.argmax(dim=1, keepdim=True)
            iou = iou.gather(1, best)
            masks = masks.gather(1, best[..., None, None].expand(-1, -1, *masks.shape[2:]))
        return masks, iou


def build_graphs(model: EVFModel, single_mask: bool = False) -> list[Graph]:
    """Cut a model into its graphs.

    Raises:
        ModelError: a model that takes neither phrases nor points, one of another kind of decoder, or `single_mask`
            with phrases.
    """
    segmenter, samples = model.segmenter, Samples(model)
    if segmenter.masks_per_prompt != MASKS:
        raise ModelError(
            f"{model.config.name} has a decoder that is not exported. Export a SAM, SAM-2, EfficientSAM "
            "or EfficientViT-SAM model"
        )
    if model.encoder is None and "points" not in segmenter.prompt_kinds:
        raise ModelError(f"{model.config.name} alone takes no prompts. Export an EVF-SAM model of it")
    if model.encoder is not None and single_mask:
        raise ModelError(f"--single_mask is for models that take points alone; {model.config.name} takes phrases")
    features = samples.features(1)
    levels = {name: tuple(level.shape[1:]) for name, level in zip(LEVELS[: len(features)], features, strict=True)}
    side = samples.spec.size
    image = Graph(
        "image_encoder",
        ImageEncoder(segmenter),
        {"input_image": (BATCH, 3, side, side)},
        {name: (BATCH, *shape) for name, shape in levels.items()},
        lambda sizes: (samples.pixels(sizes[BATCH]),),
    )
    grid = tuple(4 * length for length in levels[LEVELS[0]][1:])
    if model.encoder is None:
        return [image, _point_decoder(segmenter, samples, levels, grid, single_mask)]
    return [image, *_phrase_graphs(model, samples, levels, grid)]


def _point_decoder(
    segmenter: Segmenter, samples: "Samples", levels: Levels, grid: tuple[int, ...], single_mask: bool
) -> Graph:
    first, *finer = levels
    count = 1 if single_mask else MASKS
    return Graph(
        "decoder",
        PointDecoder(segmenter, single_mask),
        {
            first: (1, *levels[first]),
            "point_coords": (BATCH, POINTS, 2),
            "point_labels": (BATCH, POINTS),
            **{name: (1, *levels[name]) for name in finer},
        },
        {"masks": (BATCH, count, *grid), "iou_predictions": (BATCH, count)},
        samples.points,
    )


def _phrase_graphs(model: EVFModel, samples: "Samples", levels: Levels, grid: tuple[int, ...]) -> list[Graph]:
    first, *finer = levels
    side = model.encoder.image_spec.size
    fusion = Graph(
        "fusion",
        Fusion(model),
        {
            "encoder_image": (IMAGES, 3, side, side),
            "token_ids": (PHRASES, TOKENS),
            "padding_mask": (PHRASES, TOKENS),
            "image_index": (PHRASES,),
        },
        {"prompt_embeddings": (PHRASES, PROMPT_WIDTH)},
        samples.phrases,
        {TOKENS: model.encoder.config.max_text_tokens},
    )
    decoder = Graph(
        "decoder",
        PhraseDecoder(model.segmenter),
        {
            first: (IMAGES, *levels[first]),
            "prompt_embeddings": (PHRASES, PROMPT_WIDTH),
            "image_index": (PHRASES,),
            **{name: (IMAGES, *levels[name]) for name in finer},
        },
        {"masks": (PHRASES, MASKS, *grid), "iou_predictions": (PHRASES, MASKS)},
        samples.prompts,
    )
    return [fusion, decoder]


class Samples:
    """Inputs for tracing and checking a model's graphs, made by the model's own earlier parts: their values are real.

    The same sizes give the same inputs.
    """

    def __init__(self, model: EVFModel) -> None:
        self.model = model
        segmenter = model.segmenter
        self.spec = segmenter.own_image_spec if model.encoder is None else segmenter.image_spec
        self._features: dict[int, tuple[Tensor, ...]] = {}

    def pixels(self, count: int, spec: ImageSpec | None = None) -> Tensor:
        """Return smooth random images with some noise, as `spec` would prepare them, [count, 3, S, S]."""
        spec = spec or self.spec
        generator = torch.Generator().manual_seed(count)
        coarse = torch.rand(count, 3, 12, 12, generator=generator)
        image = F.interpolate(coarse, (spec.size, spec.size), mode="bicubic", align_corners=False)
        image = (image + 0.05 * torch.randn(image.shape, generator=generator)).clamp(0, 1) * spec.scale
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
        return (image - mean) / std

    @torch.inference_mode()
    def features(self, count: int) -> tuple[Tensor, ...]:
        """Return the embedding of `count` images and its finer levels."""
        if count not in self._features:
            features = self.model.segmenter.encode_image(self.pixels(count))
            self._features[count] = tuple(level.clone() for level in (features.embedding, *features.high_res))
        return self._features[count]

    def points(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Return inputs of `PointDecoder`: foreground and background, boxes, and points that are padded already."""
        prompts, points = sizes[BATCH], sizes[POINTS]
        generator = torch.Generator().manual_seed(prompts * 100 + points)
        side = self.model.segmenter.prompt_spec(self.spec).size
        coords = torch.rand(prompts, points, 2, generator=generator) * side
        labels = (torch.rand(prompts, points, generator=generator) < 0.7).float()
        if points > 1:
            labels[1::3, :2] = torch.tensor(CORNERS)
            coords[1::3, :2] = coords[1::3, :2].sort(dim=1).values
            labels[2::3, -1], coords[2::3, -1] = -1.0, 0.0
        first, *finer = self.features(1)
        return first, coords, labels, *finer

    def phrases(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Return inputs of `Fusion`: every second phrase is padded, where there is room."""
        images, phrases, tokens = (sizes[axis] for axis in (IMAGES, PHRASES, TOKENS))
        generator = torch.Generator().manual_seed(phrases * 100 + tokens)
        ids = torch.randint(UNK + 1, self.model.encoder.config.vocab_size, (phrases, tokens), generator=generator)
        padding = torch.zeros(phrases, tokens, dtype=torch.bool)
        padding[1::2, 3:] = True
        ids[:, 0], ids[:, -1] = BOS, EOS
        ids[padding] = PAD
        return self.pixels(images, self.model.encoder.image_spec), ids, padding, self._index(images, phrases)

    @torch.inference_mode()
    def prompts(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Return inputs of `PhraseDecoder`."""
        pixels, ids, padding, index = self.phrases({**sizes, TOKENS: 5})
        prompts = self.model.encode_phrases(pixels, ids, padding, index)[0].clone()
        first, *finer = self.features(sizes[IMAGES])
        return first, prompts, index, *finer

    def _index(self, images: int, phrases: int) -> Tensor:
        return torch.arange(phrases) % images


def embed_points(segmenter: Segmenter, coords: Tensor, labels: Tensor) -> Tensor:
    """Return the prompt tokens of points, as the segmenter's own prompt encoder embeds points and the corners of boxes.

    Args:
        coords: float [N, P, 2]; labels: float [N, P], from -1 to 3.

    Returns:
        [N, P, 256].
    """
    side = segmenter.prompt_spec(segmenter.own_image_spec).size
    angles = 2 * math.pi * (((coords + 0.5) / side * 2 - 1) @ segmenter.position_matrix)
    places = torch.cat([angles.sin(), angles.cos()], dim=-1)
    kinds = segmenter.point_table[labels.long() + 1]
    return torch.where(labels[..., None] < 0, kinds, places + kinds)


@contextmanager
def _without_last_key(segmenter: Segmenter, left_out: Tensor) -> Iterator[None]:
    """Let nothing attend to the last token of those prompts for which `left_out`, bool [N], is True.

    A mask, not a shorter tensor: TensorRT takes no shape that depends on values, and each prompt keeps its own rule.
    """

    def add_bias(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        last = torch.zeros_like(left_out, dtype=kwargs["key"].dtype).masked_fill(left_out, -torch.inf)
        bias = F.pad(last[:, None, None, None], (kwargs["key"].shape[2] - 1, 0))
        return args, {**kwargs, "attention_similarity": bias}

    handles = [
        attention.register_forward_pre_hook(add_bias, with_kwargs=True) for attention in segmenter.attention_to_tokens()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _given(*levels: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(level for level in levels if level is not None)
