"""Runs side by side: what they are, how they learned, and what their analyses found.

    compared = jw.comparison.compare(["runs/attention", "runs/mamba"])
    print(jw.report.comparison_table(compared))

Everything is read from the runs' folders, as `train.py` and `analyze.py` left them; no model is run.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxwalk.checkpoint import Run, read_metrics
from jaxwalk.config import ConfigError, WorldData
from jaxwalk.evidence.finding import Cell, Comparison, Figure, Row, Section, Series
from jaxwalk.model import init


def compare(folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Read at least two runs' folders. Findings are those of `analysis/findings.json`, where `analyze.py` puts them.

    Raises ConfigError for fewer than two folders, or one twice; CheckpointError for what is no run's folder.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise ConfigError(f"compare: expected two or more different runs, got {[str(f) for f in folders]}.")
    runs = [Run(path) for path in paths]
    names = tuple(path.name for path in paths)
    if len(set(names)) < len(names):
        names = tuple(str(folder) for folder in folders)
    metrics = [read_metrics(run.folder / "metrics.jsonl") for run in runs]
    notes = []
    for what, of in (
        ("data", lambda run: _data(run)),
        ("batch", lambda run: (run.config.batch_size, run.config.model.max_length)),
        ("steps", lambda run: run.config.steps),
    ):
        if len({of(run) for run in runs}) > 1:
            notes.append(f"The runs differ in {what}: their losses and findings are not of one task or one budget.")
    findings = []
    for name, run, folder in zip(names, runs, folders, strict=True):
        found, problem = _findings(run.folder / "analysis" / "findings.json")
        findings.append(found)
        if problem:
            notes.append(f"{name}: {problem}. To have its findings: python analyze.py {folder}")
    sections = [Section("run", "", _facts(runs)), Section("training", "", _training(runs, metrics))]
    sections += _analyses(findings)
    figures, arrays = _curves(names, metrics)
    return Comparison(names, tuple(sections), tuple(notes), figures, arrays)


def _data(run: Run) -> str:
    data = run.config.data
    if isinstance(data, WorldData):
        return f"{data.world}({', '.join(f'{k}={v}' for k, v in data.params.items())})"
    return data.corpus


def _row(name: str, values: Sequence[Any]) -> Row:
    return Row(name, tuple(value if isinstance(value, Cell) else Cell(value) for value in values))


def _facts(runs: Sequence[Run]) -> tuple[Row, ...]:
    models = [jax.eval_shape(lambda run=run: init(run.config.model, jax.random.key(0))) for run in runs]
    kinds = [list(dict.fromkeys(type(layer.aggregate).__name__ for layer in model.layers)) for model in models]
    lengths = [model.max_length for model in models]
    return (
        _row("data", [_data(run) for run in runs]),
        _row("aggregates", [", ".join(of_run) or "none" for of_run in kinds]),
        _row("layers x width", [f"{model.depth} x {model.width}" for model in models]),
        _row("longest path", lengths),
        _row("parameters", [sum(a.size for a in jax.tree.leaves(model)) for model in models]),
        _row("state at the longest path", [model.state_size(n) for model, n in zip(models, lengths, strict=True)]),
        _row(
            "state at half of it", [model.state_size(max(1, n // 2)) for model, n in zip(models, lengths, strict=True)]
        ),
        _row("seed", [run.config.seed for run in runs]),
    )


def _training(runs: Sequence[Run], metrics: Sequence[list[dict[str, Any]]]) -> tuple[Row, ...]:
    def last(key: str) -> list[float | None]:
        return [next((row[key] for row in reversed(rows) if _is_number(row.get(key))), None) for rows in metrics]

    def over(key: str, reduce: Callable[..., Any]) -> list[float | None]:
        seen = [[row[key] for row in rows if _is_number(row.get(key))] for rows in metrics]
        return [float(reduce(values)) if values else None for values in seen]

    rows = [
        _row("steps", last("step")),
        _row("tokens per step", [run.config.batch_size * run.config.model.max_length for run in runs]),
        _row("tokens per second, median", over("tokens_per_second", np.median)),
        _row("held-out loss", last("eval_loss")),
        _row("held-out loss, least", over("eval_loss", min)),
        _row("excess over the ideal observer", last("excess_loss")),
        _row("bits per byte", last("bits_per_byte")),
        _row("training loss", last("loss")),
    ]
    return tuple(row for row in rows if any(cell.value is not None for cell in row.cells))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _findings(file: Path) -> tuple[dict[str, Mapping[str, Any]], str | None]:
    """Analysis -> what it found, and what is wrong with the file."""
    try:
        found = json.loads(file.read_text("utf-8"))
        return {
            one["name"]: {key: one[key] for key in ("claim", "measured", "interval", "null")} for one in found
        }, None
    except FileNotFoundError:
        return {}, "it has not been analysed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"{file} cannot be read ({type(error).__name__}: {error})"


def _analyses(findings: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Section]:
    sections = []
    for analysis in dict.fromkeys(name for found in findings for name in found):
        of_runs = [found.get(analysis) for found in findings]
        there = [one for one in of_runs if one is not None]

        def cells(kind: str, key: str, of_runs: Sequence[Any] = of_runs) -> tuple[Cell, ...]:
            return tuple(
                Cell(None)
                if one is None
                else Cell(one[kind].get(key), _bounds(one, key) if kind == "measured" else None)
                for one in of_runs
            )

        measured = list(dict.fromkeys(key for one in there for key in one["measured"]))
        nulls = list(dict.fromkeys(key for one in there for key in one["null"]))
        rows = []
        for key in measured:
            rows.append(Row(key, cells("measured", key)))
            own = [null for null in nulls if null.startswith(f"{key}.")]
            own += [null for null in nulls if "." not in null and key == measured[0]]
            rows += [Row(null.removeprefix(f"{key}."), cells("null", null), against=True) for null in own]
            nulls = [null for null in nulls if null not in own]
        rows += [Row(null, cells("null", null), against=True) for null in nulls]
        sections.append(Section(analysis, there[0]["claim"], tuple(rows)))
    return sections


def _bounds(finding: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    bounds = finding["interval"].get(key)
    return None if bounds is None or None in bounds else (float(bounds[0]), float(bounds[1]))


CURVES = (
    ("eval_loss", "Held-out loss along training", "nats per token", False),
    ("excess_loss", "Held-out loss above the ideal observer's, along training", "nats per token", True),
)


def _curves(
    names: Sequence[str], metrics: Sequence[list[dict[str, Any]]]
) -> tuple[tuple[Figure, ...], dict[str, np.ndarray]]:
    arrays: dict[str, np.ndarray] = {}
    figures = []
    for key, title, unit, log in CURVES:
        series = []
        for number, (name, rows) in enumerate(zip(names, metrics, strict=True)):
            points = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
            if points:
                x, y = f"{key}.step.{number}", f"{key}.{number}"
                arrays[x], arrays[y] = np.array(points, float).T
                series.append(Series(name, y=y, x=x))
        if series:
            figures.append(Figure(key, title, "training step", unit, tuple(series), log_x=log, log_y=log))
    return tuple(figures), arrays
