"""EfficientSAM-T and S (arXiv 2312.00863, yformer/EfficientSAM): a plain ViT, a neck, and a decoder of its own.

No library is imported for it: the ViTs of timm and transformers cost two seconds at the start of every command.

The decoder is not SAM's: exact GELU throughout, every self-attention has a residual, the learned tokens are added into
the running tokens of the second layer, and one group norm replaces the channel layer norm.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import EfficientSAMConfig
from utils.image import ImageSpec

from ..attention import attend
from ..types import ImageFeatures, MaskPrediction, Prompts
from .base import PROMPT_WIDTH, SAM_PARTS, Segmenter, first_mask, pick_images

HEADS = 8
MASK_TOKENS = 4
PRETRAINED_GRID = 14


class EfficientSAMSegmenter(Segmenter):
    """EfficientSAM with phrases as prompts; its checkpoints in EVF-SAM layout hold no usable point embeddings."""

    parts = SAM_PARTS

    def __init__(self, config: EfficientSAMConfig) -> None:
        super().__init__()
        self.config = config
        self.image_spec = ImageSpec(size=config.image_size, resize="square")
        self.own_image_spec = self.image_spec
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEmbeddings()
        self.mask_decoder = MaskDecoder(config.decoder_mlp)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Return the embedding [B, 256, S/16, S/16]; see `Segmenter.encode_image`."""
        return ImageFeatures(self.image_encoder(pixels))

    def _encode_prompts(self, prompts: Prompts) -> tuple[Tensor | None, Tensor | None]:
        raise NotImplementedError  # `prompt_kinds` is empty: the base class has refused every kind

    @property
    def position_matrix(self) -> Tensor:
        """What places are coded by; see `Segmenter.position_matrix`."""
        return self.prompt_encoder.position_matrix

    def decode(
        self,
        features: ImageFeatures,
        sparse: Tensor,
        dense: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> MaskPrediction:
        """Return four masks and their IoU per prompt; there is no dense prompt. See `Segmenter.decode`."""
        if dense is not None:
            raise ValueError("EfficientSAM has no dense prompt embedding")
        embedding = pick_images(features.embedding, image_index, sparse.shape[0])
        positions = self.positions(embedding.shape[-1], embedding.dtype)
        return MaskPrediction(*self.mask_decoder(embedding, positions, sparse))

    def select(self, prediction: MaskPrediction) -> Tensor:
        """Return mask 0 for every prompt, int64 [N]."""
        return first_mask(prediction)


class ImageEncoder(nn.Module):
    """Plain ViT with global attention, and SAM's neck.

    `pos_embed` keeps the pretrained 14 x 14 table with its unused class position, as checkpoints hold it.
    """

    def __init__(self, config: EfficientSAMConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config.width, config.layers, config.heads)
        self.pos_embed = nn.Parameter(torch.zeros(1, PRETRAINED_GRID**2 + 1, config.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.trunk.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.neck = Neck(config.width)

    def positions(self, side: int) -> Tensor:
        """Return the position table on a `side` x `side` grid, [1, side * side, C]."""
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (PRETRAINED_GRID, PRETRAINED_GRID))
        table = F.interpolate(table.float(), (side, side), mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, 256, S/16, S/16]."""
        side = pixels.shape[-1] // 16
        tokens = self.trunk.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.positions(side)
        tokens = self.trunk.blocks(tokens)
        return self.neck(tokens.unflatten(1, (side, side)))


class Trunk(nn.Module):
    """Patches and blocks, named as timm's `VisionTransformer` names them."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))


class Block(nn.Module):
    """Pre-norm attention and MLP with exact GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return self.proj(attend(*self.qkv(tokens).chunk(3, dim=-1), self.heads))


class Neck(nn.Module):
    """Two convolutions to the width of the prompts, each with a layer norm over its channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, PROMPT_WIDTH, 1, bias=False)
        self.layer_norm1 = ChannelNorm(PROMPT_WIDTH, eps=1e-6)
        self.conv2 = nn.Conv2d(PROMPT_WIDTH, PROMPT_WIDTH, 3, padding=1, bias=False)
        self.layer_norm2 = ChannelNorm(PROMPT_WIDTH, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, h, w, C] to [B, 256, h, w]."""
        image = self.layer_norm1(self.conv1(tokens.permute(0, 3, 1, 2)))
        return self.layer_norm2(self.conv2(image))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, h, w]."""

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape."""
        return super().forward(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PromptEmbeddings(nn.Module):
    """Position matrix, and four embeddings that phrases never use but checkpoints hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_matrix", torch.randn(2, PROMPT_WIDTH // 2))
        self.invalid_points = nn.Embedding(1, PROMPT_WIDTH)
        self.point_embeddings = nn.Embedding(1, PROMPT_WIDTH)
        self.bbox_top_left_embeddings = nn.Embedding(1, PROMPT_WIDTH)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, PROMPT_WIDTH)


class DecoderAttention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its outer."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(PROMPT_WIDTH, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, PROMPT_WIDTH)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, Q, 256], [N, K, 256], [N, K, 256] to [N, Q, 256]."""
        return self.out_proj(attend(self.q_proj(query), self.k_proj(key), self.v_proj(value), HEADS))


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves and to the image, then the image to the tokens."""

    def __init__(self, is_first: bool, mlp_width: int) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attn = DecoderAttention(PROMPT_WIDTH)
        self.cross_attn_token_to_image = DecoderAttention(PROMPT_WIDTH // 2)
        self.cross_attn_image_to_token = DecoderAttention(PROMPT_WIDTH // 2)
        self.mlp = MLP([PROMPT_WIDTH, mlp_width, PROMPT_WIDTH])
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(PROMPT_WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, learned: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and learned [N, P, 256], image [N, h*w, 256], positions [1, h*w, 256]."""
        if not self.is_first:
            tokens = tokens + learned
        tokens = self.norm1(tokens + self.self_attn(tokens, tokens, tokens))
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + learned, image + positions, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + positions, tokens + learned, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two layers and a last look of the tokens at the image."""

    def __init__(self, mlp_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(i == 0, mlp_width) for i in range(2))
        self.final_attn_token_to_image = DecoderAttention(PROMPT_WIDTH // 2)
        self.norm_final_attn = nn.LayerNorm(PROMPT_WIDTH)

    def forward(self, image: Tensor, positions: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        """Image [N, h*w, 256], positions [1, h*w, 256], learned [N, P, 256] to tokens and image."""
        tokens = learned
        for layer in self.layers:
            tokens, image = layer(tokens, image, learned, positions)
        attended = self.final_attn_token_to_image(tokens + learned, image + positions, image)
        return self.norm_final_attn(tokens + attended), image


class MLP(nn.Module):
    """Linear layers with exact GELU between them."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., first width] to [..., last width]."""
        for layer in self.layers[:-1]:
            tokens = F.gelu(layer(tokens))
        return self.layers[-1](tokens)


class MaskDecoder(nn.Module):
    """Prompt tokens and an image embedding to four masks and their IoU."""

    def __init__(self, mlp_width: int) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(mlp_width)
        self.iou_token = nn.Embedding(1, PROMPT_WIDTH)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, PROMPT_WIDTH)
        self.upscale1 = nn.ConvTranspose2d(PROMPT_WIDTH, 64, 2, 2)
        self.upscale_norm = nn.GroupNorm(1, 64)
        self.upscale2 = nn.ConvTranspose2d(64, 32, 2, 2)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP([PROMPT_WIDTH, PROMPT_WIDTH, PROMPT_WIDTH, 32]) for _ in range(MASK_TOKENS)
        )
        self.iou_prediction_head = MLP([PROMPT_WIDTH, PROMPT_WIDTH, PROMPT_WIDTH, MASK_TOKENS])

    def forward(self, embedding: Tensor, positions: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """Decode every prompt.

        Args:
            embedding: [N, 256, h, w]; positions: [1, 256, h, w]; sparse: [N, P, 256].

        Returns:
            masks [N, 4, 4h, 4w] and predicted IoU [N, 4].
        """
        learned = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        learned = torch.cat([learned.expand(sparse.shape[0], -1, -1), sparse.to(learned.dtype)], dim=1)
        image, positions = (grid.flatten(2).transpose(1, 2) for grid in (embedding, positions))
        tokens, image = self.transformer(image, positions, learned)
        grid = image.transpose(1, 2).unflatten(2, embedding.shape[-2:])
        grid = F.gelu(self.upscale_norm(self.upscale1(grid)))
        grid = F.gelu(self.upscale2(grid))
        mask_tokens = tokens[:, 1 : 1 + MASK_TOKENS].unbind(1)
        kernels = torch.stack([m(t) for m, t in zip(self.output_hypernetworks_mlps, mask_tokens, strict=True)], 1)
        masks = (kernels @ grid.flatten(2)).unflatten(2, grid.shape[-2:])
        return masks, self.iou_prediction_head(tokens[:, 0])
