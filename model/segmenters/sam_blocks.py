"""The blocks and the neck of SAM's image encoder on the transformers modules, for every family that has them."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import count_parts, in_parts


def run_layers(layers: Iterable[nn.Module], tokens: Tensor) -> Tensor:
    """Run library blocks, with windows or without, on [B, H, W, C]."""
    for layer in layers:
        tokens = in_parts(layer, tokens, layer.window_size) if layer.window_size else _global_layer(layer, tokens)
    return tokens


def run_neck(neck: nn.Module, tokens: Tensor) -> Tensor:
    """Run the library's neck on [B, H, W, C] and return [B, 256, H, W], in float32 where fp16 would overflow."""
    if tokens.dtype == torch.float16:  # the second convolution sums 2304 products
        return in_float32(neck, tokens).half()
    kind = tokens.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        with torch.autocast(kind, enabled=False):
            return neck(tokens.float())
    return neck(tokens)


def in_float32(module: nn.Module, tokens: Tensor) -> Tensor:
    """Run a module of fp16 weights in float32."""
    weights = {name: tensor.float() for name, tensor in module.state_dict().items()}
    return torch.func.functional_call(module, weights, (tokens.float(),))


class RelativeAttention(nn.Module):
    """Attention with decomposed relative positions on the weights of one library block.

    The library's einsum leaves the two bias terms in permuted strides, so that their sum (0.8 GB in a global block of
    ViT-B) is written twice. Here both terms come out contiguous, and the sum is made where SDPA reads it: on a CPU
    for a few heads and rows at a time.
    """

    def __init__(self, library: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = library.qkv, library.proj
        self.rel_pos_h, self.rel_pos_w = library.rel_pos_h, library.rel_pos_w
        self.heads = library.num_attention_heads

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Attend within each window (or the whole image).

        Args:
            hidden_states: [B, H, W, C].

        Returns:
            [B, H, W, C], and None where the library returns attention weights.
        """
        batch, height, width, _ = hidden_states.shape
        query, key, value = (
            self.qkv(hidden_states).view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        along_h, along_w = self.relative_terms(query.reshape(batch, self.heads, height, width, -1))
        scratch = self.heads * (height * width) ** 2 * batch * query.element_size()
        parts = count_parts(scratch, query)
        heads = math.ceil(self.heads / min(parts, self.heads))
        rows = math.ceil(height / min(math.ceil(parts * heads / self.heads), height))
        attended = query.new_empty(batch, height, width, self.heads, query.shape[-1])
        for g in range(0, self.heads, heads):
            for y in range(0, height, rows):
                group, lines = slice(g, g + heads), slice(y, y + rows)
                bias = along_h[:, group, lines, :, :, None] + along_w[:, group, lines, :, None, :]
                part = F.scaled_dot_product_attention(
                    query[:, group, y * width : (y + rows) * width],
                    key[:, group],
                    value[:, group],
                    attn_mask=bias.flatten(4).flatten(2, 3),
                )
                attended[:, lines, :, group] = part.transpose(1, 2).unflatten(1, (-1, width))
        return self.proj(attended.flatten(3)), None

    def relative_terms(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the rows and the columns of the keys add to the logits, from the unscaled queries.

        Args:
            query: [B, G, H, W, c].

        Returns:
            [B, G, H, W, H] and [B, G, H, W, W], contiguous.
        """
        height, width = query.shape[2:4]
        table_h, table_w = (
            table[_distances(side, table.device)] for side, table in ((height, self.rel_pos_h), (width, self.rel_pos_w))
        )
        along_h = query @ table_h.transpose(1, 2)  # [B, G, H, W, c] @ [H, c, H]: each row has its own table
        along_w = (query.transpose(2, 3) @ table_w.transpose(1, 2)).transpose(2, 3).contiguous()
        return along_h, along_w


def _global_layer(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Run a library layer without windows; its MLP in parts."""
    tokens = tokens + layer.attn(layer.layer_norm1(tokens))[0]
    return tokens + in_parts(lambda part: layer.mlp(layer.layer_norm2(part)), tokens)


def _distances(side: int, device: torch.device) -> Tensor:
    """Return the table row for each pair of positions, int64 [side, side]."""
    steps = torch.arange(side, device=device)
    return steps[:, None] - steps[None, :] + side - 1
