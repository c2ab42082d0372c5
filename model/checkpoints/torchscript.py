"""Reading the tensors of a TorchScript archive, the format of OpenAI's CLIP files, without running anything of it.

Such a file is a zip of code and of a pickle of the modules. `torch.jit.load` compiles that code; here the code is left
alone, and of the pickle only plain containers, tensors and the tree of modules are rebuilt.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import CheckpointError

MAX_PICKLE = 64 << 20
"""Bound on the pickle of the modules; that of CLIP has less than one MB."""

DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive: a zip with code, which `torch.save` never writes."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # damaged: torch.load says so
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return every tensor of the modules of a TorchScript archive, by its dotted name.

    Raises:
        CheckpointError: damaged, or it asks for anything but modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            if archive.getinfo(f"{root}data.pkl").file_size > MAX_PICKLE:
                raise _Unsafe(f"a pickle of more than {MAX_PICKLE:,} bytes")
            tree = _ModuleUnpickler(archive, root).load()
        return dict(_walk(tree, "", set()))
    except _Unsafe as unsafe:
        raise CheckpointError(
            f"{path} asks for {unsafe}, which no file of weights needs. It was not loaded; take OpenAI's own file"
        ) from None
    except Exception as error:
        # Damaged pickles raise whatever the machine stumbles on: IndexError, KeyError, EOFError, struct.error, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is a damaged TorchScript archive ({reason}). Download it again") from None


class _Unsafe(Exception):
    """What an archive asked for and may not have."""


class _Node:
    """Stands for a module of whatever class: what it holds, by name."""

    def __init__(self, *_arguments: Any) -> None:
        self.held: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise _Unsafe("a module whose content is no dictionary")
        self.held = state


def _same(value: Any = (), *_rest: Any) -> Any:
    return value


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_rest: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # refuses what lies outside the storage


class _ModuleUnpickler(pickle._Unpickler):  # the one in C reserves memory for whatever memo number the file names
    """An unpickler that knows modules, tensors and plain containers."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function.

        Raises:
            _Unsafe: anything that weights do not need.
        """
        if module.split(".")[0] == "__torch__":
            return _Node
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): dict,
            **{("torch.jit._pickle", f"build_{kind}list"): _same for kind in ("int", "double", "bool", "tensor")},
            ("torch.jit._pickle", "restore_type_tag"): _same,
            **{("torch", storage): storage for storage in DTYPES},
        }
        if (module, name) not in known:
            raise _Unsafe(f"the global '{module}.{name}'")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor."""
        _, kind, key, _, count = pid
        if key not in self.storages:
            entry = self.archive.getinfo(f"{self.root}data/{key}")
            dtype = DTYPES[kind]
            is_packed = entry.compress_type != zipfile.ZIP_STORED
            if is_packed or entry.file_size != count * dtype.itemsize:
                raise _Unsafe(f"{count} numbers in the {entry.file_size} bytes of storage {key}")
            content = bytearray(self.archive.read(entry))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _walk(node: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor below a module with its dotted name."""
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, _Node) and id(node) not in seen:
        seen.add(id(node))
        for key, value in node.held.items():
            yield from _walk(value, f"{name}.{key}" if name else str(key), seen)
