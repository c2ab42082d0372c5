"""The work of export.py: a model to a folder of graphs, each checked against the model, all or nothing."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.export import ExportArgs
from utils.errors import MissingPackageError, ModelError
from utils.files import atomic_folder, write_json
from utils.tokenizer import find_tokenizer

from ..checkpoints.load import config_to_json, fill_model, resolve
from ..evf import EVFModel
from . import onnx, pt2, tensorrt
from .engine import DESCRIPTION, FORMAT, VERSION, runner_of, sha256
from .graphs import Graph, build_graphs
from .verify import Difference, Runner, check, table


def run(args: ExportArgs) -> str:
    """Do what the options say and return what was seen, as lines of text.

    Raises:
        TextSAMError: nothing was written.
    """
    folder = Path(args.out)
    check_args(args, folder)
    source = resolve(args.version)
    tokenizer = None if source.config.encoder is None else find_tokenizer(source.path)
    model = fill_model(source, torch.device("cpu"), torch.float32)
    graphs = build_graphs(model, args.single_mask)
    runtime = "onnx" if args.format == "tensorrt" and not tensorrt.is_installed() else args.format
    with atomic_folder(folder) as temporary:
        found = write_engine(model, graphs, temporary, args, runtime, tokenizer)
    if runtime != args.format:
        commands = " && ".join(tensorrt.command(graph, folder) for graph in graphs)
        raise MissingPackageError(
            f"tensorrt is not installed, so {folder} holds checked ONNX graphs. Build them where it is: {commands}. "
            "Or pip install tensorrt, and give --overwrite"
        )
    return f"{table(found, args.tolerance)}\n{source.config.name} written to {folder}"


def check_args(args: ExportArgs, folder: Path) -> None:
    """Refuse options that cannot work before anything is loaded.

    Raises:
        TextSAMError: which one and why.
    """
    if args.tolerance <= 0:
        raise ModelError(f"--tolerance {args.tolerance}: needed is a positive number, such as 1e-4")
    file = next((path for path in folder.parents if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ModelError(f"--out {folder}: {file} is a file. Give a folder")
    if folder.exists():
        is_ours = folder.is_dir() and ((folder / DESCRIPTION).is_file() or not any(folder.iterdir()))
        if not is_ours:
            raise ModelError(f"--out {folder} exists and is not an engine. Give another folder")
        if not args.overwrite and any(folder.iterdir()):
            raise ModelError(f"--out {folder} exists. Give another folder, or replace it with --overwrite")
    if args.format != "pt2":
        onnx.require(["onnx", "onnxscript", "onnxruntime"], f"--format {args.format}")


def write_engine(
    model: EVFModel, graphs: list[Graph], folder: Path, args: ExportArgs, runtime: str, tokenizer: Path | None
) -> list[Difference]:
    """Write every graph, check it as it was written, and describe it all in engine.json.

    Args:
        graphs: of the model.
        folder: exists and is empty.
        runtime: what the graphs are written for.
        tokenizer: file of a model that reads phrases.

    Raises:
        ModelError: a graph cannot be written, or differs from the model.
    """
    found = []
    for graph in graphs:
        path = folder / f"{graph.name}.{runtime}"
        found += check(graph, _write(graph, path, runtime), args.tolerance, _limits(graph, runtime))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    description = describe(model, graphs, args, runtime)
    description["tokenizer"] = tokenizer and tokenizer.name
    description["files"] = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    description["tolerance"], description["differences"] = args.tolerance, [one.as_json() for one in found]
    write_json(folder / DESCRIPTION, description)
    return found


def _write(graph: Graph, path: Path, runtime: str) -> Runner:
    """Write one graph and return what runs it as it was written."""
    if runtime == "tensorrt":
        tensorrt.write(graph, path)
        return tensorrt.TensorRTRunner(path, graph)
    writer = onnx.write if runtime == "onnx" else pt2.write
    writer(graph, path)
    return runner_of(runtime, path, torch.device("cpu"))


def _limits(graph: Graph, runtime: str) -> dict[str, int]:
    return tensorrt.limits(graph) if runtime == "tensorrt" else {}


def describe(model: EVFModel, graphs: list[Graph], args: ExportArgs, runtime: str) -> dict[str, Any]:
    """Return what engine.json says of a model and its graphs; files and what was seen are added to it."""
    segmenter = model.segmenter
    spec = segmenter.own_image_spec if model.encoder is None else segmenter.image_spec
    config = config_to_json(model.config)
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": config["name"],
        "runtime": runtime,
        "torch": torch.__version__,
        "single_mask": args.single_mask,
        "image": asdict(spec),
        "prompt_frame": segmenter.prompt_spec(spec).size,
        "encoder_image": None if model.encoder is None else asdict(model.encoder.image_spec),
        "graphs": {
            graph.name: {
                "file": f"{graph.name}.{runtime}",
                "inputs": {name: list(shape) for name, shape in graph.inputs.items()},
                "outputs": {name: list(shape) for name, shape in graph.outputs.items()},
                "limits": {**graph.limits, **_limits(graph, runtime)},
            }
            for graph in graphs
        },
        "model": config["model"],
    }
