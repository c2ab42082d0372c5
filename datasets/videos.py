"""Videos with phrases: Ref-DAVIS17, Ref-YouTube-VOS and MeViS on their public folder layouts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import DataError, nearest
from utils.image import read_image
from utils.masks import decode_rle

from .annotations import read_json

Truth = Callable[[int], np.ndarray | None]
"""Number of a frame -> bool [H, W], or None where nobody drew a mask."""


@dataclass(frozen=True)
class Expression:
    """One phrase about a clip: what people call it in submissions, its text, and the labels that it means."""

    id: str
    text: str
    objects: tuple[str, ...]


class Frames(Sequence[np.ndarray]):
    """Frames of a clip, read when asked for, uint8 RGB [H, W, 3]."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a frame."""
        return read_image(self.paths[index])


@dataclass(frozen=True)
class Clip:
    """A video with its phrases; `frames.paths[i].stem` is the name of frame i."""

    name: str
    frames: Frames
    expressions: tuple[Expression, ...]


@dataclass(frozen=True)
class VideoSet:
    """A split of videos.

    * `truth`: clip and phrase -> where its masks are; None where the labels are hidden, so that a file is handed in.
    """

    name: str
    clips: tuple[Clip, ...]
    truth: Callable[[Clip, Expression], Truth] | None


@dataclass(frozen=True)
class _Layout:
    folders: tuple[str, ...]
    open: Callable[[str, Path, str], VideoSet]
    splits: tuple[str, ...]


def list_video_sets() -> list[str]:
    """Return the names that `open_video_set` knows, the split that is reported first."""
    return [
        name if i == 0 else f"{name}|{split}" for name, kind in LAYOUTS.items() for i, split in enumerate(kind.splits)
    ]


def is_video_set(name: str) -> bool:
    """Return whether a name is that of a set of videos."""
    return name.split("|")[0] in LAYOUTS


def open_video_set(name: str, root: str | Path) -> VideoSet:
    """Open a set by name: `ref_davis17`, `ref_youtube_vos`, `mevis`, or with a split, `mevis|valid_u`.

    Raises:
        DataError: unknown, incomplete or damaged; what is missing is named.
    """
    family, _, split = name.partition("|")
    if not is_video_set(name) or (split and split not in LAYOUTS[family].splits):
        known = [f"{kind}|{part}" for kind, layout in LAYOUTS.items() for part in layout.splits]
        raise DataError(f"unknown video set {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    layout = LAYOUTS[family]
    for folder in layout.folders:
        if (Path(root) / folder).is_dir():
            return layout.open(name, Path(root) / folder, split or layout.splits[0])
    raise DataError(
        f"{name}: no folder {' or '.join(layout.folders)} in {root}. Give the folder above it as --dataset_dir"
    )


def _with_expressions(name: str, root: Path, split: str) -> VideoSet:
    """Open the layout of Ref-YouTube-VOS, which Ref-DAVIS17 shares: expressions apart, masks as palette pictures."""
    videos = _videos(root / "meta_expressions" / split / "meta_expressions.json")
    hidden = root / "meta_expressions" / "test" / "meta_expressions.json"
    if split == "valid" and hidden.is_file():
        videos = {clip: about for clip, about in videos.items() if clip not in _videos(hidden)}
    clips = tuple(_clip(root / split / "JPEGImages", clip, about, "obj_id") for clip, about in videos.items())
    labels = root / split / "Annotations"
    if not labels.is_dir():
        return VideoSet(name, clips, None)

    def truth(clip: Clip, expression: Expression) -> Truth:
        wanted = [int(label) for label in expression.objects]

        def mask(frame: int) -> np.ndarray | None:
            path = labels / clip.name / f"{clip.frames.paths[frame].stem}.png"
            return np.isin(_read_labels(path), wanted) if path.is_file() else None

        return mask

    return VideoSet(name, clips, truth)


def _mevis(name: str, root: Path, split: str) -> VideoSet:
    """Open MeViS: several objects per phrase, masks as RLE by frame in one file."""
    videos = _videos(root / split / "meta_expressions.json")
    clips = tuple(_clip(root / split / "JPEGImages", clip, about, "anno_id") for clip, about in videos.items())
    path = root / split / "mask_dict.json"
    if not path.is_file():
        return VideoSet(name, clips, None)
    drawn: dict[str, list[dict | None]] = read_json(path)

    def truth(clip: Clip, expression: Expression) -> Truth:
        missing = next((number for number in expression.objects if number not in drawn), None)
        if missing is not None:
            raise DataError(f"{path} has no masks of {missing}, which {clip.name}, expression {expression.id} means")

        rows = [drawn[number] for number in expression.objects]
        size = next((rle["size"] for row in rows for rle in row if rle), None)

        def mask(frame: int) -> np.ndarray | None:
            found = [decode_rle(row[frame]) for row in rows if row[frame]]
            return np.logical_or.reduce(found) if found else np.zeros(size or clip.frames[frame].shape[:2], bool)

        return mask

    return VideoSet(name, clips, truth)


LAYOUTS = {
    "ref_davis17": _Layout(("ref_davis17", "ref-davis", "ref_davis"), _with_expressions, ("valid", "train")),
    "ref_youtube_vos": _Layout(
        ("ref_youtube_vos", "ref-youtube-vos", "refer_youtube_vos", "rvos"), _with_expressions, ("valid", "train")
    ),
    "mevis": _Layout(("mevis", "MeViS", "MeViS_release"), _mevis, ("valid", "valid_u", "train")),
}


def _videos(path: Path) -> dict[str, Any]:
    videos = read_json(path).get("videos")
    if not isinstance(videos, dict) or not videos:
        raise DataError(f"{path} has no videos. Download it again")
    return dict(sorted(videos.items()))


def _clip(images: Path, name: str, about: dict[str, Any], key: str) -> Clip:
    """Return a clip from its entry in the file of expressions.

    Raises:
        DataError: a frame is absent, or the entry lacks what is needed.
    """
    try:
        paths = [images / name / f"{frame}.jpg" for frame in about["frames"]]
        expressions = []
        for number, said in about["expressions"].items():
            meant = said.get(key, ())
            objects = tuple(map(str, meant)) if isinstance(meant, list | tuple) else (str(meant),)
            expressions.append(Expression(number, said["exp"], objects))
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(f"expressions of video {name} lack {error}. Download them again") from None
    absent = next((path for path in paths if not path.is_file()), None)
    if absent is not None:
        raise DataError(f"no frame {absent}. Unpack the images of video {name}")
    return Clip(name, Frames(paths), tuple(expressions))


def _read_labels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise DataError(f"{path} is {image.mode}, needed is a palette picture with a label per pixel")
        return np.array(image)
