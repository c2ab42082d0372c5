"""Open-Vocabulary SAM: a frozen CLIP ResNet whose stages a neck turns into SAM's image embedding.

Source: arXiv 2401.02955. The ResNet is open_clip's, the blocks of the neck, the prompt encoder and the mask decoder are
those of SAM. What names the regions is in `model/recognizers/open_vocabulary.py`; its weights are here.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamVisionLayer, SamVisionNeck

from configs.schema import OVSAMConfig
from utils.image import ImageSpec

from ..types import ImageFeatures, MaskPrediction
from .base import PROMPT_WIDTH, SAM_PARTS
from .prompted import PromptedSAM
from .sam_blocks import RelativeAttention, in_float32, run_layers, run_neck

DECODER_EPS = 1e-5
"""Of the two-way transformer's layer norms."""
HEAD_WIDTH = 64
"""Channels of a head of CLIP's attention pool."""


class OVSAMSegmenter(PromptedSAM):
    """Open-Vocabulary SAM: points and boxes give one mask each, without a predicted IoU.

    In the decoder a label token stands where SAM has its IoU token. What its MLP makes of it is not used, in the
    published model neither; the token itself bears on the mask through attention.
    """

    # CLIP is never trained
    parts = SAM_PARTS | {"image_encoder": ("neck.",), "recognizer": ("pyramid.", "region_conv.")}

    def __init__(self, config: OVSAMConfig) -> None:
        """Build the modules."""
        super().__init__(config.image_size, DECODER_EPS, masks=1, mlp=config.decoder_mlp)
        self.config = config
        self.image_spec = ImageSpec(size=config.image_size, resize="letterbox", filter="cv2-linear")
        self.own_image_spec = self.image_spec
        self.backbone = ModifiedResNet(
            list(config.depths),
            config.embed_width,
            config.stage_widths[-1] // HEAD_WIDTH,
            config.clip_size,
            config.width,
        )
        self.neck = Neck(config)
        self.pyramid = Pyramid(config.stage_widths, config.pyramid_width)
        self.mask_decoder.iou_prediction_head = SamFeedForward(PROMPT_WIDTH, PROMPT_WIDTH, config.embed_width, 3)
        self.region_conv = nn.Conv2d(config.pyramid_width, config.embed_width, 1, bias=False)
        self.backbone.eval()

    def train(self, mode: bool = True) -> "OVSAMSegmenter":
        """Set the mode of everything but the ResNet: its batch norms keep their statistics always."""
        super().train(mode)
        self.backbone.eval()
        return self

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Return the embedding [B, 256, S/16, S/16], the pyramid and the last stage; see `Segmenter.encode_image`."""
        stages = self.stages(pixels)
        return ImageFeatures(self.neck(stages), (*self.pyramid(stages), stages[-1]))

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Return the embedding alone, without the pyramid; see `Segmenter.embed_image`."""
        return self.neck(self.stages(pixels))

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Return what the ResNet's stages make of images, [B, C, S/4, S/4] to [B, 8C, S/32, S/32]."""
        backbone, found = self.backbone, []
        maps = backbone.stem(pixels)
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            maps = stage(maps)
            found.append(maps)
        return found

    def decode(
        self,
        features: ImageFeatures,
        sparse: Tensor,
        dense: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> MaskPrediction:
        """Return one mask per prompt, and its stability in place of an IoU; see `Segmenter.decode`."""
        found = super().decode(features, sparse, dense, image_index)
        return replace(found, iou=stability(found.logits))

    def select_for_prompts(self, prediction: MaskPrediction, is_ambiguous: bool) -> Tensor:
        """Return mask 0 for every prompt, int64 [N]: there is no other."""
        return self.select(prediction)


class Neck(nn.Module):
    """SAM2CLIP: the four stages at one size, added, through SAM's blocks and neck."""

    def __init__(self, config: OVSAMConfig) -> None:
        super().__init__()
        width, side = config.neck_width, config.image_size // 16
        first, second, third, fourth = config.stage_widths
        self.embeds = nn.ModuleList(
            [
                nn.Conv2d(first, width, 4, stride=4),
                nn.Conv2d(second, width, 2, stride=2),
                nn.Conv2d(third, width, 1),
                nn.ConvTranspose2d(fourth, width, 2, stride=2),
            ]
        )
        self.levels = nn.Embedding(len(self.embeds), width)
        self.register_buffer("positions", self.levels.weight.new_zeros(1, side, side, width))
        library = SamVisionConfig(
            hidden_size=width,
            num_attention_heads=config.neck_heads,
            image_size=config.image_size,
            window_size=config.window_size,
            mlp_dim=4 * width,
            output_channels=PROMPT_WIDTH,
        )
        library._attn_implementation = "sdpa"
        windows = [config.window_size] * (config.neck_layers - 1) + [0]
        self.layers = nn.ModuleList(SamVisionLayer(library, window) for window in windows)
        for layer in self.layers:
            layer.attn = RelativeAttention(layer.attn)
        self.neck = SamVisionNeck(library)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Return [B, 256, S/16, S/16] of the stages of images."""
        tokens = self.positions
        for embed, level, maps in zip(self.embeds, self.levels.weight, stages, strict=True):
            tokens = tokens + (embed(maps).permute(0, 2, 3, 1) + level)
        return run_neck(self.neck, run_layers(self.layers, tokens))


class Pyramid(nn.Module):
    """A feature pyramid (arXiv 1612.03144) with nearest upsampling, without norms and activations."""

    def __init__(self, widths: tuple[int, ...], inner: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, inner, 1) for width in widths)
        self.outputs = nn.ModuleList(nn.Conv2d(inner, inner, 3, padding=1) for _ in widths)

    def forward(self, stages: list[Tensor]) -> tuple[Tensor, ...]:
        """Return a level of the same channels for each stage, finest first."""
        # fp16 on a CPU takes a hundred times longer for these convolutions
        is_slow = stages[0].dtype == torch.float16 and stages[0].device.type == "cpu"
        levels = [lateral(maps) for lateral, maps in zip(self.laterals, stages, strict=True)]
        for fine, coarse in zip(levels[-2::-1], range(len(levels) - 1, 0, -1), strict=True):
            levels[coarse - 1] = fine + F.interpolate(levels[coarse], size=fine.shape[-2:], mode="nearest")
        return tuple(
            in_float32(output, level).half() if is_slow else output(level)
            for output, level in zip(self.outputs, levels, strict=True)
        )


def stability(logits: Tensor, offset: float = 1.0) -> Tensor:
    """Return the IoU of the masks at thresholds `offset` above and below 0, [N, M] of [N, M, h, w]; 0 where empty."""
    inner, outer = ((logits > edge).flatten(2).sum(2) for edge in (offset, -offset))
    return (inner / outer.clamp(min=1)).to(logits.dtype)
