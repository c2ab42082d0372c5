"""Make masks from the boxes of a COCO file with any segmenter, as EVF-SAM's authors did for Objects365.

python -m tools.make_masks --checkpoint sam2_hiera_large.pt --annotations instances.json --images train \
    --output o365_res_instances.json --single_instance
"""

import json
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff

from configs.cli import parse
from datasets.annotations import read_coco, require
from utils.errors import DataError, run_main
from utils.files import write_json


@dataclass(frozen=True)
class Args:
    """Make masks from the boxes of a COCO file with any segmenter that takes boxes."""

    checkpoint: str
    """SAM .pth or SAM-2 .pt file, or a model folder, hub id or released name with such a segmenter."""
    annotations: Path
    """COCO file; each annotation has a `bbox` x y width height in pixels."""
    images: Path
    """Folder of the images' file names."""
    output: Path
    """COCO file to write: each `segmentation` is a list with one run-length encoding."""
    single_instance: FlagCreatePairsOff[bool] = False
    """Keep only objects that are alone of their category in the image: a name is then a phrase for one object."""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps; by default CUDA, then MPS, then the CPU."""


def main() -> int:
    """Segment image after image; a stopped run goes on with the same command."""
    args = parse(Args, "tools/make_masks.py")
    content = read_coco(args.annotations)
    by_image = group(content, args)
    partial = args.output.with_name(f".{args.output.name}.partial.jsonl")
    state = args.annotations.stat()
    settings = [args.checkpoint, args.single_instance, state.st_size, state.st_mtime_ns]
    done = read_partial(partial)
    if done.get(None, settings) != settings:
        raise DataError(f"{partial} was begun with another checkpoint, file or option. Remove it to begin anew")
    from model import load_predictor

    predictor = load_predictor(args.checkpoint, device=args.device)
    todo = [record for record in content["images"] if record["id"] in by_image and record["id"] not in done]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="ascii") as file:
        file.write("\n" + json.dumps([None, settings]) + "\n")
        for record in tqdm(todo, unit="image", disable=None):
            masks = segment(predictor, args.images / record["file_name"], by_image[record["id"]])
            file.write("\n" + json.dumps([record["id"], masks]) + "\n")
            file.flush()
    done = read_partial(partial)
    annotations = []
    for image, members in by_image.items():
        for annotation, (rle, area) in zip(members, done[image], strict=True):
            annotations.append({**annotation, "segmentation": [rle], "area": area})
    images = [record for record in content["images"] if record["id"] in by_image]
    write_json(args.output, {**content, "images": images, "annotations": annotations})
    partial.unlink()
    logging.getLogger(__name__).info("%d masks of %d images in %s", len(annotations), len(images), args.output)
    return 0


def group(content: dict[str, list], args: Args) -> dict[Any, list[dict[str, Any]]]:
    """Return image id -> its annotations that get a mask.

    Raises:
        DataError: a box is missing or empty, an image is unknown, or nothing is left.
    """
    members: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    known = {record["id"] for record in content["images"]}
    for annotation in content["annotations"]:
        where = f"{args.annotations}, annotation {annotation.get('id')}"
        image, box = require(annotation, "image_id", (int, str), where), require(annotation, "bbox", list, where)
        if image not in known:
            raise DataError(f"{where}: image {image!r} is not in 'images'. Add it, or remove the annotation")
        if len(box) != 4 or not all(isinstance(number, int | float) for number in box) or min(box[2:]) <= 0:
            raise DataError(f"{where}: bbox is {box}; needed are x, y, width and height in pixels, both above 0")
        members[image].append(annotation)
    if args.single_instance:
        for image, own in members.items():
            for annotation in own:
                require(annotation, "category_id", int, f"{args.annotations}, annotation {annotation.get('id')}")
            counts = Counter(annotation["category_id"] for annotation in own)
            members[image] = [annotation for annotation in own if counts[annotation["category_id"]] == 1]
    members = {image: own for image, own in members.items() if own}
    if not members:
        raise DataError(f"{args.annotations} holds no box to make a mask from")
    return members


def segment(predictor: Any, path: Path, annotations: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Return run-length encoding and area of the mask of each annotation's box."""
    from utils.masks import encode_rle

    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float32)
    boxes[:, 2:] += boxes[:, :2]
    predictor.set_image(path)
    masks = predictor.predict(boxes=boxes).masks
    return list(zip(encode_rle(masks), masks.sum((1, 2)).tolist(), strict=True))


def read_partial(path: Path) -> dict[Any, list]:
    """Return image id -> masks that a stopped run has made, and None -> its settings; half a line is dropped."""
    done = {}
    lines = path.read_text("ascii").splitlines() if path.is_file() else []
    for line in lines:
        try:
            image, masks = json.loads(line)
        except ValueError:
            continue
        done[image] = masks
    return done


if __name__ == "__main__":
    run_main(main)
