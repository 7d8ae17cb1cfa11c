"""Analyses: one claim each, one file each, found by its name. Every one returns a `Finding`.

A file `foo.py` here defines `analyse(subject: Subject) -> Finding`, with further options as keyword arguments
that have defaults, and raises `NotApplicable`, with the reason, for a subject it makes no sense for. That is
all there is to adding one. One with `FIRST = True` comes before the others, and its picture opens the report.
"""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxwalk.config import ConfigError, fits, readable, unknown
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series, decide

__all__ = ["Figure", "Finding", "NotApplicable", "Series", "Subject", "analyse", "names", "open_subject", "run"]


def names() -> tuple[str, ...]:
    """The names of all analyses."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


class Description(NamedTuple):
    """What an analysis is about.

    Attributes:
        name: of the analysis.
        claims: the numbers of the claims that it measures, such as "C3".
        summary: the first sentence of its docstring, without the claims.
        options: its options -> their defaults, as they are written.
    """

    name: str
    claims: tuple[str, ...]
    summary: str
    options: Mapping[str, str]


def describe(name: str) -> Description:
    """What the analysis `name` is about, read from its file, which is not imported.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in names():
        raise ConfigError(unknown("analysis", name, names()))
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    tree = ast.parse(Path(str(spec and spec.origin)).read_text("utf-8"))
    sentence = re.split(r"(?<=\.)\s", " ".join((ast.get_docstring(tree) or "").split()))[0]
    claims, _, summary = sentence.partition(": ")
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "analyse")
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    options = {argument.arg: "" if default is None else ast.unparse(default) for argument, default in pairs}
    return Description(name, tuple(re.findall(r"\bC[1-8]\b", claims)), summary or sentence, options)


def testing(claims: Sequence[str]) -> tuple[str, ...]:
    """The names of the analyses that measure one of these claims.

    Raises:
        ConfigError: for a claim that no analysis measures.
    """
    described = [describe(name) for name in names()]
    known = sorted({claim for each in described for claim in each.claims})
    for claim in claims:
        if claim not in known:
            raise ConfigError(unknown("claim", claim, known))
    return tuple(each.name for each in described if set(each.claims) & set(claims))


def analyse(name: str, subject: Any, options: Mapping[str, Any] = {}) -> Finding:
    """The finding of the analysis `name` on `subject`.

    Args:
        name: of the analysis.
        subject: the model and its data.
        options: of the analysis, by name.

    Raises:
        ConfigError: for an unknown name or option, or an option of another type.
        NotApplicable: if the analysis makes no sense for the subject.
    """
    if name not in names():
        raise ConfigError(unknown("analysis", name, names()))
    _check_options(name, options)
    return _module(name).analyse(subject, **options)


def run(
    subject: Any,
    only: Sequence[str] | None = None,
    started: Callable[[str], object] = lambda name: None,
    failed: Callable[[str, Exception], object] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[list[Finding], dict[str, str]]:
    """The findings of all analyses, or of those in `only`, with their decisions, and why each other one was not run.

    An analysis that does not apply, or that the data is too small for, costs nothing but itself.

    Args:
        subject: the model and its data.
        only: the names of the analyses.
        started: called with the name of each as it begins.
        failed: called with the name and the error of an analysis that breaks, and the rest goes on; without it the
            error is raised.
        options: of each analysis, by its name.

    Raises:
        ConfigError: for an unknown name or option, before anything is run, and for options that an analysis refuses.
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
            findings.append(analyse(name, subject, (options or {}).get(name, {})))
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
    if getattr(subject, "step", None) == 0:
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
