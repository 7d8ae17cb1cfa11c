"""The base of all configs: frozen dataclasses whose values are checked on construction."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal


class ConfigError(ValueError):
    """An impossible config. The message says what was expected, what was given, and how to fix it."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> str:
    """The error message for a name not among `choices`: suggests the closest match and lists all choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Choices: {', '.join(choices)}."


def fits(value: Any, annotation: Any) -> bool:
    """Whether `value` has the type `annotation`, for the kinds of annotation that configs use."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(v, args[0]) for v in value)
    if origin is not None:
        return isinstance(value, origin)
    if annotation in (None, type(None)):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def readable(annotation: Any) -> str:
    """A type as written in error messages."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def at_least(config: Any, **bounds: float) -> Iterable[str]:
    """Yield an error for each named field of `config` that is below its bound or NaN. None is accepted."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            yield f"{name}: expected at least {bound}, got {value}"


class Checked:
    """Base of all configs. Field types are checked on construction; `check` adds what types cannot express."""

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """Reject unknown fields here, where the message can suggest the closest one; a dataclass cannot."""
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in fields:
            if name not in names:
                raise ConfigError(unknown(f"field of {cls._title()}", name, names))
        return super().__new__(cls)

    @classmethod
    def _title(cls) -> str:
        return cls.__name__

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        errors = [
            f"{f.name}: expected {readable(hints[f.name])}, got {getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if not fits(getattr(self, f.name), hints[f.name])
        ]
        errors = errors or list(self.check())
        if errors:
            raise ConfigError(f"{self._title()}: " + "; ".join(errors) + ".")

    def check(self) -> Iterable[str]:
        """Yield a message for each wrong value, so that all are reported at once."""
        return ()
