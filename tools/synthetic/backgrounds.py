"""Backgrounds: gradients, procedural textures and photographs, all drawn from a random generator."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.errors import DataError

ASSETS = Path(__file__).parent.parent.parent / "assets"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHARP = ("brick", "grass", "gravel")
"""Bundled photographs without things in them; all others are thrown out of focus, so that nothing is to be seen."""


def open_photos(folder: Path | None = None) -> tuple[tuple[np.ndarray, bool], ...]:
    """Return (uint8 RGB photograph, may stay sharp): the bundled ones, or those of a folder, in order of their names.

    Raises:
        DataError: a photograph cannot be read, or the folder has none.
    """
    bundled = [*sorted((ASSETS / "synthetic").glob("*.jpg")), ASSETS / "astronaut.jpg"]
    paths = bundled if folder is None else sorted(p for p in folder.glob("*") if p.suffix.lower() in PHOTO_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} has no photographs ({', '.join(PHOTO_SUFFIXES)}). Give another folder as --photos")
    photos = []
    for path in paths:
        content = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if content is None or min(content.shape[:2]) < 64:
            raise DataError(f"{path} cannot be read or is smaller than 64 pixels. Remove it from the photographs")
        photos.append((content, path.stem in SHARP))
    return tuple(photos)


def draw_background(
    rng: np.random.Generator, height: int, width: int, names: Sequence[str], photos: Sequence[tuple[np.ndarray, bool]]
) -> tuple[np.ndarray, str]:
    """Return a background, uint8 RGB [H, W, 3], and which of `names` it is."""
    name = names[int(rng.integers(len(names)))]
    if name == "photo":
        return _photo(rng, height, width, photos), name
    blend = BACKGROUNDS[name](rng, height, width)
    return _colour(rng, blend), name


def _grid(height: int, width: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rotated coordinates of every pixel, -0.7..0.7 on the shorter side, float32 [H, W]."""
    side = min(height, width)
    y = ((np.arange(height, dtype=np.float32) - height / 2) / side)[:, None]
    x = ((np.arange(width, dtype=np.float32) - width / 2) / side)[None]
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def _plain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.full((height, width), rng.random(), np.float32)


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, _ = _grid(height, width, rng.uniform(0, 2 * np.pi))
    return np.clip(x / 1.2 + 0.5, 0, 1)


def _radial(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, y = _grid(height, width, 0.0)
    x0, y0 = rng.uniform(-0.4, 0.4, 2).astype(np.float32)
    return np.clip(np.sqrt((x - x0) ** 2 + (y - y0) ** 2) / np.float32(rng.uniform(0.6, 1.1)), 0, 1)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    total, weight = np.zeros((height, width), np.float32), 0.0
    for octave in range(int(rng.integers(1, 5))):
        side = 3 * 2**octave
        coarse = rng.random((side, side), dtype=np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * np.float32(0.6**octave)
        weight += 0.6**octave
    return np.clip(total / np.float32(weight), 0, 1)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, _ = _grid(height, width, rng.uniform(0, np.pi))
    wave = np.sin(x * np.float32(2 * np.pi * rng.uniform(4, 14)))
    return np.clip(wave * np.float32(rng.choice([0.5, 4.0])) + 0.5, 0, 1)


def _checks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, y = _grid(height, width, rng.uniform(0, np.pi / 2))
    count = np.float32(rng.uniform(4, 12))
    return ((np.floor(x * count) + np.floor(y * count)) % 2).astype(np.float32)


def _dots(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, y = _grid(height, width, rng.uniform(0, np.pi / 2))
    count = np.float32(rng.uniform(5, 14))
    distance = np.hypot((x * count) % 1 - 0.5, (y * count) % 1 - 0.5)
    return np.clip((np.float32(rng.uniform(0.2, 0.4)) - distance) * 12, 0, 1)


def _tiles(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, y = _grid(height, width, 0.0)
    count = np.float32(rng.uniform(4, 10))
    row = np.floor(y * count)
    column = x * count / np.float32(rng.uniform(1, 2.5)) + (row % 2) * np.float32(0.5)
    joint = np.maximum(np.abs(column % 1 - 0.5), np.abs((y * count) % 1 - 0.5))
    shade = np.sin(np.floor(column) * 12.9898 + row * 78.233) * np.float32(0.15)
    return np.where(joint > 0.46, np.float32(0), np.float32(0.75) + shade)


def _blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.clip((_noise(rng, height, width) - 0.5) * 12 + 0.5, 0, 1)


def _waves(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, y = _grid(height, width, rng.uniform(0, np.pi))
    bend = np.sin(y * np.float32(2 * np.pi * rng.uniform(1, 4))) * np.float32(rng.uniform(0.03, 0.12))
    return np.sin((x + bend) * np.float32(2 * np.pi * rng.uniform(4, 12))) * np.float32(0.5) + np.float32(0.5)


def _marble(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    x, _ = _grid(height, width, rng.uniform(0, np.pi))
    veins = np.abs(np.sin(x * 9 + _noise(rng, height, width) * np.float32(rng.uniform(5, 14))))
    return np.sqrt(veins)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "plain": _plain,
    "gradient": _gradient,
    "radial": _radial,
    "noise": _noise,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "tiles": _tiles,
    "blobs": _blobs,
    "waves": _waves,
    "marble": _marble,
}
"""Name -> pattern, float32 [H, W] in 0..1, that blends two or three colours."""

USUAL = ("plain", "gradient", "radial", "noise", "stripes", "checks", "dots", "tiles", "blobs", "photo", "photo")
STRANGE = ("waves", "marble")
"""Never in a set made with the usual options: for the question whether a model depends on the background."""


def _colour(rng: np.random.Generator, blend: np.ndarray) -> np.ndarray:
    """Blend colours of moderate saturation, so that things stand out; patterns of high contrast get near ones."""
    hue = rng.uniform(0, 180)
    value = rng.uniform(90, 250)
    first = (hue, rng.uniform(0, 130), value)
    near = rng.random() < 0.7
    spread = rng.uniform(20, 60) * (1 if value < 170 else -1)
    second = ((hue + rng.uniform(-25, 25)) % 180, rng.uniform(0, 130), np.clip(value + spread, 60, 250))
    if not near:
        second = (rng.uniform(0, 180), rng.uniform(0, 110), rng.uniform(90, 250))
    colours = np.array([[first, second]]).clip(0, 255).astype(np.uint8)
    start, end = cv2.cvtColor(colours, cv2.COLOR_HSV2RGB)[0].astype(np.float32)
    picture = start + blend[..., None] * (end - start)
    return np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)


def _photo(rng: np.random.Generator, height: int, width: int, photos: Sequence[tuple[np.ndarray, bool]]) -> np.ndarray:
    photo, sharp = photos[int(rng.integers(len(photos)))]
    scale = rng.uniform(0.5, 1.0) * min(photo.shape[0] / height, photo.shape[1] / width)
    h, w = max(8, int(height * scale)), max(8, int(width * scale))
    top, left = int(rng.integers(photo.shape[0] - h + 1)), int(rng.integers(photo.shape[1] - w + 1))
    crop = cv2.resize(photo[top : top + h, left : left + w], (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if not sharp:
        small = cv2.resize(crop, (24, 24), interpolation=cv2.INTER_AREA)
        crop = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    tint = rng.uniform(0.75, 1.15, 3).astype(np.float32) if sharp else np.float32(rng.uniform(0.8, 1.1))
    return np.clip(crop * tint + np.float32(rng.uniform(0, 40)), 0, 255).astype(np.uint8)
