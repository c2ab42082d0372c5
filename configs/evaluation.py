"""Options of eval.py. The first block is EVF-SAM's published command line, the last EfficientViT-SAM's."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tyro.conf import FlagCreatePairsOff

from utils.errors import TrainingError

from .inference import InferenceArgs

_OF_PHRASES = (
    "dataset_dir", "val_dataset", "load_in_8bit", "load_in_4bit", "image_size", "model_max_length", "vis_save_path",
    "empty_pixels", "skip_missing", "truncate",
)  # fmt: skip
_OF_PROMPTS = (
    "prompt_type", "num_click", "image_root", "annotation_json_file", "source_json_file", "vocabulary", "branch",
    "roi_size", "base", "novel",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Measure a model on data sets with phrases and masks, or a segmenter with points and boxes on COCO and LVIS."""

    version: str = "nano"
    """Checkpoint: a folder in the published EVF-SAM layout or of ours, a Hugging Face hub id, or a released name; by
    default the small model that comes with the repository, which knows synthetic scenes alone."""
    dataset_dir: str = "./dataset"
    """Folder of all data sets, laid out as published."""
    val_dataset: tuple[str, ...] = ("refcoco|unc|val",)
    """What to measure on, one or several: refcoco|unc|val, refcocog|umd|test, grefcoco|unc|val, ade20k|validation, ...;
    all (the eight published splits and their mean); your own .json or .jsonl file; or videos: ref_davis17,
    ref_youtube_vos, mevis, mevis|valid_u."""
    model_type: Literal["auto", "ori", "effi", "sam2", "efficientvit", "ovsam"] = "auto"
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
    images counted twice where their number does not divide by the number of processes. Of names, the published
    evaluation: CLIP sees the annotated boxes, with points in pixels that do not fit its input."""
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

    dataset: Literal["coco", "lvis"] | None = None
    """Measure a segmenter with points or boxes instead of phrases: any SAM, SAM-2 or EfficientViT-SAM model, also that
    inside an EVF model; of Open-Vocabulary SAM the names of the masks too. --precision auto is fp32 then."""
    prompt_type: Literal["box", "point", "box_from_detector"] = "box"
    """The annotated boxes, simulated clicks (both: mean IoU), or the boxes of a detector (average precision)."""
    num_click: int | None = None
    """Clicks per object, each where the mask was most wrong so far; by default 1."""
    image_root: str | None = None
    """Folder of the images; for LVIS the one above train2017 and val2017."""
    annotation_json_file: str | None = None
    """The annotations: instances_val2017.json, lvis_v1_val.json, or your own in one of these formats."""
    source_json_file: str | None = None
    """What the detector found: a COCO list of results, with image_id, category_id, bbox and score."""

    vocabulary: str | None = None
    """Names to choose from, as in inference.py; they must be those of the annotations. By default coco.safetensors (or
    lvis) in the model's folder, else vocabulary.safetensors there, else the categories of the annotations."""
    branch: Literal["head", "both"] = "both"
    """Who names: the trained head, or both that and CLIP itself, as published."""
    roi_size: int | None = None
    """Side of the grid that the head reads; by default 12 on COCO and 7 on LVIS, as published."""
    base: str | None = None
    """Class list (.txt or .json) of the names that the model was trained with; by default as the vocabulary says, or
    on LVIS the common and frequent ones."""
    novel: str | None = None
    """The same of those that it was not trained with, but may answer. Names of neither count in the means of all."""

    def check(self) -> None:
        """Refuse options that cannot work, before anything is opened.

        Raises:
            TrainingError: which one and why.
        """
        for name in (
            "batch_size",
            "reference_world",
            "empty_pixels",
            "max_images",
            "max_pixels",
            "num_click",
            "roi_size",
        ):
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
        self._check_prompts()
        for path in (Path(self.out), *Path(self.out).parents) if self.out else ():
            if path.exists() and not path.is_dir():
                raise TrainingError(f"--out {self.out}: {path} is a file. Give a folder")

    def _check_prompts(self) -> None:
        """Refuse options for phrases beside --dataset, those for points and boxes without, and what is missing."""
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for name in given:
            if self.dataset and name in _OF_PHRASES:
                raise TrainingError(f"--{name} is for phrases, --dataset for points and boxes. Leave one of them out")
            if not self.dataset and name in _OF_PROMPTS:
                raise TrainingError(f"--{name} goes with --dataset coco or --dataset lvis. Give both, or neither")
        if not self.dataset:
            return
        for name in ("annotation_json_file", "image_root"):
            if name not in given:
                raise TrainingError(f"--dataset {self.dataset} needs --{name}. Give it")
        if self.num_click and self.prompt_type != "point":
            raise TrainingError(f"--num_click goes with --prompt_type point, not {self.prompt_type}. Leave it out")
        if self.prompt_type == "box_from_detector" and not self.source_json_file:
            raise TrainingError("--prompt_type box_from_detector needs --source_json_file with the detector's boxes")
        if (self.base is None) != (self.novel is None):
            raise TrainingError("--base goes with --novel. Give both, or neither")
        if self.source_json_file and self.prompt_type != "box_from_detector":
            raise TrainingError("--source_json_file goes with --prompt_type box_from_detector. Give both, or neither")

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
