"""SAM 2's memory attention and memory encoder on the weights of the transformers modules (arXiv 2408.00714).

The numbers are the library's; what is different is what they take. What all objects share is computed once: the frame's
attention to itself before it meets the first memory, and its projection for the memory encoder. Keys are rotated where
they lie, instead of being copied six times, and the MLP runs on a few rows at a time.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend_heads
from .base import in_parts

ROTARY_BASE = 10000.0
PLACE_WEIGHT = 0.1
"""Of the frame's own places, which are added before the first layer."""


def rotary_code(side: int, width: int, device: torch.device) -> Tensor:
    """Return the rotary code of a grid, complex64 [side * side, width / 2]: half turns with x, the other half with y.

    Args:
        width: channels of a query.
    """
    rates = ROTARY_BASE ** -(torch.arange(0, width, 4, device=device, dtype=torch.float32) / width)
    angles = torch.arange(side, device=device)[:, None] * rates
    angles = torch.cat([angles.repeat(side, 1), angles.repeat_interleave(side, 0)], dim=1)
    return torch.complex(angles.cos(), angles.sin())


def rotate_(vectors: Tensor, code: Tensor) -> None:
    """Turn pairs of channels of vectors [N, k * L, C] by a code, complex64 [L, C / 2], in place and in float32."""
    exact = vectors.float()
    pairs = exact.view(len(vectors), -1, len(code), code.shape[1], 2)
    torch.view_as_complex(pairs).mul_(code)
    if exact is not vectors:
        vectors.copy_(exact)


def attend(
    attention: nn.Module, frame: Tensor, places: Tensor, memory: Tensor, memory_places: Tensor, pointers: int
) -> Tensor:
    """Return a frame as N objects see it that remember, float [N, h * w, C].

    Args:
        attention: `Sam2VideoMemoryAttention`.
        frame: float [1, h * w, C], or [N, h * w, C] where each object has its own; h equals w.
        places: the frame's sine code, [1, h * w, C].
        memory: float [N, k * h * w + pointers, c], maps and then pointers; memory_places: [k * h * w + pointers, c].
        pointers: how many tokens are not of a place.
    """
    side = round(frame.shape[1] ** 0.5)
    code = rotary_code(side, attention.layers[0].self_attn.internal_dim, frame.device)
    keys = memory + memory_places
    seen = frame + PLACE_WEIGHT * places
    for layer in attention.layers:
        own = layer.layer_norm1(seen)
        seen = seen + layer.dropout1(_attention(layer.self_attn, own, own, own, code))
        crossed = _attention(layer.cross_attn_image, layer.layer_norm2(seen), keys, memory, code, pointers)
        seen = seen + layer.dropout2(crossed)
        widened = in_parts(partial(_mlp, layer), seen.unflatten(1, (side, side)))
        seen = seen + widened.flatten(1, 2)
    return attention.layer_norm(seen)


def _attention(part: nn.Module, query: Tensor, key: Tensor, value: Tensor, code: Tensor, pointers: int = 0) -> Tensor:
    """Attend with rotary positions; the last `pointers` keys have none. A query of one row is shared by all keys."""
    query, key, value = part.q_proj(query), part.k_proj(key), part.v_proj(value)
    rotate_(query, code)
    rotate_(key[:, : key.shape[1] - pointers], code)
    heads = query.expand(len(key), -1, -1)[:, None], key[:, None], value[:, None]
    if part.training and part.dropout_p:
        return part.o_proj(F.scaled_dot_product_attention(*heads, dropout_p=part.dropout_p)[:, 0])
    return part.o_proj(attend_heads(*heads)[:, 0])


def _mlp(layer: nn.Module, rows: Tensor) -> Tensor:
    hidden = layer.dropout(layer.activation(layer.linear1(layer.layer_norm3(rows))))
    return layer.dropout3(layer.linear2(hidden))


def remember(encoder: nn.Module, image: Tensor, masks: Tensor) -> Tensor:
    """Return what N objects remember of a frame, [N, c, h, w].

    Args:
        encoder: `Sam2VideoMemoryEncoder`.
        image: float [1, C, h, w], or [N, C, h, w] where each object has its own.
        masks: float [N, 1, 16h, 16w], scaled as the encoder expects.
    """
    fused = encoder.memory_fuser(encoder.feature_projection(image) + encoder.mask_downsampler(masks))
    return encoder.projection(fused)
