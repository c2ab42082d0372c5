"""Miniatures of COCO and LVIS instances, and of what a detector found in them."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SIDE = 64
CATEGORIES = [{"id": 3, "name": "car", "frequency": "f"}, {"id": 7, "name": "kite", "frequency": "r"}]


def rectangle(x, y, width, height):
    return [float(n) for n in (x, y, x + width, y, x + width, y + height, x, y + height)]


def rectangle_mask(height, width, box):
    mask = np.zeros((height, width), np.uint8)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    return mask


def uncompressed(mask):
    """Return the run lengths of a mask, column by column, the background first."""
    flat, counts, value = mask.flatten(order="F"), [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": [int(n) for n in counts]}


def compressed(mask):
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def picture(seed, height, width):
    rng = np.random.default_rng(seed)
    image = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((-(-height // 4), -(-width // 4), 1)))
    return image[:height, :width].astype(np.uint8)


def contents():
    """Return (images, annotations) of COCO: all three kinds of masks, a crowd, one too small, one image without."""
    sizes = [(64, 64), (48, 64), (64, 40), (64, 64), (56, 60)]
    images = [
        {"id": 10 * n + 9, "file_name": f"{n:012}.png", "height": h, "width": w} for n, (h, w) in enumerate(sizes)
    ]
    annotations = []

    def add(n, category, box, segmentation=None, **extra):
        _, _, w, h = box
        annotations.append(
            {
                "id": len(annotations),  # begins with 0
                "image_id": images[n]["id"],
                "category_id": category,
                "bbox": [float(v) for v in box],
                "area": float(w * h),
                "iscrowd": 0,
                "segmentation": [rectangle(*box)] if segmentation is None else segmentation,
            }
            | extra
        )

    add(0, 3, (4, 6, 20, 14))
    add(0, 3, (30, 30, 24, 28), uncompressed(rectangle_mask(64, 64, (30, 30, 24, 28))), iscrowd=1)
    add(0, 7, (40, 5, 12, 9), compressed(rectangle_mask(64, 64, (40, 5, 12, 9))))
    add(1, 7, (2, 2, 32, 32))  # of 32 * 32 pixels
    add(1, 3, (50, 10, 1, 1), area=0.4)  # too small to be asked for
    add(2, 3, (3, 20, 30, 40), [rectangle(3, 20, 30, 20), rectangle(3, 36, 30, 24)])  # two polygons that overlap
    add(4, 7, (10, 10, 40, 41), area=9216.0)  # as if of 96 * 96 pixels
    add(4, 3, (1, 1, 9, 12))
    return images, annotations


def write_coco(root):
    """Write image files and instances.json; return the file and the image folder."""
    images, annotations = contents()
    folder = root / "val2017"
    for image in images:
        write_picture(folder / image["file_name"], image)
    content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations,
               "categories": CATEGORIES}  # fmt: skip
    path = root / "instances.json"
    path.write_text(json.dumps(content))
    return path, folder


def write_picture(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(image["id"], image["height"], image["width"])).save(path)


def write_lvis(root):
    """Write the same as LVIS, whose annotations come before its images."""
    images, annotations = contents()
    for n, image in enumerate(images):
        name = f"{('train2017', 'val2017')[n % 2]}/{image.pop('file_name')}"
        write_picture(root / name, image)
        image["coco_url"] = f"http://images.cocodataset.org/{name}"
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [], []
    images[3]["neg_category_ids"] = [3]  # it was looked for there, and is not there
    images[1]["not_exhaustive_category_ids"] = [7]
    annotations = [{k: v for k, v in one.items() if k != "iscrowd"} for one in annotations]
    content = {"annotations": annotations, "images": images, "categories": CATEGORIES}
    path = root / "lvis_v1_val.json"
    path.write_text(json.dumps(content))
    return path, root


def detections():
    """Return what a detector found: good boxes, a false one, one of a category that is not there, equal scores."""
    images, annotations = contents()
    rng = np.random.default_rng(5)
    found = []
    for one in annotations:
        box = (np.array(one["bbox"]) + rng.normal(0, 0.7, 4)).clip(min=0)
        found.append({"image_id": one["image_id"], "category_id": one["category_id"],
                      "bbox": [round(float(n), 2) for n in box], "score": round(float(rng.random()), 3)})  # fmt: skip
    for n, category, box in (
        (3, 3, [5, 5, 20, 20]),
        (3, 7, [5, 5, 20, 20]),
        (0, 3, [4.5, 6, 19, 15]),
        (2, 7, [1, 1, 9, 9]),
    ):
        found.append({"image_id": images[n]["id"], "category_id": category, "bbox": box, "score": 0.5})
    return found[::-1]


def write_detections(path, found=None):
    path.write_text(json.dumps(detections() if found is None else found))
    return path
