"""inference.py with an engine instead of a checkpoint."""

from configs.inference import InferenceArgs
from utils.errors import ModelError
from utils.tokenizer import semantic_phrase

from ..predictor import ImagePredictor
from .engine import load_engine, read_engine

REFUSED = ("version", "precision", "model_type", "image_size", "load_in_8bit", "load_in_4bit", "compile")
"""Options about the weights of a model, which an engine does not have; fp32 is what it has."""


def load_for(args: InferenceArgs) -> ImagePredictor:
    """Load what `--engine` names.

    Raises:
        TextSAMError: it cannot be used, does not answer phrases, or other options do not go with it.
    """
    defaults = InferenceArgs(image_path=args.image_path, prompt=args.prompt)
    for name in REFUSED:
        value = getattr(args, name)
        if value != getattr(defaults, name) and (name, value) != ("precision", "fp32"):
            raise ModelError(f"--engine and --{name} exclude each other: an engine is what it was exported as")
    engine = read_engine(args.engine)
    if args.prompt and not engine.takes_phrases:
        raise ModelError(
            f"--engine {args.engine} is {engine.config.name}, which takes points, not --prompt. Export an EVF-SAM model"
        )
    predictor = load_engine(
        engine, args.device or "cpu", args.model_max_length, "truncate" if args.truncate else "error"
    )
    for phrase in args.prompt:
        predictor.tokenizer.encode(semantic_phrase(phrase) if args.semantic else phrase)
    return predictor
