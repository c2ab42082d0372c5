"""SAM's prompt encoder and mask decoder on the transformers modules (arXiv 2304.02643), shared by several families."""

import torch
from torch import Tensor, nn
from transformers import SamConfig as LibraryConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from ..types import ImageFeatures, MaskPrediction, Prompts
from .base import SAM_PARTS, Segmenter, attention_to_tokens, decode_masks, first_mask, pick_images, run_prompt_encoder


class PromptedSAM(Segmenter):
    """SAM's prompt encoder and mask decoder; families differ in the image encoder.

    Args:
        side: of the frame that prompts are placed on, in pixels.
        eps: of the decoder's layer norms.
        masks: that the decoder makes of a prompt.
        mlp: inner width of the decoder's MLPs.
    """

    prompt_kinds = frozenset({"points", "boxes", "masks"})
    parts = SAM_PARTS

    def __init__(self, side: int, eps: float, masks: int = 4, mlp: int = 2048) -> None:
        super().__init__()
        library = LibraryConfig(
            prompt_encoder_config={"image_size": side},
            mask_decoder_config={"layer_norm_eps": eps, "num_multimask_outputs": masks - 1, "mlp_dim": mlp},
        )
        self.masks_per_prompt = masks
        # The library draws the matrix that codes places hundreds of times as wide as SAM's: nothing learns from that.
        library.vision_config.scale = 1
        self.prompt_encoder = SamPromptEncoder(library)
        library.mask_decoder_config._attn_implementation = library._attn_implementation or "sdpa"
        self.mask_decoder = SamMaskDecoder(library.mask_decoder_config)
        for module in self.mask_decoder.modules():  # the library forgets its last one
            if type(module) is nn.LayerNorm:  # not those over channels, which have 1e-6 everywhere
                module.eps = eps

    def _encode_prompts(self, prompts: Prompts) -> tuple[Tensor | None, Tensor | None]:
        return run_prompt_encoder(self.prompt_encoder, prompts)

    @property
    def position_matrix(self) -> Tensor:
        """What places are coded by; see `Segmenter.position_matrix`."""
        return self.prompt_encoder.shared_embedding.positional_embedding

    @property
    def point_table(self) -> Tensor:
        """What is learned of points; see `Segmenter.point_table`."""
        encoder = self.prompt_encoder
        return torch.cat([encoder.not_a_point_embed.weight, *(kind.weight for kind in encoder.point_embed)])

    def attention_to_tokens(self) -> list[nn.Module]:
        """See `Segmenter.attention_to_tokens`."""
        return attention_to_tokens(self.mask_decoder.transformer)

    def decode(
        self,
        features: ImageFeatures,
        sparse: Tensor,
        dense: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> MaskPrediction:
        """Return four masks and their IoU (a plain linear output) per prompt; see `Segmenter.decode`."""
        if dense is None:
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        embedding = pick_images(features.embedding, image_index, sparse.shape[0]) + dense
        positions = self.positions(embedding.shape[-1], embedding.dtype)
        masks, iou, _ = decode_masks(self.mask_decoder, embedding, positions, sparse)
        return MaskPrediction(masks, iou)

    def select(self, prediction: MaskPrediction) -> Tensor:
        """Return mask 0 for every prompt, int64 [N]."""
        return first_mask(prediction)
