"""What flows between the parts of a model. The shape legend is in `model/__init__.py`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """What a segmenter keeps of a batch of images; enough to answer any number of prompts.

    * `embedding`: float [B, C, h, w], the image embedding that the mask decoder reads.
    * `high_res`: further levels, finest first: () or ([B, C/8, 4h, 4w], [B, C/4, 2h, 2w]) for SAM 2. For OVSAM what
      names regions: a pyramid [B, C, 4h, 4w] to [B, C, h/2, w/2], then the ResNet's last stage, [B, D, h/2, w/2].
    """

    embedding: Tensor
    high_res: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.embedding.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> "ImageFeatures":
        """Return the features of some of the images; an int keeps the batch dimension."""
        index = slice(index, index + 1 or None) if isinstance(index, int) else index
        return ImageFeatures(self.embedding[index], tuple(level[index] for level in self.high_res))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ImageFeatures":
        """Return the features on another device or in another floating-point type."""
        return ImageFeatures(
            self.embedding.to(device=device, dtype=dtype),
            tuple(level.to(device=device, dtype=dtype) for level in self.high_res),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for safetensors or `torch.save`."""
        return {"embedding": self.embedding} | {f"high_res.{i}": level for i, level in enumerate(self.high_res)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ImageFeatures":
        """Return the features that `tensors()` wrote down."""
        levels = sorted(name for name in tensors if name.startswith("high_res."))
        return cls(tensors["embedding"], tuple(tensors[name] for name in levels))


@dataclass(frozen=True)
class MaskPrediction:
    """All masks of N prompts, before one of them is chosen.

    * `logits`: float [N, M, 4h, 4w]; M = 4 mask tokens: the single-mask token, then three of growing extent. M = 1 for
      OVSAM.
    * `iou`: float [N, M], the predicted IoU of each (in 0..1 for SAM 2, unbounded for SAM and EfficientSAM). OVSAM
      predicts none: there it is the mask's stability, in 0..1.
    * `object_score`: float [N] logits that the object is there, SAM 2 with video weights only.
    * `tokens`: float [N, M, 256], what the decoder made of the mask tokens, SAM 2 only: a video remembers one of them.
    """

    logits: Tensor
    iou: Tensor
    object_score: Tensor | None = None
    tokens: Tensor | None = None

    def chosen(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [N, 4h, 4w] and predicted IoU [N] of one mask per prompt; `index` is int64 [N]."""
        rows = torch.arange(len(index), device=index.device)
        return self.logits[rows, index], self.iou[rows, index]


@dataclass(frozen=True)
class Prompts:
    """Geometric prompts in the segmenter's input pixels, batched over N prompts; any of them may be None.

    * `points`: float [N, P, 2], x y; `labels`: int64 [N, P], 1 foreground, 0 background, -1 padding.
    * `boxes`: float [N, 4], x1 y1 x2 y2.
    * `masks`: float [N, 1, 4h, 4w], logits of an earlier prediction.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    def __bool__(self) -> bool:
        return any(part is not None for part in (self.points, self.boxes, self.masks))

    def __len__(self) -> int:
        return len(getattr(self, self.kinds()[0])) if self else 0

    def __getitem__(self, rows: slice) -> "Prompts":
        """Return some of the N prompts."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Prompts(**{name: value[rows] for name, value in given.items()})

    def kinds(self) -> list[str]:
        """Return which of `points`, `boxes` and `masks` are given."""
        return [name for name in ("points", "boxes", "masks") if getattr(self, name) is not None]


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder says of N phrases on B images; training may ask for more than the first.

    * `vector`: the [CLS] vector, float [N, D]; None where phrases and images were read apart alone.
    * `fit`: logits of the image's patches, float [N, g, g]: which of them the tokens that the last layer reads mark as
      meant, by their product with the mask token.
    * `patches`: tokens of the images read without a phrase, float [B, g * g, D].
    * `words`: mean tokens of the phrases read without an image, float [N, D].
    """

    vector: Tensor | None
    fit: Tensor | None = None
    patches: Tensor | None = None
    words: Tensor | None = None


@dataclass(frozen=True)
class EVFOutput:
    """What one forward returns.

    * `prediction`: all masks of the N phrases; `selected`: int64 [N], which of them the family's rule takes.
    * `prompt`: float [N, 256], the sparse prompt that each phrase became; None where there was no phrase.
    * `features`: of the images, for the next call.
    * `encoder`: what the encoder said; None where there was no phrase.
    """

    prediction: MaskPrediction
    selected: Tensor
    features: ImageFeatures
    prompt: Tensor | None = None
    encoder: EncoderOutput | None = None

    @property
    def logits(self) -> Tensor:
        """The chosen mask of each phrase, float [N, 4h, 4w]."""
        return self.prediction.chosen(self.selected)[0]

    @property
    def scores(self) -> Tensor:
        """The predicted IoU of the chosen masks, float [N]."""
        return self.prediction.chosen(self.selected)[1]
