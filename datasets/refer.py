"""RefCLEF, RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO in the REFER layout (lichengunc/refer, henghuiding/gRefCOCO).

A sample is an image with all sentences of all its refs in the split, as EVF-SAM evaluates it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import DataError, nearest
from utils.unpickle import load_plain_pickle

from .annotations import by_id, coco_image, find, read_coco, read_json, require
from .index import Entry, Phrase, Scan, Source
from .regions import Part, parse_segmentation

IMAGES = {"refclef": "refer_seg/images/saiapr_tc-12"}
COCO_IMAGES = "refer_seg/images/mscoco/images/train2014"
SPLITS = ("train", "val", "test", "testA", "testB", "testC")
NO_TARGET = -1
_HINT = "Take refs and instances.json of one release"


class UnknownSplitError(DataError):
    """The annotation file has no ref in the split that was asked for."""


def refer_source(name: str, parts: Sequence[str], root: Path) -> Source:
    """Return RefCLEF, RefCOCO, RefCOCO+ or RefCOCOg: `parts` are the set, who split it, and the split.

    Raises:
        DataError: there is no such annotation file or split.
    """
    return _source(name, parts, root, "refs", (".p",))


def grefcoco_source(name: str, parts: Sequence[str], root: Path) -> Source:
    """Return gRefCOCO, whose phrases name several objects or none.

    Raises:
        DataError: there is no such annotation file or split.
    """
    return _source(name, parts, root, "grefs", (".json", ".p"))


def _source(name: str, parts: Sequence[str], root: Path, stem: str, suffixes: Sequence[str]) -> Source:
    data_set, split_by, split = parts
    if split not in SPLITS:
        raise DataError(f"{name}: unknown split {split!r}. Known: {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
    folder = root / "refer_seg" / data_set
    files = [folder / f"{stem}({split_by}){suffix}" for suffix in suffixes]
    refs = next((file for file in files if file.is_file()), None)
    if refs is None:
        found = sorted(file.name for file in folder.glob(f"{stem}(*)*")) or ["nothing"]
        raise DataError(f"{name}: no such file: {files[0]}. In that folder: {', '.join(found)}")
    instances = folder / "instances.json"

    def scan(scan: Scan) -> Iterator[Entry]:
        yield from scan_refer(refs, instances, split, is_generalised=stem == "grefs", scan=scan)

    return Source(name, root, root / IMAGES.get(data_set, COCO_IMAGES), (refs, instances), scan)


def is_in_split(name: str, split: str) -> bool:
    """Say whether a ref of split `name` belongs to the asked split: the published matching (EVF-SAM eval.py)."""
    if split in ("testA", "testB", "testC"):
        return split[-1] in name
    return "test" in name if split == "test" else name == split


def scan_refer(refs_file: Path, instances_file: Path, split: str, is_generalised: bool, scan: Scan) -> Iterator[Entry]:
    """Yield the images of a split.

    Args:
        refs_file: `refs(….).p` or `.json`: a list of refs.
        instances_file: COCO file with the annotations the refs name.
        split: one of `SPLITS`.
        is_generalised: gRefCOCO: `ann_id` is a list, [-1] means no target, a segmentation may be empty.
        scan: takes the regions.

    Raises:
        DataError: ids there twice or unknown, an incomplete record, or no ref in the split (`UnknownSplitError`).
    """
    refs = _read_refs(refs_file)
    chosen = [ref for ref in refs if is_in_split(ref["split"], split)]
    if not chosen:
        splits = sorted({ref["split"] for ref in refs})
        raise UnknownSplitError(f"{refs_file}: no ref in split {split!r}. The file has: {', '.join(splits) or 'none'}")
    content = read_coco(instances_file)
    images = by_id(content["images"], "id", "image", instances_file)
    annotations = by_id(content["annotations"], "id", "annotation", instances_file)

    grouped: dict[Any, list[Mapping]] = {}
    for ref in chosen:
        grouped.setdefault(ref["image_id"], []).append(ref)
    regions = _Regions(annotations, instances_file, is_generalised, scan)
    for image_id, members in grouped.items():
        where = f"{refs_file}, ref_id {members[0]['ref_id']}"
        image = coco_image(find(images, image_id, "image", where), instances_file)
        phrases = [
            Phrase(_text(sentence, ref, refs_file), f"{ref['ref_id']}/{sentence['sent_id']}", numbers, _form(sentence))
            for ref in members
            for numbers in [regions.of(ref, image.height, image.width, refs_file)]
            for sentence in ref["sentences"]
        ]
        yield Entry(image.path, image.height, image.width, phrases)


def _read_refs(path: Path) -> list[dict]:
    """Return the refs of a file, every record whole and every id unique."""
    refs = read_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(refs, list):
        raise DataError(f"{path} holds {type(refs).__name__}; needed is a list of refs. {_HINT}")
    sentences: set[int | str] = set()
    for ref_id, ref in by_id(refs, "ref_id", "ref", path).items():
        where = f"{path}, ref_id {ref_id}"
        require(ref, "image_id", (int, str), where)
        require(ref, "split", str, where)
        require(ref, "ann_id", (int, str, list), where)
        for sentence in require(ref, "sentences", list, where):
            identity = require(sentence, "sent_id", (int, str), where)
            if identity in sentences:
                raise DataError(f"{where}: sent_id {identity!r} is there twice. Ids must be unique in a file")
            sentences.add(identity)
    return refs


def _text(sentence: Mapping, ref: Mapping, path: Path) -> str:
    """Return `sent`, as published; where cleaning left nothing of it, what the person typed."""
    where = f"{path}, ref_id {ref['ref_id']}, sent_id {sentence['sent_id']}"
    text = require(sentence, "sent", str, where)
    if not text.strip():
        text = sentence.get("raw")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the sentence is empty. Write a phrase, or remove the sentence")
    return text


def _form(sentence: Mapping) -> str:
    """Return what the phrase goes by, which tools/make_synthetic.py writes down; the published files do not."""
    form = sentence.get("form", "")
    return form if isinstance(form, str) else ""


class _Regions:
    """The regions that refs name; each annotation is stored once."""

    def __init__(self, annotations: Mapping, path: Path, is_generalised: bool, scan: Scan) -> None:
        self.annotations, self.path, self.is_generalised, self.add = annotations, path, is_generalised, scan.add
        self.known: dict[Any, int] = {}

    def of(self, ref: Mapping, height: int, width: int, refs_file: Path) -> list[int]:
        """Return the numbers of the regions of a ref: none for a phrase without target."""
        where = f"{refs_file}, ref_id {ref['ref_id']}"
        identities = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        if not self.is_generalised and len(identities) != 1:
            raise DataError(f"{where}: ann_id is {identities!r:.60}; needed is one annotation. Several: grefcoco")
        if self.is_generalised and identities == [NO_TARGET]:
            return []
        if not identities or NO_TARGET in identities:
            raise DataError(f"{where}: ann_id is {identities!r:.60}; allowed: annotation ids, or [-1] for no target")
        return [self._one(identity, ref, height, width, where) for identity in dict.fromkeys(identities)]

    def _one(self, identity: Any, ref: Mapping, height: int, width: int, where: str) -> int:
        annotation = find(self.annotations, identity, "annotation", where)
        if annotation.get("image_id") != ref["image_id"]:
            raise DataError(
                f"{where}: annotation {identity!r} is about image {annotation.get('image_id')!r}, "
                f"the ref about {ref['image_id']!r}. {_HINT}"
            )
        if identity not in self.known:
            self.known[identity] = self.add(self._parts(annotation, height, width))
        return self.known[identity]

    def _parts(self, annotation: Mapping, height: int, width: int) -> Iterable[Part]:
        if self.is_generalised and not annotation.get("segmentation"):
            return []  # gRefCOCO has annotations without a pixel
        where = f"{self.path}, annotation {annotation['id']}"
        segmentation = require(annotation, "segmentation", (list, dict), where)
        return parse_segmentation(segmentation, height, width, where)
