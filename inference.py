"""Segment images from phrases: `python inference.py --version FOLDER --image_path FILE --prompt "the zebra"`."""

from configs.cli import parse
from configs.inference import InferenceArgs
from utils.errors import run_main


def main() -> int:
    """Parse the options, then import what they need."""
    args = parse(InferenceArgs, "inference.py")
    from model.image_runner import run

    return run(args)


if __name__ == "__main__":
    run_main(main)
