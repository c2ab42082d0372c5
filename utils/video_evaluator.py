"""Measuring on videos: phrases are followed through clips; J and F where masks are known, else a zip to hand in."""

import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .distributed import Ranks
from .errors import TrainingError
from .evaluator import gather
from .files import append_line, atomic_path, json_text, read_lines, write_json
from .video_metrics import contour_accuracy, region_similarity

TOGETHER = 8
"""Phrases of a clip that are followed in one pass."""


ZIP = "submission.zip"


@dataclass(frozen=True)
class ClipResult:
    """J and F of one phrase, means over the frames that have a mask; None where the labels are hidden."""

    clip: str
    expression: str
    text: str
    frames: int
    j: float | None
    f: float | None


def follow_clip(predictor: Any, clip: Any, expressions: Sequence[Any]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame, masks bool [E, H, W]) of a clip, the phrases read on its first frame.

    Args:
        predictor: a `model.video.VideoPredictor`.
        clip: a `datasets.videos.Clip`; expressions: some of its phrases.
    """
    predictor.start(clip.frames)
    predictor.add_phrases([expression.text for expression in expressions], 0)
    for found in predictor.propagate():
        yield found.index, found.masks


def evaluate_clip(
    predictor: Any, clip: Any, truth_of: Callable[[Any, Any], Any] | None, folder: Path | None
) -> list[ClipResult]:
    """Follow every phrase of a clip.

    Args:
        truth_of: as `datasets.videos.VideoSet.truth`.
        folder: where masks are written as `<clip>/<phrase>/<frame>.png`, 0 and 255; None writes none.
    """
    results, waiting = [], iter(clip.expressions)
    while expressions := list(islice(waiting, TOGETHER)):
        truths = [truth_of(clip, expression) for expression in expressions] if truth_of else []
        scores: list[list[np.ndarray]] = [[] for _ in expressions]
        for frame, masks in follow_clip(predictor, clip, expressions):
            if folder:
                for expression, mask in zip(expressions, masks, strict=True):
                    save_mask_of(folder, clip, expression, frame, mask)
            drawn = [truth(frame) for truth in truths]
            known = [i for i, mask in enumerate(drawn) if mask is not None]
            if known:
                pair = masks[known], np.stack([drawn[i] for i in known])
                both = np.stack([region_similarity(*pair), contour_accuracy(*pair)], axis=1)
                for i, row in zip(known, both, strict=True):
                    scores[i].append(row)
        for expression, rows in zip(expressions, scores, strict=True):
            means = np.mean(rows, axis=0).tolist() if rows else (None, None)
            results.append(ClipResult(clip.name, expression.id, expression.text, len(rows), *means))
    return results


def save_mask_of(folder: Path, clip: Any, expression: Any, frame: int, mask: np.ndarray) -> None:
    """Write a mask where the benchmarks' servers look for it."""
    path = folder / clip.name / expression.id / f"{clip.frames.paths[frame].stem}.png"
    with atomic_path(path) as temporary:
        Image.fromarray(mask.astype(np.uint8) * 255).save(temporary)


def zip_masks(folder: Path, path: Path) -> int:
    """Pack every mask of a folder as `Annotations/<clip>/<phrase>/<frame>.png`; return how many there are."""
    pictures = sorted(folder.rglob("*.png"))
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for picture in pictures:
            archive.write(picture, Path("Annotations") / picture.relative_to(folder))
    return len(pictures)


def summarise(results: Iterable[ClipResult]) -> dict[str, float | int | None]:
    """Return J, F and J&F in 0..1, means over phrases, and how many phrases and frames they are of."""
    results = list(results)
    known = [result for result in results if result.j is not None]
    j, f = (float(np.mean([getattr(result, name) for result in known])) if known else None for name in ("j", "f"))
    return {
        "phrases": len(results),
        "frames": sum(result.frames for result in results),
        "j": j,
        "f": f,
        "j&f": None if j is None else (j + f) / 2,
    }


def read_done(path: Path) -> dict[str, list[ClipResult]]:
    """Return the clips that an earlier run finished, from its lines; one cut off by a stop is dropped."""
    return {entry["clip"]: [ClipResult(**result) for result in entry["results"]] for entry in read_lines(path)}


def add_done(path: Path, clip: str, results: Sequence[ClipResult]) -> None:
    """Add a finished clip."""
    append_line(path, {"clip": clip, "results": [asdict(result) for result in results]})


def measure(predictor: Any, sets: Sequence[Any], ranks: Ranks, out: str | None, settings: dict[str, Any]) -> int:
    """Measure on sets of videos, print J, F and J&F, and write what `out` asks for; return the exit status.

    Args:
        predictor: a `model.video.VideoPredictor`; sets: of `datasets.videos.VideoSet`.
        out: folder for metrics.json, phrases.json and, where labels are hidden, the masks and a zip of them. A stopped
            run with the same settings goes on after the last clip that is written there.
        settings: what the numbers depend on.

    Raises:
        TrainingError: labels are hidden and there is no `out`.
    """
    ranks.join()
    for videos in sets:
        if videos.truth is None and out is None:
            raise TrainingError(f"{videos.name}: its labels are hidden. Give --out FOLDER for the file to hand in")
    for videos in sets:
        folder = None if out is None else Path(out) / videos.name.replace("|", "_")
        done = {} if folder is None else _earlier(folder, settings, ranks)
        todo = [clip for clip in videos.clips if clip.name not in done]
        masks = folder / "Annotations" if folder and videos.truth is None else None
        for clip in tqdm(ranks.share(todo), desc=videos.name, unit="video", disable=not ranks.is_first):
            done[clip.name] = evaluate_clip(predictor, clip, videos.truth, masks)
            if folder:
                add_done(folder / f"clips.rank{ranks.rank}.jsonl", clip.name, done[clip.name])
        joined = {name: results for part in gather(done, ranks) for name, results in part.items()}
        if ranks.is_first:
            results = [result for clip in videos.clips for result in joined[clip.name]]
            sys.stdout.write(_report(videos, results, folder, masks, settings) + "\n")
            sys.stdout.flush()
    ranks.leave()
    return 0


def _earlier(folder: Path, settings: dict[str, Any], ranks: Ranks) -> dict[str, list[ClipResult]]:
    """Return what an earlier run with the same settings finished; clips of another are forgotten."""
    stated = folder / "settings.json"
    parts = sorted(folder.glob("clips.rank*.jsonl"))
    is_same = stated.is_file() and stated.read_text("utf-8") == json_text(settings)
    done = {name: results for path in parts if is_same for name, results in read_done(path).items()}
    ranks.wait_for_all()
    if ranks.is_first and not is_same:
        for path in parts:
            path.unlink()
        write_json(stated, settings)
    ranks.wait_for_all()
    return done


def _report(
    videos: Any, results: Sequence[ClipResult], folder: Path | None, masks: Path | None, settings: dict[str, Any]
) -> str:
    summary = summarise(results)
    if folder:
        write_json(folder / "metrics.json", {"dataset": videos.name, **summary, "settings": settings})
        write_json(folder / "phrases.json", [asdict(result) for result in results])
    if masks is None:
        scores = "  ".join(f"{name.upper()} {summary[name]:.4f}" for name in ("j&f", "j", "f"))
        return f"{videos.name}: {scores}  ({summary['phrases']} phrases, {summary['frames']} masks)"
    count = zip_masks(masks, folder / ZIP)
    return f"{videos.name}: {summary['phrases']} phrases, {count} masks. Hand in {folder / ZIP}"
