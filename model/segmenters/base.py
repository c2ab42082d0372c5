"""The contract of every segmenter, and what the families share."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import ModelError, PromptError
from utils.image import ImageSpec

from ..types import ImageFeatures, MaskPrediction, Prompts

PROMPT_WIDTH = 256
SAM_PARTS = MappingProxyType(
    {
        "image_encoder": ("image_encoder.",),
        "prompt_encoder": ("prompt_encoder.no_mask_embed.",),
        "mask_decoder": ("mask_decoder.",),
    }
)
"""The parts of the families whose modules are named as SAM's."""

REGION_GRID = 32
"""Cells on a side of the grid on which regions are coded."""

PART_BYTES = 8 << 20
"""How much scratch memory per thread an image encoder should touch at a time on a CPU; see `in_parts`."""


class Segmenter(nn.Module):
    """Base class of the segmenter families.

    Subclasses set `image_spec`, `prompt_kinds` and implement `encode_image`, `decode` and `select`.
    """

    image_spec: ImageSpec
    """How EVF-SAM prepares an image for this segmenter."""
    own_image_spec: ImageSpec
    """How the segmenter's own release does, for a model without phrases."""
    prompt_kinds: frozenset[str] = frozenset()
    """Which geometric prompts the family has weights for: `points`, `boxes`, `masks`."""
    pads_boxes = False
    """Whether boxes are followed by a padding point too, as points without a box are."""
    masks_per_prompt: int = 4
    """M, the masks that `decode` returns of each prompt."""
    parts: Mapping[str, tuple[str, ...]]
    """Part -> how the names of its parameters begin; the first that fits counts. `image_encoder` is what
    `encode_image` reads; `prompt_encoder` is what a phrase alone needs of it; the rest is never trained."""

    def part_of(self, name: str) -> str:
        """Return the part that a parameter belongs to: a key of `parts`, or `other`."""
        return next((part for part, beginnings in self.parts.items() if name.startswith(beginnings)), "other")

    @property
    def position_matrix(self) -> Tensor:
        """The random directions that places are coded by, float [2, 128]; prompts and image share them."""
        raise NotImplementedError

    @property
    def point_table(self) -> Tensor:
        """What is learned of points, [5, 256]: padding, background, foreground, a box's first and second corner."""
        raise NotImplementedError

    def attention_to_tokens(self) -> list[nn.Module]:
        """Return the decoder's attentions whose keys are tokens; `key` and `attention_similarity` are keywords."""
        raise NotImplementedError

    def positions(self, side: int, dtype: torch.dtype) -> Tensor:
        """Return the Fourier code of the centres of a grid over the square input, [1, 256, side, side]."""
        return grid_positions(self.position_matrix, side, dtype)

    def region_shares(self, masks: Tensor) -> Tensor:
        """Return how much of what each mask covers lies in each cell of a grid over the square input.

        Args:
            masks: uint8 [n, H, W], 1 where something is.

        Returns:
            float32 [n, G * G], G = `REGION_GRID`; rows sum to 1, or to 0 where a mask is empty.
        """
        share = (masks == 1).float()
        if self.image_spec.resize == "letterbox":
            height, width = masks.shape[-2:]
            share = F.pad(share, (0, max(height - width, 0), 0, max(width - height, 0)))
        share = F.adaptive_avg_pool2d(share, REGION_GRID).flatten(1)
        return share / share.sum(1, keepdim=True).clamp(min=1e-6)

    def cell_codes(self) -> Tensor:
        """Return the position codes of the cells of `region_shares`, float32 [G * G, 256].

        The mean code of a region, `region_shares(masks) @ cell_codes()`, is a prompt that says where it is, in one or
        several pieces; of a single pixel it is the code of a point.
        """
        return self.positions(REGION_GRID, torch.float32).flatten(2)[0].T

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Encode a batch of images once, for any number of prompts.

        Args:
            pixels: float [B, 3, S, S], made by `image_spec`.
        """
        raise NotImplementedError

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Return the embedding of images alone, what the mask decoder reads; see `encode_image`."""
        return self.encode_image(pixels).embedding

    def prompt_spec(self, spec: ImageSpec) -> ImageSpec:
        """Return how an image that `spec` prepares lies on the frame of prompts and masks; most often the same."""
        return spec

    def encode_prompts(self, prompts: Prompts) -> tuple[Tensor | None, Tensor | None]:
        """Return sparse [N, P, 256] and dense [N, 256, h, w] embeddings of geometric prompts.

        Raises:
            PromptError: the family has no weights for one of the kinds.
        """
        for kind in prompts.kinds():
            if kind not in self.prompt_kinds:
                allowed = ", ".join(sorted(self.prompt_kinds)) or "phrases alone"
                raise PromptError(f"{type(self).__name__} cannot use {kind} as prompts; it takes {allowed}")
        return self._encode_prompts(prompts)

    def _encode_prompts(self, prompts: Prompts) -> tuple[Tensor | None, Tensor | None]:
        raise NotImplementedError

    def decode(
        self,
        features: ImageFeatures,
        sparse: Tensor,
        dense: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> MaskPrediction:
        """Decode N prompts of B images in one call.

        Args:
            features: of B images.
            sparse: float [N, P, 256], the prompt tokens.
            dense: float [N, 256, h, w] or None for the learned "no mask" embedding.
            image_index: int64 [N], the image of each prompt; None where N = B or B = 1.
        """
        raise NotImplementedError

    def select(self, prediction: MaskPrediction) -> Tensor:
        """Return int64 [N]: which of the M masks the published inference takes."""
        raise NotImplementedError

    def select_for_prompts(self, prediction: MaskPrediction, is_ambiguous: bool) -> Tensor:
        """Return int64 [N]: the mask for geometric prompts without a phrase.

        Args:
            is_ambiguous: a lone point, which may mean a part or the whole: the best of three; else mask 0.
        """
        return best_of_three(prediction) if is_ambiguous else first_mask(prediction)

    def postprocess(self, logits: Tensor, sizes: list[tuple[int, int]], image_index: Tensor) -> list[Tensor]:
        """Bring low-resolution logits to the size of their images.

        Args:
            logits: float [N, 4h, 4w].
            sizes: (H, W) of each of the B images.
            image_index: int64 [N].

        Returns:
            float32, per image [n_i, H_i, W_i], in the order of the prompts.
        """
        return [self._to_image(logits[image_index == i].float()[:, None], size)[:, 0] for i, size in enumerate(sizes)]

    def _to_image(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        spec = self.prompt_spec(self.image_spec)
        if spec.resize == "letterbox":
            side = spec.size
            height, width = spec.resized_size(*size)
            logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
            logits = logits[..., :height, :width]
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def compile_image_encoder(self) -> None:
        """Let torch.compile speed up `encode_image` for one image at a time, and compile it now.

        Raises:
            ModelError: there is no working compiler.
        """
        # Traced, it would end the graph, and every part be compiled alone. Said here: it imports the compiler, 1.4 s.
        torch.compiler.assume_constant_result(_threads)
        compiled = torch.compile(self.encode_image, dynamic=False)
        weight = next(self.parameters())
        side = self.image_spec.size
        try:
            with torch.inference_mode():
                compiled(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
        except RuntimeError as error:  # dynamo's and inductor's own errors are RuntimeErrors
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"torch.compile failed ({reason}). Install a C++ compiler, or leave --compile out"
            ) from None
        self.encode_image = compiled

    def restore_buffers(self) -> None:
        """Compute the buffers that no checkpoint stores, after a build on the meta device."""


def count_parts(scratch: int, tokens: Tensor) -> int:
    """Return into how many parts to cut work that would need `scratch` bytes at once.

    One on a GPU, whose kernels want much work, and where gradients are kept, which holds on to the scratch anyway.
    """
    if tokens.device.type != "cpu" or torch.is_grad_enabled():
        return 1
    return max(1, math.ceil(scratch / (PART_BYTES * _threads())))


def _threads() -> int:
    """Return `torch.get_num_threads()`, a constant for torch.compile: see `compile_image_encoder`."""
    return torch.get_num_threads()


def in_parts(function: Callable[[Tensor], Tensor], tokens: Tensor, step: int = 1) -> Tensor:
    """Apply to an image what works on each row, or each row of windows, alone: on a CPU a few rows at a time.

    The result is the same, but what a transformer block needs in between stays in the processor's cache, and in memory
    that the allocator can use again: fresh pages for it cost more than the sums they hold.

    Args:
        tokens: [B, H, W, C].
        step: rows that belong together, the side of a window.
    """
    hidden = 4 * tokens.numel() * tokens.element_size()  # the MLP's inner width is four times the outer
    steps = math.ceil(tokens.shape[1] / step)
    rows = step * math.ceil(steps / min(steps, count_parts(hidden, tokens)))
    if rows >= tokens.shape[1]:
        return function(tokens)
    return torch.cat([function(part) for part in tokens.split(rows, dim=1)], dim=1)


def grid_positions(matrix: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Return the Fourier code of the centres of a grid, [1, 256, side, side] in `dtype`, computed in float32.

    Args:
        matrix: float [2, 128].
    """
    centres = (torch.arange(side, device=matrix.device, dtype=torch.float32) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    angles = 2 * math.pi * (torch.stack([x, y], dim=-1) @ matrix.float())
    return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None].to(dtype)


def pick_images(features: Tensor, image_index: Tensor | None, count: int) -> Tensor:
    """Return features [count, ...] for `count` prompts: one image for all without a copy, or gathered by index."""
    if features.shape[0] == 1:
        return features.expand(count, *features.shape[1:])
    if image_index is None:
        return features
    return features.index_select(0, image_index)


def first_mask(prediction: MaskPrediction) -> Tensor:
    """Return int64 [N] zeros: the single-mask token for every prompt."""
    return torch.zeros(len(prediction.iou), dtype=torch.long, device=prediction.iou.device)


def best_of_three(prediction: MaskPrediction) -> Tensor:
    """Return int64 [N]: of the masks 1..3 the one with the highest predicted IoU."""
    return prediction.iou[:, 1:].argmax(dim=1) + 1


def run_prompt_encoder(encoder: nn.Module, prompts: Prompts) -> tuple[Tensor | None, Tensor | None]:
    """Run a transformers SAM or SAM-2 prompt encoder; see `Segmenter.encode_prompts`."""
    sparse, dense = encoder(
        prompts.points[:, None] if prompts.points is not None else None,
        prompts.labels[:, None] if prompts.labels is not None else None,
        prompts.boxes[:, None] if prompts.boxes is not None else None,
        prompts.masks,
    )
    return (None if sparse is None else sparse[:, 0]), (dense if prompts.masks is not None else None)


def attention_to_tokens(transformer: nn.Module) -> list[nn.Module]:
    """Return those attentions of a transformers SAM or SAM-2 two-way transformer whose keys are tokens."""
    return [part for layer in transformer.layers for part in (layer.self_attn, layer.cross_attn_image_to_token)]


def decode_masks(
    decoder: nn.Module,
    embedding: Tensor,
    positions: Tensor,
    sparse: Tensor,
    high_res: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a transformers SAM or SAM-2 mask decoder and return all four masks.

    The library's own forward drops either the first mask or the other three; here the choice is the caller's.

    Args:
        decoder: `SamMaskDecoder` or `Sam2VideoMaskDecoder`.
        embedding: [N, 256, h, w], the dense prompt added; positions: [1, 256, h, w]; sparse: [N, P, 256].
        high_res: () or ([N, 32, 4h, 4w], [N, 64, 2h, 2w]).

    Returns:
        masks [N, 4, 4h, 4w], predicted IoU [N, 4], output of every token [N, T, 256] (SAM 2: object score, IoU, masks).
    """
    owner_tokens = [decoder.obj_score_token.weight] if high_res else []
    learned = torch.cat([*owner_tokens, decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([learned.expand(sparse.shape[0], -1, -1), sparse.to(learned.dtype)], dim=1)
    tokens, image = decoder.transformer(
        point_embeddings=tokens[:, None],
        image_embeddings=embedding,
        image_positional_embeddings=positions,
        attention_similarity=None,
    )
    tokens = tokens[:, 0]
    iou_token, *mask_tokens = tokens[:, len(owner_tokens) : len(owner_tokens) + 1 + decoder.num_mask_tokens].unbind(1)
    upscaled = decoder.upscale_conv1(image[:, 0].transpose(1, 2).unflatten(2, embedding.shape[-2:]))
    if high_res:
        upscaled = upscaled + high_res[1]
    upscaled = decoder.upscale_conv2(decoder.activation(decoder.upscale_layer_norm(upscaled)))
    if high_res:
        upscaled = upscaled + high_res[0]
    upscaled = decoder.activation(upscaled)
    kernels = torch.stack([mlp(t) for mlp, t in zip(decoder.output_hypernetworks_mlps, mask_tokens, strict=True)], 1)
    masks = (kernels @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return masks, decoder.iou_prediction_head(iou_token), tokens
