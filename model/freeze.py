"""What is trained and what stays: by part, as published, and without the weights that no gradient reaches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from configs.training import DataArgs, LossArgs, ModelArgs
from utils.errors import TrainingError

from .checkpoints.load import build_model
from .clip_step import ClipStep
from .evf import EVFModel
from .segmenters.base import PROMPT_WIDTH
from .types import EncoderOutput

TRAINED_DECODERS = frozenset({"sam", "efficient_sam", "efficientvit_sam", "ovsam"})
"""Families whose mask decoder and "no mask" prompt are trained; SAM-2 stays as it is (EVF-SAM, issue #45)."""

DEFAULT_LOSS, IMAGES = LossArgs(), DataArgs()
PROBED_FRAMES = 3
"""Of a clip: one is prompted, one remembers it, one remembers that which was not prompted."""


@dataclass(frozen=True)
class PartReport:
    """How many parameters of a part there are, are trained, and are asked for but get no gradient."""

    name: str
    total: int
    trained: int
    idle: int


def choose_trained(model: EVFModel, args: ModelArgs, data: DataArgs = IMAGES) -> None:
    """Set `requires_grad` of every parameter by part.

    Args:
        data: says whether it is trained on images or clips.

    Raises:
        TrainingError: the model has no encoder, or nothing would be trained.
    """
    if model.encoder is None:
        raise TrainingError(
            f"{model.config.name} has no encoder to train. Give a name such as evf-{model.config.name}-base"
        )
    with_decoder = model.config.family in TRAINED_DECODERS
    parts = {
        "image_encoder": args.train_image_encoder,
        "mask_decoder": with_decoder if args.train_mask_decoder is None else args.train_mask_decoder,
        "prompt_encoder": with_decoder if args.train_prompt_encoder is None else args.train_prompt_encoder,
        "memory": data.clip_frames > 0 if args.train_memory is None else args.train_memory,
    }
    model.requires_grad_(False)
    model.encoder.requires_grad_(args.train_encoder and not args.lora_rank)
    model.projector.requires_grad_(args.train_projector)
    for name, parameter in model.segmenter.named_parameters():
        parameter.requires_grad_(parts.get(model.segmenter.part_of(name), False))


@dataclass(frozen=True)
class Probe:
    """What one forward and backward tells of a model.

    * `idle`: name -> size of the parameters that were to be trained, but that no gradient reaches.
    * `outside`: names of parameters that are read without a call of the module that owns them.
    """

    idle: dict[str, int]
    outside: list[str]


def leave_out_idle(model: EVFModel, loss: LossArgs = DEFAULT_LOSS, data: DataArgs = IMAGES) -> Probe:
    """Take `requires_grad` from parameters that no gradient can reach, and return what was found.

    The last encoder layer computes one vector, so its text half is idle; so are the mask token and,
    unless the loss has a term for it, the IoU head. A loss without masks leaves out the whole segmenter.

    Raises:
        TrainingError: a term for the predicted IoU of a segmenter that predicts none.
    """
    if loss.iou and model.segmenter.masks_per_prompt == 1:
        raise TrainingError(f"{model.config.name} predicts no IoU of its masks: the loss cannot have iou {loss.iou:g}")
    return leave_out_unreached(model, partial(_run_all, loss=loss, data=data))


def leave_out_unreached(model: EVFModel, run: Callable[[EVFModel], Iterable[Tensor]]) -> Probe:
    """Take `requires_grad` from parameters that no gradient of what `run` returns can reach; return what was found.

    A copy of the model without storage finds them: one forward and backward of shapes alone.

    Args:
        run: a model on the meta device -> the tensors that a loss reads.
    """
    with torch.device("meta"):
        shapes = build_model(model.config)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in shapes.named_parameters():
        parameter.requires_grad_(name in names)
    called: set[str] = set()
    for name, module in shapes.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    sum(tensor.sum() for tensor in run(shapes)).backward()
    outside = [name for name, _ in shapes.named_parameters() if name.rpartition(".")[0] not in called]
    reached = {name for name, parameter in shapes.named_parameters() if parameter.grad is not None}
    idle = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in reached}
    for parameter in idle.values():
        parameter.requires_grad_(False)
    return Probe({name: parameter.numel() for name, parameter in idle.items()}, outside)


def _run_all(shapes: EVFModel, loss: LossArgs, data: DataArgs) -> list[Tensor]:
    """Return what a loss of phrases reads."""
    with torch.device("meta"):
        encoder, segmenter = shapes.encoder.image_spec.size, shapes.segmenter.image_spec.size
        pixels, small = torch.empty(1, 3, segmenter, segmenter), torch.empty(1, 3, encoder, encoder)
        ids = torch.empty(1, 4, dtype=torch.long)
    said, read = EncoderOutput(None), []
    if data.clip_frames:
        frames = min(data.clip_frames, PROBED_FRAMES)
        masks = torch.empty(1, frames, segmenter, segmenter, dtype=torch.uint8, device="meta")
        first = torch.zeros(1, dtype=torch.long, device="meta")
        clip = pixels[:, None].expand(-1, frames, -1, -1, -1)
        read.append(ClipStep(shapes, loss, data.clip_masks)(clip, small, ids, None, first, [masks]))
    elif loss.needs_masks:
        output = shapes(pixels, small, ids, **loss.asked())
        said, read = output.encoder, [output.logits, *([output.scores] if loss.iou else [])]
    elif loss.needs_encoder:
        said = shapes.encoder(small, ids, fused=loss.needs_fused, **loss.asked())
        read += [shapes.projector(said.vector)] if loss.prompt else []
    if loss.regions:
        segmenter = shapes.segmenter
        prompt = torch.empty(1, 1, PROMPT_WIDTH, device="meta")
        read.append(segmenter.decode(segmenter.encode_image(pixels), prompt).logits)
    return [tensor for tensor in (*read, said.fit, said.patches, said.words) if tensor is not None]


def part_of(model: EVFModel, name: str) -> str:
    """Return what a parameter of an `EVFModel` belongs to: `encoder`, `projector` or a part of the segmenter."""
    owner, _, rest = name.partition(".")
    return model.segmenter.part_of(rest) if owner == "segmenter" else owner


def report(model: EVFModel, idle: dict[str, int]) -> list[PartReport]:
    """Return one line per part, in the order of the model."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts = totals.setdefault(part_of(model, name), [0, 0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() * parameter.requires_grad
        counts[2] += idle.get(name, 0)
    return [PartReport(name, *counts) for name, counts in totals.items()]


def report_text(parts: list[PartReport]) -> str:
    """Return the report as a table."""
    rows = [f"{'part':16} {'parameters':>13} {'trained':>13} {'no gradient':>13}"]
    sums = PartReport("all", *(sum(getattr(part, field) for part in parts) for field in ("total", "trained", "idle")))
    rows += [f"{part.name:16} {part.total:13,} {part.trained:13,} {part.idle:13,}" for part in (*parts, sums)]
    return "\n".join(rows)
