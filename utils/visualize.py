"""Pictures of masks."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import atomic_path

PALETTE = np.array(
    [
        (50, 120, 220), (230, 85, 40), (60, 165, 75), (205, 60, 140), (240, 180, 30), (120, 80, 200),
        (20, 170, 180), (160, 100, 50), (140, 190, 40), (235, 105, 115),
    ],
    np.uint8,
)  # fmt: skip
"""Colours that stay apart for most kinds of colour vision; reused from the start where there are more masks."""
POSITIVE, NEGATIVE = (40, 180, 60), (220, 40, 40)
"""Of boxes and of points on an object, and of points that are not."""


def overlay(image: np.ndarray, masks: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Return a copy of an image with masks in colour and their outlines.

    Args:
        image: uint8 RGB [H, W, 3].
        masks: bool [N, H, W]; later ones lie on top.
        opacity: of the colour, 0..1.
    """
    picture = image.astype(np.float32)
    for mask, colour in zip(masks, colours(len(masks)), strict=True):
        picture[mask] = picture[mask] * (1 - opacity) + colour * np.float32(opacity)
    picture = picture.round().astype(np.uint8)
    thickness = max(1, round(max(image.shape[:2]) / 500))
    for mask, colour in zip(masks, colours(len(masks)), strict=True):
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, colour.tolist(), thickness, cv2.LINE_AA)
    return picture


def label_overlay(image: np.ndarray, labels: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Return a copy of an image with every label in a colour of its own and white lines between them.

    Args:
        image: uint8 RGB [H, W, 3].
        labels: uint16 [H, W], 0 where there is none.
        opacity: of the colour, 0..1.
    """
    hues = (np.arange(int(labels.max(initial=0)) + 1) * 0.618034 % 1 * 180).astype(np.uint8)  # golden: far apart
    bright = np.stack([hues, np.full_like(hues, 190), np.full_like(hues, 235)], axis=1)
    table = cv2.cvtColor(bright[None], cv2.COLOR_HSV2RGB)[0]
    is_mask = (labels > 0)[..., None]
    picture = np.where(is_mask, image * (1 - opacity) + table[labels] * opacity, image).round().astype(np.uint8)
    wide = cv2.erode(labels, np.ones((3, 3), np.uint8)) != cv2.dilate(labels, np.ones((3, 3), np.uint8))
    picture[wide] = 255
    return picture


def mark_points(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return a copy of a picture with points: green where label is 1, red where it is 0.

    Args:
        points: x y label, [P, 3].
    """
    picture = picture.copy()
    radius = max(3, round(max(picture.shape[:2]) / 120))
    for x, y, label in points:
        centre = (round(x), round(y))
        cv2.circle(picture, centre, radius + max(1, radius // 3), (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(picture, centre, radius, POSITIVE if label else NEGATIVE, -1, cv2.LINE_AA)
    return picture


def mark_boxes(picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return a copy of a picture with boxes x1 y1 x2 y2, [N, 4], outlined in green."""
    picture = picture.copy()
    thickness = max(1, round(max(picture.shape[:2]) / 300))
    for x1, y1, x2, y2 in boxes.round().astype(int).tolist():
        cv2.rectangle(picture, (x1, y1), (x2, y2), POSITIVE, thickness)
    return picture


def colours(count: int) -> np.ndarray:
    """Return uint8 RGB [count, 3]."""
    return PALETTE[np.arange(count) % len(PALETTE)]


def write_on_masks(picture: np.ndarray, masks: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return a copy of a picture with a text in each mask, at its thickest place; the largest masks come first.

    One that would cover an earlier one moves up or down within its mask, or is left out; so is an empty one.

    Args:
        picture: uint8 RGB [H or more, W, 3].
        masks: bool [N, H, W].
    """
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    height, width = masks.shape[1:]
    font = ImageFont.load_default(max(11, width // 50))
    pad, used = max(2, width // 300), []
    for k in np.argsort(-masks.sum((1, 2)), kind="stable"):
        if not texts[k] or not masks[k].any():
            continue
        text = fit_text(texts[k], font, width - 2 * pad)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        size = (right - left + 2 * pad, bottom - top + 2 * pad)
        x, y = thickest_place(masks[k])
        x = max(0, min(x - size[0] // 2, width - size[0]))
        for shift in (0, 1, -1, 2, -2):
            middle = y + shift * (size[1] + 1)
            upper = max(0, min(middle - size[1] // 2, height - size[1]))
            box = (x, upper, x + size[0], upper + size[1])
            is_inside = not shift or (0 <= middle < height and masks[k, middle, x : x + size[0]].any())
            if is_inside and not any(_overlap(box, other) for other in used):
                used.append(box)
                draw.rectangle(box, fill=(20, 20, 20))
                draw.text((x + pad - left, upper + pad - top), text, fill="white", font=font)
                break
    return np.array(canvas)


def _overlap(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether two boxes x1 y1 x2 y2 share a pixel."""
    return all(one[axis] <= other[axis + 2] and other[axis] <= one[axis + 2] for axis in (0, 1))


def thickest_place(mask: np.ndarray) -> tuple[int, int]:
    """Return x and y of a pixel of a mask, bool [H, W], far from its edge; of several the one nearest to its middle."""
    step = max(1, max(mask.shape) // 512)
    small = np.pad(mask[::step, ::step], 1).astype(np.uint8)
    if not small.any():  # thinner than a step
        y, x = np.unravel_index(mask.argmax(), mask.shape)
        return int(x), int(y)
    depths = cv2.distanceTransform(small, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    deep = np.argwhere(depths > 0.9 * depths.max())
    y, x = deep[((deep - np.argwhere(depths > 0).mean(0)) ** 2).sum(1).argmin()]
    return int(x) * step, int(y) * step


def fit_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return one line of text, cut to a width in pixels."""
    text = " ".join(text.split())
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return text in lines of at most a width in pixels, broken between words; longer words are cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(fit_text(word, font, width))
    return lines or [""]


def with_legend(picture: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return the picture with a text per mask below it, each beside a square of its colour.

    Args:
        picture: uint8 RGB [H, W, 3].
    """
    size = max(12, picture.shape[1] // 40)
    font = ImageFont.load_default(size)
    row = int(size * 1.6)
    wrapped = [wrap_text(text, font, picture.shape[1] - size * 5 // 2) for text in texts]
    canvas = Image.new("RGB", (picture.shape[1], picture.shape[0] + row * sum(map(len, wrapped))), "white")
    canvas.paste(Image.fromarray(picture))
    draw, top = ImageDraw.Draw(canvas), picture.shape[0]
    for lines, colour in zip(wrapped, colours(len(texts)), strict=True):
        draw.rectangle((size // 2, top + size // 4, size * 3 // 2, top + size * 5 // 4), fill=tuple(colour.tolist()))
        for line in lines:
            draw.text((size * 2, top + size // 8), line, fill="black", font=font)
            top += row
    return np.array(canvas)


def thumbnail(picture: np.ndarray, side: int) -> np.ndarray:
    """Return a picture on a white square, uint8 RGB [side, side, 3], its proportions kept."""
    scale = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    tile = np.full((side, side, 3), 255, np.uint8)
    tile[: size[1], : size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return tile


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 RGB [H, W, 3], or uint16 [H, W], as PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def save_labels(path: Path, labels: np.ndarray) -> None:
    """Write which object each pixel belongs to, uint8 [H, W], as a palette PNG like those of DAVIS, atomically."""
    image = Image.fromarray(labels, mode="P")
    table = np.concatenate([np.zeros((1, 3), np.uint8), colours(255)])
    image.putpalette(table.tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")
