"""Steps of one training: revisions of a repository, or sub-folders of a folder, named after their steps."""

import re
from collections.abc import Iterable
from pathlib import Path

from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ConfigError, unknown

# "step1000" (Pythia), "step1000-tokens4B" (OLMo), "stage1-step1000-tokens5B" (OLMo 2), "step-240000" (SmolLM 2),
# "checkpoint-500" (transformers' Trainer).
_NAME = re.compile(r"(?:(?P<stage>.+)-)?(?:step|checkpoint)[-_]?(?P<step>\d+)(?:-tokens[\d.]+[KMBT])?")


def subfolders(folder: Path) -> list[str]:
    """Names of the sub-folders that a model is in; what is half-written has no config.json yet."""
    return [path.name for path in folder.iterdir() if (path / "config.json").is_file()] if folder.is_dir() else []


def by_step(names: Iterable[str], stage: str | None = None) -> dict[int, str]:
    """Step -> name, in order, of those names that say a step; `stage` is what is before the step, by default the first.

    Raises CheckpointError for two names of one step, ConfigError for a stage that is not there.
    """
    stages: dict[str, dict[int, str]] = {}
    for name in sorted(set(names)):
        if found := _NAME.fullmatch(name):
            steps = stages.setdefault(found["stage"] or "", {})
            step = int(found["step"])
            if step in steps:
                raise CheckpointError(f"step {step}: expected one name, got {steps[step]!r} and {name!r}.")
            steps[step] = name
    if stage is not None and stage not in stages:
        raise ConfigError(unknown("stage", stage, stages))
    chosen = stages[min(stages) if stage is None else stage] if stages else {}
    return dict(sorted(chosen.items()))


def name_of(step: int | str, steps: dict[int, str], source: object) -> str:
    """The name of a step's number, or of the latest's. Raises ConfigError for the best, CheckpointError for no step."""
    if not steps:
        raise ConfigError(
            f"step: expected a run's folder or a series of steps to take it from, got {source}. Leave it out."
        )
    if step == "best":
        raise ConfigError(f"step: expected a number or 'latest', got 'best': {source} has no evaluation losses.")
    number = max(steps) if step == "latest" else step
    if number not in steps:
        near = sorted(sorted(steps, key=lambda s: abs(s - int(number)))[:4])
        raise CheckpointError(
            f"step: expected one of the {len(steps)} steps of {source}, from {min(steps)} to {max(steps)}, got {step}. "
            f"Near it: {', '.join(map(str, near))}."
        )
    return steps[int(number)]
