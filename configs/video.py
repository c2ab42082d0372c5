"""Options of inference_video.py; most are those of inference.py."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import FlagCreatePairsOff

from .inference import PhraseArgs


@dataclass(frozen=True, kw_only=True)
class VideoArgs(PhraseArgs):
    """Follow objects through a video from phrases."""

    version: str = "nano-video"
    """Checkpoint on SAM 2 with video weights: a folder, a Hugging Face hub id, or a released name such as evf-sam2; by
    default the small model that comes with the repository, which knows synthetic clips alone."""
    image_path: str
    """A folder of frames, or a video file."""
    model_type: Literal["auto", "ori", "effi", "sam2", "efficientvit"] = "sam2"
    """Kind of segmenter; SAM 2 alone follows objects."""

    frame: int | None = None
    """Frame on which the phrases are read; by default the first, or the last with --reverse."""
    start: int = 0
    """First frame, counted from 0."""
    end: int | None = None
    """Last frame; by default the last there is."""
    stride: int = 1
    """Take every so many frames."""
    reverse: FlagCreatePairsOff[bool] = False
    """Go backwards in time."""
    redetect: int | None = None
    """Read the phrase again every so many frames and follow what it finds where one was lost; by default never."""
    fill_holes: int = 8
    """Fill holes of at most so many cells of the low-resolution mask, as published; 0 fills none."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep what is remembered of objects in CPU memory."""
    fps: float | None = None
    """Pictures per second of the written video; by default those of the file, or 25 for a folder."""
    skip_broken: FlagCreatePairsOff[bool] = False
    """Leave out frames that cannot be read, and name them at the end, instead of stopping."""
