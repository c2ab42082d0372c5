"""SAM ViT-B, L and H on the transformers modules (arXiv 2304.02643, facebookresearch/segment-anything)."""

from torch import Tensor
from transformers import SamConfig as LibraryConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from configs.schema import SAMConfig
from utils.image import ImageSpec

from ..types import ImageFeatures
from .prompted import PromptedSAM
from .sam_blocks import RelativeAttention, run_layers, run_neck

DECODER_EPS = 1e-5
"""Of the two-way transformer's layer norms; the library's default is 1e-6."""


class SAMSegmenter(PromptedSAM):
    """SAM with any plain ViT."""

    def __init__(self, config: SAMConfig, library_attention: bool = False) -> None:
        """Build the modules.

        Args:
            library_attention: keep the library's attention, the slow twin of `RelativeAttention`.
        """
        super().__init__(config.image_size, DECODER_EPS)
        self.config = config
        self.image_spec = ImageSpec(size=config.image_size, resize="letterbox", filter="pillow-bilinear")
        self.own_image_spec = self.image_spec
        self.image_encoder = SamVisionEncoder(_library_config(config).vision_config)
        if not library_attention:
            for layer in self.image_encoder.layers:
                layer.attn = RelativeAttention(layer.attn)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Return the embedding [B, 256, S/16, S/16]; see `Segmenter.encode_image`."""
        encoder = self.image_encoder
        tokens = run_layers(encoder.layers, encoder.patch_embed(pixels) + encoder.pos_embed)
        return ImageFeatures(run_neck(encoder.neck, tokens))


def _library_config(config: SAMConfig) -> LibraryConfig:
    return LibraryConfig(
        vision_config={
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "image_size": config.image_size,
            "window_size": config.window_size,
            "global_attn_indexes": list(config.global_blocks),
            "mlp_ratio": config.mlp_ratio,
            "mlp_dim": int(config.width * config.mlp_ratio),
            "initializer_range": 0.02,
        },
    )
