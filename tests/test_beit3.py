"""BEiT-3: the fast path against the slow one, padding, and what is trained."""

import dataclasses

import pytest
import torch

from configs.schema import BEiT3Config
from model.attention import attend
from model.encoders.beit3 import BEiT3
from utils.errors import ModelError, PromptError

CONFIG = BEiT3Config(width=48, layers=3, heads=4, mlp_width=96, vocab_size=50, image_size=64, max_text_tokens=20)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = BEiT3(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    ids = torch.randint(4, 50, (5, 9), generator=generator)
    return pixels, ids, torch.tensor([0, 1, 1, 0, 0])


@torch.no_grad()
def test_cls_only_path_equals_all_tokens(encoder, inputs):
    pixels, ids, index = inputs
    padding = torch.arange(9) >= torch.tensor([9, 5, 3, 9, 7])[:, None]
    fast = encoder(pixels, ids, padding, index).vector
    slow, _ = encoder.forward_all(pixels, ids, padding, index)
    assert torch.allclose(fast, slow[:, 0], atol=1e-5)


@torch.no_grad()
def test_padded_equals_unpadded(encoder, inputs):
    """Garbage in padded places, and how much of it there is, changes nothing."""
    pixels, ids, index = inputs
    lengths = torch.tensor([9, 5, 3, 9, 7])
    batch = encoder(pixels, ids, torch.arange(9) >= lengths[:, None], index).vector
    for i, length in enumerate(lengths):
        alone = encoder(pixels[index[i]][None], ids[i : i + 1, :length]).vector
        assert torch.allclose(batch[i], alone[0], atol=1e-5)
    noisy = torch.where(torch.arange(9) >= lengths[:, None], (ids * 7) % 50, ids)
    assert torch.allclose(encoder(pixels, noisy, torch.arange(9) >= lengths[:, None], index).vector, batch, atol=1e-6)


@torch.no_grad()
def test_image_is_shared_or_indexed(encoder, inputs):
    pixels, ids, index = inputs
    assert torch.allclose(encoder(pixels, ids, None, index).vector, encoder(pixels[index], ids).vector, atol=1e-6)
    one = encoder(pixels[:1], ids).vector
    assert torch.allclose(one, encoder(pixels[:1].expand(5, -1, -1, -1), ids).vector, atol=1e-6)


@torch.no_grad()
def test_every_input_matters(encoder, inputs):
    pixels, ids, index = inputs
    before = encoder(pixels, ids, None, index).vector
    other_word = ids.clone()
    other_word[:, 4] = (ids[:, 4] + 3) % 50
    swapped = ids.clone()
    swapped[:, [2, 3]] = ids[:, [3, 2]]
    for after in (
        encoder(pixels, other_word, None, index).vector,
        encoder(pixels, swapped, None, index).vector,
        encoder(pixels.flip(-1), ids, None, index).vector,
    ):
        assert (after - before).abs().amax(dim=1).min() > 1e-4


def test_gradients_reach_what_the_cls_reads(encoder, inputs):
    """In the last layer nothing that feeds only text outputs is computed, so it has no gradient."""
    pixels, ids, index = inputs
    encoder.zero_grad()
    encoder(pixels, ids, None, index).vector.square().sum().backward()
    unused = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    last = f"layers.{CONFIG.layers - 1}."
    text_only = tuple(f"self_attn.{part}.B" for part in ("q_proj", "inner_attn_ln", "out_proj"))
    text_only += ("final_layer_norm.B", "ffn.B")
    assert unused == {
        name
        for name, _ in encoder.named_parameters()
        if name == "vision_embed.mask_token"
        or name.startswith("norm.B.")
        or (name.startswith(last) and name.removeprefix(last).startswith(text_only))
    }
    encoder.zero_grad()


def test_overlong_phrase_is_refused(encoder, inputs):
    with pytest.raises(PromptError, match=r"21 tokens.*20"):
        encoder(inputs[0][:1], torch.zeros(1, 21, dtype=torch.long))


@pytest.mark.parametrize(("field", "value"), [("heads", 5), ("patch_size", 15)])
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ModelError, match=str(value)):
        dataclasses.replace(CONFIG, **{field: value})


def test_initialisation():
    """As torchscale's linear layers; image positions are waves that tell every two patches apart."""
    torch.manual_seed(0)
    model = BEiT3(CONFIG)
    model.init_weights()
    weight = model.layers[0].ffn.A.fc1.weight
    assert weight.abs().max() <= (6 / (48 + 96)) ** 0.5
    assert float(weight.detach().std()) == pytest.approx((2 / (48 + 96)) ** 0.5, rel=0.05)
    assert float(model.layers[0].self_attn.k_proj.B.weight.detach().std()) == pytest.approx((1 / 96) ** 0.5, rel=0.05)
    assert not model.layers[0].ffn.A.fc1.bias.any()
    assert abs(float(model.text_embed.weight.detach().std()) * CONFIG.width**0.5 - 1) < 0.1
    assert not model.vision_embed.cls_token.any()
    table = BEiT3(dataclasses.replace(CONFIG, image_size=160))
    table.init_weights()
    places = table.positions.A.weight.detach()[3:]
    assert len(places) == 100 and not table.positions.A.weight[:3].any()
    assert float(places.std()) == pytest.approx(0.2, rel=0.1)
    apart = torch.cdist(places, places) + torch.eye(100) * 9
    assert apart.min() > 0.5
    assert places[0].dot(places[1]) > places[0].dot(places[9]), "neighbours are more alike than ends of a row"


APART = dataclasses.replace(CONFIG, layers=4, apart_layers=2)


@torch.no_grad()
def test_layers_that_read_apart_serve_all_phrases_of_an_image(inputs):
    """The first layers see one side alone; that of an image is computed once, whatever is asked of it."""
    pixels, ids, index = inputs
    torch.manual_seed(0)
    model = BEiT3(APART).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows = []
    model.layers[0].self_attn.q_proj.A.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    padding = torch.arange(9) >= torch.tensor([9, 5, 3, 9, 7])[:, None]
    said = model(pixels, ids, padding, index, points=True, apart=True)
    assert max(rows[:1]) == 2
    slow, _ = model.forward_all(pixels, ids, padding, index)
    assert torch.allclose(said.vector, slow[:, 0], atol=1e-5)
    one = model(pixels[1:], ids[1:2, :5], points=True, apart=True)
    assert torch.allclose(one.vector[0], said.vector[1], atol=1e-5) and torch.allclose(
        one.fit[0], said.fit[1], atol=1e-4
    )
    alone = model(pixels, ids, padding, index, apart=True, fused=False)
    for name in ("patches", "words"):
        assert torch.equal(getattr(alone, name), getattr(said, name))
    other = model(pixels, ids.flip(0), padding.flip(0), index, apart=True)
    assert torch.equal(other.patches, said.patches) and not torch.allclose(other.vector, said.vector, atol=1e-3)


@pytest.mark.parametrize("count", [-1, 4])
def test_impossible_numbers_of_layers_apart_are_refused(count):
    with pytest.raises(ModelError, match=f"apart_layers {count} .*0 to 3"):
        dataclasses.replace(APART, apart_layers=count)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_equals_the_kernel(masked):
    """In bf16 on a CPU, training writes attention out; with and without gradients the answer is the same."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, length, 48) for length in (5, 11, 11)]
    padding = (torch.arange(11) >= torch.tensor([[11], [4], [7]])) if masked else None
    half = [tokens.bfloat16().requires_grad_() for tokens in inputs]
    written = attend(*half, heads=4, padding=padding)
    with torch.no_grad():
        kernel = attend(*half, heads=4, padding=padding)
    exact = [tokens.detach().float().requires_grad_() for tokens in half]
    expected = attend(*exact, heads=4, padding=padding)
    assert torch.allclose(written, kernel, atol=0.02) and torch.allclose(written.float(), expected, atol=0.02)
    written.float().square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(half, exact, strict=True):
        assert torch.allclose(mine.grad.float(), theirs.grad, atol=0.05 * theirs.grad.abs().max())
