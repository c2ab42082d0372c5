"""The one place that decides which attention kernel runs."""

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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
    kernel = _plain_attention if _is_plain_faster(query) else F.scaled_dot_product_attention
    return rearrange(kernel(*parts, attn_mask=mask), "n g t c -> n t (g c)")


def _is_plain_faster(query: Tensor) -> bool:
    """Return whether to write attention out: torch's CPU kernel is two to six times slower backwards in bf16."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """As torch's kernel: [N, G, Q, C], [N, G, K, C] twice and bool [N, 1, 1, K], True where there is weight."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
