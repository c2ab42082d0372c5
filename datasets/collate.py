"""Samples to batches: preprocessing in the worker, phrases tokenised, everything packed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.image import ImageSpec
from utils.tokenizer import PhraseTokenizer

from .sample import Batch, Sample

FeatureReader = Callable[[Sample], Mapping[str, Tensor] | None]
"""Returns the cached image features of a sample, or None where there are none yet."""


@dataclass(frozen=True)
class Collate:
    """Turns samples into a `Batch`; give it to a `DataLoader` as `collate_fn`.

    * `image_spec`, `encoder_spec`: how the segmenter and the encoder see an image.
    * `features`: where set, images with cached features are not preprocessed for the segmenter.
    """

    image_spec: ImageSpec
    encoder_spec: ImageSpec
    tokenizer: PhraseTokenizer
    features: FeatureReader | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Pack samples.

        Raises:
            PromptError: a phrase is empty, or too long for the tokenizer.
        """
        features = tuple(self.features(sample) if self.features else None for sample in samples)
        pixels = [self.image_spec(s.image) for s, cached in zip(samples, features, strict=True) if cached is None]
        phrases = tuple(phrase for sample in samples for phrase in sample.phrases)
        ids, padding = self.tokenizer(phrases)
        counts = torch.tensor([len(sample.phrases) for sample in samples])
        side = self.image_spec.size
        return Batch(
            pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, side, side),
            features=features,
            encoder_pixels=torch.stack([self.encoder_spec(sample.image) for sample in samples]),
            ids=ids,
            padding=padding,
            image_index=torch.repeat_interleave(torch.arange(len(samples)), counts),
            masks=tuple(torch.from_numpy(sample.masks) for sample in samples),
            sizes=tuple(sample.size for sample in samples),
            keys=tuple(sample.key for sample in samples),
            indices=tuple(sample.index for sample in samples),
            phrases=phrases,
            phrase_ids=tuple(name for sample in samples for name in sample.ids),
        )
