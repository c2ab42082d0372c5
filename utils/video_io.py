"""Frames from folders and video files, read when they are asked for, and pictures to video files."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ImageError, MissingPackageError
from .files import atomic_path
from .image import IMAGE_SUFFIXES, MAX_PIXELS, read_image

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".gif"})
KEPT = 16
"""Decoded frames of a file that are kept, for steps backwards."""


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts `2` before `10`, also within names."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


class FrameFolder(Sequence[np.ndarray]):
    """The images of a folder as frames, by number where their names are numbers, as published; else sorted naturally.

    Raises:
        ImageError: no such folder, or no image in it.
    """

    fps: float | None = None

    def __init__(self, folder: Path, max_pixels: int = MAX_PIXELS) -> None:
        if not folder.is_dir():
            raise ImageError(f"no such folder of frames: {folder}. Check the path")
        self.paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        if not self.paths:
            raise ImageError(f"no frames in {folder}. Looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        self.are_numbered = all(path.stem.isdecimal() for path in self.paths)
        """Whether all names are numbers."""
        self.paths.sort(key=lambda path: natural_key(path.name))
        self.names = [path.stem for path in self.paths]
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a frame, uint8 RGB [H, W, 3].

        Raises:
            ImageError: it cannot be read; its path is named.
        """
        return read_image(self.paths[index], self._max_pixels)


class VideoFile(Sequence[np.ndarray]):
    """The frames of a video file, decoded one after the other; a step back decodes from the last key frame on.

    Raises:
        ImageError: not a video, or one without frames.
        MissingPackageError: PyAV is not installed.
    """

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path = path
        self._av = _import_av()
        with self._errors():
            self._container = self._av.open(str(path))
            if not self._container.streams.video:
                raise ImageError(f"{path} has no pictures. Give a video file, or a folder of frames")
            stream = self._container.streams.video[0]
            if stream.width * stream.height > max_pixels:
                raise ImageError(
                    f"{path} has {stream.width}x{stream.height} pixels a frame, over the bound of {max_pixels:,}. "
                    "Make it smaller first, or raise --max_pixels"
                )
            self.fps = float(stream.average_rate or stream.guessed_rate or 25)
            times = [packet.pts for packet in self._container.demux(stream) if packet.pts is not None]
        self._times = sorted(times)
        if not self._times:
            raise ImageError(f"{path} has no frames")
        self.names = [f"{i:05d}" for i in range(len(self._times))]
        self._place = {time: i for i, time in enumerate(self._times)}
        self._kept: dict[int, np.ndarray] = {}
        self._decoder: Iterator[Any] | None = None
        self._next = 0

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._times)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a frame, uint8 RGB [H, W, 3].

        Raises:
            ImageError: the file is damaged there.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index in self._kept:
            return self._kept[index]
        if self._decoder is None or not self._next <= index < self._next + KEPT:
            self._seek(index)
        with self._errors(index):
            for frame in self._decoder:
                place = self._place.get(frame.pts, self._next)
                self._next = place + 1
                self._kept[place] = frame.to_ndarray(format="rgb24")
                while len(self._kept) > KEPT:
                    del self._kept[next(iter(self._kept))]
                if place == index:
                    return self._kept[index]
        raise ImageError(f"{self.path}: frame {index} cannot be decoded. Convert the video again")

    def _seek(self, index: int) -> None:
        stream = self._container.streams.video[0]
        with self._errors(index):
            self._container.seek(self._times[index], stream=stream, backward=True)
        self._decoder, self._next = self._container.decode(stream), index

    @contextmanager
    def _errors(self, index: int | None = None) -> Iterator[None]:
        try:
            yield
        except (self._av.FFmpegError, EOFError) as error:
            where = f"{self.path}" if index is None else f"{self.path}, frame {index}"
            raise ImageError(f"{where} cannot be decoded ({error}). Give a video, or a folder of frames") from None


def open_frames(path: Path, max_pixels: int = MAX_PIXELS) -> FrameFolder | VideoFile:
    """Open a folder of frames or a video file.

    Raises:
        ImageError: neither, or one that cannot be read.
    """
    if path.is_dir():
        return FrameFolder(path, max_pixels)
    if not path.exists():
        raise ImageError(f"no such video or folder: {path}. Check the path")
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise ImageError(f"{path} is no video. Give a folder of frames, or one of {', '.join(sorted(VIDEO_SUFFIXES))}")
    return VideoFile(path, max_pixels)


class VideoWriter:
    """Writes pictures to an .mp4 that browsers play (H.264); an odd last row or column is left out.

    The file appears under its name when the block is left without an error.

    Args:
        fps: pictures per second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._av, self._fps = _import_av(), Fraction(fps).limit_denominator(1001)
        self._atomic, self._stream = atomic_path(path), None

    def __enter__(self) -> "VideoWriter":
        """Open a temporary file beside the path."""
        self._container = self._av.open(str(self._atomic.__enter__()), "w")
        return self

    def write(self, picture: np.ndarray) -> None:
        """Add a picture, uint8 RGB [H, W, 3]; all must have one size."""
        height, width = (side - side % 2 for side in picture.shape[:2])
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": "20"})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, *error: Any) -> None:
        """Finish the file, or drop it after an error."""
        if self._stream is not None and error[0] is None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        self._atomic.__exit__(*error)


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingPackageError("video files need PyAV. Run: pip install av") from None
    return av
