"""The evaluation loop. It receives its objects: a model, batches, and what to do with the masks."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, islice, pairwise
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks
from .errors import TrainingError
from .metrics import PhraseResult, count_pixels

MAX_PROMPTS = 32
"""Phrases decoded in one call, so that memory stays bounded however many an image has."""

MAX_LOGITS = 1 << 26
"""Logits at image size held at once: 256 MB of float32."""

OnBatch = Callable[[Any, list[PhraseResult], list[Tensor]], None]


@torch.inference_mode()
def evaluate(
    model: Any,
    batches: Iterable[Any],
    device: torch.device,
    features_of: Callable[[Any], Any] | None = None,
    on_batch: OnBatch | None = None,
    progress: Callable[[int], Any] | None = None,
    threshold: float = 0.0,
) -> list[PhraseResult]:
    """Predict and count every phrase of some batches. Every image is encoded once, its phrases together.

    The precision is the caller's: that of the weights, or of a `torch.autocast` around this call.

    Args:
        model: a `model.evf.EVFModel` in evaluation mode on `device`, not wrapped for training.
        batches: of `datasets.sample.Batch`.
        features_of: a batch on the device -> the segmenter's features of its images, in their order; by default
            `batch.pixels` are encoded, which must then hold every image.
        on_batch: is given each batch on the device, its results, and its masks: per image bool [n_i, H_i, W_i].
        progress: is given the number of images of each batch that is done.
        threshold: a pixel is in the mask where its logit is above.

    Returns:
        a result per phrase, in the order of the batches.

    Raises:
        TrainingError: a logit is not a finite number: a precision that the model cannot stand, or damaged weights.
    """
    results: list[PhraseResult] = []
    for batch in batches:
        batch = batch.to(device)
        features = features_of(batch) if features_of else model.segmenter.encode_image(batch.pixels.to(model.dtype))
        counts, scores, masks = _predict(model, batch, features, threshold, on_batch is not None)
        found = _results(batch, counts.tolist(), scores.tolist())
        results += found
        if on_batch:
            on_batch(batch, found, masks)
        if progress:
            progress(len(batch))
    return results


def _predict(
    model: Any, batch: Any, features: Any, threshold: float, keeps_masks: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the counts of `count_pixels` [N, 4], the predicted IoU [N] and, where asked for, masks per image."""
    index, counts, scores = batch.image_index.tolist(), [], []
    kept: list[list[Tensor]] = [[truth[:0].bool()] for truth in batch.masks]
    truths = [iter(truth.split(1)) for truth in batch.masks]
    small = batch.encoder_pixels.to(model.encoder.vision_embed.proj.weight.dtype)
    lengths = (~batch.padding).sum(1).tolist()
    for start in range(0, len(index), MAX_PROMPTS):
        part = slice(start, start + MAX_PROMPTS)
        first, last, length = index[start], index[part][-1], max(lengths[part])
        output = model(
            features[first : last + 1],
            small[first : last + 1],
            batch.ids[part, :length],
            batch.padding[part, :length] if min(lengths[part]) < length else None,
            batch.image_index[part] - first,
        )
        logits, iou = output.prediction.chosen(output.selected)
        _require_finite(logits, batch, part)
        scores.append(iou.float())
        rows = iter(logits.split([len(list(group)) for _, group in groupby(index[part])]))
        for image in dict.fromkeys(index[part]):
            for masks in _full_size(model.segmenter, next(rows), batch.sizes[image], threshold):
                truth = torch.cat(list(islice(truths[image], len(masks))))
                counts.append(count_pixels(masks, truth))
                if keeps_masks:
                    kept[image].append(masks)
    return torch.cat(counts), torch.cat(scores), [torch.cat(parts) for parts in kept] if keeps_masks else []


def _full_size(segmenter: Any, logits: Tensor, size: tuple[int, int], threshold: float) -> Iterable[Tensor]:
    """Yield masks of an image, bool [n, H, W], as many at once as memory is meant to hold."""
    step = max(1, MAX_LOGITS // (size[0] * size[1]))
    for part in logits.split(step):
        own = torch.zeros(len(part), dtype=torch.long, device=part.device)
        yield segmenter.postprocess(part, [size], own)[0] > threshold


def _require_finite(logits: Tensor, batch: Any, part: slice) -> None:
    is_finite = logits.isfinite().flatten(1).all(1)
    if not is_finite.all():
        row = part.start + int((~is_finite).nonzero()[0])
        raise TrainingError(
            f"the mask of phrase {batch.phrase_ids[row]} ({batch.phrases[row]!r}) is not finite in {logits.dtype}. "
            "Evaluate in bf16 or fp32, or check the weights"
        )


def _results(batch: Any, counts: Sequence[Sequence[int]], scores: Sequence[float]) -> list[PhraseResult]:
    index = batch.image_index.tolist()
    firsts = {image: n for n, image in reversed(list(enumerate(index)))}
    return [
        PhraseResult(
            id=batch.phrase_ids[n],
            phrase=batch.phrases[n],
            key=batch.keys[image],
            image=batch.indices[image],
            place=n - firsts[image],
            intersection=counts[n][0],
            union=counts[n][1],
            target=counts[n][2],
            predicted=counts[n][3],
            score=scores[n],
        )
        for n, image in enumerate(index)
    ]


def gather_results(results: Sequence[PhraseResult], ranks: Ranks) -> list[PhraseResult]:
    """Return the results of all ranks on every rank, in the order of the data set: the same on any number of ranks.

    Raises:
        TrainingError: a phrase was counted twice, or another rank stopped.
    """
    everything = [result for part in gather(list(results), ranks) for result in part]
    everything.sort(key=lambda result: result.order)
    for one, other in pairwise(everything):
        if one.order == other.order:
            raise TrainingError(f"phrase {one.id} of {one.key} was counted twice: the ranks' shares overlap")
    return everything


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """Return the values of all ranks on every rank, by rank.

    Raises:
        TrainingError: another rank stopped.
    """
    if ranks.world == 1:
        return [value]
    import torch.distributed as dist

    ranks.join()
    values = [None] * ranks.world
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"rank {ranks.rank} lost the others ({reason}). See what the first one said") from None
    return values


def gather_to_first(value: Any, ranks: Ranks) -> list[Any]:
    """Return the values of all ranks on the first one, by rank, and nothing on the others: for what is large.

    Raises:
        TrainingError: another rank stopped.
    """
    if ranks.world == 1:
        return [value]
    import torch.distributed as dist

    ranks.join()
    values = [None] * ranks.world if ranks.is_first else None
    try:
        dist.gather_object(value, values)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"rank {ranks.rank} lost the others ({reason}). See what the first one said") from None
    return values or []
