"""Pre-processed pixels against the published code: bytes by hash, floats by statistics and samples."""

import hashlib
import json

import numpy as np
import pytest

from configs.schema import BEiT3Config, SAM2Config, SAMConfig
from model.encoders.beit3 import BEiT3
from model.registry import model_config
from model.segmenters.sam import SAMSegmenter
from model.segmenters.sam2 import SAM2Segmenter
from utils.image import read_image

from .support import EVF, needs_golden_data

pytestmark = needs_golden_data
IMAGES = ["shapes_480x640.png", "zebra.jpg", "shapes_640x427.png", "large_1100x1500.png"]


@pytest.fixture(scope="module")
def specs():
    """The specs as the models declare them."""
    import torch

    with torch.device("meta"):
        sam: SAMConfig = model_config("sam-vit-b").segmenter
        sam2: SAM2Config = model_config("sam2-hiera-tiny").segmenter
        encoder: BEiT3Config = model_config("evf-sam-vit-b-base").encoder
        return {
            "letterbox": SAMSegmenter(sam).image_spec,
            "square": SAM2Segmenter(sam2).image_spec,
            "beit3": BEiT3(encoder).image_spec,
        }


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("name", IMAGES)
def test_decoded_bytes(name):
    expected = json.loads((EVF / "images/images.json").read_text()).get(name)
    if expected is None:
        pytest.skip("no hash was recorded for this image")
    assert sha256(read_image(EVF / "images" / name)) == expected["rgb_sha256"]


@pytest.mark.parametrize("name", IMAGES)
def test_pixels(name, specs):
    expected = json.loads((EVF / "images/preprocess.json").read_text())[name]
    image = read_image(EVF / "images" / name)
    letterbox, square = specs["letterbox"], specs["square"]

    assert list(letterbox.resized_size(*image.shape[:2])) == expected["ori_resize_shape"]
    resized = letterbox.resize_image(image)
    assert sha256(resized.permute(1, 2, 0)) == expected["ori_resized_uint8_sha256"]
    assert sha256(square.resize_image(image)) == expected["sam2_effi_resized_uint8_chw_sha256"]
    evaluated = square.for_evaluation().resize_image(image)
    assert sha256(evaluated.permute(1, 2, 0)) == expected["eval_sam2_effi_resized_uint8_hwc_sha256"]

    frame = square.for_video().resize_image(image)
    assert sha256(frame.permute(1, 2, 0)) == expected["video_loader_resized_uint8_hwc_sha256"]

    height, width = letterbox.resized_size(*image.shape[:2])
    padded = letterbox(image)
    assert padded.shape == (3, 1024, 1024)
    assert not padded[:, height:].any()
    assert not padded[:, :, width:].any()
    for key, spec in (("ori", letterbox), ("sam2_effi", square), ("beit3", specs["beit3"])):
        pixels = spec(image).double()
        found = [pixels.mean(), pixels.std(), pixels.abs().max()]
        assert np.allclose(found, expected[f"{key}_stats"], atol=1e-5), key


def test_sampled_values(specs):
    """Every recorded array: normalised pixels, and the resized bytes of the evaluation and video loaders."""
    square = specs["square"]
    makers = {
        "ori_s16": specs["letterbox"],
        "sam2_effi_s16": square,
        "beit3_s4": specs["beit3"],
        "eval_sam2_effi_uint8_s16": square.for_evaluation().resize_image,
        "video_uint8_s16": square.for_video().resize_image,
    }
    with np.load(EVF / "images/preprocess.npz") as arrays:
        recorded = dict(arrays)
    assert len(recorded) == len(IMAGES) * len(makers)
    for key, array in recorded.items():
        stem, kind = key.split(".")
        image = read_image(next((EVF / "images").glob(f"{stem}.*g")))
        pixels = makers[kind](image).numpy()
        step = int(kind.rsplit("_s", 1)[1])
        assert np.abs(pixels[:, ::step, ::step].astype(np.float64) - array).max() < 1e-5, key
