"""A picture of some scenes of a set: a phrase below each, what it means in colour."""

import json
import textwrap
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.errors import DataError
from utils.visualize import overlay, save_picture

from .layout import GREFCOCO, LAYOUTS, SCENES, SPLITS, Format

COLUMNS, ROWS = 6, 4
TILE = 300
LINES = 2


def write_sheet(
    out: Path,
    path: Path,
    layout: Format = "refer",
    splits: tuple[str, ...] = ("val", "testA", "testB", "train"),
) -> None:
    """Write the contact sheet of a finished set: its phrases in turn of their forms, unselected otherwise.

    Raises:
        DataError: an image of the set is missing.
    """
    files = [out / GREFCOCO / "instances.json"]
    if layout == "coco":
        files = [out / "annotations" / f"instances_{split}.json" for split in SPLITS]
    annotations = [one for file in files for one in json.loads(file.read_text(encoding="utf-8"))["annotations"]]
    segments = {one["id"]: one["segmentation"][0] if layout == "refer" else one["segmentation"] for one in annotations}
    lines = (out / SCENES).read_text(encoding="utf-8").splitlines()
    records = sorted((json.loads(line) for line in lines), key=lambda r: (splits.index(r["split"]), r["image_id"]))
    used: dict[str, int] = {}
    tiles = []
    for record in records[: COLUMNS * ROWS]:
        phrase = min(record["phrases"], key=lambda p: used.get(p["form"], 0))
        used[phrase["form"]] = used.get(phrase["form"], 0) + 1
        tiles.append(_tile(out / LAYOUTS[layout].images, record, phrase, segments))
    blank = np.full_like(tiles[0], 255)
    tiles += [blank] * (-len(tiles) % COLUMNS)
    rows = [np.concatenate(tiles[i : i + COLUMNS], axis=1) for i in range(0, len(tiles), COLUMNS)]
    save_picture(path, np.concatenate(rows))


def _tile(images: Path, record: dict, phrase: dict, segments: dict[int, dict]) -> np.ndarray:
    from pycocotools import mask as coco_mask

    image = cv2.imread(str(images / record["file_name"]), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(f"{images / record['file_name']} is missing. Run with --overwrite")
    found = [segments[record["things"][number]["ann_id"]] for number in phrase["targets"]]
    masks = [coco_mask.decode({**one, "counts": one["counts"].encode()}).astype(bool) for one in found]
    marked = overlay(image, np.array(masks).reshape(-1, *image.shape[:2]), 0.45)
    scale = TILE / max(marked.shape[:2])
    marked = cv2.resize(marked, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    canvas = Image.new("RGB", (TILE + 6, marked.shape[0] + 40), "white")
    canvas.paste(Image.fromarray(marked), (3, 3))
    draw = ImageDraw.Draw(canvas)
    text = textwrap.wrap(f"{phrase['text']} [{phrase['form']}]", 46)[:LINES]
    draw.text((6, marked.shape[0] + 5), "\n".join(text), fill="black", font=ImageFont.load_default(13))
    return np.array(canvas)
