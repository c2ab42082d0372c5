"""One image, many phrases: batching changes nothing, and bad prompts are refused with one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from model.predictor import build_predictor, load_predictor
from model.prompts import read_prompts, to_input
from utils.errors import ImageError, ModelError, PromptError
from utils.tokenizer import PhraseTokenizer

from .conftest import PICO, TOKENIZER, lively_model, pico_model

PHRASES = ["the cat", "a red box on the left", "blue square bottom right"]


def lively_predictor(family):
    """Return a predictor whose masks differ between phrases: a fresh model maps all of them to nearly one prompt."""
    model = lively_model(family, seed=0)
    return build_predictor(model, PhraseTokenizer(TOKENIZER, max_length=62))


@pytest.fixture(scope="module", params=sorted(PICO))
def predictor(request):
    return lively_predictor(request.param)


def assert_same(first, second, rows=slice(None)):
    assert np.allclose(first.logits, second.logits[rows], atol=1e-4)
    assert np.allclose(first.scores, second.scores[rows], atol=1e-4)
    assert (first.masks != second.masks[rows]).mean() < 1e-3


def test_phrases_together_equal_phrases_apart(predictor, picture):
    predictor.set_image(picture)
    together = predictor.predict(PHRASES)
    assert together.masks.shape == (3, 120, 160)
    assert together.masks.dtype == bool
    assert together.logits.dtype == np.float32
    assert np.array_equal(together.masks, together.logits > 0)
    for i, phrase in enumerate(PHRASES):
        assert_same(predictor.predict(phrase), together, slice(i, i + 1))
    assert np.abs(together.logits[0] - together.logits[1]).max() > 1e-2


def test_image_is_encoded_once(predictor, picture, monkeypatch):
    calls = []
    encode = predictor.model.segmenter.encode_image
    monkeypatch.setattr(predictor.model.segmenter, "encode_image", lambda pixels: calls.append(1) or encode(pixels))
    predictor.set_image(picture)
    for phrase in PHRASES:
        predictor.predict(phrase)
    assert len(calls) == 1


def test_many_phrases_are_decoded_in_parts(predictor, picture, monkeypatch):
    predictor.set_image(picture)
    phrases = [f"{phrase} {word}" for phrase in PHRASES for word in ("one", "two")]
    together = predictor.predict(phrases)
    monkeypatch.setattr("model.predictor.MAX_PROMPTS", 4)
    assert_same(predictor.predict(phrases), together)


def test_batch_equals_one_by_one(predictor, picture):
    images = [picture, picture[::-1].copy(), picture[:60, :100]]
    phrases = [PHRASES[:2], "a dog", PHRASES]
    results = predictor.predict_batch(images, phrases, batch_size=2)
    for image, entry, result in zip(images, phrases, results, strict=True):
        predictor.set_image(image)
        assert_same(predictor.predict(entry), result)
        assert result.masks.shape[1:] == image.shape[:2]


def test_batch_in_parts_keeps_the_order(predictor, picture, monkeypatch):
    images, phrases = [picture, picture[::-1].copy()], [PHRASES, PHRASES[::-1]]
    whole = predictor.predict_batch(images, phrases)
    monkeypatch.setattr("model.predictor.MAX_PROMPTS", 4)  # cuts through the phrases of the second image
    for first, second in zip(predictor.predict_batch(images, phrases), whole, strict=True):
        assert_same(first, second)


def test_semantic_prefix(predictor, picture):
    predictor.set_image(picture)
    assert_same(predictor.predict("cat", semantic=True), predictor.predict("[semantic] cat"))
    assert np.abs(predictor.predict("cat", semantic=True).logits - predictor.predict("cat").logits).max() > 1e-3


def test_sources_of_an_image(predictor, picture, picture_path):
    results = []
    for source in (picture, picture_path, str(picture_path), Image.fromarray(picture)):
        predictor.set_image(source)
        results.append(predictor.predict("a cat").logits)
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_a_bad_image_keeps_the_earlier_one(predictor, picture, tmp_path):
    predictor.set_image(picture)
    before = predictor.predict("cat")
    with pytest.raises(ImageError, match="nothing"):
        predictor.set_image(tmp_path / "nothing.png")
    assert_same(predictor.predict("cat"), before)


def test_text_with_points_and_boxes(predictor, picture):
    """Geometric prompts change the mask of a phrase, and one for all equals one each."""
    predictor.set_image(picture)
    if not predictor.model.segmenter.prompt_kinds:
        with pytest.raises(PromptError, match="points"):
            predictor.predict(PHRASES, points=[[50, 40]])
        return
    plain = predictor.predict(PHRASES)
    with_point = predictor.predict(PHRASES, points=[[50, 40]])
    assert np.abs(plain.logits - with_point.logits).max() > 1e-3
    assert_same(predictor.predict(PHRASES, points=[[[50, 40]]] * 3, labels=[[1]] * 3), with_point)
    background = predictor.predict(PHRASES, points=[[50, 40]], labels=[0])
    assert np.abs(background.logits - with_point.logits).max() > 1e-2 * with_point.logits.std()
    boxed = predictor.predict(PHRASES[0], boxes=[30, 20, 90, 60])
    assert boxed.masks.shape[0] == 1
    again = predictor.predict(boxes=[30, 20, 90, 60], masks=boxed.low_res)
    assert np.abs(again.logits - boxed.logits).max() > 1e-3


def test_prompts_without_phrases(predictor, picture):
    predictor.set_image(picture)
    if not predictor.model.segmenter.prompt_kinds:
        return
    apart = predictor.predict(points=[[[50, 40]], [[120, 90]]])
    assert apart.masks.shape[0] == 2
    for i, point in enumerate([[50, 40], [120, 90]]):
        assert_same(predictor.predict(points=[point]), apart, slice(i, i + 1))
    only_mask = predictor.predict(masks=apart.low_res)
    assert only_mask.masks.shape[0] == 2


BAD = {
    "empty phrase": ({"phrases": "  "}, "empty phrase"),
    "empty among others": ({"phrases": ["cat", ""]}, "empty phrase"),
    "nothing": ({}, "nothing to look for"),
    "labels alone": ({"phrases": "cat", "labels": [1]}, "labels without points"),
    "label value": ({"points": [[1, 2]], "labels": [2]}, "labels are 1"),
    "label count": ({"points": [[1, 2]], "labels": [1, 0]}, "1 points, but 2 labels"),
    "box numbers": ({"boxes": [1, 2, 3]}, r"shape \[3\]; needed \[4\]"),
    "point numbers": ({"points": [[1, 2, 3]]}, r"shape \[1, 3\]"),
    "point alone": ({"points": [1]}, r"shape \[1\]"),
    "label fraction": ({"points": [[1, 2]], "labels": [0.5]}, "labels are 1"),
    "full-size mask": ({"masks": np.zeros((120, 160))}, r"shape \[120, 160\]; needed \[64, 64\]"),
    "phrase type": ({"phrases": [3]}, "int, needed is text"),
    "box count": ({"phrases": PHRASES, "boxes": [[1, 2, 3, 4]] * 2}, "2 boxes for 3 prompts"),
    "phrase count": ({"phrases": PHRASES[:2], "boxes": [[1, 2, 3, 4]] * 3}, "2 phrases for 3"),
    "not numbers": ({"points": [["a", "b"]]}, "not numbers"),
    "ragged": ({"points": [[[1, 2]], [[1, 2], [3, 4]]]}, "not numbers of one shape"),
    "not finite": ({"points": [[float("nan"), 2]]}, "finite"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_prompts(case, picture):
    predictor = lively_predictor("sam2")
    predictor.set_image(picture)
    arguments, message = BAD[case]
    with pytest.raises(PromptError, match=message) as error:
        predictor.predict(**arguments)
    assert "\n" not in str(error.value)


def test_no_image_set():
    with pytest.raises(PromptError, match="set_image"):
        lively_predictor("sam").predict("cat")


def test_batch_counts(predictor, picture):
    with pytest.raises(PromptError, match="1 images, but phrases for 2"):
        predictor.predict_batch([picture], ["a", "b"])
    with pytest.raises(PromptError, match="without a phrase"):
        predictor.predict_batch([picture], [[]])


def test_predict_then_train(predictor, picture):
    """What inference leaves behind does not disturb a later backward pass."""
    predictor.set_image(picture)
    predictor.predict("a cat")
    model = predictor.model
    pixels = predictor.image_spec(picture)[None]
    small = model.encoder.image_spec(picture)[None]
    model(pixels, small, predictor.tokenizer(["a cat"])[0]).logits.mean().backward()
    assert model.projector.fc1.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_impossible_options(predictor, picture, pico_folders):
    with pytest.raises(ModelError, match="batch_size 0"):
        predictor.predict_batch([picture], ["a"], batch_size=0)
    with pytest.raises(PromptError, match="one entry per image"):
        predictor.predict_batch([picture] * 3, "cat")
    with pytest.raises(ModelError, match="evla"):
        load_predictor(pico_folders["sam"], device="cpu", preprocessing="evla")
    with pytest.raises(PromptError, match="trunc"):
        load_predictor(pico_folders["sam"], device="cpu", overlong="trunc")
    with pytest.raises(ImageError, match="NoneType"):
        predictor.set_image(None)


def test_mixed_types(picture):
    """An encoder in bf16 serves a segmenter in fp32, and the other way round."""
    for part in ("encoder", "segmenter", "projector"):
        predictor = lively_predictor("sam2")
        getattr(predictor.model, part).to(torch.bfloat16)
        predictor.set_image(picture)
        assert predictor.predict(PHRASES, points=[[5, 5]]).logits.dtype == np.float32


def test_points_keep_their_place_in_half_precision(pico_folders, picture):
    """One pixel more must still matter in bf16: the position code stays float32."""
    predictor = load_predictor(pico_folders["sam2"], device="cpu", dtype=torch.bfloat16)
    predictor.set_image(picture)
    segmenter = predictor.model.segmenter
    prompts = [
        to_input(
            read_prompts((1024, 1024), [[x, 100]], None, None, None, 64),
            predictor.prompt_spec,
            (1024, 1024),
            predictor.model,
        )
        for x in (1000, 1001)
    ]
    first, second = (segmenter.encode_prompts(p)[0] for p in prompts)
    assert (first - second).abs().max() > 1e-3
    exact = load_predictor(pico_folders["sam2"], device="cpu").model.segmenter
    for prompt, code in zip(prompts, (first, second), strict=True):
        assert (exact.encode_prompts(prompt)[0] - code).abs().max() < 0.02


@pytest.mark.parametrize(("family", "moved"), [("sam", [128, 96, 256, 192]), ("sam2", [128, 128, 256, 256])])
def test_points_and_boxes_move_with_the_image(family, moved):
    """Of a 160x120 image in a 256-pixel input: letterboxed by one factor, squared by two."""
    predictor = lively_predictor(family)
    given = read_prompts((120, 160), [[80, 60]], None, [80, 60, 160, 120], None, 64)
    prompts = to_input(given, predictor.prompt_spec, (120, 160), predictor.model)
    assert prompts.points.tolist() == [[moved[:2]]]
    assert prompts.boxes.tolist() == [moved]


def test_models_of_one_part(tmp_path, pico_folders, picture):
    """A plain SAM-2 model resizes as Meta's predictor; a plain EfficientSAM can answer nothing."""
    from model import load_model

    sam2 = build_predictor(load_model("sam2-hiera-pico", pretrained=False), None)
    assert sam2.image_spec.filter == "torch-antialias"
    with pytest.raises(ModelError, match="takes no prompts"):
        build_predictor(load_model("efficient-sam-pico", pretrained=False), None)
    sam2.set_image(picture)
    with pytest.raises(PromptError, match="no phrase encoder"):
        sam2.predict("cat")


@pytest.mark.parametrize("family", PICO)
def test_every_family_loads_in_bf16(pico_folders, picture, family):
    """Also where a tensor that stays float32 comes first."""
    exact, half = (load_predictor(pico_folders[family], device="cpu", dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.model.dtype == torch.bfloat16
    for predictor in (exact, half):
        predictor.set_image(picture)
    masks = [predictor.predict("the cat").masks for predictor in (exact, half)]
    assert (masks[0] != masks[1]).mean() < 0.05


def test_load_predictor(pico_folders, picture):
    predictor = load_predictor(pico_folders["sam2"], device="cpu")
    predictor.set_image(picture)
    exact = predictor.predict("the cat")
    half = load_predictor(pico_folders["sam2"], device="cpu", dtype=torch.bfloat16)
    half.set_image(picture)
    rough = half.predict("the cat")
    assert rough.logits.dtype == np.float32
    assert np.abs(rough.logits - exact.logits).mean() < 0.1 * exact.logits.std() + 0.02
    evaluation = load_predictor(pico_folders["sam2"], device="cpu", preprocessing="evaluation")
    evaluation.set_image(np.ascontiguousarray(np.tile(picture, (4, 4, 1))))  # larger than the input: filters differ
    inference = evaluation.predict("the cat").logits
    predictor.set_image(np.ascontiguousarray(np.tile(picture, (4, 4, 1))))
    assert np.abs(predictor.predict("the cat").logits - inference).max() > 1e-5


def test_tokenizer_that_is_too_large(pico_folders):
    model = pico_model("sam")
    model.encoder.config = type(model.encoder.config)(width=192, layers=4, heads=3, mlp_width=768, vocab_size=50)
    with pytest.raises(ModelError, match="table"):
        build_predictor(model, PhraseTokenizer(TOKENIZER))
