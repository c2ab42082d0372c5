"""EfficientViT-SAM L0 to XL1: a convolutional encoder with linear attention, and SAM's prompt encoder and mask decoder.

Source: arXiv 2402.05008, mit-han-lab/efficientvit; the blocks are timm's.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, LayerNorm2d
from timm.models.efficientvit_mit import (
    ConvBlock,
    ConvNormAct,
    EfficientVitBlock,
    FusedMBConv,
    LiteMLA,
    MBConv,
    ResidualBlock,
)
from torch import Tensor, nn

from configs.schema import EfficientViTSAMConfig
from utils.image import ImageSpec

from ..types import ImageFeatures
from .base import PROMPT_WIDTH, count_parts
from .prompted import PromptedSAM

EPS, ATTENTION_EPS = 1e-6, 1e-15
"""Of every normalisation, and of the linear attention's division."""
HEAD_WIDTH, DOWN, HEAD_MLP = 32, 4, 2048
"""Channels of an attention head; how much wider a block is that halves the map; inner width of the decoder's MLPs."""

Norm = partial(nn.BatchNorm2d, eps=EPS)


class EfficientViTSAMSegmenter(PromptedSAM):
    """EfficientViT-SAM; prompts live on SAM's 1024-pixel frame, whatever the size of the network's input."""

    def __init__(self, config: EfficientViTSAMConfig) -> None:
        """Build the modules."""
        super().__init__(config.prompt_size, EPS)
        self.config = config
        self.image_spec = ImageSpec(size=config.image_size, resize="letterbox", filter="pillow-bilinear")
        self.own_image_spec = self.image_spec
        self.image_encoder = ImageEncoder(config)

    def prompt_spec(self, spec: ImageSpec) -> ImageSpec:
        """Return how an image lies on the frame of the prompts; see `Segmenter.prompt_spec`."""
        return replace(spec, size=self.config.prompt_size)

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Return the embedding [B, 256, 64, 64]; see `Segmenter.encode_image`."""
        return ImageFeatures(self.image_encoder(pixels))


class ImageEncoder(nn.Module):
    """Backbone, neck and a last normalisation."""

    def __init__(self, config: EfficientViTSAMConfig) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(_stage(config, number) for number in range(len(config.widths)))
        self.neck = Neck(config)
        self.norm = LayerNorm2d(PROMPT_WIDTH, eps=EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding of images [B, 3, S, S] as [B, 256, g, g]."""
        maps = []
        for stage in self.backbone:
            pixels = stage(pixels)
            maps.append(pixels)
        return self.norm(self.neck(maps[:-4:-1]))


class Neck(nn.Module):
    """The three deepest maps, brought to one size and added."""

    def __init__(self, config: EfficientViTSAMConfig) -> None:
        super().__init__()
        self.side = config.prompt_size // 16
        conv = partial(ConvNormAct, kernel_size=1, norm_layer=Norm, act_layer=None)
        self.inputs = nn.ModuleList(conv(width, PROMPT_WIDTH) for width in config.widths[:-4:-1])
        self.middle = nn.Sequential(
            *(
                _with_shortcut(_fused(PROMPT_WIDTH, PROMPT_WIDTH, 1, config.neck_expand))
                for _ in range(config.neck_depth)
            )
        )
        self.output = nn.Conv2d(PROMPT_WIDTH, PROMPT_WIDTH, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return [B, 256, g, g] of maps [B, C, h, w], deepest first."""
        size = (self.side, self.side)
        first, second, third = (
            F.interpolate(project(one), size, mode="bicubic", align_corners=False)
            for project, one in zip(self.inputs, maps, strict=True)
        )
        return self.output(self.middle(first + (second + third)))


class FusedBlock(FusedMBConv):
    """timm's, whose wide map is made a few rows at a time on a CPU."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return [B, O, h, w] of maps [B, C, H, W]."""
        return _by_rows(lambda same: same, self.spatial_conv, self.point_conv, maps)


class InvertedBlock(MBConv):
    """timm's, whose wide maps are made a few rows at a time on a CPU."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return [B, O, h, w] of maps [B, C, H, W]."""
        return _by_rows(self.inverted_conv, self.depth_conv, self.point_conv, maps)


def _by_rows(widen: Callable[[Tensor], Tensor], spatial: ConvNormAct, narrow: nn.Module, maps: Tensor) -> Tensor:
    """Return `narrow(spatial(widen(maps)))`; see `in_parts`.

    Args:
        widen, narrow: look at single pixels.
        spatial: 3x3, with a border of zeros.
        maps: [B, C, H, W].
    """
    conv, height, width = spatial.conv, *maps.shape[2:]
    stride = conv.stride[0]
    # The wide map, what the norm makes of it, and what the activation does.
    scratch = 3 * maps.shape[0] * conv.out_channels * (height * width // stride) * maps.element_size()
    bands = 1 if spatial.training else count_parts(scratch, maps)
    if bands == 1:
        return narrow(spatial(widen(maps)))
    last = (height - 1) // stride + 1
    rows, parts = math.ceil(last / bands), []
    for start in range(0, last, rows):
        top, bottom = start * stride - 1, (min(start + rows, last) - 1) * stride + 2
        part = widen(maps[:, :, max(top, 0) : bottom])
        part = F.pad(part, (1, 1, max(-top, 0), max(bottom - height, 0)))
        part = F.conv2d(part, conv.weight, conv.bias, stride, groups=conv.groups)
        parts.append(narrow(spatial.act(spatial.norm(part))))
    return torch.cat(parts, dim=2)


def _stage(config: EfficientViTSAMConfig, number: int) -> nn.Sequential:
    """Return a stage: one block that halves the map, then those with a shortcut."""
    kind, width, expand = config.kinds[number], config.widths[number], config.expand[number]
    if number == 0:
        first = ConvNormAct(3, width, 3, stride=2, norm_layer=Norm, act_layer=GELUTanh)
        rest = [_with_shortcut(_plain(width)) for _ in range(config.depths[0])]
        return nn.Sequential(first, *rest)
    before, fewer = config.widths[number - 1], number in config.fewer_norm
    if kind == "fused":
        first = _fused(before, width, 2, DOWN * expand)
        rest = [_with_shortcut(_fused(width, width, 1, expand)) for _ in range(config.depths[number])]
    else:
        first = _inverted(before, width, 2, DOWN * expand, fewer)
        blocks = range(config.depths[number])
        if kind == "mb":
            rest = [_with_shortcut(_inverted(width, width, 1, expand, fewer)) for _ in blocks]
        else:
            rest = [_attention(width, expand, int(kind.removeprefix("att"))) for _ in blocks]
    return nn.Sequential(_without_shortcut(first), *rest)


def _plain(width: int) -> nn.Module:
    return ConvBlock(width, width, norm_layer=Norm, act_layer=(GELUTanh, None))


def _fused(before: int, after: int, stride: int, expand: int) -> nn.Module:
    return FusedBlock(
        before, after, 3, stride, expand_ratio=expand, norm_layer=(Norm, Norm), act_layer=(GELUTanh, None)
    )


def _inverted(before: int, after: int, stride: int, expand: int, fewer: bool) -> nn.Module:
    biases, norms = ((True, True, False), (None, None, Norm)) if fewer else (False, Norm)
    return InvertedBlock(
        before, after, 3, stride, expand_ratio=expand, use_bias=biases, norm_layer=norms,
        act_layer=(GELUTanh, GELUTanh, None),
    )  # fmt: skip


def _attention(width: int, expand: int, scale: int) -> nn.Module:
    """Return linear attention and a convolution block; `scale` is the side of the second set of queries and keys."""
    block = EfficientVitBlock(width, head_dim=HEAD_WIDTH, expand_ratio=expand, norm_layer=Norm, act_layer=GELUTanh)
    block.context_module.main = LiteMLA(
        width, width, dim=HEAD_WIDTH, norm_layer=(None, Norm), scales=(scale,), eps=ATTENTION_EPS
    )
    return block


def _with_shortcut(block: nn.Module) -> nn.Module:
    return ResidualBlock(block, nn.Identity())


def _without_shortcut(block: nn.Module) -> nn.Module:
    return ResidualBlock(block, None)
