"""One scene: which things, where, how large, composited over a background; masks are what is visible of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .backgrounds import draw_background
from .objects import Kind
from .sprites import CANVAS, EXTENT, SpriteSet

CLEAR = 0.4
"""Share of a thing that must be visible; with less it is not referred to, and no phrase that could mean it is used."""
OPAQUE = 128
COUNT_WEIGHTS = {2: 2, 3: 4, 4: 5, 5: 5, 6: 4, 7: 3, 8: 2}
SAME_KIND_WEIGHTS = {1: 3, 2: 7, 3: 6, 4: 3}
SIDE_OF_COUNT = {2: 0.38, 3: 0.34, 4: 0.31, 5: 0.28, 6: 0.26, 7: 0.245, 8: 0.23}
"""Typical longer side of a thing, as a share of the image's shorter side."""
MIN_SIDE, MAX_SIDE = 0.13, 0.6


@dataclass(frozen=True)
class Placed:
    """One thing of a scene.

    * `box`: x1 y1 x2 y2 of the visible part in pixels, x2 and y2 exclusive.
    * `area`, `full_area`: opaque pixels that are visible, and of the whole thing, also behind others and outside.
    * `angle`: degrees counter-clockwise; `side`: longer side in pixels, before rotation.
    """

    kind: Kind
    box: tuple[int, int, int, int]
    area: int
    full_area: int
    angle: float
    side: float
    flipped: bool

    @property
    def visible(self) -> float:
        """Visible share, 0..1."""
        return self.area / self.full_area


@dataclass
class Wish:
    """A thing before it has a place: its number in `SpriteSet.kinds`, as `Placed`, and where it should be, 0..1."""

    kind: int
    side: float
    angle: float
    flipped: bool
    centre: tuple[float, float] | None


@dataclass(frozen=True)
class Layer:
    """How a thing was drawn: `centre` x y in pixels, of its picture as it was cut."""

    wish: Wish
    brightness: np.float32
    centre: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """A composited scene.

    * `image`: uint8 RGB [H, W, 3].
    * `owner`: int8 [H, W], which of `things` is seen at a pixel, -1 for the background: mask i is `owner == i`.
    * `things`: from back to front; `layers`: how each was drawn.
    * `backdrop`: uint8 RGB [H, W, 3] behind them; `shadow`: how dark they make it, 0..1.
    """

    image: np.ndarray
    owner: np.ndarray
    things: tuple[Placed, ...]
    background: str
    layers: tuple[Layer, ...]
    backdrop: np.ndarray
    shadow: float


def draw_scene(
    rng: np.random.Generator,
    sprites: SpriteSet,
    kinds: Sequence[int],
    height: int,
    width: int,
    backgrounds: Sequence[str],
    photos: Sequence[tuple[np.ndarray, bool]],
) -> Scene | None:
    """Draw a scene, or return None where fewer than two things found a place.

    Args:
        kinds: positions in `sprites.kinds` that may appear.
    """
    picture, background = draw_background(rng, height, width, backgrounds, photos)
    image = picture.astype(np.float32)
    owner = np.full((height, width), -1, np.int8)
    shadow = rng.uniform(0.15, 0.45) if rng.random() < 0.4 else 0.0
    wishes = _choose(rng, sprites, kinds, min(height, width))
    placed: list[tuple[Layer, int]] = []
    full_areas = np.zeros(0, np.int64)
    for wish in wishes:
        brightness = np.float32(rng.uniform(0.88, 1.08))
        patch = cut(sprites, wish, brightness)
        spot = _find_spot(rng, patch, wish, owner, full_areas)
        if spot is None:
            continue
        paste(image, owner, patch, spot, len(placed), shadow)
        full_areas = np.append(full_areas, int((patch[..., 3] >= OPAQUE).sum()))
        centre = (spot[1] + patch.shape[1] / 2, spot[0] + patch.shape[0] / 2)
        placed.append((Layer(wish, brightness, centre), int(full_areas[-1])))
    if rng.random() < 0.25:
        image += rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(2, 8))
    things, order = [], []
    for number, (layer, full_area) in enumerate(placed):
        wish, (box, area) = layer.wish, _extent(owner, number)
        if area >= 24:
            order.append(number)
            kind = sprites.kinds[wish.kind]
            things.append(Placed(kind, box, area, full_area, wish.angle, wish.side, wish.flipped))
    if len(things) < 2 or len(things) != len(placed):
        return None
    image = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return Scene(image, owner, tuple(things), background, tuple(layer for layer, _ in placed), picture, shadow)


def _weighted(rng: np.random.Generator, weights: dict[int, int]) -> int:
    values = np.array(list(weights.values()), np.float64)
    return int(rng.choice(list(weights), p=values / values.sum()))


def _choose(rng: np.random.Generator, sprites: SpriteSet, kinds: Sequence[int], unit: int) -> list[Wish]:
    """Choose kinds (most scenes hold several of one kind, none two of one family), sizes and layout."""
    total = _weighted(rng, COUNT_WEIGHTS)
    counts: list[tuple[int, int]] = []
    families: set[str] = set()
    left = total
    for position, index in enumerate(rng.permutation(np.asarray(kinds))):
        kind = sprites.kinds[int(index)]
        if left == 0:
            break
        if kind.family in families:
            continue
        wanted = _weighted(rng, SAME_KIND_WEIGHTS) if position == 0 or rng.random() < 0.4 else 1
        counts.append((int(index), min(wanted, left)))
        left -= counts[-1][1]
        families.add(kind.family)
    layout = rng.choice(["free", "row", "column"], p=[0.66, 0.24, 0.1])
    wishes: list[Wish] = []
    for position, (index, count) in enumerate(counts):
        centres: list[tuple[float, float] | None] = [None] * count
        if layout != "free" and count >= 2 and position == 0:
            centres = _line(rng, count, vertical=bool(layout == "column"))
        thin = np.clip((0.5 / sprites.fill[index]) ** 0.5, 0.8, 1.5)
        base = SIDE_OF_COUNT[total] * thin * rng.uniform(0.8, 1.25)
        ladder = 1.5 ** (rng.permutation(count) - (count - 1) / 2) if rng.random() < 0.65 else np.ones(count)
        for factor, centre in zip(ladder, centres, strict=True):
            side = float(np.clip(base * factor * rng.uniform(0.93, 1.07), MIN_SIDE * thin, MAX_SIDE)) * unit
            wishes.append(Wish(index, side, _angle(rng), bool(rng.random() < 0.5), centre))
    return [wishes[i] for i in rng.permutation(len(wishes))]


def _line(rng: np.random.Generator, count: int, vertical: bool) -> list[tuple[float, float] | None]:
    start, end = rng.uniform(0.12, 0.22), rng.uniform(0.78, 0.88)
    across, tilt = rng.uniform(0.25, 0.75), rng.uniform(-0.15, 0.15)
    points: list[tuple[float, float] | None] = []
    for step in np.linspace(0, 1, count):
        along = start + (end - start) * step + rng.uniform(-0.03, 0.03)
        aside = across + tilt * (step - 0.5) + rng.uniform(-0.04, 0.04)
        points.append((aside, along) if vertical else (along, aside))
    return points


def _angle(rng: np.random.Generator) -> float:
    spread = rng.choice([8.0, 35.0, 180.0], p=[0.6, 0.3, 0.1])
    return float(rng.uniform(-spread, spread))


def cut(sprites: SpriteSet, wish: Wish, brightness: np.float32) -> np.ndarray:
    """Return a thing scaled, turned and mirrored, premultiplied RGBA, float32 [h, w, 4] in 0..255, cropped."""
    level = 0
    while level + 1 < len(sprites.levels) and wish.side <= EXTENT >> (level + 1):
        level += 1
    source = np.asarray(sprites.levels[level][wish.kind])
    scale = wish.side / (EXTENT >> level)
    middle = ((CANVAS >> level) - 1) / 2
    side = int(np.ceil((CANVAS >> level) * scale * 1.42)) + 2
    turn = cv2.getRotationMatrix2D((middle, middle), wish.angle, scale)
    turn[:, 2] += (side - 1) / 2 - middle
    if wish.flipped:
        source = source[:, ::-1]
    patch = cv2.warpAffine(np.ascontiguousarray(source), turn, (side, side), flags=cv2.INTER_LINEAR)
    rows, columns = np.nonzero(patch[..., 3].max(1))[0], np.nonzero(patch[..., 3].max(0))[0]
    patch = patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    patch[..., :3] = np.minimum(patch[..., :3] * brightness, patch[..., 3:])
    return patch


def _find_spot(
    rng: np.random.Generator, patch: np.ndarray, wish: Wish, owner: np.ndarray, full_areas: np.ndarray
) -> tuple[int, int] | None:
    """Return top and left for a patch, such that what is there already stays visible enough.

    Some things may cover others up to that bound, most are put where there is room; a few scenes break the bound, so
    that there are things hardly to be seen.
    """
    height, width = owner.shape
    h, w = patch.shape[:2]
    opaque = patch[..., 3] >= OPAQUE
    limit = 0.6 if rng.random() < 0.35 else 0.12
    outside = 0.3 if rng.random() < 0.12 else 0.02
    careless = rng.random() < 0.05
    for attempt in range(14):
        if wish.centre is not None and attempt < 3:
            x, y = wish.centre[0] * width - w / 2, wish.centre[1] * height - h / 2
            x, y = x + rng.uniform(-3, 3) * attempt, y + rng.uniform(-3, 3) * attempt
            x, y = np.clip(x, 0, max(0, width - w)), np.clip(y, 0, max(0, height - h))
        else:
            x = rng.uniform(-outside * w, max(0, width - w * (1 - outside)))
            y = rng.uniform(-outside * h, max(0, height - h * (1 - outside)))
        top, left = round(y), round(x)
        inside, region = _clip(top, left, patch.shape, owner.shape)
        shown = opaque[inside]
        if shown.sum() < 0.7 * opaque.sum():
            continue
        below = owner[region][shown]
        covered = np.bincount(below[below >= 0], minlength=len(full_areas))
        if covered.sum() > (limit if attempt < 10 else 0.6) * shown.sum():
            continue
        if not len(full_areas) or careless:
            return top, left
        visible = np.bincount(owner[owner >= 0], minlength=len(full_areas)) - covered
        if (visible >= (CLEAR + 0.03) * full_areas).all():
            return top, left
    return None


def _clip(
    top: int, left: int, patch_shape: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the part of a patch that is inside an image, and where in the image that is."""
    y1, x1 = max(0, top), max(0, left)
    y2, x2 = min(shape[0], top + patch_shape[0]), min(shape[1], left + patch_shape[1])
    return (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left)), (slice(y1, y2), slice(x1, x2))


def paste(
    image: np.ndarray, owner: np.ndarray, patch: np.ndarray, spot: tuple[int, int], number: int, shadow: float
) -> None:
    """Draw a thing over an image, with its shadow, and mark what is seen of it.

    Args:
        image: float32 RGB [H, W, 3] in 0..255, written; owner: int8 [H, W], written.
        patch: as `cut`; spot: its top and left, which may be outside.
    """
    top, left = spot
    if shadow:
        blur = max(3, min(patch.shape[:2]) // 12) | 1
        margin = blur
        dark = cv2.copyMakeBorder(patch[..., 3], margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0)
        dark = cv2.GaussianBlur(dark, (2 * blur + 1, 2 * blur + 1), blur / 2)
        drop = max(2, patch.shape[0] // 20)
        inside, region = _clip(top - margin + drop, left - margin + drop // 2, dark.shape, owner.shape)
        image[region] *= 1 - dark[inside][..., None] * np.float32(shadow / 255)
    inside, region = _clip(top, left, patch.shape, owner.shape)
    part = patch[inside]
    image[region] = part[..., :3] + image[region] * (1 - part[..., 3:] / 255)
    owner[region][part[..., 3] >= OPAQUE] = number


def _extent(owner: np.ndarray, number: int) -> tuple[tuple[int, int, int, int], int]:
    mask = owner == number
    area = int(mask.sum())
    if not area:
        return (0, 0, 0, 0), 0
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1), area
