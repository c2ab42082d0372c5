"""Command lines from dataclasses, with errors on one line."""

import contextlib
import io
import re
import sys
from typing import TypeVar

import tyro

Args = TypeVar("Args")
_DECORATION = re.compile(r"[\u2500-\u257f]+")


def parse(kind: type[Args], prog: str, args: list[str] | None = None) -> Args:
    """Parse a command line into a dataclass; `-` and `_` are the same in option names.

    A wrong option prints one line on stderr and exits with status 2.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, prog=prog, args=args, use_underscores=True)
    except SystemExit as stop:
        if stop.code:
            text = _DECORATION.sub(" ", captured.getvalue())
            sys.stderr.write(f"error: {' '.join(text.split())}\n")
        raise
