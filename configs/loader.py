"""Reads the YAML files of `configs/`."""

from functools import cache
from pathlib import Path
from typing import Any

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
