"""Distillation: a student learns the image embedding of a teacher (the first stage of EfficientViT-SAM).

The published repository has its result alone; arXiv 2402.05008 says: the L2 distance between the embeddings.
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import EfficientSAMConfig, OVSAMConfig, SAM2Config
from configs.segmenter_training import DistillArgs
from utils.errors import ModelError, TrainingError
from utils.feature_cache import FeatureCache, FlatFeatures, digest_of
from utils.image import ImageSpec

from .checkpoints.load import load_model
from .checkpoints.rules import rename
from .evf import EVFModel
from .freeze import Probe, leave_out_unreached
from .ovsam_start import fit_decoder, fit_efficient_sam

SAM2_DECODER = ("sam2.prompt_encoder.", "sam2.mask_decoder.")
SAM2_ALONE = (".conv_s", ".obj_score_token", ".pred_obj_score_head")
"""What SAM does not have: fine levels, and whether there is an object."""
SAM2_TO_SAM = (
    (r"^sam2\.", ""),
    (r"(attn\w*)\.o_proj\.", r"\1.out_proj."),
    (r"(transformer\.layers\.\d+\.mlp)\.proj_in\.", r"\1.lin1."),
    (r"(transformer\.layers\.\d+\.mlp)\.proj_out\.", r"\1.lin2."),
)

logger = logging.getLogger(__name__)


class DistillStep(nn.Module):
    """A student with its loss: what engines wrap, as `model.training.TrainingStep` for phrases."""

    def __init__(self, model: EVFModel) -> None:
        super().__init__()
        self.model = model

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the student's image embedding, [B, 256, h, w], of pixels [B, 3, S, S]."""
        return self.model.segmenter.embed_image(pixels)

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Return `compare` of the student's embedding of pixels [B, 3, S, S] and the teacher's, [B, 256, h', w']."""
        embedding = self.embed(pixels).float()
        return self.compare(embedding, self.fit_grid(target.float(), embedding))

    @staticmethod
    def fit_grid(target: Tensor, embedding: Tensor) -> Tensor:
        """Return a target [B, C, h', w'] on the grid of an embedding, bilinear and antialiased where they differ.

        Raises:
            ModelError: they have different channels.
        """
        if target.shape[1] != embedding.shape[1]:
            raise ModelError(
                f"the teacher's embedding has {target.shape[1]} channels, the student's {embedding.shape[1]}"
            )
        if target.shape == embedding.shape:
            return target
        return F.interpolate(target, embedding.shape[-2:], mode="bilinear", align_corners=False, antialias=True)

    @staticmethod
    def compare(embedding: Tensor, target: Tensor) -> Tensor:
        """Return how far embeddings are from their targets, float32 [B, 3]; gradients are of the first column alone.

        The mean squared error; the norm of the difference relative to that of the target; the cosine of the angle
        between the channels of both, -1 to 1, a mean over places.

        Args:
            embedding, target: float32 [B, C, h, w].
        """
        squares = (embedding - target).square().flatten(1)
        with torch.no_grad():
            relative = squares.sum(1).sqrt() / target.flatten(1).norm(dim=1).clamp(min=1e-12)
            cosine = F.cosine_similarity(embedding, target, dim=1).flatten(1).mean(1)
        return torch.stack([squares.mean(1), relative, cosine], dim=1)


class Teacher:
    """A segmenter whose image embedding is learned.

    It sees an image as the student does, letterboxed or squeezed, so that both embeddings show the same place at the
    same place; in all else it is prepared as its own release does.

    Args:
        model: with a segmenter; it moves to where batches are. None where `cache` holds all that is needed.
        student_spec: how the student sees an image.
        precision: of the arithmetic, which is part of the cache's name.
        cache: folder of features, or the features themselves, or None.
    """

    def __init__(
        self,
        model: EVFModel | None,
        student_spec: ImageSpec,
        precision: str,
        cache: str | FlatFeatures | None = None,
    ) -> None:
        self.model = model and model.eval().requires_grad_(False)
        self.spec = replace(model.segmenter.own_image_spec, resize=student_spec.resize) if model else student_spec
        self.cache = FeatureCache(cache, self._digest(precision)) if isinstance(cache, str) else cache

    def _digest(self, precision: str) -> str:
        segmenter = self.model.segmenter
        tensors = segmenter.state_dict().items()
        encoder = ((name, tensor) for name, tensor in tensors if segmenter.part_of(name) == "image_encoder")
        return digest_of(encoder, "embedding", self.spec, self.model.config.segmenter, precision)

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """Return the embedding [B, 256, h, w] of pixels [B, 3, S, S] that `spec` made."""
        return self.model.to(pixels.device).segmenter.embed_image(pixels.to(self.model.dtype))

    def targets(self, batch: Any) -> Tensor:
        """Return the embeddings of a `datasets.images.ImageBatch`; what the cache lacked is computed and stored.

        Those of a cache are rounded to its type also when they are new: a run does not depend on whether it was warm.

        Raises:
            TrainingError: they differ in shape.
        """
        fresh = batch.teacher_pixels
        # Nothing in a file of a dump says in which precision it was made: that is always float32.
        exact = (
            torch.autocast(fresh.device.type, enabled=False) if isinstance(self.cache, FlatFeatures) else nullcontext()
        )
        if len(fresh):
            with exact:
                fresh = self.embed(fresh)
        if self.cache is None:
            return fresh
        fresh = fresh.to(self.cache.dtype)
        missing = [name for name, known in zip(batch.feature_names, batch.features, strict=True) if known is None]
        for name, row in zip(missing, fresh, strict=True):
            self.cache.write(name, {"embedding": row})
        computed = iter(fresh)
        rows = [next(computed) if known is None else known["embedding"] for known in batch.features]
        for key, row in zip(batch.keys, rows, strict=True):
            if row.shape != rows[0].shape:
                raise TrainingError(
                    f"the embedding of {batch.keys[0]} is {list(rows[0].shape)}, that of {key} {list(row.shape)}: they "
                    "are of different teachers. Dump them again, into an empty folder"
                )
        return torch.stack(rows)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the arguments of `DistillStep.forward` for a batch on its device."""
        return batch.pixels, self.targets(batch)


def load_teacher(args: DistillArgs, student: EVFModel, precision: str, cache: str | None) -> Teacher:
    """Load the teacher of a distillation, in float32 on the CPU.

    Raises:
        ModelError: unknown name, or no weights. CheckpointError: they cannot be used.
    """
    if args.features:
        cache = FlatFeatures(args.features, is_complete=args.teacher is None)
    if args.teacher is None:
        return Teacher(None, student.segmenter.own_image_spec, precision, cache)
    if args.teacher_checkpoint:
        model = load_model(args.teacher, segmenter_checkpoint=args.teacher_checkpoint, dtype=torch.float32)
    else:
        model = load_model(args.teacher, dtype=torch.float32)
    return Teacher(model, student.segmenter.own_image_spec, precision, cache)


def take_decoder(student: EVFModel, teacher: EVFModel) -> bool:
    """Copy the teacher's prompt encoder and mask decoder where they have the student's names and shapes.

    Open-Vocabulary SAM makes one mask of a prompt: it takes what a SAM has for its first, and what fits of an
    EfficientSAM. Of a SAM-2 others take what SAM has too.

    Returns:
        whether they have.
    """
    own, theirs = (_decoder_tensors(model) for model in (student, teacher))
    if isinstance(teacher.config.segmenter, SAM2Config) and not isinstance(student.config.segmenter, SAM2Config):
        theirs = _as_sam(theirs)
    if isinstance(student.config.segmenter, OVSAMConfig):
        is_sam = not isinstance(teacher.config.segmenter, EfficientSAMConfig)
        own, theirs = (fit_decoder if is_sam else fit_efficient_sam)(own, theirs)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in theirs.items()}:
        logger.warning(
            "the prompt encoder and mask decoder of %s do not fit %s: they stay as they were. The result has to learn "
            "masks before it can be prompted: the second stage, prompts.masks",
            teacher.config.name,
            student.config.name,
        )
        return False
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(theirs[name])
    return True


def _as_sam(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what SAM's prompt encoder and mask decoder can take of SAM-2's, by the names of SAM's."""
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(SAM2_DECODER) or any(part in name for part in SAM2_ALONE):
            continue
        name = rename(name, SAM2_TO_SAM)
        if name == "prompt_encoder.point_embed.weight":
            renamed |= {f"prompt_encoder.point_embed.{i}.weight": row[None] for i, row in enumerate(tensor)}
        else:
            renamed[name] = tensor
    logger.info(
        "SAM-2's mask decoder is taken without its object token and fine levels: let prompts.masks make up for it"
    )
    return renamed


def _decoder_tensors(model: EVFModel) -> Mapping[str, Tensor]:
    segmenter = model.segmenter
    tensors = segmenter.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if segmenter.part_of(name) != "image_encoder"}


def prepare_student(model: EVFModel) -> Probe:
    """Let the gradient into the image encoder alone, as far as the embedding depends on it.

    Raises:
        ModelError: it has a phrase encoder.
    """
    refuse_phrases(model)
    model.requires_grad_(False)
    for name, parameter in model.segmenter.named_parameters():
        parameter.requires_grad_(model.segmenter.part_of(name) == "image_encoder")
    return leave_out_unreached(model, _read_embedding)


def _read_embedding(shapes: EVFModel) -> list[Tensor]:
    side = shapes.segmenter.image_spec.size
    if isinstance(shapes.config.segmenter, SAM2Config):
        logger.warning(
            "of %s the embedding alone is distilled: what makes its finer levels learns nothing", shapes.config.name
        )
    return [shapes.segmenter.embed_image(torch.empty(1, 3, side, side, device="meta"))]


def refuse_phrases(model: EVFModel) -> None:
    """Refuse a model with phrases.

    Raises:
        ModelError: it has a phrase encoder.
    """
    if model.encoder is not None:
        raise ModelError(
            f"{model.config.name} has an encoder for phrases, which this training would not touch. Train the segmenter "
            f"alone: --model.name {model.config.segmenter_name}"
        )
