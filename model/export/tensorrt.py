"""TensorRT plans, built from the ONNX files; they run on the kind of GPU that they were built on.

Building needs a GPU. `trtexec` says the same on the command line where the Python package is absent.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import ModelError

from . import onnx
from .graphs import BATCH, IMAGES, PHRASES, POINTS, TOKENS, Graph

SUFFIX = "tensorrt"
PROFILES: Mapping[str, Mapping[str, tuple[int, int, int]]] = {
    "image_encoder": {BATCH: (1, 4, 4)},
    "fusion": {IMAGES: (1, 1, 4), PHRASES: (1, 4, 16), TOKENS: (3, 16, 62)},
    "decoder": {BATCH: (1, 16, 16), POINTS: (1, 2, 2), IMAGES: (1, 1, 4), PHRASES: (1, 4, 16)},
}
"""Graph -> dynamic axis -> smallest, usual and largest size; those of a decoder of points are the published ones."""


def is_installed() -> bool:
    """Return whether TensorRT's Python package can be found."""
    return importlib.util.find_spec("tensorrt") is not None


def limits(graph: Graph) -> dict[str, int]:
    """Return the largest size of each dynamic axis that a plan takes."""
    return {axis: PROFILES[graph.name][axis][2] for axis in graph.axes}


def shapes(graph: Graph) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the smallest, usual and largest shape of each input with a dynamic axis."""
    profile = PROFILES[graph.name]
    return {
        name: tuple(
            tuple(profile[size][which] if isinstance(size, str) else size for size in shape) for which in range(3)
        )
        for name, shape in graph.inputs.items()
        if any(isinstance(size, str) for size in shape)
    }


def command(graph: Graph, folder: Path) -> str:
    """Return the trtexec command that builds a graph from its ONNX file in `folder`."""
    found = shapes(graph)
    options = [f"--onnx={folder / graph.name}.onnx"]
    for which, kind in enumerate(("min", "opt", "max")):
        texts = (f"{name}:{'x'.join(map(str, sizes[which]))}" for name, sizes in found.items())
        options.append(f"--{kind}Shapes={','.join(texts)}")
    return " ".join(["trtexec", *options, "--noTF32", f"--saveEngine={folder / graph.name}.{SUFFIX}"])


def write(graph: Graph, path: Path) -> None:
    """Write a graph as a TensorRT plan, in full float32: TF32 has three digits.

    Raises:
        ModelError: TensorRT cannot build it, for instance without a GPU.
    """
    import tensorrt

    source = path.with_suffix(".onnx")
    onnx.write(graph, source)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    try:
        builder = tensorrt.Builder(logger)
        network = builder.create_network(0)
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(source)):
            raise ModelError(f"TensorRT cannot read {graph.name}: {_one_line(parser.get_error(0))}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.clear_flag(tensorrt.BuilderFlag.TF32)
        for name, sizes in shapes(graph).items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    except (RuntimeError, TypeError) as error:  # the bindings raise TypeError where the library returns nothing
        raise ModelError(f"TensorRT cannot build {graph.name} ({_one_line(error)}). Is there a GPU?") from None
    finally:
        for file in (source, source.with_name(source.name + ".data")):
            file.unlink(missing_ok=True)
    if plan is None:
        raise ModelError(f"TensorRT cannot build {graph.name}; it said why above")
    path.write_bytes(plan)


class TensorRTRunner:
    """Runs a plan on the GPU, for the check after it was built.

    Raises:
        ModelError: TensorRT cannot load it.
    """

    def __init__(self, path: Path, graph: Graph) -> None:
        import tensorrt

        self.runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise ModelError(f"TensorRT cannot load {path}, which it has just built")
        self.context, self.graph = self.engine.create_execution_context(), graph

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it on tensors of the CPU."""
        device = torch.device("cuda")
        given = dict(zip(self.graph.inputs, (tensor.contiguous().to(device) for tensor in inputs), strict=True))
        for name, tensor in given.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        found = [torch.empty(tuple(self.context.get_tensor_shape(name)), device=device) for name in self.graph.outputs]
        for name, tensor in zip(self.graph.outputs, found, strict=True):
            self.context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        self.context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return tuple(tensor.cpu() for tensor in found)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
