"""Segment a picture from phrases, offline, with the model that comes with the repository: python -m tools.demo."""

from dataclasses import dataclass
from pathlib import Path

from configs.cli import parse
from utils.errors import run_main

PHRASES = ("the koala", "the biggest pencil", "the giraffe on the right", "the smallest pencil", "the moon")


@dataclass(frozen=True)
class Args:
    """Segment a picture from phrases, offline, with the model that comes with the repository."""

    image: str = "assets/scenes/pencils.jpg"
    prompt: tuple[str, ...] = PHRASES
    """Phrases; the last of the usual ones names something that is not there."""
    output: Path = Path("output/demo")


def main() -> int:
    """Do what inference.py does."""
    args = parse(Args, "tools/demo.py")
    from configs.inference import InferenceArgs
    from model.image_runner import run

    status = run(
        InferenceArgs(
            image_path=args.image,
            prompt=args.prompt,
            vis_save_path=str(args.output),
            device="cpu",
            save_mask=True,
            overwrite=True,
        )
    )
    print(f"Look at {args.output / Path(args.image).stem}_vis.png; masks, scores and boxes are beside it.")
    return status


if __name__ == "__main__":
    run_main(main)
