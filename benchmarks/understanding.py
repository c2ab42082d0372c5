"""Does a model understand phrases, or guess? Its scores beside those of two crippled twins, in one run.

python -m benchmarks.understanding --dataset_dir dataset_nano --val_dataset "grefcoco|unc|val"

`shuffled`: each phrase is replaced by one of the same image that means something else. A model that guesses a likely
object scores as before. `no places`: the encoder's table of image positions is set to zero. A model that knows where
things are falls on places, orders and relations, not on names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from configs.cli import parse
from datasets.catalog import open_dataset
from datasets.collate import Collate
from datasets.loading import LOWERCASED, evaluation_batches
from datasets.mixture import spread
from datasets.reader import PhraseDataset
from datasets.sample import Batch, Sample
from model.predictor import ImagePredictor, load_predictor
from utils.distributed import Ranks
from utils.errors import run_main
from utils.evaluation_report import Case, draw_sheet, find_empty_pixels, forms_of
from utils.evaluator import OnBatch, evaluate
from utils.files import write_json
from utils.masks import encode_rle
from utils.metrics import PhraseResult, summarise
from utils.visualize import save_picture

SHEET = 24


@dataclass(frozen=True)
class Args:
    """Measure a model, the same with shuffled phrases, and the same without image positions."""

    version: str = "nano"
    """Checkpoint, as in eval.py."""
    dataset_dir: str = "./dataset"
    val_dataset: str = "grefcoco|unc|val"
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


@dataclass(frozen=True)
class Shuffled:
    """Packs samples whose phrases have changed places: each gets the next text of its image that means another mask.

    A phrase of an image where all mean the same keeps its text.
    """

    collate: Collate

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch; masks and names of the phrases stay where they were."""
        return self.collate([replace(sample, phrases=shuffle(sample.phrases, sample.masks)) for sample in samples])


def shuffle(phrases: Sequence[str], masks: np.ndarray) -> tuple[str, ...]:
    """Return for each phrase the text of the next one, in a circle, whose mask is another; masks [N, H, W]."""
    count = len(phrases)
    keys = [mask.tobytes() for mask in masks]
    order = [[(i + step) % count for step in range(1, count)] for i in range(count)]
    return tuple(phrases[next((j for j in order[i] if keys[j] != keys[i]), i)] for i in range(count))


def without_places(model: nn.Module) -> None:
    """Set the encoder's table of image positions to zero, but for that of [CLS]."""
    with torch.no_grad():
        model.encoder.positions.A.weight[3:] = 0.0


class RandomCases:
    """Keeps phrases drawn at random; give `add` to `evaluate` as `on_batch`."""

    def __init__(self, dataset: PhraseDataset, indices: Sequence[int], seed: int) -> None:
        every = [(image, place) for image in indices for place in range(len(dataset.phrases(image)))]
        rows = np.random.default_rng(seed).permutation(len(every))[:SHEET]
        self.wanted = {every[row] for row in rows}
        self.cases: list[Case] = []

    def add(self, batch: Batch, results: Sequence[PhraseResult], masks: Sequence[torch.Tensor]) -> None:
        """Look at a batch; see `utils.evaluator.evaluate`."""
        flat = [mask for image in masks for mask in image]
        for result, mask in zip(results, flat, strict=True):
            if result.order in self.wanted:
                self.cases.append(Case(result, encode_rle(mask[None].cpu().numpy())[0]))


def measure(
    predictor: ImagePredictor,
    dataset: PhraseDataset,
    collate: Collate | Shuffled,
    args: Args,
    on_batch: OnBatch | None = None,
) -> dict:
    """Return the metrics of all phrases, and of each form."""
    indices = spread(dataset, args.max_images)
    ranks = Ranks.from_environment(0)
    batches = evaluation_batches(dataset, collate, indices, args.batch_size, ranks, args.workers)
    with tqdm(total=len(indices), unit="image", leave=False) as bar:
        results = evaluate(predictor.model, batches, predictor.model.device, on_batch=on_batch, progress=bar.update)
    empty = find_empty_pixels(dataset.name, None)
    return summarise(results, empty).to_json() | forms_of(dataset, results, empty)


def main() -> int:
    """Measure the three, print a table, write the numbers."""
    args = parse(Args, "benchmarks/understanding.py")
    lowercase = args.val_dataset.split("|")[0] in LOWERCASED
    dataset = open_dataset(args.val_dataset, args.dataset_dir, lowercase=lowercase)
    predictor = load_predictor(args.version, args.device, preprocessing="evaluation")
    collate = Collate(predictor.image_spec, predictor.model.encoder.image_spec, predictor.tokenizer)
    sheet = RandomCases(dataset, spread(dataset, args.max_images), args.seed) if args.sheet else None
    rows = {"model": measure(predictor, dataset, collate, args, sheet.add if sheet else None)}
    if sheet:
        save_picture(args.sheet, draw_sheet(sheet.cases, dataset))
    rows["shuffled"] = measure(predictor, dataset, Shuffled(collate), args)
    without_places(predictor.model)
    rows["no places"] = measure(predictor, dataset, collate, args)
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
