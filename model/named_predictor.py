"""Click, and get the mask and its name: Open-Vocabulary SAM on the predictor of every other model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import ModelError, PromptError, VocabularyError
from utils.image import ImageLike
from utils.masks import boxes_of_masks, decode_rle
from utils.precision import choose_device

from .checkpoints.clip import find_text, load_text
from .checkpoints.load import find_source, load_model
from .checkpoints.ovsam import VOCABULARY_FILE
from .encoders.clip_text import ClipText
from .evf import EVFModel
from .predictor import ImagePredictor, Prediction
from .recognizers.open_vocabulary import AT_ONCE, Recognizer, mask_boxes
from .segmenters.ovsam import OVSAMSegmenter
from .vocabulary import Vocabulary, make_vocabulary, read_vocabulary

Branch = Literal["head", "both"]


@dataclass(frozen=True)
class Names:
    """The likeliest names of N masks.

    * `names`: per mask k names, the likeliest first.
    * `probabilities`: float32 [N, k], of all names and "none of them" together 1.
    """

    names: list[list[str]]
    probabilities: np.ndarray


@dataclass(frozen=True)
class NamedPrediction(Prediction, Names):
    """Masks and their names; `scores` are the stability of the masks, for nothing predicts their IoU."""


class OpenVocabularyPredictor:
    """Answers points and boxes with a mask and its names, and names the masks of any other model.

    Args:
        model: Open-Vocabulary SAM, in evaluation mode, on its device; or a predictor of it, whose image is then shared.
        vocabulary: the names to choose from, made or as words; may be set later.
        text: the text tower, needed for words.
        branch: who names: the trained `head`, as in the published demonstration, or `both` that and CLIP itself, as in
            the published evaluation. That gives CLIP the true box; here it is the box of the mask.
        roi_size: see `Recognizer`.
        threshold: a pixel is in the mask where its logit is above; a given predictor has its own.

    Raises:
        ModelError: another model, or an unknown branch. VocabularyError: as `set_vocabulary`.
    """

    def __init__(
        self,
        model: EVFModel | ImagePredictor,
        vocabulary: Vocabulary | Sequence[str] | None = None,
        text: ClipText | None = None,
        branch: Branch = "head",
        roi_size: int = 12,
        threshold: float = 0.0,
    ) -> None:
        predictor = model if isinstance(model, ImagePredictor) else None
        model = predictor.model if predictor else model
        if not isinstance(model.segmenter, OVSAMSegmenter):
            raise ModelError(f"{model.config.name} gives no names. Take an ovsam model, such as ovsam-rn50x16")
        if branch not in ("head", "both"):
            raise ModelError(f"branch {branch!r}: known are 'head' and 'both'")
        if roi_size < 1:
            raise ModelError(f"roi_size {roi_size}: needed is at least 1")
        self.predictor = predictor or ImagePredictor(model, threshold=threshold)
        self.text, self.branch, self.roi_size = text, branch, roi_size
        self._recognizer: Recognizer | None = None
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        """The names to choose from.

        Raises:
            VocabularyError: none were set.
        """
        if self._recognizer is None:
            raise VocabularyError("no vocabulary set. Give names, or a file of tools/make_vocabulary.py")
        return self._recognizer.vocabulary

    def set_vocabulary(self, vocabulary: Vocabulary | Sequence[str]) -> None:
        """Choose from other names from now on; words cost one pass of the text tower, images are not read again.

        Raises:
            VocabularyError: no names, repeated ones, vectors of another model, or words without a text tower.
        """
        if not isinstance(vocabulary, Vocabulary):
            if isinstance(vocabulary, str):
                raise VocabularyError(f"vocabulary is the text {vocabulary!r}. Give a list of names")
            if self.text is None:
                raise VocabularyError(
                    "words need CLIP's text tower, which was not loaded. Give its weights (OpenAI's RN50x16.pt), or a "
                    "vocabulary file of tools/make_vocabulary.py"
                )
            vocabulary = make_vocabulary(self.text, vocabulary)
        if self._recognizer is None:
            self._recognizer = Recognizer(self.predictor.model.segmenter, vocabulary, self.roi_size)
        else:
            self._recognizer.set_vocabulary(vocabulary)

    def set_image(self, image: ImageLike) -> None:
        """Read and encode an image; see `ImagePredictor.set_image`."""
        self.predictor.set_image(image)

    @torch.inference_mode()
    def predict(
        self,
        points: np.ndarray | Sequence | None = None,
        labels: np.ndarray | Sequence | None = None,
        boxes: np.ndarray | Sequence | None = None,
        masks: np.ndarray | Tensor | None = None,
        vocabulary: Vocabulary | Sequence[str] | None = None,
        top_k: int = 5,
    ) -> NamedPrediction:
        """Predict one mask for each set of points or each box, and its names.

        Args:
            points, labels, boxes, masks: as `ImagePredictor.predict`. The published model was trained with points that
                are on the object alone; label 0 works through SAM's weights.
            vocabulary: other names from now on; see `set_vocabulary`.
            top_k: names of each mask.

        Raises:
            PromptError: as `ImagePredictor.predict`. VocabularyError: no vocabulary, or one that cannot be.
        """
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)
        self._check(top_k)
        found = self.predictor.predict(points=points, labels=labels, boxes=boxes, masks=masks)
        named = self.name_low_res(found.low_res, top_k)
        values = {field.name: getattr(found, field.name) for field in fields(Prediction)}
        return NamedPrediction(names=named.names, probabilities=named.probabilities, **values)

    @torch.inference_mode()
    def name_low_res(self, low_res: np.ndarray, top_k: int = 5) -> Names:
        """Name masks of the image that this model predicted.

        Args:
            low_res: their logits, float32 [N, 4h, 4w]; see `Prediction`.
            top_k: names of each mask.

        Raises:
            VocabularyError: no vocabulary.
        """
        self._check(top_k)
        logits = torch.from_numpy(low_res).to(self.predictor.model.device)
        return self._name(mask_boxes(logits), logits, top_k)

    @torch.inference_mode()
    def name_masks(self, masks: np.ndarray | Sequence[dict], top_k: int = 5) -> Names:
        """Name masks of the image, whatever they are from: a phrase, another model, or a search for everything.

        Args:
            masks: bool [N, H, W] or [H, W], at the size of the image, or what `MaskGenerator.generate` returned for it.
                An empty mask gets every name as likely.
            top_k: names of each mask.

        Raises:
            PromptError: no image set, or masks of another size. VocabularyError: no vocabulary.
        """
        self._check(top_k)
        if self.predictor._image is None:
            raise PromptError("no image set. Call set_image(image) first")
        size = self.predictor._image.sizes[0]
        shown = masks if isinstance(masks, np.ndarray) else decoded(masks, size)
        shown = shown[None] if shown.ndim == 2 else shown
        if shown.dtype != bool or shown.ndim != 3 or shown.shape[1:] != size:
            raise PromptError(
                f"masks are {shown.dtype} {list(shown.shape)}; needed is bool [N, {size[0]}, {size[1]}], as the image"
            )
        height, width = self.predictor.prompt_spec.resized_size(*size)
        device = self.predictor.model.device
        scale = torch.tensor([width / size[1], height / size[0]], device=device).repeat(2)
        parts = []
        for start in range(0, len(shown), AT_ONCE):
            given = torch.from_numpy(shown[start : start + AT_ONCE]).to(device)
            parts.append(self._name(boxes_of_masks(given) * scale, self._to_low_res(given, (height, width)), top_k))
        names = [row for part in parts for row in part.names]
        chances = [part.probabilities for part in parts]
        return Names(names, np.concatenate(chances) if chances else np.zeros((0, min(top_k, len(self.vocabulary)))))

    def _to_low_res(self, masks: Tensor, resized: tuple[int, int]) -> Tensor:
        """Return masks bool [N, H, W] as logits 1 and -1 on the grid that the decoder answers on."""
        side = self.predictor.prompt_spec.size
        height, width = (max(1, round(length / 4)) for length in resized)
        logits = F.interpolate(masks[:, None].float() * 2 - 1, (height, width), mode="bilinear", align_corners=False)
        return F.pad(logits[:, 0], (0, side // 4 - width, 0, side // 4 - height), value=-1.0)

    def _check(self, top_k: int) -> None:
        if top_k < 1:
            raise PromptError(f"top_k {top_k}: needed is at least 1")
        _ = self.vocabulary  # refuses where there is none

    def _name(self, boxes: Tensor, low_res: Tensor, top_k: int) -> Names:
        """Return the names of regions: boxes float [N, 4] in input pixels, mask logits [N, 4h, 4w]."""
        recognizer, features = self._recognizer, self.predictor._image.features
        index = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        logits = recognizer.logits(recognizer.embed_regions(features, boxes, index))
        if self.branch == "both":
            clip = recognizer.logits(recognizer.embed_with_clip(features, boxes, index))
            logits = recognizer.fuse(logits, clip, low_res)
        likely = logits.softmax(-1)[:, :-1].topk(min(top_k, len(self.vocabulary)))
        names = [[self.vocabulary.names[i] for i in row] for row in likely.indices.tolist()]
        return Names(names, likely.values.cpu().numpy())


def load_open_vocabulary(
    source: str | Path,
    vocabulary: str | Path | Sequence[str] | Vocabulary | None = None,
    text: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    branch: Branch = "head",
    roi_size: int = 12,
) -> OpenVocabularyPredictor:
    """Load Open-Vocabulary SAM with its names.

    Args:
        source: as `load_model`: a folder of tools/assemble_ovsam.py, or one with the four published files.
        vocabulary: file of names and vectors, or words; None takes vocabulary.safetensors of the folder, where it is.
        text: the text tower's weights; None takes those of the folder, where they are.
        device: None takes CUDA, then MPS, then the CPU.
        dtype: floating-point type of the model's weights; the text tower has float32.
        branch, roi_size: as `OpenVocabularyPredictor`.

    Raises:
        TextSAMError: as `load_model`, `load_text`, `read_vocabulary` and `OpenVocabularyPredictor`.
    """
    path = find_source(source)
    model = load_model(path, device=choose_device(None if device is None else str(device)), dtype=dtype)
    if not isinstance(model.segmenter, OVSAMSegmenter):
        raise ModelError(f"{model.config.name} gives no names. Take an ovsam model, such as ovsam-rn50x16")
    weights = Path(text) if text is not None else find_text(path)
    tower = None if weights is None else load_text(model.config.segmenter, weights).to(model.device)
    if vocabulary is None and (path / VOCABULARY_FILE).is_file():
        vocabulary = path / VOCABULARY_FILE
    if isinstance(vocabulary, str | Path):
        vocabulary = read_vocabulary(vocabulary)
    return OpenVocabularyPredictor(model, vocabulary, tower, branch, roi_size)


def decoded(found: Sequence[dict], size: tuple[int, int]) -> np.ndarray:
    """Return the masks that `MaskGenerator` found on an image of `size` (H, W), in any output mode, bool [N, H, W]."""
    masks = [entry["segmentation"] for entry in found]
    pictures = [decode_rle(_packed(mask)) if isinstance(mask, dict) else mask for mask in masks]
    if any(picture.shape != size for picture in pictures):
        raise PromptError(f"masks of another image: needed is the size {list(size)}")
    return np.stack(pictures) if pictures else np.zeros((0, *size), bool)


def _packed(rle: dict) -> dict:
    """Return an RLE whose counts are text or bytes; those of `uncompressed_rle` are numbers."""
    from pycocotools import mask as coco_mask

    return coco_mask.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle
