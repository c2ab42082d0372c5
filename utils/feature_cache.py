"""Image features on disk: a frozen image encoder runs once per image, later epochs read what it made."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import TrainingError
from .files import atomic_path

MAX_BYTES = 64 << 20
"""Larger files of one embedding are refused; those of SAM ViT-H have 4 MB."""


class FeatureCache:
    """Features by the pixels they were made from, below a folder named for the weights that made them.

    A changed image, a mirrored one or other weights have other names, so nothing stale is ever read. Writers may race:
    each file appears whole or not at all.

    Args:
        folder: below it are `<digest>/<2 letters>/<pixels' digest>.safetensors`.
        digest: of the image encoder, from `digest_of`.
        dtype: what features are stored in.
    """

    def __init__(self, folder: str | Path, digest: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.dtype = Path(folder) / digest, dtype

    def name(self, image: np.ndarray, key: str) -> str:
        """Return what an image is called here, uint8 RGB [H, W, 3]: by its pixels, whatever its key."""
        return name_of(image)

    def path(self, name: str) -> Path:
        """Return where the features of an image are."""
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors of an image without batch dimension, or None where it was not encoded yet.

        Raises:
            TrainingError: the file is damaged.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise TrainingError(
                f"{path} cannot be read or is damaged ({error}). Remove it: it is computed again"
            ) from None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of an image, given without batch dimension."""
        with atomic_path(self.path(name)) as temporary:
            save_file({key: value.to(self.dtype).cpu().contiguous() for key, value in tensors.items()}, temporary)


class FlatFeatures:
    """Embeddings in a folder as Open-Vocabulary SAM's published dump has them: one bare tensor for each file name.

    `sa_1.jpg` is `sa_1_vit_h_cache.pth`, float32 [C, h, w]. Reads and writes as a `FeatureCache`.

    Args:
        folder: of the files.
        is_complete: whether a missing file is an error.
    """

    dtype = torch.float32
    suffix = "_vit_h_cache.pth"

    def __init__(self, folder: str | Path, is_complete: bool = False) -> None:
        self.folder, self.is_complete = Path(folder), is_complete

    def name(self, image: np.ndarray, key: str) -> str:
        """Return what an image is called here: its file's name without the ending."""
        return Path(key).stem

    def path(self, name: str) -> Path:
        """Return where the embedding of an image is."""
        return self.folder / f"{name}{self.suffix}"

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Return the embedding of an image, or None where it was not made yet.

        Raises:
            TrainingError: the file is damaged, no embedding, or missing where all must be there.
        """
        path = self.path(name)
        if not path.is_file():
            if self.is_complete:
                raise TrainingError(
                    f"no such embedding: {path}. Dump it with tools/dump_features.py, or give a teacher"
                )
            return None
        if path.stat().st_size > MAX_BYTES:
            raise TrainingError(f"{path} has over {MAX_BYTES >> 20} MB: it is no embedding of one image")
        try:
            embedding = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds on a damaged or hostile file
            reason = " ".join(str(error).split())[:100]
            raise TrainingError(
                f"{path} is no file of torch.save with a tensor alone ({reason}). Dump it again"
            ) from None
        if not isinstance(embedding, Tensor) or embedding.ndim != 3 or not embedding.is_floating_point():
            raise TrainingError(f"{path} is no embedding: needed is one float tensor [channels, height, width]")
        return {"embedding": embedding}

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the embedding of an image, given without batch dimension."""
        with atomic_path(self.path(name)) as temporary:
            torch.save(tensors["embedding"].to(self.dtype).cpu().clone(), temporary)


def name_of(image: np.ndarray) -> str:
    """Return the name of an image, uint8 RGB [H, W, 3]: a digest of its pixels."""
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16, key=str(image.shape).encode()).hexdigest()


def digest_of(named: Iterable[tuple[str, Tensor]], *settings: object) -> str:
    """Return a digest of weights and of whatever else decides what features they make."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=12)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
