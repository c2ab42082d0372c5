"""SAM 2.0 and 2.1 .pt files of facebookresearch/sam2: tensors below the entry "model"."""

from dataclasses import replace

from .rules import Format

_THREE_LAYER_MLPS = (
    r"^((?:sam_mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head))|obj_ptr_proj)"
)
_DOWNSAMPLER = "memory_encoder.mask_downsampler."
_SCALE = r"^(memory_encoder\.fuser\.layers\.\d+)\.scale$"

SAM2 = Format(
    rules=(
        (r"^sam2\.", ""),
        (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
        (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
        (r"^prompt_encoder\.", "sam_prompt_encoder."),
        (r"^mask_decoder\.", "sam_mask_decoder."),
        (r"^object_pointer_proj\.", "obj_ptr_proj."),
        (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
        (r"^no_object_pointer$", "no_obj_ptr"),
        (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
        (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
        (r"^no_memory_embedding$", "no_mem_embed"),
        (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
        (_THREE_LAYER_MLPS + r"\.layers\.0\.", r"\1.layers.1."),
        (_THREE_LAYER_MLPS + r"\.proj_in\.", r"\1.layers.0."),
        (_THREE_LAYER_MLPS + r"\.proj_out\.", r"\1.layers.2."),
        (r"\bmlp\.proj_in\.", "mlp.layers.0."),
        (r"\bmlp\.proj_out\.", "mlp.layers.1."),
        (r"\bpatch_embed\.projection\.", "patch_embed.proj."),
        (r"shared_embedding\.positional_embedding$", "pe_layer.positional_encoding_gaussian_matrix"),
        (
            r"^shared_image_embedding\.positional_embedding$",
            "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        ),
        (r"\bmask_embed\.conv1\.", "mask_downscaling.0."),
        (r"\bmask_embed\.layer_norm1\.", "mask_downscaling.1."),
        (r"\bmask_embed\.conv2\.", "mask_downscaling.3."),
        (r"\bmask_embed\.layer_norm2\.", "mask_downscaling.4."),
        (r"\bmask_embed\.conv3\.", "mask_downscaling.6."),
        (r"\bupscale_conv1\.", "output_upscaling.0."),
        (r"\bupscale_layer_norm\.", "output_upscaling.1."),
        (r"\bupscale_conv2\.", "output_upscaling.3."),
        (r"\bo_proj\.", "out_proj."),
        (r"\bmemory_fuser\.", "fuser."),
        (r"\bfeature_projection\.", "pix_feat_proj."),
        (r"^memory_encoder\.projection\.", "memory_encoder.out_proj."),
        *(
            (rf"^memory_encoder\.mask_downsampler\.layers\.{i}\.{ours}\.", f"{_DOWNSAMPLER}encoder.{3 * i + shift}.")
            for i in range(4)
            for shift, ours in enumerate(("conv", "layer_norm"))
        ),
        (r"\bmask_downsampler\.final_conv\.", "mask_downsampler.encoder.12."),
        (r"\bdepthwise_conv\.", "dwconv."),
        (r"\bpointwise_conv(\d)\.", r"pwconv\1."),
        (r"\blayer_norm_final_attn\.", "norm_final_attn."),
        (r"\blayer_norm(\d?)\.", r"norm\1."),
        (_SCALE, r"\1.gamma"),
    ),
    split={"sam2.prompt_encoder.point_embed.weight": ("sam_prompt_encoder.point_embeddings.{}.weight", 4)},
    parts=(
        ("image_encoder.trunk.", "SAM-2 Hiera backbone"),
        ("image_encoder.neck.", "SAM-2 feature pyramid"),
        ("sam_prompt_encoder.", "SAM-2 prompt encoder"),
        ("sam_mask_decoder.pred_obj_score_head.", "SAM-2 object-score head (video)"),
        ("sam_mask_decoder.", "SAM-2 mask decoder"),
        ("no_mem_embed", "SAM-2 image embedding"),
        ("memory_", "SAM-2 memory (video)"),
        ("maskmem_", "SAM-2 memory (video)"),
        ("no_mem_pos_enc", "SAM-2 memory (video)"),
        ("mask_downsample.", "SAM-2 memory (video)"),
        ("obj_ptr_tpos_proj", "SAM-2.1 memory (video)"),
        ("no_obj_embed_spatial", "SAM-2.1 memory (video)"),
        ("obj_ptr_proj", "SAM-2 object pointers (video)"),
        ("no_obj_ptr", "SAM-2 object pointers (video)"),
    ),
)

VIDEO_KEYS = (
    "memory_", "maskmem_tpos_enc", "no_mem_pos_enc", "mask_downsample.", "obj_ptr_", "no_obj_",
    "sam_mask_decoder.pred_obj_score_head.",
)  # fmt: skip
"""How the names of tensors begin that only video uses."""

SAM2_IN_EVF = replace(SAM2, rules=(*SAM2.rules[:-1], (_SCALE, r"\1.weight")))
"""Inside EVF checkpoints the memory fuser's layer scale is called `weight`, not `gamma`."""
