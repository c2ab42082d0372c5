"""SAM 2.0 and 2.1 on the transformers modules (arXiv 2408.00714, facebookresearch/sam2)."""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2.modeling_sam2 import do_pool

from configs.schema import SAM2Config
from utils.image import ImageSpec

from ..attention import attend_heads
from ..types import ImageFeatures, MaskPrediction, Prompts
from .base import (
    Segmenter,
    attention_to_tokens,
    best_of_three,
    decode_masks,
    first_mask,
    in_parts,
    pick_images,
    run_prompt_encoder,
)

VIDEO_PARTS = (
    "memory_attention",
    "memory_encoder",
    "memory_temporal_positional_encoding",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "mask_downsample",
    "object_pointer_proj",
    "temporal_positional_encoding_projection_layer",
    "occlusion_spatial_embedding_parameter",
)
"""Parts of the library's video model that still images never use."""

STABILITY_DELTA, STABILITY_THRESHOLD = 0.05, 0.98
NEAR = 2.0
"""Of all queries and keys, at the start: by their rotary positions alone each place then looks at itself in memory."""
LAYER_SCALE = 0.1
"""Of what the memory encoder's layers add, at the start of a training from nothing."""


class SAM2Segmenter(Segmenter):
    """SAM 2 with Hiera T, S, B+ or L; the memory modules are carried along where the weights have them."""

    prompt_kinds = frozenset({"points", "boxes", "masks"})
    pads_boxes = True
    parts = MappingProxyType(
        {
            "image_encoder": (
                "sam2.vision_encoder.", "sam2.no_memory_embedding", "sam2.mask_decoder.conv_s0.",
                "sam2.mask_decoder.conv_s1.",
            ),
            "prompt_encoder": ("sam2.prompt_encoder.no_mask_embed.",),
            "mask_decoder": ("sam2.mask_decoder.",),
            "memory": tuple(f"sam2.{part}" for part in VIDEO_PARTS),
        }
    )  # fmt: skip

    def __init__(self, config: SAM2Config, library_attention: bool = False) -> None:
        """Build the modules.

        Args:
            library_attention: keep the library's attention, the slow twin of `HieraAttention`.
        """
        super().__init__()
        self.config = config
        self.image_spec = ImageSpec(size=config.image_size, resize="square")
        self.own_image_spec = self.image_spec.for_sam2()
        self.sam2 = Sam2VideoModel(_library_config(config))
        _start_afresh(self.sam2)
        self.sam2.shared_image_embedding = self.sam2.prompt_encoder.shared_embedding
        if not config.has_video:
            for name in VIDEO_PARTS:
                if name in self.sam2._modules:
                    del self.sam2._modules[name]
                self.sam2._parameters.pop(name, None)
            del self.sam2.mask_decoder.pred_obj_score_head
        if not library_attention:
            for block in self.backbone.blocks:
                block.attn = HieraAttention(block.attn)

    @property
    def backbone(self) -> nn.Module:
        """The Hiera backbone."""
        return self.sam2.vision_encoder.backbone

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Return the embedding [B, 256, S/16, S/16] and two finer levels; see `Segmenter.encode_image`."""
        frame = self.encode_frame(pixels)
        return ImageFeatures(frame.embedding + self.sam2.no_memory_embedding.view(1, -1, 1, 1), frame.high_res)

    def encode_frame(self, pixels: Tensor) -> ImageFeatures:
        """Return features without the embedding that stands for "nothing remembered", as a video needs them."""
        levels = self._hiera(pixels)
        # The library's neck also computes a sine position table per level, which only the video memory reads.
        fine_conv, middle_conv, *convs = reversed(self.sam2.vision_encoder.neck.convs)
        fine, middle, *coarse_levels = (level.permute(0, 3, 1, 2) for level in levels)
        coarse, coarsest = (conv(level) for conv, level in zip(convs, coarse_levels, strict=True))
        top_down = F.interpolate(coarsest.float(), scale_factor=2.0, mode="nearest").to(coarse.dtype)
        decoder = self.sam2.mask_decoder
        high_res = (_two_convs(fine_conv, decoder.conv_s0, fine), _two_convs(middle_conv, decoder.conv_s1, middle))
        return ImageFeatures(coarse + top_down, high_res)

    def _hiera(self, pixels: Tensor) -> list[Tensor]:
        """Return the output of each stage, [B, H, W, C] from the finest to the coarsest."""
        backbone, levels = self.backbone, []
        tokens = backbone.patch_embed(pixels)
        tokens = tokens + backbone._get_pos_embed(tokens.shape[1:3])
        for i, block in enumerate(backbone.blocks):
            tokens = _run_block(block, tokens)
            if i in backbone.stage_ends:
                levels.append(tokens)
        return levels

    def _encode_prompts(self, prompts: Prompts) -> tuple[Tensor | None, Tensor | None]:
        return run_prompt_encoder(self.sam2.prompt_encoder, prompts)

    @property
    def position_matrix(self) -> Tensor:
        """What places are coded by; see `Segmenter.position_matrix`."""
        return self.sam2.prompt_encoder.shared_embedding.positional_embedding

    @property
    def point_table(self) -> Tensor:
        """What is learned of points; see `Segmenter.point_table`."""
        return torch.cat(
            [self.sam2.prompt_encoder.not_a_point_embed.weight, self.sam2.prompt_encoder.point_embed.weight]
        )

    def attention_to_tokens(self) -> list[nn.Module]:
        """See `Segmenter.attention_to_tokens`."""
        return attention_to_tokens(self.sam2.mask_decoder.transformer)

    def decode(
        self,
        features: ImageFeatures,
        sparse: Tensor,
        dense: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> MaskPrediction:
        """Return four masks, IoU in 0..1 and object score per prompt; see `Segmenter.decode`."""
        count, encoder = sparse.shape[0], self.sam2.prompt_encoder
        if dense is None:
            dense = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        embedding = pick_images(features.embedding, image_index, count) + dense
        positions = self.positions(embedding.shape[-1], embedding.dtype)
        high_res = tuple(pick_images(level, image_index, count) for level in features.high_res)
        masks, iou, tokens = decode_masks(self.sam2.mask_decoder, embedding, positions, sparse, high_res)
        score = self.sam2.mask_decoder.pred_obj_score_head(tokens[:, 0])[:, 0] if self.config.has_video else None
        return MaskPrediction(masks, iou, score, tokens[:, 2 : 2 + masks.shape[1]])

    def select(self, prediction: MaskPrediction) -> Tensor:
        """Return the mask of 1..3 with the highest predicted IoU, int64 [N]."""
        return best_of_three(prediction)

    def select_for_prompts(self, prediction: MaskPrediction, is_ambiguous: bool) -> Tensor:
        """Return mask 0 where it is stable, else the best of three; see `Segmenter.select_for_prompts`.

        Stable: the mask hardly changes between the thresholds +-`STABILITY_DELTA`, as Meta's predictor asks.
        """
        best = best_of_three(prediction)
        if is_ambiguous:
            return best
        single = prediction.logits[:, 0].flatten(1)
        inner = (single > STABILITY_DELTA).sum(1)
        outer = (single > -STABILITY_DELTA).sum(1)
        is_stable = (outer == 0) | (inner >= STABILITY_THRESHOLD * outer)
        return torch.where(is_stable, first_mask(prediction), best)

    def restore_buffers(self) -> None:
        """Compute the rotary tables of the memory attention anew."""
        if self.config.has_video:
            attention = self.sam2.memory_attention
            fresh = type(attention)(self.sam2.config)
            for name, buffer in fresh.named_buffers():
                owner, _, leaf = name.rpartition(".")
                setattr(attention.get_submodule(owner), leaf, buffer)


def _start_afresh(sam2: nn.Module) -> None:
    """Start weights so that they can be learned from; the library's own start, 0.02 everywhere, is too small.

    As torch and SAM 2 do, but for one layer: the decoder's first self-attention has no way around it, so that averages
    of tokens are all that later layers see of a prompt. It starts with each token attending to itself.
    """
    for module in sam2.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            module.reset_parameters()
    backbone = sam2.vision_encoder.backbone
    tables = (
        backbone.pos_embed, backbone.pos_embed_window, sam2.prompt_encoder.no_mask_embed.weight,
        sam2.no_memory_embedding, sam2.no_object_pointer, sam2.memory_temporal_positional_encoding,
    )  # fmt: skip
    for table in tables:
        nn.init.trunc_normal_(table, std=0.02)
    for layer in sam2.memory_encoder.memory_fuser.layers:
        nn.init.constant_(layer.scale, LAYER_SCALE)
    for layer in sam2.memory_attention.layers:
        for projection in (layer.cross_attn_image.q_proj, layer.cross_attn_image.k_proj):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.constant_(projection.bias, NEAR)
    transformer = sam2.mask_decoder.transformer
    crossings = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        crossings += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in crossings:
        nn.init.orthogonal_(attention.q_proj.weight)
        attention.k_proj.load_state_dict(attention.q_proj.state_dict())
    first = transformer.layers[0].self_attn
    for layer in (first.q_proj, first.k_proj, first.v_proj, first.o_proj):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)


def _two_convs(first: nn.Conv2d, second: nn.Conv2d, pixels: Tensor) -> Tensor:
    """Apply two 1x1 convolutions as one: the 256 channels between them are never needed at high resolution."""
    outer = second.weight.flatten(1)
    weight = outer @ first.weight.flatten(1)
    return F.conv2d(pixels, weight[:, :, None, None], outer @ first.bias + second.bias)


def _run_block(block: nn.Module, tokens: Tensor) -> Tensor:
    """Run a library block on [B, H, W, C], as much of it in parts as can be."""
    stride = block.query_stride[0] if block.query_stride else 1
    if block.window_size and block.window_size % stride == 0:
        return in_parts(block, tokens, block.window_size)
    if block.window_size or block.query_stride:  # pooling across windows
        return block(tokens)
    tokens = tokens + block.attn(hidden_states=block.layer_norm1(tokens))
    return tokens + in_parts(lambda part: block.mlp(block.layer_norm2(part)), tokens)


class HieraAttention(nn.Module):
    """Multi-scale attention of one Hiera block on the library's weights.

    The library (up to transformers 5.23) also computes a product and a softmax whose result nobody reads.
    """

    def __init__(self, library: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = library.qkv, library.proj
        self.heads, self.query_stride = library.num_attention_heads, library.query_stride

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend within each window; queries may be pooled.

        Args:
            hidden_states: [B, H, W, C].

        Returns:
            [B, H', W', C'], halved in height and width where the block pools its queries.
        """
        batch, height, width, _ = hidden_states.shape
        query, key, value = self.qkv(hidden_states).view(batch, height * width, 3, self.heads, -1).unbind(2)
        if self.query_stride:
            pooled = do_pool(query.reshape(batch, height, width, -1), self.query_stride)
            height, width = pooled.shape[1:3]
            query = pooled.reshape(batch, height * width, self.heads, -1)
        attended = attend_heads(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return self.proj(attended.transpose(1, 2).reshape(batch, height, width, -1))


def _library_config(config: SAM2Config) -> Sam2VideoConfig:
    side = config.image_size
    widths = [config.width * 2**i for i in range(4)]
    return Sam2VideoConfig(
        image_size=side,
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": config.width,
                "num_attention_heads": config.heads,
                "image_size": [side, side],
                "window_positional_embedding_background_size": [config.position_size] * 2,
                "blocks_per_stage": list(config.blocks),
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [config.heads * 2**i for i in range(4)],
                "window_size_per_stage": list(config.windows),
                "global_attention_blocks": list(config.global_blocks),
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[side // stride] * 2 for stride in (4, 8, 16)],
        },
        prompt_encoder_config={"image_size": side},
        mask_decoder_config={"mlp_dim": config.decoder_mlp},
        memory_attention_num_layers=config.memory_layers,
        memory_attention_feed_forward_hidden_size=config.decoder_mlp,
        memory_fuser_intermediate_dim=config.decoder_mlp // 2,
        enable_temporal_pos_encoding_for_object_pointers=config.version == "2.1",
        enable_occlusion_spatial_embedding=config.version == "2.1",
        memory_attention_rope_feat_sizes=[side // 16] * 2,
    )
