"""Reading and writing tensor files: memory-mapped, never executing code from them."""

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import CheckpointError
from utils.files import atomic_path

from .torchscript import is_torchscript, read_torchscript

RELEASE_BYTES = 48 << 20
"""A mapping is closed and opened again after this many bytes were copied out of it, so that its pages are freed."""

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class TensorFile:
    """One .safetensors, .bin, .pt or .pth file, memory-mapped where its format allows.

    Args:
        path: the file.
        entries: names of a top-level entry that may hold the tensors; without any of them the top level counts.

    Raises:
        CheckpointError: damaged, or not a file of tensors alone.
    """

    def __init__(self, path: Path, entries: tuple[str, ...] = ()) -> None:
        self.path, self.entries = path, entries
        self._copied = 0
        self._open()

    def _open(self) -> None:
        if self.path.suffix == ".safetensors":
            try:
                self._handle = safe_open(self.path, "pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.path} is damaged or not safetensors ({error}). Download it again"
                ) from None
        else:
            self._tensors = _load_pickle(self.path, self.entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor, without reading any."""
        if self.path.suffix == ".safetensors":
            return {name: tuple(self._handle.get_slice(name).get_shape()) for name in self._handle.keys()}  # noqa: SIM118
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def _mapped(self, name: str) -> Tensor:
        return self._handle.get_tensor(name) if self.path.suffix == ".safetensors" else self._tensors[name]

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor; without a change of type or device it stays a private mapping of the file.

        Integer and boolean tensors keep their type.
        """
        tensor = self._mapped(name)
        if dtype is None or not tensor.is_floating_point():
            dtype = tensor.dtype
        if (tensor.device, tensor.dtype) == (device, dtype):
            return tensor
        moved = torch.empty(tensor.shape, dtype=dtype, device=device)
        rows = max(1, RELEASE_BYTES * len(tensor) // max(1, tensor.nbytes)) if tensor.ndim else 1
        for start in range(0, len(tensor) if tensor.ndim else 1, rows):
            part = ... if tensor.ndim == 0 else slice(start, start + rows)
            moved[part] = tensor[part]
            self._copied += tensor[part].nbytes
            if self._copied > RELEASE_BYTES:
                self._copied = 0
                del tensor
                self._open()
                tensor = self._mapped(name)
        return moved


def _load_pickle(path: Path, entries: tuple[str, ...]) -> dict[str, Tensor]:
    content = load_tensors(path)
    if isinstance(content, dict):
        content = next((content[name] for name in entries if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no table of named tensors. Pass the published weights file")
    return content


def load_tensors(path: Path) -> Any:
    """Return what `torch.save` wrote, memory-mapped where the file allows it; nothing that could run code is read.

    Of a TorchScript archive it is the tensors by name.

    Raises:
        CheckpointError: damaged, or it holds more than tensors in plain containers.
    """
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of a pickle protocol, then refuses the file
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a file of tensors alone: it is no PyTorch checkpoint, or it would run code when loaded. "
            "Use the published weights, or convert it to safetensors where you trust it"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint ({reason}). Download it again") from None


class Checkpoint:
    """The tensors of one file, or of all shards of a folder, under one set of names.

    Raises:
        CheckpointError: nothing there, an index that names an absent shard, or a name in two shards.
    """

    def __init__(self, source: Path, entries: tuple[str, ...] = ()) -> None:
        self.source = source
        self.files = [TensorFile(path, entries) for path in _weight_files(source)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._owner: dict[str, TensorFile] = {}
        for file in self.files:
            for name, shape in file.shapes().items():
                if name in self._owner:
                    raise CheckpointError(f"{source}: tensor {name} is in two shards. Download the folder again")
                self._owner[name], self.shapes[name] = file, shape

    def leave_out(self, names: Iterable[str]) -> None:
        """Treat tensors that no part of the model uses as if they were not there."""
        for name in names:
            del self.shapes[name]

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor on a device, floating-point ones in `dtype` (None keeps the type)."""
        return self._owner[name].read(name, device, dtype)


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    for name in SINGLE_FILES:
        if (source / name).is_file():
            return [source / name]
        index = source / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    raise CheckpointError(
        f"{source} holds no weights: needed is {' or '.join(SINGLE_FILES)}, or one of their .index.json with its shards"
    )


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} names no shards ('weight_map'). Download the folder again")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; a shard must lie beside its index")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is missing. Download it into {index.parent}")
    return [index.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, needed is an object")
    return value


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically; views are written as what they show."""
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})


def write_bin_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors as `pytorch_model-*.bin` shards with an index, the layout that published folders use."""
    shards: list[dict[str, Tensor]] = [{}]
    used = total = 0
    for name, tensor in tensors:
        if used and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.detach().clone()
        used += tensor.nbytes
        total += tensor.nbytes
    names = [f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with atomic_path(folder / name) as temporary:
            torch.save(shard, temporary)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    with atomic_path(folder / "pytorch_model.bin.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=1))
