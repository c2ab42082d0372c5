"""BEiT-3 .pth files of microsoft/unilm: tensors `beit3.…` below the entry "model"; other heads may lie beside."""

from .rules import Format

PREFIX = "beit3."

BEIT3 = Format(
    rules=(
        (r"^positions\.", "encoder.embed_positions."),
        (r"^layers\.", "encoder.layers."),
        (r"^norm\.", "encoder.layer_norm."),
        (r"^", PREFIX),
    ),
    parts=(
        ("beit3.text_embed.", "BEiT-3 token table"),
        ("beit3.vision_embed.", "BEiT-3 patch embedding"),
        ("beit3.encoder.embed_positions.", "BEiT-3 positions"),
        ("beit3.encoder.", "BEiT-3 encoder"),
    ),
)
