"""Open-Vocabulary SAM as HarborYuan/ovsam names its tensors, and the four files that a model is put together from.

No published file holds a whole model: OpenAI's RN50x16.pt has the ResNet (and the text tower), sam_vit_h_4b8939.pth the
prompt encoder, sam2clip_*.pth the neck, clip2sam_*.pth the mask decoder and what names regions.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import CheckpointError, compress_names

from .files import TensorFile
from .rules import Format, rename
from .sam import SAM

STEM = tuple(
    (rf"^backbone\.{ours}\.", f"backbone.stem.{number}.")
    for number, ours in zip((0, 1, 3, 4, 6, 7), ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), strict=True)
)
BACKBONE = (*STEM, (r"^backbone\.attnpool\.", "backbone.head."))

OVSAM = Format(
    rules=(
        *BACKBONE,
        (r"^neck\.embeds\.(\d+)\.", r"neck.patch_embeds.\1.projection."),
        (r"^neck\.levels\.", "neck.level_encoding."),
        (r"^neck\.positions$", "neck.pos_embed"),
        (r"^neck\.layers\.", "neck.blocks."),
        (r"^pyramid\.laterals\.(\d+)\.", r"fpn_neck.lateral_convs.\1.conv."),
        (r"^pyramid\.outputs\.(\d+)\.", r"fpn_neck.fpn_convs.\1.conv."),
        *SAM.rules,
        (r"^prompt_encoder\.", "pe."),
        (r"^region_conv\.", "mask_decoder.roi_conv.0.conv."),
        (r"^mask_decoder\.iou_token\.", "mask_decoder.label_token."),
        (r"^mask_decoder\.iou_prediction_head\.", "mask_decoder.label_mlp."),
        (r"^mask_decoder\.(?!label_|roi_conv)", "mask_decoder.mask_decoder."),
    ),
    parts=(
        ("backbone.", "CLIP ResNet"),
        ("neck.", "SAM2CLIP neck"),
        ("pe.", "SAM prompt encoder"),
        ("mask_decoder.roi_conv.", "CLIP2SAM region classifier"),
        ("mask_decoder.", "CLIP2SAM mask decoder"),
        ("fpn_neck.", "CLIP2SAM feature pyramid"),
    ),
)

FILES = {
    "backbone.": "CLIP ResNet, in OpenAI's RN50x16.pt",
    "neck.": "SAM2CLIP neck, in sam2clip_*.pth",
    "pe.": "SAM prompt encoder, in sam_vit_h_4b8939.pth",
    "mask_decoder.": "mask decoder and region classifier, in clip2sam_*.pth",
    "fpn_neck.": "feature pyramid, in clip2sam_*.pth",
}
"""Start of the names of a part's tensors -> what it is, and where it was published."""

VOCABULARY_FILE = "vocabulary.safetensors"
"""Name of the vocabulary in a model's folder that is taken where none is named."""

TEXT = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
"""How the names of the text tower's tensors begin in a CLIP file."""

_RENAMED = (
    ("visual.", "backbone."), ("backbone_student.", "backbone."), ("neck_student.", "neck."),
    ("prompt_encoder.", "pe."), ("roi_conv.", "mask_decoder.roi_conv."),
)  # fmt: skip
_UNUSED = (
    "image_encoder.", "mask_decoder.transformer.", "mask_decoder.iou_", "mask_decoder.mask_tokens.",
    "mask_decoder.output_",
)  # fmt: skip
"""What a SAM file holds that a model does not take from it."""
_CLIP_SETTINGS = {"logit_scale", "input_resolution", "context_length", "vocab_size"}

logger = logging.getLogger(__name__)


def is_part(names: Sequence[str] | set[str]) -> bool:
    """Return whether tensors are of one of the published parts that OVSAM alone has, by their names."""
    starts = ("neck_student.", "neck.patch_embeds.", "fpn_neck.", "mask_decoder.roi_conv.", "visual.attnpool.")
    return any(name.startswith(starts) for name in names)


def part_files(folder: Path) -> list[Path]:
    """Return the published files of a folder, none where there is neither a sam2clip nor a clip2sam file."""
    if not any(folder.glob("sam2clip*.pth")) and not any(folder.glob("clip2sam*.pth")):
        return []
    return sorted(file for file in folder.iterdir() if file.suffix in (".pt", ".pth", ".safetensors"))


class PartFiles:
    """The tensors of several published files as one checkpoint; a part that two files hold is taken from the first.

    Reads as a `Checkpoint`, by the names of `OVSAM`. Floating-point numbers come out as float32: OpenAI's are halved.

    Args:
        files: at least one.

    Raises:
        CheckpointError: a tensor that belongs to no part.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.source = " + ".join(map(str, files))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.text: dict[str, tuple[TensorFile, str]] = {}
        """The text tower's tensors, by CLIP's names, where a file has it."""
        self._owner: dict[str, tuple[TensorFile, str]] = {}
        self._from: dict[str, Path] = {}
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"no such file: {path}. Needed are {'; '.join(FILES.values())}")
            self._add(path)

    def _add(self, path: Path) -> None:
        file = TensorFile(path, ("state_dict", "model"))
        shapes = file.shapes()
        is_sam = any(name.startswith("mask_decoder.transformer.") for name in shapes)
        unknown = []
        for name, shape in shapes.items():
            if (is_sam and name.startswith(_UNUSED)) or name in _CLIP_SETTINGS:
                continue
            if name.startswith(TEXT):
                self.text.setdefault(name, (file, name))
                continue
            published = published_name(name)
            part = next((part for part in FILES if published.startswith(part)), None)
            if part is None:
                unknown.append(name)
            elif self._from.setdefault(part, path) == path:
                self.shapes[published], self._owner[published] = shape, (file, name)
        if unknown:
            raise CheckpointError(
                f"{path} holds {len(unknown)} tensors of no part of Open-Vocabulary SAM: {compress_names(unknown)}. "
                f"Needed are {'; '.join(FILES.values())}"
            )
        for part, owner in self._from.items():
            if owner == path:
                logger.info("%s from %s", FILES[part].split(",")[0], path.name)

    def missing(self, needed: Iterable[str] = tuple(FILES)) -> list[str]:
        """Return which of the needed parts no file holds, with where they were published."""
        return [FILES[part] for part in needed if part not in self._from]

    def file_of(self, part: str) -> Path:
        """Return the file that a part is taken from."""
        return self._from[part]

    def keep(self, parts: Sequence[str]) -> None:
        """Forget the tensors of all other parts."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if name.startswith(tuple(parts))}

    def require_all(self, needed: Iterable[str] = tuple(FILES)) -> None:
        """Refuse to go on without a part.

        Raises:
            CheckpointError: names every part that is missing and its file.
        """
        if missing := self.missing(needed):
            raise CheckpointError(
                f"{self.source}: of Open-Vocabulary SAM is missing: {'; '.join(missing)}. Add the file"
            )

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor on a device, floating-point ones in `dtype` (None makes float32)."""
        file, stored = self._owner[name]
        return file.read(stored, device, dtype or torch.float32)

    def read_text(self) -> dict[str, Tensor]:
        """Return the text tower, float32; empty where no file has it."""
        cpu = torch.device("cpu")
        return {name: file.read(stored, cpu, torch.float32) for name, (file, stored) in self.text.items()}


def published_name(name: str) -> str:
    """Return the name that the whole model has for a tensor of any of its files."""
    for start, ours in _RENAMED:
        if name.startswith(start):
            name = ours + name.removeprefix(start)
            break
    return rename(name, BACKBONE)
