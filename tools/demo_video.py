"""Follow phrases through a clip, offline, with the model that comes with the repository: python -m tools.demo_video."""

from dataclasses import dataclass
from pathlib import Path

from configs.cli import parse
from utils.errors import run_main

PHRASES = ("the bottommost crown", "the dartboard", "the syringe", "the left hippo")


@dataclass(frozen=True)
class Args:
    """Follow phrases through a clip, offline, with the model that comes with the repository."""

    clip: str = "assets/clip.mp4"
    prompt: tuple[str, ...] = PHRASES
    """Phrases, read on the first frame."""
    output: Path = Path("output/demo_video")


def main() -> int:
    """Do what inference_video.py does."""
    args = parse(Args, "tools/demo_video.py")
    from configs.video import VideoArgs
    from model.video_runner import run

    status = run(
        VideoArgs(
            image_path=args.clip, prompt=args.prompt, vis_save_path=str(args.output), device="cpu", overwrite=True
        )
    )
    print(f"Look at {args.output / Path(args.clip).stem}.mp4; pictures, masks, scores and boxes are beside it.")
    return status


if __name__ == "__main__":
    run_main(main)
