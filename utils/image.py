"""Reading images, and the one description of how an image becomes network input.

Source of the constants: EVF-SAM `inference.py` and `eval.py`, segment-anything `transforms.py`.
"""

import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, UnidentifiedImageError

from .errors import ImageError

MAX_PIXELS = 89_478_485
"""Default bound on height * width: Pillow's own, 256 MB of RGB."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)
UNIT_MEAN = (0.485, 0.456, 0.406)
UNIT_STD = (0.229, 0.224, 0.225)

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""

ImageLike = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class ImageSpec:
    """How an RGB uint8 image becomes a float tensor [3, size, size].

    * `size`: side of the square input in pixels.
    * `resize`: `letterbox` keeps the aspect ratio, scales the longest side to `size` and pads right and bottom with 0
      after normalising; `square` scales both sides to `size`.
    * `filter`: `pillow-bilinear` or `pillow-bicubic` (antialiased, on uint8), `torch-bilinear` (on uint8, not
      antialiased), `torch-bicubic` (on float, not antialiased, not clamped), `torch-antialias` (bilinear on float,
      antialiased) or `cv2-linear` (OpenCV's bilinear, on uint8, not antialiased).
    * `mean`, `std`: per channel, on the scale 0..`scale`.
    * `scale`: 255 keeps the byte values, 1 divides by 255 first.
    """

    size: int
    resize: Literal["letterbox", "square"] = "square"
    filter: Literal[
        "pillow-bilinear", "pillow-bicubic", "torch-bilinear", "torch-bicubic", "torch-antialias", "cv2-linear"
    ] = "torch-bilinear"
    mean: tuple[float, float, float] = SAM_MEAN
    std: tuple[float, float, float] = SAM_STD
    scale: float = 255.0

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after resizing and before padding."""
        if self.resize == "square":
            return self.size, self.size
        factor = self.size / max(height, width)
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

    def for_evaluation(self) -> "ImageSpec":
        """Return the spec of the published evaluation and training loaders: Pillow instead of torch bilinear."""
        return replace(self, filter="pillow-bilinear") if self.filter == "torch-bilinear" else self

    def for_video(self) -> "ImageSpec":
        """Return the spec of the published video loader: square, Pillow's bicubic, mean and std on the scale 0..1."""
        return replace(self, resize="square", filter="pillow-bicubic", mean=UNIT_MEAN, std=UNIT_STD, scale=1.0)

    def for_sam2(self) -> "ImageSpec":
        """Return the spec of Meta's SAM-2 image predictor: square, antialiased, on the float tensor."""
        return replace(self, resize="square", filter="torch-antialias", mean=UNIT_MEAN, std=UNIT_STD, scale=1.0)

    def resize_image(self, image: np.ndarray) -> torch.Tensor:
        """Return the resized image [3, h, w] before normalising: uint8, or float32 0..`scale` for `torch-bicubic`."""
        size = self.resized_size(*image.shape[:2])
        if self.filter.startswith("pillow"):
            kind = Image.Resampling.BILINEAR if self.filter == "pillow-bilinear" else Image.Resampling.BICUBIC
            resized = Image.fromarray(image).resize(size[::-1], kind)
            return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if self.filter == "cv2-linear":
            import cv2

            resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
            return torch.from_numpy(resized).permute(2, 0, 1)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        if self.filter == "torch-bilinear":
            return F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
        pixels = pixels.float() if self.scale == 255.0 else pixels.float().div(255.0)
        if self.filter == "torch-antialias":
            return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)[0]
        return F.interpolate(pixels, size, mode="bicubic", align_corners=False)[0]

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """Return the network input.

        Args:
            image: uint8 RGB [H, W, 3], 0..255.

        Returns:
            float32 [3, size, size], normalised.
        """
        return self.normalise(self.resize_image(image))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the network input of a picture [3, h, w] that is resized already, h and w at most `size`."""
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() if self.scale == 255.0 else pixels.float().div(255.0)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (self.mean, self.std))
        pixels = (pixels - mean).div_(std)
        height, width = pixels.shape[-2:]
        return F.pad(pixels, (0, self.size - width, 0, self.size - height))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return a 16- or 32-bit grey image as 8-bit grey: the high byte of a 16-bit value, as OpenCV reads it.

    32-bit integers that stay within 0..255 are taken as they are.
    """
    values = np.asarray(image)
    if values.dtype == np.float32:
        values = np.nan_to_num(values)
        low, high = float(values.min()), float(values.max())
        top = 1.0 if low >= 0.0 and high <= 1.0 else 255.0 if high <= 255.0 else 65535.0
        return Image.fromarray((np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    shift = 0 if image.mode == "I" and values.max() <= 255 else 8
    return Image.fromarray((np.clip(values, 0, 65535).astype(np.uint32) >> shift).astype(np.uint8))


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return any Pillow image as uint8 RGB [H, W, 3], upright by its EXIF orientation; alpha is dropped."""
    # Not ImageOps.exif_transpose: it writes all tags again, and fails on photos where another tag is malformed.
    image.load()  # of a TIFF this turns the pixels already, and drops the tag
    turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def read_image(source: ImageLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return an image as uint8 RGB [H, W, 3].

    Grey, palette, 16-bit, CMYK, RGBA and EXIF-rotated files are converted; of an animation the first frame is used.

    Args:
        source: path, Pillow image, or array uint8 RGB [H, W, 3] (returned as it is).
        max_pixels: bound on height * width, checked before the pixels are decoded.

    Raises:
        ImageError: no such file, not an image, truncated, empty, over the bound, or an array of another kind.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(
                f"image array is {source.dtype} {list(source.shape)}; needed: uint8 RGB [H, W, 3] with values 0..255"
            )
        if source.shape[0] * source.shape[1] > max_pixels:
            raise ImageError(_too_large("image array", source.shape[1], source.shape[0], max_pixels))
        return source
    if isinstance(source, Image.Image):
        return _decode(source, "image", max_pixels)
    if not isinstance(source, str | Path):
        raise ImageError(f"image is {type(source).__name__}; needed is a path, a Pillow image or an array")
    path = Path(source)
    if not path.exists():
        raise ImageError(f"no such image: {path}. Check the path; it is relative to {Path.cwd().name or '/'}/")
    if path.is_dir():
        raise ImageError(f"{path} is a folder, an image file is needed")
    if path.stat().st_size == 0:
        raise ImageError(f"{path} is empty (0 bytes). Download or export it again")
    return _open(path, str(path), max_pixels)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the image of a file's bytes as uint8 RGB [H, W, 3]; see `read_image`.

    Args:
        name: what errors call it.

    Raises:
        ImageError: as `read_image`.
    """
    return _open(io.BytesIO(data), name, max_pixels)


def _open(source: Path | io.BytesIO, name: str, max_pixels: int) -> np.ndarray:
    # Pillow warns between one and two times its bound and refuses above; `max_pixels` is checked in `_decode` instead.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return _decode(image, name, max_pixels)
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not an image that Pillow can read. Allowed: {', '.join(sorted(IMAGE_SUFFIXES))}"
        ) from None
    except Image.DecompressionBombError:
        bound = min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)  # above twice its own bound, Pillow refuses whatever ours
        raise ImageError(f"{name} is over the bound of {bound:,} pixels. Make it smaller first") from None
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_damaged(name, error)) from None


def _decode(image: Image.Image, name: str, max_pixels: int) -> np.ndarray:
    if image.width * image.height > max_pixels:
        raise ImageError(_too_large(name, image.width, image.height, max_pixels))
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set; unset it: it hides damaged files")
    try:
        return to_rgb(image)
    except Exception as error:
        raise ImageError(_damaged(name, error)) from None


def _damaged(name: str, error: Exception) -> str:
    # Pillow's decoders raise what they stumble on, struct.error or KeyError among it: hence `except Exception`.
    return f"{name} cannot be decoded ({error}): truncated or damaged. Download it again"


def _too_large(name: str, width: int, height: int, max_pixels: int) -> str:
    return (
        f"{name} has {width}x{height} = {width * height:,} pixels, over the bound of {max_pixels:,}. "
        "Make it smaller first, or raise max_pixels"
    )
