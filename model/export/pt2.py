"""torch.export programs, .pt2 files: written and run by torch itself.

torch.export.load trusts a file: it unpickles parts, evaluates expressions and calls what the file names. Engines come
from outside, so a file is looked through first, and only what `write` puts into one is let in.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import CheckpointError, ModelError

from .graphs import Graph
from .programs import to_program

MAX_TEXT = 64 << 20
"""Bytes that each of the JSON texts in a file may have."""
_FILES = re.compile(
    r"data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))"
    r"|models/model\.json|archive_(format|version)|byteorder|\.data/(serialization_id|version)"
)
_EMPTY_FILES = frozenset({"data/sample_inputs/model.pt"})
_CALLS = re.compile(
    r"torch\.ops\.(aten\.(?!from_file\b)\w+|higher_order\.wrap_with_autocast)(\.\w+)?|_operator\.[a-z]+"
)
_EXPRESSION = re.compile(
    r"(?:(?:Add|Mul|Integer|Pow|Max|Min|FloorDiv|Mod|Symbol)(?=\()|'s\d+'|positive=True|integer=True|-?\d+|[(),\s])*"
)


def write(graph: Graph, path: Path) -> None:
    """Write a graph as a torch.export program.

    Raises:
        ModelError: torch cannot write it.
    """
    program = to_program(graph)
    program._example_inputs = None  # they would be stored as well
    try:
        torch.export.save(program, path)
    except RuntimeError as error:
        raise ModelError(f"torch cannot write {graph.name} as pt2 ({str(error).splitlines()[0]})") from None


class Pt2Runner:
    """Runs a .pt2 file.

    Raises:
        ModelError: another device than the CPU. CheckpointError: not a program that `write` wrote.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if device.type != "cpu":
            raise ModelError(f"--device {device}: a pt2 engine runs on the CPU. Give --device cpu, or export to ONNX")
        check_archive(path)
        try:
            self.module = torch.export.load(path).module()
        except Exception as error:  # torch lets through whatever its parsers stumble on
            raise CheckpointError(f"{path} cannot be loaded ({_first_line(error)}). Export the model again") from None

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it on tensors of the CPU."""
        found = self.module(*inputs)
        return (found,) if isinstance(found, Tensor) else tuple(found)


def check_archive(path: Path) -> None:
    """Refuse a file that would run code of its own, or fill the memory, when torch loads it.

    Raises:
        CheckpointError: what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            reason = next(_objections(archive), None)
    except (zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError) as error:
        reason = f"it is no .pt2 file: {_first_line(error)}"
    if reason is not None:
        raise CheckpointError(f"{path} is refused: {reason}. Export the model again")


def _objections(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield what is wrong with an archive."""
    files = archive.infolist()
    if len({file.filename for file in files}) < len(files):
        yield "it holds two files of one name"
    for file in files:
        _, _, name = file.filename.partition("/")
        if file.compress_type != zipfile.ZIP_STORED:
            yield f"{name} in it is compressed"
        if name in _EMPTY_FILES and file.file_size == 0:
            continue
        if not _FILES.fullmatch(name):
            yield f"{name} in it is nothing that a program needs"
        if name.endswith(".json"):
            if file.file_size > MAX_TEXT:
                yield f"{name} in it has {file.file_size:,} bytes"
            yield from _foreign(json.loads(archive.read(file)))


def _foreign(value: Any) -> Iterator[str]:
    """Yield what a JSON text would have torch do beyond calling its own operators."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
            if value.get("use_pickle"):
                yield "it holds pickled objects"
            if "target" in value and "inputs" in value and not _CALLS.fullmatch(str(value["target"])):
                yield f"it calls {value['target']!r}"
            for name in ("expr_str", "source_fn_stack"):
                if name in value and not _EXPRESSION.fullmatch(str(value[name])):
                    yield f"it holds the expression {str(value[name])[:60]!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
