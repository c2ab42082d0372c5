"""Run the whole pipeline on a photograph, offline, with an UNTRAINED pico model: python -m tools.demo."""

from dataclasses import dataclass
from pathlib import Path

from configs.cli import parse
from utils.errors import run_main

NOTICE = """
These masks mean nothing yet: the pico model is UNTRAINED, its weights are random.
What ran is real: checkpoint folder, tokenizer, BEiT-3, SAM-2 decoder, pictures, results.json.
With a trained checkpoint:  python inference.py --version FOLDER --image_path IMAGE --prompt "the zebra top left"
"""


@dataclass(frozen=True)
class Args:
    """Run the whole pipeline on a photograph, offline, with an untrained pico model."""

    image: str = "assets/astronaut.jpg"
    output: Path = Path("output/demo")
    seed: int = 0
    """Of the random weights."""


def main() -> int:
    """Write an untrained checkpoint in the published layout, then do what inference.py does."""
    args = parse(Args, "tools/demo.py")
    import torch

    from configs.inference import InferenceArgs
    from model import load_model, save_published
    from model.image_runner import run

    torch.manual_seed(args.seed)
    model = load_model("evf-sam2-hiera-pico-pico", pretrained=False)
    save_published(model, args.output / "checkpoint", "assets/tokenizer")
    status = run(
        InferenceArgs(
            version=str(args.output / "checkpoint"),
            image_path=args.image,
            prompt=("the woman in orange", "the white shuttle on the right"),
            vis_save_path=str(args.output),
            device="cpu",
            save_mask=True,
            overwrite=True,
        )
    )
    print(f"{NOTICE}\nPicture: {args.output / Path(args.image).stem}_vis.png")
    return status


if __name__ == "__main__":
    run_main(main)
