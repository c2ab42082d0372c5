"""8-bit and 4-bit weights for the phrase encoder through bitsandbytes; the segmenter stays as it is, as published."""

import torch
from torch import nn

from utils.errors import MissingPackageError

from .evf import EVFModel


def require_bitsandbytes(option: str) -> None:
    """Fail early where the package is absent.

    Raises:
        MissingPackageError: names the pip line.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise MissingPackageError(f"{option} needs bitsandbytes. Install it: pip install bitsandbytes") from None


def quantize_encoder(model: EVFModel, bits: int) -> EVFModel:
    """Replace the linear layers of the encoder by quantised ones; the weights are packed when the model moves.

    The model must be on the CPU; move it to its device afterwards.

    Args:
        bits: 8 (LLM.int8, threshold 6) or 4 (NF4).

    Raises:
        MissingPackageError: bitsandbytes is absent.
    """
    require_bitsandbytes(f"{bits}-bit loading")
    import bitsandbytes as bnb

    linears = [(name, module) for name, module in model.encoder.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        owner, _, leaf = name.rpartition(".")
        shape, dtype = (module.in_features, module.out_features), module.weight.dtype
        with torch.device("meta"):
            if bits == 8:
                packed = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            else:
                packed = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
        data = module.weight.data
        if bits == 8:
            packed.weight = bnb.nn.Int8Params(data.to(torch.float16), requires_grad=False, has_fp16_weights=False)
        else:
            packed.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4")
        packed.bias = nn.Parameter(module.bias.data, requires_grad=False)
        setattr(model.encoder.get_submodule(owner), leaf, packed)
    model.quantized_bits = bits
    return model
