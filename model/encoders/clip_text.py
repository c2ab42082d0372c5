"""CLIP's text tower, on open_clip's modules: names become vectors in the space that regions are compared in."""

from collections.abc import Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from utils.errors import VocabularyError

CONTEXT, WORDS = 77, 49408
"""Tokens of a phrase, and of the vocabulary they are from."""


class ClipText(nn.Module):
    """The text tower of an OpenAI CLIP: those were trained with QuickGELU, where later ones have GELU.

    Args:
        width, heads, layers: of the transformer; embed_width: of the common space.
        words: tokens that it knows; a small tower has the vectors of those alone that it was trained with.
    """

    word_ids: Tensor | None = None
    """Which tokens those are, ascending, int64 [words]; None for all."""

    def __init__(self, width: int, heads: int, layers: int, embed_width: int, words: int = WORDS) -> None:
        super().__init__()
        self.tower = TextTransformer(CONTEXT, words, width, heads, layers, output_dim=embed_width, act_layer=QuickGELU)

    @torch.inference_mode()
    def encode(self, phrases: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return the vectors of phrases, float32 [N, D], not normalised. Over-long ones are cut to 77 tokens.

        Raises:
            VocabularyError: a small tower does not know a word.
        """
        ids = tokenize(phrases)
        if self.word_ids is not None:
            ids = rows_of(ids, self.word_ids)
        ids = ids.to(self.tower.positional_embedding.device)
        return torch.cat([self.tower(part) for part in ids.split(batch_size)]).float()


def tokenize(phrases: Sequence[str]) -> Tensor:
    """Return the tokens of phrases, int64 [N, 77], 0 behind the end."""
    return _tokenizer()(list(phrases), CONTEXT)


def rows_of(ids: Tensor, word_ids: Tensor) -> Tensor:
    """Return the rows that tokens have in the table of a small tower, int64 as `ids`.

    Args:
        ids: int64 [N, 77]; word_ids: the tokens of its rows, ascending, int64 [words].

    Raises:
        VocabularyError: it does not know one of them.
    """
    rows = torch.searchsorted(word_ids, ids).clamp(max=len(word_ids) - 1)
    unknown = ids[word_ids[rows] != ids].unique().tolist()
    if unknown:
        words = ", ".join(repr(_tokenizer().decode([token]).strip()) for token in unknown[:8])
        raise VocabularyError(
            f"the model's CLIP has never read {words}: it is a small one that knows {len(word_ids)} pieces of words. "
            "Use names of its own list (vocabulary.safetensors), or a larger model"
        )
    return rows


def _tokenizer() -> SimpleTokenizer:
    from open_clip.tokenizer import _tokenizer as shared  # reading the merges again would take a second

    return shared
