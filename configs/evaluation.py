"""Options of eval.py. The first block is the published command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import FlagCreatePairsOff

from utils.errors import TrainingError

from .inference import InferenceArgs


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Measure a model on data sets with phrases and masks."""

    version: str = "nano"
    """Checkpoint: a folder in the published EVF-SAM layout or of ours, a Hugging Face hub id, or a released name; by
    default the small model that comes with the repository, which knows synthetic scenes alone."""
    dataset_dir: str = "./dataset"
    """Folder of all data sets, laid out as published."""
    val_dataset: tuple[str, ...] = ("refcoco|unc|val",)
    """What to measure on, one or several: refcoco|unc|val, refcocog|umd|test, grefcoco|unc|val, ade20k|validation, ...;
    all (the eight published splits and their mean); your own .json or .jsonl file; or videos: ref_davis17,
    ref_youtube_vos, mevis, mevis|valid_u."""
    model_type: Literal["auto", "ori", "effi", "sam2", "efficientvit"] = "auto"
    """Kind of segmenter. The checkpoint says it itself; a value that disagrees is an error."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights; auto is fp16 on CUDA, as published, and fp32 elsewhere."""
    load_in_8bit: FlagCreatePairsOff[bool] = False
    """Quantise the encoder to 8 bit (needs bitsandbytes); the segmenter stays as it is."""
    load_in_4bit: FlagCreatePairsOff[bool] = False
    """Quantise the encoder to 4 bit (needs bitsandbytes)."""
    image_size: int | None = None
    """Side of the encoder's image (224 where published); must be what the encoder was trained with, as by default."""
    model_max_length: int = 512
    """Longest phrase in tokens."""
    vis_save_path: str | None = None
    """Taken for the sake of published commands; nothing is written there. --out writes pictures."""
    local_rank: int = 0
    """Which GPU, for launchers that pass it as an option; torchrun sets it by itself."""

    batch_size: int = 4
    """Images that one process works on at once, with all their phrases."""
    workers: int = 4
    """Processes that read images, per rank; 0 reads in the process itself."""
    out: str | None = None
    """Folder for metrics.json, phrases.jsonl (a line per phrase) and worst.png; several data sets get a folder each."""
    reference_metric: FlagCreatePairsOff[bool] = False
    """The arithmetic of the published eval.py, quirks included: float32 sums, overlaps of polygons as the value 2, and
    images counted twice where their number does not divide by the number of processes."""
    reference_world: int | None = None
    """With --reference_metric: as if there were this many processes; by default as many as there are."""
    empty_pixels: int | None = None
    """A prediction of fewer pixels counts as empty; by default 50 on gRefCOCO (the rule of GRES), elsewhere 1."""
    max_images: int | None = None
    """A quick look at this many images of each set, evenly spread; says that the numbers are not the split's."""
    skip_missing: FlagCreatePairsOff[bool] = False
    """Leave out images whose files are absent, and say how many, instead of stopping."""
    truncate: FlagCreatePairsOff[bool] = False
    """Cut phrases that are too long, with a warning, instead of refusing them."""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps; by default CUDA, then MPS, then the CPU."""
    compile: FlagCreatePairsOff[bool] = False
    """torch.compile the image encoder: slower to start, then faster; needs a C++ compiler."""
    max_pixels: int = 89_478_485
    """Refuse larger images, before they are decoded."""

    def check(self) -> None:
        """Refuse options that cannot work, before anything is opened.

        Raises:
            TrainingError: which one and why.
        """
        for name in ("batch_size", "reference_world", "empty_pixels", "max_images", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainingError(f"--{name} {value}: needed is at least 1")
        if self.load_in_8bit and self.load_in_4bit:
            raise TrainingError("--load_in_8bit and --load_in_4bit exclude each other. Give one")
        if self.workers < 0:
            raise TrainingError(f"--workers {self.workers}: needed is 0 or more")
        if not self.val_dataset:
            raise TrainingError('--val_dataset is empty. Name at least one, for example "refcoco|unc|val"')
        if self.reference_world and not self.reference_metric:
            raise TrainingError("--reference_world goes with --reference_metric. Give both, or neither")
        if self.reference_metric and self.max_images:
            raise TrainingError("--reference_metric is about whole splits. Leave --max_images out")
        if self.reference_metric and self.empty_pixels:
            raise TrainingError("--reference_metric has no --empty_pixels. Leave one of them out")
        for path in (Path(self.out), *Path(self.out).parents) if self.out else ():
            if path.exists() and not path.is_dir():
                raise TrainingError(f"--out {self.out}: {path} is a file. Give a folder")

    def settings(self, model: str, dtype: object) -> dict[str, Any]:
        """Return what the numbers depend on, for metrics.json: not on how many processes or workers there were."""
        return {
            "checkpoint": self.version,
            "model": model,
            "weights": str(dtype).removeprefix("torch."),
            "encoder_bits": 8 if self.load_in_8bit else 4 if self.load_in_4bit else None,
            "metric": "published" if self.reference_metric else "exact",
            "batch_size": self.batch_size,
        }

    def for_loading(self) -> InferenceArgs:
        """Return what loading a model reads, as inference.py has it."""
        return InferenceArgs(
            version=self.version,
            image_path="",
            prompt=(),
            precision=self.precision,
            model_type=self.model_type,
            image_size=self.image_size,
            model_max_length=self.model_max_length,
            load_in_8bit=self.load_in_8bit,
            load_in_4bit=self.load_in_4bit,
            device=self.device,
            compile=self.compile,
            truncate=self.truncate,
        )
