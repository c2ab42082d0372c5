"""The published EVF-SAM folder: config.json, weights of the whole model, tokenizer files (hustvl/EVF-SAM)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.loader import encoder_configs
from configs.schema import BEiT3Config, ModelConfig, SAM2Config
from utils.errors import CheckpointError

from ..registry import depth_of, find_config
from .beit3 import BEIT3
from .efficient_sam import EFFICIENT_SAM
from .efficientvit_sam import EFFICIENTVIT_SAM
from .ovsam import OVSAM
from .rules import Format, Section
from .sam import SAM
from .sam2 import SAM2, SAM2_IN_EVF

PROJECTOR = Format(
    rules=((r"^fc1\.", "text_hidden_fcs.0.0."), (r"^fc2\.", "text_hidden_fcs.0.2.")),
    parts=(("text_hidden_fcs.", "projector from phrase to prompt"),),
)


@dataclass(frozen=True)
class PublishedSegmenter:
    """How a family looks inside checkpoints.

    * `format`: inside an EVF checkpoint; `plain`: in the segmenter's own release.
    * `mark`: start of a name that no other family has; `trunk`: where the image encoder's blocks are.
    """

    format: Format
    plain: Format
    mark: str
    trunk: str = "image_encoder."


SEGMENTERS = {
    "efficientvit_sam": PublishedSegmenter(EFFICIENTVIT_SAM, EFFICIENTVIT_SAM, "image_encoder.backbone."),
    "ovsam": PublishedSegmenter(OVSAM, OVSAM, "neck.level_encoding."),
    "sam": PublishedSegmenter(SAM, SAM, "mask_decoder.output_upscaling."),
    "sam2": PublishedSegmenter(SAM2_IN_EVF, SAM2, "sam_mask_decoder.", "image_encoder.trunk."),
    "efficient_sam": PublishedSegmenter(EFFICIENT_SAM, EFFICIENT_SAM, "mask_decoder.final_output_upscaling_layers."),
}
SCALES = {
    ("sam", 1280, 32): "huge",
    ("sam2", 144, 48): "large",
    ("sam2", 96, 12): "tiny",
    ("efficient_sam", 384, 12): "small",
    ("efficient_sam", 192, 12): "tiny",
}
"""(family, width, layers) -> the `sam_scale` that the published code can build."""

Shapes = Mapping[str, tuple[int, ...]]


def sections(family: str) -> tuple[Section, ...]:
    """Return where the parts of an EVF checkpoint lie."""
    return (
        Section("segmenter.", "visual_model.", SEGMENTERS[family].format),
        Section("encoder.", "mm_extractor.", BEIT3),
        Section("projector.", "", PROJECTOR),
    )


def family_of(keys: Mapping[str, object] | set[str], prefix: str) -> str | None:
    """Return the segmenter family by key names below `prefix`, or None."""
    for family, published in SEGMENTERS.items():
        if any(key.startswith(prefix + published.mark) for key in keys):
            return family
    return None


def _count(shapes: Shapes, pattern: str) -> int:
    numbers = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    return max(numbers) + 1 if numbers else 0


def segmenter_shape(shapes: Shapes, prefix: str, family: str) -> tuple[int, int]:
    """Return (width, layers) of the segmenter's image encoder, (0, 0) where its tensors are absent."""
    if family == "efficientvit_sam":
        return _stages_shape(shapes, f"{prefix}image_encoder.backbone.stages.")
    if family == "ovsam":
        width = shapes.get(f"{prefix}backbone.stem.6.weight", (0,))[0]
        stages = (_count(shapes, re.escape(f"{prefix}backbone.layer{i}.") + r"(\d+)\.") for i in range(1, 5))
        return width, sum(stages)
    trunk = prefix + SEGMENTERS[family].trunk
    width = shapes.get(f"{trunk}patch_embed.proj.weight", (0,))[0]
    return width, _count(shapes, re.escape(trunk) + r"blocks\.(\d+)\.")


def _stages_shape(shapes: Shapes, prefix: str) -> tuple[int, int]:
    """Return the width of the deepest stage and the number of blocks of all, without the first of each."""
    stages = _count(shapes, re.escape(prefix) + r"(\d+)\.")
    blocks = sum(_count(shapes, re.escape(f"{prefix}{i}.op_list.") + r"(\d+)\.") - 1 for i in range(stages))
    width = shapes.get(f"{prefix}{stages - 1}.op_list.0.main.point_conv.conv.weight", (0,))[0]
    return width, blocks


def detect(config: Mapping[str, Any], shapes: Shapes, source: str) -> ModelConfig:
    """Return the architecture of a published checkpoint from its tensors; config.json alone is ambiguous.

    Args:
        config: the parsed config.json.
        shapes: name -> shape of every tensor.
        source: for messages.

    Raises:
        CheckpointError: not an EVF-SAM checkpoint, or config and tensors disagree.
    """
    scale = config.get("mm_extractor_scale")
    if config.get("model_type") not in ("evf", None) or scale not in encoder_configs():
        raise CheckpointError(
            f"{source}: config.json is not of EVF-SAM (model_type {config.get('model_type')!r}, "
            f"mm_extractor_scale {scale!r}; needed 'evf' and one of {', '.join(encoder_configs())})"
        )
    family = family_of(shapes, "visual_model.")
    if family is None:
        raise CheckpointError(
            f"{source}: no SAM, SAM-2 or EfficientSAM mask decoder among its {len(shapes)} tensors. "
            "The folder must hold the whole EVF-SAM model, not a part of it"
        )
    model = find_config(family, *segmenter_shape(shapes, "visual_model.", family), scale)
    stated = config.get("sam_scale")
    expected = published_scale(model) or model.segmenter_name
    if stated not in (None, expected):
        raise CheckpointError(
            f"{source}: config.json says sam_scale {stated!r}, but the tensors are of {model.segmenter_name} "
            f"({expected!r}). Restore the checkpoint's own config.json"
        )
    if config.get("hidden_size", model.encoder.width) != model.encoder.width:
        raise CheckpointError(
            f"{source}: config.json says hidden_size {config['hidden_size']}, but BEiT-3 {scale} has "
            f"{model.encoder.width}. Restore the checkpoint's own config.json"
        )
    return model


def published_scale(model: ModelConfig) -> str | None:
    """Return the published `sam_scale` of a model, None where the published code cannot build it."""
    is_20 = not isinstance(model.segmenter, SAM2Config) or model.segmenter.version == "2.0"
    return SCALES.get((model.family, model.segmenter.width, depth_of(model.segmenter))) if is_20 else None


def published_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json that the published code reads.

    Segmenters that it cannot build get their name as `sam_scale`; TextSAM reads them back, the published code refuses.
    """
    encoder: BEiT3Config = model.encoder
    return {
        "model_type": "evf",
        "hidden_size": encoder.width,
        "out_dim": 256,
        "mm_extractor_scale": model.encoder_name,
        "sam_scale": published_scale(model) or model.segmenter_name,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
