"""What the trainings of Open-Vocabulary SAM start from, small: CLIP, a vocabulary, and annotated scenes."""

import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model.checkpoints.load import build_model
from model.encoders.clip_text import ClipText
from model.registry import model_config
from model.vocabulary import Vocabulary, save_vocabulary
from tests.dataset_layouts import rle

PICO = "ovsam-pico"
COLOURS = {"car": (220, 40, 40), "kite": (40, 60, 220), "dog": (40, 200, 60)}
"""Names of the things in the scenes, and what shows them; ids of their categories are 3, 7 and 8."""
IDS = {"car": 3, "kite": 7, "dog": 8}


def ovsam(seed=0):
    """Return a model of random weights, whose ResNet says more than a fresh one."""
    torch.manual_seed(seed)
    model = build_model(model_config(PICO))
    for name, parameter in model.segmenter.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model


def write_clip(path):
    """Write CLIP as open_clip has it: both towers and its temperature."""
    segmenter = ovsam().segmenter
    config = segmenter.config
    text = ClipText(config.text_width, config.text_heads, config.text_layers, config.embed_width)
    state = {f"visual.{name}": tensor for name, tensor in segmenter.backbone.state_dict().items()}
    torch.save(state | dict(text.tower.state_dict()) | {"logit_scale": torch.tensor(4.6)}, path)
    return path


def write_vocabulary(path, names=("car", "kite, toy", "dog"), **members):
    vectors = torch.randn(len(names), 2, 48, generator=torch.Generator().manual_seed(0))
    members = {key: torch.tensor(value) for key, value in members.items()}
    save_vocabulary(path, Vocabulary(tuple(names), F.normalize(vectors, dim=-1), **members))
    return path


def write_scenes(root, count=6, crowd=False):
    """Write scenes of one to three coloured boxes as COCO's; return the file. Every third scene has a dog alone."""
    images, annotations = [], []
    for number in range(count):
        height, width = 64 + 6 * number, 90 - 5 * number
        picture = np.full((height, width, 3), 30 * (number % 4), np.uint8)
        for name in ("dog",) if number % 3 == 2 else ("car", "kite", "dog")[: 1 + number % 3]:
            x, y = 5 + 3 * number, 4 + 17 * len([one for one in annotations if one["image_id"] == number])
            mask = np.zeros((height, width), np.uint8)
            mask[y : y + 15, x : x + 30] = 1
            picture[mask > 0] = COLOURS[name]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": IDS[name], "iscrowd": int(crowd),
                    "area": int(mask.sum()), "bbox": [x, y, 30, 15], "segmentation": rle(mask),
                }
            )  # fmt: skip
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        (root / "scenes").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / "scenes" / f"{number}.png")
    categories = [{"id": number, "name": name} for name, number in IDS.items()]
    path = root / "scenes.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
