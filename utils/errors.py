"""Errors a user can act on: one line that names the value, what is allowed and the remedy."""

import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterable

EXIT_BAD_INPUT = 2
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.|$)")


class TextSAMError(ValueError):
    """Base of every error that bad input can cause; its text is one line."""


class ImageError(TextSAMError):
    """An image is missing, unreadable, truncated or too large."""


class PromptError(TextSAMError):
    """A phrase, point, box or mask prompt cannot be used."""


class ModelError(TextSAMError):
    """A model name or configuration is unknown or inconsistent."""


class CheckpointError(TextSAMError):
    """A checkpoint is missing, unsafe, incomplete or does not fit the model."""


class VocabularyError(TextSAMError):
    """A vocabulary, or a list of names, is missing, empty, repeated or does not fit the model."""


class DataError(TextSAMError):
    """A data set is unknown, incomplete, unsafe or holds something that cannot be a mask or a phrase."""


class TrainingError(TextSAMError):
    """A training or evaluation run cannot start or go on."""


class MissingPackageError(TextSAMError):
    """An optional package is needed for what was asked."""


def nearest(value: str, known: Iterable[str], count: int = 3) -> str:
    """Return " Did you mean 'a', 'b'?" for the known names closest to `value`, or an empty string."""
    close = difflib.get_close_matches(value, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def compress_names(names: Iterable[str]) -> str:
    """Return every name, those that differ only in numbers written once.

    `a.0.w a.1.w a.1.b` becomes `a.{0..1}.w, a.1.b`: short enough for one line, and nothing is left out.
    """
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = tuple(_NUMBER.split(name))
        groups.setdefault(parts, []).append(tuple(int(n) for n in _NUMBER.findall(name)))
    lines = []
    for parts, numbers in groups.items():
        for ranges in _product_ranges(sorted(set(numbers))):
            lines.append("".join(part + number for part, number in zip(parts, (*ranges, ""), strict=True)))
    return ", ".join(lines)


def _product_ranges(numbers: list[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Write a set of index tuples as ranges where it is a full grid, else one by one."""
    if not numbers or not numbers[0]:
        return [()]
    axes = [sorted({n[i] for n in numbers}) for i in range(len(numbers[0]))]
    size = 1
    for axis in axes:
        size *= len(axis)
    if size != len(numbers):
        return [tuple(str(n) for n in index) for index in numbers]
    return [tuple(_range_text(axis) for axis in axes)]


def _range_text(axis: list[int]) -> str:
    if len(axis) == 1:
        return str(axis[0])
    if axis == list(range(axis[0], axis[-1] + 1)):
        return f"{{{axis[0]}..{axis[-1]}}}"
    return "{" + ",".join(map(str, axis)) + "}"


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main`; a `TextSAMError` or `OSError` becomes one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        status = main()
    except TextSAMError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        sys.stderr.write(f"error: {error}. Check the path, its permissions and the free space\n")
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: what was written so far is complete; run the same command again to go on\n")
        sys.exit(130)
    sys.exit(status or 0)
