"""Several trainings of one experiment that differ in their seed, decided together: trained models are the units.

The interval of a finding is over paths, with one trained model held fixed. Claims about training are about other seeds
too, and these spread as much.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxwalk.checkpoint import Run
from jaxwalk.config import ConfigError
from jaxwalk.evidence.decision import Contrast, Quantity, untestable
from jaxwalk.evidence.finding import Finding, decide

FEWEST_SEEDS = 3
"""The fewest trained models that anything is decided from."""


def across_seeds(folders: Sequence[str | os.PathLike[str]]) -> list[Finding]:
    """The findings of several runs together, one number for each run, from the `analysis/findings.json` of each.

    Each primary contrast becomes that of the runs' numbers, with the t interval of so many trained models.

    Args:
        folders: of at least three runs whose configs differ in the seed and the name only, each analysed.

    Raises:
        ConfigError: for fewer runs, runs of different experiments, or a run that has not been analysed.
        CheckpointError: for what is no run's folder.
    """
    if len({Path(folder).resolve() for folder in folders}) < FEWEST_SEEDS:
        raise ConfigError(f"seeds: expected {FEWEST_SEEDS} or more different runs, got {[str(f) for f in folders]}.")
    runs = [Run(folder) for folder in folders]
    alike = [dataclasses.replace(run.config, seed=0, name="") for run in runs]
    different = [run.folder.name for run, config in zip(runs, alike, strict=True) if config != alike[0]]
    if different:
        raise ConfigError(
            f"seeds: expected runs that differ in their seed only, but {', '.join(different)} and "
            f"{runs[0].folder.name} differ in more. To see in what: python analyze.py compare RUN RUN"
        )
    seeds = [run.config.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: expected runs of different seeds, got {seeds}.")
    reports = [
        _read(run.folder / "analysis" / "findings.json", folder) for run, folder in zip(runs, folders, strict=True)
    ]
    names = [name for name in reports[0] if all(name in report for report in reports)]
    findings = [_joined(name, [report[name] for report in reports], seeds) for name in names]
    return decide(finding for finding in findings if finding.primary)


def _read(file: Path, folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    try:
        return {finding["name"]: finding for finding in json.loads(file.read_text("utf-8"))}
    except FileNotFoundError:
        raise ConfigError(f"seeds: {folder} has not been analysed: python analyze.py {folder}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"seeds: {file} cannot be read ({type(error).__name__}: {error}).") from error


def _joined(name: str, findings: Sequence[dict[str, Any]], seeds: Sequence[int]) -> Finding:
    contrasts = []
    for first in findings[0].get("primary", []):
        same = [
            next(
                (c for c in f.get("primary", []) if all(c[k] == first[k] for k in ("claim", "quantity", "null"))), None
            )
            for f in findings
        ]
        contrasts.append(_contrast(first, [one for one in same if one is not None]))
    measured = {c.quantity: c.value for c in contrasts} or {"runs": float(len(seeds))}
    null = {f"{c.quantity}.{c.null}": c.reference for c in contrasts} or {"runs": float(len(seeds))}
    return Finding(
        name=name,
        claim=findings[0]["claim"],
        measured=measured,
        interval={},
        null=null,
        conventions={"units": "trained models", "seeds": list(seeds)},
        primary=tuple(contrasts),
    )


def _contrast(first: dict[str, Any], same: Sequence[dict[str, Any]]) -> Contrast:
    """The contrast of the numbers of all runs, or of those in which it could be tested."""
    tested = [one for one in same if not one["reason"] and None not in (one["value"], one["reference"])]
    if len(tested) < FEWEST_SEEDS:
        reason = f"{len(tested)} of {len(same)} runs test it" + (f": {first['reason']}" if first["reason"] else "")
        return untestable(first["claim"], first["statement"], first["quantity"], reason)
    values, references = (np.array([one[key] for one in tested], float) for key in ("value", "reference"))
    quantity = Quantity(
        first["quantity"], values, {first["null"]: references}, unit=first["unit"], fewest_units=FEWEST_SEEDS
    )
    return quantity.contrast(
        first["null"],
        first["claim"],
        first["statement"],
        at_least=first["at_least"],
        at_most=first["at_most"],
        label=first["label"],
    )
