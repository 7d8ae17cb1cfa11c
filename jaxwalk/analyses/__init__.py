"""Analyses: one claim each, one file each, found by its name. Every one returns a `Finding`.

A file `foo.py` here defines `analyse(subject: Subject) -> Finding`, with further options as keyword arguments
that have defaults, and raises `NotApplicable`, with the reason, for a subject it makes no sense for. That is
all there is to adding one.
"""

import importlib
import pkgutil
from typing import Any

from jaxwalk.analyses._finding import Figure, Finding, NotApplicable, Series
from jaxwalk.config import ConfigError, unknown

__all__ = ["Figure", "Finding", "NotApplicable", "Series", "Subject", "analyse", "names"]


def names() -> tuple[str, ...]:
    """The names of all analyses."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def analyse(name: str, subject: Any, **options: Any) -> Finding:
    """The finding of the analysis `name` on `subject`. Raises ConfigError for an unknown name."""
    if name not in names():
        raise ConfigError(unknown("analysis", name, names()))
    return importlib.import_module(f"{__name__}.{name}").analyse(subject, **options)


def __getattr__(name: str) -> Any:
    if name == "Subject":
        return importlib.import_module("jaxwalk.analyses._subject").Subject
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
