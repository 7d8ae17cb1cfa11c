"""Signals that stop a run, its lines on the console, and its rows in metrics.jsonl."""

import contextlib
import io
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxwalk.checkpoint import read_metrics
from jaxwalk.config import TrainConfig
from jaxwalk.model.transformer import Transformer


class TrainingDiverged(Exception):
    """The loss or its gradient became infinite or NaN. Names the step and the last good checkpoint."""


class Stop:
    """Records whether SIGTERM or Ctrl-C has requested an orderly stop. A second Ctrl-C stops immediately."""

    def __init__(self) -> None:
        self.requested: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals until the end of the block, if this is the main thread."""

        def handle(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = signal.Signals(number).name

        try:
            previous = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now. All processes must agree, or some would wait forever in a collective."""
        if jax.process_count() == 1:
            return self.requested is not None
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(self.requested is not None))))


class Progress:
    """A progress bar on a terminal, plain lines otherwise. Only the first process prints."""

    def __init__(self, steps: int, out: TextIO | io.TextIOBase) -> None:
        self.steps, self.out = steps, out
        self.is_terminal = out.isatty()
        self.prints = jax.process_index() == 0
        self.note = ""

    def line(self, message: str) -> None:
        """Print a permanent line."""
        if self.prints:
            print(("\r\x1b[K" if self.is_terminal else "") + message, file=self.out, flush=True)

    def bar(self, step: int) -> None:
        """Draw the progress bar if the output is a terminal."""
        if self.prints and self.is_terminal:
            done = round(24 * step / self.steps)
            self.out.write(f"\r\x1b[K[{'#' * done}{'.' * (24 - done)}] {step}/{self.steps} {self.note}")
            self.out.flush()


class Metrics:
    """The metrics of calls, fetched one log interval late so that the device never waits, and their timing."""

    def __init__(self, config: TrainConfig, file: Path, rate: optax.Schedule, resumed: int) -> None:
        self.config, self.file, self.rate = config, file, rate
        self.windows: list[list[tuple[int, dict[str, Array]]]] = [[]]
        self.last_good = resumed
        self.clock = time.perf_counter()
        if jax.process_index() == 0:
            # Rows after the step that training resumes from will be written again.
            lines = [json.dumps(row) + "\n" for row in read_metrics(file) if row["step"] <= resumed]
            partial = file.with_suffix(".jsonl.tmp")
            partial.write_text("".join(lines), "utf-8")
            os.replace(partial, file)

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Add the metrics of a call whose first step is `step`."""
        self.windows[-1].append((step, metrics))

    def fetch(self, everything: bool = False) -> list[dict[str, float]]:
        """Close the current window and return the rows of earlier windows, or of all. Raises TrainingDiverged."""
        if self.windows[-1]:
            self.windows.append([])
        ready = self.windows[:-1] if everything else self.windows[:-2]
        self.windows = self.windows[len(ready) :]
        return [self._row(window) for window in ready]

    def check(self) -> None:
        """Wait for all dispatched steps. Raises TrainingDiverged if any loss or gradient is not finite."""
        for window in self.windows:
            self._values(window)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from the reported rates."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def _values(self, window: Sequence[tuple[int, dict[str, Array]]]) -> tuple[np.ndarray, np.ndarray]:
        """Losses and gradient norms of the steps of a window. Raises TrainingDiverged."""
        if not window:
            return np.zeros(0), np.zeros(0)
        fetched = jax.device_get([metrics for _, metrics in window])
        losses, norms = (np.concatenate([m[name] for m in fetched]) for name in ("loss", "grad_norm"))
        bad = ~(np.isfinite(losses) & np.isfinite(norms))
        if bad.any():
            first = int(np.argmax(bad))
            raise self.diverged(window[0][0] + first, f"is {losses[first]} (gradient norm {norms[first]})")
        return losses, norms

    def diverged(self, step: int, description: str) -> TrainingDiverged:
        """The error for a loss that is not finite."""
        return TrainingDiverged(
            f"the loss at step {step} {description}. The last good checkpoint is step {self.last_good}. "
            "Lower --optim.lr, clip harder, or warm up longer."
        )

    def _row(self, window: Sequence[tuple[int, dict[str, Array]]]) -> dict[str, float]:
        losses, norms = self._values(window)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        last = window[0][0] + len(losses)
        tokens = len(losses) * self.config.batch_size * self.config.model.max_length
        return {
            "step": last,
            "loss": float(losses.mean(dtype=float)),
            "grad_norm": float(norms.mean(dtype=float)),
            "lr": float(self.rate(last - 1)),
            "tokens_per_second": tokens / max(seconds, 1e-9),
        }

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row to metrics.jsonl."""
        if jax.process_index() == 0:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


# Lines.


def header(config: TrainConfig, workdir: Path, mesh: Mesh, model: Transformer) -> str:
    """The first line of a run: model, precision, kernels, devices and folder."""
    parameters = sum(a.size for a in jax.tree.leaves(model))
    kernels = {getattr(layer.aggregate, "kernel", None) for block in model.layers.blocks for layer in block.period}
    kernels -= {None}
    kind = jax.devices()[0].device_kind
    return (
        f"{config.name}: {parameters:,} parameters, {config.compute_dtype}, "
        + (f"attention kernel {', '.join(sorted(map(str, kernels)))}, " if kernels else "")
        + f"on {mesh.size} x {kind} ({mesh.shape['data']} data x {mesh.shape['model']} model), in {workdir}"
    )


def step_line(row: Mapping[str, float], steps: int, bytes_per_token: float | None) -> str:
    """A row of training metrics, formatted; with the loss in bits per byte too if `bytes_per_token` is given."""
    bits = "" if bytes_per_token is None else f"  {row['loss'] / math.log(2) / bytes_per_token:.4f} bits per byte"
    return (
        f"step {row['step']:>6}/{steps}  loss {row['loss']:.4f} nats{bits}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )


def evaluation_line(step: int, steps: int, evaluation: Mapping[str, float]) -> str:
    """The metrics of an evaluation, formatted with their units."""
    units = {"eval_loss": "nats per token", "excess_loss": "nats above the ideal observer", "bits_per_byte": ""}
    values = "  ".join(f"{name} {value:.5f} {units[name]}".rstrip() for name, value in evaluation.items())
    return f"step {step:>6}/{steps}  {values}"
