"""Names for the masks of inference.py: where a vocabulary comes from, which model names, and what is shown of it."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs.inference import InferenceArgs
from configs.schema import ModelConfig, OVSAMConfig
from utils.class_lists import ClassList, listed_words, read_class_list
from utils.errors import ModelError, PromptError, VocabularyError
from utils.files import existing_path
from utils.precision import choose_dtype
from utils.visualize import with_legend, write_on_masks

from .checkpoints.load import find_source, load_model, resolve
from .checkpoints.ovsam import VOCABULARY_FILE
from .predictor import ImagePredictor
from .questions import Answer, Question, names_text, smallest_on_top

if TYPE_CHECKING:  # open_clip and torchvision: seconds that a model without names need not wait for
    from .named_predictor import OpenVocabularyPredictor
    from .vocabulary import Vocabulary

BUILT_IN = ("coco", "lvis")
"""Words that `--vocabulary` takes for a file of that name in the model's folder."""
FILES = {"coco": "instances_val2017.json", "lvis": "lvis_v1_val.json"}
"""Where the classes of a built-in vocabulary are published."""
_SUFFIXES = (".safetensors", ".txt", ".json", ".pth", ".pt")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Namer:
    """Which model names, and out of what: found, but not loaded.

    * `path`: of the model; `is_own`: it is that of `--version`, which made the masks.
    * `vocabulary`: a file of names and vectors, or names that its text tower is to encode.
    """

    path: Path
    config: ModelConfig
    vocabulary: Path | ClassList
    is_own: bool

    def read_vocabulary(self, device: torch.device) -> "Vocabulary":
        """Return the names and their vectors.

        Raises:
            VocabularyError, CheckpointError: see `read_vocabulary`, `make_vocabulary` and `load_text`.
        """
        from .checkpoints.clip import find_text, load_text
        from .vocabulary import make_vocabulary, read_vocabulary

        segmenter = self.config.segmenter
        if isinstance(self.vocabulary, Path):
            found = read_vocabulary(self.vocabulary)
            found.check_width(segmenter.embed_width)
            return found
        names = self.vocabulary.names
        logger.info("encoding %d names; tools/make_vocabulary.py makes a file that spares this", len(names))
        is_novel = None if self.vocabulary.rare is None else torch.tensor(self.vocabulary.rare)
        tower = load_text(segmenter, find_text(folder_of(self.path))).to(device)
        return make_vocabulary(tower, names, None if is_novel is None else ~is_novel, is_novel)

    def load(self, args: InferenceArgs, predictor: ImagePredictor) -> "OpenVocabularyPredictor":
        """Load the vocabulary and the model; the latter is shared where it made the masks.

        Raises:
            TextSAMError: as `read_vocabulary` and `load_model`.
        """
        from .named_predictor import OpenVocabularyPredictor

        device = predictor.model.device
        vocabulary = self.read_vocabulary(device)
        model = predictor
        if not self.is_own:
            dtype = choose_dtype(None if args.precision == "auto" else args.precision, device)
            model = load_model(self.path, device=device, dtype=dtype)
        return OpenVocabularyPredictor(model, vocabulary, branch=args.branch, roi_size=args.roi_size)


def check_naming(args: InferenceArgs) -> None:
    """Refuse options about names that cannot be, before anything is read.

    Raises:
        PromptError: which one and why.
    """
    for name in ("top_k", "roi_size"):
        if getattr(args, name) < 1:
            raise PromptError(f"--{name} {getattr(args, name)}: needed is at least 1")


def find_namer(args: InferenceArgs) -> Namer | None:
    """Return which model gives names, where the options ask for them; no weights are read.

    Raises:
        ModelError: the model that should names nothing. VocabularyError: no vocabulary, or none that can be.
    """
    if args.name_with is None and args.vocabulary is None:
        return None
    if args.name_with is None and args.engine is not None:
        raise ModelError("--vocabulary: an engine names nothing. Give --name_with an Open-Vocabulary SAM too")
    source = args.version if args.name_with is None else args.name_with
    path = find_source(source)
    config = resolve(path).config
    if not isinstance(config.segmenter, OVSAMConfig):
        raise ModelError(
            f"--vocabulary: {source} is {config.name}, which names nothing. Give --name_with an Open-Vocabulary SAM, "
            "which names the masks of any model"
            if args.name_with is None
            else f"--name_with {source} is {config.name}, which names nothing. Give an Open-Vocabulary SAM"
        )
    return Namer(path, config, find_vocabulary(args.vocabulary, path), args.name_with is None)


def own_namer(args: InferenceArgs, predictor: ImagePredictor) -> Namer | None:
    """Return a model as the one that names its own masks; None where it names nothing, or has no vocabulary.

    Raises:
        ModelError: then there are options about names.
    """
    config = predictor.model.config
    is_ovsam = isinstance(config.segmenter, OVSAMConfig) and args.engine is None
    path = find_source(args.version) if is_ovsam else None
    if is_ovsam and (folder_of(path) / VOCABULARY_FILE).is_file():
        return Namer(path, config, find_vocabulary(None, path), is_own=True)
    for name in ("top_k", "branch", "roi_size"):
        if getattr(args, name) != getattr(InferenceArgs, name):
            remedy = "--vocabulary" if is_ovsam else "--name_with an Open-Vocabulary SAM"
            raise ModelError(f"--{name} is about names, and masks get none. Give {remedy} too, or leave it out")
    if is_ovsam:
        logger.warning("%s has no %s, and no --vocabulary was given: masks get no names", args.version, VOCABULARY_FILE)
    return None


def folder_of(model: Path) -> Path:
    """Return the folder that a model's checkpoint is, or lies in."""
    return model if model.is_dir() else model.parent


def find_vocabulary(text: str | None, model: Path) -> Path | ClassList:
    """Return the vocabulary that `--vocabulary` names: a made file, or names to be encoded.

    Args:
        text: the option's value; None takes the file of the model's folder.
        model: the checkpoint of the model that names.

    Raises:
        VocabularyError: no such file or no names in it; words where the model has no text tower.
    """
    folder = folder_of(model)
    if text is None or text in BUILT_IN:
        path = folder / (VOCABULARY_FILE if text is None else f"{text}.safetensors")
        if not path.is_file():
            classes = "names.txt" if text is None else FILES[text]
            asked = f"--vocabulary {text}" if text else "no --vocabulary"
            raise VocabularyError(
                f"{asked}: there is no {path}. Make it: python -m tools.make_vocabulary --text {folder} --classes "
                f"{classes} --output {path}"
            )
        return path
    if not text.strip():
        raise VocabularyError("--vocabulary is empty. Give a file, coco, lvis, or words such as 'cat,dog'")
    path = Path(text)
    if path.suffix == ".safetensors":
        return path
    if path.suffix in (".pth", ".pt"):
        raise VocabularyError(
            f"--vocabulary {text} holds vectors without names. Give them names once: python -m tools.make_vocabulary "
            f"--published {text} --classes FILE --output {path.with_suffix('.safetensors')}"
        )
    is_file = path.suffix in _SUFFIXES or (existing_path(text) is not None and path.is_file())
    listed = read_class_list(path) if is_file else ClassList(listed_words(text))
    from .checkpoints.clip import find_text
    from .vocabulary import check_names

    try:
        check_names(listed.names)
    except VocabularyError as error:
        raise VocabularyError(f"--vocabulary {text}: {error}") from None
    if find_text(folder) is None:
        raise VocabularyError(
            f"--vocabulary {text}: {folder} has no text tower (text.safetensors or RN50x16.pt), so that it cannot read "
            "words. Add OpenAI's weights, or give a file of tools/make_vocabulary.py"
        )
    return listed


class Named(Question):
    """Another question, whose masks get names.

    Args:
        inner: what is asked; it finds the masks.
        namer: names them.
        is_own: they are its own, so that the image is not read again.
        top_k: names of each mask.
    """

    def __init__(self, inner: Question, namer: "OpenVocabularyPredictor", is_own: bool, top_k: int) -> None:
        self.inner, self.namer, self.is_own, self.top_k = inner, namer, is_own, top_k
        self.kind, self.count = inner.kind, inner.count

    @property
    def settings(self) -> list[Any]:
        """What the masks depend on; see `Question.settings`."""
        return self.inner.settings

    def ask(self, predictor: ImagePredictor, image: np.ndarray) -> Answer:
        """Return what is found, with `names` in each record: none where a mask is empty; see `Question.ask`."""
        answer = self.inner.ask(predictor, image)
        if not len(answer.masks):
            return answer
        if self.is_own and answer.low_res is not None:
            found = self.namer.name_low_res(answer.low_res, self.top_k)
        else:
            if not self.is_own:
                self.namer.set_image(image)
            found = self.namer.name_masks(answer.masks, self.top_k)
        rows = zip(answer.records, found.names, found.probabilities.tolist(), strict=True)
        records = [
            {
                **record,
                "names": [
                    {"name": name, "probability": round(chance, 6)}
                    for name, chance in zip(names, chances, strict=True)
                    if record["area"]
                ],
            }
            for record, names, chances in rows
        ]
        return replace(answer, records=records)

    def picture(self, image: np.ndarray, answer: Answer) -> np.ndarray:
        """Return a picture of all masks, the likeliest name in each."""
        texts, masks = [names_text(record, 1) for record in answer.records], answer.masks
        if self.count is None:  # of everything, what other masks leave to be seen
            masks = smallest_on_top(masks) == np.arange(1, len(masks) + 1)[:, None, None]
        return write_on_masks(self.inner.picture(image, answer), masks, texts)

    def mark(self, picture: np.ndarray, k: int, answer: Answer) -> np.ndarray:
        """Draw what asked for mask k, its likeliest name in it, and below the picture all of its names."""
        record = answer.records[k]
        marked = self.inner.mark(picture, k, answer)
        marked = write_on_masks(marked, answer.masks[k : k + 1], [names_text(record, 1)])
        return with_legend(marked, [names_text(record) or "nothing found"])
