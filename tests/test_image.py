"""utils/image.py: every kind of file becomes RGB, damaged ones are refused, ImageSpec resizes and pads as it says."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from utils.errors import ImageError
from utils.image import MAX_PIXELS, SAM_MEAN, SAM_STD, ImageSpec, read_image, to_rgb

ORIENTATION = 0x0112
UPRIGHT = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
"""EXIF orientation -> the pixels that a camera stores for an upright picture."""


def saved(path, image, **options):
    """Save a Pillow image or an array and return the path."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


def grey_ramp():
    return np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def grey_as_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def png_header(width, height, depth=8):
    """Return a PNG of a few bytes that declares a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def exif_bytes(*tags):
    """Return EXIF data of little-endian (tag, type, count, four bytes of value)."""
    entries = b"".join(struct.pack("<HHI", *numbers) + value for *numbers, value in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def refused(source, *parts, **options):
    """Assert that an image is refused on one line that holds every part, and return the line."""
    with pytest.raises(ImageError) as caught:
        read_image(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


class TestModes:
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".pgm"])
    def test_grey_is_repeated_in_three_channels(self, tmp_path, suffix):
        np.testing.assert_array_equal(
            read_image(saved(tmp_path / f"grey{suffix}", grey_ramp())), grey_as_rgb(grey_ramp())
        )

    def test_grey_with_alpha_drops_alpha(self, tmp_path):
        alpha = np.full((4, 6), 40, np.uint8)
        path = saved(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(grey_ramp()), Image.fromarray(alpha)]))
        assert Image.open(path).mode == "LA"
        np.testing.assert_array_equal(read_image(path), grey_as_rgb(grey_ramp()))

    def test_rgba_keeps_the_colour_below_the_alpha(self, tmp_path):
        alpha = np.array([0, 1, 128, 255] * 6, np.uint8).reshape(6, 4, 1)
        path = saved(tmp_path / "rgba.png", np.concatenate([UPRIGHT, alpha], axis=2))
        assert Image.open(path).mode == "RGBA"
        np.testing.assert_array_equal(read_image(path), UPRIGHT)

    @pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([255, 0, 128])}])
    def test_palette_becomes_its_colours(self, tmp_path, options, recwarn):
        index = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
        colours = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]], np.uint8)
        palette = Image.fromarray(index)
        palette.putpalette(colours.tobytes())
        path = saved(tmp_path / "palette.png", palette, **options)
        assert Image.open(path).mode == "P"
        np.testing.assert_array_equal(read_image(path), colours[index])
        assert not [warning for warning in recwarn if warning.category is UserWarning]

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_sixteen_bit_grey_keeps_the_high_byte(self, tmp_path, suffix):
        values = np.array([[0, 255, 256, 257], [1000, 32768, 65279, 65535]], np.uint16)
        path = saved(tmp_path / f"deep{suffix}", values)
        assert Image.open(path).mode.startswith("I")
        expected = np.array([[0, 0, 1, 1], [3, 128, 254, 255]], np.uint8)
        np.testing.assert_array_equal(read_image(path), grey_as_rgb(expected))

    def test_thirty_two_bit_grey_is_read_as_sixteen_bit(self, tmp_path):
        path = saved(tmp_path / "i.tif", np.array([[-5, 512, 65535, 70000]], np.int32))
        np.testing.assert_array_equal(read_image(path), grey_as_rgb(np.array([[0, 2, 255, 255]], np.uint8)))

    def test_one_bit(self, tmp_path):
        bits = np.array([[True, False, True], [False, False, True]])
        path = saved(tmp_path / "bits.png", bits)
        assert Image.open(path).mode == "1"
        np.testing.assert_array_equal(read_image(path), grey_as_rgb(bits.astype(np.uint8) * 255))

    @pytest.mark.parametrize("colour", [(200, 40, 40), (20, 200, 220), (240, 240, 240)])
    def test_cmyk_jpeg_is_not_inverted(self, tmp_path, colour):
        path = saved(tmp_path / "cmyk.jpg", Image.new("RGB", (16, 16), colour).convert("CMYK"), quality=95)
        assert Image.open(path).mode == "CMYK"
        np.testing.assert_allclose(read_image(path).mean(axis=(0, 1)), colour, atol=4)

    def test_animation_gives_its_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (8, 5), colour) for colour in ("red", "green", "blue")]
        path = saved(tmp_path / "film.gif", frames[0], save_all=True, append_images=frames[1:])
        assert Image.open(path).n_frames == 3
        np.testing.assert_array_equal(read_image(path), np.broadcast_to(np.uint8([255, 0, 0]), (5, 8, 3)))

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.0, 0.5, 1.0], [0, 127, 255]),
            ([0.0, 127.0, 255.0], [0, 127, 255]),
            ([-1.0, 32767.5, 65535.0], [0, 127, 255]),
            ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ],
        ids=["unit", "bytes", "sixteen-bit", "nan"],
    )
    def test_float_tiff_is_scaled_by_its_range(self, tmp_path, values, expected):
        path = saved(tmp_path / "float.tif", np.array([values], np.float32))
        assert Image.open(path).mode == "F"
        np.testing.assert_array_equal(read_image(path), grey_as_rgb(np.array([expected], np.uint8)))

    @pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "I", "F", "HSV", "YCbCr"])
    def test_every_pillow_mode_gives_rgb(self, mode):
        pixels = to_rgb(Image.new(mode, (7, 5)))
        assert (pixels.dtype, pixels.shape) == (np.uint8, (5, 7, 3))


class TestOrientation:
    @pytest.mark.parametrize("orientation", STORED)
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
    def test_all_orientations_become_upright(self, tmp_path, orientation, suffix):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options = {"lossless": True} if suffix == ".webp" else {}
        stored = STORED[orientation](UPRIGHT)
        path = saved(tmp_path / f"turned{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
        np.testing.assert_array_equal(read_image(path), UPRIGHT)

    @pytest.mark.parametrize("orientation", STORED)
    def test_jpeg_from_a_phone(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        corner = np.zeros((32, 16, 3), np.uint8)
        corner[:16, :8] = 255
        stored = np.ascontiguousarray(STORED[orientation](corner))
        path = saved(tmp_path / "phone.jpg", stored, exif=exif, quality=95)
        np.testing.assert_allclose(read_image(path).astype(int), corner, atol=3)

    def test_a_malformed_tag_beside_the_orientation_does_no_harm(self, tmp_path):
        exif = exif_bytes((ORIENTATION, 3, 1, struct.pack("<HH", 6, 0)), (0x0128, 2, 2, b"a\0\0\0"))
        path = saved(tmp_path / "odd.jpg", np.zeros((10, 20, 3), np.uint8), exif=exif)
        with Image.open(path) as image, pytest.raises(struct.error):
            ImageOps.exif_transpose(image)
        assert read_image(path).shape == (20, 10, 3)

    @pytest.mark.parametrize("orientation", [0, 9, 200])
    def test_unknown_orientation_is_left_alone(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        np.testing.assert_array_equal(read_image(saved(tmp_path / "odd.png", UPRIGHT, exif=exif)), UPRIGHT)


class TestInputs:
    def test_array_is_returned_as_it_is(self):
        assert read_image(UPRIGHT) is UPRIGHT

    @pytest.mark.parametrize("as_path", [str, lambda path: path])
    def test_path_as_text_or_path(self, tmp_path, as_path):
        np.testing.assert_array_equal(read_image(as_path(saved(tmp_path / "a.png", UPRIGHT))), UPRIGHT)

    def test_suffix_does_not_matter(self, tmp_path):
        path = saved(tmp_path / "a.png", UPRIGHT).rename(tmp_path / "a.jpg")
        np.testing.assert_array_equal(read_image(path), UPRIGHT)

    def test_pillow_image_open_or_made(self, tmp_path):
        np.testing.assert_array_equal(read_image(Image.fromarray(UPRIGHT)), UPRIGHT)
        with Image.open(saved(tmp_path / "a.png", UPRIGHT)) as image:
            np.testing.assert_array_equal(read_image(image), UPRIGHT)

    def test_pillow_image_is_not_changed(self):
        image = Image.fromarray(grey_ramp())
        read_image(image)
        assert (image.mode, image.size) == ("L", (6, 4))

    @pytest.mark.parametrize(
        "array",
        [
            UPRIGHT.astype(np.float32) / 255,
            UPRIGHT.astype(np.int64),
            UPRIGHT[..., 0],
            UPRIGHT[..., :2],
            UPRIGHT[None],
            UPRIGHT.transpose(2, 0, 1),
            np.zeros((6, 4, 4), np.uint8),
            np.zeros((0, 4, 3), np.uint8),
        ],
        ids=["float", "int64", "grey", "two channels", "batch", "channels first", "rgba", "empty"],
    )
    def test_array_of_another_kind_is_refused(self, array):
        refused(array, str(array.dtype), str(list(array.shape)), "uint8 RGB [H, W, 3]")


class TestErrors:
    def test_no_such_file(self, tmp_path):
        refused(tmp_path / "absent.png", "no such image", "absent.png", "Check the path")

    def test_folder(self, tmp_path):
        refused(tmp_path, str(tmp_path), "is a folder")

    def test_empty_file(self, tmp_path):
        (tmp_path / "empty.png").touch()
        refused(tmp_path / "empty.png", "empty.png is empty (0 bytes)", "Download or export it again")

    @pytest.mark.parametrize("content", [b"just text\n", b"\x00", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
    def test_not_an_image(self, tmp_path, content):
        path = tmp_path / "text.jpg"
        path.write_bytes(content)
        refused(path, "text.jpg is not an image that Pillow can read", "Allowed: .bmp")

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".gif", ".bmp"])
    @pytest.mark.parametrize("kept", [0.6, 0.95])
    def test_truncated(self, tmp_path, suffix, kept):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        path = saved(tmp_path / f"cut{suffix}", noise)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        refused(path, f"cut{suffix} ", "again" if "cannot be decoded" in refused(path) else "not an image")

    def test_truncated_pillow_image(self, tmp_path):
        path = saved(tmp_path / "cut.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        path.write_bytes(path.read_bytes()[:2000])
        with Image.open(path) as image:
            refused(image, "cannot be decoded", "truncated or damaged")

    def test_damaged_header(self, tmp_path):
        path = tmp_path / "odd.ppm"
        path.write_bytes(b"P6 1x 20 255\n" + bytes(60))
        refused(path, "odd.ppm cannot be decoded", "Download it again")

    @pytest.mark.parametrize("kind", ["file", "array", "pillow"])
    def test_over_the_bound(self, tmp_path, kind):
        source = {
            "file": saved(tmp_path / "big.png", UPRIGHT),
            "array": UPRIGHT,
            "pillow": Image.fromarray(UPRIGHT),
        }[kind]
        refused(source, "4x6 = 24 pixels", "bound of 23", "Make it smaller", max_pixels=23)
        assert read_image(source, max_pixels=24).shape == (6, 4, 3)

    @pytest.mark.parametrize("side", [9_460, 12_000, 60_000, 2**31 - 1])
    def test_declared_size_is_refused_before_decoding(self, tmp_path, monkeypatch, side):
        path = tmp_path / "bomb.png"
        path.write_bytes(png_header(side, side))
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        refused(path, "bomb.png", f"bound of {MAX_PIXELS:,}", "Make it smaller")

    def test_bound_above_that_of_pillow_is_not_misnamed(self, tmp_path):
        path = tmp_path / "bomb.png"
        path.write_bytes(png_header(20_000, 20_000))
        refused(path, f"bound of {2 * Image.MAX_IMAGE_PIXELS:,}", max_pixels=10**9)

    def test_bound_between_one_and_two_times_that_of_pillow(self, tmp_path, recwarn):
        path = tmp_path / "large.png"
        path.write_bytes(png_header(10_000, 10_000))
        refused(path, "cannot be decoded", max_pixels=10**8)
        assert not [warning for warning in recwarn if warning.category is Image.DecompressionBombWarning]

    def test_lenient_pillow_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        refused(saved(tmp_path / "a.png", UPRIGHT), "LOAD_TRUNCATED_IMAGES", "unset it")


def channel(values, mean=SAM_MEAN, std=SAM_STD):
    """Return (value - mean) / std per channel, [3, 1, 1]."""
    return ((torch.tensor(values) - torch.tensor(mean)) / torch.tensor(std)).view(3, 1, 1)


class TestImageSpec:
    @pytest.mark.parametrize(
        ("height", "width", "expected"),
        [(480, 640, (768, 1024)), (640, 480, (1024, 768)), (1024, 1024, (1024, 1024)), (7, 7, (1024, 1024)),
         (500, 375, (1024, 768)), (333, 500, (682, 1024)), (1, 3000, (1, 1024)), (3000, 1, (1024, 1)),
         (427, 640, (683, 1024)), (1365, 2048, (683, 1024))],
    )  # fmt: skip
    def test_letterbox_sizes(self, height, width, expected):
        assert ImageSpec(1024, "letterbox").resized_size(height, width) == expected

    @pytest.mark.parametrize("size", [(480, 640), (1, 9), (2000, 30)])
    def test_square_sizes(self, size):
        assert ImageSpec(224).resized_size(*size) == (224, 224)

    @pytest.mark.parametrize("kind", ["pillow-bilinear", "torch-bilinear", "torch-bicubic"])
    @pytest.mark.parametrize(("height", "width", "inner"), [(20, 40, (32, 64)), (40, 20, (64, 32)), (1, 40, (2, 64))])
    def test_padding_is_zero_after_normalising(self, kind, height, width, inner):
        image = np.full((height, width, 3), (10, 200, 90), np.uint8)
        pixels = ImageSpec(64, "letterbox", kind)(image)
        assert (pixels.shape, pixels.dtype) == ((3, 64, 64), torch.float32)
        assert (pixels[:, inner[0] :] == 0).all()
        assert (pixels[:, :, inner[1] :] == 0).all()
        torch.testing.assert_close(
            pixels[:, : inner[0], : inner[1]], channel([10.0, 200.0, 90.0]).expand(3, *inner), rtol=0, atol=1e-5
        )

    def test_square_fills_the_input(self):
        pixels = ImageSpec(32)(np.full((10, 50, 3), 255, np.uint8))
        torch.testing.assert_close(pixels, channel([255.0] * 3).expand(3, 32, 32))

    @pytest.mark.parametrize("kind", ["pillow-bilinear", "torch-bilinear", "torch-bicubic"])
    def test_scale_one_divides_by_255(self, kind):
        spec = ImageSpec(16, filter=kind, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), scale=1.0)
        pixels = spec(np.full((9, 9, 3), (0, 51, 255), np.uint8))
        torch.testing.assert_close(pixels[:, 3, 3], torch.tensor([-1.0, -0.6, 1.0]))

    @pytest.mark.parametrize("kind", ["pillow-bilinear", "torch-bilinear", "torch-bicubic"])
    @pytest.mark.parametrize("resize", ["letterbox", "square"])
    def test_same_size_changes_no_pixel(self, picture, kind, resize):
        image = np.ascontiguousarray(picture[:64, :64])
        spec = ImageSpec(64, resize, kind, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        np.testing.assert_allclose(spec(image).permute(1, 2, 0).numpy(), image, atol=1e-4)

    def test_rows_and_columns_are_not_swapped(self):
        image = np.zeros((40, 80, 3), np.uint8)
        image[:, 40:] = 255
        resized = ImageSpec(32, "letterbox").resize_image(image)
        assert resized.shape == (3, 16, 32)
        assert (resized[:, :, :15] == 0).all()
        assert (resized[:, :, 17:] == 255).all()

    def test_filters_differ_as_they_say(self, picture):
        made = {
            kind: ImageSpec(32, filter=kind).resize_image(picture)
            for kind in ("pillow-bilinear", "torch-bilinear", "torch-bicubic")
        }
        assert made["pillow-bilinear"].dtype == made["torch-bilinear"].dtype == torch.uint8
        assert made["torch-bicubic"].dtype == torch.float32
        antialiased = Image.fromarray(picture).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(made["pillow-bilinear"].permute(1, 2, 0), antialiased)
        assert (made["pillow-bilinear"] != made["torch-bilinear"]).any()

    def test_torch_bilinear_takes_the_nearest_four_pixels(self):
        image = np.zeros((1, 4, 3), np.uint8)
        image[0, 1] = 100
        image[0, 2] = 200
        resized = ImageSpec(2, filter="torch-bilinear").resize_image(image)
        assert resized[0].tolist() == [[50, 100]] * 2

    def test_bicubic_may_leave_the_range(self):
        image = np.zeros((16, 16, 3), np.uint8)
        image[:, 8:] = 255
        resized = ImageSpec(40, filter="torch-bicubic").resize_image(image)
        assert resized.min() < -1
        assert resized.max() > 256
        unit = ImageSpec(40, filter="torch-bicubic", scale=1.0).resize_image(image)
        torch.testing.assert_close(unit * 255, resized)

    def test_evaluation_takes_pillow_for_torch_bilinear_only(self):
        assert ImageSpec(64, "letterbox").for_evaluation() == ImageSpec(64, "letterbox", "pillow-bilinear")
        for kind in ("torch-bicubic", "pillow-bilinear"):
            assert ImageSpec(64, filter=kind).for_evaluation() == ImageSpec(64, filter=kind)

    @pytest.mark.parametrize("kind", ["pillow-bilinear", "torch-bilinear", "torch-bicubic"])
    @pytest.mark.parametrize(
        "view",
        [lambda a: a[::-1], lambda a: a[:, ::-2], lambda a: a[..., ::-1], lambda a: a.transpose(1, 0, 2)],
        ids=["upside down", "every second column", "bgr", "transposed"],
    )
    def test_views_work_as_their_copies(self, picture, kind, view):
        spec = ImageSpec(48, "letterbox", kind)
        shown = view(picture)
        assert not shown.flags.c_contiguous
        torch.testing.assert_close(spec(shown), spec(np.ascontiguousarray(shown)), rtol=0, atol=0)

    def test_input_is_not_changed(self, picture):
        before = picture.copy()
        for kind in ("pillow-bilinear", "torch-bilinear", "torch-bicubic"):
            ImageSpec(32, "letterbox", kind)(picture)
        np.testing.assert_array_equal(picture, before)
