"""Dataclasses of dataclasses from YAML, and back."""

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from utils.errors import TrainingError, nearest

T = TypeVar("T")


def read_config(kind: type[T], path: str | Path) -> T:
    """Return the configuration that a YAML file describes; what it leaves out keeps its default.

    Raises:
        TrainingError: no such file, not YAML, an unknown key (the nearest is named), or a value of another type.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = nearest(str(path), known) or f" There are: {', '.join(known) or 'none'}"
        raise TrainingError(f"no such configuration: {path}.{hint}")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    return from_values(kind, {} if values is None else values, str(path))


def from_values(kind: type[T], values: Any, where: str) -> T:
    """Return a dataclass from parsed YAML; see `read_config`."""
    if not isinstance(values, dict):
        raise TrainingError(f"{where} is {values!r}; needed are keys and values: {', '.join(_fields(kind))}")
    hints, known = get_type_hints(kind), _fields(kind)
    for key in values:
        if key not in known:
            raise TrainingError(f"{where}: unknown key {key!r}.{nearest(str(key), known)} Known: {', '.join(known)}")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def to_values(config: Any) -> Any:
    """Return the plain values of a configuration, for YAML or JSON: `from_values` reads them back."""
    if dataclasses.is_dataclass(config):
        return {name: to_values(getattr(config, name)) for name in _fields(type(config))}
    return [to_values(item) for item in config] if isinstance(config, tuple | list) else config


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML."""
    import yaml

    return yaml.safe_dump(to_values(config), sort_keys=False, allow_unicode=True)


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_values(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if origin is Literal:
        if value not in options:
            raise TrainingError(f"{where} is {value!r}. Allowed: {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        count = None if Ellipsis in options else len(options)
        if not isinstance(items, list) or count not in (None, len(items)):
            raise TrainingError(f"{where} is {value!r}; needed is a list{f' of {count}' if count else ''}")
        return tuple(_convert(options[0], item, where) for item in items)
    return _leaf(getattr(hint, "__origin__", hint), value, where)


def _leaf(kind: type, value: Any, where: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4, without a point, as text
        except (TypeError, ValueError):
            raise TrainingError(f"{where} is {value!r}; needed is a number") from None
    is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not is_right:
        names = {int: "a whole number", str: "text", bool: "true or false", float: "a number"}
        raise TrainingError(f"{where} is {value!r}; needed is {names[kind]}")
    return value
