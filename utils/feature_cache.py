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
