"""Options of the trainings of a segmenter without phrases: distillation, masks from boxes and points, and names.

Values marked "ours" were never published for EfficientViT-SAM (arXiv 2402.05008) or, for names, Open-Vocabulary SAM
(arXiv 2401.02955); the others are from their repositories.
"""

from dataclasses import dataclass
from typing import Literal

from utils.errors import TrainingError


@dataclass(frozen=True)
class DistillArgs:
    """The first stage: learn the image embedding of a teacher on any images. All of it is ours, but for the loss."""

    teacher: str | None = None
    """Segmenter to learn from: a weights file (SAM .pth, SAM-2 .pt, EfficientSAM .pt, EfficientViT-SAM .pt), a folder,
    or a registry name with `teacher_checkpoint`. Set, this is what is trained: `model.name` is the student,
    `data.sets` are folders of images below `data.root`."""
    teacher_checkpoint: str | None = None
    """Weights file of a teacher that is given by its registry name."""
    take_decoder: bool = True
    """Give the student the teacher's prompt encoder and mask decoder where they have its shapes, so that it can be
    prompted at once."""
    features: str | None = None
    """Folder with the teacher's embeddings as Open-Vocabulary SAM's published dump has them, IMAGE_vit_h_cache.pth, one
    for each file name. What is missing is computed and kept there; without `teacher` all must be there. Nothing in
    such a file says which teacher made it."""

    @property
    def is_on(self) -> bool:
        """Whether this is what is trained."""
        return bool(self.teacher or self.features)

    def __post_init__(self) -> None:
        if self.features and not self.teacher and self.take_decoder:
            raise TrainingError(
                "distill.features without distill.teacher: there is no mask decoder to take. Give the teacher's "
                "weights too, or --distill.no_take_decoder"
            )
        if self.teacher_checkpoint and not self.teacher:
            raise TrainingError(
                "distill.teacher_checkpoint without distill.teacher. Give its name too, such as sam2-hiera-tiny"
            )


@dataclass(frozen=True)
class PromptArgs:
    """The second stage: masks from boxes and points, on images with many masks such as SA-1B."""

    masks: int = 0
    """Train on this many masks of each image (published: 64) instead of phrases; 0 is off. `data.sets` are then folders
    and .tar shards of SA-1B below `data.root`."""
    boxes: float = 0.5
    """Chance that the masks are prompted with their boxes; else with points on them."""
    points: int = 10
    """Most points of a mask; from 1 on, each number is as likely."""
    multimask: float = 0.5
    """Chance that the best of three masks learns; else the single mask does."""
    val_masks: int = 2
    """Masks of each image that are measured."""
    from_scratch: bool = False
    """Allow random weights, where no distilled checkpoint is given. Ours."""

    def __post_init__(self) -> None:
        if self.masks < 0:
            raise TrainingError(f"prompts.masks {self.masks}: needed is 0 (off) or a count such as 64")
        for name in ("boxes", "multimask"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"prompts.{name} {getattr(self, name)}: needed is a chance from 0 to 1")
        for name in ("points", "val_masks"):
            if getattr(self, name) < 1:
                raise TrainingError(f"prompts.{name} {getattr(self, name)}: needed is at least 1")


@dataclass(frozen=True)
class NameArgs:
    """The second stage of Open-Vocabulary SAM: masks and names of annotated things, from boxes and points."""

    vocabulary: str | None = None
    """Vocabulary of tools/make_vocabulary.py (.safetensors) that has every class of the annotations. Set, this is what
    is trained: `model.checkpoint` is the result of the first stage, `data.sets` are annotation files of COCO or LVIS
    below `data.root`. Of names that it counts as novel, or neither as base nor as novel, nothing is trained on."""
    kind: Literal["coco", "lvis"] = "coco"
    """Layout of the annotation files: lvis has frequencies, and paths of images in `coco_url`."""
    images: str = ""
    """Folder of the images, below `data.root`, such as train2017. Of LVIS it holds train2017/ and val2017/."""
    val_images: str | None = None
    """The same for `val.sets`, below `val.root`; by default as `images`."""
    proposals: int = 40
    """Prompts of an image: its instances, repeated or drawn. The first half, and one more, are boxes, the others
    points."""
    resize: tuple[float, float] = (0.9, 2.0)
    """An image is resized to between these times the input's side, then cut. Published for LVIS: 0.1 to 2."""
    least_pixels: int = 32
    """Instances with fewer pixels of the input are left out."""
    val_prompt: Literal["box", "point"] = "box"
    """What prompts the masks that are measured: the annotated box, or the point in the middle of the mask. Ours."""

    def __post_init__(self) -> None:
        for name in ("proposals", "least_pixels"):
            if getattr(self, name) < 1:
                raise TrainingError(f"names.{name} {getattr(self, name)}: needed is at least 1")
        if not 0 < self.resize[0] <= self.resize[1] <= 10:
            raise TrainingError(f"names.resize {list(self.resize)}: needed are two factors such as 0.9 2.0, at most 10")
