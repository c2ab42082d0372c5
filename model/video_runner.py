"""The work of inference_video.py: frames and phrases to pictures, masks, a video and results.json, resumable."""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from configs.video import VideoArgs
from utils.distributed import Ranks
from utils.errors import ImageError, ModelError, PromptError
from utils.files import append_line, atomic_path, read_lines, write_json
from utils.image import read_image
from utils.masks import boxes_of_masks, encode_rle
from utils.tokenizer import semantic_phrase
from utils.video_io import FrameFolder, VideoFile, VideoWriter, open_frames
from utils.visualize import overlay, save_labels, save_picture, with_legend

from .image_runner import RESULTS, check_args, check_folder, file_state, load, settings_digest
from .questions import check_phrases
from .video import VideoFrame, VideoPredictor

STATE, LINES = "state.pt", "results.partial.jsonl"
SAVE_EVERY = 100
FOLDER_FPS = 25.0
CPU_IS_FULL = "DefaultCPUAllocator"
"""In the text of the plain RuntimeError that torch raises where a CPU has no memory left."""

logger = logging.getLogger(__name__)


class Frames(Sequence[np.ndarray]):
    """The frames that --start, --end and --stride choose of a video.

    Raises:
        ImageError: they choose none, or are out of range.
    """

    def __init__(self, video: FrameFolder | VideoFile, start: int, end: int | None, stride: int) -> None:
        last = len(video) - 1 if end is None else end
        if stride < 1:
            raise ImageError(f"--stride {stride}: needed is at least 1")
        if not 0 <= start <= last < len(video):
            raise ImageError(f"--start {start} --end {last}: the video has the frames 0 to {len(video) - 1}")
        self.video, self.places = video, range(start, last + 1, stride)
        self.names = [video.names[place] for place in self.places]

    def __len__(self) -> int:
        """Return how many are chosen."""
        return len(self.places)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a chosen frame, uint8 RGB [H, W, 3]."""
        return self.video[self.places[index]]


def run(args: VideoArgs) -> int:
    """Do what the options say; return the exit status: 0, or 1 where frames could not be read.

    Raises:
        TextSAMError: a bad option or frame; what was written before stays, and the next run goes on there.
    """
    check_phrases(args.prompt)
    check_args(args)
    if args.fps is not None and args.fps <= 0:
        raise ModelError(f"--fps {args.fps}: needed is a positive number, or leave it out")
    if args.fill_holes < 0:
        raise ModelError(f"--fill_holes {args.fill_holes}: needed is 0 (fill none) or more")
    source, folder = Path(args.image_path), Path(args.vis_save_path)
    frames = Frames(open_frames(source, args.max_pixels), args.start, args.end, args.stride)
    if isinstance(frames.video, FrameFolder) and not frames.video.are_numbered:
        logger.warning("names of frames are not all numbers: sorted as people sort, from %s", frames.names[0])
    at = _phrase_frame(args, frames)
    check_folder(folder)
    frames[at]  # a frame that cannot be read is said before the weights are loaded
    image_predictor = load(args, Ranks.from_environment(args.local_rank))
    video = VideoPredictor(
        image_predictor.model, image_predictor.tokenizer, args.fill_holes, args.redetect, args.offload
    )
    job = _Job(args, frames, folder, source.stem if source.is_file() else source.resolve().name)
    try:
        job.follow(video, at)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and CPU_IS_FULL not in str(error):
            raise
        raise ModelError(
            f"{len(args.prompt)} objects do not fit into the memory of {image_predictor.model.device}. "
            "Give fewer --prompt, or --offload"
        ) from None
    job.finish()
    if job.broken:
        sys.stderr.write(
            f"{len(job.broken)} of {len(frames)} frames could not be used:\n  " + "\n  ".join(job.broken) + "\n"
        )
    return 1 if job.broken else 0


def _phrase_frame(args: VideoArgs, frames: Frames) -> int:
    """Return which of the chosen frames the phrases are read on.

    Raises:
        PromptError: it is not among them.
    """
    if args.frame is None:
        return len(frames) - 1 if args.reverse else 0
    if args.frame not in frames.places:
        raise PromptError(
            f"--frame {args.frame} is not among the frames {args.start} to {frames.places[-1]}, every {args.stride}"
        )
    return frames.places.index(args.frame)


class _Job:
    """One video: what is written, and how far an earlier run came."""

    def __init__(self, args: VideoArgs, frames: Frames, folder: Path, name: str) -> None:
        self.args, self.frames, self.folder, self.name = args, frames, folder, name
        self.masks = folder / "Annotations" / name
        self.broken: list[str] = []
        chosen = [file_state(path) for path in getattr(frames.video, "paths", [getattr(frames.video, "path", None)])]
        values = [
            settings_digest(args, [args.prompt, args.semantic]), args.image_path, args.frame, args.start, args.end,
            args.stride, args.reverse, args.redetect, args.fill_holes, chosen,
        ]  # fmt: skip
        self.settings = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def follow(self, video: VideoPredictor, at: int) -> None:
        """Follow the phrases and write every frame."""
        args, step = self.args, -1 if self.args.reverse else 1
        self.folder.mkdir(parents=True, exist_ok=True)
        video.on_broken = self._note_broken if args.skip_broken else None
        video.start(self.frames)
        state = self._earlier_state()
        if state is None:
            (self.folder / LINES).unlink(missing_ok=True)
            texts = [semantic_phrase(text) if args.semantic else text for text in args.prompt]
            video.add_phrases(texts, at)
            first = at
        else:
            video.restore(state["video"])
            first = state["video"]["passed"][0] + step
        last = 0 if args.reverse else len(self.frames) - 1
        total = (last - at) * step + 1
        done = (first - at) * step
        with tqdm(total=total, initial=done, unit="frame") as bar:
            if done < total:
                for frame in video.propagate(first, reverse=args.reverse):
                    self._write(frame)
                    bar.update()
                    if (frame.index - at) % SAVE_EVERY == SAVE_EVERY - 1:
                        self._save(video)
        self._save(video)

    def _note_broken(self, index: int, error: ImageError) -> None:
        self.broken.append(str(error))

    def _earlier_state(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        if self.args.overwrite or not path.is_file():
            return None
        with contextlib.suppress(Exception):  # a state that cannot be read is of no use: the video is done anew
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["settings"] == self.settings:
                return state
        return None

    def _save(self, video: VideoPredictor) -> None:
        with atomic_path(self.folder / STATE) as temporary:
            torch.save({"settings": self.settings, "video": video.state()}, temporary)

    def _write(self, frame: VideoFrame) -> None:
        name = self.frames.names[frame.index]
        lines = [f"{number}: {text}" for number, text in zip(frame.ids, self.args.prompt, strict=True)]
        save_picture(self.folder / f"{name}_vis.png", with_legend(overlay(frame.image, frame.masks), lines))
        labels = np.zeros(frame.masks.shape[1:], np.uint8)
        for number, mask in zip(frame.ids, frame.masks, strict=True):
            labels[mask] = number
        save_labels(self.masks / f"{name}.png", labels)
        boxes = boxes_of_masks(torch.from_numpy(frame.masks)).numpy()
        rows = zip(frame.ids, self.args.prompt, frame.scores, boxes, encode_rle(frame.masks), strict=True)
        objects = [
            {
                "id": number,
                "phrase": text,
                "score": round(float(score), 6),
                "box": [round(float(value), 1) for value in box],
                "segmentation": rle,
            }
            for number, text, score, box, rle in rows
        ]
        record = {"frame": self.frames.places[frame.index], "name": name, "objects": objects}
        append_line(self.folder / LINES, record)

    def finish(self) -> None:
        """Write results.json and the video from what was written for each frame."""
        records = {record["frame"]: record for record in read_lines(self.folder / LINES)}
        ordered = [records[frame] for frame in sorted(records)]
        fps = self.args.fps or (self.frames.video.fps or FOLDER_FPS) / self.args.stride
        with VideoWriter(self.folder / f"{self.name}.mp4", fps) as writer:
            for record in ordered:
                writer.write(read_image(self.folder / f"{record['name']}_vis.png"))
        write_json(
            self.folder / RESULTS, {"video": self.args.image_path, "phrases": self.args.prompt, "frames": ordered}
        )
