"""Drawing many scenes over several processes, so that a stopped run can go on and never looks finished."""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from utils.errors import DataError
from utils.files import atomic_path, write_json

from .backgrounds import BACKGROUNDS, USUAL, open_photos
from .choose import Phrase, choose_phrases
from .layout import LAYOUTS, SPLITS, SUMMARY, Format, write_annotations
from .phrases import Speaker, vocabulary
from .referring import View
from .scene import Scene, draw_scene
from .sprites import SpriteSet

VERSION = 2
"""Raised whenever the same recipe would give other bytes."""
PARTS = ".synthetic_parts"
CHUNK = 50
ATTEMPTS = 200

Job = TypeVar("Job")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a data set holds; the number of processes does not.

    * `scenes`: how many of each split, in the order of `SPLITS`.
    * `kinds`: how many kinds of object, spread over the groups; None for all.
    * `paraphrases`: "usual", or "held_out" for wordings that training never sees.
    * `format`: "refer" with phrases, or "coco" with the names of things alone.
    """

    seed: int = 0
    scenes: tuple[int, int, int, int] = (5000, 500, 500, 500)
    width: int = 320
    height: int = 320
    kinds: int | None = None
    backgrounds: tuple[str, ...] = USUAL
    photos: Path | None = None
    paraphrases: str = "usual"
    quality: int = 92
    format: Format = "refer"

    def check(self) -> None:
        """Check every value.

        Raises:
            DataError: a value is not allowed; the message names it.
        """
        known = (*BACKGROUNDS, "photo")
        wrong = [name for name in self.backgrounds if name not in known]
        checks = (
            (not wrong and self.backgrounds, f"backgrounds {list(self.backgrounds)}: known are {', '.join(known)}"),
            (min(self.width, self.height) >= 96, f"size {self.width}x{self.height}: needed are 96 pixels or more"),
            (max(self.width, self.height) <= 2048, f"size {self.width}x{self.height}: allowed are 2048 pixels or less"),
            (min(self.scenes) >= 0 and sum(self.scenes) > 0, f"scenes {self.scenes}: needed is one or more"),
            (max(self.scenes) < 10_000_000, f"scenes {self.scenes}: allowed are fewer than 10 million of a split"),
            (self.kinds is None or self.kinds >= 12, f"kinds {self.kinds}: needed are 12 or more"),
            (1 <= self.quality <= 100, f"quality {self.quality}: allowed is 1..100"),
            (self.seed >= 0, f"seed {self.seed}: allowed are 0 and more"),
            (self.paraphrases in ("usual", "held_out"), f"paraphrases {self.paraphrases!r}: usual or held_out"),
        )
        for fine, message in checks:
            if not fine:
                raise DataError(f"Cannot make a data set with {message}")

    def fingerprint(self, sprites: SpriteSet) -> str:
        """Return a hash of everything that decides the bytes of the data set."""
        plain = asdict(self) | {"photos": None, "version": VERSION, "sprites": sprites.digest}
        if self.format == "refer":  # as before there were others
            del plain["format"]
        photos = [hashlib.sha256(photo.tobytes()).hexdigest() for photo, _ in open_photos(self.photos)]
        return hashlib.sha256(json.dumps([plain, photos], sort_keys=True).encode()).hexdigest()


def chosen_kinds(sprites: SpriteSet, count: int | None) -> tuple[int, ...]:
    """Return positions of the kinds that may appear: all, or `count` of them, the same for every seed."""
    order = sorted(range(len(sprites.kinds)), key=lambda i: hashlib.sha256(sprites.kinds[i].name.encode()).digest())
    return tuple(sorted(order[: count or len(order)]))


class Studio:
    """Draws single scenes of a recipe; each process has one."""

    def __init__(self, recipe: Recipe, sprites: SpriteSet, out: Path) -> None:
        self.recipe = recipe
        self.sprites = sprites
        self.photos = open_photos(recipe.photos)
        self.indices = chosen_kinds(sprites, recipe.kinds)
        self.kinds = tuple(sprites.kinds[i] for i in self.indices)
        self.speaker = Speaker(sprites.kinds, recipe.paraphrases == "held_out")
        self.images = out / LAYOUTS[recipe.format].images
        self.folders = [f"{split}/" if recipe.format == "coco" else "" for split in SPLITS]

    def draw(self, split: int, index: int) -> tuple[np.ndarray, dict]:
        """Return the image and the record of one scene; what was drawn before has no influence.

        Raises:
            DataError: no scene with a phrase was found.
        """
        scene, phrases, _ = self.compose(split, index, SPLITS[split] == "testB")
        masks = np.stack([scene.owner == number for number in range(len(scene.things))], axis=-1)
        record = {
            "image_id": split * 10_000_000 + index + 1,
            "file_name": self.folders[split] + f"synthetic_{SPLITS[split]}_{index:07d}.jpg",
            "split": SPLITS[split],
            "background": scene.background,
            "things": [
                {
                    "kind": thing.kind.name,
                    "box": thing.box,
                    "area": thing.area,
                    "full_area": thing.full_area,
                    "angle": round(thing.angle, 2),
                    "side": round(thing.side, 2),
                    "flipped": thing.flipped,
                    "counts": counts,
                }
                for thing, counts in zip(scene.things, _encode(masks), strict=True)
            ],
            "phrases": [
                {
                    "text": phrase.text,
                    "form": phrase.form,
                    "meaning": phrase.meaning.to_plain(),
                    "targets": phrase.targets,
                }
                for phrase in phrases
            ],
        }
        return scene.image, record

    def compose(
        self, stream: int, index: int, held_out: bool = False
    ) -> tuple[Scene, list[Phrase], np.random.Generator]:
        """Return a scene with phrases, and the generator for what is random after that.

        Args:
            stream: scenes of another stream are others.
            held_out: as `choose_phrases`.

        Raises:
            DataError: no scene with a phrase was found.
        """
        recipe = self.recipe
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([recipe.seed, stream, index, attempt])
            scene = draw_scene(
                rng, self.sprites, self.indices, recipe.height, recipe.width, recipe.backgrounds, self.photos
            )
            if scene is None:
                continue
            view = View.of(scene.things, recipe.height, recipe.width)
            phrases = choose_phrases(rng, view, self.kinds, self.speaker, held_out)
            if any(len(phrase.targets) == 1 for phrase in phrases):
                return scene, phrases, rng
        raise DataError(f"No scene with a phrase in {ATTEMPTS} attempts: allow more kinds or a larger size")

    def draw_part(self, part: "Part") -> Path:
        """Draw the scenes of a part: images into place first, then its records."""
        lines = []
        for index in range(part.start, part.stop):
            image, record = self.draw(part.split, index)
            done, content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, self.recipe.quality])
            if not done:
                raise DataError(f"{record['file_name']} cannot be encoded as JPEG")
            with atomic_path(self.images / record["file_name"]) as temporary:
                temporary.write_bytes(content.tobytes())
            lines.append(json.dumps(record))
        with atomic_path(part.path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return part.path


def _encode(masks: np.ndarray) -> list[str]:
    """Return the counts of COCO run-length encodings of bool [H, W, N]; utils.masks does the same but needs torch."""
    from pycocotools import mask as coco_mask

    return [rle["counts"].decode("ascii") for rle in coco_mask.encode(np.asfortranarray(masks.view(np.uint8)))]


@dataclass(frozen=True)
class Part:
    """Scenes start..stop of a split, and the file of their records."""

    split: int
    start: int
    stop: int
    path: Path


def list_parts(recipe: Recipe, out: Path) -> list[Part]:
    """Return the work of a recipe in parts, in the order of their records."""
    return [
        Part(split, start, min(start + CHUNK, count), out / PARTS / f"{SPLITS[split]}_{start:07d}.jsonl")
        for split, count in enumerate(recipe.scenes)
        for start in range(0, count, CHUNK)
    ]


_studio: Studio | None = None


def _start_process(recipe: Recipe, sprites_folder: Path, out: Path) -> None:
    global _studio
    cv2.setNumThreads(1)
    _studio = Studio(recipe, SpriteSet.load(sprites_folder), out)


def _draw_in_process(part: Part) -> Path:
    if _studio is None:
        raise DataError("A process was not prepared")
    return _studio.draw_part(part)


def generate(
    out: Path,
    recipe: Recipe,
    sprites: SpriteSet,
    sprites_folder: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> dict:
    """Write a data set and return its summary; a stopped run goes on where it was.

    Args:
        sprites_folder: where the sprites are saved, for more than one process.

    Raises:
        DataError: a value of the recipe is wrong, or `out` holds something else.
    """
    recipe.check()
    fingerprint = recipe.fingerprint(sprites)
    if (finished := _prepare(out, recipe.format, fingerprint, overwrite)) is not None:
        return finished
    write_json(out / PARTS / "recipe.json", {"fingerprint": fingerprint})
    parts = list_parts(recipe, out)
    todo = [part for part in parts if not part.path.is_file()]
    with tqdm(total=sum(recipe.scenes), unit="scene", desc="drawing", dynamic_ncols=True) as bar:
        bar.update(sum(part.stop - part.start for part in parts if part.path.is_file()))
        for part in _draw_all(todo, recipe, sprites, sprites_folder, out, workers):
            bar.update(part.stop - part.start)
    plain = asdict(recipe) | {"photos": str(recipe.photos) if recipe.photos else None}
    described = json.loads(json.dumps(plain))
    head = {
        "fingerprint": fingerprint,
        "recipe": described,
        "kinds": [sprites.kinds[i].name for i in chosen_kinds(sprites, recipe.kinds)],
        "vocabulary": len(vocabulary(tuple(sprites.kinds[i] for i in chosen_kinds(sprites, recipe.kinds)))),
    }
    summary = write_annotations(out, _records(parts), sprites.kinds, (recipe.height, recipe.width), head)
    shutil.rmtree(out / PARTS)
    return summary


def _prepare(out: Path, layout: Format, fingerprint: str, overwrite: bool) -> dict | None:
    """Return the summary of a finished set of this recipe; else make sure that nothing else is overwritten."""
    named = LAYOUTS[layout].annotations
    theirs = [path for name in named if (path := out / name).exists()]
    if (out / SUMMARY).is_file():
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        if summary.get("fingerprint") == fingerprint and len(theirs) == len(named) and not overwrite:
            return summary
        found = summary.get("fingerprint")
    elif (out / PARTS / "recipe.json").is_file():
        found = json.loads((out / PARTS / "recipe.json").read_text(encoding="utf-8")).get("fingerprint")
    elif theirs:
        raise DataError(f"{theirs[0]} is not from this tool and would be lost. Give another --out")
    else:
        return None
    if found == fingerprint and not (out / SUMMARY).is_file():
        return None
    if not overwrite:
        raise DataError(f"{out} holds synthetic scenes of other options. Give another --out, or --overwrite")
    for path in [out / SUMMARY, *theirs, *(out / LAYOUTS[layout].images).rglob("synthetic_*.jpg")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return None


def _draw_all(
    todo: Sequence[Part], recipe: Recipe, sprites: SpriteSet, sprites_folder: Path | None, out: Path, workers: int
) -> Iterator[Part]:
    (out / LAYOUTS[recipe.format].images).mkdir(parents=True, exist_ok=True)
    if workers <= 1 or len(todo) <= 1 or sprites_folder is None:
        studio = Studio(recipe, sprites, out)
        for part in todo:
            studio.draw_part(part)
            yield part
        return
    yield from in_processes(todo, workers, _draw_in_process, _start_process, (recipe, sprites_folder, out))


def in_processes(
    jobs: Sequence[Job], workers: int, work: Callable[[Job], Any], start: Callable[..., None], arguments: tuple
) -> Iterator[Job]:
    """Do jobs in processes that each begin with `start(*arguments)`; yield each job when it is done, in any order."""
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), start, arguments)
    try:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _records(parts: Sequence[Part]) -> Iterator[dict]:
    for part in parts:
        for line in part.path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def default_workers() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
