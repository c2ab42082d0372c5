"""Model configurations: plain frozen dataclasses that refuse values which cannot work.

Source of the published values: torchscale BEiT-3, segment-anything, SAM 2 and EfficientSAM configurations.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from utils.errors import ModelError, nearest

T = TypeVar("T")


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ModelError(text)


@dataclass(frozen=True)
class BEiT3Config:
    """BEiT-3, the early-fusion phrase and image encoder."""

    width: int
    """Channels of a token, D."""
    layers: int
    heads: int
    mlp_width: int
    vocab_size: int = 64010
    image_size: int = 224
    patch_size: int = 16
    max_text_tokens: int = 1022
    apart_layers: int = 0
    """So many of the first layers read image and phrase apart: what they make of an image serves all its phrases."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.apart_layers < self.layers,
            f"encoder apart_layers {self.apart_layers} is not from 0 to {self.layers - 1}",
        )
        _require(self.width % self.heads == 0, f"encoder width {self.width} is not a multiple of {self.heads} heads")
        _require(
            self.image_size % self.patch_size == 0,
            f"encoder image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )


@dataclass(frozen=True)
class SAMConfig:
    """SAM: plain ViT with windows and decomposed relative positions."""

    width: int
    layers: int
    heads: int
    global_blocks: tuple[int, ...]
    image_size: int = 1024
    window_size: int = 14
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _require(self.width % self.heads == 0, f"segmenter width {self.width} is not a multiple of {self.heads} heads")
        _require(self.image_size % 16 == 0, f"segmenter image_size {self.image_size} is not a multiple of 16")


@dataclass(frozen=True)
class SAM2Config:
    """SAM 2: Hiera backbone with a feature pyramid; `version` 2.1 adds two small tensors to the video memory."""

    width: int
    """Channels of the first stage; they double at each of the three later stages."""
    heads: int
    """Heads of the first stage; they double too."""
    blocks: tuple[int, int, int, int]
    global_blocks: tuple[int, ...]
    windows: tuple[int, int, int, int]
    position_size: int = 7
    """Side of the background position table."""
    version: str = "2.0"
    image_size: int = 1024
    decoder_mlp: int = 2048
    """Inner width of the MLPs of the mask decoder and the memory attention; those of the memory encoder have half."""
    memory_layers: int = 4
    """Layers of the memory attention."""
    has_video: bool = True
    """Whether the memory modules and the object-score head are there: video tracking needs them, images do not."""

    def __post_init__(self) -> None:
        _require(self.version in ("2.0", "2.1"), f"SAM-2 version {self.version!r}: known are '2.0' and '2.1'")
        _require(self.width % self.heads == 0, f"segmenter width {self.width} is not a multiple of {self.heads} heads")
        firsts = [sum(self.blocks[:stage]) for stage in range(1, 4)]
        _require(
            not set(firsts) & set(self.global_blocks),
            f"SAM-2 global_blocks {list(self.global_blocks)}: the first blocks of a stage {firsts} must have windows",
        )
        _require(self.image_size % 32 == 0, f"segmenter image_size {self.image_size} is not a multiple of 32")


@dataclass(frozen=True)
class EfficientSAMConfig:
    """EfficientSAM: a small plain ViT with global attention and its own mask decoder."""

    width: int
    heads: int
    layers: int = 12
    image_size: int = 1024
    decoder_mlp: int = 2048
    """Inner width of the mask decoder's MLPs."""

    def __post_init__(self) -> None:
        _require(self.width % self.heads == 0, f"segmenter width {self.width} is not a multiple of {self.heads} heads")
        _require(self.image_size % 16 == 0, f"segmenter image_size {self.image_size} is not a multiple of 16")


@dataclass(frozen=True)
class EfficientViTSAMConfig:
    """EfficientViT-SAM: stages of convolutions and linear attention, SAM's prompts and mask decoder."""

    widths: tuple[int, ...]
    """Channels of each stage; each halves the map."""
    depths: tuple[int, ...]
    """Blocks with a shortcut of each stage; the block that halves the map comes on top."""
    kinds: tuple[str, ...]
    """What each stage is made of: res (the first), fused, mb, att3 or att5 (attention on scales of 3 or 5 pixels)."""
    expand: tuple[int, ...]
    """Inner width of each stage's blocks, relative to the outer."""
    fewer_norm: tuple[int, ...]
    """Stages whose inner convolutions have a bias instead of a norm."""
    neck_depth: int
    neck_expand: int = 1
    image_size: int = 512
    prompt_size: int = 1024
    """Side of the frame that prompts and masks live on."""

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.widths, self.depths, self.kinds, self.expand)}
        _require(
            len(lengths) == 1 and len(self.widths) >= 4,
            f"segmenter widths, depths, kinds and expand have {sorted(lengths)} stages: needed is one count, 4 or more",
        )
        known = {"res", "fused", "mb", "att3", "att5"}
        _require(set(self.kinds) <= known, f"segmenter kinds {list(self.kinds)}: known are {', '.join(sorted(known))}")
        _require(
            self.image_size % 2 ** len(self.widths) == 0,
            f"segmenter image_size {self.image_size} is not a multiple of {2 ** len(self.widths)}",
        )

    @property
    def width(self) -> int:
        """Channels of the deepest stage."""
        return self.widths[-1]

    @property
    def layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)


@dataclass(frozen=True)
class OVSAMConfig:
    """Open-Vocabulary SAM: a CLIP ResNet, a neck of SAM blocks over its stages, one mask per prompt, and names."""

    width: int
    """Channels of the CLIP ResNet after its stem; the stages have 4, 8, 16 and 32 times as many."""
    depths: tuple[int, int, int, int]
    """Blocks of each stage."""
    embed_width: int
    """Channels of CLIP's common space, where regions and names are compared."""
    clip_size: int
    """Side of CLIP's own images; a 32nd of it is the grid that CLIP looks at a region with."""
    text_width: int
    text_heads: int
    text_layers: int = 12
    neck_width: int = 1280
    neck_layers: int = 5
    """Blocks of the neck, all but the last with windows."""
    neck_heads: int = 16
    window_size: int = 14
    pyramid_width: int = 256
    """Channels of the feature pyramid that regions are read from."""
    decoder_mlp: int = 2048
    """Inner width of the mask decoder's MLPs."""
    image_size: int = 1024

    def __post_init__(self) -> None:
        _require(
            self.neck_width % self.neck_heads == 0,
            f"segmenter neck_width {self.neck_width} is not a multiple of {self.neck_heads} heads",
        )
        _require(
            self.text_width % self.text_heads == 0,
            f"segmenter text_width {self.text_width} is not a multiple of {self.text_heads} heads",
        )
        _require(self.width % 2 == 0, f"segmenter width {self.width} is not even")
        for name in ("image_size", "clip_size"):
            value = getattr(self, name)
            _require(value % 32 == 0, f"segmenter {name} {value} is not a multiple of 32")

    @property
    def layers(self) -> int:
        """Blocks of all stages of the ResNet."""
        return sum(self.depths)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the four stages, at strides 4, 8, 16 and 32."""
        return tuple(self.width * 4 * 2**stage for stage in range(4))

    @property
    def pool_side(self) -> int:
        """Side of the grid that the ResNet's attention pool reads."""
        return self.clip_size // 32


SegmenterConfig = SAMConfig | SAM2Config | EfficientSAMConfig | EfficientViTSAMConfig | OVSAMConfig


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: a segmenter, and an encoder where phrases are understood.

    `segmenter_name` and `encoder_name` are the names of the YAML entries; they say which code builds the parts.
    """

    segmenter_name: str
    family: str
    segmenter: SegmenterConfig
    encoder_name: str | None = None
    encoder: BEiT3Config | None = None

    @property
    def name(self) -> str:
        """Canonical registry name, for example `evf-sam2-hiera-tiny-base` or `sam-vit-b`."""
        return f"evf-{self.segmenter_name}-{self.encoder_name}" if self.encoder_name else self.segmenter_name


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_type(expected: Any, value: Any, text: str) -> None:
    """Refuse a parsed value of another type than the field's; only the types that configurations use."""
    if expected is int:
        _require(_is_count(value), f"{text} a positive whole number")
    elif expected is float:
        _require(_is_count(value) or (isinstance(value, float) and value > 0), f"{text} a positive number")
    elif expected is bool:
        _require(isinstance(value, bool), f"{text} true or false")
    elif expected is str:
        _require(isinstance(value, str), f"{text} text")
    elif get_origin(expected) is tuple:
        items = get_args(expected)
        length = None if Ellipsis in items else len(items)
        words = items[0] is str
        is_right = isinstance(value, tuple) and all(
            isinstance(n, str) if words else isinstance(n, int) and n >= 0 for n in value
        )
        needed = f"a list of {length or 'any number of'} {'words' if words else 'whole numbers'}"
        _require(is_right and length in (None, len(value)), f"{text} {needed}")


def from_mapping(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Build a dataclass from parsed YAML or JSON; lists become tuples, an unknown or missing key is an error.

    Raises:
        ModelError: the key, what is allowed, and where it was read.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ModelError(f"{where}: unknown key {key!r}. Known: {', '.join(fields)}.{nearest(key, fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ModelError(f"{where}: missing key {', '.join(map(repr, missing))}")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in plain.items():
        if value == fields[key].default and type(value) is type(fields[key].default):
            continue  # a default may be what a value is not otherwise, such as no layers
        _check_type(fields[key].type, value, f"{where}: {key} is {value!r}, needed is")
    return kind(**plain)
