"""Command lines from dataclasses, with errors on one line."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import TypeVar

import tyro

from .nested import read_config

Args = TypeVar("Args")
_DECORATION = re.compile(r"[\u2500-\u257f]+")


def parse(kind: type[Args], prog: str, args: list[str] | None = None, default: Args | None = None) -> Args:
    """Parse a command line into a dataclass; `-` and `_` are the same in option names.

    A wrong option prints one line on stderr and exits with status 2.

    Args:
        default: values of what the command line leaves out, instead of the dataclass's own.
    """
    options = {} if default is None else {"default": default}
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, prog=prog, args=args, use_underscores=True, **options)
    except SystemExit as stop:
        if stop.code:
            text = _DECORATION.sub(" ", captured.getvalue())
            sys.stderr.write(f"error: {' '.join(text.split())}\n")
        raise


def parse_with_file(kind: type[Args], prog: str, args: list[str] | None = None) -> Args:
    """Parse `FILE.yaml [--group.option value ...]`: the file's values, changed by the options.

    Without a file the dataclass's own values are changed.

    Raises:
        TrainingError: the file cannot be read; see `read_config`.
    """
    args = sys.argv[1:] if args is None else args
    default = None
    if args and Path(args[0]).suffix in (".yaml", ".yml"):
        default, args = read_config(kind, args[0]), args[1:]
    return parse(kind, prog, args, default)
