"""Follow objects through a video: `python inference_video.py --version NAME --image_path FRAMES --prompt "zebra"`."""

from configs.cli import parse
from configs.video import VideoArgs
from utils.errors import run_main


def main() -> int:
    """Parse the options, then import what they need."""
    args = parse(VideoArgs, "inference_video.py")
    from model.video_runner import run

    return run(args)


if __name__ == "__main__":
    run_main(main)
