"""A folder with the graphs of a model, `engine.json` that describes them, and the tokenizer: read, and run as a model.

`engine.json` holds the model's configuration, how images are prepared, names, shapes and SHA-256 of every graph, and
how far each was seen to differ from the model.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from configs.schema import ModelConfig
from utils.errors import CheckpointError, ModelError, PromptError
from utils.precision import choose_device
from utils.tokenizer import PhraseTokenizer

from ..checkpoints.files import read_json
from ..checkpoints.load import build_on_meta, config_from_json
from ..evf import EVFModel
from ..predictor import ImagePredictor, build_predictor
from ..types import EncoderOutput, ImageFeatures, MaskPrediction, Prompts
from .graphs import CORNERS
from .verify import Runner

FORMAT, VERSION = "textsam-engine", 1
DESCRIPTION = "engine.json"
MAX_DESCRIPTION = 4 << 20
"""Bytes that an engine.json may have."""


@dataclass(frozen=True)
class Engine:
    """What an engine.json says.

    * `runtime`: `onnx`, `pt2` or `tensorrt`; `config`: of the model; `single_mask`: the decoder returns one mask.
    * `graphs`: name -> file; `tokenizer`: file, None where the engine takes points alone.
    """

    path: Path
    runtime: str
    config: ModelConfig
    single_mask: bool
    graphs: Mapping[str, Path]
    tokenizer: Path | None

    @property
    def takes_phrases(self) -> bool:
        """Whether it answers phrases; if not, points and boxes."""
        return self.config.encoder is not None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_engine(path: str | Path) -> Engine:
    """Read and check an engine's description and the hashes of its files; no graph is loaded.

    Raises:
        CheckpointError: not an engine, incomplete, or a file is not the one that was exported.
    """
    folder = Path(path)
    description = folder / DESCRIPTION
    if not description.is_file():
        raise CheckpointError(
            f"{folder} is not an engine: it has no {DESCRIPTION}. Make one: python export.py --version MODEL --out DIR"
        )
    if description.stat().st_size > MAX_DESCRIPTION:
        raise CheckpointError(
            f"{description} has {description.stat().st_size:,} bytes: it is no description. Restore it"
        )
    stated = read_json(description)
    if stated.get("format") != FORMAT or stated.get("version") != VERSION:
        raise CheckpointError(
            f"{description}: format {stated.get('format')!r} version {stated.get('version')!r}, needed is {FORMAT!r} "
            f"version {VERSION}. Export the model again"
        )
    config = config_from_json(stated, str(description))
    try:
        files = {str(name): str(digest) for name, digest in stated["files"].items()}
        graphs = {name: folder / stated["graphs"][name]["file"] for name in _graph_names(config)}
        tokenizer = None if config.encoder is None else folder / stated["tokenizer"]
        engine = Engine(folder, str(stated["runtime"]), config, bool(stated["single_mask"]), graphs, tokenizer)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{description} lacks {error}. Export the model again") from None
    needed = [*graphs.values(), *([tokenizer] if tokenizer else [])]
    for file in needed:
        if file.name not in files or file.parent != folder:
            raise CheckpointError(f"{description} names {file}, but no SHA-256 of it. Export the model again")
    for name, digest in files.items():
        _check_file(folder, name, digest)
    return engine


def _graph_names(config: ModelConfig) -> tuple[str, ...]:
    return ("image_encoder", "decoder") if config.encoder is None else ("image_encoder", "fusion", "decoder")


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if path.parent != folder or not path.is_file():
        raise CheckpointError(f"{folder} has no file {name!r}, which its {DESCRIPTION} names. Export the model again")
    if sha256(path) != digest:
        raise CheckpointError(f"{path} is not the file that was exported: its SHA-256 differs. Export the model again")


class EngineModel(EVFModel):
    """Runs an engine where a model is expected; what has no weights (sizes, choice of the mask) is the model's own.

    An engine of points takes them, and the corners of boxes, where a model takes the tokens of prompts: its sparse
    prompts are float [N, P, 3], x y label.

    Args:
        runners: graph name -> what runs it.
    """

    def __init__(self, engine: Engine, runners: Mapping[str, Runner]) -> None:
        empty = build_on_meta(engine.config)
        with torch.device("meta"):
            super().__init__(engine.config, empty.segmenter, empty.encoder)
        self.eval()
        self._runners, self._single_mask = runners, engine.single_mask
        segmenter = self.segmenter
        segmenter.encode_image = self._encode_image
        segmenter.decode = self._decode_phrases if engine.takes_phrases else self._decode_points
        segmenter.prompt_kinds = frozenset() if engine.takes_phrases else frozenset({"points", "boxes"})
        segmenter._encode_prompts = self._points_of
        if engine.single_mask:
            segmenter.masks_per_prompt = 1
            segmenter.select_for_prompts = lambda prediction, is_ambiguous: prediction.iou.argmax(dim=1)

    @property
    def device(self) -> torch.device:
        """Where the graphs take and give their tensors."""
        return torch.device("cpu")

    def _encode_image(self, pixels: Tensor) -> ImageFeatures:
        first, *finer = self._runners["image_encoder"](pixels)
        return ImageFeatures(first, tuple(finer))

    def encode_phrases(
        self,
        pixels: Tensor,
        ids: Tensor,
        padding: Tensor | None = None,
        image_index: Tensor | None = None,
        **asked: bool,
    ) -> tuple[Tensor, EncoderOutput]:
        """Return the prompt embedding of each phrase, float [N, 256]; see `EVFModel.encode_phrases`.

        Raises:
            PromptError: the encoder is asked to say more, which needs the model itself.
        """
        if any(asked.values()):
            raise PromptError(f"an engine cannot say {', '.join(sorted(asked))}. Load the model itself")
        padding = torch.zeros_like(ids, dtype=torch.bool) if padding is None else padding
        (prompts,) = self._runners["fusion"](pixels, ids, padding, _index(image_index, len(pixels), len(ids)))
        return prompts, EncoderOutput(None)

    def _decode_phrases(
        self, features: ImageFeatures, sparse: Tensor, dense: Tensor | None = None, image_index: Tensor | None = None
    ) -> MaskPrediction:
        index = _index(image_index, len(features), len(sparse))
        return MaskPrediction(*self._runners["decoder"](features.embedding, sparse[:, 0], index, *features.high_res))

    def _decode_points(
        self, features: ImageFeatures, sparse: Tensor, dense: Tensor | None = None, image_index: Tensor | None = None
    ) -> MaskPrediction:
        index = _index(image_index, len(features), len(sparse))
        masks, iou = [], []
        order = torch.cat([(index == i).nonzero()[:, 0] for i in range(len(features))])
        for i in index.unique().tolist():
            one, points = features[i], sparse[index == i]
            found = self._runners["decoder"](one.embedding, points[..., :2], points[..., 2], *one.high_res)
            masks.append(found[0])
            iou.append(found[1])
        back = order.argsort()
        return MaskPrediction(torch.cat(masks)[back], torch.cat(iou)[back])

    def _points_of(self, prompts: Prompts) -> tuple[Tensor, None]:
        parts = []
        if prompts.points is not None:
            parts.append(torch.cat([prompts.points, prompts.labels[..., None].to(prompts.points.dtype)], dim=-1))
        if prompts.boxes is not None:
            corners = prompts.boxes.unflatten(1, (2, 2))
            labels = torch.tensor(CORNERS).view(1, 2, 1).expand(len(corners), -1, -1)
            parts.append(torch.cat([corners, labels], dim=-1))
        return torch.cat(parts, dim=1), None


def _index(image_index: Tensor | None, images: int, prompts: int) -> Tensor:
    """Return the image of each prompt, int64 [N], where a caller may leave it out."""
    if image_index is not None:
        return image_index
    return torch.zeros(prompts, dtype=torch.long) if images == 1 else torch.arange(prompts)


def runner_of(runtime: str, path: Path, device: torch.device) -> Runner:
    """Load a graph.

    Raises:
        MissingPackageError: its runtime is absent. CheckpointError: an unknown runtime, or not a graph of it.
        ModelError: the runtime cannot use the device, or runs elsewhere.
    """
    if runtime == "onnx":
        from .onnx import OnnxRunner

        return OnnxRunner(path, device)
    if runtime == "pt2":
        from .pt2 import Pt2Runner

        return Pt2Runner(path, device)
    if runtime == "tensorrt":
        raise ModelError(f"{path.parent} is built for TensorRT, which runs it; here run onnx and pt2. Export as one")
    raise CheckpointError(f"{path.parent / DESCRIPTION}: unknown runtime {runtime!r}. Export the model again")


def load_engine(
    source: str | Path | Engine,
    device: torch.device | str = "cpu",
    max_length: int = 512,
    overlong: Literal["error", "truncate"] = "error",
) -> ImagePredictor:
    """Load an engine as a predictor; see `load_predictor`.

    Args:
        source: its folder, or what `read_engine` said of it.

    Raises:
        TextSAMError: it cannot be used.
    """
    engine = source if isinstance(source, Engine) else read_engine(source)
    device = choose_device(str(device))
    words = None
    if engine.tokenizer is not None:
        words = PhraseTokenizer(engine.tokenizer, min(max_length, engine.config.encoder.max_text_tokens), overlong)
    runners = {name: runner_of(engine.runtime, file, device) for name, file in engine.graphs.items()}
    return build_predictor(EngineModel(engine, runners), words)
