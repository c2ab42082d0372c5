"""Miniatures of every data set's layout, as published, with a few small images. Every writer returns what it wrote."""

import json
import pickle

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 40, 60


def box(x, y, w, h):
    """Return the polygon of a box whose pixels are exactly x..x+w, y..y+h."""
    return [float(v) for v in (x, y, x, y + h, x + w, y + h, x + w, y)]


def box_mask(*boxes, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), np.uint8)
    for x, y, w, h in boxes:
        mask[y : y + h, x : x + w] = 1
    return mask


def rle(mask, counts="text"):
    """Return an encoding with text, bytes or plain list counts."""
    if counts == "list":
        runs, value = [], 0
        flat = mask.T.reshape(-1)
        start = 0
        for i in range(1, flat.size + 1):
            if i == flat.size or flat[i] != flat[start]:
                if flat[start] != value:
                    runs.append(0)
                    value = 1 - value
                runs.append(i - start)
                value, start = 1 - value, i
        return {"size": list(mask.shape), "counts": runs}
    encoded = coco_mask.encode(np.asfortranarray(mask))
    data = encoded["counts"]
    return {"size": list(encoded["size"]), "counts": data.decode() if counts == "text" else data}


def write_image(path, seed=0, height=HEIGHT, width=WIDTH):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_labels(path, labels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels.astype(np.uint8))
    if palette:
        picture.putpalette([(7 * i) % 256 for i in range(768)])
    picture.save(path)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_ref(ref_id, ann_id, image, split, *sentences, sent_id=None, category=1):
    first = ref_id * 10 if sent_id is None else sent_id
    return {
        "sent_ids": [first + i for i in range(len(sentences))],
        "file_name": f"{image['file_name'][:-4]}_{ann_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image["id"],
        "split": split,
        "category_id": category,
        "sentences": [
            {"tokens": text.lower().split(), "raw": f"{text}!", "sent_id": first + i, "sent": text}
            for i, text in enumerate(sentences)
        ],
    }


def coco_images(count, pattern="COCO_train2014_{:012d}.jpg", first=100):
    return [
        {
            "license": 1, "file_name": pattern.format(first + i), "coco_url": "", "height": HEIGHT, "width": WIDTH,
            "date_captured": "", "flickr_url": "", "id": first + i,
        }
        for i in range(count)
    ]  # fmt: skip


def annotation(identity, image, segmentation, category=1):
    return {
        "id": identity, "image_id": image["id"], "category_id": category, "segmentation": segmentation,
        "bbox": [0, 0, 1, 1], "area": 1.0, "iscrowd": 0,
    }  # fmt: skip


REFER = {
    "refcoco": "refer_seg/images/mscoco/images/train2014",
    "refcoco+": "refer_seg/images/mscoco/images/train2014",
    "refcocog": "refer_seg/images/mscoco/images/train2014",
    "refclef": "refer_seg/images/saiapr_tc-12",
}


def refer_content(name="refcoco"):
    """Return (refs, instances): 3 images; two polygons that overlap, a list of encodings with text counts."""
    pattern = "00/images/{}.jpg" if name == "refclef" else "COCO_train2014_{:012d}.jpg"
    images = coco_images(3, pattern)
    annotations = [
        annotation(1, images[0], [box(5, 5, 10, 10), box(10, 10, 10, 10)]),
        annotation(2, images[0], [box(30, 5, 10, 10)]),
        annotation(3, images[1], [rle(box_mask((1, 2, 3, 4))), rle(box_mask((20, 2, 3, 4)))]),
        annotation(4, images[2], [box(50, 30, 10, 10)]),
    ]
    refs = [
        make_ref(0, 1, images[0], "train", "The Left One", "two boxes"),
        make_ref(1, 2, images[0], "train", "right one"),
        make_ref(2, 3, images[1], "val", "encoded "),
        make_ref(3, 4, images[2], "testAB", "corner"),
    ]
    instances = {
        "info": {}, "licenses": [], "images": images, "annotations": annotations,
        "categories": [{"supercategory": "thing", "id": 1, "name": "box"}],
    }  # fmt: skip
    return refs, instances


def write_refer(root, name="refcoco", by="unc", content=None, with_images=True):
    refs, instances = content or refer_content(name)
    folder = root / "refer_seg" / name
    write_json(folder / "instances.json", instances)
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    for i, image in enumerate(instances["images"] if with_images else ()):
        write_image(root / REFER[name] / image["file_name"], i)
    return refs, instances


def grefcoco_content():
    """Return (refs, instances): one target, two, none, and an annotation without a pixel."""
    images = coco_images(2)
    annotations = [
        annotation(1, images[0], [box(5, 5, 10, 10)]),
        annotation(2, images[0], [box(30, 5, 10, 10)]),
        annotation(3, images[0], []),
    ]
    refs = [
        make_ref(0, [1], images[0], "val", "one"),
        make_ref(1, [1, 2], images[0], "val", "both"),
        make_ref(2, [-1], images[0], "val", "the unicorn"),
        make_ref(3, [2, 3], images[0], "val", "with an empty one"),
        make_ref(4, [3], images[0], "train", "nothing to see"),
        make_ref(5, [-1], images[1], "val", "nobody"),
    ]
    for ref in refs:
        ref["no_target"] = ref["ann_id"] == [-1]
    return refs, {"images": images, "annotations": annotations, "categories": []}


def write_grefcoco(root, suffix=".json", content=None):
    refs, instances = content or grefcoco_content()
    folder = root / "refer_seg" / "grefcoco"
    write_json(folder / "instances.json", instances)
    if suffix == ".json":
        write_json(folder / "grefs(unc).json", refs)
    else:
        (folder / "grefs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    for i, image in enumerate(instances["images"]):
        write_image(root / REFER["refcoco"] / image["file_name"], i)


def quarter_labels(*values):
    """Return a label picture with the four values in its quarters."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for i, value in enumerate(values):
        labels[(i // 2) * 20 : (i // 2) * 20 + 20, (i % 2) * 30 : (i % 2) * 30 + 30] = value
    return labels


def write_ade20k(root, split="training"):
    folder = root / "ade20k"
    write_json(folder / "ade20k_classes.json", ["wall", "building", "sky", *(f"class {i}" for i in range(3, 150))])
    written = {"ADE_train_00000001": quarter_labels(0, 1, 3, 150), "ADE_train_00000002": quarter_labels(2, 2, 2, 2)}
    for i, (stem, labels) in enumerate(written.items()):
        write_image(folder / "images" / split / f"{stem}.jpg", i)
        write_labels(folder / "annotations" / split / f"{stem}.png", labels)
    return written


def write_human_parsing(root):
    folder = root / "humanparsing"
    written = {"1000_1": quarter_labels(0, 9, 15, 255)}
    for i, (stem, labels) in enumerate(written.items()):
        write_image(folder / "JPEGImages" / f"{stem}.jpg", i)
        write_labels(folder / "SegmentationClassAug" / f"{stem}.png", labels, palette=True)
    return written


def write_objects365(root, order=("images", "annotations", "categories")):
    folder = root / "Object365/raw/Objects365_v1/2019-08-02"
    images = coco_images(3, "obj365_train_{:012d}.jpg")
    crowd = {**annotation(15, images[2], [rle(box_mask((9, 9, 4, 4)))], category=3), "iscrowd": 1}
    content = {
        "info": {"year": 2019, "nested": [1, {"a": [2]}]},
        "images": images,
        "annotations": [
            annotation(11, images[1], [rle(box_mask((1, 1, 5, 5)))], category=1),
            annotation(12, images[0], [rle(box_mask((2, 2, 5, 5)))], category=2),
            annotation(13, images[0], [rle(box_mask((20, 2, 5, 5)))], category=2),
            annotation(14, images[0], [rle(box_mask((30, 20, 5, 5)))], category=1),
            crowd,
        ],
        "categories": [{"id": 1, "name": "Person"}, {"id": 2, "name": "Sneakers"}, {"id": 3, "name": "Chair"}],
    }
    write_json(folder / "o365_res_instances.json", {key: content[key] for key in ("info", *order)})
    for i, image in enumerate(images):
        write_image(folder / "train" / image["file_name"], i)
    return content


def parts_content(names, pattern):
    images = coco_images(2, pattern)
    annotations = [
        annotation(1, images[0], [box(5, 5, 10, 10)], category=1),
        annotation(2, images[0], [box(10, 10, 10, 10)], category=1),
        annotation(3, images[0], [box(30, 5, 10, 10)], category=2),
        annotation(4, images[1], [box(0, 0, 10, 10)], category=2),
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }


def write_partimagenet(root, extra=()):
    content = parts_content(["Quadruped Head", "Quadruped Body"], "n01440764_{}.JPEG")
    content["annotations"] += [annotation(90 + i, content["images"][0], s) for i, s in enumerate(extra)]
    write_json(root / "PartImageNet/annotations/train/train.json", content)
    for i, image in enumerate(content["images"]):
        write_image(root / "PartImageNet/images/train" / image["file_name"], i)


def write_pascal_part(root):
    content = parts_content(["dog:head", "dog:left_paw"], "2008_{:06d}.jpg")
    write_json(root / "vlpart/pascal_part/train.json", content)
    for i, image in enumerate(content["images"]):
        write_image(root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages" / image["file_name"], i)


def write_lines(folder, *records, name="own.jsonl"):
    """Write your own data as JSON lines; strings are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n")
    return name


def write_everything(root):
    """Write all layouts below one root."""
    for name, by in (("refclef", "unc"), ("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        write_refer(root, name, by)
    write_grefcoco(root)
    write_ade20k(root)
    write_human_parsing(root)
    write_objects365(root)
    write_partimagenet(root)
    write_pascal_part(root)
