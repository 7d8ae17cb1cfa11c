"""The claims are about what training does: any number of any finding, followed over the kept steps of training.

Each step's number is measured by the analysis it belongs to, on the same paths, and stands beside that of step 0,
the untrained model, which is the null. An analysis takes part by what its `analyse` accepts: `light`, or `paths`,
to be cheap.
"""

import dataclasses
import importlib
import inspect
from typing import Any

import numpy as np

from jaxwalk import analyses
from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ConfigError, unknown
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.subject import Subject

CLAIM = "C2, C8: training moves the law of paths, and the arrangement of vectors that makes it, towards the data's."
BY_DEFAULT = ("path_law.excess_loss", "path_law.loss", "belief_geometry.r2")


def analyse(
    subject: Subject,
    *,
    scalars: tuple[str, ...] | None = None,
    paths: int = 128,
    steps: int | tuple[int, ...] = 24,
) -> Finding:
    """`scalars`, "analysis.name" of measured numbers, against the step of training.

    By default the loss in excess of the world's (of text, the loss) and the R^2 from context vectors to beliefs,
    where they apply. paths: for analyses that have no `light` form. steps: those to look at, or how many at most,
    evenly spaced in log(step), of those that are kept (Pythia keeps 154). Raises ValueError for a number that its
    analysis does not measure, and for a step that is not kept.
    """
    kept = sorted(set(subject.series))
    if len(kept) < 2:
        raise NotApplicable(f"it needs at least 2 kept steps of training, got {len(kept)}: keep more checkpoints")
    looked_at = _chosen(kept, steps)
    wanted = BY_DEFAULT if scalars is None else scalars
    by_analysis: dict[str, list[str]] = {}
    for scalar in wanted:
        name, _, key = scalar.partition(".")
        if name not in analyses.names() or not key or name == "training_walk":
            choices = [n for n in analyses.names() if n != "training_walk"]
            raise ConfigError(
                f"scalars: expected 'analysis.number', got {scalar!r}: {unknown('analysis', name, choices)}"
            )
        by_analysis.setdefault(name, []).append(key)

    # The default numbers need no null of their own at each step: step 0 is in the series.
    untrained = None if scalars is None else subject.untrained
    left_out: dict[str, Any] = {}
    found: dict[str, list[Finding]] = {}
    unread: dict[int, str] = {}
    for step in looked_at:
        try:
            at_step = dataclasses.replace(subject.at_step(step), untrained=untrained)
        except CheckpointError as error:
            unread[step] = str(error)
            continue
        for name in by_analysis:
            if name in left_out:
                continue
            try:
                found.setdefault(name, []).append(analyses.analyse(name, at_step, **_cheap(name, paths)))
            except NotApplicable as reason:  # as in `run`, it costs nothing but itself
                left_out[name] = str(reason)
    read = [step for step in looked_at if step not in unread]
    if len(read) < 2:
        raise NotApplicable(
            f"it needs at least 2 steps that can be read: {list(unread)} cannot. {next(iter(unread.values()))}"
        )
    series = {
        f"{name}.{key}": found[name]
        for name, keys in by_analysis.items()
        if name not in left_out
        for key in keys
        if scalars is not None or key in found[name][0].measured
    }
    if not series:
        raise NotApplicable(
            "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no scalars were asked for"
        )

    shown = np.array(read, float)
    shown[shown == 0] = shown[shown > 0].min() / 2
    arrays: dict[str, np.ndarray] = {"step": np.array(read), "step_shown": shown}
    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    figures, said = [], []
    for scalar, findings in series.items():
        key = scalar.partition(".")[2]
        if not any(key in f.measured for f in findings):
            raise ConfigError(unknown(f"number of {findings[0].name}", key, findings[-1].measured))
        values = np.array([f.measured.get(key, np.nan) for f in findings])  # NaN: not measured there
        ends = np.array([f.interval.get(key, (v, v)) for f, v in zip(findings, values, strict=True)])
        arrays |= {scalar: values, f"{scalar}.low": ends[:, 0], f"{scalar}.high": ends[:, 1]}
        measured |= {f"{scalar}.first": float(values[0]), f"{scalar}.last": float(values[-1])}
        for which, f in (("first", findings[0]), ("last", findings[-1])):
            if key in f.interval:
                interval[f"{scalar}.{which}"] = f.interval[key]
        null[f"{scalar}.last.untrained" if read[0] == 0 else f"{scalar}.last.step_{read[0]}"] = values[0]
        figures.append(
            Figure(
                name=scalar.replace(".", "_"),
                title=f"{scalar} over training",
                x_label="step of training" + (f" (step 0 is drawn at {shown[0]:g})" if read[0] == 0 else ""),
                y_label=key,
                series=(Series(scalar, scalar, "step_shown", low=f"{scalar}.low", high=f"{scalar}.high"),),
                references={"untrained" if read[0] == 0 else f"step {read[0]}": float(values[0])},
                log_x=True,
                log_y=bool((values > 0).all() and (ends > 0).all() and values.max() > 10 * values.min()),
            )
        )
        said.append(f"{scalar} goes from {values[0]:.3g} to {values[-1]:.3g}")
    return Finding(
        name="training_walk",
        claim=CLAIM,
        measured=measured,
        interval=interval,
        null=null,
        conventions={
            "steps": read,
            "kept steps": len(kept),
            "units": "those of the analysis, before the dot, that measured the number",
            "options": {name: _cheap(name, paths) for name in found if name not in left_out},
            "paths": "the same at every step",
            "first, last": f"steps {read[0]} and {read[-1]}; the null is the model before training" if read[0] == 0
            else f"steps {read[0]} and {read[-1]}; step 0 is not among them, so the null is the first",
            "left out": left_out | ({"steps that cannot be read": list(unread)} if unread else {}),
        },
        arrays=arrays,
        figures=tuple(figures),
        verdict=f"From step {read[0]} to {read[-1]}: " + "; ".join(said) + ".",
    )  # fmt: skip


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
