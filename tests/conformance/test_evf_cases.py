"""Every recorded image case of the published EVF-SAM: single prompts and padded batches, stage by stage."""

import numpy as np
import pytest
import torch

from utils.image import read_image

from .support import (
    EVF,
    cases,
    flipped_pixels,
    golden_model,
    groups,
    largest_difference,
    needs_golden_data,
    read_case,
)

pytestmark = needs_golden_data

LOGITS, FEATURES, PIXELS = 1e-3, 1e-3, 8
"""Allowed: logits, features and vectors, mask pixels that flip. Two correct fp32 programs differ by about 1e-5."""


@pytest.fixture(scope="module", params=None)
def model(request):
    """The model of one architecture and seed; built once for all its cases."""
    return golden_model(*request.param)


def pytest_generate_tests(metafunc):
    if "model" in metafunc.fixturenames:
        parameters = groups("cases/*/*.json")
        metafunc.parametrize(
            "model, group",
            [pytest.param(p.values, p.values, id=p.id, marks=p.marks) for p in parameters],
            indirect=["model"],
            scope="module",
        )


def of_group(group, prefix):
    architecture, seed = group
    return cases(f"cases/{architecture}/{prefix.format(seed=seed)}")


@torch.inference_mode()
def test_single_prompts(model, group):
    """encode, fuse, decode and post-process one phrase as the published inference() does."""
    for path in of_group(group, "s{seed}_*.json"):
        case, golden = read_case(path)
        image = read_image(EVF / "images" / case["image"])
        pixels = model.segmenter.image_spec(image)[None]
        small = model.encoder.image_spec(image)[None]
        ids = torch.tensor([case["input_ids"]])
        assert largest_difference(pixels[0, :, ::16, ::16], golden["sam_input_s16"]) < 1e-5
        assert largest_difference(small[0, :, ::4, ::4], golden["beit_input_s4"]) < 1e-5

        cls = model.encoder(small, ids).vector
        assert largest_difference(cls[0], golden["cls"]) < FEATURES
        all_image, all_text = model.encoder.forward_all(small, ids)
        assert largest_difference(all_image[0, 0], golden["cls"]) < FEATURES
        assert largest_difference(all_text[0, -1], golden["beit_last_text_token"]) < FEATURES

        output = model(pixels, small, ids)
        prediction, features = output.prediction, output.features
        assert largest_difference(output.prompt[0], golden["prompt"]) < FEATURES
        assert largest_difference(features.embedding[0, ::8, ::4, ::4], golden["image_embed_s"]) < FEATURES
        assert largest_difference(prediction.logits[0, :, ::4, ::4], golden["low_res_all_s4"]) < LOGITS
        assert largest_difference(prediction.iou[0], golden["iou_all"]) < LOGITS
        assert largest_difference(output.logits[0, ::2, ::2], golden["low_res_selected_s2"]) < LOGITS
        if "high_res_s0" in golden:
            fine, middle = features.high_res
            assert largest_difference(fine[0, ::4, ::16, ::16], golden["high_res_s0"]) < FEATURES
            assert largest_difference(middle[0, ::8, ::8, ::8], golden["high_res_s1"]) < FEATURES
            assert largest_difference(prediction.object_score, golden["object_score_logit"]) < LOGITS

        size = tuple(case["hw"])
        logits = model.segmenter.postprocess(output.logits, [size], torch.zeros(1, dtype=torch.long))[0]
        assert largest_difference(logits[0, ::4, ::4], golden["logits_s4"]) < LOGITS
        assert flipped_pixels(logits[0], golden["mask_bits"]) <= PIXELS


@torch.inference_mode()
def test_batches(model, group):
    """Several padded prompts of several images in one forward, pre-processed as in eval.py."""
    for path in of_group(group, "batch*_s{seed}.json"):
        if not path.exists():
            pytest.skip("no batch was recorded for this architecture")
        case, golden = read_case(path)
        images = [read_image(EVF / "images" / name) for name in case["images"]]
        spec = model.segmenter.image_spec.for_evaluation()
        pixels = torch.stack([spec(image) for image in images])
        small = torch.stack([model.encoder.image_spec(image) for image in images])
        ids = torch.from_numpy(golden["input_ids"])
        padding = ~torch.from_numpy(golden["attention_masks"])
        index = torch.repeat_interleave(torch.arange(len(images)), torch.from_numpy(np.diff(golden["offset"])))
        assert largest_difference(pixels[:, :, ::16, ::16], golden["sam_input_s16"]) < 1e-5

        output = model(pixels, small, ids, padding, index)
        cls = model.encoder(small, ids, padding, index).vector
        assert largest_difference(cls, golden["cls"]) < FEATURES
        assert largest_difference(output.prompt, golden["prompt"]) < FEATURES
        assert largest_difference(output.features.embedding[:, ::8, ::4, ::4], golden["image_embed_s"]) < FEATURES
        assert largest_difference(output.prediction.logits[:, :, ::4, ::4], golden["low_res_all_s4"]) < LOGITS
        assert largest_difference(output.prediction.iou, golden["iou_all"]) < LOGITS
        sizes = [tuple(size) for size in case["hw"]]
        for i, logits in enumerate(model.segmenter.postprocess(output.logits, sizes, index)):
            assert largest_difference(logits[:, ::8, ::8], golden[f"logits_s8_{i}"]) < LOGITS
            assert flipped_pixels(logits, golden[f"mask_bits_{i}"]) <= PIXELS * len(logits)
