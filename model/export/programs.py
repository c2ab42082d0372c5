"""Graphs to torch.export programs, from which every format is made."""

import torch
from torch import Tensor

from .graphs import Graph
from .verify import TRACED


def to_program(graph: Graph) -> torch.export.ExportedProgram:
    """Trace a graph; its dynamic axes stay dynamic, and only the weights that it reads are in it."""
    sizes = {axis: min(TRACED[axis], graph.limits.get(axis, TRACED[axis])) for axis in graph.axes}
    axes = {axis: torch.export.Dim(axis, max=graph.limits.get(axis)) for axis in graph.axes}
    shapes = tuple(
        {place: axes[size] for place, size in enumerate(shape) if isinstance(size, str)}
        for shape in graph.inputs.values()
    )
    # With gradients on, image encoders do not cut their work into parts, whose number would depend on the images'.
    with torch.enable_grad():
        program = torch.export.export(graph.module, graph.example(sizes), dynamic_shapes=shapes)
    _drop_unread(program)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it names the folders of the machine that exported
    return program


def _drop_unread(program: torch.export.ExportedProgram) -> None:
    """Remove the weights of the model's other parts, which torch.export keeps as inputs that nothing reads."""
    inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    signature = program.graph_signature
    for spec in list(signature.input_specs):
        if spec.target is not None and not inputs[spec.arg.name].users:
            program.graph.erase_node(inputs[spec.arg.name])
            signature.input_specs.remove(spec)
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    program.graph_module.recompile()


def weight_bytes(program: torch.export.ExportedProgram) -> int:
    """Return the size of a program's weights and constants."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
