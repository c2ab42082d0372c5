"""The files of a synthetic set: the REFER layout of RefCOCO and gRefCOCO, or COCO's, and a record of every scene."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from utils.files import atomic_path, write_json

from .choose import SINGLE_WEIGHTS
from .objects import Kind

SPLITS = ("train", "val", "testA", "testB")
IMAGES = Path("refer_seg/images/mscoco/images/train2014")
REFCOCO = Path("refer_seg/refcoco")
GREFCOCO = Path("refer_seg/grefcoco")
SCENES = Path("synthetic_scenes.jsonl")
SUMMARY = Path("synthetic.json")
ANNOTATIONS = (
    SCENES,
    REFCOCO / "instances.json",
    GREFCOCO / "instances.json",
    REFCOCO / "refs(unc).p",
    GREFCOCO / "grefs(unc).json",
)
"""In the order of writing: references last, since a reader opens them first."""
NAMES, BASE, NOVEL = Path("names.txt"), Path("base.txt"), Path("novel.txt")
NOVEL_SHARE = 17 / 65
"""Share of the names that are novel: of COCO's 65 split names 17 are."""

Format = Literal["refer", "coco"]


@dataclass(frozen=True)
class Layout:
    """Where a format has its images (coco: of each split in a folder), and its files of annotations as written."""

    images: Path
    annotations: tuple[Path, ...]


LAYOUTS: dict[Format, Layout] = {
    "refer": Layout(IMAGES, ANNOTATIONS),
    "coco": Layout(
        Path("images"),
        (SCENES, NAMES, BASE, NOVEL, *(Path("annotations", f"instances_{split}.json") for split in SPLITS)),
    ),
}


def write_annotations(
    out: Path, records: Iterator[dict], kinds: Sequence[Kind], size: tuple[int, int], head: dict[str, Any]
) -> dict:
    """Write every annotation file, then the summary, each atomically; return the summary.

    Args:
        records: of every scene in order, as `Studio.draw` gives them.
        size: height and width of the images.
        head: what the summary begins with.
    """
    build = _Build({kind.name: number for number, kind in enumerate(kinds, 1)}, size)
    with _open(out / SCENES) as stream:
        for record in records:
            stream.write(json.dumps(build.add(record)) + "\n")
    instances = {
        "info": {"description": "Synthetic scenes with phrases"},
        "images": build.images,
        "annotations": build.annotations,
        "categories": [{"id": i, "name": kind.name, "supercategory": kind.group} for i, kind in enumerate(kinds, 1)],
    }
    if head["recipe"]["format"] == "coco":
        _write_coco(out, instances, set(head["kinds"]))
        summary = head | {"splits": build.counts()}
        write_json(out / SUMMARY, summary)
        return summary
    for folder in (REFCOCO, GREFCOCO):
        with _open(out / folder / "instances.json") as stream:
            json.dump(instances, stream)
    with atomic_path(out / REFCOCO / "refs(unc).p") as temporary:
        temporary.write_bytes(pickle.dumps(build.refs, protocol=2))
    with _open(out / GREFCOCO / "grefs(unc).json") as stream:
        json.dump(build.grefs, stream)
    summary = head | {"splits": build.counts()}
    write_json(out / SUMMARY, summary)
    return summary


def _write_coco(out: Path, instances: dict[str, Any], kinds: set[str]) -> None:
    """Write COCO's annotations of each split, categories those kinds alone, and the lists of their names."""
    categories = [category for category in instances["categories"] if category["name"] in kinds]
    names = [category["name"] for category in categories]
    novel = novel_names(names)
    for path, chosen in (
        (NAMES, names), (BASE, [n for n in names if n not in novel]), (NOVEL, [n for n in names if n in novel]),
    ):  # fmt: skip
        with _open(out / path) as stream:
            stream.write("\n".join(chosen) + "\n")
    for number, split in enumerate(SPLITS):
        images = [image for image in instances["images"] if image["id"] // 10_000_000 == number]
        ids = {image["id"] for image in images}
        annotations = [
            one | {"segmentation": one["segmentation"][0]} for one in instances["annotations"] if one["image_id"] in ids
        ]
        content = {**instances, "images": images, "annotations": annotations, "categories": categories}
        with _open(out / "annotations" / f"instances_{split}.json") as stream:
            json.dump(content, stream)


def novel_names(names: Sequence[str]) -> set[str]:
    """Return which names are novel, the same for every seed: 17 of 65, as of COCO's."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"novel {name}".encode()).digest())
    return set(order[: max(1, round(len(names) * NOVEL_SHARE))])


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream


class _Build:
    """Collects images, annotations and references, and numbers them."""

    def __init__(self, categories: dict[str, int], size: tuple[int, int]) -> None:
        self.categories = categories
        self.height, self.width = size
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.refs: list[dict] = []
        self.grefs: list[dict] = []
        self.sentences = 0
        self.scenes: Counter[str] = Counter()
        self.things: Counter[str] = Counter()
        self.forms: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}

    def add(self, record: dict) -> dict:
        """Add a scene; return its record with the ids of its things and phrases."""
        split = record["split"]
        self.images.append(
            {
                "id": record["image_id"],
                "file_name": record["file_name"],
                "height": self.height,
                "width": self.width,
                "license": 0,
            }
        )
        self.scenes[split] += 1
        self.things[split] += len(record["things"])
        for thing in record["things"]:
            self._annotate(record["image_id"], thing)
        by_target: dict[tuple[int, ...], list[dict]] = {}
        others: list[dict] = []
        for phrase in record["phrases"]:
            self.forms[split][phrase["form"]] += 1
            if phrase["form"] in SINGLE_WEIGHTS:
                by_target.setdefault(tuple(phrase["targets"]), []).append(phrase)
            else:
                others.append(phrase)
        for phrases in (*by_target.values(), *([phrase] for phrase in others)):
            self._refer(record, phrases)
        return record

    def _annotate(self, image_id: int, thing: dict) -> None:
        x1, y1, x2, y2 = thing["box"]
        thing["ann_id"] = len(self.annotations) + 1
        self.annotations.append(
            {
                "id": thing["ann_id"],
                "image_id": image_id,
                "category_id": self.categories[thing["kind"]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": thing["area"],
                "iscrowd": 0,
                "segmentation": [{"size": [self.height, self.width], "counts": thing.pop("counts")}],
            }
        )

    def _refer(self, record: dict, phrases: Sequence[dict]) -> None:
        things = [record["things"][number] for number in phrases[0]["targets"]]
        sentences = []
        for phrase in phrases:
            self.sentences += 1
            phrase["sent_id"] = self.sentences
            text = phrase["text"]
            sentences.append(
                {
                    "sent": text,
                    "raw": text,
                    "tokens": text.split(),
                    "sent_id": self.sentences,
                    "form": phrase["form"],
                }
            )
        ref = {
            "ref_id": len(self.grefs) + 1,
            "image_id": record["image_id"],
            "file_name": record["file_name"],
            "split": record["split"],
            "sentences": sentences,
            "sent_ids": [sentence["sent_id"] for sentence in sentences],
        }
        ann_ids = [thing["ann_id"] for thing in things] or [-1]
        categories = [self.categories[thing["kind"]] for thing in things] or [-1]
        self.grefs.append(ref | {"ann_id": ann_ids, "category_id": categories})
        if phrases[0]["form"] in SINGLE_WEIGHTS:
            self.refs.append(ref | {"ann_id": ann_ids[0], "category_id": categories[0]})

    def counts(self) -> dict[str, dict]:
        """Return per split: scenes, things, references, phrases, and phrases of every form."""
        counted = {}
        for split in SPLITS:
            refs = sum(ref["split"] == split for ref in self.refs)
            grefs = sum(ref["split"] == split for ref in self.grefs)
            forms = dict(sorted(self.forms[split].items()))
            counted[split] = {
                "scenes": self.scenes[split],
                "things": self.things[split],
                "refcoco_refs": refs,
                "grefcoco_refs": grefs,
                "phrases": sum(forms.values()),
                "forms": forms,
            }
        return counted
