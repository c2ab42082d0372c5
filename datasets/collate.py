"""Samples to batches: preprocessing in the worker, phrases tokenised, everything packed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.feature_cache import FeatureCache, name_of
from utils.image import ImageSpec
from utils.tokenizer import PhraseTokenizer

from .sample import Batch, Sample


@dataclass(frozen=True)
class Collate:
    """Turns samples into a `Batch`; give it to a `DataLoader` as `collate_fn`.

    * `image_spec`, `encoder_spec`: how the segmenter and the encoder see an image.
    * `cache`: where set, images whose features it holds are not preprocessed for the segmenter.
    """

    image_spec: ImageSpec
    encoder_spec: ImageSpec
    tokenizer: PhraseTokenizer
    cache: FeatureCache | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Pack samples.

        Raises:
            PromptError: a phrase is empty, or too long for the tokenizer.
        """
        names = tuple(name_of(sample.image) for sample in samples) if self.cache else ()
        features = tuple(map(self.cache.read, names)) if self.cache else (None,) * len(samples)
        pixels = [self.image_spec(s.image) for s, cached in zip(samples, features, strict=True) if cached is None]
        phrases = tuple(phrase for sample in samples for phrase in sample.phrases)
        ids, padding = self.tokenizer(phrases)
        counts = torch.tensor([len(sample.phrases) for sample in samples])
        side = self.image_spec.size
        return Batch(
            pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, side, side),
            features=features,
            feature_names=names,
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
