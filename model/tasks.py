"""The kinds of training as train.py needs them: phrases, clips, distillation, boxes and points, or names."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.schema import OVSAMConfig
from configs.training import ModelArgs, TrainConfig
from utils.distributed import Ranks
from utils.embedding_validation import EmbeddingValidation
from utils.errors import TrainingError
from utils.feature_cache import FeatureCache
from utils.image import ImageSpec
from utils.known_names import read_known_names
from utils.mask_validation import MaskValidation
from utils.name_validation import NameValidation
from utils.tokenizer import PhraseTokenizer
from utils.validation import open_validation

from .checkpoints.load import find_source, load_model, save_model
from .checkpoints.ovsam import VOCABULARY_FILE
from .distill_step import DistillStep, load_teacher, prepare_student, refuse_phrases, take_decoder
from .evf import EVFModel
from .freeze import PartReport, report
from .ovsam_start import set_positions, take_clip
from .prompt_step import PromptStep, prepare_prompted, prompt_inputs, published_names
from .training import (
    build_step,
    lora_tensors,
    model_tensors,
    open_cache,
    open_inputs,
    optimizer_groups,
    prepare_model,
    restore,
)
from .video import VideoPredictor

if TYPE_CHECKING:  # open_clip: a second that trainings without names need not wait for
    from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)

OpenValidation = Callable[[Any, Path, Ranks], Callable[[nn.Module, int], dict[str, float]]]


@dataclass(frozen=True)
class Task:
    """What is trained, and how its batches are made, read and measured.

    * `step`: the model with its loss, which engines wrap; its `model` is what is saved.
    * `parts`: what of it is trained; `outside`: parameters that are read without a call of the module that owns them.
    * `save`: (folder, whole weights) writes a model that inference loads.
    * `inputs`: a batch on the device -> the arguments of `step`.
    * `open_validation`: (sets, folder of the run, ranks) -> what measures `step`.
    * `spec`: how the segmenter sees an image; `other_spec`: how the encoder of phrases or a teacher does.
    * `prompt_side`: of the frame that boxes and points are placed on, in pixels, or 0.
    """

    step: nn.Module
    parts: list[PartReport]
    save: Callable[[Path, Mapping[str, Tensor]], None]
    inputs: Callable[[Any], tuple[Any, ...]]
    open_validation: OpenValidation
    spec: ImageSpec
    other_spec: ImageSpec | None = None
    outside: list[str] = field(default_factory=list)
    tokenizer: PhraseTokenizer | None = None
    cache: FeatureCache | None = None
    prompt_side: int = 0

    @property
    def model(self) -> EVFModel:
        """The model without its loss."""
        return self.step.model

    def extra_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the whole weights that `save` does not write."""
        return lora_tensors(tensors)

    def optimizer_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Return the groups of AdamW."""
        names = None
        if config.optim.decay == "names":
            names = published_names(self.model.segmenter, self.model.config.family)
        return optimizer_groups(self.step, config.optim, names)


def open_task(
    config: TrainConfig, strategy: Mapping[str, Any], checkpoint: Path | None, state: Mapping[str, Any]
) -> Task:
    """Build what a configuration asks for, on the CPU, with the weights of a checkpoint of the run where there is one.

    Args:
        strategy: as `utils.engine.build_engine`.
        state: what was saved with the checkpoint; its `extra` is read.

    Raises:
        TextSAMError: a checkpoint, name, tokenizer or option cannot be used.
    """
    opened = {"phrases": _phrases, "clips": _phrases, "distill": _distill, "prompts": _prompts, "names": _names}[
        config.kind
    ]
    return opened(config, strategy, lambda step: restore(step, checkpoint, state["extra"]) if checkpoint else None)


def _phrases(config: TrainConfig, strategy: Mapping[str, Any], resume: Callable[[nn.Module], None]) -> Task:
    """Return the training of a whole EVF-SAM, on images or clips."""
    trained = prepare_model(config.model, config.loss, config.data)
    step = build_step(trained.model, config.loss, config.data)
    resume(step)
    cache = open_cache(step, config.data.feature_cache, config.optim.precision, strategy)
    inputs = open_inputs(step, cache)
    follow = partial(VideoPredictor, tokenizer=trained.tokenizer)

    def validation(sets: Any, folder: Path, ranks: Ranks) -> Any:
        return open_validation(sets, cache and inputs.features, follow, config.val.max_images, folder, ranks)

    return Task(
        step=step,
        parts=trained.parts,
        save=trained.save,
        inputs=inputs,
        open_validation=validation,
        spec=step.spec,
        other_spec=trained.model.encoder.image_spec,
        outside=trained.outside,
        tokenizer=trained.tokenizer,
        cache=cache,
    )


def _distill(config: TrainConfig, strategy: Mapping[str, Any], resume: Callable[[nn.Module], None]) -> Task:
    """Return the training of a student's image encoder by a teacher."""
    model, text = load_segmenter(config.model), {}
    is_named = isinstance(model.config.segmenter, OVSAMConfig)
    if is_named:
        text = prepare_named(model, config.model)
    elif config.model.clip_checkpoint:
        raise TrainingError(f"{model.config.name} is not built on a CLIP. Leave model.clip_checkpoint out")
    probe = prepare_student(model)
    teacher = load_teacher(config.distill, model, config.optim.precision, config.data.feature_cache)
    if config.distill.take_decoder:
        take_decoder(model, teacher.model)
    if is_named:
        set_positions(model, teacher.model)
    step = DistillStep(model)
    resume(step)
    return Task(
        step=step,
        parts=report(model, probe.idle),
        save=partial(save_segmenter, model, text=text),
        inputs=teacher,
        open_validation=partial(EmbeddingValidation, teacher),
        spec=model.segmenter.own_image_spec,
        other_spec=teacher.spec,
        outside=[f"model.{name}" for name in probe.outside],
        cache=teacher.cache,
    )


def _prompts(config: TrainConfig, strategy: Mapping[str, Any], resume: Callable[[nn.Module], None]) -> Task:
    """Return the training of a segmenter on boxes and points."""
    args = config.model
    if not (args.checkpoint or args.segmenter_checkpoint or config.prompts.from_scratch):
        raise TrainingError(
            "prompts.masks trains a segmenter further, but no weights are given. Give the distilled one, "
            "--model.checkpoint runs/NAME/best, or its weights file; --prompts.from_scratch starts from random weights"
        )
    model = load_segmenter(args)
    refuse_phrases(model)
    probe = prepare_prompted(model, config.loss)
    step = PromptStep(model, config.loss)
    resume(step)
    spec = replace(model.segmenter.own_image_spec, filter="torch-antialias")  # of training alone, as published
    return Task(
        step=step,
        parts=report(model, probe.idle),
        save=partial(save_segmenter, model),
        inputs=prompt_inputs,
        open_validation=MaskValidation,
        spec=spec,
        outside=[f"model.{name}" for name in probe.outside],
        prompt_side=model.segmenter.prompt_spec(spec).size,
    )


def _names(config: TrainConfig, strategy: Mapping[str, Any], resume: Callable[[nn.Module], None]) -> Task:
    """Return the training of what names regions, and of its mask decoder."""
    from .name_step import NameStep, named_inputs, prepare_named_step
    from .vocabulary import read_vocabulary

    args = config.model
    if not args.checkpoint:
        raise TrainingError(
            "names.vocabulary trains the second stage of Open-Vocabulary SAM, but the result of the first is not "
            "given. Give its folder, --model.checkpoint runs/NAME/best"
        )
    model = load_segmenter(args)
    probe = prepare_named_step(model)
    vocabulary, known = read_vocabulary(config.names.vocabulary), read_known_names(config.names.vocabulary)
    vocabulary.check_width(model.config.segmenter.embed_width)
    text = prepare_named(model, args)
    step = NameStep(model, vocabulary, config.loss.points)
    resume(step)
    return Task(
        step=step,
        parts=report(model, probe.idle),
        save=partial(save_segmenter, model, text=text, vocabulary=vocabulary),
        inputs=named_inputs,
        open_validation=partial(NameValidation, known),
        spec=model.segmenter.own_image_spec,
        outside=[f"model.{name}" for name in probe.outside],
    )


def load_segmenter(args: ModelArgs) -> EVFModel:
    """Load a segmenter alone, or build it with random weights, in float32 on the CPU.

    Raises:
        TextSAMError: a checkpoint or name cannot be used.
    """
    if args.checkpoint:
        return load_model(find_source(args.checkpoint), dtype=torch.float32)
    if not args.name:
        raise TrainingError("model.name is empty. Give a segmenter such as efficientvit-sam-l0")
    return load_model(args.name, segmenter_checkpoint=args.segmenter_checkpoint, pretrained=False)


def prepare_named(model: EVFModel, args: ModelArgs) -> dict[str, Tensor]:
    """Put CLIP's ResNet into Open-Vocabulary SAM, unless its checkpoint has it; return CLIP's text tower, {} if absent.

    Raises:
        TrainingError: no CLIP is given. CheckpointError: it cannot be used.
    """
    text = _read_clip(model, args)
    if not text:
        logger.warning("no text tower of CLIP was given: the result can only use vocabulary files, not words")
    return text


def _read_clip(model: EVFModel, args: ModelArgs) -> dict[str, Tensor]:
    from .checkpoints.clip import find_text, read_text

    if args.checkpoint:
        found = find_text(find_source(args.checkpoint))
        return read_text(found) if found else {}
    if not args.clip_checkpoint:
        raise TrainingError(
            f"{model.config.name} is built on a CLIP, which is never trained, but none is given. Give OpenAI's "
            "weights, --model.clip_checkpoint RN50x16.pt, or a model to go on from, --model.checkpoint"
        )
    return take_clip(model, args.clip_checkpoint)


def save_segmenter(
    model: EVFModel,
    folder: Path,
    tensors: Mapping[str, Tensor],
    text: Mapping[str, Tensor] = MappingProxyType({}),
    vocabulary: "Vocabulary | None" = None,
) -> None:
    """Write a folder that `load_model`, inference.py and the mask generator take.

    Args:
        text: CLIP's text tower, which goes with a model that gives names.
        vocabulary: the names that it was trained with.
    """
    if text:
        from .checkpoints.clip import save_text

        save_text(folder, text)
    if vocabulary is not None:
        from .vocabulary import save_vocabulary

        save_vocabulary(folder / VOCABULARY_FILE, vocabulary)
    save_model(model, folder, tensors=model_tensors(model, tensors))
