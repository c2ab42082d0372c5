"""SAM .pth files of facebookresearch/segment-anything: plain tensors at the top level."""

from .rules import Format

HEAD_MLPS = (
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_in\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.proj_out\.", r"\1.layers.2."),
)

NECK = (
    (r"\bneck\.conv1\.", "neck.0."),
    (r"\bneck\.layer_norm1\.", "neck.1."),
    (r"\bneck\.conv2\.", "neck.2."),
    (r"\bneck\.layer_norm2\.", "neck.3."),
)

SAM = Format(
    rules=(
        *HEAD_MLPS,
        *NECK,
        (r"^image_encoder\.layers\.", "image_encoder.blocks."),
        (r"\bpatch_embed\.projection\.", "patch_embed.proj."),
        (r"shared_embedding\.positional_embedding$", "pe_layer.positional_encoding_gaussian_matrix"),
        (r"\bpoint_embed\.", "point_embeddings."),
        (r"\bmask_embed\.conv1\.", "mask_downscaling.0."),
        (r"\bmask_embed\.layer_norm1\.", "mask_downscaling.1."),
        (r"\bmask_embed\.conv2\.", "mask_downscaling.3."),
        (r"\bmask_embed\.layer_norm2\.", "mask_downscaling.4."),
        (r"\bmask_embed\.conv3\.", "mask_downscaling.6."),
        (r"\bupscale_conv1\.", "output_upscaling.0."),
        (r"\bupscale_layer_norm\.", "output_upscaling.1."),
        (r"\bupscale_conv2\.", "output_upscaling.3."),
        (r"\blayer_norm_final_attn\.", "norm_final_attn."),
        (r"\blayer_norm(\d)\.", r"norm\1."),
    ),
    parts=(
        ("image_encoder.", "SAM image encoder"),
        ("prompt_encoder.", "SAM prompt encoder"),
        ("mask_decoder.", "SAM mask decoder"),
    ),
)
