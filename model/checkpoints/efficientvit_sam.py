"""EfficientViT-SAM .pt files of mit-han-lab/efficientvit: tensors at the top level, or below the entry "state_dict"."""

from .rules import Format
from .sam import SAM

EFFICIENTVIT_SAM = Format(
    rules=(
        (r"^image_encoder\.backbone\.(\d+)\.(\d+)\.", r"image_encoder.backbone.stages.\1.op_list.\2."),
        (r"^image_encoder\.neck\.inputs\.(\d+)\.", r"image_encoder.neck.input_ops.\1.op_list.0."),
        (r"^image_encoder\.neck\.middle\.", "image_encoder.neck.middle.op_list."),
        (r"^image_encoder\.neck\.output\.", "image_encoder.neck.output_ops.0.op_list.0.conv."),
        *SAM.rules,
    ),
    parts=(
        ("image_encoder.", "EfficientViT image encoder"),
        ("prompt_encoder.", "SAM prompt encoder"),
        ("mask_decoder.", "SAM mask decoder"),
    ),
)
