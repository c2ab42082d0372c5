"""8-bit and 4-bit encoders, where bitsandbytes is installed, and which attention kernel is chosen."""

import numpy as np
import pytest
import torch

from model import attention
from model.predictor import build_predictor
from model.quantization import quantize_encoder
from utils.errors import MissingPackageError
from utils.tokenizer import PhraseTokenizer

from .conftest import TOKENIZER, pico_model


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_quantised_encoder(bits, picture):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    tokenizer = PhraseTokenizer(TOKENIZER, max_length=62)
    exact = build_predictor(pico_model("sam2"), tokenizer)
    model = quantize_encoder(pico_model("sam2"), bits).to("cpu")
    packed = build_predictor(model, tokenizer)
    assert type(model.encoder.layers[0].ffn.A.fc1).__name__ in ("Linear8bitLt", "Linear4bit")
    assert type(model.projector.fc1) is torch.nn.Linear
    assert not any(type(m).__name__.startswith("Linear") and type(m) is not torch.nn.Linear
                   for m in model.segmenter.modules())  # fmt: skip
    for predictor in (exact, packed):
        predictor.set_image(picture)
    first, second = (p._image and p.model.encode_phrases(p._image.encoder_pixels, tokenizer(["a cat"])[0])[0]
                     for p in (exact, packed))  # fmt: skip
    error = (first - second).norm() / first.norm()
    assert 0 < error < (0.05 if bits == 8 else 0.3)
    assert packed.predict("a cat").masks.shape == (1, 120, 160)


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match="pip install bitsandbytes"):
        quantize_encoder(pico_model("sam2"), 8)


def test_attention_against_plain_arithmetic():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 12, generator=generator) for n in (3, 5, 5))
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    ours = attention.attend(query, key, value, 4, padding)
    for n in range(2):
        for head in range(4):
            part = slice(3 * head, 3 * head + 3)
            logits = query[n, :, part] @ key[n, :, part].T / np.sqrt(3)
            weights = logits.masked_fill(padding[n], -torch.inf).softmax(-1)
            assert torch.allclose(ours[n, :, part], weights @ value[n, :, part], atol=1e-6)
    half = attention.attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), 4, padding)
    assert torch.allclose(half.float(), ours, atol=0.05)


def test_flash_attention_is_for_cuda_halves():
    assert not attention.can_use_flash(torch.zeros(1, 2, 8, dtype=torch.float16), 2)
    assert not attention.can_use_flash(torch.zeros(1, 2, 8), 2)
