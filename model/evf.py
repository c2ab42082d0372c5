"""EVF-SAM (arXiv 2406.20076): a phrase becomes one sparse prompt of a segmenter. One forward for every use."""

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from utils.errors import PromptError

from .encoders.beit3 import BEiT3
from .segmenters.base import PROMPT_WIDTH, Segmenter
from .types import EncoderOutput, EVFOutput, ImageFeatures, Prompts


class Projector(nn.Module):
    """Linear, ReLU, linear: [N, D] to [N, 256]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, PROMPT_WIDTH)

    def forward(self, text: Tensor) -> Tensor:
        """Project the [CLS] vectors to prompt embeddings."""
        return self.fc2(torch.relu(self.fc1(text)))


class EVFModel(nn.Module):
    """Encoder, projector and segmenter. A model without an encoder takes geometric prompts alone."""

    def __init__(self, config: ModelConfig, segmenter: Segmenter, encoder: BEiT3 | None = None) -> None:
        super().__init__()
        self.config = config
        self.quantized_bits: int | None = None
        self.segmenter = segmenter
        self.encoder = encoder
        self.projector = Projector(encoder.config.width) if encoder is not None else None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the segmenter's image encoder, which is the type its pixels must have."""
        # not of any weight: what places are coded by stays exact, whatever the others are cast to
        return next(
            p.dtype for n, p in self.segmenter.named_parameters() if self.segmenter.part_of(n) == "image_encoder"
        )

    def encode_phrases(
        self,
        pixels: Tensor,
        ids: Tensor,
        padding: Tensor | None = None,
        image_index: Tensor | None = None,
        **asked: bool,
    ) -> tuple[Tensor, EncoderOutput]:
        """Return the prompt embedding of each phrase, float [N, 256], and what the encoder said.

        Arguments as `BEiT3.forward`.
        """
        said = self.encoder(pixels, ids, padding, image_index, **asked)
        return self.projector(said.vector.to(self.projector.fc1.weight.dtype)), said

    def forward(
        self,
        image: Tensor | ImageFeatures,
        encoder_pixels: Tensor | None = None,
        ids: Tensor | None = None,
        padding: Tensor | None = None,
        image_index: Tensor | None = None,
        prompts: Prompts | None = None,
        **asked: bool,
    ) -> EVFOutput:
        """Predict a mask for each of N prompts on B images.

        Args:
            image: segmenter pixels float [B, 3, S, S], or the features of an earlier call.
            encoder_pixels: float [B, 3, 224, 224], needed with `ids`.
            ids: int64 [N, T], phrases; None where only geometric prompts are given.
            padding: bool [N, T], True at padding; None where nothing is padded.
            image_index: int64 [N], the image of each prompt; None where N = B or B = 1.
            prompts: points, boxes or masks that go with the phrases, N of each.
            asked: what else the encoder should say, as `BEiT3.forward`: `points`, `apart`.

        Returns:
            all masks, the one that the family's rule takes, and what can be used again.

        Raises:
            PromptError: neither phrases nor prompts, or a kind of prompt that the segmenter has no weights for.
        """
        if ids is None and not prompts:
            raise PromptError("nothing to look for. Give phrases or prompts")
        features = image if isinstance(image, ImageFeatures) else self.segmenter.encode_image(image)
        text, said = None, None
        if ids is not None:
            text, said = self.encode_phrases(encoder_pixels, ids, padding, image_index, **asked)
        sparse, dense = self.segmenter.encode_prompts(prompts) if prompts else (None, None)
        tokens = [part for part in (sparse, None if text is None else text[:, None]) if part is not None]
        if not tokens:
            tokens = [features.embedding.new_zeros(len(prompts.masks), 0, PROMPT_WIDTH)]
        prediction = self.segmenter.decode(features, torch.cat(tokens, dim=1), dense, image_index)
        if text is not None:
            selected = self.segmenter.select(prediction)
        else:
            is_ambiguous = prompts.kinds() == ["points"] and prompts.points.shape[1] == 1
            selected = self.segmenter.select_for_prompts(prediction, is_ambiguous)
        return EVFOutput(prediction, selected, features, text, said)
