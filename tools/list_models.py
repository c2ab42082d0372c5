"""Print the registry: python -m tools.list_models 'evf-sam2*'."""

from dataclasses import dataclass

from tyro.conf import Positional

from configs.cli import parse
from utils.errors import run_main


@dataclass(frozen=True)
class Args:
    """Print the names of the model registry."""

    pattern: Positional[str] = "*"
    """Shell pattern, quoted."""


def main() -> int:
    """Print one name per line, with what it is."""
    args = parse(Args, "tools/list_models.py")
    from model.registry import hub_id, list_models, model_config

    for name in list_models(args.pattern):
        config = model_config(name)
        weights = f"  weights: {hub_id(name)}" if hub_id(name) else ""
        print(
            f"{name:40} {config.segmenter_name}{' + BEiT-3 ' + config.encoder_name if config.encoder else ''}{weights}"
        )
    return 0


if __name__ == "__main__":
    run_main(main)
