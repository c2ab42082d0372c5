"""One image, many phrases: the image is encoded once, K phrases cost one encoder batch and one decoder call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from utils.errors import ModelError, PromptError
from utils.image import ImageLike, ImageSpec, read_image
from utils.masks import boxes_of_masks
from utils.precision import choose_device
from utils.tokenizer import PhraseTokenizer, semantic_phrase

from .checkpoints.load import find_source, load_model
from .evf import EVFModel
from .prompts import read_prompts, to_input
from .types import ImageFeatures, Prompts

MAX_PROMPTS = 32
"""Prompts decoded in one call; more are done in several, so that memory stays bounded."""


@dataclass(frozen=True)
class Prediction:
    """The masks of N prompts on one image.

    With `multimask` there are three masks per prompt, and every [N, ...] is [N, 3, ...].

    * `masks`: bool [N, H, W]; `logits`: float32 [N, H, W], positive where the mask is.
    * `scores`: float32 [N], the predicted IoU: 0..1 for SAM 2, roughly so for SAM and EfficientSAM.
    * `boxes`: float32 [N, 4], x1 y1 x2 y2 in pixels around the mask, x2 and y2 exclusive, zeros where it is empty.
    * `low_res`: float32 [N, 4h, 4w], to be given back as a mask prompt.
    """

    masks: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    low_res: np.ndarray


@dataclass(frozen=True)
class _Images:
    """What is kept of a batch of images between phrases."""

    sizes: list[tuple[int, int]]
    features: ImageFeatures
    encoder_pixels: Tensor | None


class ImagePredictor:
    """Answers phrases, points and boxes about images.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: needed for phrases.
        preprocessing: `inference` resizes as the published inference.py, `evaluation` as its eval.py. A model without
            an encoder resizes as its own release.
        threshold: a pixel is in the mask where its logit is above.

    Raises:
        ModelError: a model that can take neither phrases nor points, or an unknown preprocessing.
    """

    def __init__(
        self,
        model: EVFModel,
        tokenizer: PhraseTokenizer | None = None,
        preprocessing: Literal["inference", "evaluation"] = "inference",
        threshold: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.threshold = model, tokenizer, threshold
        if preprocessing not in ("inference", "evaluation"):
            raise ModelError(f"preprocessing {preprocessing!r}: known are 'inference' and 'evaluation'")
        if model.encoder is None and not model.segmenter.prompt_kinds:
            raise ModelError(
                f"{model.config.name} alone takes no prompts. Load it with an encoder, as an EVF-SAM model"
            )
        spec = model.segmenter.own_image_spec if model.encoder is None else model.segmenter.image_spec
        self.image_spec: ImageSpec = spec.for_evaluation() if preprocessing == "evaluation" else spec
        self.prompt_spec = model.segmenter.prompt_spec(self.image_spec)
        self._image: _Images | None = None

    @torch.inference_mode()
    def set_image(self, image: ImageLike) -> None:
        """Read and encode an image; every later `predict` is about it.

        Args:
            image: path, Pillow image, or RGB array uint8 [H, W, 3].

        Raises:
            ImageError: the image cannot be used; the earlier one stays set.
        """
        self._image = self._encode([read_image(image)])

    def predict(
        self,
        phrases: str | Sequence[str] | None = None,
        semantic: bool = False,
        points: np.ndarray | Sequence | None = None,
        labels: np.ndarray | Sequence | None = None,
        boxes: np.ndarray | Sequence | None = None,
        masks: np.ndarray | Tensor | None = None,
        multimask: bool = False,
    ) -> Prediction:
        """Predict one mask per phrase, or per set of points, box or mask where there is no phrase.

        Geometric prompts go with the phrases: one for all of them, or one each.

        Args:
            phrases: one phrase or K of them.
            semantic: ask for everything of a class (multitask models): prefixes `[semantic] `.
            points: x y in pixels of the original image, [P, 2] or [N, P, 2].
            labels: 1 foreground, 0 background, [P] or [N, P]; default all 1.
            boxes: x1 y1 x2 y2 in pixels of the original image, [4] or [N, 4].
            masks: `low_res` logits of an earlier prediction, [4h, 4w] or [N, 4h, 4w].
            multimask: return three masks per prompt, from a part to the whole: every array of the prediction then has
                shape [N, 3, ...]. Without it a lone point gets the best of the three, anything else the mask that the
                family keeps for clear prompts.

        Raises:
            PromptError: no image set, no prompt, an empty or over-long phrase, shapes that do not fit, a point or box
                outside the image, or a kind of prompt that the segmenter has no weights for.
        """
        if self._image is None:
            raise PromptError("no image set. Call set_image(image) first")
        if multimask and self.model.segmenter.masks_per_prompt == 1:
            raise PromptError(f"{self.model.config.name} makes one mask of a prompt. Leave multimask out")
        phrases = self._phrases(phrases, semantic)
        size = self._image.sizes[0]
        given = read_prompts(size, points, labels, boxes, masks, self.prompt_spec.size // 4, len(phrases))
        prompts = to_input(given, self.prompt_spec, size, self.model)
        index = [0] * (len(phrases) or len(given))
        return self._predict(self._image, phrases, index, prompts, multimask)[0]

    @torch.inference_mode()
    def predict_batch(
        self,
        images: Sequence[ImageLike],
        phrases: Sequence[str | Sequence[str]],
        semantic: bool = False,
        batch_size: int = 8,
    ) -> list[Prediction]:
        """Predict masks on many images; images and phrases go through the model in batches.

        Args:
            images: B of them, as in `set_image`.
            phrases: for each image one phrase or several.
            batch_size: images encoded together.

        Raises:
            PromptError: the counts differ, or a phrase is empty. ImageError: an image cannot be used.
            ModelError: batch_size below 1.
        """
        if batch_size < 1:
            raise ModelError(f"batch_size {batch_size}: needed is at least 1")
        if isinstance(phrases, str):
            raise PromptError(f"phrases is the text {phrases!r}. Give a list with one entry per image")
        if len(images) != len(phrases):
            raise PromptError(f"{len(images)} images, but phrases for {len(phrases)}. Give one entry per image")
        per_image = [self._phrases(entry, semantic) for entry in phrases]
        if any(not entry for entry in per_image):
            raise PromptError("an image without a phrase. Give each image at least one")
        results: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            encoded = self._encode([read_image(image) for image in images[start : start + batch_size]])
            batch = per_image[start : start + batch_size]
            index = [i for i, entry in enumerate(batch) for _ in entry]
            results += self._predict(encoded, [phrase for entry in batch for phrase in entry], index, Prompts())
        return results

    def _encode(self, images: list[np.ndarray]) -> _Images:
        model = self.model
        pixels = torch.stack([self.image_spec(image) for image in images])
        features = model.segmenter.encode_image(pixels.to(model.device, model.dtype))
        small = None
        if model.encoder is not None:
            dtype = model.encoder.vision_embed.proj.weight.dtype
            small = torch.stack([model.encoder.image_spec(image) for image in images]).to(model.device, dtype)
        return _Images([image.shape[:2] for image in images], features, small)

    def _phrases(self, phrases: str | Sequence[str] | None, semantic: bool) -> list[str]:
        listed = [] if phrases is None else [phrases] if isinstance(phrases, str) else list(phrases)
        if listed and (self.model.encoder is None or self.tokenizer is None):
            raise PromptError("this model has no phrase encoder or no tokenizer: give points or boxes instead")
        for phrase in listed:
            if not isinstance(phrase, str):
                raise PromptError(f"phrase {phrase!r} is {type(phrase).__name__}, needed is text")
            if not phrase.strip():
                raise PromptError(f"empty phrase {phrase!r}. Describe the object, for example 'the zebra on the left'")
        if semantic:
            listed = [semantic_phrase(phrase) for phrase in listed]
        for phrase in listed:
            self.tokenizer.encode(phrase)
        return listed

    @torch.inference_mode()
    def _predict(
        self, images: _Images, phrases: list[str], index: list[int], prompts: Prompts, multimask: bool = False
    ) -> list[Prediction]:
        model, choices = self.model, 3 if multimask else 1
        image_index = torch.tensor(index, device=model.device)
        ids = padding = None
        if phrases:
            ids, padding = self.tokenizer(phrases)
            padding = padding.to(model.device) if padding.any() else None
            ids = ids.to(model.device)
        full: list[list[tuple[np.ndarray, ...]]] = [[] for _ in images.sizes]
        scores: list[Tensor] = []
        low_res: list[Tensor] = []
        for start in range(0, len(index), MAX_PROMPTS):
            part = slice(start, start + MAX_PROMPTS)
            output = model(
                images.features,
                images.encoder_pixels,
                None if ids is None else ids[part],
                None if padding is None else padding[part],
                image_index[part],
                prompts[part],
            )
            found = output.prediction
            logits, iou = (
                (found.logits[:, 1:].flatten(0, 1), found.iou[:, 1:].flatten())
                if multimask
                else found.chosen(output.selected)
            )
            owners = image_index[part].repeat_interleave(choices)
            for i, masks in enumerate(model.segmenter.postprocess(logits, images.sizes, owners)):
                full[i].append(self._to_cpu(masks))
            scores.append(iou.float().cpu())
            low_res.append(logits.float().cpu())
        all_scores, all_low_res, rows = torch.cat(scores).numpy(), torch.cat(low_res).numpy(), np.repeat(index, choices)
        results = []
        for i in range(len(images.sizes)):
            masks, full_logits, boxes = (_join(parts) for parts in zip(*full[i], strict=True))
            full[i] = []
            parts = masks, full_logits, all_scores[rows == i], boxes, all_low_res[rows == i]
            results.append(Prediction(*(part.reshape(-1, 3, *part.shape[1:]) if multimask else part for part in parts)))
        return results

    def _to_cpu(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return masks, logits and boxes; threshold and boxes are computed where the logits are."""
        masks = logits > self.threshold
        return masks.cpu().numpy(), logits.cpu().numpy(), boxes_of_masks(masks).cpu().numpy()


def _join(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load_predictor(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    preprocessing: Literal["inference", "evaluation"] = "inference",
    max_length: int = 512,
    overlong: Literal["error", "truncate"] = "error",
    tokenizer: str | Path | None = None,
) -> ImagePredictor:
    """Load a model with its tokenizer.

    Args:
        source: as `load_model`.
        device: None takes CUDA, then MPS, then the CPU.
        dtype: floating-point type of the weights.
        max_length, overlong: longest phrase in tokens, and what to do with a longer one; see `PhraseTokenizer`.
        tokenizer: sentencepiece file or its folder; None takes it from the checkpoint's folder.

    Raises:
        TextSAMError: as `load_model`, and where a model with an encoder has no tokenizer.
    """
    path = find_source(source)
    model = load_model(path, device=choose_device(None if device is None else str(device)), dtype=dtype)
    words = None
    if model.encoder is not None:
        words = PhraseTokenizer(tokenizer or path, min(max_length, model.encoder.config.max_text_tokens), overlong)
    return build_predictor(model, words, preprocessing)


def build_predictor(
    model: EVFModel,
    tokenizer: PhraseTokenizer | None,
    preprocessing: Literal["inference", "evaluation"] = "inference",
) -> ImagePredictor:
    """Join a model and a tokenizer that were loaded on their own.

    Raises:
        ModelError: the tokenizer has more ids than the encoder's table.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.encoder.config.vocab_size:
        raise ModelError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, but the encoder's table "
            f"{model.encoder.config.vocab_size}. Take the tokenizer from the checkpoint's own folder"
        )
    return ImagePredictor(model, tokenizer, preprocessing)
