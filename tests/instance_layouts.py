"""Miniatures of COCO and LVIS instances, and of what a detector found in them."""

import copy
import json

import numpy as np

from tests.dataset_layouts import box, box_mask, rle, write_image

CATEGORIES = [
    {"id": 3, "name": "car", "frequency": "f"},
    {"id": 7, "name": "kite", "frequency": "r"},
]
SIZES = [(64, 64), (48, 64), (64, 40), (64, 64), (56, 60)]
"""Height and width of each image; nothing was annotated on the fourth."""


def contents():
    """Return (images, annotations) of COCO: all three kinds of masks, a crowd, and one too small to be asked."""
    images = [
        {"id": 10 * n + 9, "file_name": f"{n:012}.png", "height": h, "width": w} for n, (h, w) in enumerate(SIZES)
    ]
    annotations = []

    def add(n, category, corner, segmentation=None, **extra):
        annotation = {
            "id": len(annotations),  # begins with 0
            "image_id": images[n]["id"],
            "category_id": category,
            "bbox": [float(value) for value in corner],
            "area": float(corner[2] * corner[3]),
            "iscrowd": 0,
            "segmentation": [box(*corner)] if segmentation is None else segmentation,
        }
        annotations.append(annotation | extra)

    add(0, 3, (4, 6, 20, 14))
    add(0, 3, (30, 30, 24, 28), rle(box_mask((30, 30, 24, 28), height=64, width=64), "list"), iscrowd=1)
    add(0, 7, (40, 5, 12, 9), rle(box_mask((40, 5, 12, 9), height=64, width=64)))
    add(1, 7, (2, 2, 32, 32))  # of 32 * 32 pixels
    add(1, 3, (50, 10, 1, 1), area=0.4)  # too small to be asked
    add(2, 3, (3, 20, 30, 40), [box(3, 20, 30, 20), box(3, 36, 30, 24)])  # two polygons that overlap
    add(4, 7, (10, 10, 40, 41), area=9216.0)  # as if of 96 * 96 pixels
    add(4, 3, (1, 1, 9, 12))
    return images, annotations


def write_coco(root, annotations=None):
    """Write images and instances.json; return the file and the folder of the images."""
    images, drawn = contents()
    for n, image in enumerate(images):
        write_image(root / "val2017" / image["file_name"], n, image["height"], image["width"])
    content = {"info": {"year": 2017}, "images": images, "annotations": annotations or drawn, "categories": CATEGORIES}
    return write(root / "instances.json", content), root / "val2017"


def write_lvis(root, annotations=None):
    """Write the same as LVIS, whose annotations come before its images."""
    images, drawn = contents()
    for n, image in enumerate(images):
        name = f"{('train2017', 'val2017')[n % 2]}/{image.pop('file_name')}"
        write_image(root / name, n, image["height"], image["width"])
        image["coco_url"] = f"http://images.cocodataset.org/{name}"
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [], []
    images[3]["neg_category_ids"] = [3]  # looked for, and not there
    drawn = [{key: value for key, value in one.items() if key != "iscrowd"} for one in annotations or drawn]
    return write(root / "lvis_v1_val.json", {"annotations": drawn, "images": images, "categories": CATEGORIES}), root


def detections():
    """Return the annotated boxes as a detector's, and two false ones, surest of all, where nothing was annotated."""
    images, drawn = contents()
    found = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.1 + n / 20}
        for n, one in enumerate(drawn)
    ]
    for category in (3, 7):
        false = {"image_id": images[3]["id"], "category_id": category, "bbox": [5, 5, 20, 20], "score": 0.9}
        found.append(false)
    return found


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def random_instances(images=40, at_most=160, seed=0):
    """Return (a LVIS file, detections) of boxes: several of a category, too many, and many of equal score."""
    rng = np.random.default_rng(seed)
    categories = [{"id": n + 1, "name": str(n), "frequency": "rcf"[n % 3]} for n in range(7)]
    listed, annotations, found = [], [], []
    for n in range(images):
        extra = {"neg_category_ids": rng.integers(1, 8, 2).tolist()}
        extra["not_exhaustive_category_ids"] = rng.integers(1, 8, 1).tolist()
        listed.append({"id": n + 5, "height": 64, "width": 80, **extra})
        for _ in range(rng.integers(0, 9)):
            corner = [int(rng.integers(*ends)) for ends in ((0, 40), (0, 30), (5, 40), (5, 34))]
            category = int(rng.integers(1, 8))
            about = {"image_id": n + 5, "category_id": category}
            mask = rle(box_mask(corner, height=64, width=80))
            extra = {"area": float(corner[2] * corner[3]), "bbox": corner, "iscrowd": 0, "segmentation": mask}
            annotations.append({"id": len(annotations) + 1, **about, **extra})
            for _ in range(rng.integers(0, at_most)):
                near = [max(least, v + int(rng.integers(-3, 4))) for least, v in zip((0, 0, 1, 1), corner, strict=True)]
                category = about["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 8))
                mask = rle(box_mask(near, height=64, width=80))
                found.append({"image_id": n + 5, "category_id": category, "score": round(float(rng.random()), 2),
                              "segmentation": mask})  # fmt: skip
    return {"images": listed, "annotations": annotations, "categories": categories}, found


def copied(*values):
    """Return copies: the libraries write into what they are given."""
    return [copy.deepcopy(value) for value in values]
