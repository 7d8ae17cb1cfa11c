"""Conversion of configs to plain JSON data and back. `kind` names the class if a field admits several."""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxwalk.config._checked import ConfigError, unknown
from jaxwalk.config._model import AggregateConfig, MLPConfig, RopeScaling
from jaxwalk.config._run import TextData, WorldData

_KINDS = {c.__name__: c for c in (MLPConfig, WorldData, TextData, *typing.get_args(RopeScaling))}
_FAMILIES: dict[str, Callable[[str], type]] = {}


def register_family(prefix: str, find: Callable[[str], type]) -> None:
    """Let `from_dict` read kinds of the form "prefix.name", where `find` maps the name to its config class.

    A package above `config` with one config class per file calls this on import.
    """
    _FAMILIES[prefix] = find


def to_dict(config: Any) -> Any:
    """The config as plain JSON data, including fields that have their default value."""
    if isinstance(config, AggregateConfig):
        return {"kind": f"aggregates.{config.name}", **_fields(config)}
    if type(config).__name__ in _KINDS:
        return {"kind": type(config).__name__, **_fields(config)}
    if dataclasses.is_dataclass(config):
        return _fields(config)
    if isinstance(config, tuple | list):
        return [to_dict(c) for c in config]
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    return config


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type, data: Mapping[str, Any]) -> Any:
    """The config of class `cls` from data written by `to_dict`.

    Raises:
        ConfigError: if a field or kind is unknown, naming the closest known one, or a value is impossible.
    """
    data = dict(data)
    data.pop("kind", None)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in data:
        if name not in names:
            raise ConfigError(unknown(f"field of {getattr(cls, 'name', cls.__name__)}", name, names))
    try:
        return cls(**{name: _value(hints[name], value) for name, value in data.items()})
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}. Got fields {', '.join(data) or 'none'}.") from error


def _value(annotation: Any, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(Any, v) for v in value)
    if isinstance(value, Mapping) and "kind" in value:
        return from_dict(_class_of(value["kind"]), value)
    if isinstance(value, Mapping) and dataclasses.is_dataclass(annotation):
        return from_dict(typing.cast(type, annotation), value)
    return value


def _class_of(kind: Any) -> type:
    family, _, name = str(kind).partition(".")
    if family in _FAMILIES:
        return _FAMILIES[family](name)
    if kind not in _KINDS:
        raise ConfigError(unknown("kind of config", kind, _KINDS))
    return _KINDS[kind]
