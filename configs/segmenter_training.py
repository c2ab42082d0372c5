"""Options of the trainings of a segmenter without phrases: distillation, and masks from boxes and points.

Values marked "ours" were never published for EfficientViT-SAM; the others are from its repository (arXiv 2402.05008).
"""

from dataclasses import dataclass

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
