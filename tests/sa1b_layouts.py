"""A tiny SA-1B: images of coloured boxes and discs with their masks, in every layout."""

import json
import tarfile

import numpy as np
from PIL import Image

from utils.masks import encode_rle


def draw(number, masks=5, size=(80, 112)):
    """Return an image uint8 RGB [H, W, 3] and masks bool [K, H, W]."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([x + 20, y + 40, x // 2 + y // 2], -1).astype(np.uint8)
    found = []
    for _ in range(masks):
        cy, cx = rng.integers(14, size[0] - 14), rng.integers(14, size[1] - 14)
        ry, rx = rng.integers(6, 14, 2)
        near = (abs(y - cy) <= ry) & (abs(x - cx) <= rx)
        mask = near if rng.random() < 0.5 else ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
        image[mask] = rng.integers(0, 256, 3)
        found.append(mask)
    return image, np.stack(found)


def annotation(image, masks, number):
    """Return the content of a .json."""
    rows = []
    for i, (mask, rle) in enumerate(zip(masks, encode_rle(masks), strict=True)):
        y, x = np.nonzero(mask)
        box = [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
        rows.append({"id": 1000 * number + i, "segmentation": rle, "bbox": box, "area": int(mask.sum()),
                     "predicted_iou": 0.9, "point_coords": [[float(x[0]), float(y[0])]]})  # fmt: skip
    size = {"height": image.shape[0], "width": image.shape[1]}
    return {"image": {"image_id": number, "file_name": f"sa_{number}.jpg", **size}, "annotations": rows}


def write_flat(folder, numbers, masks=5):
    """Write what SA-1B unpacks to: each .jpg beside its .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        image, found = draw(number, masks, (80 + 4 * (number % 3), 112))
        Image.fromarray(image).save(folder / f"sa_{number}.jpg", quality=95)
        (folder / f"sa_{number}.json").write_text(json.dumps(annotation(image, found, number)))
    return folder


def write_repository(folder, flat, numbers):
    """Write the layout of EfficientViT-SAM's repository from a flat folder."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in numbers:
        (folder / "images" / f"sa_{number}.jpg").write_bytes((flat / f"sa_{number}.jpg").read_bytes())
        (folder / "masks" / f"sa_{number}.json").write_bytes((flat / f"sa_{number}.json").read_bytes())
    (folder / "sa_images_ids.txt").write_text("\n".join(map(str, numbers)))
    return folder


def write_shard(path, flat, numbers):
    """Write a .tar of both files side by side, in the given order."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in numbers:
            for suffix in (".jpg", ".json"):
                archive.add(flat / f"sa_{number}{suffix}", f"./sa_{number}{suffix}")
    return path
