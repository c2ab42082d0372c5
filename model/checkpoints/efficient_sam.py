"""EfficientSAM .pt files of yformer/EfficientSAM: tensors below the entry "model"."""

from .rules import Format
from .sam import NECK

_TWO_HIDDEN = r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))"

EFFICIENT_SAM = Format(
    rules=(
        *NECK,
        (r"^image_encoder\.trunk\.", "image_encoder."),
        (r"^prompt_encoder\.position_matrix$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        (r"\bmlp\.layers\.0\.", "mlp.layers.0.0."),
        (r"\bmlp\.layers\.1\.", "mlp.fc."),
        (_TWO_HIDDEN + r"\.layers\.([01])\.", r"\1.layers.\2.0."),
        (_TWO_HIDDEN + r"\.layers\.2\.", r"\1.fc."),
        (r"\bupscale1\.", "final_output_upscaling_layers.0.0."),
        (r"\bupscale_norm\.", "final_output_upscaling_layers.0.1."),
        (r"\bupscale2\.", "final_output_upscaling_layers.1.0."),
    ),
    parts=(
        ("image_encoder.", "EfficientSAM image encoder"),
        ("prompt_encoder.", "EfficientSAM prompt encoder"),
        ("mask_decoder.", "EfficientSAM mask decoder"),
    ),
)
