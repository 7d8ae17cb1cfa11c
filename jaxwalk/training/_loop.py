"""The loop: it builds a run, resumes it, and advances, logs, evaluates and saves it until the last step or a stop."""

import contextlib
import dataclasses
import functools
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxwalk import text, worlds
from jaxwalk.checkpoint import Checkpoints, definition_of, locked, prepare_workdir, read_metrics
from jaxwalk.config import ConfigError, TrainConfig, WorldData
from jaxwalk.filters import stream
from jaxwalk.model.build import resolve as resolve_model, resolved_layers
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.sampling import sample_paths
from jaxwalk.training._data import Batches, TextBatches, make_batches, place
from jaxwalk.training._evaluation import make_evaluation
from jaxwalk.training._progress import Metrics, Progress, Stop, evaluation_line, header, step_line
from jaxwalk.training._step import State, make_call, make_mesh, make_state, optimizer, schedule


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    resume: bool | int = False,
    overwrite: bool = False,
    out: TextIO | io.TextIOBase = sys.stdout,
) -> dict[str, float]:
    """Train `config` in the folder `workdir`.

    On SIGTERM or Ctrl-C, it finishes the current jitted call, saves, says how to resume, and returns.

    Args:
        config: the config.
        workdir: the run's folder.
        resume: resume from the latest saved state (True) or from that of a step.
        overwrite: delete an existing run in the folder.
        out: where progress is printed.

    Returns:
        The metrics of the last evaluation.

    Raises:
        ConfigError: if the config cannot be trained, or the folder holds another run, which is left untouched.
        CheckpointError: if the state to resume from cannot be read.
        TrainingDiverged: if the loss is not finite, before it can reach a checkpoint.
    """
    config, workdir = resolve(config), Path(workdir)
    stop, progress = Stop(), Progress(config.steps, out)
    program, state = _build(config, progress.line)
    # The folder is modified last, so that a config that cannot be built leaves it untouched.
    with locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        return _train_in(workdir, program, state, stop, progress, resume=resume, overwrite=overwrite)


def _train_in(
    workdir: Path,
    program: "_Program",
    state: State,
    stop: Stop,
    progress: Progress,
    *,
    resume: bool | int,
    overwrite: bool,
) -> dict[str, float]:
    """Train in a folder that no other process trains in."""
    config = program.config
    definition = definition_of(config, program.batches.vocabulary, program.store)
    if jax.process_index() == 0:
        prepare_workdir(workdir, definition, resume=resume is not False, overwrite=overwrite)
    checkpoints = Checkpoints(workdir, config, definition)
    progress.line(header(config, workdir, program.mesh, state.model))

    with contextlib.closing(checkpoints), stop.listening():
        step = 0
        if resume is not False:
            step, state, deleted = checkpoints.resume(state, None if resume is True else resume)
            note = f"; deleted the later steps {', '.join(map(str, deleted))}" if deleted else ""
            progress.line(f"resumed from step {step}{note}")
        metrics = Metrics(config, workdir / "metrics.jsonl", schedule(config.optim, config.steps), step)
        if step >= config.steps:
            progress.line(f"{workdir} is finished. To analyse it: python analyze.py {workdir}")
            return _last_evaluation(workdir / "metrics.jsonl")
        loop = _Loop(program, step, state, checkpoints, metrics, progress)
        del state  # its buffers are donated to the first call
        evaluation = loop.run(stop)
        if loop.step < config.steps:
            checkpoints.close()
            progress.line(f"stopped at step {loop.step} and saved. To resume: the same command with --resume")
            return evaluation
    progress.line(f"done: {workdir}. To analyse it: python analyze.py {workdir}")
    return evaluation


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with all defaults of the model and the world written out: a saved run does not depend on them."""
    data = config.data
    if isinstance(data, WorldData):
        data = WorldData(data.world, worlds.make(data.world, **data.params).params)
    return dataclasses.replace(config, model=resolve_model(config.model), data=data)


@dataclass(frozen=True)
class _Program:
    """What a config is built into.

    Attributes:
        config: the resolved config.
        mesh: the devices.
        batches: the data.
        structure: the structure of the state, of which `call` takes and returns the leaves.
        call: the jitted call that `make_call` documents.
        evaluate: the evaluation that `make_evaluation` documents.
    """

    config: TrainConfig
    mesh: Mesh
    batches: Batches
    structure: Any
    call: jax.stages.Wrapped
    evaluate: Callable[[Sequence[Array]], dict[str, float]]

    @property
    def store(self) -> text.TokenStore | None:
        """The token store of text, or None for a world."""
        return self.batches.store if isinstance(self.batches, TextBatches) else None

    def inputs(self, step: int) -> Any:
        """Inputs of the call that starts at `step`, with the rows of each batch sharded over the data axis."""
        return jax.tree.map(
            lambda a: place(a, NamedSharding(self.mesh, PartitionSpec(*(None, "data")[: np.ndim(a)]))),
            self.batches.inputs(step, self.config.steps_per_call),
        )


def _build(config: TrainConfig, report: Callable[[str], object]) -> tuple[_Program, State]:
    """The program of a resolved config and its state at step 0. Raises ConfigError if it cannot be trained here."""
    mesh = make_mesh(config.mesh)
    if (config.batch_size // config.accumulate) % mesh.shape["data"]:
        raise ConfigError(
            f"batch_size: expected batch_size / accumulate to be a multiple of the {mesh.shape['data']} ways of the "
            f"mesh's data axis, got {config.batch_size} / {config.accumulate}."
        )
    _check_kernels(config)
    batches = make_batches(config, report)
    update = optimizer(config.optim, config.steps)
    state = make_state(config, update, mesh)
    evaluate = make_evaluation(config, batches, mesh, jax.tree.structure(state.model))
    call = make_call(config, batches, update, mesh, state)
    return _Program(config, mesh, batches, jax.tree.structure(state), call, evaluate), state


def _check_kernels(config: TrainConfig) -> None:
    kernels = {getattr(aggregate, "kernel", None) for aggregate, _ in resolved_layers(config.model)}
    if "cudnn" in kernels and jax.default_backend() != "gpu":
        raise ConfigError(
            f"kernel: expected 'plain' or 'xla' on {jax.default_backend()}, got 'cudnn', which needs an NVIDIA GPU."
        )


class _Loop:
    """A run at its current step: the leaves of its state, and the operations that advance and record them."""

    def __init__(
        self,
        program: _Program,
        step: int,
        state: State,
        checkpoints: Checkpoints,
        metrics: Metrics,
        progress: Progress,
    ) -> None:
        self.program, self.config = program, program.config
        self.step, self.leaves = step, jax.tree.leaves(state)
        self.checkpoints, self.metrics, self.progress = checkpoints, metrics, progress
        self.bytes_per_token = None if program.store is None else program.store.bytes_per_token("train")

    def run(self, stop: Stop) -> dict[str, float]:
        """Advance to the last step, or to where `stop` was requested. Returns the metrics of the last evaluation."""
        config = self.config
        evaluation = self.evaluate(keep=True, resumable=True) if self.step == 0 else {}
        call = self.program.call.lower(self.leaves, self.program.inputs(self.step)).compile()
        self.metrics.clock = time.perf_counter()  # compilation does not count
        while self.step < config.steps:
            self.advance(call)
            if self.is_due(config.log_every):
                self.log()
            stopping = stop.agreed()
            resumable = stopping or self.is_due(config.checkpoint.every) or self.step == config.steps
            keep = resumable or self.step in self.checkpoints.series
            if keep or self.is_due(config.eval_every):
                evaluation = self.evaluate(keep, resumable)
            if config.sample_every and self.is_due(config.sample_every):
                self.print_sample()
            if stopping and self.step < config.steps:
                return evaluation
        self.log(everything=True)
        return evaluation

    def is_due(self, every: int) -> bool:
        """Whether the current step is a multiple of `every`."""
        return self.step % every == 0

    def advance(self, call: jax.stages.Compiled) -> None:
        """Dispatch one call, which donates the buffers of the current leaves."""
        self.leaves, metrics = call(self.leaves, self.program.inputs(self.step))
        self.metrics.add(self.step, metrics)
        self.step += self.config.steps_per_call
        self.progress.bar(self.step)

    def log(self, everything: bool = False) -> None:
        """Write and print the rows that `Metrics.fetch` returns."""
        for row in self.metrics.fetch(everything):
            self.metrics.write(row)
            self.progress.note = f"loss {row['loss']:.4f}"
            self.progress.line(step_line(row, self.config.steps, self.bytes_per_token))

    def evaluate(self, keep: bool, resumable: bool) -> dict[str, float]:
        """Evaluate the current step and save its parameters if `keep`, with the state to resume from if `resumable`.

        Raises TrainingDiverged if a loss up to this step is not finite, before anything is saved.
        """
        self.metrics.check()
        if self.is_due(self.config.log_every):
            self.log(everything=True)
        with self.metrics.paused():
            state = self.state()
            evaluation = self.program.evaluate(jax.tree.leaves(state.model))
            if not all(map(math.isfinite, evaluation.values())):
                raise self.metrics.diverged(self.step, f"is {evaluation['eval_loss']} on held-out paths")
            self.metrics.write({"step": self.step, **evaluation})
            self.progress.line(evaluation_line(self.step, self.config.steps, evaluation))
            if keep:
                self.checkpoints.save(self.step, state.model, evaluation["eval_loss"], state if resumable else None)
                self.metrics.last_good = self.step
        return evaluation

    def print_sample(self) -> None:
        """Print a path sampled from the model."""
        with self.metrics.paused():
            sample = _sample(self.config, self.program.batches.vocabulary, self.state().model, self.step)
            self.progress.line(f"step {self.step:>6}/{self.config.steps}  sample: {sample!r}")

    def state(self) -> State:
        """The current state. The next call donates its buffers, so it must not outlive this step."""
        return jax.tree.unflatten(self.program.structure, self.leaves)


def _sample(config: TrainConfig, vocabulary: Any, model: Transformer, step: int) -> str:
    """A path sampled from the model, decoded. It is a function of the model, the seed and the step."""
    begin = vocabulary.begin if vocabulary.begin is not None else 0
    key = stream(jax.random.key(config.seed), f"sample {step}")
    steps = min(config.model.max_length - 1, 120) or 1
    tokens = _sampler(steps)(model, jnp.array([begin]), key)
    return vocabulary.decode(np.concatenate([[begin], np.asarray(tokens)]))


@functools.cache
def _sampler(steps: int) -> Any:
    return jax.jit(lambda model, prompt, key: sample_paths(model, prompt, key, steps, 1).tokens[0])


def _last_evaluation(file: Path) -> dict[str, float]:
    """The metrics of the last evaluation in a metrics.jsonl, or none."""
    rows = [row for row in read_metrics(file) if "eval_loss" in row]
    return {name: value for name, value in rows[-1].items() if name != "step"} if rows else {}
