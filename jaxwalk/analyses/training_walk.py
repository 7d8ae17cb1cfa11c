"""The claims are about what training does: any number of any finding, followed over the kept steps of training.

Each step's number is measured by the analysis it belongs to, on the same paths, and stands beside that of step 0,
the untrained model, which is the null. An analysis takes part by what its `analyse` accepts: `light`, or `paths`,
to be cheap.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxwalk import analyses
from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ConfigError, unknown
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.subject import Subject

CLAIM = "C2, C8: training moves the law of paths, and the arrangement of vectors that makes it, towards the data's."
BY_DEFAULT = ("path_law.excess_loss", "path_law.loss", "belief_geometry.r2")
ENDS = {"first": 0, "last": -1}


def analyse(
    subject: Subject,
    *,
    scalars: tuple[str, ...] | None = None,
    paths: int = 256,
    steps: int | tuple[int, ...] = 24,
) -> Finding:
    """Numbers of other analyses against the step of training. It describes one run, and decides nothing.

    Args:
        subject: the model and its series.
        scalars: "analysis.name" of measured numbers; by default the loss in excess of the world's (of text, the loss),
            and the R^2 from context vectors to beliefs, where they apply.
        paths: for analyses that have no `light` form: a whole batch, so that no other program is compiled for it.
        steps: those to look at, or how many at most, evenly spaced in log(step), of those that are kept.

    Raises:
        ConfigError: for a number that its analysis does not measure, and for a step that is not kept.
    """
    kept = sorted(set(subject.series))
    if len(kept) < 2:
        raise NotApplicable(f"it needs at least 2 kept steps of training, got {len(kept)}: keep more checkpoints")
    by_analysis = _by_analysis(BY_DEFAULT if scalars is None else scalars)
    # The default numbers need no null of their own at each step: step 0 is in the series.
    untrained = None if scalars is None else subject.untrained
    findings, read, left_out = _measured(subject, untrained, _chosen(kept, steps), by_analysis, paths)
    series = {
        f"{name}.{key}": findings[name]
        for name, keys in by_analysis.items()
        if name in findings
        for key in keys
        if scalars is not None or key in findings[name][0].measured
    }
    if not series:
        raise NotApplicable(
            "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no scalars were asked for"
        )
    first = "untrained" if read[0] == 0 else f"step_{read[0]}"
    null = "the model before training" if read[0] == 0 else "the first, as step 0 is not among them"
    walks = {scalar: _walk(scalar, each) for scalar, each in series.items()}
    arrays, figures = _figures(walks, read)
    return Finding(
        name="training_walk",
        claim=CLAIM,
        measured={f"{scalar}.{end}": w[at, 0] for scalar, w in walks.items() for end, at in ENDS.items()},
        interval={
            f"{scalar}.{end}": (w[at, 1], w[at, 2])
            for scalar, w in walks.items()
            for end, at in ENDS.items()
            if scalar.partition(".")[2] in series[scalar][at].interval
        },
        null={f"{scalar}.last.{first}": w[0, 0] for scalar, w in walks.items()},
        conventions={
            "steps": read,
            "kept steps": len(kept),
            "units": "those of the analysis, before the dot, that measured the number",
            "options": {name: _cheap(name, paths) for name in findings},
            "paths": "the same at every step",
            "first, last": f"steps {read[0]} and {read[-1]}; the null is {null}",
            "left out": left_out,
        },
        arrays=arrays,
        figures=figures,
        verdict=f"From step {read[0]} to {read[-1]}: "
        + "; ".join(f"{scalar} goes from {w[0, 0]:.3g} to {w[-1, 0]:.3g}" for scalar, w in walks.items())
        + ".",
    )


def _by_analysis(scalars: Sequence[str]) -> dict[str, list[str]]:
    """The names of numbers by the analysis that measures them. Raises ConfigError for an unknown analysis."""
    by_analysis: dict[str, list[str]] = {}
    for scalar in scalars:
        name, _, key = scalar.partition(".")
        if name not in analyses.names() or not key or name == "training_walk":
            choices = [n for n in analyses.names() if n != "training_walk"]
            raise ConfigError(
                f"scalars: expected 'analysis.number', got {scalar!r}: {unknown('analysis', name, choices)}"
            )
        by_analysis.setdefault(name, []).append(key)
    return by_analysis


def _measured(
    subject: Subject, untrained: Any, steps: Sequence[int], names: Iterable[str], paths: int
) -> tuple[dict[str, list[Finding]], list[int], dict[str, Any]]:
    """The findings of each analysis at each step that can be read, these steps, and why others were left out."""
    findings: dict[str, list[Finding]] = {}
    left_out: dict[str, Any] = {}
    unread: dict[int, str] = {}
    for step in steps:
        try:
            at_step = dataclasses.replace(subject.at_step(step), untrained=untrained)
        except CheckpointError as error:
            unread[step] = str(error)
            continue
        for name in names:
            if name in left_out:
                continue
            try:
                findings.setdefault(name, []).append(analyses.analyse(name, at_step, _cheap(name, paths)))
            except NotApplicable as reason:  # as in `run`, it costs nothing but itself
                left_out[name] = str(reason)
    read = [step for step in steps if step not in unread]
    if len(read) < 2:
        raise NotApplicable(
            f"it needs at least 2 steps that can be read: {list(unread)} cannot. {next(iter(unread.values()))}"
        )
    found = {name: each for name, each in findings.items() if name not in left_out}
    return found, read, left_out | ({"steps that cannot be read": list(unread)} if unread else {})


def _walk(scalar: str, findings: Sequence[Finding]) -> Float[np.ndarray, "steps 3"]:
    """A number at each step and its interval, which is the number itself without one; NaN where it is not measured."""
    key = scalar.partition(".")[2]
    if not any(key in f.measured for f in findings):
        raise ConfigError(unknown(f"number of {findings[0].name}", key, findings[-1].measured))
    values = [f.measured.get(key, np.nan) for f in findings]
    return np.array([(v, *f.interval.get(key, (v, v))) for f, v in zip(findings, values, strict=True)])


def _figures(walks: Mapping[str, np.ndarray], read: Sequence[int]) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    shown = np.array(read, float)
    shown[shown == 0] = shown[shown > 0].min() / 2
    arrays: dict[str, np.ndarray] = {"step": np.array(read), "step_shown": shown}
    figures = []
    for scalar, walk in walks.items():
        arrays |= {scalar: walk[:, 0], f"{scalar}.low": walk[:, 1], f"{scalar}.high": walk[:, 2]}
        figures.append(
            Figure(
                name=scalar.replace(".", "_"),
                title=f"{scalar} over training",
                x_label="step of training" + (f" (step 0 is drawn at {shown[0]:g})" if read[0] == 0 else ""),
                y_label=scalar.partition(".")[2],
                series=(Series(scalar, scalar, "step_shown", low=f"{scalar}.low", high=f"{scalar}.high"),),
                references={"untrained" if read[0] == 0 else f"step {read[0]}": float(walk[0, 0])},
                log_x=True,
                log_y=bool((walk > 0).all() and walk[:, 0].max() > 10 * walk[:, 0].min()),
            )
        )
    return arrays, tuple(figures)


def _chosen(kept: list[int], steps: int | tuple[int, ...]) -> list[int]:
    """Those steps; or so many of the kept ones, the first and the last among them, evenly spaced in log(step)."""
    if isinstance(steps, tuple):
        if len(set(steps)) < 2 or not set(steps) <= set(kept):
            raise ConfigError(f"steps: expected at least 2 of {kept}, got {list(steps)}.")
        return sorted(set(steps))
    if steps < 2:
        raise ConfigError(f"steps: expected at least 2, got {steps}.")
    if len(kept) <= steps:
        return kept
    logs = np.log(np.maximum(kept, kept[1] / 2))  # 0 has no logarithm: half the next step stands for it
    wanted = np.linspace(logs[0], logs[-1], steps)
    return sorted({kept[i] for i in np.abs(logs - wanted[:, None]).argmin(axis=1)})


def _cheap(name: str, paths: int) -> dict[str, Any]:
    """The options that make an analysis cheap, of those it has."""
    accepted = inspect.signature(importlib.import_module(f"jaxwalk.analyses.{name}").analyse).parameters
    if "light" in accepted:
        return {"light": True}
    return {"paths": paths} if "paths" in accepted else {}
