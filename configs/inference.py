"""Options of inference.py, and what inference_video.py shares. The first block is the published command line."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import FlagCreatePairsOff, UseAppendAction


@dataclass(frozen=True, kw_only=True)
class PhraseArgs:
    """Which model, what it looks at, and which phrases it answers."""

    version: str = "nano"
    """Checkpoint: a folder in the published EVF-SAM layout or of ours, a Hugging Face hub id, or a released name; by
    default the small model that comes with the repository, which knows synthetic scenes alone."""
    image_path: str
    """An image, a folder of images, or a quoted glob such as 'shots/**/*.jpg'."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """The phrase; give the option several times for several masks per image."""
    vis_save_path: str = "./infer"
    """Folder for pictures, masks and results.json."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights; auto is fp16 on CUDA and fp32 elsewhere. Falls back with a warning where a device cannot."""
    model_type: Literal["auto", "ori", "effi", "sam2", "efficientvit", "ovsam"] = "auto"
    """Kind of segmenter. The checkpoint says it itself; a value that disagrees is an error."""
    image_size: int | None = None
    """Side of the encoder's image (224 where published); must be what the encoder was trained with, as by default."""
    model_max_length: int = 512
    """Longest phrase in tokens."""
    load_in_8bit: FlagCreatePairsOff[bool] = False
    """Quantise the encoder to 8 bit (needs bitsandbytes); the segmenter stays as it is."""
    load_in_4bit: FlagCreatePairsOff[bool] = False
    """Quantise the encoder to 4 bit (needs bitsandbytes)."""
    local_rank: int = 0
    """Which GPU, for launchers that pass it as an option; torchrun sets it by itself."""

    device: str | None = None
    """cpu, cuda, cuda:1 or mps; by default CUDA, then MPS, then the CPU."""
    semantic: FlagCreatePairsOff[bool] = False
    """Ask for everything of a class (multitask checkpoints): prefixes '[semantic] '."""
    truncate: FlagCreatePairsOff[bool] = False
    """Cut phrases that are too long, with a warning, instead of refusing them."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Do again what an earlier run has done."""
    max_pixels: int = 89_478_485
    """Refuse larger images, before they are decoded."""


@dataclass(frozen=True, kw_only=True)
class InferenceArgs(PhraseArgs):
    """Segment images from phrases, points or boxes, or everything on them."""

    mode: Literal["text", "point", "box", "all"] | None = None
    """What is asked of an image; by default what is given. `all` is everything on it. But for text, the model must be a
    SAM, SAM-2, EfficientViT-SAM or Open-Vocabulary SAM."""
    point: UseAppendAction[tuple[str, ...]] = ()
    """x,y,label in pixels of the image; label 1 is on the object, 0 is not. Several points mean one object."""
    box: UseAppendAction[tuple[str, ...]] = ()
    """x1,y1,x2,y2 in pixels of the image; give the option several times for several masks."""
    multimask: FlagCreatePairsOff[bool] = False
    """Three masks per point or box, from a part to the whole."""
    points_per_side: int = 32
    """--mode all: points of the grid along each side."""
    pred_iou_thresh: float = 0.8
    """--mode all: least predicted IoU; 0 keeps every mask."""
    stability_score_thresh: float = 0.85
    """--mode all: least stability under a change of the threshold; 0 keeps every mask."""
    box_nms_thresh: float = 0.7
    """--mode all: masks whose boxes overlap more are one object."""
    crop_n_layers: int = 0
    """--mode all: so often the image is cut into 4, 16, ... parts, which are searched too."""
    min_mask_region_area: int = 100
    """--mode all: smaller islands go and smaller holes are filled, in pixels; 0 changes nothing."""

    vocabulary: str | None = None
    """Name the masks out of these names: words such as 'cat,dog' (wordings of one: 'cat/kitten,dog'); a file (.txt with
    a name a line, COCO's or LVIS's .json, .safetensors of tools/make_vocabulary); or coco or lvis, which stand for
    coco.safetensors and so on in the folder of the model that names. By default vocabulary.safetensors there."""
    name_with: str | None = None
    """Open-Vocabulary SAM that names the masks of --version, whatever asked for them; not needed where --version is one
    itself."""
    top_k: int = 5
    """Names of each mask, the likeliest first."""
    branch: Literal["head", "both"] = "head"
    """Who names: the trained head, or both that and CLIP itself, which may know names that the head does not."""
    roi_size: int = 12
    """Side of the grid that the head reads; 7 for what was published for LVIS."""

    save_mask: FlagCreatePairsOff[bool] = False
    """Also write <stem>_mask.png, 8 bit, 0 and 255; with --mode all <stem>_labels.png, 16 bit, a number per mask."""
    save_logits: FlagCreatePairsOff[bool] = False
    """Also write <stem>_logits.npy, float32 [H, W] at the image's size."""
    compile: FlagCreatePairsOff[bool] = False
    """torch.compile the image encoder: slower to start, then faster; needs a C++ compiler."""
    engine: str | None = None
    """Folder that export.py wrote, to run instead of --version."""
