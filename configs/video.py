"""Options of inference_video.py. The first block is the published command line."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import FlagCreatePairsOff, UseAppendAction

from .inference import InferenceArgs


@dataclass(frozen=True, kw_only=True)
class VideoArgs:
    """Follow objects through a video from phrases."""

    version: str
    """Checkpoint on SAM 2 with video weights: a folder, a Hugging Face hub id, or a released name such as evf-sam2."""
    image_path: str
    """A folder of frames, or a video file."""
    prompt: UseAppendAction[tuple[str, ...]]
    """The phrase; give the option several times to follow several objects."""
    vis_save_path: str = "./infer"
    """Folder for pictures, masks, the video and results.json."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights; auto is fp16 on CUDA and fp32 elsewhere. Falls back with a warning where a device cannot."""
    model_type: Literal["auto", "ori", "effi", "sam2"] = "sam2"
    """Kind of segmenter; SAM 2 alone follows objects."""
    image_size: int | None = None
    """Side of the encoder's image (224 where published); must be what the encoder was trained with, as by default."""
    model_max_length: int = 512
    """Longest phrase in tokens."""
    load_in_8bit: FlagCreatePairsOff[bool] = False
    """Quantise the encoder to 8 bit (needs bitsandbytes); the segmenter stays as it is."""
    load_in_4bit: FlagCreatePairsOff[bool] = False
    """Quantise the encoder to 4 bit (needs bitsandbytes)."""
    local_rank: int = 0
    """Which GPU, for launchers that pass it as an option."""

    device: str | None = None
    """cpu, cuda, cuda:1 or mps; by default CUDA, then MPS, then the CPU."""
    semantic: FlagCreatePairsOff[bool] = False
    """Ask for everything of a class (multitask checkpoints): prefixes '[semantic] '."""
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
    truncate: FlagCreatePairsOff[bool] = False
    """Cut phrases that are too long, with a warning, instead of refusing them."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Begin anew instead of going on where an earlier run stopped."""
    max_pixels: int = 89_478_485
    """Refuse larger frames, before they are decoded."""

    def for_loading(self) -> InferenceArgs:
        """Return the options that say which model, as inference.py has them."""
        return InferenceArgs(
            version=self.version,
            image_path=self.image_path,
            prompt=self.prompt,
            vis_save_path=self.vis_save_path,
            precision=self.precision,
            model_type=self.model_type,
            image_size=self.image_size,
            model_max_length=self.model_max_length,
            load_in_8bit=self.load_in_8bit,
            load_in_4bit=self.load_in_4bit,
            local_rank=self.local_rank,
            device=self.device,
            semantic=self.semantic,
            truncate=self.truncate,
            overwrite=self.overwrite,
            max_pixels=self.max_pixels,
        )
