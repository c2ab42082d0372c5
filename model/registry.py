"""Names to architectures: the one table that training, evaluation, inference and export read."""

import fnmatch
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from configs.loader import encoder_configs, segmenter_configs
from configs.schema import (
    EfficientSAMConfig,
    EfficientViTSAMConfig,
    ModelConfig,
    OVSAMConfig,
    SAM2Config,
    SAMConfig,
    SegmenterConfig,
)
from utils.errors import ModelError, nearest


@dataclass(frozen=True)
class Family:
    """A segmenter family: its configuration class, and where its code is.

    `module` and `class_name` are imported when a model is built, not when names are listed.
    """

    config: type[SegmenterConfig]
    module: str
    class_name: str


FAMILIES = {
    "sam": Family(SAMConfig, "sam", "SAMSegmenter"),
    "sam2": Family(SAM2Config, "sam2", "SAM2Segmenter"),
    "efficient_sam": Family(EfficientSAMConfig, "efficient_sam", "EfficientSAMSegmenter"),
    "efficientvit_sam": Family(EfficientViTSAMConfig, "efficientvit_sam", "EfficientViTSAMSegmenter"),
    "ovsam": Family(OVSAMConfig, "ovsam", "OVSAMSegmenter"),
}

RELEASED = {
    "evf-sam": ("sam-vit-h", "large", "YxZhang/evf-sam"),
    "evf-sam-multitask": ("sam-vit-h", "large", "YxZhang/evf-sam-multitask"),
    "evf-sam2": ("sam2-hiera-large", "large", "YxZhang/evf-sam2"),
    "evf-sam2-multitask": ("sam2-hiera-large", "large", "YxZhang/evf-sam2-multitask"),
    "evf-effi-sam-l": ("efficient-sam-s", "large", None),
    "evf-effi-sam-b": ("efficient-sam-t", "base", None),
}
"""Published name -> segmenter, BEiT-3 scale, hub id (None: announced, but the weights were never published)."""

BUNDLED = {
    "nano": ("efficient-sam-nano", "nano"),
    "nano-video": ("sam2-hiera-nano", "nano"),
    "ovsam-nano": ("ovsam-nano", None),
}
"""Name of a model that comes with the repository, in `assets/checkpoints/` -> (segmenter, BEiT-3 scale or None)."""

MODEL_TYPES = {
    "ori": "sam", "sam2": "sam2", "effi": "efficient_sam", "efficientvit": "efficientvit_sam", "ovsam": "ovsam",
}  # fmt: skip
"""The `--model_type` values and the family each stands for; the first three are published."""


@cache
def segmenters() -> dict[str, tuple[str, SegmenterConfig]]:
    """Return segmenter name -> (family, configuration)."""
    return {
        name: (family, config)
        for family, entry in FAMILIES.items()
        for name, config in segmenter_configs(family, entry.config).items()
    }


@cache
def _table() -> dict[str, ModelConfig]:
    encoders = encoder_configs()
    table = {name: ModelConfig(name, family, config) for name, (family, config) in segmenters().items()}
    for name, (family, config) in segmenters().items():
        for scale, encoder in encoders.items():
            model = ModelConfig(name, family, config, scale, encoder)
            table[model.name] = model
    for name, (segmenter, scale, *_) in (RELEASED | BUNDLED).items():
        table[name] = table[f"evf-{segmenter}-{scale}" if scale else segmenter]
    return table


def list_models(pattern: str = "*") -> list[str]:
    """Return the known names that match a shell pattern, sorted: `list_models("evf-sam2*")`."""
    return sorted(fnmatch.filter(_table(), pattern))


def model_config(name: str) -> ModelConfig:
    """Return the architecture of a name.

    Raises:
        ModelError: unknown name; the nearest ones are named.
    """
    if name not in _table():
        raise ModelError(
            f"Unknown model {name!r}.{nearest(name, _table())} Known: {', '.join(RELEASED)} and "
            f"{len(_table()) - len(RELEASED)} more (python -m tools.list_models)"
        )
    return _table()[name]


def hub_id(name: str) -> str | None:
    """Return where the weights of a registry name were published, or None."""
    return RELEASED[name][2] if name in RELEASED else None


def published_file(name: str) -> Path | None:
    """Return where the published commands look for the weights of a name, relative to where they run, or None.

    EfficientViT-SAM alone has such a place (mit-han-lab/efficientvit).
    """
    config = _table()[name]
    if config.family != "efficientvit_sam" or config.encoder_name:
        return None
    return Path("assets", "checkpoints", "efficientvit_sam", f"{name.replace('-', '_')}.pt")


def is_published_in_parts(name: str) -> bool:
    """Return whether the weights of a registry name were published, but only as parts in several files."""
    return name == "ovsam-rn50x16"


def bundled_folder(name: str) -> Path | None:
    """Return where the weights lie that come with the repository, or None."""
    return Path(__file__).resolve().parents[1] / "assets" / "checkpoints" / name if name in BUNDLED else None


def depth_of(segmenter: SegmenterConfig) -> int:
    """Return the number of transformer blocks of a segmenter's image encoder."""
    return sum(segmenter.blocks) if isinstance(segmenter, SAM2Config) else segmenter.layers


def find_config(family: str, width: int, layers: int, encoder_scale: str | None) -> ModelConfig:
    """Return the registered model of a family by its segmenter's width and depth, and the encoder's scale.

    Raises:
        ModelError: nothing of that shape is registered.
    """
    for config in _table().values():
        if (config.family, config.encoder_name) != (family, encoder_scale):
            continue
        segmenter = config.segmenter
        if (segmenter.width, depth_of(segmenter)) == (width, layers):
            return config
    raise ModelError(
        f"no registered {family} segmenter has width {width} and {layers} layers. Add it to configs/model/{family}.yaml"
    )
