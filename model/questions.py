"""What inference.py asks of an image: phrases, points, boxes, or everything."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.inference import InferenceArgs
from utils.errors import ModelError, PromptError
from utils.masks import decode_rle, encode_rle
from utils.visualize import label_overlay, mark_boxes, mark_points, overlay, with_legend

from .predictor import ImagePredictor, Prediction


@dataclass(frozen=True)
class Answer:
    """What was found on one image.

    * `records`: for results.json, one dict per mask.
    * `masks`: bool [K, H, W]; `logits`: float32 [K, H, W], None where everything was asked for; `low_res`: float32
      [K, 4h, 4w], likewise.
    """

    records: list[dict[str, Any]]
    masks: np.ndarray
    logits: np.ndarray | None
    low_res: np.ndarray | None = None


class Question(ABC):
    """Asked of every image of a run.

    * `count`: how many masks an image gets; None where that depends on the image.
    * `kind`: what the model must take: `phrases`, `points` or `boxes`.
    """

    count: int | None
    kind: str

    @property
    @abstractmethod
    def settings(self) -> list[Any]:
        """What the masks depend on, for JSON."""

    @abstractmethod
    def ask(self, predictor: ImagePredictor, image: np.ndarray) -> Answer:
        """Return what a predictor finds on an RGB image, uint8 [H, W, 3].

        Raises:
            PromptError: a place that this image does not have.
        """

    @abstractmethod
    def picture(self, image: np.ndarray, answer: Answer) -> np.ndarray:
        """Return a picture of all masks, uint8 RGB."""

    def mark(self, picture: np.ndarray, k: int, answer: Answer) -> np.ndarray:
        """Return a picture with what asked for mask k drawn in; phrases are not."""
        return picture


class _Prompted(Question):
    """A fixed list of prompts, each with a mask of its own."""

    titles: tuple[str, ...]
    asked: tuple[dict[str, Any], ...]

    @abstractmethod
    def predict(self, predictor: ImagePredictor) -> Prediction:
        """Return the prediction on the image that is set."""

    def ask(self, predictor: ImagePredictor, image: np.ndarray) -> Answer:
        """Return one mask per title; see `Question.ask`."""
        predictor.set_image(image)
        found = self.predict(predictor)
        size = image.shape[:2]
        masks, logits, boxes = found.masks.reshape(-1, *size), found.logits.reshape(-1, *size), found.boxes
        rows = zip(self.asked, found.scores.ravel(), boxes.reshape(-1, 4), masks, encode_rle(masks), strict=True)
        records = [
            {
                **asked,
                "score": round(float(score), 6),
                "box": [round(float(value), 1) for value in box],
                "area": int(mask.sum()),
                "segmentation": rle,
            }
            for asked, score, box, mask, rle in rows
        ]
        return Answer(records, masks, logits, found.low_res.reshape(len(masks), *found.low_res.shape[-2:]))

    def picture(self, image: np.ndarray, answer: Answer) -> np.ndarray:
        """Return the masks in colours, with a legend where there are several."""
        picture = overlay(image, answer.masks)
        for k in range(len(self.titles)):
            picture = self.mark(picture, k, answer)
        if len(self.titles) == 1:
            return picture
        lines = []
        for k, (title, row) in enumerate(zip(self.titles, answer.records, strict=True)):
            missing = "" if row["area"] else ", nothing found"
            lines.append(f"{k}: {title}  {row['score']:.2f}{missing}{names_text(row, before=' | ')}")
        return with_legend(picture, lines)


class Phrases(_Prompted):
    """A mask per phrase."""

    kind = "phrases"

    def __init__(self, phrases: Sequence[str], semantic: bool) -> None:
        self.titles, self.semantic, self.count = tuple(phrases), semantic, len(phrases)
        self.asked = tuple({"phrase": phrase} for phrase in phrases)

    @property
    def settings(self) -> list[Any]:
        """The phrases; see `Question.settings`."""
        return [self.titles, self.semantic]

    def predict(self, predictor: ImagePredictor) -> Prediction:
        """Return a mask per phrase."""
        return predictor.predict(self.titles, semantic=self.semantic)


class Places(_Prompted):
    """One mask for all points together, or a mask per box; three each with `multimask`.

    Args:
        points: x y label, [P, 3]; or boxes: x1 y1 x2 y2, [N, 4]; one of them is empty.
    """

    def __init__(self, points: list[list[float]], boxes: list[list[float]], multimask: bool) -> None:
        self.points, self.boxes, self.multimask = points, boxes, multimask
        self.kind = "points" if points else "boxes"
        asked = [{"points": points}] if points else [{"prompt_box": box} for box in boxes]
        titles = ["points" if len(points) > 1 else "point"] if points else [f"box {k}" for k in range(len(boxes))]
        if multimask:
            asked = [{**one, "choice": k} for one in asked for k in range(3)]
            titles = [f"{title}, choice {k}" for title in titles for k in range(3)]
        self.asked, self.titles, self.count = tuple(asked), tuple(titles), len(titles)

    @property
    def settings(self) -> list[Any]:
        """The places; see `Question.settings`."""
        return [self.points, self.boxes, self.multimask]

    def predict(self, predictor: ImagePredictor) -> Prediction:
        """Return the masks of the points or boxes."""
        if self.points:
            places = np.array(self.points)
            return predictor.predict(points=places[:, :2], labels=places[:, 2], multimask=self.multimask)
        return predictor.predict(boxes=self.boxes, multimask=self.multimask)

    def mark(self, picture: np.ndarray, k: int, answer: Answer) -> np.ndarray:
        """Draw the points, or the box of mask k."""
        if self.points:
            return mark_points(picture, np.array(self.points))
        return mark_boxes(picture, np.array(self.boxes)[[k // (3 if self.multimask else 1)]])


class Everything(Question):
    """All objects; see `MaskGenerator`, whose arguments `options` are."""

    kind, count = "points", None

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    @property
    def settings(self) -> list[Any]:
        """The thresholds; see `Question.settings`."""
        return [self.options]

    def ask(self, predictor: ImagePredictor, image: np.ndarray) -> Answer:
        """Return every mask, the best first; see `Question.ask`."""
        from .everything import MaskGenerator  # torchvision: a second that phrases need not wait for

        found = MaskGenerator(predictor, **self.options, output_mode="coco_rle").generate(image)
        records = [
            {
                "point": row["point_coords"][0],
                "score": round(row["predicted_iou"], 6),
                "stability": round(row["stability_score"], 6),
                "box": [*row["bbox"][:2], row["bbox"][0] + row["bbox"][2], row["bbox"][1] + row["bbox"][3]],
                "area": row["area"],
                "segmentation": row["segmentation"],
            }
            for row in found
        ]
        masks = [decode_rle(row["segmentation"]) for row in found]
        return Answer(records, np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool), None)

    def picture(self, image: np.ndarray, answer: Answer) -> np.ndarray:
        """Return each pixel in the colour of the smallest mask it lies in."""
        return label_overlay(image, smallest_on_top(answer.masks))


def names_text(record: dict[str, Any], most: int | None = None, before: str = "") -> str:
    """Return the names of a mask's record with their probabilities, '' where it has none: `cat 83%, dog 9%`.

    Args:
        most: so many of them; None takes all.
        before: goes before the first name.
    """
    rows = [(row["name"].replace("_", " "), row["probability"]) for row in record.get("names", [])[:most]]
    texts = [f"{name} {chance:.0%}" if chance >= 0.005 else f"{name} <1%" for name, chance in rows]
    return before + ", ".join(texts) if texts else ""


def smallest_on_top(masks: np.ndarray) -> np.ndarray:
    """Return which mask each pixel shows, counted from 1, uint16 [H, W]; 0 where there is none.

    Args:
        masks: bool [K, H, W]; where they overlap the smallest is seen.
    """
    labels = np.zeros(masks.shape[1:], np.uint16)
    for k in np.argsort(-masks.sum((1, 2)), kind="stable"):
        labels[masks[k]] = k + 1
    return labels


def question_of(args: InferenceArgs) -> Question:
    """Return what the options ask.

    Raises:
        PromptError: options that do not go together, or a point or box that is none.
    """
    given = [name for name in ("prompt", "point", "box") if getattr(args, name)]
    mode = args.mode or {"prompt": "text"}.get(given[0] if given else "prompt", given[0] if given else "text")
    own = {"text": "prompt", "point": "point", "box": "box"}.get(mode)
    for name in given:
        if name != own:
            needed = {"prompt": "text", "point": "point", "box": "box"}[name]
            raise PromptError(f"--{name} goes with --mode {needed}, not with {mode}. Leave one of them out")
    if args.semantic and mode != "text":
        raise PromptError(f"--semantic is about phrases, not about --mode {mode}. Leave it out")
    if args.multimask and mode not in ("point", "box"):
        raise PromptError(f"--multimask goes with points and boxes, not with --mode {mode}. Leave it out")
    if mode == "all":
        if args.save_logits:
            raise PromptError("--save_logits: there are none with --mode all. Leave it out")
        names = (
            "points_per_side", "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_n_layers",
            "min_mask_region_area",
        )  # fmt: skip
        return Everything({name: getattr(args, name) for name in names})
    if mode == "text":
        check_phrases(args.prompt)
        return Phrases(args.prompt, args.semantic)
    texts = args.point if mode == "point" else args.box
    if not texts:
        example = "--point 120,80,1" if mode == "point" else "--box 40,30,200,160"
        raise PromptError(f"--mode {mode} needs a {mode}: {example}")
    if mode == "point":
        points = [point for text in texts for point in read_numbers("--point", text, (2, 3), "x,y,label")]
        points = [point if len(point) == 3 else [*point, 1.0] for point in points]
        for *_, label in points:
            if label not in (0, 1):
                raise PromptError(f"--point: label {label:g}; labels are 1 (on the object) or 0 (not)")
        return Places(points, [], args.multimask)
    boxes = [box for text in texts for box in read_numbers("--box", text, (4,), "x1,y1,x2,y2")]
    for x1, y1, x2, y2 in boxes:
        if x2 <= x1 or y2 <= y1:
            raise PromptError(f"--box {x1:g},{y1:g},{x2:g},{y2:g} is empty: needed is x1 < x2 and y1 < y2")
    return Places([], boxes, args.multimask)


def check_phrases(phrases: Sequence[str]) -> None:
    """Refuse phrases that say nothing.

    Raises:
        PromptError: none, an empty one, or one twice.
    """
    if not phrases:
        raise PromptError("no phrase. Give at least one: --prompt 'the zebra on the left'")
    for phrase in phrases:
        if not phrase.strip():
            raise PromptError(f"empty phrase {phrase!r}. Describe the object: --prompt 'the zebra on the left'")
    if len(set(phrases)) < len(phrases):
        raise PromptError("the same --prompt was given twice. Give each phrase once")


def read_numbers(option: str, text: str, counts: tuple[int, ...], form: str) -> list[list[float]]:
    """Return the rows of a point or box option: `1,2,3`, or as published `[[1,2,3],[4,5,6]]`.

    Raises:
        PromptError: no numbers, or not as many as one of `counts`.
    """
    try:
        rows = json.loads(text if text.lstrip().startswith("[") else f"[{text}]")
        rows = rows if isinstance(rows, list) and rows and isinstance(rows[0], list) else [rows]
        rows = [[float(value) for value in row] for row in rows]
    except (ValueError, TypeError):
        rows = []
    if not rows or any(len(row) not in counts or not np.isfinite(row).all() for row in rows):
        raise PromptError(f"{option} {text!r}: needed is {form}, in pixels of the image")
    return rows


def require_kind(predictor: ImagePredictor, question: Question, version: str) -> None:
    """Refuse a model that cannot be asked.

    Raises:
        ModelError: what it takes, and what to give.
    """
    kinds = predictor.model.segmenter.prompt_kinds
    if question.kind != "phrases" and question.kind not in kinds:
        raise ModelError(
            f"{version} is {predictor.model.config.name}, which takes no {question.kind}. Give --version a SAM, SAM-2 "
            "or EfficientViT-SAM checkpoint"
        )
