"""How fast is inference? Encoders against the public packages, phrases per image, loading, memory; ratios of one run.

pip install -r benchmarks/requirements.txt
python -m benchmarks.inference
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tyro.conf import FlagCreatePairsOff, UseAppendAction

from benchmarks.timing import machine_facts, report, take_turns
from configs.cli import parse
from model import load_model, save_model
from model.checkpoints.evf_sam import SEGMENTERS
from model.checkpoints.load import build_model
from model.checkpoints.rules import KeyMap, Section, named_tensors
from model.predictor import build_predictor
from model.registry import model_config
from utils.errors import run_main
from utils.precision import DTYPES, choose_device
from utils.tokenizer import PhraseTokenizer

TOKENIZER = Path("assets/tokenizer")
PHRASES = [f"the {size} {thing}" for size in ("big", "small", "red", "left") for thing in ("cat", "dog", "cup", "car")]


@dataclass(frozen=True)
class Args:
    """Measure inference: ratios taken side by side in one run."""

    only: UseAppendAction[tuple[Literal["encoders", "phrases", "loading", "agreement"], ...]] = ()
    """Questions to answer; all where none is given. `agreement` compares a GPU with the CPU."""
    precision: UseAppendAction[tuple[Literal["fp32", "bf16", "fp16"], ...]] = ()
    """Types to measure; fp32 and bf16 where none is given."""
    rounds: int = 3
    """Turns of each candidate; the median counts."""
    threads: int = 2
    compile: FlagCreatePairsOff[bool] = False
    """Measure torch.compile too (minutes to compile)."""
    device: str = "cpu"
    loading_model: str = "evf-sam-vit-b-base"
    loading_folder: Path | None = None
    """Where the checkpoint of the loading question is written; by default the system's temporary folder."""
    output: Path = Path("output/benchmarks/inference.json")


def published_state(model: nn.Module, family: str) -> dict[str, torch.Tensor]:
    """Return a segmenter's tensors under their published names."""
    tensors = {f"segmenter.{name}": tensor for name, tensor in named_tensors(model).items()}
    key_map = KeyMap(tensors, (Section("segmenter.", "", SEGMENTERS[family].plain),))
    return {
        their: tensors[name] if len(theirs) == 1 else tensors[name][i : i + 1]
        for name, theirs in key_map.theirs.items()
        for i, their in enumerate(theirs)
    }


def public_sam(state: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the image encoder of the segment-anything package."""
    from segment_anything import sam_model_registry

    model = sam_model_registry["vit_b"]()
    model.load_state_dict(state)
    return model.image_encoder.eval()


def public_sam2(state: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the image encoder of the sam2 package, without the position tables that only video reads."""
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    trunk = Hiera(embed_dim=96, num_heads=1, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9),
                  window_pos_embed_bkg_spatial_size=(7, 7))  # fmt: skip
    neck = FpnNeck(PositionEmbeddingSine(256), 256, [768, 384, 192, 96], fpn_top_down_levels=[2, 3],
                   fpn_interp_model="nearest")  # fmt: skip
    encoder = ImageEncoder(trunk, neck, scalp=1).eval()
    prefix = "image_encoder."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return encoder


def measure_encoders(args: Args, precision: str, device: torch.device) -> list[dict[str, Any]]:
    """Time one 1024-pixel image through each image encoder."""
    rows = []
    targets = {"sam-vit-b": ("0.72", "0.60"), "sam2-hiera-tiny": ("1.00", "0.85")}
    for name, make_public in (("sam-vit-b", public_sam), ("sam2-hiera-tiny", public_sam2)):
        torch.manual_seed(0)
        config = model_config(name)
        ours = spread(build_model(config).segmenter)
        stock = build_model(config, library_attention=True).segmenter
        stock.load_state_dict(ours.state_dict())
        public = make_public(published_state(ours, config.family))
        modules = [module.to(device, DTYPES[precision]) for module in (public, stock, ours)]
        pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
        pixels = pixels.to(device, DTYPES[precision])
        library = stock.image_encoder if config.family == "sam" else stock.sam2.vision_encoder
        candidates = {
            "public package": lambda m=modules[0], p=pixels: m(p),
            "stock transformers (sdpa)": lambda m=library, p=pixels: m(p),
            "ours": lambda m=modules[2], p=pixels: m.encode_image(p),
        }
        if args.compile:
            compiled = torch.compile(modules[2].encode_image, dynamic=False)
            candidates["ours, compiled"] = lambda run=compiled, p=pixels: run(p)
        with torch.inference_mode():
            check_agreement(candidates, config.family, precision)
            seconds = take_turns(candidates, args.rounds, device)
        for candidate, value in seconds.items():
            row = {"question": f"{name} image encoder, {precision}, {device.type}", "name": candidate,
                   "seconds": value, "ratio": value / seconds["public package"]}  # fmt: skip
            if candidate.startswith("ours") and precision == "fp32" and device.type == "cpu":
                row["target"] = f"<= {targets[name]['compiled' in candidate]}"
            rows.append(row)
    return rows


def spread(module: nn.Module) -> nn.Module:
    """Give parameters that start at zero (position tables) values, so that a wrong result would show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return module


def check_agreement(candidates: dict[str, Callable[[], Any]], family: str, precision: str) -> None:
    """Fail where a candidate computes something else than the public package."""
    embeddings = {}
    for name, run in candidates.items():
        result = run()
        if name == "public package":
            embedding = result if family == "sam" else result["vision_features"]
        elif name.startswith("stock"):
            embedding = result.last_hidden_state if family == "sam" else result.fpn_hidden_states[-1]
        else:
            embedding = result.embedding
        embeddings[name] = embedding.float()
    public = embeddings["public package"]
    for name, embedding in embeddings.items():
        if family == "sam2" and name.startswith("ours"):
            embedding = embedding - (embedding - public).mean((0, 2, 3), keepdim=True)  # ours adds no_mem_embed
        error = float((embedding - public).norm() / public.norm())
        if error > (1e-4 if precision == "fp32" else 0.1):
            raise RuntimeError(f"{name} differs from the public package by {error:.2e}")


def measure_phrases(args: Args, precision: str, device: torch.device) -> list[dict[str, Any]]:
    """Time K phrases on one image against K separate calls that encode the image each time."""
    rows = []
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    for name in ("evf-sam-vit-b-base", "evf-sam2-hiera-tiny-base"):
        torch.manual_seed(0)
        model = load_model(name, pretrained=False).to(device, DTYPES[precision])
        predictor = build_predictor(model, PhraseTokenizer(TOKENIZER))

        def together(count: int, predictor: Any = predictor) -> None:
            predictor.set_image(image)
            predictor.predict(PHRASES[:count])

        seconds = take_turns({str(k): lambda k=k: together(k) for k in (1, 4, 16)}, args.rounds, device)
        for count, value in seconds.items():
            row = {"question": f"{name}: K phrases on one image, {precision}, {device.type}", "name": f"K = {count}",
                   "seconds": value, "ratio_to_one": value / seconds["1"],
                   "ratio_to_separate_calls": value / (seconds["1"] * int(count))}  # fmt: skip
            if count == "16" and name == "evf-sam-vit-b-base" and precision == "fp32":
                row["target"] = "ratio_to_one <= 3"
            rows.append(row)
    return rows


LOADERS = {
    "safetensors load_file, every byte read": (
        "from safetensors.torch import load_file; state = load_file(path + '/model.safetensors');"
        "total = sum(float(t.sum()) for t in state.values())"
    ),
    "ours, every byte read": (
        "state = load_model(path); total = sum(float(t.detach().sum()) for t in state.state_dict().values())"
    ),
    "safetensors load_file, cast to bf16": (
        "from safetensors.torch import load_file; state = load_file(path + '/model.safetensors');"
        "state = {name: t.to(torch.bfloat16) for name, t in state.items()}"
    ),
    "ours, cast to bf16": "state = load_model(path, dtype=torch.bfloat16)",
}
CHILD = """
import time, torch
torch.set_num_threads({threads})
from model import load_model
from model.segmenters import sam, sam2
path = {path!r}
def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1e6
before, start = peak(), time.perf_counter()
{code}
print(time.perf_counter() - start, peak() - before)
"""


def measure_loading(args: Args) -> list[dict[str, Any]]:
    """Time loading in fresh processes, from the page cache and from the disk, and the growth of the peak memory.

    Linux only: the peak is VmHWM, and `posix_fadvise` drops the file from the page cache.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=args.loading_folder) as folder:
        torch.manual_seed(0)
        model = load_model(args.loading_model, pretrained=False)
        save_model(model, folder, TOKENIZER)
        gigabytes = sum(t.nbytes for t in named_tensors(model).values()) / 1e9
        del model
        for place in ("page cache", "disk"):
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in LOADERS}
            for _ in range(args.rounds + 1):
                for name, code in LOADERS.items():
                    if place == "disk":
                        drop_from_cache(Path(folder) / "model.safetensors")
                    child = CHILD.format(threads=args.threads, path=folder, code=code)
                    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
                    found[name].append(tuple(map(float, done.stdout.split())))
            medians = {name: np.median(np.array(values[1:]), axis=0) for name, values in found.items()}
            for name, (seconds, peak) in medians.items():
                is_cast = "bf16" in name
                baseline = medians[list(LOADERS)[2 * is_cast]][0]
                row = {"question": f"{args.loading_model}: loading {gigabytes:.2f} GB from the {place}", "name": name,
                       "seconds": float(seconds), "ratio": float(seconds / baseline),
                       "peak_over_model_size": float(peak / gigabytes * (1 + is_cast))}  # fmt: skip
                if name.startswith("ours"):
                    row["target"] = "ratio <= 1.5, peak <= 1.3"
                rows.append(row)
    return rows


def drop_from_cache(path: Path) -> None:
    """Write a file's pages out and drop them from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_agreement(device: torch.device) -> list[dict[str, Any]]:
    """Compare masks on a GPU in each precision with fp32 on the CPU, and time an image."""
    rows = []
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    for name in ("evf-sam-vit-b-base", "evf-sam2-hiera-tiny-base", "evf-effi-sam-b"):
        torch.manual_seed(0)
        model = spread(load_model(name, pretrained=False))
        tokenizer = PhraseTokenizer(TOKENIZER)
        exact = build_predictor(model, tokenizer)
        exact.set_image(image)
        golden = exact.predict(PHRASES[:4])
        for precision, dtype in DTYPES.items():
            predictor = build_predictor(model.to(device, dtype), tokenizer)
            predictor.set_image(image)
            masks = predictor.predict(PHRASES[:4]).masks
            overlap = float((masks & golden.masks).sum() / max(1, (masks | golden.masks).sum()))
            seconds = take_turns({"image": lambda p=predictor: p.set_image(image)}, 10, device)["image"]
            rows.append({"question": f"{device.type} against the CPU in fp32", "name": f"{name}, {precision}",
                         "mask_iou": overlap, "milliseconds_per_image": 1000 * seconds})  # fmt: skip
            model = model.to("cpu", torch.float32)
    return rows


def main() -> int:
    """Measure, print, write."""
    args = parse(Args, "benchmarks/inference.py")
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    questions = args.only or ("encoders", "phrases", "loading")
    start, rows = time.time(), []
    for precision in args.precision or ("fp32", "bf16"):
        if "encoders" in questions:
            rows += measure_encoders(args, precision, device)
        if "phrases" in questions:
            rows += measure_phrases(args, precision, device)
    if "loading" in questions:
        rows += measure_loading(args)
    if "agreement" in questions:
        rows += measure_agreement(device)
    report(rows, args.output, machine_facts(args, device, start))
    return 0


if __name__ == "__main__":
    run_main(main)
