"""What is optimised: one forward for all images and phrases of a batch, and its loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from configs.training import DataArgs, LossArgs, ModelArgs, OptimArgs
from utils.errors import CheckpointError, MissingPackageError, TrainingError
from utils.feature_cache import FeatureCache, digest_of
from utils.tokenizer import PhraseTokenizer

from .checkpoints.files import Checkpoint
from .checkpoints.load import find_source, load_model, save_model
from .checkpoints.rules import OURS, KeyMap, check_keys, named_tensors
from .clip_step import ClipStep
from .evf import EVFModel
from .freeze import DEFAULT_LOSS, IMAGES, PartReport, Probe, choose_trained, leave_out_idle, part_of, report
from .losses import contrast_losses, iou_losses, mask_losses, place_losses, point_losses, pointing_losses
from .types import ImageFeatures


class TrainingStep(nn.Module):
    """A model with its loss: what DDP, FSDP and DeepSpeed wrap, and call with the fields of a batch."""

    def __init__(self, model: EVFModel, loss: LossArgs) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.spec = model.segmenter.image_spec.for_evaluation()
        parts = {model.segmenter.part_of(name) for name, p in model.segmenter.named_parameters() if p.requires_grad}
        self.has_frozen_images = "image_encoder" not in parts
        """Whether the image encoder is not trained, so that its features never change."""

    def train(self, mode: bool = True) -> "TrainingStep":
        """Switch to training or evaluation; an image encoder that is frozen stays in evaluation."""
        super().train(mode)
        if self.has_frozen_images:
            for module in self.model.segmenter.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """Return the features of images, without a graph where the image encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_frozen_images):
            return self.model.segmenter.encode_image(pixels)

    def forward(
        self,
        image: Tensor | ImageFeatures,
        encoder_pixels: Tensor,
        ids: Tensor,
        padding: Tensor,
        image_index: Tensor,
        masks: Sequence[Tensor],
    ) -> Tensor:
        """Return the losses of each phrase, float32 [N, L], in the order of `LossArgs.terms`.

        Args:
            image: segmenter pixels float [B, 3, S, S], or features.
            encoder_pixels, ids, padding, image_index: as `EVFModel.forward`.
            masks: per image uint8 [n_i, H_i, W_i] of 0, 1 and 255 (does not count), in the order of the phrases.
        """
        counts, columns, asked = [len(part) for part in masks], [], self.loss.asked()
        features, said, prompt = None, None, None
        if self.loss.needs_masks or self.loss.regions:
            features = image if isinstance(image, ImageFeatures) else self.encode_images(image)
        if self.loss.needs_masks:
            output = self.model(features, encoder_pixels, ids, padding, image_index, **asked)
            images = self.full_size(output.logits, image_index, masks) if self.loss.iou or not self.loss.points else []
            columns.append(self.losses(output.logits, images, masks))
            said, prompt = output.encoder, output.prompt
        elif self.loss.needs_fused:
            prompt, said = self.model.encode_phrases(encoder_pixels, ids, padding, image_index, **asked)
        elif self.loss.needs_encoder:
            said = self.model.encoder(encoder_pixels, ids, padding, image_index, fused=False, **asked)
        if self.loss.pointing:
            pairs = zip(said.fit.split(counts), masks, strict=True)
            columns.append(torch.cat([pointing_losses(*pair) for pair in pairs])[:, None])
        if self.loss.contrast:
            columns.append(contrast_losses(said.words, said.patches, image_index, masks)[:, None])
        if self.loss.prompt or self.loss.regions:
            shares = torch.cat([self.model.segmenter.region_shares(part) for part in masks])
            cells = self.model.segmenter.cell_codes()
        if self.loss.prompt:
            columns.append(place_losses(prompt, shares, cells)[:, None])
        if self.loss.regions:
            columns.append(self.region_losses(features, shares @ cells, image_index, masks))
        if self.loss.iou:
            triples = zip(output.scores.split(counts), images, masks, strict=True)
            columns.append(torch.cat([iou_losses(*triple) for triple in triples])[:, None])
        return torch.cat(columns, dim=1)

    def region_losses(
        self, features: ImageFeatures, codes: Tensor, image_index: Tensor, masks: Sequence[Tensor]
    ) -> Tensor:
        """Return the sum of cross-entropy and dice where the prompts are `codes` [N, 256], float32 [N, 1]."""
        segmenter = self.model.segmenter
        prediction = segmenter.decode(features, codes[:, None].to(features.embedding.dtype), None, image_index)
        logits, _ = prediction.chosen(segmenter.select(prediction))
        images = [] if self.loss.points else self.full_size(logits, image_index, masks)
        return self.losses(logits, images, masks).sum(1, keepdim=True)

    def losses(self, logits: Tensor, images: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Return cross-entropy and dice, float32 [N, 2].

        Args:
            logits: low-resolution logits [N, 4h, 4w], which points are sampled from.
            images: those of `full_size`, which are read where no points are asked for.
        """
        if self.loss.points:
            pairs = zip(logits.split([len(part) for part in masks]), masks, strict=True)
            return torch.cat([point_losses(part, truth, self.spec, self.loss.points) for part, truth in pairs])
        return torch.cat([mask_losses(part, truth) for part, truth in zip(images, masks, strict=True)])

    def full_size(self, logits: Tensor, image_index: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits at the size of the masks, per image [n_i, H_i, W_i]."""
        return self.model.segmenter.postprocess(logits, [tuple(part.shape[-2:]) for part in masks], image_index)


@dataclass(frozen=True)
class Trainable:
    """A model that is ready to train, its words, and what of it is trained."""

    model: EVFModel
    tokenizer: PhraseTokenizer
    parts: list[PartReport]
    outside: list[str]
    """Names, in a `TrainingStep`, of parameters that are read without a call of the module that owns them."""

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a folder that `load_model` and inference.py take; `tensors` are as `model_tensors` takes them."""
        save_model(self.model, folder, self.tokenizer.path, model_tensors(self.model, tensors))


def prepare_model(args: ModelArgs, loss: LossArgs = DEFAULT_LOSS, data: DataArgs = IMAGES) -> Trainable:
    """Load or build a model on the CPU in float32 and freeze what is not trained.

    Args:
        loss: says which parts get a gradient.
        data: says whether it is trained on images or clips.

    Raises:
        TextSAMError: a checkpoint, name or tokenizer cannot be used.
    """
    path = args.tokenizer
    if args.checkpoint:
        source = find_source(args.checkpoint)
        model = load_model(source, dtype=torch.float32)
        path = path or str(source)
    else:
        model = load_model(
            args.name,
            segmenter_checkpoint=args.segmenter_checkpoint,
            encoder_checkpoint=args.encoder_checkpoint,
            pretrained=False,
        )
    if args.phrases_from:
        source = find_source(args.phrases_from)
        take_phrases(model, load_model(source, dtype=torch.float32), args.phrases_from)
        path = path or str(source)
    if path is None:
        raise TrainingError(
            "model.tokenizer is not set. Give the sentencepiece file that the encoder was trained with (beit3.spm)"
        )
    choose_trained(model, args, data)
    tokenizer = PhraseTokenizer(path, min(args.max_length, model.encoder.config.max_text_tokens), "truncate")
    if tokenizer.vocab_size > model.encoder.config.vocab_size:
        raise TrainingError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, but the encoder's table "
            f"{model.encoder.config.vocab_size}. Take the tokenizer that the encoder was trained with"
        )
    idle = partial(leave_out_idle, model, loss, data)
    probe = add_lora(model, args.lora_rank, args.lora_alpha, idle) if args.lora_rank else idle()
    model.encoder.gradient_checkpointing = args.gradient_checkpointing
    if data.clip_frames:
        set_memory_dropout(model.segmenter.sam2, args.memory_dropout)
    return Trainable(model, tokenizer, report(model, probe.idle), [f"model.{name}" for name in probe.outside])


def set_memory_dropout(sam2: nn.Module, share: float) -> None:
    """Set the dropout of SAM 2's memory attention."""
    for module in sam2.memory_attention.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif hasattr(module, "dropout_p"):
            module.dropout_p = share


def take_phrases(model: EVFModel, other: EVFModel, name: str) -> None:
    """Copy what understands phrases, and how places are coded, from another model.

    Args:
        name: what errors call the other.

    Raises:
        CheckpointError: it has no encoder, or one of another size.
    """
    if other.encoder is None or other.encoder.config != model.encoder.config:
        raise CheckpointError(
            f"{name} is {other.config.name}: its encoder does not fit {model.config.name}. Give a checkpoint with "
            f"BEiT-3 {model.config.encoder_name}"
        )
    model.encoder.load_state_dict(other.encoder.state_dict())
    model.projector.load_state_dict(other.projector.state_dict())
    with torch.no_grad():
        model.segmenter.position_matrix.copy_(other.segmenter.position_matrix)


def add_lora(model: EVFModel, rank: int, alpha: float, find_idle: Callable[[], Probe]) -> Probe:
    """Put trainable low-rank updates (arXiv 2106.09685) on the encoder's linear layers, its weights frozen.

    Args:
        find_idle: `leave_out_idle` of the model; layers that no gradient reaches get no updates.

    Raises:
        MissingPackageError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingPackageError("model.lora_rank needs peft. Run: pip install peft") from None

    model.encoder.requires_grad_(True)
    probe = find_idle()
    linear = [name for name, module in model.encoder.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if f"encoder.{name}.weight" not in probe.idle]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear), model.encoder)
    return probe


def model_tensors(model: EVFModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors by the names it has without LoRA, the low-rank updates added to the weights.

    Args:
        tensors: of a `TrainingStep`, as an engine gathers them: names begin with `model.`.
    """
    scales = {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    kept = set(named_tensors(model))  # of two names of one tensor, the first
    result = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("model.")
        if name not in kept or ".lora_" in name:
            continue
        owner, is_base, leaf = name.partition(".base_layer.")
        if is_base and leaf == "weight":
            down, up = (tensors[f"model.{owner}.lora_{side}.default.weight"] for side in "AB")
            tensor = tensor + (up @ down) * scales[owner]
        result[name.replace(".base_layer.", ".")] = tensor
    return result


def lora_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the low-rank updates among the tensors of a `TrainingStep`: a saved model holds their sum alone."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_" in name}


def restore(step: TrainingStep | ClipStep, folder: Path, extra: Mapping[str, Tensor]) -> None:
    """Load the weights of a checkpoint of a run into its model, before an engine wraps it.

    With LoRA the frozen weights stay as they were loaded: the saved ones have the updates in them.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    checkpoint = Checkpoint(folder)
    own = {name.removeprefix("model."): tensor for name, tensor in step.state_dict(keep_vars=True).items()}
    if extra:
        own = {name: tensor for name, tensor in own.items() if tensor.requires_grad and ".lora_" not in name}
    else:
        check_keys(KeyMap(named_tensors(step.model), OURS), checkpoint.shapes, str(folder))
    with torch.no_grad():
        for name in own.keys() & checkpoint.shapes.keys():
            own[name].copy_(checkpoint.read(name, torch.device("cpu"), None))
        if {name: tensor.shape for name, tensor in extra.items()} != {
            name: tensor.shape for name, tensor in step.named_parameters() if ".lora_" in name
        }:
            raise CheckpointError(f"{folder} was trained with another model.lora_rank. Give the same")
        for name, tensor in extra.items():
            step.get_parameter(name).copy_(tensor)


def build_step(model: EVFModel, loss: LossArgs, data: DataArgs = IMAGES) -> TrainingStep | ClipStep:
    """Return a model with its loss, over clips or images.

    Raises:
        ModelError: clips, and a model without memory.
    """
    return ClipStep(model, loss, data.clip_masks) if data.clip_frames else TrainingStep(model, loss)


class BatchInputs:
    """Turns a batch into the arguments of `TrainingStep.forward`; with a cache, image features are made only once.

    The features of a cache are rounded to its type also when they are new: what a run learns does not depend on whether
    the cache was warm.
    """

    def __init__(self, step: TrainingStep, cache: FeatureCache | None = None) -> None:
        self.step, self.cache = step, cache

    def __call__(self, batch: Any) -> tuple[Any, ...]:
        """Return the arguments for a `datasets.sample.Batch` on the model's device."""
        image = batch.pixels if self.cache is None else self.features(batch)
        padding = batch.padding if batch.padding.any() else None
        return image, batch.encoder_pixels, batch.ids, padding, batch.image_index, batch.masks

    @torch.no_grad()
    def features(self, batch: Any) -> ImageFeatures:
        """Return the features of all images, computing and storing those that the cache did not have."""
        fresh: list[Mapping[str, Tensor]] = []
        if len(batch.pixels):
            computed = self.step.model.segmenter.encode_image(batch.pixels).tensors()
            fresh = [
                {name: rows[i].to(self.cache.dtype) for name, rows in computed.items()}
                for i in range(len(batch.pixels))
            ]
        missing = [name for name, cached in zip(batch.feature_names, batch.features, strict=True) if cached is None]
        for name, tensors in zip(missing, fresh, strict=True):
            self.cache.write(name, tensors)
        computed_rows = iter(fresh)
        rows = [next(computed_rows) if cached is None else cached for cached in batch.features]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return ImageFeatures.from_tensors(stacked).to(dtype=self.step.model.dtype)


class ClipInputs:
    """Turns a batch of clips into the arguments of `ClipStep.forward`."""

    features = None

    def __call__(self, batch: Any) -> tuple[Any, ...]:
        """Return the arguments for a `datasets.clips.ClipBatch` on the model's device."""
        padding = batch.padding if batch.padding.any() else None
        return batch.pixels, batch.encoder_pixels, batch.ids, padding, batch.clip_index, batch.masks


def open_inputs(step: TrainingStep | ClipStep, cache: FeatureCache | None) -> BatchInputs | ClipInputs:
    """Return what turns batches into the arguments of a step."""
    return ClipInputs() if isinstance(step, ClipStep) else BatchInputs(step, cache)


def open_cache(
    step: TrainingStep | ClipStep,
    folder: str | None,
    precision: str,
    strategy: Mapping[str, Any] = MappingProxyType({}),
) -> FeatureCache | None:
    """Return the feature cache of a model, or None where no folder is given.

    Raises:
        TrainingError: the image encoder is trained, so that its features change, or its weights are shared out.
    """
    if folder is None:
        return None
    stage = strategy.get("config", {}).get("zero_optimization", {}).get("stage")
    if strategy.get("kind") == "fsdp" or stage == 3:
        raise TrainingError(
            "data.feature_cache needs the whole image encoder on every process. Use --run.strategy ddp or zero2"
        )
    if not step.has_frozen_images:
        raise TrainingError("data.feature_cache needs a frozen image encoder: leave model.train_image_encoder out")
    return FeatureCache(folder, feature_digest(step.model, precision))


def feature_digest(model: EVFModel, precision: str) -> str:
    """Return the name of a model's image features: of the weights, preprocessing and arithmetic that make them."""
    segmenter = model.segmenter
    tensors = segmenter.state_dict().items()
    encoder = ((name, tensor) for name, tensor in tensors if segmenter.part_of(name) == "image_encoder")
    return digest_of(encoder, segmenter.image_spec.for_evaluation(), model.config.segmenter, precision)


def optimizer_groups(
    step: nn.Module, args: OptimArgs, published: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return AdamW's groups: both encoders with their own learning rates, and weight decay for some of the weights.

    Args:
        step: with a `model` that is trained.
        published: the segmenter's names -> those of its published checkpoint. Given, all decays but what those call
            norm or bias; else what `optim.decay` says.
    """
    plain = plain_norms(step) if args.decay == "layers" else None
    scales = {"encoder": args.encoder_lr_scale, "image_encoder": args.image_lr_scale}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for full_name, parameter in step.named_parameters():
        if parameter.requires_grad:
            name = full_name.removeprefix("model.")
            rate = args.lr * scales.get(part_of(step.model, name), 1.0)
            theirs = None if published is None else published.get(name.removeprefix("segmenter."), name)
            decays = parameter.ndim > 1 if theirs is None else not ("norm" in theirs or "bias" in theirs)
            decays = decays if plain is None else full_name not in plain
            groups.setdefault((rate, args.weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]


def plain_norms(module: nn.Module) -> set[str]:
    """Return the names of the weights of torch's own norm layers; SAM's norm over channels is none of them."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return {
        f"{owner}.{name}"
        for owner, part in module.named_modules()
        if isinstance(part, kinds) and getattr(part, "data_format", None) != "channels_first"
        for name, _ in part.named_parameters(recurse=False)
    }
