"""Reading pickles that others wrote: plain data comes out, everything that could run code is refused.

The REFER annotation files are pickles of Python 2 (protocol 0 to 2): lists and dictionaries of text and numbers.
"""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

from .errors import DataError

MAX_BYTES = 1 << 30
"""Default bound on the size of a pickle. The largest published one has about 60 MB."""

_PLAIN = "dict, list, tuple, set, str, bytes, int, float, bool and None"
_REFUSED = (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.PERSID, pickle.BINPERSID, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip
"""Instructions that plain data never needs."""


class _Unsafe(Exception):
    """What a pickle asked for and may not have."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand in for `_codecs.encode`, through which Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise _Unsafe(f"the codec {encoding!r}")
    return text.encode("latin1")


def _make_bytes(*values: Any) -> bytes:
    """Stand in for `bytes`, of which Python 3 writes `bytes()` for Python 2: `bytes(10**12)` would fill the memory."""
    if values:
        raise _Unsafe("bytes with an argument")
    return b""


_ALLOWED = {
    "set": set, "frozenset": frozenset, "bytes": _make_bytes, "_codecs.encode": _encode,
}  # fmt: skip


# The C unpickler reserves memory for whatever memo number the file names; the one in Python keeps a dictionary.
class _PlainUnpickler(pickle._Unpickler):
    """An unpickler that knows the instructions of plain data only."""

    dispatch: ClassVar[dict] = {
        code: f for code, f in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the constructor of a set or of bytes.

        Raises:
            _Unsafe: anything else was asked for.
        """
        dotted = f"{module}.{name}"
        short = dotted.removeprefix("builtins.").removeprefix("__builtin__.")
        if short not in _ALLOWED:
            raise _Unsafe(f"the global {dotted!r}")
        return _ALLOWED[short]


def load_plain_pickle(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return what a pickle holds. Text of Python 2 is read as UTF-8, or as Latin-1 where it is not UTF-8.

    Args:
        path: pickle of any protocol.
        max_bytes: bound on the size of the file.

    Raises:
        DataError: no such file, over the bound, not a pickle, truncated, or it asks for anything but plain data.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(f"{path} has {size:,} bytes, over the bound of {max_bytes:,}. Take the published file")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path and its permissions") from None
    try:
        try:
            return _load(data, "utf-8")
        except UnicodeDecodeError:
            return _load(data, "latin1")
    except _Unsafe as unsafe:
        raise DataError(
            f"{path} asks for {unsafe}, which may run code: allowed are {_PLAIN}. It was not loaded; "
            "take the published file from its own source"
        ) from None
    except Exception as error:
        # Damaged pickles raise whatever the machine stumbles on: IndexError, KeyError, EOFError, struct.error, ...
        reason = f"instruction {error.args[0]}" if isinstance(error, KeyError) and error.args else error
        raise DataError(
            f"{path} is not a pickle of plain data, or truncated ({type(error).__name__}: {reason}). "
            f"Allowed are {_PLAIN}. Download it again"
        ) from None


def _load(data: bytes, encoding: str) -> Any:
    # Read from memory: a length beyond the end then yields what is there, instead of reserving it.
    return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()
