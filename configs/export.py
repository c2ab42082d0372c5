"""Options of export.py."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import FlagCreatePairsOff


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Write a model as graphs for other runtimes, checked against the model."""

    version: str = "nano"
    """Checkpoint: as inference.py takes it, or a SAM, SAM-2 or EfficientViT-SAM file (a model that takes points)."""
    out: str
    """Folder to write; it must not exist."""
    format: Literal["onnx", "tensorrt", "pt2"] = "onnx"
    """onnx runs in ONNX Runtime and others, pt2 in torch (torch.export), tensorrt on NVIDIA GPUs."""
    single_mask: FlagCreatePairsOff[bool] = False
    """Models that take points: return the one mask with the highest predicted IoU instead of all four."""
    tolerance: float = 1e-4
    """Refuse a graph that differs from the model by more, in any output."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace an engine that is there."""
