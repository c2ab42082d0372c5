"""How fast are videos, and how much memory do they take? Against the library's session and the public package.

pip install -r benchmarks/requirements.txt
python -m benchmarks.video
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
from tyro.conf import FlagCreatePairsOff, UseAppendAction

from benchmarks.inference import published_state
from benchmarks.timing import report, take_turns
from configs.cli import parse
from model.checkpoints.load import build_model
from model.evf import EVFModel
from model.registry import model_config
from model.video import VideoPredictor
from utils.errors import run_main

SIZE = (256, 256)


@dataclass(frozen=True)
class Args:
    """Measure videos: ratios taken side by side in one run."""

    only: UseAppendAction[tuple[Literal["memory", "speed"], ...]] = ()
    """Questions to answer; both where none is given."""
    model: str = "sam2-hiera-tiny"
    """Of the speed question; random weights."""
    frames: int = 4
    """Of the speed question."""
    objects: UseAppendAction[tuple[int, ...]] = ()
    """How many objects to follow at once; 1, 4 and 16 where none is given."""
    rounds: int = 1
    """Turns of each candidate; the median counts."""
    memory_model: str = "sam2-hiera-pico"
    short: int = 200
    long: int = 2000
    """Frames of the two runs of the memory question."""
    public: FlagCreatePairsOff[bool] = False
    """Measure the public sam2 package too, with one object."""
    threads: int = 2
    follow: int | None = None
    """Used by the memory question itself: follow an object through so many frames and print the peak."""
    output: Path = Path("output/benchmarks/video.json")


def pictures(count: int) -> Iterator[np.ndarray]:
    """Yield frames in which a square moves over noise."""
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    for i in range(count):
        frame = noise.copy()
        left = 20 + 3 * i % 150
        frame[80:160, left : left + 80] = (200, 60, 40)
        yield frame


def boxes(count: int) -> list[list[int]]:
    """Return boxes side by side."""
    return [[10 + 12 * i, 70, 70 + 12 * i, 170] for i in range(count)]


def load(name: str) -> EVFModel:
    """Return a model with random weights that see their object."""
    torch.manual_seed(0)
    model = build_model(model_config(name)).eval()
    with torch.no_grad():
        model.segmenter.sam2.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(1.0)
    return model


def follow_ours(model: EVFModel, frames: list[np.ndarray], count: int) -> None:
    """Follow boxes with our predictor."""
    video = VideoPredictor(model, hole_area=0)
    video.start(frames)
    for box in boxes(count):
        video.add_box(box)
    for _ in video.propagate():
        pass


@torch.inference_mode()
def follow_library(model: EVFModel, frames: list[np.ndarray], count: int) -> None:
    """Follow boxes with the library's session and loop."""
    sam2, spec = model.segmenter.sam2, model.segmenter.image_spec.for_video()
    session = Sam2VideoInferenceSession(torch.stack([spec(frame) for frame in frames]), *SIZE, dtype=torch.float32)
    for number, box in enumerate(boxes(count), 1):
        points = torch.tensor(box, dtype=torch.float32).view(1, 1, 2, 2) * (spec.size / SIZE[0])
        labels = torch.tensor([[[2, 3]]], dtype=torch.int32)
        session.add_point_inputs(session.obj_id_to_idx(number), 0, {"point_coords": points, "point_labels": labels})
        session.obj_with_new_inputs.append(number)
    sam2(session, frame_idx=0)
    for found in sam2.propagate_in_video_iterator(session):
        torch.nn.functional.interpolate(found.pred_masks.float(), SIZE, mode="bilinear")


def public_follower(model: EVFModel, frames: list[np.ndarray], folder: Path) -> Callable[[], None]:
    """Return what follows one box with the public sam2 package, which reads frames from files."""
    from sam2.build_sam import build_sam2_video_predictor

    predictor = build_sam2_video_predictor("configs/sam2/sam2_hiera_t.yaml", device="cpu")
    predictor.load_state_dict(published_state(model.segmenter, "sam2"))
    for i, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{i:05d}.jpg"), frame[..., ::-1])

    @torch.inference_mode()
    def follow() -> None:
        inference = predictor.init_state(str(folder))
        predictor.add_new_points_or_box(inference, 0, 1, box=np.array(boxes(1)[0], np.float32))
        for _ in predictor.propagate_in_video(inference):
            pass

    return follow


def count_operations(run: Callable[[], Any]) -> int:
    """Return the multiplications and additions of matrix products and convolutions in a run."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_operations}) as counter:
        run()
    return counter.get_total_flops()


def _attention_operations(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def speed(args: Args) -> list[dict[str, Any]]:
    """Return seconds per frame, and ratios to the library and to one object.

    `operations/one` is how many times the arithmetic of one object is needed: what a machine at one speed would take.
    """
    model, frames, rows = load(args.model), list(pictures(args.frames)), []
    one: tuple[float, int] | None = None
    for count in args.objects or (1, 4, 16):
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda count=count: follow_ours(model, frames, count),
            "library": lambda count=count: follow_library(model, frames, count),
        }
        with tempfile.TemporaryDirectory() as folder:
            if args.public and count == 1:
                runs["public"] = public_follower(model, frames, Path(folder))
            seconds = take_turns(runs, args.rounds, torch.device("cpu"))
        ours = seconds["ours"], count_operations(runs["ours"])
        one = one or ours
        row = {f"{name}_frames_per_s": args.frames / value for name, value in seconds.items()}
        ratios = {f"ours/{name}": seconds["ours"] / value for name, value in seconds.items() if name != "ours"}
        target = "ours/library <= 1" if count == 1 else "ours/one <= 1.6" if count == 4 else ""
        rows.append({"question": f"following objects, {args.model}, {args.frames} frames", "name": f"{count} objects",
                     **row, **ratios, "ours/one": ours[0] / one[0], "operations/one": ours[1] / one[1],
                     "target": target})  # fmt: skip
    return rows


def memory(args: Args) -> list[dict[str, Any]]:
    """Return the peak memory of a short and a long video, each in a process of its own."""
    peaks = []
    for count in (args.short, args.long):
        words = ["--follow", str(count), "--memory_model", args.memory_model, "--threads", str(args.threads)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.video", *words], check=True, capture_output=True, text=True
        )
        peaks.append(json.loads(done.stdout)["peak_mb"])
    question, name = f"peak memory, {args.memory_model}, one object", f"{args.short} and {args.long} frames"
    ratio = {"long/short": peaks[1] / peaks[0], "target": "<= 1.05"}
    return [{"question": question, "name": name, "short_mb": peaks[0], "long_mb": peaks[1], **ratio}]


def follow_and_print_peak(args: Args) -> None:
    """Follow an object through a stream."""
    video = VideoPredictor(load(args.memory_model))
    video.start(pictures(args.follow))
    video.add_box(boxes(1)[0])
    for _ in video.propagate():
        pass
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> int:
    """Answer the questions."""
    args = parse(Args, "benchmarks/video.py")
    torch.set_num_threads(args.threads)
    if args.follow:
        follow_and_print_peak(args)
        return 0
    rows: list[dict[str, Any]] = []
    for name, ask in {"memory": memory, "speed": speed}.items():
        if not args.only or name in args.only:
            rows += ask(args)
    facts = {"torch": torch.__version__, "threads": args.threads, "cpu": platform.processor(), "cores": os.cpu_count()}
    report(rows, args.output, facts)
    return 0


if __name__ == "__main__":
    run_main(main)
