"""Models: a phrase and an image go in, a mask comes out.

Shape legend, used in every docstring of this package:

    B   images of a batch                 N   prompts (phrases, or points and boxes) of all images together
    S   side of the segmenter's input     H W height and width of an original image, in pixels
    h w side of the image embedding, S/16 C D channels of a segmenter, width of the encoder
    V T image and text tokens of BEiT-3   P   prompt tokens (or points) of one prompt
    M   masks per prompt                  image_index [N]: which of the B images a prompt is about

Public names are loaded on first use, so that `import model` costs nothing.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "load_model": ".checkpoints.load",
    "save_model": ".checkpoints.load",
    "save_published": ".checkpoints.load",
    "load_predictor": ".predictor",
    "ImagePredictor": ".predictor",
    "load_open_vocabulary": ".named_predictor",
    "OpenVocabularyPredictor": ".named_predictor",
    "list_models": ".registry",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
