"""Every segmenter family keeps the same contract; fast paths agree with the library's."""

import dataclasses

import pytest
import torch

from model.checkpoints.load import build_model
from model.registry import model_config
from model.segmenters import base
from model.segmenters.efficient_sam import EfficientSAMSegmenter
from model.segmenters.sam import SAMSegmenter
from model.segmenters.sam2 import SAM2Segmenter
from model.types import ImageFeatures, MaskPrediction, Prompts
from utils.errors import ModelError, PromptError

from .conftest import PICO, pico_model

FAMILIES = sorted(PICO)


@pytest.fixture(scope="module", params=FAMILIES)
def segmenter(request):
    return spread(pico_model(request.param).segmenter)


def spread(module, seed=0):
    """Give every parameter a value that matters: fresh models hold zeros in their position tables."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return module


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sparse():
    return torch.randn(5, 1, 256, generator=torch.Generator().manual_seed(1))


INDEX = torch.tensor([0, 0, 1, 2, 1])


@torch.no_grad()
def test_one_call_equals_one_by_one(segmenter, pixels, sparse):
    features = segmenter.encode_image(pixels)
    together = segmenter.decode(features, sparse, image_index=INDEX)
    assert together.logits.shape == (5, segmenter.masks_per_prompt, 64, 64)
    assert together.iou.shape == (5, segmenter.masks_per_prompt)
    for i, image in enumerate(INDEX):
        alone = segmenter.decode(segmenter.encode_image(pixels[image][None]), sparse[i : i + 1])
        assert torch.allclose(together.logits[i], alone.logits[0], atol=1e-4)
        assert torch.allclose(together.iou[i], alone.iou[0], atol=1e-4)
    assert not torch.allclose(together.logits[0], together.logits[1], atol=1e-3)


@torch.no_grad()
def test_one_image_serves_all_prompts(segmenter, pixels, sparse):
    features = segmenter.encode_image(pixels[:1])
    shared = segmenter.decode(features, sparse)
    indexed = segmenter.decode(features, sparse, image_index=torch.zeros(5, dtype=torch.long))
    assert torch.allclose(shared.logits, indexed.logits)


@torch.no_grad()
def test_features_can_be_kept(segmenter, pixels, tmp_path):
    from safetensors.torch import load_file, save_file

    features = segmenter.encode_image(pixels)
    save_file({name: tensor.contiguous() for name, tensor in features.tensors().items()}, tmp_path / "f.safetensors")
    read = ImageFeatures.from_tensors(load_file(tmp_path / "f.safetensors"))
    for name, tensor in features.tensors().items():
        assert torch.equal(tensor, read.tensors()[name])
    assert len(features) == 3
    assert torch.equal(features[2].embedding, features.embedding[2:])
    assert torch.equal(features[-1].embedding, features.embedding[2:])
    assert torch.equal(features[torch.tensor([2, 0])].embedding[1], features.embedding[0])
    half = features.to(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.bfloat16}


def test_selection_rules():
    logits = torch.arange(2 * 4 * 4.0).view(2, 4, 2, 2)
    prediction = MaskPrediction(logits, torch.tensor([[0.9, 0.1, 0.3, 0.2], [0.0, 0.5, 0.1, 0.4]]))
    with torch.device("meta"):
        sam = SAMSegmenter(model_config("sam-vit-pico").segmenter)
        sam2 = SAM2Segmenter(model_config("sam2-hiera-pico").segmenter)
        efficient = EfficientSAMSegmenter(model_config("efficient-sam-pico").segmenter)
    assert sam.select(prediction).tolist() == [0, 0]
    assert efficient.select(prediction).tolist() == [0, 0]
    assert sam2.select(prediction).tolist() == [2, 1]
    assert sam.select_for_prompts(prediction, is_ambiguous=True).tolist() == [2, 1]
    assert sam.select_for_prompts(prediction, is_ambiguous=False).tolist() == [0, 0]
    chosen, iou = prediction.chosen(torch.tensor([2, 1]))
    assert torch.equal(chosen, torch.stack([logits[0, 2], logits[1, 1]]))
    assert torch.allclose(iou, torch.tensor([0.3, 0.5]))


def test_sam2_leaves_an_unstable_single_mask():
    with torch.device("meta"):
        sam2 = SAM2Segmenter(model_config("sam2-hiera-pico").segmenter)
    stable = torch.full((1, 4, 10, 10), 3.0)
    unstable = stable.clone()
    unstable[0, 0, :5] = 0.01  # inside the mask, but within the margin of the threshold
    prediction = MaskPrediction(torch.cat([stable, unstable]), torch.tensor([[0.9, 0.1, 0.3, 0.2]] * 2))
    assert sam2.select_for_prompts(prediction, is_ambiguous=False).tolist() == [0, 2]
    assert sam2.select_for_prompts(prediction, is_ambiguous=True).tolist() == [2, 2]


@pytest.mark.parametrize(("kind", "name"), [(SAMSegmenter, "sam-vit-pico"), (SAM2Segmenter, "sam2-hiera-pico")])
def test_fast_attention_equals_the_library(kind, name, pixels):
    """Outputs and gradients, in blocks with windows, without, and with pooled queries."""
    torch.manual_seed(0)
    config = model_config(name).segmenter
    slow, fast = spread(kind(config, library_attention=True)), kind(config)
    fast.load_state_dict(slow.state_dict())
    outputs, gradients = [], []
    for model in (slow, fast):
        embedding = model.encode_image(pixels).embedding
        embedding.square().mean().backward()
        outputs.append(embedding.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.allclose(*outputs, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3), name


@pytest.mark.parametrize("family", ["sam", "sam2", "efficientvit_sam"])
@pytest.mark.parametrize("part_bytes", [1, 100_000])
def test_parts_equal_the_whole(family, part_bytes, pixels, monkeypatch):
    """A CPU encodes an image a few rows, or rows of windows, at a time; with gradients, it does so at once."""
    torch.manual_seed(0)
    model = spread(pico_model(family).segmenter)
    monkeypatch.setattr(base, "PART_BYTES", part_bytes)
    whole = model.encode_image(pixels).tensors()
    with torch.no_grad():
        parts = model.encode_image(pixels).tensors()
    assert whole["embedding"].requires_grad
    for key, tensor in whole.items():
        assert torch.allclose(tensor, parts[key], atol=1e-5), key


@pytest.mark.parametrize("family", PICO)
def test_places_are_coded_as_sam_codes_them(family):
    """Random weights too: with a wider matrix, neighbouring places have nothing in common."""
    assert 0.7 < pico_model(family).segmenter.position_matrix.std() < 1.3


@torch.no_grad()
def test_in_parts_cuts_between_windows(monkeypatch):
    seen = []

    def double(part):
        seen.append(part.shape[1])
        return 2 * part

    tokens = torch.randn(2, 10, 3, 4)
    whole = base.in_parts(double, tokens, 4)
    monkeypatch.setattr(base, "PART_BYTES", 1)
    assert torch.equal(base.in_parts(double, tokens, 4), whole)
    assert seen == [10, 4, 4, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(segmenter, pixels, sparse, dtype):
    """bf16 and fp16 give nearly the same masks, also on the CPU."""
    import copy

    exact = segmenter.decode(segmenter.encode_image(pixels), sparse, image_index=INDEX)
    half_model = copy.deepcopy(segmenter).to(dtype)
    half = half_model.decode(half_model.encode_image(pixels.to(dtype)), sparse.to(dtype), image_index=INDEX)
    assert half.logits.dtype == dtype
    error = (half.logits.float() - exact.logits).abs().mean() / exact.logits.std()
    assert error < (0.08 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_postprocess_returns_each_image_at_its_size(family):
    segmenter = pico_model(family).segmenter
    sizes = [(40, 60), (60, 30)]
    logits = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, second = segmenter.postprocess(logits, sizes, torch.tensor([1, 0, 1]))
    assert first.shape == (1, 40, 60)
    assert second.shape == (2, 60, 30)
    alone = segmenter.postprocess(logits[2:], [(60, 30)], torch.zeros(1, dtype=torch.long))[0]
    assert torch.equal(second[1], alone[0])


def test_letterbox_is_cut_off():
    """A mask in the padding of a wide image does not reach the image."""
    segmenter = pico_model("sam").segmenter
    logits = torch.full((1, 64, 64), -1.0)
    logits[:, 34:] = 1.0  # the lower half of the square input, which is padding for a 2:1 image
    mask = segmenter.postprocess(logits, [(100, 200)], torch.zeros(1, dtype=torch.long))[0]
    assert (mask < 0).all()


@torch.no_grad()
def test_geometric_prompts(segmenter, pixels):
    points = torch.tensor([[[20.0, 30.0]], [[200.0, 40.0]]])
    labels = torch.ones(2, 1, dtype=torch.long)
    prompts = Prompts(points=points, labels=labels)
    if "points" not in segmenter.prompt_kinds:
        with pytest.raises(PromptError, match="points"):
            segmenter.encode_prompts(prompts)
        return
    sparse, dense = segmenter.encode_prompts(prompts)
    assert sparse.shape == (2, 2, 256)  # the point and its padding
    assert dense is None
    _, dense = segmenter.encode_prompts(Prompts(masks=torch.randn(2, 1, 64, 64)))
    assert dense.shape == (2, 256, 16, 16)
    features = segmenter.encode_image(pixels[:1])
    apart = segmenter.decode(features, sparse).logits
    assert not torch.allclose(apart[0], apart[1], atol=1e-3)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_meta_build_leaves_no_buffer_behind(version):
    config = model_config("sam2-hiera-pico")
    config = dataclasses.replace(config, segmenter=dataclasses.replace(config.segmenter, version=version))
    real = build_model(config).segmenter
    with torch.device("meta"):
        empty = build_model(config).segmenter
    empty.restore_buffers()
    stored = real.state_dict().keys()
    for name, buffer in empty.named_buffers():
        if name not in stored:
            assert torch.equal(buffer, real.get_buffer(name)), name


def test_configurations_that_cannot_work_are_refused():
    config = model_config("sam2-hiera-pico").segmenter
    for change, word in (({"version": "3"}, "3"), ({"image_size": 250}, "250"), ({"global_blocks": (2,)}, "windows")):
        with pytest.raises(ModelError, match=word):
            dataclasses.replace(config, **change)


def test_compile_without_a_compiler_is_one_line(monkeypatch):
    """The encoder stays as it was, and the message names the remedy."""

    def fail(*_arguments, **_options):
        def run(_pixels):
            raise RuntimeError("No working C++ compiler found\nand much more")

        return run

    segmenter = pico_model("sam").segmenter
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ModelError, match=r"No working C\+\+ compiler found\). Install") as error:
        segmenter.compile_image_encoder()
    assert "\n" not in str(error.value)
    assert segmenter.encode_image(torch.zeros(1, 3, 256, 256)).embedding.shape == (1, 256, 16, 16)
