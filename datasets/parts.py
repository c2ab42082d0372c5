"""PartImageNet and Pascal-Part: "[semantic] quadruped head" and all parts of that name in the image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.errors import DataError
from utils.tokenizer import SEMANTIC_PREFIX, semantic_phrase

from .annotations import by_id, coco_images, find, read_coco, require
from .index import Entry, Phrase, Scan, Source
from .regions import parse_segmentation


def partimagenet_source(name: str, parts: Sequence[str], root: Path) -> Source:
    """Return a split of PartImageNet."""
    folder, split = root / "PartImageNet", parts[1]
    return _source(name, root, folder / "images" / split, folder / "annotations" / split / f"{split}.json")


def pascal_part_source(name: str, parts: Sequence[str], root: Path) -> Source:
    """Return a split of Pascal-Part as VLPart wrote it."""
    folder = root / "vlpart" / "pascal_part"
    return _source(name, root, folder / "VOCdevkit" / "VOC2010" / "JPEGImages", folder / f"{parts[1]}.json")


def part_phrase(name: str) -> str:
    """Return the phrase of a category: "dog:head" becomes "[semantic] dog head"."""
    return semantic_phrase(" ".join(name.replace(":", " ").lower().split()))


def _source(name: str, root: Path, images: Path, path: Path) -> Source:
    def scan(scan: Scan) -> Iterator[Entry]:
        yield from scan_parts(path, scan)

    return Source(name, root, images, (path,), scan)


def scan_parts(path: Path, scan: Scan) -> Iterator[Entry]:
    """Yield the images of a COCO file, the annotations of one category name united.

    Annotations that cannot be decoded are left out and counted in a note: the published PartImageNet has some.

    Raises:
        DataError: not a COCO file, an id there twice or unknown.
    """
    content = read_coco(path, ("images", "annotations", "categories"))
    images = coco_images(content, path)
    categories = by_id(content["categories"], "id", "category", path)
    phrases = {i: part_phrase(require(c, "name", str, f"{path}, category {i}")) for i, c in categories.items()}
    found: dict[int | str, dict[str, list[int]]] = {identity: {} for identity in images}
    skipped: list[str] = []
    for identity, annotation in by_id(content["annotations"], "id", "annotation", path).items():
        where = f"{path}, annotation {identity}"
        image_id = require(annotation, "image_id", (int, str), where)
        image = find(images, image_id, "image", where)
        phrase = find(phrases, require(annotation, "category_id", (int, str), where), "category", where)
        try:
            parts = parse_segmentation(annotation.get("segmentation"), image.height, image.width, where)
        except DataError as error:
            skipped.append(str(error))
            continue
        found[image_id].setdefault(phrase, []).append(scan.add(parts))
    if skipped:
        scan.notes.append(
            f"{len(skipped)} of {len(content['annotations'])} annotations cannot be decoded and are left out; "
            f"the first: {skipped[0]}"
        )
    for identity, image in images.items():
        texts = [
            Phrase(text, f"{identity}/{text.removeprefix(SEMANTIC_PREFIX)}", regions)
            for text, regions in found[identity].items()
        ]
        yield Entry(image.path, image.height, image.width, texts)
