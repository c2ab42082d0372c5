"""Eight photographs with phrases are learned by heart through real, frozen SAM-2 weights (slow; needs them).

    TEXTSAM_SAM2_TINY=sam2_hiera_tiny.pt python -m pytest -m slow tests/test_overfit.py

Takes 20 minutes on two cores. The masks come from boxes by tools.make_masks, as Objects365's do. The photographs are
scikit-image's, and one of ../shared; what is not here is said.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, TOKENIZER

WEIGHTS = os.environ.get("TEXTSAM_SAM2_TINY")
ZEBRA = ROOT.parent / "shared" / "conformance" / "evf-sam" / "images" / "zebra.jpg"
BOXES = {
    "astronaut.png": {"the helmet": (281, 347, 511, 511), "space shuttle": (355, 0, 458, 281)},
    "chelsea.png": {"the eye on the left": (132, 87, 209, 148), "the nose": (232, 223, 294, 267)},
    "coffee.png": {"the cup": (174, 18, 415, 284), "the spoon": (323, 67, 428, 325)},
    "rocket.jpg": {"the rocket": (303, 126, 338, 407)},
    "motorcycle_left.png": {"the motorcycle": (91, 78, 682, 457), "the front wheel": (512, 287, 682, 453)},
    "camera.png": {"the man": (20, 64, 329, 511), "the tripod": (231, 139, 404, 511)},
    "coins.png": {"the coin at the top right": (305, 15, 365, 74), "the coin at the top left": (21, 36, 67, 74)},
    "zebra.jpg": {
        "the zebra on the right": (353, 172, 537, 341),
        "the zebra in front on the left": (62, 228, 219, 379),
        "the zebra at the back": (94, 110, 229, 184),
    },
}
"""Photograph -> phrase -> box x1 y1 x2 y2."""


def photographs():
    """Return file name -> path, or skip with the reason."""
    found = importlib.util.find_spec("skimage")
    if found is None or not ZEBRA.is_file():
        pytest.skip("needs scikit-image's photographs and the zebra of ../shared")
    folder = Path(found.submodule_search_locations[0]) / "data"
    return {name: ZEBRA if name == "zebra.jpg" else folder / name for name in BOXES}


def write_boxes(folder):
    """Write boxes.json and RGB copies of the photographs."""
    images, annotations = [], []
    for i, (name, path) in enumerate(photographs().items()):
        image = Image.open(path).convert("RGB")
        image.save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": image.height, "width": image.width})
        for phrase, (x1, y1, x2, y2) in BOXES[name].items():
            box = {"id": len(annotations), "image_id": i, "phrase": phrase, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append(box)
    (folder / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS, reason="TEXTSAM_SAM2_TINY names no sam2_hiera_tiny.pt")
def test_eight_photographs_are_learned_by_heart(tmp_path):
    write_boxes(tmp_path)
    boxes = ("--annotations", tmp_path / "boxes.json", "--images", tmp_path, "--output", tmp_path / "eight.json")
    run("-m", "tools.make_masks", "--checkpoint", WEIGHTS, *boxes)
    run(
        "train.py", "--model.name", "evf-sam2-hiera-tiny-pico", "--model.segmenter_checkpoint", WEIGHTS,
        "--model.tokenizer", TOKENIZER, "--model.max_length", 62, "--data.root", tmp_path, "--data.sets", "eight.json",
        "--data.sampling", "shuffle", "--data.batch_size", 2, "--data.workers", 0,
        "--data.feature_cache", tmp_path / "features", "--loss.pointing", 1, "--optim.lr", 1e-3,
        "--optim.schedule", "cosine", "--optim.steps", 2000, "--optim.warmup", 40, "--val.sets", "eight.json",
        "--val.every", 400, "--run.out", tmp_path / "run", "--run.save_every", 400,
    )  # fmt: skip
    answer = run(
        "eval.py", "--version", tmp_path / "run" / "best", "--dataset_dir", tmp_path, "--val_dataset", "eight.json",
        "--model_max_length", 62, "--out", tmp_path / "eval",
    )  # fmt: skip
    score = json.loads((tmp_path / "eval" / "metrics.json").read_text())["datasets"]["eight.json"]["ciou"]
    assert score > 0.95, answer
