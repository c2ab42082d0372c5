"""Names of annotated instances: Open-Vocabulary SAM measured with boxes and points, masks and names together.

Source: the evaluation of arXiv 2401.02955.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from configs.evaluation import EvalArgs
from utils.centre_points import centre_points
from utils.class_lists import ClassList, members
from utils.errors import VocabularyError
from utils.instance_metrics import InstanceResult
from utils.known_names import KnownNames
from utils.label_metrics import NamedResult, NameMeans

from .checkpoints.load import Source
from .checkpoints.ovsam import VOCABULARY_FILE
from .naming import Namer, find_vocabulary, folder_of
from .predictor import ImagePredictor
from .prompted_eval import Answer, PromptedEvaluator
from .recognizers.open_vocabulary import Recognizer, mask_boxes
from .types import ImageFeatures, Prompts
from .vocabulary import Vocabulary

ROI_SIZE = {"coco": 12, "lvis": 7}
"""Side of the grid that the head reads, as published."""


@dataclass(frozen=True)
class Classes:
    """The names to choose from, and which of them each category of the annotations is."""

    vocabulary: Vocabulary
    rows: dict[int, int]

    @property
    def kinds(self) -> list[str]:
        """`base`, `novel` or '' for each name."""
        kinds = [""] * len(self.vocabulary)
        for kind, chosen in (("base", self.vocabulary.is_base), ("novel", self.vocabulary.is_novel)):
            if chosen is not None:
                kinds = [kind if one else other for one, other in zip(chosen.tolist(), kinds, strict=True)]
        return kinds


class NamedEvaluator(PromptedEvaluator):
    """Asks for the masks of a batch and their names, as `OpenVocabularyPredictor` gives them.

    Args:
        predictor: of Open-Vocabulary SAM.
        clicks: how many to simulate; None prompts with boxes.
        recognizer: what names regions.
        classes: the names, by category.
        branch: `head`, or `both` that and CLIP.
        as_published: show CLIP the annotated boxes, and click where the published evaluation does: at the place that an
            approximate distance transform of the resized mask finds. With clicks, CLIP's boxes are in pixels of the
            image instead of the resized one, so that they miss the object. There is one click then.
    """

    names_masks = True

    def __init__(
        self,
        predictor: ImagePredictor,
        clicks: int | None,
        recognizer: Recognizer,
        classes: Classes,
        branch: str,
        as_published: bool,
    ) -> None:
        super().__init__(predictor, clicks)
        self.recognizer, self.classes, self.branch, self.as_published = recognizer, classes, branch, as_published
        self.kinds = classes.kinds

    def ask(self, batch: Any, features: ImageFeatures) -> Answer:
        """Return the masks of a batch; see `PromptedEvaluator.ask`."""
        if self.clicks is None or not self.as_published:
            return super().ask(batch, features)
        spec = self.predictor.prompt_spec
        places, shown = [], []
        for masks, size in zip(batch.masks, batch.sizes, strict=True):
            resized = spec.resized_size(*size)
            found = published_points(masks == 1, resized)
            places.append(found)
            shown.append(found.numpy() * np.array([size[1] / resized[1], size[0] / resized[0]]))
        points = torch.cat(places)[:, None].float().to(self.model.device)
        labels = torch.ones(points.shape[:2], dtype=torch.long, device=points.device)
        clicks = np.concatenate(shown)[:, None]
        clicks = np.concatenate([clicks, np.ones_like(clicks[..., :1])], axis=2)
        return self._answer(batch, features, Prompts(points=points, labels=labels), clicks)

    def complete(self, batch: Any, features: ImageFeatures, answer: Answer) -> Answer:
        """Return an answer with the likeliest name of each mask."""
        recognizer, boxes = self.recognizer, mask_boxes(answer.low_res)
        logits = recognizer.logits(recognizer.embed_regions(features, boxes, batch.image_index))
        if self.branch == "both":
            seen = recognizer.embed_with_clip(features, self._clip_boxes(batch, boxes), batch.image_index)
            logits = recognizer.fuse(logits, recognizer.logits(seen), answer.low_res)
        chances = logits.softmax(-1)[:, :-1]
        best = chances.argmax(1, keepdim=True)
        named = zip(best[:, 0].tolist(), chances.gather(1, best)[:, 0].tolist(), strict=True)
        return replace(answer, named=list(named))

    def _clip_boxes(self, batch: Any, boxes: Tensor) -> Tensor:
        """Return what CLIP looks at, [N, 4] in pixels of the input: the boxes of the masks, or those published."""
        if not self.as_published:
            return boxes
        given = batch.boxes if self.clicks else self._scale(batch, Prompts(boxes=batch.boxes)).boxes
        return given.to(boxes.device)

    def about(self) -> dict[str, Any]:
        """Return what else metrics.json says of how it was measured."""
        return {"names": len(self.classes.vocabulary), "branch": self.branch, "roi_size": self.recognizer.roi_size}

    def summary(self, results: Sequence[InstanceResult], images: int, world: int | None) -> NameMeans:
        """Return the means of results; every instance counts once on any number of processes, as published."""
        return NameMeans.of(results)

    def result(self, found: InstanceResult, category: int, answer: Answer, number: int) -> NamedResult:
        """Return a result with the name that the mask got; see `PromptedEvaluator.result`."""
        label, probability = answer.named[number]
        true = self.classes.rows[category]
        return NamedResult(
            **vars(found),
            answer=self.classes.vocabulary.names[label],
            probability=probability,
            is_right=label == true,
            kind=self.kinds[true],
        )


def published_points(masks: np.ndarray, resized: tuple[int, int]) -> Tensor:
    """Return where the published evaluation clicks, int64 [n, 2], x y in pixels of the resized image; 0 0 if empty.

    Args:
        masks: bool [n, H, W].
        resized: height and width of the resized image.
    """
    found = torch.zeros((len(masks), 2), dtype=torch.long)
    for row, one in zip(found, masks, strict=True):
        picture = cv2.resize(one.astype(np.uint8), resized[::-1], interpolation=cv2.INTER_NEAREST)
        x, y, width, height = cv2.boundingRect(picture)
        if width:  # a pass over the picture for each pixel of depth: what is around the mask is left out
            part = torch.from_numpy(picture[y : y + height, x : x + width])[None] == 1
            row[:] = centre_points(part, approximate=True)[0] + torch.tensor([x, y])
    return found


def find_classes(args: EvalArgs, source: Source, instances: Any, device: torch.device) -> Classes:
    """Return the names to choose from; the weights of the model are not read.

    Args:
        instances: the `datasets.instances.InstanceSet`.
        device: encodes names that are words.

    Raises:
        VocabularyError: no vocabulary, or one that is not of these annotations.
    """
    folder, where = folder_of(source.path), args.vocabulary
    files = (folder / f"{args.dataset}.safetensors", folder / VOCABULARY_FILE)
    if where is None:
        where = next((str(path) for path in files if path.is_file()), None)
    vocabulary = _categories(args, source, instances) if where is None else find_vocabulary(where, source.path)
    found = Namer(source.path, source.config, vocabulary, is_own=True).read_vocabulary(device)
    classes = match(
        found, instances, where or "its categories", f"--text {folder} --classes {instances.path} --output {files[0]}"
    )
    return with_kinds(classes, instances, args.base, args.novel)


def open_evaluator(args: EvalArgs, predictor: ImagePredictor, classes: Classes) -> NamedEvaluator:
    """Return what asks for masks and names as the options say."""
    recognizer = Recognizer(predictor.model.segmenter, classes.vocabulary, args.roi_size or ROI_SIZE[args.dataset])
    clicks = (args.num_click or 1) if args.prompt_type == "point" else None
    return NamedEvaluator(predictor, clicks, recognizer, classes, args.branch, args.reference_metric)


def _categories(args: EvalArgs, source: Source, instances: Any) -> ClassList:
    """Return the categories of the annotations, to be encoded.

    Raises:
        VocabularyError: the model has no text tower.
    """
    from .checkpoints.clip import find_text

    if find_text(folder_of(source.path)) is None:
        find_vocabulary(args.dataset, source.path)  # raises, and says what to run
    return ClassList(tuple(instances.names[one] for one in sorted(instances.names)))


def match(vocabulary: Vocabulary, instances: Any, where: str, remedy: str) -> Classes:
    """Return which name each category of the annotations is: the same, or the same as its first wording.

    Args:
        where: what errors call the vocabulary.
        remedy: options of tools/make_vocabulary.py that make another.

    Raises:
        VocabularyError: a category or a name is left over.
    """
    known, advice = KnownNames(vocabulary.names, None, None), f"python -m tools.make_vocabulary {remedy}"
    try:
        rows = {one: known.place(name, str(instances.path)) for one, name in instances.names.items()}
    except VocabularyError as error:
        raise VocabularyError(f"{where}: {error}: {advice}") from None
    left = sorted(set(range(len(vocabulary))) - set(rows.values()))
    if left or len(set(rows.values())) < len(rows):
        reason = f"{vocabulary.names[left[0]]!r} is no category of" if left else "two categories are one name in"
        raise VocabularyError(
            f"{where}: class list and annotations disagree: {reason} {instances.path}. Make the vocabulary of its "
            f"classes: {advice}"
        )
    return Classes(vocabulary, rows)


def with_kinds(classes: Classes, instances: Any, base: str | Path | None, novel: str | Path | None) -> Classes:
    """Return which names are base and novel: by class lists, else by the vocabulary, else by LVIS's frequencies.

    Raises:
        VocabularyError: a class list holds something else, or both hold a name.
    """
    vocabulary = classes.vocabulary
    names = [""] * len(vocabulary)
    for category, row in classes.rows.items():
        names[row] = instances.names[category]
    if base is not None and novel is not None:
        is_base, is_novel = (torch.tensor(members(names, path)) for path in (base, novel))
        if (is_base & is_novel).any():
            name = names[int((is_base & is_novel).nonzero()[0])]
            raise VocabularyError(f"{name!r} is in --base {base} and in --novel {novel}. Leave it in one of them")
    elif vocabulary.is_base is not None or vocabulary.is_novel is not None:
        return classes
    else:
        rare = {one["id"] for one in instances.categories if one.get("frequency") == "r"}
        if not all("frequency" in one for one in instances.categories):
            return classes
        is_novel = torch.zeros(len(vocabulary), dtype=torch.bool)
        is_novel[[classes.rows[one] for one in sorted(rare)]] = True
        is_base = ~is_novel
    return replace(classes, vocabulary=replace(vocabulary, is_base=is_base, is_novel=is_novel))
