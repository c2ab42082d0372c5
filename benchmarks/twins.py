"""The two crippled twins of `benchmarks.understanding`, and how they are measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from configs.evaluation import EvalArgs
from datasets.collate import Collate
from datasets.loading import evaluation_batches
from datasets.reader import PhraseDataset
from datasets.sample import Batch, Sample
from model.predictor import ImagePredictor
from utils.distributed import Ranks
from utils.evaluation_report import Case, find_empty_pixels, forms_of
from utils.evaluator import OnBatch, evaluate
from utils.masks import encode_rle
from utils.metrics import PhraseResult, summarise

SHEET = 24
ONE = Ranks()


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
    indices: Sequence[int],
    args: EvalArgs,
    on_batch: OnBatch | None = None,
) -> dict:
    """Return the metrics of all phrases, and of each form."""
    batches = evaluation_batches(dataset, collate, indices, args.batch_size, ONE, args.workers)
    with tqdm(total=len(indices), unit="image", leave=False) as bar:
        results = evaluate(predictor.model, batches, predictor.model.device, on_batch=on_batch, progress=bar.update)
    empty = find_empty_pixels(dataset.name, None)
    return summarise(results, empty).to_json() | forms_of(dataset, results, empty)
