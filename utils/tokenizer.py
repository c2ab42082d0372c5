"""Phrases to token ids: a sentencepiece model with the fairseq offset, as XLM-RoBERTa and EVF-SAM use it.

`<s>`=0, `<pad>`=1, `</s>`=2, `<unk>`=3; a sentencepiece id p becomes p+1, sentencepiece's own unknown (p=0) becomes 3.
"""

import logging
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from .errors import CheckpointError, PromptError

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SEMANTIC_PREFIX = "[semantic] "
TOKENIZER_FILES = ("sentencepiece.bpe.model", "beit3.spm", "spiece.model")

logger = logging.getLogger(__name__)


class PhraseTokenizer:
    """Turns phrases into right-padded id tensors. Case is kept; no template is added.

    Args:
        path: a sentencepiece model file, or a folder that holds one of `TOKENIZER_FILES`.
        max_length: longest sequence, `<s>` and `</s>` included.
        overlong: `error` refuses longer phrases, `truncate` shortens them with a warning.

    Raises:
        CheckpointError: the file is missing or not a sentencepiece model. PromptError: an impossible limit.
    """

    def __init__(
        self, path: str | Path, max_length: int = 512, overlong: Literal["error", "truncate"] = "error"
    ) -> None:
        import sentencepiece

        if overlong not in ("error", "truncate"):
            raise PromptError(f"overlong {overlong!r}: known are 'error' and 'truncate'")
        if max_length < 3:
            raise PromptError(f"max_length {max_length} leaves no room for a phrase. Default: 512")
        self.path = find_tokenizer(Path(path))
        self.max_length = max_length
        self.overlong = overlong
        try:
            self.pieces = sentencepiece.SentencePieceProcessor()
            self.pieces.LoadFromSerializedProto(self.path.read_bytes())  # the constructor passes over an empty file
        except RuntimeError:
            raise CheckpointError(
                f"{self.path} is not a sentencepiece model. Take the file from the checkpoint's own folder"
            ) from None

    @property
    def vocab_size(self) -> int:
        """Largest id + 1: the pieces, shifted by one, and `<mask>`."""
        return self.pieces.get_piece_size() + 2

    def words(self) -> list[str]:
        """Return the pieces that are whole words of two letters or more."""
        pieces = (self.pieces.id_to_piece(index) for index in range(self.pieces.get_piece_size()))
        words = (piece[1:] for piece in pieces if piece.startswith("\N{LOWER ONE EIGHTH BLOCK}"))
        return [word for word in words if len(word) > 1 and word.isalpha()]

    def unknown_marks(self) -> list[str]:
        """Return the punctuation of ASCII that no piece has, and that becomes `<unk>`."""
        return [mark for mark in string.punctuation if self.pieces.unk_id() in self.pieces.encode(mark)]

    def encode(self, phrase: str) -> list[int]:
        """Return `[0] + (piece + 1) + [2]` of one phrase.

        Raises:
            PromptError: the phrase is empty or not Unicode, or longer than `max_length` and `overlong` is `error`.
        """
        try:
            pieces = self.pieces.encode(phrase) if phrase.strip() else []
        except (RuntimeError, TypeError, UnicodeEncodeError):
            raise PromptError(f"phrase {phrase!r} is not Unicode text. Type it in a UTF-8 terminal") from None
        if not pieces:
            raise PromptError(f"empty phrase {phrase!r}. Describe the object, for example 'the zebra on the left'")
        ids = [piece + 1 if piece else UNK for piece in pieces]
        if len(ids) + 2 > self.max_length:
            if self.overlong == "error":
                raise PromptError(
                    f"phrase of {len(ids) + 2} tokens, allowed are {self.max_length}: {phrase[:60]!r}… "
                    "Shorten it, or let it be cut (overlong='truncate')"
                )
            logger.warning("phrase of %d tokens cut to %d: %r…", len(ids) + 2, self.max_length, phrase[:60])
            ids = ids[: self.max_length - 2]
        return [BOS, *ids, EOS]

    def __call__(self, phrases: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch.

        Returns:
            ids: int64 [N, T], padded on the right with 1.
            padding: bool [N, T], True at padding.
        """
        sequences = [torch.tensor(self.encode(phrase)) for phrase in phrases]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=PAD)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return ids, torch.arange(ids.shape[1]) >= lengths[:, None]


def find_tokenizer(path: Path) -> Path:
    """Return the sentencepiece file at `path`, which may be the file or its folder.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return path
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"no tokenizer in {path}: needed is one of {', '.join(TOKENIZER_FILES)}, from the checkpoint's own folder"
    )


def semantic_phrase(phrase: str) -> str:
    """Return the phrase with the prefix that asks the multitask models for everything of a class."""
    return phrase if phrase.startswith(SEMANTIC_PREFIX) else SEMANTIC_PREFIX + phrase
