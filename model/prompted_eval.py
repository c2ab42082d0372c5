"""Points and boxes on annotated images: the masks a segmenter answers with, counted against what was drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.clicks import next_clicks
from utils.errors import ModelError, TrainingError
from utils.evaluation_report import Case
from utils.evaluator import MAX_LOGITS
from utils.instance_metrics import (
    InstanceResult,
    closest_detections,
    count_rles,
    mean_by_size,
    published_mean_by_size,
)
from utils.masks import encode_rle
from utils.metrics import count_pixels

from .evf import EVFModel
from .predictor import MAX_PROMPTS, ImagePredictor, to_input
from .segmenters.base import best_of_three, first_mask
from .types import ImageFeatures, Prompts

PROMPTS_ON_CPU = 4
"""Prompts decoded in one call on a CPU: what is in between stays in its caches, a third faster than `MAX_PROMPTS`."""


@dataclass(frozen=True)
class Answer:
    """The masks of a batch with N prompts.

    * `masks`: per image bool [n_i, H_i, W_i], on the model's device; `scores`: float32 [N], the predicted IoU.
    * `low_res`: their logits [N, 4h, 4w], of all images.
    * `clicks`: float or int [N, K, 3], x y and 1 where positive; None where boxes were given.
    * `named`: per mask the likeliest of a list of names, and its probability; None where the model names nothing.
    """

    masks: list[Tensor]
    scores: Tensor
    low_res: Tensor
    clicks: np.ndarray | None
    named: list[tuple[int, float]] | None = None


def require_prompts(model: EVFModel, clicks: int | None) -> None:
    """Check that a model takes points, or boxes where `clicks` is None.

    Raises:
        ModelError: it does not.
    """
    kind = "boxes" if clicks is None else "points"
    if kind not in model.segmenter.prompt_kinds:
        raise ModelError(
            f"{model.config.name} takes no {kind}, so it cannot be measured with them. Take a SAM, SAM-2 or "
            "EfficientViT-SAM model"
        )


class PromptedEvaluator:
    """Asks a segmenter for the masks of a batch: each image is encoded once, its prompts are decoded together.

    Of the three masks of a prompt the one with the best predicted IoU counts, whatever the prompt is; where a family
    makes one mask, that one.

    Args:
        predictor: of a model that takes points and boxes.
        clicks: how many to simulate; None prompts with boxes.

    Raises:
        ModelError: the model takes no such prompts.
    """

    names_masks = False
    """Whether it gives masks names too."""

    def __init__(self, predictor: ImagePredictor, clicks: int | None) -> None:
        require_prompts(predictor.model, clicks)
        self.predictor, self.model, self.clicks = predictor, predictor.model, clicks
        self.segmenter = predictor.model.segmenter

    def __call__(self, batch: Any) -> Answer:
        """Return the masks of a `datasets.instances.InstanceBatch` on the model's device.

        Raises:
            TrainingError: a mask is not finite.
        """
        features = self.segmenter.encode_image(batch.pixels.to(self.model.dtype))
        return self.complete(batch, features, self.ask(batch, features))

    def ask(self, batch: Any, features: ImageFeatures) -> Answer:
        """Return the masks of a batch whose images are encoded."""
        if self.clicks is None:
            return self._answer(batch, features, self._scale(batch, Prompts(boxes=batch.boxes)), None)
        truths = [masks == 1 for masks in batch.masks]
        predicted = [np.zeros_like(truth) for truth in truths]
        clicks = np.zeros((len(batch.image_index), 0, 3), np.int64)
        for number in range(self.clicks):
            clicks = np.concatenate([clicks, _click(batch, truths, predicted, clicks)[:, None]], axis=1)
            points, labels = torch.from_numpy(clicks[..., :2]).float(), torch.from_numpy(clicks[..., 2])
            answer = self._answer(batch, features, self._scale(batch, Prompts(points=points, labels=labels)), clicks)
            if number + 1 < self.clicks:
                predicted = [part.cpu().numpy() for part in answer.masks]
        return answer

    def complete(self, batch: Any, features: ImageFeatures, answer: Answer) -> Answer:
        """Return an answer with what else the model says of its masks: here nothing."""
        return answer

    def about(self) -> dict[str, Any]:
        """Return what else metrics.json says of how it was measured: here nothing."""
        return {}

    def summary(self, results: Sequence[InstanceResult], images: int, world: int | None) -> Any:
        """Return the means of results.

        Args:
            images: how many there are, with those that have no annotation.
            world: take the published arithmetic of so many processes; None takes ours.
        """
        return published_mean_by_size(results, images, world) if world else mean_by_size(results)

    def result(self, found: InstanceResult, category: int, answer: Answer, number: int) -> InstanceResult:
        """Return a result of an annotation of a category with what else the answer says of it: here nothing.

        Args:
            number: place of its prompt in the batch.
        """
        return found

    def _answer(self, batch: Any, features: ImageFeatures, scaled: Prompts, clicks: np.ndarray | None) -> Answer:
        """Return the masks of prompts in pixels of the network's frame."""
        logits, scores = self._decode(batch, features, scaled)
        counts = torch.bincount(batch.image_index, minlength=len(batch)).tolist()
        parts = zip(logits.split(counts), batch.sizes, strict=True)
        masks = [self._full_size(rows, size) for rows, size in parts]
        return Answer(masks, scores, logits, clicks)

    def _decode(self, batch: Any, features: ImageFeatures, scaled: Prompts) -> tuple[Tensor, Tensor]:
        """Return mask logits [N, 4h, 4w] and predicted IoU [N] of prompts in pixels of the network's frame."""
        low, scores = [], []
        step = PROMPTS_ON_CPU if self.model.device.type == "cpu" else MAX_PROMPTS
        for start in range(0, len(batch.image_index), step):
            part = slice(start, start + step)
            sparse, dense = self.segmenter.encode_prompts(scaled[part])
            prediction = self.segmenter.decode(features, sparse, dense, batch.image_index[part])
            choose = first_mask if self.segmenter.masks_per_prompt == 1 else best_of_three
            logits, iou = prediction.chosen(choose(prediction))
            low.append(logits)
            scores.append(iou.float())
        logits = torch.cat(low)
        if not logits.isfinite().all():
            raise TrainingError(
                f"a mask of {batch.keys} is not finite in {logits.dtype}. Evaluate in fp32, or check the weights"
            )
        return logits, torch.cat(scores)

    def _scale(self, batch: Any, prompts: Prompts) -> Prompts:
        """Return prompts of all images in pixels of the network's frame."""
        counts = torch.bincount(batch.image_index, minlength=len(batch)).tolist()
        ends = np.cumsum(counts)
        spec = self.predictor.prompt_spec
        parts = [
            to_input(prompts[end - count : end], spec, size, self.model)
            for count, end, size in zip(counts, ends, batch.sizes, strict=True)
        ]
        return Prompts(
            **{
                name: torch.cat([getattr(part, name) for part in parts])
                for name in ("points", "labels", "boxes")
                if getattr(prompts, name) is not None
            }
        )

    def _full_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Return masks of one image, bool [n, H, W], made of as many logits at once as memory is meant to hold."""
        side = self.predictor.prompt_spec.size
        step = max(1, MAX_LOGITS // max(size[0] * size[1], side * side))
        parts = [torch.zeros(0, *size, dtype=torch.bool, device=logits.device)]
        for part in logits.split(step):
            own = torch.zeros(len(part), dtype=torch.long, device=part.device)
            parts.append(self.segmenter.postprocess(part, [size], own)[0] > self.predictor.threshold)
        return torch.cat(parts)


def _click(batch: Any, truths: list[np.ndarray], predicted: list[np.ndarray], clicks: np.ndarray) -> np.ndarray:
    """Return the next click of every prompt, int64 [N, 3]."""
    found, start = [], 0
    for truth, mask in zip(truths, predicted, strict=True):
        places, is_positive = next_clicks(truth, mask, clicks[start : start + len(truth), :, :2])
        found.append(np.concatenate([places, is_positive[:, None].astype(np.int64)], axis=1))
        start += len(truth)
    return np.concatenate(found)


OnBatch = Callable[[Any, Sequence[Any], Sequence[Tensor]], None]


@torch.inference_mode()
def measure_annotations(
    ask: PromptedEvaluator,
    batches: Iterable[Any],
    instances: Any,
    on_batch: OnBatch | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[InstanceResult]:
    """Return a result per annotation, in the order of the batches.

    Args:
        instances: the `datasets.instances.InstanceSet` of the batches.
        on_batch: is given each batch, its results, and its masks per image.
        progress: is given the number of images of each batch that is done.
    """
    results: list[InstanceResult] = []
    for batch in batches:
        batch = batch.to(ask.model.device)
        answer = ask(batch)
        truths = (torch.from_numpy(truth).to(ask.model.device) for truth in batch.masks)
        counts = [count_pixels(*pair) for pair in zip(answer.masks, truths, strict=True)]
        found = _results(ask, batch, instances, torch.cat(counts).tolist(), answer)
        results += found
        if on_batch:
            on_batch(batch, found, answer.masks)
        if progress:
            progress(len(batch))
    return results


def _results(
    ask: PromptedEvaluator, batch: Any, instances: Any, counts: list[list[int]], answer: Answer
) -> list[InstanceResult]:
    prompts = (batch.boxes.reshape(-1, 2, 2) if answer.clicks is None else answer.clicks).tolist()
    places = [(i, place) for i, masks in enumerate(batch.masks) for place in range(len(masks))]
    rows = zip(places, counts, prompts, answer.scores.tolist(), strict=True)
    results = []
    for number, ((i, place), (intersection, union, target, predicted), prompt, score) in enumerate(rows):
        about = instances.asked[batch.indices[i]][place]
        found = InstanceResult(
            id=str(about.id),
            phrase=instances.names[about.category],
            key=batch.keys[i],
            image=batch.indices[i],
            place=place,
            intersection=intersection,
            union=union,
            target=target,
            predicted=predicted,
            score=score,
            area=about.area,
            prompt=tuple(map(tuple, prompt)),
        )
        results.append(ask.result(found, about.category, answer, number))
    return results


@torch.inference_mode()
def mask_detections(
    ask: PromptedEvaluator, batches: Iterable[Any], instances: Any, progress: Callable[[int], Any] | None = None
) -> list[tuple[int, list[dict[str, Any]]]]:
    """Return per image its place and a mask for each box of a detector: a COCO list of results without boxes.

    The detector's scores are kept; what the segmenter thinks of its masks does not count.
    """
    results = []
    for batch in batches:
        batch = batch.to(ask.model.device)
        for index, masks in zip(batch.indices, ask(batch).masks, strict=True):
            rles = encode_rle(masks.cpu().numpy())
            found, own = instances.detections, slice(*instances.detections.starts[index : index + 2])
            rows = zip(found.categories[own].tolist(), found.scores[own].tolist(), rles, strict=True)
            identity = instances.images[index][0]
            results.append(
                (
                    index,
                    [
                        {"image_id": identity, "category_id": category, "score": score, "segmentation": rle}
                        for category, score, rle in rows
                    ],
                )
            )
        if progress:
            progress(len(batch))
    return results


def found_annotations(
    instances: Any, indices: Iterable[int], detections: Mapping[int, Sequence[dict[str, Any]]]
) -> list[Case]:
    """Return every annotation that would be asked about, with the detection of its category that overlaps it most.

    Args:
        detections: place of an image -> what `mask_detections` returned for it.
    """
    cases = []
    for index in indices:
        found, starts = detections.get(index, ()), instances.detections.starts
        drawn = instances.encoded(index, instances.asked[index])
        for place, best in enumerate(closest_detections(drawn, found)):
            about, truth = instances.asked[index][place], drawn[place]["segmentation"]
            mask = encode_rle(np.zeros((1, *truth["size"]), bool))[0] if best is None else found[best]["segmentation"]
            intersection, union, target, predicted = count_rles(truth, mask)
            corners = [] if best is None else instances.detections.boxes[starts[index] + best].reshape(2, 2).tolist()
            cases.append(
                Case(
                    InstanceResult(
                        id=str(about.id),
                        phrase=instances.names[about.category],
                        key=instances.images[index][1].path,
                        image=index,
                        place=place,
                        intersection=intersection,
                        union=union,
                        target=target,
                        predicted=predicted,
                        score=0.0 if best is None else found[best]["score"],
                        area=about.area,
                        prompt=tuple(map(tuple, corners)),
                    ),
                    mask,
                )
            )
    return cases
