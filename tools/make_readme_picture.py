"""Make the README's picture: real SAM-2 weights, three boxes, one photograph.

python -m tools.make_readme_picture --checkpoint sam2_hiera_tiny.pt
"""

from dataclasses import dataclass
from pathlib import Path

from configs.cli import parse
from utils.errors import run_main

BOXES = ([18, 180, 363, 511], [165, 10, 290, 195], [275, 335, 455, 511])
NAMES = ("box around the suit", "box around the head", "box around the helmet")


@dataclass(frozen=True)
class Args:
    """Make the README's picture: real SAM-2 weights, three boxes, one photograph."""

    checkpoint: str
    """SAM-2 Hiera-Tiny weights in Meta's format."""
    image: Path = Path("assets/astronaut.jpg")
    output: Path = Path("assets/readme.jpg")


def main() -> int:
    """Predict, draw, write."""
    args = parse(Args, "tools/make_readme_picture.py")
    from model import load_predictor
    from utils.image import read_image
    from utils.visualize import overlay, save_picture, with_legend

    image = read_image(args.image)
    predictor = load_predictor(args.checkpoint)
    predictor.set_image(image)
    prediction = predictor.predict(boxes=BOXES)
    scored = zip(NAMES, prediction.scores, strict=True)
    save_picture(args.output, with_legend(overlay(image, prediction.masks), [f"{n}  {s:.2f}" for n, s in scored]))
    print(f"{args.output}: predicted IoU {', '.join(f'{score:.3f}' for score in prediction.scores)}")
    return 0


if __name__ == "__main__":
    run_main(main)
