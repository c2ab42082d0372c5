"""The one place that decides which attention kernel runs."""

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MAX_SCORES = 2**24
"""Of one head, where attention is written out: more would take more memory than the time is worth."""


@cache
def has_flash_attention() -> bool:
    """Return whether the optional flash-attn package can be imported."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def can_use_flash(query: Tensor, heads: int) -> bool:
    """Return whether flash-attn takes these tensors: CUDA, half precision, heads of at most 256 channels."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and is_half and query.shape[-1] <= 256 * heads and has_flash_attention()


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, padding: Tensor | None = None) -> Tensor:
    """Multi-head attention without projections, scaled by the head width to the power -1/2.

    flash-attn runs where it is installed and able (nothing padded), else the kernel that torch picks.

    Args:
        query: [N, Q, D]; key, value: [N, K, D].
        padding: bool [N, K], True where a key is padding and gets no weight; None where there is none.

    Returns:
        [N, Q, D].
    """
    if padding is None and can_use_flash(query, heads):
        from flash_attn import flash_attn_func

        parts = (rearrange(tokens, "n t (g c) -> n t g c", g=heads) for tokens in (query, key, value))
        return rearrange(flash_attn_func(*parts), "n t g c -> n t (g c)")
    mask = None if padding is None else ~padding[:, None, None, :]
    parts = (rearrange(tokens, "n t (g c) -> n g t c", g=heads) for tokens in (query, key, value))
    return rearrange(attend_heads(*parts, mask), "n g t c -> n t (g c)")


def attend_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of heads that are apart already, by torch's kernel or, where that is faster, written out.

    Args:
        query: [N, G, Q, C]; key, value: [N, G, K, C].
        mask: bool [N, 1, 1, K], True where there is weight; None where there is weight everywhere.

    Returns:
        [N, G, Q, C].
    """
    kernel = _plain_attention if _is_plain_faster(query, key) else F.scaled_dot_product_attention
    return kernel(query, key, value, mask)


def _is_plain_faster(query: Tensor, key: Tensor) -> bool:
    """Return whether to write attention out: torch's CPU kernel is two to six times slower backwards in bf16."""
    is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    return is_slow and query.shape[-2] * key.shape[-2] <= MAX_SCORES


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
