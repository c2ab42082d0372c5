"""What a training run measures of itself: scores of each validation set, and a sheet of predictions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from .distributed import Ranks
from .evaluation_report import CASES, Case, draw_sheet, find_empty_pixels, folder_name
from .evaluator import evaluate, gather, gather_results
from .masks import encode_rle
from .metrics import PhraseResult, mean_numbers, summarise
from .visualize import save_picture


class ValidationSet(Protocol):
    """A data set, and what begins a pass over this rank's batches of it."""

    dataset: Any
    batches: Callable[[], Iterable[Any]]


class Validation:
    """Measures a model on every validation set, as eval.py does; all ranks call it.

    Args:
        sets: by name.
        features: a batch on the device -> the image features of all its images; None encodes its pixels.
        folder: of the run; sheets go to `pictures/` below it.
    """

    def __init__(
        self,
        sets: Mapping[str, ValidationSet],
        features: Callable[[Any], Any] | None,
        folder: Path,
        ranks: Ranks,
    ) -> None:
        self.sets, self.features, self.folder, self.ranks = sets, features, folder, ranks

    def __call__(self, module: nn.Module, step: int) -> dict[str, float]:
        """Return `ciou` and `giou`, the means over the sets, and every metric of each; {} where there are no sets.

        Args:
            module: a `model.training.TrainingStep` in evaluation mode, with whole weights.
            step: names the pictures.
        """
        rows = {name: self._measure(name, module.model, step) for name in self.sets}
        if not rows:
            return {}
        mean = mean_numbers(list(rows.values()), ("ciou", "giou"))
        if len(rows) == 1:
            return dict(next(iter(rows.values())))
        return mean | {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}

    def _measure(self, name: str, model: Any, step: int) -> dict[str, float]:
        entry, sheet = self.sets[name], _FirstCases()
        count = len(entry.dataset)
        with tqdm(total=count, desc=name, unit="image", disable=not self.ranks.is_first, leave=False) as bar:
            done = evaluate(
                model,
                entry.batches(),
                next(model.parameters()).device,
                features_of=self.features,
                on_batch=sheet.add,
                progress=lambda images: bar.update(images * self.ranks.world),
            )
        results = gather_results(done, self.ranks)
        cases = sorted(
            (case for part in gather(sheet.cases, self.ranks) for case in part), key=lambda c: c.result.order
        )
        if self.ranks.is_first:
            picture = draw_sheet(cases[:CASES], entry.dataset)
            save_picture(self.folder / "pictures" / folder_name(name) / f"step_{step:08d}.png", picture)
        numbers = summarise(results, find_empty_pixels(name, None)).numbers()
        return {key: value for key, value in numbers.items() if value is not None}


class _FirstCases:
    """Keeps one phrase of each of the first images: the same at every step, so that sheets can be compared."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def add(self, batch: Any, results: Sequence[PhraseResult], masks: Sequence[Tensor]) -> None:
        """Look at a batch; see `utils.evaluator.evaluate`."""
        flat = [mask for image in masks for mask in image]
        for result, mask in zip(results, flat, strict=True):
            if result.place == 0 and len(self.cases) < CASES:
                self.cases.append(Case(result, encode_rle(mask[None].cpu().numpy())[0]))
