"""From a hub id, folder, file or registry name to a model, strictly and without a second copy of the weights."""

import dataclasses
import importlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from configs.schema import BEiT3Config, ModelConfig, SAM2Config, from_mapping
from utils.errors import CheckpointError, ModelError
from utils.files import write_json
from utils.tokenizer import find_tokenizer

from ..encoders.beit3 import BEiT3
from ..evf import EVFModel
from ..registry import (
    FAMILIES,
    bundled_folder,
    find_config,
    hub_id,
    is_published_in_parts,
    list_models,
    model_config,
    published_file,
)
from ..segmenters.base import Segmenter
from . import evf_sam, ovsam
from .beit3 import BEIT3, PREFIX
from .files import Checkpoint, read_json, write_bin_shards, write_safetensors
from .rules import OURS, KeyMap, Section, check_keys, named_tensors
from .sam2 import VIDEO_KEYS

OUR_FORMAT = "textsam"
EXACT = ("positional_embedding", "position_matrix")
"""Ends of the names of tensors that keep the file's type when weights are cast."""

_SPECIAL = {
    "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>",
    "sep_token": "</s>", "unk_token": "<unk>",
}  # fmt: skip
TOKENIZER_SETTINGS = {
    "special_tokens_map.json": _SPECIAL,
    "tokenizer_config.json": _SPECIAL | {"model_max_length": 512, "padding_side": "right",
                                         "tokenizer_class": "XLMRobertaTokenizer"},
}  # fmt: skip
"""What transformers reads beside the sentencepiece file; written where a folder lacks it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A resolved checkpoint: where it is, what it is."""

    path: Path
    checkpoint: Checkpoint | ovsam.PartFiles
    config: ModelConfig
    sections: tuple[Section, ...]
    """How its keys map to ours."""


def build_model(config: ModelConfig, **segmenter_options: bool) -> EVFModel:
    """Build an architecture with fresh weights.

    Under `torch.device("meta")` nothing is allocated; `fill_model` then puts the weights in place.
    """
    return EVFModel(config, _build_segmenter(config, **segmenter_options), _build_encoder(config)).eval()


def _build_segmenter(config: ModelConfig, **options: bool) -> Segmenter:
    family = FAMILIES[config.family]
    module = importlib.import_module(f"model.segmenters.{family.module}")
    return getattr(module, family.class_name)(config.segmenter, **options)


def _build_encoder(config: ModelConfig) -> BEiT3 | None:
    if config.encoder is None:
        return None
    encoder = BEiT3(config.encoder)
    if encoder.text_embed.weight.device.type != "meta":
        encoder.init_weights()
    return encoder


def load_model(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pretrained: bool = True,
    segmenter_checkpoint: str | Path | None = None,
    encoder_checkpoint: str | Path | None = None,
) -> EVFModel:
    """Load a model.

    Args:
        source: a hub id, a folder in the published EVF-SAM layout, a folder of ours, a plain SAM, SAM-2 or EfficientSAM
            file (a model without phrases), or a registry name.
        device: where the weights go.
        dtype: floating-point type of the weights; None keeps the file's.
        pretrained: False builds a registry name with random weights.
        segmenter_checkpoint: SAM .pth, SAM-2 .pt or EfficientSAM .pt for the segmenter of a registry name.
        encoder_checkpoint: BEiT-3 .pth for the encoder of a registry name.

    Returns:
        the model in evaluation mode.

    Raises:
        ModelError: unknown name. CheckpointError: missing, unsafe, incomplete or ill-fitting weights.
    """
    device = torch.device(device)
    if segmenter_checkpoint or encoder_checkpoint or not pretrained:
        config = model_config(str(source))
        model = _with_parts(config, segmenter_checkpoint, encoder_checkpoint)
        return model.to(device=device, dtype=dtype)
    return fill_model(resolve(source), device, dtype)


def resolve(source: str | Path) -> Source:
    """Find a checkpoint and recognise what it is; nothing is read but headers.

    Raises:
        ModelError, CheckpointError: as `load_model`.
    """
    path = find_source(source)
    if path.is_file():
        return _plain_file(path)
    config_file = path / "config.json"
    if not config_file.is_file() and (files := ovsam.part_files(path)):
        parts = ovsam.PartFiles(files)
        parts.require_all()
        return _ovsam_source(path, parts)
    if not config_file.is_file():
        raise CheckpointError(
            f"{path} has no config.json. Needed is a folder in the published EVF-SAM layout "
            "(config.json, weights, tokenizer), one that TextSAM wrote, or a weights file"
        )
    stated = read_json(config_file)
    checkpoint = Checkpoint(path)
    if stated.get("format") == OUR_FORMAT:
        return Source(path, checkpoint, config_from_json(stated, str(config_file)), OURS)
    config = evf_sam.detect(stated, checkpoint.shapes, str(path))
    config = _with_video(config, checkpoint, "visual_model.")
    return Source(path, checkpoint, config, evf_sam.sections(config.family))


def find_source(source: str | Path) -> Path:
    """Return the local folder or file of a source; a hub id is downloaded, or taken from the hub's cache.

    Raises:
        ModelError: a registry name without published weights, or nothing of that name anywhere.
    """
    path = Path(source)
    if path.exists():
        return path
    name = str(source)
    if bundled := bundled_folder(name):
        return bundled
    if name in list_models():
        if file := published_file(name):
            if not file.is_file():
                raise CheckpointError(
                    f"{name} is looked for at {file}, which is not there. Download it, or pass its path"
                )
            return file
        if is_published_in_parts(name):
            raise ModelError(
                f"{name} was published in four files. Put them together (tools/assemble_ovsam.py), pass the folder"
            )
        repository = hub_id(name)
        if repository is None:
            raise ModelError(
                f"{name} has no published weights. Pass a checkpoint folder, or load the architecture with "
                "pretrained=False (random weights) or with segmenter_checkpoint= and encoder_checkpoint="
            )
        return _download(repository)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _download(name)
    if "/" in name or name.endswith((".pth", ".pt", ".safetensors", ".bin")):
        raise CheckpointError(f"no such checkpoint: {name}. Pass a folder, a file, a hub id or a name of list_models()")
    model_config(name)  # raises with the nearest names
    raise AssertionError(name)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.spm"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no folder {repository!r} here, and the Hugging Face hub did not give it ({reason}). "
            "Check the name or the connection, or pass the folder of a checkpoint you already have"
        ) from None


def _plain_file(path: Path) -> Source:
    checkpoint = Checkpoint(path, ("model", "state_dict"))
    family = evf_sam.family_of(checkpoint.shapes, "")
    if family is None:
        kind = "of no known format"
        if any(name.startswith(PREFIX) for name in checkpoint.shapes):
            kind = "BEiT-3 weights: pass them as encoder_checkpoint of a registry name"
        elif ovsam.is_part(checkpoint.shapes):
            kind = "one part of Open-Vocabulary SAM: put it together with the others by tools/assemble_ovsam.py"
        raise CheckpointError(
            f"{path} is {kind}. A model file is of SAM, SAM-2, EfficientSAM or EfficientViT-SAM; a folder of EVF-SAM"
        )
    config = find_config(family, *evf_sam.segmenter_shape(checkpoint.shapes, "", family), None)
    config = _with_video(config, checkpoint, "")
    return Source(path, checkpoint, config, (Section("segmenter.", "", evf_sam.SEGMENTERS[family].plain),))


def _ovsam_source(path: Path, parts: ovsam.PartFiles) -> Source:
    config = find_config("ovsam", *evf_sam.segmenter_shape(parts.shapes, "", "ovsam"), None)
    return Source(path, parts, config, (Section("segmenter.", "", ovsam.OVSAM),))


def assemble_ovsam(parts: ovsam.PartFiles) -> EVFModel:
    """Put Open-Vocabulary SAM together from published files, on the CPU in float32.

    Raises:
        CheckpointError: a part is missing, or does not fit the others.
    """
    parts.require_all()
    return fill_model(_ovsam_source(Path(parts.source), parts), torch.device("cpu"), None)


def _with_video(config: ModelConfig, checkpoint: Checkpoint, prefix: str) -> ModelConfig:
    """Return the configuration with the SAM-2 version and video parts that the tensors show."""
    if not isinstance(config.segmenter, SAM2Config):
        return config
    version = "2.1" if f"{prefix}no_obj_embed_spatial" in checkpoint.shapes else "2.0"
    has_video = any(name.startswith(f"{prefix}memory_") for name in checkpoint.shapes)
    if not has_video:
        unused = [name for name in checkpoint.shapes if name.removeprefix(prefix).startswith(VIDEO_KEYS)]
        checkpoint.leave_out(unused)
        rest = f" (of its other video parts {len(unused)} tensors stay unused)" if unused else ""
        logger.info("%s has no SAM-2 memory: images work, video does not%s", checkpoint.source, rest)
    if version != config.segmenter.version:
        name = config.segmenter_name.replace("sam2-", "sam2.1-")
        config = dataclasses.replace(config, segmenter_name=name)
    segmenter = dataclasses.replace(config.segmenter, version=version, has_video=has_video)
    return dataclasses.replace(config, segmenter=segmenter)


def fill_model(source: Source, device: torch.device, dtype: torch.dtype | None) -> EVFModel:
    """Build a model on the meta device and put a checkpoint's tensors in place.

    Raises:
        CheckpointError: a missing, extra or mis-shaped tensor.
    """
    model = build_on_meta(source.config)
    targets = named_tensors(model)
    key_map = KeyMap(targets, source.sections)
    fill_tensors(model, targets, key_map, source.checkpoint, device, dtype)
    with _NoInitialisation():
        model.segmenter.restore_buffers()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise RuntimeError(f"buffer {name} was neither stored nor restored")
        if buffer.device != device:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))
    return model


def build_on_meta(config: ModelConfig) -> EVFModel:
    """Build an architecture without weights, in evaluation mode."""
    with torch.device("meta"), _NoInitialisation():
        return build_model(config)


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device it computes nothing, but takes a third of the time to build a model."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def fill_tensors(
    model: nn.Module,
    targets: dict[str, Tensor],
    key_map: KeyMap,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Check names and shapes of a whole checkpoint first, then assign every tensor.

    Raises:
        CheckpointError: a missing, extra or mis-shaped tensor.
    """
    source = str(checkpoint.source)
    check_keys(key_map, checkpoint.shapes, source)
    wrong = []
    for name, theirs in key_map.theirs.items():
        expected = tuple(targets[name].shape)
        for their in theirs:
            needed = expected if len(theirs) == 1 else (1, *expected[1:])
            if checkpoint.shapes[their] != needed:
                wrong.append(f"{their} is {list(checkpoint.shapes[their])}, needed {list(needed)}")
    if wrong:
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(wrong)}. "
            "Download the checkpoint again, or name the architecture it was made for"
        )
    state: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, theirs in key_map.theirs.items():
        # Positions of points need more than 8 bits of mantissa; the matrix that codes them stays exact.
        kind = None if name.endswith(EXACT) or not targets[name].is_floating_point() else dtype
        rows = [checkpoint.read(their, device, kind) for their in theirs]
        tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
        if not tensor.is_floating_point() and targets[name].is_floating_point():
            raise CheckpointError(f"{source}: {theirs[0]} holds {tensor.dtype}, needed are floating-point numbers")
        state[name] = tensor.clone() if tensor.data_ptr() in storages else tensor
        storages.add(tensor.data_ptr())
    grads = {name: tensor.requires_grad for name, tensor in targets.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=grads[name])
        else:
            module._buffers[leaf] = tensor


def _with_parts(config: ModelConfig, segmenter: str | Path | None, encoder: str | Path | None) -> EVFModel:
    """Build a registry architecture with fresh weights and fill in the parts that have a checkpoint."""
    if segmenter is not None:
        part = _plain_file(_existing(segmenter))
        if (part.config.family, part.config.segmenter_name) != (config.family, config.segmenter_name):
            raise CheckpointError(
                f"{segmenter} is {part.config.segmenter_name}, but {config.name} needs {config.segmenter_name}"
            )
        config = dataclasses.replace(config, segmenter=part.config.segmenter)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    with meta if segmenter is not None else cpu:
        segmenter_module = _build_segmenter(config)
    with meta if encoder is not None else cpu:
        encoder_module = _build_encoder(config)
    model = EVFModel(config, segmenter_module, encoder_module).eval()
    if segmenter is not None:
        targets = {f"segmenter.{name}": tensor for name, tensor in named_tensors(model.segmenter).items()}
        fill_tensors(model, targets, KeyMap(targets, part.sections), part.checkpoint, cpu, None)
        model.segmenter.restore_buffers()
    if encoder is not None:
        if model.encoder is None:
            raise ModelError(
                f"{config.name} has no encoder; encoder_checkpoint goes with a name such as evf-{config.name}-base"
            )
        checkpoint = Checkpoint(_existing(encoder), ("model",))
        others = [name for name in checkpoint.shapes if not name.startswith(PREFIX)]
        checkpoint.leave_out(others)
        if others:
            logger.info("%s: %d tensors beside %s* are other heads and stay unused", encoder, len(others), PREFIX)
        targets = {f"encoder.{name}": tensor for name, tensor in named_tensors(model.encoder).items()}
        key_map = KeyMap(targets, (Section("encoder.", "", BEIT3),))
        fill_tensors(model, targets, key_map, checkpoint, cpu, None)
    return model


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise CheckpointError(f"no such checkpoint file: {path}. Check the path")
    return Path(path)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of our own folder layout."""
    return {"format": OUR_FORMAT, "version": 1, "name": config.name, "model": dataclasses.asdict(config)}


def config_from_json(stated: dict[str, Any], where: str) -> ModelConfig:
    """Return the architecture that our config.json describes.

    Raises:
        CheckpointError: a value is missing or unknown.
    """
    values, version = stated.get("model"), stated.get("version")
    if not isinstance(values, dict) or values.get("family") not in FAMILIES or version != 1:
        raise CheckpointError(
            f"{where}: needed are 'version' 1 (here {version!r}) and 'model' with a 'family' of {', '.join(FAMILIES)}"
        )
    try:
        segmenter = from_mapping(FAMILIES[values["family"]].config, values["segmenter"], f"{where}, segmenter")
        encoder = values.get("encoder") and from_mapping(BEiT3Config, values["encoder"], f"{where}, encoder")
        return from_mapping(ModelConfig, {**values, "segmenter": segmenter, "encoder": encoder}, where)
    except (ModelError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} cannot be read ({error}). Restore the file") from None


def save_model(
    model: EVFModel,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder of ours: config.json, model.safetensors and, where given, the tokenizer.

    Args:
        tensors: the weights, where they are not in the model itself (sharded over processes, or with LoRA).
    """
    _refuse_quantised(model)
    folder = Path(folder)
    write_safetensors(folder / "model.safetensors", named_tensors(model) if tensors is None else tensors)
    _copy_tokenizer(tokenizer, folder)
    write_json(folder / "config.json", config_to_json(model.config))


def save_published(
    model: EVFModel,
    folder: str | Path,
    tokenizer: str | Path | None = None,
    bin_shard_bytes: int | None = None,
) -> None:
    """Write a folder in the published EVF-SAM layout, which the published code loads.

    Args:
        bin_shard_bytes: write pytorch_model-*.bin shards of at most this size; None writes model.safetensors.

    Raises:
        ModelError: a quantised model, or one without an encoder.
    """
    _refuse_quantised(model)
    if model.encoder is None:
        raise ModelError(f"{model.config.name} has no encoder: the EVF-SAM layout holds whole models. Use save_model")
    if getattr(model.config.segmenter, "has_video", True) is False:
        logger.warning("%s has no video parts: the published code will miss them when it loads this", folder)
    folder = Path(folder)
    tensors = named_tensors(model)
    key_map = KeyMap(tensors, evf_sam.sections(model.config.family))
    published: dict[str, Tensor] = {}
    for name, theirs in key_map.theirs.items():
        rows = [tensors[name]] if len(theirs) == 1 else tensors[name].split(1)
        published.update(zip(theirs, rows, strict=True))
    if bin_shard_bytes is None:
        write_safetensors(folder / "model.safetensors", published)
    else:
        write_bin_shards(folder, published.items(), bin_shard_bytes)
    _copy_tokenizer(tokenizer, folder)
    write_json(folder / "config.json", evf_sam.published_config(model.config))


def _refuse_quantised(model: EVFModel) -> None:
    if model.quantized_bits is not None:
        raise ModelError(f"a model quantised to {model.quantized_bits} bit cannot be saved. Save it before quantising")


def _copy_tokenizer(source: str | Path | None, folder: Path) -> None:
    """Copy the sentencepiece file, and the two small files with which the published code finds it."""
    if source is None:
        return
    path = find_tokenizer(Path(source))
    folder.mkdir(parents=True, exist_ok=True)
    if path.resolve() != (folder / path.name).resolve():
        shutil.copyfile(path, folder / path.name)
    for name, content in TOKENIZER_SETTINGS.items():
        beside = path.parent / name
        if not beside.is_file():
            write_json(folder / name, content)
        elif beside.resolve() != (folder / name).resolve():
            shutil.copyfile(beside, folder / name)
