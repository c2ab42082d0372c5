"""ONNX files: written by torch's exporter, run by ONNX Runtime."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import CheckpointError, MissingPackageError, ModelError

from .graphs import Graph
from .programs import to_program, weight_bytes

OPSET = 20
"""Of the ONNX operators: the first with GELU."""
ONE_FILE = 1_900_000_000
"""Bytes of weights above which they go to a file of their own; protobuf ends at 2 GiB."""


def require(packages: Sequence[str], what: str) -> None:
    """Fail early where an optional package is absent.

    Raises:
        MissingPackageError: names the pip line.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise MissingPackageError(f"{what} needs {' and '.join(missing)}. Install: pip install {names}")


def write(graph: Graph, path: Path) -> None:
    """Write a graph as an ONNX file, its weights beside it as <file>.data where they are too large for one.

    The exporter over torch.export is used: unlike the TorchScript one, which is deprecated, it says which axes are
    dynamic, and fails where it would have to fix one.

    Raises:
        MissingPackageError: onnx or onnxscript is absent. ModelError: the exporter fails.
    """
    require(["onnx", "onnxscript"], "export to ONNX")
    program = to_program(graph)
    large = weight_bytes(program) > ONE_FILE
    try:
        with _quiet():
            onnx_program = torch.onnx.export(
                program,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            onnx_program.rename_axes(_axis_names(graph, onnx_program))
            onnx_program.save(path, external_data=large)
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(f"torch cannot write {graph.name} as ONNX ({str(error).splitlines()[0]})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of every node, and its warnings of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _axis_names(graph: Graph, onnx_program: "torch.onnx.ONNXProgram") -> dict[str, str]:
    """Return the exporter's name of each dynamic axis -> ours."""
    names = {}
    for value, shape in zip(onnx_program.model.graph.inputs, graph.inputs.values(), strict=True):
        names |= {str(value.shape[place]): size for place, size in enumerate(shape) if isinstance(size, str)}
    return names


class OnnxRunner:
    """Runs an ONNX file.

    Args:
        device: `cpu`, or `cuda` where ONNX Runtime is the GPU build.

    Raises:
        MissingPackageError: onnxruntime is absent. ModelError: it cannot use the device.
        CheckpointError: the file is not an ONNX graph.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        require(["onnxruntime"], "an ONNX engine")
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import (
            Fail,
            InvalidArgument,
            InvalidGraph,
            InvalidProtobuf,
            NoSuchFile,
            NotImplemented,
        )

        provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise ModelError(
                f"--device {device}: this ONNX Runtime has no {provider}. Install onnxruntime-gpu, or give --device cpu"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile, NotImplemented) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} cannot be loaded ({reason}). Export the model again") from None
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it on tensors of the CPU."""
        given = {name: tensor.contiguous().numpy() for name, tensor in zip(self.names, inputs, strict=True)}
        return tuple(torch.from_numpy(array) for array in self.session.run(None, given))
