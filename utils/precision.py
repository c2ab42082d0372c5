"""The one place that chooses a device and a floating-point type."""

import logging

import torch

from .errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


def choose_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """Return the device to work on.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`; None takes CUDA, then MPS, then the CPU.
        local_rank: which GPU, where `name` does not say.

    Raises:
        ModelError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"unknown device {name!r}. Allowed: cpu, cuda, cuda:0 …, mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"device {name!r} is not supported. Allowed: cpu, cuda, cuda:0 …, mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps' is not available here. Use --device cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is None and count:
            device = torch.device("cuda", local_rank % count)
        if not count or device.index >= count:
            raise ModelError(f"device {name!r} is not available: {count} CUDA devices here. Use --device cpu")
    return device


def choose_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """Return the type for a precision, or the nearest that the device can do, with a warning.

    Args:
        precision: `fp32`, `bf16` or `fp16`; None takes fp16 on CUDA, as the published inference does, else fp32.

    Raises:
        ModelError: unknown precision.
    """
    if precision is None:
        precision = "fp16" if device.type == "cuda" else "fp32"
    if precision not in DTYPES:
        raise ModelError(f"unknown precision {precision!r}. Allowed: {', '.join(DTYPES)}")
    if precision == "fp16" and device.type == "cpu":
        logger.warning("fp16 is slow and inexact on the CPU: using fp32 (bf16 halves the memory there)")
        precision = "fp32"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        logger.warning("%s has no bf16: using fp16", torch.cuda.get_device_name(device))
        precision = "fp16"
    return DTYPES[precision]
