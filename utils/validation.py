"""What a training run measures of itself: scores of each validation set, and a sheet of predictions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from .distributed import Ranks
from .evaluation_report import CASES, Case, draw_sheet, find_empty_pixels, folder_name
from .evaluator import evaluate, gather, gather_results
from .masks import encode_rle
from .metrics import PhraseResult, mean_numbers, over_sets, summarise
from .video_evaluator import evaluate_clip, follow_clip
from .video_evaluator import summarise as summarise_clips
from .visualize import overlay, save_picture, with_legend

STRIPS, STRIP_PHRASES, STRIP_FRAMES, STRIP_SIDE = 6, 3, 6, 192


class ValidationSet(Protocol):
    """A data set, and what begins a pass over this rank's batches of it."""

    dataset: Any
    batches: Callable[[], Iterable[Any]]


def open_validation(
    sets: Mapping[str, ValidationSet] | Sequence[Any],
    features: Callable[[Any], Any] | None,
    follow: Callable[[Any], Any],
    limit: int | None,
    folder: Path,
    ranks: Ranks,
) -> "Validation | ClipValidation":
    """Return what measures images, a mapping, or video sets, a sequence; arguments as theirs."""
    if isinstance(sets, Mapping):
        return Validation(sets, features, folder, ranks)
    return ClipValidation(sets, follow, limit, folder, ranks)


class Validation:
    """Measures a model on every validation set, as eval.py does; all ranks call it.

    Args:
        sets: by name.
        features: a batch on the device -> the image features of all its images; None encodes its pixels.
        folder: of the run; sheets go to `pictures/` below it.
    """

    best_by = "ciou"

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
        return over_sets({name: self._measure(name, module.model, step) for name in self.sets}, ("ciou", "giou"))

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


class ClipValidation:
    """Measures a model on video sets, as eval.py does; all ranks call it.

    Args:
        sets: of `datasets.videos.VideoSet`, with labels.
        make_predictor: a model -> its `model.video.VideoPredictor`.
        clips: measure only this many of each set, evenly spread; None measures all.
        folder: of the run; strips of some clips go to `pictures/` below it.
    """

    best_by = "j&f"

    def __init__(
        self, sets: Sequence[Any], make_predictor: Callable[[Any], Any], clips: int | None, folder: Path, ranks: Ranks
    ) -> None:
        self.sets, self.make_predictor, self.clips, self.folder, self.ranks = sets, make_predictor, clips, folder, ranks

    def __call__(self, module: nn.Module, step: int) -> dict[str, float]:
        """Return `j&f`, `j` and `f`, means over the sets; {} where there are no sets."""
        predictor = self.make_predictor(module.model)
        rows = []
        for videos in self.sets:
            count = min(len(videos.clips), self.clips or len(videos.clips))
            chosen = [videos.clips[i * len(videos.clips) // count] for i in range(count)]
            own = self.ranks.share(chosen)
            done = [
                result
                for clip in tqdm(own, desc=videos.name, unit="video", disable=not self.ranks.is_first, leave=False)
                for result in evaluate_clip(predictor, clip, videos.truth, None)
            ]
            numbers = summarise_clips(result for part in gather(done, self.ranks) for result in part)
            rows.append({name: numbers[name] for name in ("j&f", "j", "f")})
            if self.ranks.is_first:
                strips = np.concatenate([draw_strip(predictor, clip) for clip in chosen[:STRIPS]])
                save_picture(self.folder / "pictures" / folder_name(videos.name) / f"step_{step:08d}.png", strips)
        return mean_numbers(rows, ("j&f", "j", "f")) if rows else {}


def draw_strip(predictor: Any, clip: Any) -> np.ndarray:
    """Return some frames of a clip side by side, with the masks of its first phrases, uint8 RGB [S, n * S, 3]."""
    expressions = clip.expressions[:STRIP_PHRASES]
    wanted = {i * (len(clip.frames) - 1) // (STRIP_FRAMES - 1) for i in range(STRIP_FRAMES)}
    tiles = [
        cv2.resize(overlay(clip.frames[frame], masks), (STRIP_SIDE, STRIP_SIDE), interpolation=cv2.INTER_AREA)
        for frame, masks in follow_clip(predictor, clip, expressions)
        if frame in wanted
    ]
    blank = [np.full((STRIP_SIDE, STRIP_SIDE, 3), 255, np.uint8)] * (STRIP_FRAMES - len(tiles))
    texts = [expression.text for expression in expressions]
    texts += [""] * (STRIP_PHRASES - len(texts))
    return with_legend(np.concatenate([*tiles, *blank], axis=1), texts)


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
