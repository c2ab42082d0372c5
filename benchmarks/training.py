"""How fast is a training step? The published structure against ours without and with the feature cache, in one run.

python -m benchmarks.training

The published structure is rebuilt here on the same weights: images encoded one by one (SAM) with the library's
attention and whole blocks at once, the encoder's image repeated per phrase, plain matrix-and-softmax attention over the
tokens of all layers, the mask decoder image by image, the loss mask by mask, plain AdamW.
"""

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from tyro.conf import UseAppendAction

from benchmarks.timing import report, take_turns
from configs.cli import parse
from configs.training import LossArgs, ModelArgs, OptimArgs
from datasets.collate import Collate
from datasets.sample import Batch, Sample
from model.checkpoints.load import build_model
from model.freeze import choose_trained, leave_out_idle
from model.losses import mask_losses
from model.registry import model_config
from model.training import BatchInputs, TrainingStep, open_cache, optimizer_groups
from utils.engine import AccelerateEngine, OptimizerSettings
from utils.errors import run_main
from utils.precision import choose_device
from utils.tokenizer import PhraseTokenizer

TARGETS = {"evf-sam2-hiera-tiny-base": (1.3, 2.5), "evf-sam-vit-b-base": (1.3, 5.0)}
"""Model -> how many times faster than the published structure: without and with the feature cache."""

PHRASES = ("the zebra on the left", "a big zebra behind the other one", "zebra")


@dataclass(frozen=True)
class Args:
    """Measure training steps: ratios taken side by side in one run."""

    model: UseAppendAction[tuple[str, ...]] = ()
    """Models to measure; SAM-2 Hiera-T and SAM ViT-B with BEiT-3 base where none is given."""
    images: int = 2
    rounds: int = 3
    """Turns of each candidate; the median counts."""
    threads: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    output: Path = Path("output/benchmarks/training.json")


def make_samples(count: int) -> list[Sample]:
    """Return photograph-sized images with three phrases each."""
    generator = np.random.default_rng(0)
    masks = np.zeros((len(PHRASES), 480, 640), np.uint8)
    masks[:, 100:300, 200:400] = 1
    images = generator.integers(0, 256, (count, 480, 640, 3), np.uint8)
    names = tuple(map(str, range(len(PHRASES))))
    return [Sample(image, PHRASES, names, masks, str(i), i) for i, image in enumerate(images)]


def plain_attend(query: Tensor, key: Tensor, value: Tensor, heads: int, padding: Tensor | None = None) -> Tensor:
    """Attention as torchscale writes it: logits, softmax and weighted sum one after the other."""
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if padding is not None:
        logits = logits.masked_fill(padding[:, None, None], float("-inf"))
    return (logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2).flatten(2)


class PublishedStep(TrainingStep):
    """The same losses, computed as the published training forward does."""

    def forward(
        self, image: Tensor, encoder_pixels: Tensor, ids: Tensor, padding: Tensor, image_index: Tensor, masks: Any
    ) -> Tensor:
        """Return float32 [N, 2]; see `TrainingStep.forward`."""
        model, segmenter = self.model, self.model.segmenter
        parts = image.split(1) if model.config.family != "sam2" else [image]
        with mock.patch("model.segmenters.base.PART_BYTES", 1 << 50):  # whole blocks at once
            encoded = [self.encode_images(part) for part in parts]
        features = (
            [encoded[i] for i in range(len(image))] if len(encoded) > 1 else [encoded[0][i] for i in range(len(image))]
        )
        if padding is None:
            padding = torch.zeros_like(ids, dtype=torch.bool)
        with mock.patch("model.encoders.beit3.attend", plain_attend):
            fused, _ = model.encoder.forward_all(encoder_pixels[image_index], ids, padding)
        prompts = model.projector(fused[:, 0])
        losses = []
        for i, truth in enumerate(masks):
            own = prompts[image_index == i][:, None]
            prediction = segmenter.decode(features[i], own, None, torch.zeros(len(own), dtype=torch.long))
            logits, _ = prediction.chosen(segmenter.select(prediction))
            full = segmenter.postprocess(logits, [tuple(truth.shape[-2:])], torch.zeros(len(own), dtype=torch.long))[0]
            losses += [mask_losses(full[k : k + 1], truth[k : k + 1]) for k in range(len(own))]
        return torch.cat(losses)


def published_step(name: str, device: torch.device, batch: Batch) -> Callable[[], None]:
    """Return one optimizer step of the published structure."""
    config = model_config(name)
    options = {} if config.family == "efficient_sam" else {"library_attention": True}
    model = build_model(config, **options)
    choose_trained(model, ModelArgs())
    step = PublishedStep(model.to(device).train(), LossArgs())
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-6)
    inputs = BatchInputs(step)

    def run() -> None:
        step(*inputs(batch)).mean(0).sum().backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def our_step(
    name: str, args: Args, device: torch.device, samples: list[Sample], cache: str | None
) -> Callable[[], None]:
    """Return one optimizer step of the trainer's engine; with a cache folder the features are there already."""
    model = build_model(model_config(name))
    choose_trained(model, ModelArgs())
    leave_out_idle(model)
    step = TrainingStep(model, LossArgs())
    optim = OptimArgs(lr=1e-6, precision=args.precision)
    store = open_cache(step, cache, args.precision)
    settings = OptimizerSettings(optimizer_groups(step, optim), optim.betas, optim.clip, args.precision)
    engine = AccelerateEngine(step.train(), settings, device)
    inputs, collate = BatchInputs(step, store), make_collate(model, store)
    if store:
        with torch.no_grad(), engine.autocast():
            inputs(collate(samples).to(device))
    batch = collate(samples).to(device)

    def run() -> None:
        with engine.autocast():
            arguments = inputs(batch)
        engine.accumulate(arguments, lambda losses: losses.mean(0).sum(), True)
        engine.update(1.0)

    return run


def make_collate(model: Any, cache: Any = None) -> Collate:
    """Return how samples become batches, with the small tokenizer of the repository."""
    words = PhraseTokenizer("assets/tokenizer")
    return Collate(model.segmenter.image_spec.for_evaluation(), model.encoder.image_spec, words, cache)


def main() -> int:
    """Measure and write."""
    args = parse(Args, "benchmarks/training.py")
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    rows = []
    for name in args.model or tuple(TARGETS):
        samples = make_samples(args.images)
        with torch.device("meta"):
            shapes = build_model(model_config(name))
        batch = make_collate(shapes)(samples).to(device)
        with tempfile.TemporaryDirectory() as folder:
            candidates = {
                "published structure": published_step(name, device, batch),
                "ours": our_step(name, args, device, samples, None),
                "ours, cached features": our_step(name, args, device, samples, folder),
            }
            seconds = take_turns(candidates, args.rounds, device)
        del candidates
        slow, phrases = seconds["published structure"], args.images * len(PHRASES)
        plain, cached = TARGETS.get(name, (None, None))
        targets = {"ours": plain, "ours, cached features": cached} if plain else {}
        for candidate, value in seconds.items():
            row = {"question": f"{name}, {args.images} images x {len(PHRASES)} phrases, {args.precision}"}
            row |= {"name": candidate, "seconds": value, "phrases/s": phrases / value, "times faster": slow / value}
            rows.append(row | ({"target": f"{targets[candidate]}x"} if candidate in targets else {}))
    facts = {"torch": torch.__version__, "threads": args.threads, "cpus": os.cpu_count(), "machine": platform.machine()}
    report(rows, args.output, facts)
    return 0


if __name__ == "__main__":
    run_main(main)
