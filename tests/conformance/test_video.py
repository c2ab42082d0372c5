"""SAM 2's memory against recorded videos of the published code."""

import json
import sys

import numpy as np
import pytest
import torch

import inference_video
from model.tracker import ObjectMemory, Tracker, fill_holes
from tests.conformance.support import EVF, golden_model, needs_golden_data, published_folder, read_case
from utils.image import read_image
from utils.masks import decode_rle
from utils.tokenizer import PhraseTokenizer

pytestmark = needs_golden_data

SHORT = 3
"""Frames of a recorded video that are compared in every run; the others where slow tests are asked for."""
CASES = [
    pytest.param(path.stem, length, marks=[pytest.mark.slow] if length is None else [])
    for path in sorted((EVF / "video").glob("*.json"))
    for length in ((None,) if path.stem.startswith("s0_") else (SHORT, None))  # s0 is lost after one frame
] or [("absent", None)]


@torch.inference_mode()
@pytest.mark.parametrize(("name", "length"), CASES)
def test_memory_equals_the_recorded_one(name, length):
    """Every frame: all masks, scores, pointers, what is remembered and what is seen with it, the final logits."""
    case, arrays = read_case(EVF / "video" / f"{name}.json")
    model = golden_model(case["arch"], case["seed"]).eval()
    spec, tracker = model.segmenter.image_spec.for_video(), Tracker(model.segmenter)
    frames = [read_image(path) for path in sorted((EVF / "video" / case["frames"]).iterdir())]
    ids = torch.tensor([case["input_ids"]])
    text, _ = model.encode_phrases(model.encoder.image_spec(frames[0])[None], ids)
    memory, holes = ObjectMemory(), case["settings"]["fill_hole_area"]
    for i, image in enumerate(frames[:length]):
        pixels = spec(image)
        assert np.abs(pixels[:, ::16, ::16].numpy() - arrays["video_input_s16"][i]).max() < 1e-5
        features = model.segmenter.encode_frame(pixels[None])
        if i:
            seen = tracker._condition(features, [memory], i, 1, len(frames)).flatten(2)[0].T
            assert np.abs(seen[::64, ::8].numpy() - arrays["memory_attention_out_s"][i - 1]).max() < 1e-3
            found = tracker.track(features, [memory], i, length=len(frames))
        else:
            found = tracker.prompt(features, text[:, None], [memory], 0, length=len(frames))
        assert abs(float(found.scores) - arrays["ious"][i].max()) < 1e-3
        assert abs(float(found.object_scores) - arrays["object_score_logits"][i, 0]) < 1e-3
        assert np.abs(found.pointers[0].numpy() - arrays["obj_ptr"][i]).max() < 1e-3
        best = arrays["ious"][i].argmax()
        assert np.abs(found.logits[0, ::8, ::8].numpy() - arrays["multimask_low_res_s8"][i, best]).max() < 1e-3
        filled = fill_holes(found.logits, holes)
        kept = found if i else found.with_logits(filled)
        [remembered] = tracker.remember(features, kept, is_prompted=not i)
        map_ = remembered.map.float().T.unflatten(1, (64, 64))[::8, ::8, ::8].numpy()
        expected = arrays["maskmem_features_s"][i]
        assert np.abs(map_ - expected).max() < 1e-2 * max(1, np.abs(expected).max())  # rounded to bfloat16
        if i:
            memory.keep(i, remembered, 1)
        else:
            memory.prompted[0] = remembered
        logits = torch.nn.functional.interpolate(
            filled[:, None], case["hw"], mode="bilinear", align_corners=False
        )[0, 0]  # fmt: skip
        assert np.abs(logits[::2, ::2].numpy() - arrays["logits_s2"][i]).max() < 1e-3
        mask = np.unpackbits(arrays["mask_bits"][i])[: logits.numel()].reshape(case["hw"])
        assert ((logits > 0).numpy() != mask).sum() <= 3


@pytest.mark.slow
def test_the_command_line_gives_the_recorded_masks(tmp_path, monkeypatch, capsys):
    """The published command on frames as they lie on disk; the recorded token ids stand for a phrase."""
    case, arrays = read_case(EVF / "video" / "s5_p1_f31.json")
    folder = published_folder(case["arch"], case["seed"], tmp_path / "checkpoint", shards=False)
    monkeypatch.setattr(PhraseTokenizer, "encode", lambda self, phrase: list(case["input_ids"]))
    options = {
        "--version": folder, "--image_path": EVF / "video" / case["frames"], "--prompt": "recorded",
        "--vis_save_path": tmp_path / "out", "--model_type": "sam2", "--precision": "fp32", "--device": "cpu",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["inference_video.py", *(str(word) for pair in options.items() for word in pair)])
    assert inference_video.main() == 0
    frames = json.loads((tmp_path / "out" / "results.json").read_text())["frames"]
    assert len(frames) == len(arrays["mask_bits"])
    for record, bits in zip(frames, arrays["mask_bits"], strict=True):
        mask = decode_rle(record["objects"][0]["segmentation"])
        assert list(mask.shape) == case["hw"]
        assert (mask != np.unpackbits(bits)[: mask.size].reshape(mask.shape)).sum() <= 3
