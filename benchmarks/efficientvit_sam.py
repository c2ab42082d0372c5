"""How fast is EfficientViT-SAM? The encoder against SAM ViT-H's and timm's; everything-mode; ratios of one run.

pip install -r benchmarks/requirements.txt
python -m benchmarks.efficientvit_sam --compile --onnx --vit_h
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tyro.conf import FlagCreatePairsOff, UseAppendAction

from benchmarks.inference import published_state, spread
from benchmarks.timing import machine_facts, report, take_turns
from configs.cli import parse
from model.checkpoints.load import build_model
from model.everything import MaskGenerator
from model.evf import EVFModel
from model.export import onnx
from model.export.graphs import build_graphs
from model.predictor import ImagePredictor
from model.registry import model_config
from model.segmenters.base import Segmenter
from utils.errors import run_main
from utils.precision import choose_device

PUBLISHED = {"l0": 762, "l1": 638, "l2": 538, "xl0": 278, "xl1": 182}
"""Images per second of the encoders on an A100 with TensorRT, fp16, batch 16 (mit-han-lab/efficientvit)."""


@dataclass(frozen=True)
class Args:
    """Measure EfficientViT-SAM: ratios taken side by side in one run."""

    only: UseAppendAction[tuple[Literal["encoders", "everything", "gpu"], ...]] = ()
    """Questions to answer; encoders and everything where none is given, gpu where the device is one."""
    model: str = "efficientvit-sam-l0"
    """Whose encoder is measured."""
    generator_model: str = "sam-vit-b"
    """Whose everything-mode is measured: a SAM, which the public generator can run too."""
    points_per_side: int = 16
    """Of everything-mode's grid."""
    rounds: int = 3
    """Turns of each candidate; the median counts."""
    threads: int = 2
    compile: FlagCreatePairsOff[bool] = False
    """Measure torch.compile too (minutes to compile)."""
    onnx: FlagCreatePairsOff[bool] = False
    """Measure ONNX Runtime too (needs requirements-dev.txt)."""
    vit_h: FlagCreatePairsOff[bool] = False
    """Measure SAM ViT-H's encoder too (a minute per turn on two cores)."""
    device: str = "cpu"
    output: Path = Path("output/benchmarks/efficientvit_sam.json")


def measure_encoders(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """Time one image through the encoder, in fp32; the first candidate is what the others are compared with."""
    torch.manual_seed(0)
    model = build_model(model_config(args.model)).to(device)
    spread(model.segmenter)
    side = model.config.segmenter.image_size
    pixels = torch.randn(1, 3, side, side, device=device)
    same, other = same_encoders(args, model, pixels), other_encoders(args, model, pixels)
    with torch.inference_mode():
        expected = same["eager"]()
        for name, run in same.items():
            if (run() - expected).abs().max() > 1e-3:
                raise RuntimeError(f"{name} differs from eager")
        seconds = take_turns(same | other, args.rounds, device)
    rows = []
    for name, value in seconds.items():
        row = {"question": f"{args.model} image encoder, fp32, {device.type}, batch 1", "name": name, "seconds": value,
               "times_as_fast_as_eager": seconds["eager"] / value}  # fmt: skip
        if name == "compiled":
            row["target"] = ">= 1.6"
        rows.append(row)
    return rows


def same_encoders(args: Args, model: EVFModel, pixels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the ways to run the image encoder of a model, each giving its embedding."""

    def copy() -> Segmenter:
        segmenter = build_model(model.config).segmenter.to(pixels.device)
        segmenter.load_state_dict(model.segmenter.state_dict())
        return segmenter

    last = copy().to(memory_format=torch.channels_last)
    candidates = {
        "eager": lambda: model.segmenter.encode_image(pixels).embedding,
        "channels_last": lambda: last.encode_image(pixels.to(memory_format=torch.channels_last)).embedding,
    }
    if args.compile:
        compiled = copy()
        compiled.compile_image_encoder()
        candidates["compiled"] = lambda: compiled.encode_image(pixels).embedding
    if args.onnx:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "image_encoder.onnx"
            onnx.write(build_graphs(model)[0], path)
            runner = onnx.OnnxRunner(path, pixels.device)
        candidates["ONNX Runtime"] = lambda: runner(pixels)[0]
    return candidates


def other_encoders(args: Args, model: EVFModel, pixels: Tensor) -> dict[str, Callable[[], Any]]:
    """Return what the image encoder of a model is compared with."""
    segmenter, config = model.segmenter, model.config.segmenter
    candidates: dict[str, Callable[[], Any]] = {
        "backbone alone, eager": lambda: run_stages(segmenter.image_encoder.backbone, pixels)
    }
    if config.kinds[-1] == "att5":
        stock = timm_backbone(config.depths).to(pixels.device)
        candidates["timm's EfficientVitLarge backbone, eager"] = lambda: stock.forward_features(pixels)
    if args.vit_h:
        huge = build_model(model_config("sam-vit-h")).segmenter.to(pixels.device)
        large = torch.randn(1, 3, 1024, 1024, device=pixels.device)
        candidates["SAM ViT-H"] = lambda: huge.encode_image(large)
    return candidates


def run_stages(stages: torch.nn.ModuleList, pixels: Tensor) -> Tensor:
    """Return what the last of some stages makes of images."""
    for stage in stages:
        pixels = stage(pixels)
    return pixels


def timm_backbone(depths: tuple[int, ...]) -> torch.nn.Module:
    """Return timm's own class with the same stages."""
    from timm.models.efficientvit_mit import EfficientVitLarge

    backbone = EfficientVitLarge(
        widths=(32, 64, 128, 256, 512), depths=depths, num_classes=0, head_widths=(64, 64), norm_eps=1e-6
    )
    return backbone.eval()


def measure_everything(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """Time everything-mode end to end, on one image of 640 x 480, against the public generator with the same weights.

    Random weights: the threshold of the predicted IoU lets 40 of 100 masks through or more, that of the stability all.
    """
    from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

    torch.manual_seed(0)
    model = build_model(model_config(args.generator_model)).to(device)
    spread(model.segmenter)
    public = sam_model_registry[args.generator_model.removeprefix("sam-").replace("-", "_")]().to(device)
    public.load_state_dict(published_state(model.segmenter, "sam"))
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    predictor = ImagePredictor(model)
    settings = {"points_per_side": args.points_per_side, "stability_score_thresh": 0.0, "box_nms_thresh": 0.99}
    scores = [row["predicted_iou"] for row in MaskGenerator(predictor, **settings, pred_iou_thresh=0.0).generate(image)]
    settings["pred_iou_thresh"] = float(np.quantile(scores, 0.6)) - 1e-4  # random weights may score many masks alike
    ours, theirs = MaskGenerator(predictor, **settings), SamAutomaticMaskGenerator(public, **settings)
    found = {}

    def run(name: str, generator: Any) -> None:
        found[name] = generator.generate(image)

    candidates = {
        "segment-anything's generator": lambda: run("public", theirs),
        "ours": lambda: run("ours", ours),
    }
    seconds = take_turns(candidates, args.rounds, device)
    counts = {name: len(masks) for name, masks in found.items()}
    if not counts["public"] or abs(counts["ours"] - counts["public"]) > max(2, 0.02 * counts["public"]):
        raise RuntimeError(f"the generators find different masks: {counts}")
    rows = []
    question = f"everything, {args.generator_model}, {args.points_per_side}^2 points, {device.type}"
    for (name, value), count in zip(seconds.items(), counts.values(), strict=True):
        row = {"question": question, "name": name, "seconds": value, "masks_per_second": count / value,
               "times_as_fast": next(iter(seconds.values())) / value}  # fmt: skip
        if name == "ours":
            row["target"] = "times_as_fast >= 1.5"
        rows.append(row)
    return rows


@torch.inference_mode()
def measure_gpu(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """Give images per second of every size in bf16, from pinned memory to the embedding."""
    rows = []
    for name, published in PUBLISHED.items():
        config = model_config(f"efficientvit-sam-{name}")
        segmenter = build_model(config).segmenter.to(device, torch.bfloat16).to(memory_format=torch.channels_last)
        if args.compile:
            segmenter.compile_image_encoder()
        side = config.segmenter.image_size
        for batch in (1, 16):
            pixels = torch.randn(batch, 3, side, side, dtype=torch.bfloat16)
            pixels = pixels.contiguous(memory_format=torch.channels_last).pin_memory()
            run = {name: lambda p=pixels, s=segmenter: s.encode_image(p.to(device, non_blocking=True))}
            value = take_turns(run, 10, device)[name]
            row = {"question": "images per second, bf16, transfer included", "name": f"{name}, batch {batch}",
                   "images_per_second": batch / value}  # fmt: skip
            rows.append(row | {"published_a100_fp16_tensorrt_batch_16": float(published)})
    return rows


def main() -> int:
    """Measure, print, write."""
    args = parse(Args, "benchmarks/efficientvit_sam.py")
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    questions = args.only or ("encoders", "everything", *(["gpu"] if device.type == "cuda" else []))
    start, rows = time.time(), []
    if "encoders" in questions:
        rows += measure_encoders(args, device)
    if "everything" in questions:
        rows += measure_everything(args, device)
    if "gpu" in questions:
        rows += measure_gpu(args, device)
    report(rows, args.output, machine_facts(args, device, start))
    return 0


if __name__ == "__main__":
    run_main(main)
