"""A tiny data set of one's own, for tests of training."""

import json

import numpy as np
from PIL import Image


def write_own(folder, count=6, phrases=3):
    """Write a data set of one's own: boxes of several colours."""
    lines = []
    for i in range(count):
        image = np.full((60, 80, 3), 30, np.uint8)
        for k, colour in enumerate([(220, 40, 40), (40, 200, 60), (60, 80, 230)][:phrases]):
            x, y = 4 + 24 * ((i + k) % 3), 8 + 3 * i
            image[y : y + 20, x : x + 20] = colour
            polygon = [[x, y, x + 20, y, x + 20, y + 20, x, y + 20]]
            name = ("red", "green", "blue")[k]
            lines.append({"image": f"{i}.png", "phrase": f"the {name} box", "segmentation": polygon})
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder
