"""Make synthetic scenes with phrases in the layout of RefCOCO and gRefCOCO, or with names in that of COCO.

python -m tools.make_synthetic --out dataset --scenes 5000
python -m tools.make_synthetic --out dataset_names --format coco --scenes 2000 --kinds 65 --size 256x256
python -m tools.make_synthetic --out strange --scenes 0 --seed 1 --strange     # never-seen backgrounds and wordings

Pictures of the objects come from an npm package (MIT), fetched once and checked by its hash. Train with
`refcoco|unc|train` and `grefcoco|unc|train`, evaluate with `val`, `testA` and `testB`; testB combines objects with
places, sizes, orders and relations that training never saw together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff

from configs.cli import parse
from utils.errors import DataError, run_main


@dataclass(frozen=True)
class Args:
    """Make synthetic scenes with phrases in the layout of RefCOCO and gRefCOCO, or with names in that of COCO."""

    out: Path
    """Folder to write, as later given to --dataset_dir; a stopped run with the same options goes on."""
    format: Literal["refer", "coco"] = "refer"
    """refer: phrases; coco: images/SPLIT, annotations/instances_SPLIT.json with the names of things, and lists of all,
    base and novel names."""
    scenes: int = 5000
    """Scenes of the training split."""
    test_scenes: int | None = None
    """Scenes of val, of testA and of testB; a tenth of --scenes, at least 8, where not given."""
    seed: int = 0
    """Same seed, same bytes, whatever the number of workers."""
    size: str = "320x320"
    """Width x height of the images in pixels."""
    kinds: int | None = None
    """How many kinds of object; all where not given."""
    backgrounds: tuple[str, ...] = ()
    """Names of backgrounds (tools/synthetic/backgrounds.py); the usual ones where not given."""
    photos: Path | None = None
    """Folder with photographs for backgrounds, instead of the bundled ones."""
    strange: FlagCreatePairsOff[bool] = False
    """Backgrounds and wordings that the usual options never use: for measuring generalisation."""
    sprites: Path | None = None
    """Folder for the npm packages; the user's cache folder where not given."""
    quality: int = 92
    """JPEG quality."""
    workers: int | None = None
    """Processes; as many as CPUs where not given."""
    contact_sheet: Path | None = None
    """Picture of 24 scenes; contact_sheet.png in --out where not given."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace synthetic scenes of other options in --out."""


def main() -> int:
    """Fetch the sprites, draw the scenes, write the data set, print what it holds."""
    args = parse(Args, "tools/make_synthetic.py")
    from tools.synthetic.backgrounds import STRANGE, USUAL
    from tools.synthetic.generate import Recipe, default_workers, generate
    from tools.synthetic.sheet import write_sheet
    from tools.synthetic.sprites import open_sprites

    width, height = parse_size(args.size)
    tests = max(8, args.scenes // 10) if args.test_scenes is None else args.test_scenes
    recipe = Recipe(
        seed=args.seed,
        scenes=(args.scenes, tests, tests, tests),
        width=width,
        height=height,
        kinds=args.kinds,
        backgrounds=args.backgrounds or (STRANGE if args.strange else USUAL),
        photos=args.photos,
        paraphrases="held_out" if args.strange else "usual",
        quality=args.quality,
        format=args.format,
    )
    recipe.check()
    sprites, folder = open_sprites(args.sprites)
    summary = generate(args.out, recipe, sprites, folder, args.workers or default_workers(), args.overwrite)
    sheet = args.contact_sheet or args.out / "contact_sheet.png"
    write_sheet(args.out, sheet, args.format)
    print_summary(summary)
    print(f"{len(summary['kinds'])} kinds of object, {summary['vocabulary']} words. Look at {sheet}")
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height.

    Raises:
        DataError: the text is not WIDTHxHEIGHT.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise DataError(f"--size {text!r} is not WIDTHxHEIGHT in pixels, such as 320x240")
    return int(width), int(height)


def print_summary(summary: dict) -> None:
    """Print the counts of every split and phrase form."""
    splits = summary["splits"]
    forms = sorted({form for counts in splits.values() for form in counts["forms"]})
    print(f"{'':14s}" + "".join(f"{split:>10s}" for split in splits))
    for name in ("scenes", "things", "refcoco_refs", "grefcoco_refs", "phrases"):
        print(f"{name:14s}" + "".join(f"{counts[name]:10d}" for counts in splits.values()))
    for form in forms:
        print(f"  {form:12s}" + "".join(f"{counts['forms'].get(form, 0):10d}" for counts in splits.values()))


if __name__ == "__main__":
    run_main(main)
