"""Write tests/golden/pico.npz: what the pico models answered when they agreed with the published code.

python -m tests.make_golden        # only after the conformance tests passed; say in the commit why the numbers moved
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from model.checkpoints.rules import named_tensors
from model.predictor import ImagePredictor, build_predictor
from utils.tokenizer import PhraseTokenizer

from .conftest import PICO, TOKENIZER, make_picture, pico_model

PATH = Path(__file__).parent / "golden" / "pico.npz"
PHRASES = ["the red box", "a blue square on the right"]


def golden_predictor(family: str) -> ImagePredictor:
    """Return a pico predictor whose weights depend on nothing but their names."""
    model = pico_model(family)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if not tensor.is_floating_point():
                continue
            key = int.from_bytes(hashlib.sha256(f"{family}:{name}".encode()).digest()[:8], "little")
            values = np.random.Generator(np.random.Philox(key)).random(tensor.numel(), np.float32) * 2 - 1
            values = torch.from_numpy(values).view(tensor.shape)
            if tensor.ndim > 1:
                tensor.copy_(values * (3 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(values * 0.1 + (1.0 if name.endswith((".weight", "running_var")) else 0.0))
    return build_predictor(model, PhraseTokenizer(TOKENIZER, max_length=62))


def answers(family: str) -> dict[str, np.ndarray]:
    """Return what is compared: every eighth logit, the scores, the mask areas."""
    predictor = golden_predictor(family)
    predictor.set_image(make_picture())
    prediction = predictor.predict(PHRASES)
    return {
        f"{family}.logits": prediction.logits[:, ::8, ::8],
        f"{family}.scores": prediction.scores,
        f"{family}.areas": prediction.masks.sum((1, 2)),
    }


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **{key: value for family in PICO for key, value in answers(family).items()})
