"""The work of inference.py: a list of images and prompts to pictures, masks and results.json, resumable."""

import glob
import hashlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from configs.inference import InferenceArgs, PhraseArgs
from configs.schema import ModelConfig
from utils.distributed import Ranks
from utils.errors import ImageError, ModelError, PromptError
from utils.files import append_line, atomic_path, existing_path, read_lines, write_json
from utils.image import IMAGE_SUFFIXES, read_image
from utils.masks import save_mask
from utils.precision import choose_device, choose_dtype
from utils.tokenizer import PhraseTokenizer, semantic_phrase
from utils.visualize import overlay, save_picture

from .checkpoints.load import Source, fill_model, find_source, resolve
from .naming import Named, check_naming, find_namer, own_namer
from .predictor import ImagePredictor, build_predictor
from .quantization import quantize_encoder, require_bitsandbytes
from .questions import Answer, Question, question_of, require_kind, smallest_on_top
from .registry import MODEL_TYPES

RESULTS = "results.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One image and the name its files begin with."""

    path: Path
    stem: str


def run(args: InferenceArgs) -> int:
    """Do what the options say; return the exit status: 0, or 1 where some images of a folder could not be read.

    Raises:
        TextSAMError: nothing was written.
    """
    question = question_of(args)
    check_args(args)
    check_naming(args)
    jobs = find_images(args.image_path)
    ranks = Ranks.from_environment(args.local_rank)
    ranks.join()
    folder = Path(args.vis_save_path)
    writer = Writer(question, folder, args.save_mask, args.save_logits)
    writer.check(jobs)
    settings = settings_digest(args, question.settings)
    records = {} if args.overwrite else read_records(folder)
    todo = [job for job in ranks.share(jobs) if not writer.is_done(records.get(str(job.path)), settings, job)]
    only = read_image(jobs[0].path, args.max_pixels) if len(jobs) == 1 and todo else None
    failed: list[str] = []
    if todo:
        namer = find_namer(args)
        predictor = load(args, ranks, question.kind)
        require_kind(predictor, question, args.engine or args.version)
        if namer := namer or own_namer(args, predictor):
            question = Named(question, namer.load(args, predictor), namer.is_own, args.top_k)
            writer = replace(writer, question=question)
        failed = _work(args, predictor, question, todo, writer, settings, ranks, only)
    ranks.wait_for_all()
    if ranks.is_first:
        merge_records(folder)
    ranks.wait_for_all()  # torchrun stops the other ranks when one exits with 1: not while the first still merges
    skipped = len(ranks.share(jobs)) - len(todo)
    if skipped:
        logger.info("%d images were already done (--overwrite does them again)", skipped)
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(todo)} images could not be used:\n  " + "\n  ".join(failed) + "\n")
    return 1 if failed else 0


def file_state(path: Path) -> list[int]:
    """Return size in bytes and time of the last change of a file: another file of the same name is not the same."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def source_files(source: str | None) -> list[Path]:
    """Return the file that a checkpoint or vocabulary is, or those of its folder; none of one that is found by name."""
    path = existing_path(source) if source else None
    if path is None:
        return []
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def settings_digest(args: PhraseArgs, asked: Sequence[Any]) -> str:
    """Return a short text that changes with every option, weight file or prompt that changes the masks.

    Args:
        asked: what is asked for, for JSON.
    """
    engine = args.engine if isinstance(args, InferenceArgs) else None
    files, names = source_files(engine or args.version), []
    if isinstance(args, InferenceArgs):
        files += [*source_files(args.name_with), *source_files(args.vocabulary)]
        names = [args.vocabulary, args.name_with, args.top_k, args.branch, args.roi_size]
    values = [
        args.version, *asked, args.precision, args.load_in_8bit, args.load_in_4bit,
        args.model_max_length, args.truncate, [(file.name, *file_state(file)) for file in files],
        *([engine] if engine else []), *names,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _work(
    args: InferenceArgs,
    predictor: ImagePredictor,
    question: Question,
    todo: list[Job],
    writer: "Writer",
    settings: str,
    ranks: Ranks,
    only: np.ndarray | None,
) -> list[str]:
    """Do the images of one rank and return what was wrong with those that could not be read.

    Args:
        only: the decoded image where there is a single one: it was read before the weights, to fail early.
    """
    failed, empty = [], 0
    for job in tqdm(todo, unit="image", disable=only is not None or not ranks.is_first):
        try:
            image = read_image(job.path, args.max_pixels) if only is None else only
            answer = question.ask(predictor, image)
        except ImageError as error:
            failed.append(str(error))
            continue
        except PromptError as error:
            if only is not None:
                raise
            failed.append(f"{job.path}: {error}")
            continue
        record = writer.write(job, image, answer)
        append_record(writer.folder, ranks.rank, {**record, "settings": settings})
        empty += not answer.records
    if empty:
        logger.warning(
            "nothing was found on %d of %d images: no mask has a predicted IoU of %g and a stability of %g. Lower "
            "--pred_iou_thresh or --stability_score_thresh",
            empty, len(todo), args.pred_iou_thresh, args.stability_score_thresh,
        )  # fmt: skip
    return failed


def check_args(args: PhraseArgs) -> None:
    """Refuse options that cannot work before anything is loaded.

    Raises:
        ModelError: which one and why.
    """
    if args.load_in_8bit and args.load_in_4bit:
        raise ModelError("--load_in_8bit and --load_in_4bit exclude each other. Give one")
    if args.load_in_8bit or args.load_in_4bit:
        require_bitsandbytes("--load_in_8bit" if args.load_in_8bit else "--load_in_4bit")
    if args.model_max_length < 3:
        raise ModelError(f"--model_max_length {args.model_max_length} leaves no room for a phrase. Default: 512")


def check_folder(folder: Path) -> None:
    """Refuse a folder for results that cannot be one.

    Raises:
        ModelError: it or one above it is a file.
    """
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ModelError(f"--vis_save_path {folder}: {file} is a file. Give a folder")


def find_images(pattern: str) -> list[Job]:
    """Return the images that a path, folder or glob names, sorted, each with a stem of its own.

    Raises:
        ImageError: there are none.
    """
    if not pattern:
        raise ImageError("--image_path is empty. Give an image, a folder or a glob")
    path = Path(pattern)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not paths:
            raise ImageError(f"no images in folder {path}. Looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    elif not path.exists() and glob.has_magic(pattern):
        paths = sorted(Path(p) for p in glob.iglob(pattern, recursive=True) if Path(p).is_file())  # noqa: PTH207
        paths = [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            raise ImageError(f"no images match {pattern!r}. Quote the pattern, and check it with ls")
    elif not path.exists():
        raise ImageError(f"no such image: {path}. Check the path")
    else:
        paths = [path]
    used = Counter(p.stem for p in paths)
    stems = [
        p.stem if used[p.stem] == 1 else "_".join(p.with_suffix("").parts[-2:]) + "_" + p.suffix[1:] for p in paths
    ]
    if len(set(stems)) < len(stems):
        double = next(stem for stem, count in Counter(stems).items() if count > 1)
        raise ImageError(f"two images would write the same files {double}_*. Run their folders one at a time")
    return [Job(p, stem) for p, stem in zip(paths, stems, strict=True)]


def load(args: PhraseArgs, ranks: Ranks, kind: str = "phrases") -> ImagePredictor:
    """Load what `--version` names; phrases are checked before the weights are read.

    Args:
        kind: what it will be asked: `phrases`, or something else, which needs no tokenizer.

    Raises:
        TextSAMError: the checkpoint cannot be used, or the options do not fit it.
    """
    if isinstance(args, InferenceArgs) and args.engine is not None:
        from .export.run import load_for

        return load_for(args)
    device = choose_device(args.device, ranks.local_rank)
    dtype = choose_dtype(None if args.precision == "auto" else args.precision, device)
    source = resolve(find_source(args.version))
    config = source.config
    if config.encoder is None and kind == "phrases":
        raise ModelError(f"{args.version} is {config.name}, which has no phrase encoder. Give an EVF-SAM checkpoint")
    check_family(args.model_type, args.version, config)
    if config.encoder is not None and args.image_size not in (None, config.encoder.image_size):
        raise ModelError(f"--image_size {args.image_size}: this encoder takes {config.encoder.image_size} only")
    tokenizer = _tokenizer(args, source) if kind == "phrases" else None
    bits = 8 if args.load_in_8bit else 4 if args.load_in_4bit else None
    model = fill_model(source, torch.device("cpu") if bits else device, dtype)
    if bits:
        model = quantize_encoder(model, bits).to(device)
    predictor = build_predictor(model, tokenizer)
    if isinstance(args, InferenceArgs) and args.compile:
        model.segmenter.compile_image_encoder()
    return predictor


def check_family(model_type: str, version: str, config: ModelConfig) -> None:
    """Refuse a `--model_type` that is not what the checkpoint says.

    Raises:
        ModelError: it is not.
    """
    if model_type != "auto" and MODEL_TYPES[model_type] != config.family:
        stated = next(key for key, family in MODEL_TYPES.items() if family == config.family)
        raise ModelError(
            f"--model_type {model_type} does not fit {version}, which is {config.name}. "
            f"Leave the option out, or give {stated}"
        )


def _tokenizer(args: PhraseArgs, source: Source) -> PhraseTokenizer:
    """Return the tokenizer of a checkpoint, after a look at every phrase."""
    encoder = source.config.encoder
    tokenizer = PhraseTokenizer(
        source.path,
        min(args.model_max_length, encoder.max_text_tokens),
        "truncate" if args.truncate else "error",
    )
    for phrase in args.prompt:
        tokenizer.encode(semantic_phrase(phrase) if args.semantic else phrase)
    return tokenizer


@dataclass(frozen=True)
class Writer:
    """Writes the files of an image: pictures, and masks and logits where they are asked for."""

    question: Question
    folder: Path
    save_mask: bool
    save_logits: bool

    def check(self, jobs: list[Job]) -> None:
        """Refuse a folder that cannot be one, and images whose files would overwrite each other.

        Raises:
            ModelError, ImageError: which one and why.
        """
        check_folder(self.folder)
        name, count = Counter(name for job in jobs for name in self.files_of(job)).most_common(1)[0]
        if count > 1:
            raise ImageError(f"two images would write the same file {name}. Run them one at a time, to two folders")

    def names_of(self, job: Job) -> list[str]:
        """Return how the files of each mask begin: `<stem>`, or `<stem>_<k>` where there are several."""
        count = self.question.count
        return [job.stem] if count == 1 else [f"{job.stem}_{k}" for k in range(count or 0)]

    def files_of(self, job: Job) -> list[str]:
        """Return every file name that an image gets."""
        kinds = ["vis.png"] + ["mask.png"] * self.save_mask + ["logits.npy"] * self.save_logits
        names = [f"{name}_{kind}" for name in self.names_of(job) for kind in kinds]
        names += [f"{job.stem}_labels.png"] * (self.save_mask and self.question.count is None)
        return names + ([f"{job.stem}_vis.png"] if self.question.count != 1 else [])

    def write(self, job: Job, image: np.ndarray, answer: Answer) -> dict[str, Any]:
        """Write the files of one image and return its record for results.json."""
        for k, name in enumerate(self.names_of(job)):
            picture = self.question.mark(overlay(image, answer.masks[k : k + 1]), k, answer)
            save_picture(self.folder / f"{name}_vis.png", picture)
            if self.save_mask:
                save_mask(self.folder / f"{name}_mask.png", answer.masks[k])
            if self.save_logits:
                with atomic_path(self.folder / f"{name}_logits.npy") as temporary:
                    np.save(temporary, answer.logits[k])
        if self.question.count != 1:
            save_picture(self.folder / f"{job.stem}_vis.png", self.question.picture(image, answer))
        if self.save_mask and self.question.count is None:
            save_picture(self.folder / f"{job.stem}_labels.png", smallest_on_top(answer.masks))
        height, width = image.shape[:2]
        return {
            "image": str(job.path),
            "file": file_state(job.path),
            "stem": job.stem,
            "height": height,
            "width": width,
            "masks": answer.records,
        }

    def is_done(self, record: dict[str, Any] | None, settings: str, job: Job) -> bool:
        """Return whether an earlier run wrote all of this image with the same settings."""
        return (
            record is not None
            and record.get("settings") == settings
            and record.get("file") == file_state(job.path)
            and all((self.folder / name).is_file() for name in self.files_of(job))
        )


def _record_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("results.rank*.jsonl"))


def append_record(folder: Path, rank: int, record: dict[str, Any]) -> None:
    """Add one image to this rank's list."""
    append_line(folder / f"results.rank{rank}.jsonl", {**record, "written": time.time()})


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return image path -> record of earlier runs, finished and stopped; a line cut off by a stop is dropped.

    Of two records of one image, and of two images that wrote the same files, the later one counts.
    """
    records = _finished_records(folder)
    records += [record for path in _record_files(folder) for record in read_lines(path)]
    for key in ("image", "stem"):
        records.sort(key=lambda record: record.get("written", 0.0))
        records = list({record[key]: record for record in records}.values())
    return {record["image"]: record for record in records}


def _finished_records(folder: Path) -> list[dict[str, Any]]:
    path = folder / RESULTS
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text("utf-8"))
        _ = [(record["image"], record["stem"]) for record in records]
    except (ValueError, TypeError, KeyError):
        raise ModelError(f"{path} is not a list of results. Move it away, or give another folder") from None
    return records


def merge_records(folder: Path) -> None:
    """Write results.json from the earlier one and every rank's list, then remove the lists."""
    parts = _record_files(folder)
    if parts:
        records = read_records(folder)
        for record in records.values():
            record.pop("written", None)
        write_json(folder / RESULTS, [records[image] for image in sorted(records)])
        for path in parts:
            path.unlink()
