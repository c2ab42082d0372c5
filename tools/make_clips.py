"""Make synthetic clips with phrases, for videos without a download of data.

python -m tools.make_clips --out dataset_clips                      # 600 clips to train on, 60 to measure
python eval.py --version nano-video --dataset_dir dataset_clips --val_dataset ref_davis17
"""

from dataclasses import dataclass
from pathlib import Path

from configs.cli import parse
from utils.errors import run_main


@dataclass(frozen=True)
class Args:
    """Make synthetic clips with phrases, in the layout of Ref-DAVIS17."""

    out: Path
    """Folder to write, as later given to --dataset_dir; a stopped run with the same options goes on."""
    clips: int = 600
    """Clips to train on."""
    test_clips: int = 60
    """Clips to measure; no scene of theirs is in training."""
    frames: int = 24
    """Frames of each clip."""
    seed: int = 0
    """Same seed, same clips, whatever the number of workers."""
    side: int = 256
    """Height and width in pixels."""
    sprites: Path | None = None
    """Folder for the npm packages; the user's cache folder where not given."""
    quality: int = 92
    """JPEG quality."""
    workers: int | None = None
    """Processes; as many as CPUs where not given."""


def main() -> int:
    """Fetch the sprites, draw the clips, print what there is."""
    args = parse(Args, "tools/make_clips.py")
    from tools.synthetic.clips import ROOT, ClipRecipe, make_clips
    from tools.synthetic.generate import Recipe, default_workers
    from tools.synthetic.sprites import open_sprites

    scene = Recipe(seed=args.seed, width=args.side, height=args.side, quality=args.quality)
    recipe = ClipRecipe(scene, (args.clips, args.test_clips), args.frames)
    recipe.check()
    sprites, folder = open_sprites(args.sprites)
    counts = make_clips(args.out, recipe, sprites, folder, args.workers or default_workers())
    print(", ".join(f"{count} clips of {split}" for split, count in counts.items()), f"in {args.out / ROOT}")
    return 0


if __name__ == "__main__":
    run_main(main)
