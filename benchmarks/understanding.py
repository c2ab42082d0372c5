"""Does a model understand phrases, or guess? Its scores beside those of two crippled twins, in one run.

python -m benchmarks.understanding --dataset_dir dataset_nano --val_dataset "grefcoco|unc|val"

`shuffled`: each phrase is replaced by one of the same image that means something else. A model that guesses a likely
object scores as before. `no places`: the encoder's table of image positions is set to zero. A model that knows where
things are falls on places, orders and relations, not on names.
"""

from dataclasses import dataclass
from pathlib import Path

from configs.cli import parse
from configs.evaluation import EvalArgs
from utils.errors import run_main


@dataclass(frozen=True)
class Args:
    """Measure a model, the same with shuffled phrases, and the same without image positions."""

    version: str = "nano"
    """Checkpoint, as in eval.py."""
    dataset_dir: str = "./dataset"
    """Folder of all data sets, laid out as published."""
    val_dataset: str = "grefcoco|unc|val"
    """One data set, as in eval.py."""
    max_images: int | None = None
    """A quick look at this many images."""
    batch_size: int = 8
    workers: int = 1
    device: str | None = None
    output: Path = Path("output/benchmarks/understanding.json")
    sheet: Path | None = None
    """Also draw 24 phrases, taken at random, with their masks."""
    seed: int = 0
    """Of the phrases on the sheet."""


def main() -> int:
    """Measure the three, print a table, write the numbers."""
    args = parse(Args, "benchmarks/understanding.py")
    options = EvalArgs(
        version=args.version,
        val_dataset=(args.val_dataset,),
        precision="fp32",
        max_images=args.max_images,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
    )
    options.check()
    from benchmarks.twins import ONE, RandomCases, Shuffled, measure, without_places
    from datasets.catalog import open_dataset
    from datasets.collate import Collate
    from datasets.loading import LOWERCASED
    from datasets.mixture import spread
    from model import image_runner
    from utils.evaluation_report import draw_sheet
    from utils.files import write_json
    from utils.visualize import save_picture

    lowercase = args.val_dataset.split("|")[0] in LOWERCASED
    dataset = open_dataset(args.val_dataset, args.dataset_dir, lowercase=lowercase)
    indices = spread(dataset, args.max_images)
    predictor = image_runner.load(options.for_loading(), ONE)
    model = predictor.model
    collate = Collate(predictor.image_spec.for_evaluation(), model.encoder.image_spec, predictor.tokenizer)
    sheet = RandomCases(dataset, indices, args.seed) if args.sheet else None
    rows = {"model": measure(predictor, dataset, collate, indices, options, sheet.add if sheet else None)}
    if sheet:
        save_picture(args.sheet, draw_sheet(sheet.cases, dataset))
    rows["shuffled"] = measure(predictor, dataset, Shuffled(collate), indices, options)
    without_places(model)
    rows["no places"] = measure(predictor, dataset, collate, indices, options)
    print(f"{args.val_dataset}, cIoU / gIoU{'':14}" + "".join(f"{name:>18}" for name in rows))
    for form in ("", *rows["model"].get("forms", {})):
        parts = [row["forms"][form] if form else row for row in rows.values()]
        print(f"{form or 'all':32} {parts[0]['phrases']:6}" + "".join(f"{_pair(part):>18}" for part in parts))
    write_json(args.output, {"version": args.version, "dataset": args.val_dataset, "measured": rows})
    return 0


def _pair(row: dict) -> str:
    return f"{row['ciou']:.3f} / {row['giou']:.3f}"


if __name__ == "__main__":
    run_main(main)
