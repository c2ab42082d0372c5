"""Reads the YAML files of `configs/`."""

from functools import cache
from pathlib import Path
from typing import Any

from utils.errors import TrainingError

from .schema import BEiT3Config, SegmenterConfig, from_mapping

FOLDER = Path(__file__).parent


@cache
def read_yaml(relative: str) -> dict[str, Any]:
    """Return a YAML file of this folder, given as `model/sam.yaml`."""
    import yaml

    return yaml.safe_load((FOLDER / relative).read_text())


def encoder_configs() -> dict[str, BEiT3Config]:
    """Return every BEiT-3 scale by name."""
    return {
        name: from_mapping(BEiT3Config, values, f"configs/model/beit3.yaml, {name}")
        for name, values in read_yaml("model/beit3.yaml").items()
    }


def segmenter_configs(family: str, kind: type[SegmenterConfig]) -> dict[str, SegmenterConfig]:
    """Return every size of a segmenter family, from `model/<family>.yaml`, by name."""
    path = f"model/{family}.yaml"
    return {name: from_mapping(kind, values, f"configs/{path}, {name}") for name, values in read_yaml(path).items()}


def read_strategy(name: str) -> dict[str, Any]:
    """Return the content of `strategy/<name>.yaml`, or of the file that `name` is the path of.

    Raises:
        TrainingError: there is no such file, or it holds no keys.
    """
    import yaml

    known = sorted(path.stem for path in (FOLDER / "strategy").glob("*.yaml"))
    path = FOLDER / "strategy" / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise TrainingError(f"unknown strategy {name!r}. Known: {', '.join(known)}, or the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds no keys. Take a file of configs/strategy/ as an example")
    return content
