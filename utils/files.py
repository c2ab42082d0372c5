"""Writing files so that nothing is ever half-written."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def existing_path(text: str) -> Path | None:
    """Return the file or folder that a text names; None where there is none, or where it is too long for a path."""
    try:
        path = Path(text)
        return path if path.exists() else None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    The temporary name keeps the suffix, so that writers that go by it still work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it replaces `target`, on failure it is removed.

    Between two renames `target` is away for a moment; its old content then lies beside it, and is put back here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = target.with_name(f".{target.name}.partial"), _aside(target)
    recover_folder(target)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        recover_folder(target)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put back what an `atomic_folder` laid aside, where it was stopped before its end."""
    if _aside(target).is_dir() and not target.exists():
        _aside(target).rename(target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def json_text(value: Any) -> str:
    """Return `value` as `write_json` writes it."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        # A file name may hold bytes that are not UTF-8; backslashreplace writes them as the JSON escape.
        temporary.write_text(json_text(value), encoding="utf-8", errors="backslashreplace")


def append_line(path: Path, value: Any) -> None:
    """Add `value` to a file of JSON lines at once, so that a stopped run loses nothing.

    It begins a line of its own, for a stopped run may have left half of one. ASCII has no other ends of line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii") as file:
        file.write("\n" + json.dumps(value) + "\n")


def read_lines(path: Path) -> list[Any]:
    """Return what `append_line` wrote; a line cut off by a stop is dropped, and no file is no line."""
    values = []
    if path.is_file():
        for line in path.read_text("ascii", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                values.append(json.loads(line))
    return values
