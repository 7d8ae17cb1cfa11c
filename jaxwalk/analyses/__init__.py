"""Analyses: one claim each, one file each, found by its name. Every one returns a `Finding`.

A file `foo.py` here defines `analyse(subject: Subject) -> Finding`, with further options as keyword arguments
that have defaults, and raises `NotApplicable`, with the reason, for a subject it makes no sense for. That is
all there is to adding one. One with `FIRST = True` comes before the others, and its picture opens the report.
"""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxwalk.config import ConfigError, fits, readable, unknown
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series, decide

__all__ = ["Figure", "Finding", "NotApplicable", "Series", "Subject", "analyse", "names", "open_subject", "run"]


def names() -> tuple[str, ...]:
    """The names of all analyses."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def analyse(name: str, subject: Any, **options: Any) -> Finding:
    """The finding of the analysis `name` on `subject`. Raises ConfigError for an unknown name."""
    if name not in names():
        raise ConfigError(unknown("analysis", name, names()))
    return _module(name).analyse(subject, **options)


def run(
    subject: Any,
    only: Sequence[str] | None = None,
    started: Callable[[str], object] = lambda name: None,
    failed: Callable[[str, Exception], object] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[list[Finding], dict[str, str]]:
    """The findings of all analyses, or of those in `only`, and why each of the others was not run.

    An analysis that does not apply, or that the data is too small for, costs nothing but itself. `started` is called
    with the name of each as it begins. failed: takes the name and the error of an analysis that breaks, and the rest
    goes on; without it the error is raised. options: of each analysis by name. Raises ConfigError for an unknown
    name or option, before anything is run, and for options that an analysis refuses.
    """
    chosen = tuple(only or sorted(names(), key=lambda name: not getattr(_module(name), "FIRST", False)))
    for name in (*chosen, *(options or {})):
        if name not in names():
            raise ConfigError(unknown("analysis", name, names()))
    for name, given in (options or {}).items():
        _check_options(name, given)
    findings, skipped = [], {}
    for name in chosen:
        started(name)
        try:
            findings.append(analyse(name, subject, **(options or {}).get(name, {})))
        except NotApplicable as reason:
            skipped[name] = str(reason)
        except ConfigError:
            raise
        except Exception as error:
            if isinstance(error, ValueError) and (options or {}).get(name):  # most likely of a value in them
                raise ConfigError(f"{name}: {error}") from error
            if failed is None:
                raise
            failed(name, error)
            skipped[name] = f"it broke: {type(error).__name__}: {error}"
    if subject.step == 0:
        findings = [_without_training(finding) for finding in findings]
    return decide(findings), skipped


def _without_training(finding: Finding) -> Finding:
    """A finding of the untrained model, which cannot be compared with itself."""
    reason = "this is the untrained model"
    primary = (replace(c, reason=reason) if c.null == "untrained" else c for c in finding.primary)
    return replace(finding, primary=tuple(primary))


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that the analysis does not have, or of a wrong type."""
    analyse = _module(name).analyse
    known = [p.name for p in inspect.signature(analyse).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = typing.get_type_hints(analyse)
    for option, value in options.items():
        if option not in known:
            raise ConfigError(unknown(f"option of {name}", option, known))
        if not fits(value, hints[option]):
            raise ConfigError(f"{name}.{option}: expected {readable(hints[option])}, got {value!r}.")


def __getattr__(name: str) -> Any:
    if name in ("Subject", "open_subject"):  # late, because they import jax
        return getattr(importlib.import_module("jaxwalk.evidence.subject"), name)
    if name in names():
        return _module(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
