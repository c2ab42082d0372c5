"""CLIP's text tower, on open_clip's modules: names become vectors in the space that regions are compared in."""

from collections.abc import Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

CONTEXT, WORDS = 77, 49408
"""Tokens of a phrase, and of the vocabulary they are from."""


class ClipText(nn.Module):
    """The text tower of an OpenAI CLIP: those were trained with QuickGELU, where later ones have GELU.

    Args:
        width, heads, layers: of the transformer; embed_width: of the common space.
    """

    def __init__(self, width: int, heads: int, layers: int, embed_width: int) -> None:
        super().__init__()
        self.tower = TextTransformer(CONTEXT, WORDS, width, heads, layers, output_dim=embed_width, act_layer=QuickGELU)

    @torch.inference_mode()
    def encode(self, phrases: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the vectors of phrases, float32 [N, D], not normalised. Over-long ones are cut to 77 tokens."""
        ids = tokenize(phrases).to(self.tower.positional_embedding.device)
        return torch.cat([self.tower(part) for part in ids.split(batch_size)]).float()


def tokenize(phrases: Sequence[str]) -> Tensor:
    """Return the tokens of phrases, int64 [N, 77], 0 behind the end."""
    return _tokenizer()(list(phrases), CONTEXT)


def _tokenizer() -> SimpleTokenizer:
    from open_clip.tokenizer import _tokenizer as shared  # reading the merges again would take a second

    return shared
