"""Whether a graph as written says what the model says."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import ModelError

from .graphs import BATCH, IMAGES, PHRASES, POINTS, TOKENS, Graph

TRACED = {BATCH: 2, POINTS: 4, IMAGES: 2, PHRASES: 3, TOKENS: 7}
"""Sizes of the inputs that a graph is traced with; all of one graph differ, and none is 1, which would become fixed."""
CHECKED = (
    {BATCH: 1, POINTS: 1, IMAGES: 1, PHRASES: 1, TOKENS: 3},
    {BATCH: 2, POINTS: 2, IMAGES: 2, PHRASES: 2, TOKENS: 9},
    {BATCH: 2, POINTS: 1, IMAGES: 1, PHRASES: 3, TOKENS: 16},
    {BATCH: 3, POINTS: 3, IMAGES: 2, PHRASES: 5, TOKENS: 6},
)
"""Sizes of those that it is checked with."""

Runner = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Difference:
    """The largest difference of one output, for inputs of given sizes, and the largest value there was."""

    graph: str
    output: str
    sizes: dict[str, int]
    difference: float
    largest: float

    def as_json(self) -> dict[str, Any]:
        """Return it for engine.json."""
        return asdict(self)


@torch.inference_mode()
def check(graph: Graph, runner: Runner, tolerance: float, limits: Mapping[str, int] | None = None) -> list[Difference]:
    """Compare a graph with its module on inputs of several sizes.

    Args:
        runner: runs the graph as it was written.
        tolerance: largest absolute difference allowed.
        limits: dynamic axis -> largest size that the runner takes, beside the graph's own.

    Raises:
        ModelError: it differs by more, in shape, or is not a number.
    """
    found = []
    for sizes in _cases(graph, {**graph.limits, **(limits or {})}):
        inputs = graph.example(sizes)
        expected = graph.module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        given = runner(*inputs)
        for name, one, other in zip(graph.outputs, expected, given, strict=True):
            found.append(_compare(graph.name, name, sizes, one, other, tolerance))
    return found


def table(found: list[Difference], tolerance: float) -> str:
    """Return the largest difference of each output as lines of text."""
    worst: dict[tuple[str, str], Difference] = {}
    for one in found:
        key = (one.graph, one.output)
        if key not in worst or one.difference > worst[key].difference:
            worst[key] = one
    lines = [f"{'graph':<14} {'output':<18} {'difference':>10} {'of up to':>9}   worst of the sizes"]
    for one in worst.values():
        sizes = " ".join(f"{axis}={size}" for axis, size in one.sizes.items())
        lines.append(f"{one.graph:<14} {one.output:<18} {one.difference:>10.1e} {one.largest:>9.3g}   {sizes}")
    return "\n".join([*lines, f"allowed: {tolerance:g}"])


def _cases(graph: Graph, limits: Mapping[str, int]) -> list[dict[str, int]]:
    axes = graph.axes
    cases = [{axis: min(case[axis], limits.get(axis, case[axis])) for axis in axes} for case in CHECKED]
    return [case for number, case in enumerate(cases) if case not in cases[:number]]


def _compare(
    graph: str, name: str, sizes: dict[str, int], expected: Tensor, given: Tensor, tolerance: float
) -> Difference:
    described = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    if given.shape != expected.shape or given.dtype != expected.dtype:
        raise ModelError(
            f"{graph} returns {name} as {given.dtype} {list(given.shape)} where the model returns {expected.dtype} "
            f"{list(expected.shape)} ({described}). Nothing was written"
        )
    difference = (given - expected).abs().max().item()
    if not difference <= tolerance:  # also where it is not a number
        raise ModelError(
            f"{graph} differs from the model by {difference:.2g} in {name} ({described}), allowed are {tolerance:g}. "
            "Nothing was written; allow more with --tolerance"
        )
    return Difference(graph, name, sizes, difference, expected.abs().max().item())
