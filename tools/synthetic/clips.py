"""Clips: the things of a scene move, grow, turn, cross, leave and come back, in the layout of Ref-DAVIS17."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import DataError
from utils.files import atomic_path, write_json
from utils.visualize import save_labels

from .generate import Recipe, Studio, in_processes
from .scene import Layer, Scene, cut, paste
from .sprites import SpriteSet

SPLITS = ("train", "valid")
ROOT = Path("ref_davis17")
FIRST_STREAM = 100
"""Streams of random numbers of clips begin here, so that no clip begins with a scene of an image set."""
DONE = "done.json"
MOTIONS = {"still": 2, "drift": 3, "sway": 4, "trip": 3}
"""still: stays; drift: goes straight on, maybe out of the picture; sway: to and fro; trip: far off and back."""


@dataclass(frozen=True)
class ClipRecipe:
    """What a set of clips holds: `clips` of each of `SPLITS`, `frames` of each clip, and scenes as `scene` says."""

    scene: Recipe
    clips: tuple[int, int]
    frames: int

    def check(self) -> None:
        """Check every value.

        Raises:
            DataError: a value is not allowed; the message names it.
        """
        self.scene.check()
        if min(self.clips) < 0 or not sum(self.clips):
            raise DataError(f"Cannot make {self.clips} clips: needed is one or more")
        if not 2 <= self.frames <= 100_000:
            raise DataError(f"Cannot make clips of {self.frames} frames: allowed are 2 to 100000")


@dataclass(frozen=True)
class _Motion:
    """Where a thing is at a time, relative to the first frame.

    * `way`: one of `MOTIONS`; `reach`: x y in pixels, of the whole way; `period`: frames.
    * `growth`: log of the largest change of size; `turn`: degrees; `beat`: frames of size and turn.
    """

    way: str
    reach: tuple[float, float]
    period: float
    growth: float
    turn: float
    beat: float

    def at(self, layer: Layer, time: int) -> Layer:
        """Return the thing as it is drawn at a time."""
        phase = 2 * np.pi * time / self.period
        share = {"still": 0.0, "drift": time / self.period, "sway": np.sin(phase), "trip": (1 - np.cos(phase)) / 2}
        pulse = float(np.sin(2 * np.pi * time / self.beat))
        wish = replace(
            layer.wish,
            side=layer.wish.side * float(np.exp(self.growth * pulse)),
            angle=layer.wish.angle + self.turn * pulse,
        )
        x, y = (c + r * float(share[self.way]) for c, r in zip(layer.centre, self.reach, strict=True))
        return replace(layer, wish=wish, centre=(x, y))


def draw_clip(
    rng: np.random.Generator, sprites: SpriteSet, scene: Scene, frames: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (uint8 RGB [H, W, 3], int8 [H, W] as `Scene.owner`) of each frame; the first is the scene itself."""
    height, width = scene.owner.shape
    motions = [_choose_motion(rng, min(height, width), frames) for _ in scene.layers]
    pan = rng.uniform(-0.15, 0.15, 2) * min(height, width) if rng.random() < 0.5 else np.zeros(2)
    noise = rng.uniform(1, 5) if rng.random() < 0.3 else 0.0
    yield scene.image, scene.owner
    for time in range(1, frames):
        move = np.float32([[1, 0, pan[0] * time / frames], [0, 1, pan[1] * time / frames]])
        backdrop = cv2.warpAffine(scene.backdrop, move, (width, height), borderMode=cv2.BORDER_REFLECT)
        image, owner = backdrop.astype(np.float32), np.full((height, width), -1, np.int8)
        for number, (layer, motion) in enumerate(zip(scene.layers, motions, strict=True)):
            now = motion.at(layer, time)
            patch = cut(sprites, now.wish, now.brightness)
            spot = round(now.centre[1] - patch.shape[0] / 2), round(now.centre[0] - patch.shape[1] / 2)
            if _is_inside(spot, patch.shape, owner.shape):
                paste(image, owner, patch, spot, number, scene.shadow)
        if noise:
            image += rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(noise)
        yield np.clip(image + 0.5, 0, 255).astype(np.uint8), owner


def _choose_motion(rng: np.random.Generator, unit: int, frames: int) -> _Motion:
    names, weights = list(MOTIONS), np.array(list(MOTIONS.values()), np.float64)
    way = str(rng.choice(names, p=weights / weights.sum()))
    far = {"still": 0.0, "drift": rng.uniform(0.1, 0.8), "sway": rng.uniform(0.05, 0.25), "trip": rng.uniform(0.3, 1.1)}
    direction = rng.uniform(0, 2 * np.pi)
    reach = (float(np.cos(direction) * far[way] * unit), float(np.sin(direction) * far[way] * unit))
    period = frames if way == "drift" else frames * rng.uniform(0.7, 1.5)
    growth = rng.uniform(-0.35, 0.35) if rng.random() < 0.6 else 0.0
    turn = rng.uniform(-50, 50) if rng.random() < 0.6 else 0.0
    return _Motion(way, reach, float(period), float(growth), float(turn), float(frames * rng.uniform(0.8, 2.0)))


def _is_inside(spot: tuple[int, int], patch: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Return whether any of a patch would be seen; one far outside cannot even be cut to the picture."""
    return all(-length < at < side for at, length, side in zip(spot, patch[:2], shape, strict=True))


@dataclass(frozen=True)
class _Job:
    split: int
    index: int

    @property
    def name(self) -> str:
        """What the clip is called."""
        return f"clip_{SPLITS[self.split]}_{self.index:05d}"


class ClipStudio:
    """Draws clips into a folder; each process has one."""

    def __init__(self, recipe: ClipRecipe, sprites: SpriteSet, out: Path) -> None:
        self.recipe, self.sprites, self.root = recipe, sprites, out / ROOT
        self.studio = Studio(recipe.scene, sprites, out)

    def draw(self, job: _Job) -> None:
        """Write the frames and labels of a clip, then what says that it is whole; one that is there stays."""
        root = self.root / SPLITS[job.split]
        images, labels = root / "JPEGImages" / job.name, root / "Annotations" / job.name
        if (labels / DONE).is_file():
            return
        scene, phrases, rng = self.studio.compose(FIRST_STREAM + job.split, job.index)
        for time, (image, owner) in enumerate(draw_clip(rng, self.sprites, scene, self.recipe.frames)):
            with atomic_path(images / f"{time:05d}.jpg") as temporary:
                Image.fromarray(image).save(temporary, "JPEG", quality=self.recipe.scene.quality)
            save_labels(labels / f"{time:05d}.png", (owner + 1).astype(np.uint8))
        said = [phrase for phrase in phrases if len(phrase.targets) == 1]
        expressions = {
            str(number): {"exp": phrase.text, "obj_id": str(phrase.targets[0] + 1)}
            for number, phrase in enumerate(said)
        }
        frames = [f"{time:05d}" for time in range(self.recipe.frames)]
        write_json(labels / DONE, {"expressions": expressions, "frames": frames})


_studio: ClipStudio | None = None


def _start_process(recipe: ClipRecipe, sprites_folder: Path, out: Path) -> None:
    global _studio
    cv2.setNumThreads(1)
    _studio = ClipStudio(recipe, SpriteSet.load(sprites_folder), out)


def _draw_in_process(job: _Job) -> None:
    if _studio is None:
        raise DataError("A process was not prepared")
    _studio.draw(job)


def make_clips(
    out: Path, recipe: ClipRecipe, sprites: SpriteSet, sprites_folder: Path | None = None, workers: int = 1
) -> dict[str, int]:
    """Write a set of clips; a stopped run goes on. Return how many clips each split has.

    Args:
        sprites_folder: where the sprites are saved, for more than one process.

    Raises:
        DataError: a value of the recipe is wrong, or `out` holds clips of another.
    """
    recipe.check()
    told = {"fingerprint": recipe.scene.fingerprint(sprites), "frames": recipe.frames}
    note = out / ROOT / "synthetic.json"
    if note.is_file():
        if json.loads(note.read_text(encoding="utf-8")) != told:
            raise DataError(f"{out} holds clips of other options. Give another --out")
    elif (out / ROOT).exists():
        raise DataError(f"{out / ROOT} is not from this tool. Give another --out")
    write_json(note, told)
    jobs = [_Job(split, index) for split, count in enumerate(recipe.clips) for index in range(count)]
    with tqdm(total=len(jobs), unit="clip", desc="drawing", dynamic_ncols=True) as bar:
        for _ in _draw_all(jobs, recipe, sprites, sprites_folder, out, workers):
            bar.update()
    for split, name in enumerate(SPLITS):
        clips = [job.name for job in jobs if job.split == split]
        labels = out / ROOT / name / "Annotations"
        videos = {clip: json.loads((labels / clip / DONE).read_text(encoding="utf-8")) for clip in clips}
        if videos:
            write_json(out / ROOT / "meta_expressions" / name / "meta_expressions.json", {"videos": videos})
    return dict(zip(SPLITS, recipe.clips, strict=True))


def _draw_all(
    jobs: list[_Job], recipe: ClipRecipe, sprites: SpriteSet, sprites_folder: Path | None, out: Path, workers: int
) -> Iterator[_Job]:
    if workers <= 1 or len(jobs) <= 1 or sprites_folder is None:
        studio = ClipStudio(recipe, sprites, out)
        for job in jobs:
            studio.draw(job)
            yield job
        return
    yield from in_processes(jobs, workers, _draw_in_process, _start_process, (recipe, sprites_folder, out))
