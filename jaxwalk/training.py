"""Training: the loss, one donated jitted call on a mesh, and the loop around it.

The loss is exactly -`path_log_prob` per predicted token, so analysis measures what training optimised. Batches
are a pure function of (seed, step), so going on after a stop needs no iterator's state: a resumed run comes to
the same parameters, bit for bit, as one that was never stopped.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxwalk import text, worlds
from jaxwalk.checkpoint import Checkpoints, definition_of, prepare_workdir, read_metrics
from jaxwalk.config import ConfigError, MeshConfig, OptimConfig, TrainConfig, WorldData
from jaxwalk.filters import Key, stream
from jaxwalk.model.build import astype, init, resolved_layers, unrolled
from jaxwalk.model.build import resolve as resolve_model
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import laws, scored_steps, scores
from jaxwalk.paths.sampling import sample_paths
from jaxwalk.sharding import shardings


class TrainingDiverged(Exception):
    """The loss or its gradient became infinite or NaN. Names the step and the last good checkpoint."""


# Data. What a step trains on is made from its number: on the device for worlds, on the host for text.


@dataclass(frozen=True)
class WorldBatches:
    """Fresh paths of a world at every step, sampled inside the jitted call."""

    world: worlds.World
    vocabulary: Any
    batch_size: int
    length: int
    key: Key

    def inputs(self, step: int, count: int) -> Any:
        """What the jitted call is given for `count` steps from `step`."""
        return jnp.arange(step, step + count)

    def batch(self, step: Int[Array, ""]) -> tuple[Int[Array, "B N"], None]:
        """Paths [B, N] of a step; no segments. Traced."""
        return self.world.sample(jax.random.fold_in(self.key, step), self.batch_size, self.length), None

    def evaluation(self, batches: int) -> list[tuple[Array, None]]:
        """The same held-out batches at every evaluation."""
        key = stream(self.key, "evaluation")
        sample = jax.jit(lambda i: self.world.sample(jax.random.fold_in(key, i), self.batch_size, self.length))
        return [(sample(i), None) for i in range(batches)]


@dataclass(frozen=True)
class TextBatches:
    """Windows of a token store, with the documents they are in."""

    store: text.TokenStore
    batch_size: int
    length: int
    seed: int

    @property
    def vocabulary(self) -> Any:
        """The store's."""
        return self.store.vocabulary

    def inputs(self, step: int, count: int) -> Any:
        """Tokens and segments, [count, B, N] each, of `count` steps from `step`."""
        rows = [self.store.batch(self.seed, step + i, self.batch_size, self.length) for i in range(count)]
        return tuple(np.stack(part) for part in zip(*rows, strict=True))

    def batch(self, inputs: tuple[Array, Array]) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
        """Tokens and segments of a step: the inputs are these already."""
        return inputs

    def evaluation(self, batches: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The same held-out batches at every evaluation."""
        return [
            self.store.batch(self.seed, i, self.batch_size, self.length, split="validation") for i in range(batches)
        ]


def make_batches(config: TrainConfig, report: Callable[[str], object] | None = None) -> WorldBatches | TextBatches:
    """The data of a run. `report` takes a line now and then while text is tokenised.

    Raises ConfigError where the model's vocabulary is not the data's.
    """
    length = config.model.max_length + 1
    batches: WorldBatches | TextBatches
    if isinstance(config.data, WorldData):
        world = worlds.make(config.data.world, **config.data.params)
        vocabulary = text.SymbolVocabulary(world.symbols)
        key = stream(jax.random.key(config.seed), "data")
        batches = WorldBatches(world, vocabulary, config.batch_size, length, key)
    else:
        batches = TextBatches(text.open_store(config.data, report), config.batch_size, length, config.seed)
    if batches.vocabulary.size != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: expected the size of the data's vocabulary, {batches.vocabulary.size}, "
            f"got {config.model.vocab_size}."
        )
    return batches


# The step.


def batch_loss(
    model: Transformer, tokens: Int[Array, "B N"], segments: Int[Array, "B N"] | None = None, axis: str | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """-log P summed over a batch of paths, in nats, and how many predicted tokens it is the sum of.

    axis: the mesh axis that the batch lies on. Without it a sharded kernel inside vmap gathers the whole batch.
    """
    score = lambda t, s: -scores(model, t, segments=s).sum()
    total = jax.vmap(score, spmd_axis_name=axis)(tokens, segments).sum()
    if segments is None:
        return total, jnp.array(tokens.shape[0] * (tokens.shape[1] - 1))
    return total, jax.vmap(lambda s: scored_steps(tokens.shape[1], segments=s))(segments).sum()


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step."""
    warmup = min(config.warmup, steps)
    rise = optax.linear_schedule(0.0, config.lr, warmup)
    final = config.lr * config.final_lr
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(config.lr)], [warmup])
    if config.schedule == "cosine":
        return optax.join_schedules([rise, optax.cosine_decay_schedule(config.lr, rest, config.final_lr)], [warmup])
    decay = min(math.ceil(config.decay_share * steps), rest)
    stable = optax.constant_schedule(config.lr)
    fall = optax.linear_schedule(config.lr, final, decay)
    return optax.join_schedules([rise, stable, fall], [warmup, steps - decay])


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv 1711.05101), which decays what each module declares in
    `decays`."""
    adamw = optax.adamw(
        schedule(config, steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
    return adamw if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def decay_mask(model: Any) -> Any:
    """Which leaves of a model weight decay applies to: those of the fields that their module names in `decays`."""

    def of_module(module: Any) -> Any:
        declared: frozenset[str] = getattr(module, "decays", frozenset())
        leaves, structure = jax.tree_util.tree_flatten_with_path(
            module, is_leaf=lambda node: _is_submodule(node, module)
        )
        marks = [
            of_module(node) if isinstance(node, nnx.Module) else getattr(path[0], "name", None) in declared
            for path, node in leaves
        ]
        return jax.tree.unflatten(structure, marks)

    return of_module(model)


def _is_submodule(node: Any, module: Any) -> bool:
    return isinstance(node, nnx.Module) and node is not module


class State(NamedTuple):
    """What training carries: float32 parameters, and the optimizer's state."""

    model: Transformer
    optimizer: Any


def initial_state(config: TrainConfig, update: optax.GradientTransformation, key: Key) -> State:
    """The state at step 0. `key` is the root key of a run, `jax.random.key(seed)`."""
    model = init(config.model, stream(key, "model"))
    model = unrolled(model) if unrolls(config) else model
    return State(model, update.init(model))


def unrolls(config: TrainConfig) -> bool:
    """Whether layers are unrolled in training: by default on CPU, where it is faster, up to 12 layers."""
    if config.unroll is None:
        return jax.default_backend() == "cpu" and config.model.depth <= 12
    return config.unroll


def train_step(
    config: TrainConfig,
    update: optax.GradientTransformation,
    state: State,
    batch: tuple[Int[Array, "B N"], Int[Array, "B N"] | None],
    axis: str | None = None,
) -> tuple[State, dict[str, Array]]:
    """One step on the tokens and segments of `batch`: the state after it, and {"loss", "grad_norm"}, each [].

    axis: the mesh axis that the batch lies on.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def gradient(model: Transformer, tokens: Array, segments: Array | None) -> tuple[tuple[Array, Array], Transformer]:
        def loss(model: Transformer) -> tuple[Array, Array]:
            return batch_loss(astype(model, dtype), tokens, segments, axis=axis)

        return jax.value_and_grad(loss, has_aux=True)(model)

    if config.accumulate == 1:
        (total, count), sums = gradient(state.model, *batch)
    else:
        # Every part takes rows from all devices: part i is rows i, i + accumulate, ...
        parts = jax.tree.map(lambda a: a.reshape(-1, config.accumulate, *a.shape[1:]).swapaxes(0, 1), batch)
        zeros = ((jnp.zeros(()), jnp.array(0)), jax.tree.map(jnp.zeros_like, state.model))
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(state.model, *part)), None)
        ((total, count), sums), _ = lax.scan(add, zeros, parts)
    count = jnp.maximum(count, 1)
    mean = jax.tree.map(lambda g: g / count, sums)
    updates, moments = update.update(mean, state.optimizer, state.model)
    metrics = {"loss": total / count, "grad_norm": optax.tree.norm(mean)}
    return State(optax.apply_updates(state.model, updates), moments), metrics


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh (data, model). Raises ConfigError if there are too few devices, or some process would have none."""
    devices = jax.devices()
    data = config.data or len(devices) // config.model
    size = data * config.model
    if not 0 < size <= len(devices) or (jax.process_count() > 1 and size != len(devices)):
        raise ConfigError(
            f"mesh: expected data x model to use the {len(devices)} devices there are, got {data} x {config.model}."
        )
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((data, config.model), ("data", "model"), axis_types=axes, devices=devices[:size])


def make_call(
    config: TrainConfig,
    batches: WorldBatches | TextBatches,
    update: optax.GradientTransformation,
    mesh: Mesh,
    state: Any,
) -> jax.stages.Wrapped:
    """The jitted call: (leaves of the state, inputs) -> (leaves, {"loss", "grad_norm"} [steps_per_call]).

    `state` gives structure and shapes. The call takes leaves, as flattening a deep model in Python at every
    dispatch would cost more than dispatching.
    """
    structure = jax.tree.structure(state)
    places = jax.tree.leaves(shardings(state, mesh))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def step(state: State, inputs: Any) -> tuple[State, dict[str, Array]]:
        batch = jax.tree.map(lambda a: lax.with_sharding_constraint(a, rows), batches.batch(inputs))
        return train_step(config, update, state, batch, axis="data")

    def call(leaves: list[Array], inputs: Any) -> tuple[list[Array], dict[str, Array]]:
        state, metrics = lax.scan(step, jax.tree.unflatten(structure, leaves), inputs)
        return jax.tree.leaves(state), metrics

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(call, donate_argnums=0, in_shardings=(places, None), out_shardings=(places, everywhere))


def make_state(config: TrainConfig, update: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state at step 0, made where its parameters lie."""

    def fresh() -> State:
        return initial_state(config, update, jax.random.key(config.seed))

    return jax.jit(fresh, out_shardings=shardings(jax.eval_shape(fresh), mesh))()


# Evaluation.


def make_evaluation(
    config: TrainConfig, batches: WorldBatches | TextBatches, mesh: Mesh, structure: Any
) -> Callable[[Sequence[Array]], dict[str, float]]:
    """(leaves of the model) -> metrics on held-out paths.

    loss: nats per token. For worlds, excess_loss: the mean over held-out contexts of KL(world || model) of the next
    token, nats per token: exactly what the loss is above the ideal observer's in expectation, and never negative.
    For text, bits_per_byte.
    """
    held_out = batches.evaluation(config.eval_batches)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    world = batches.world if isinstance(batches, WorldBatches) else None

    def excess(world: worlds.World, model: Transformer, tokens: Array) -> Array:
        exact = world.next_log_probs(tokens)[1:-1]
        learned = laws(model, tokens[:-1])
        return jnp.where(jnp.isneginf(exact), 0, jnp.exp(exact) * (exact - learned)).sum()

    @jax.jit
    def one(leaves: Sequence[Array], tokens: Array, segments: Array | None) -> tuple[Array, ...]:
        model = jax.tree.unflatten(structure, leaves)
        total, count = batch_loss(model, tokens, segments, axis="data")
        above = jnp.zeros(())
        if world is not None:
            above = jax.vmap(functools.partial(excess, world, model))(tokens).sum()
        return total, count, above

    def evaluate(leaves: Sequence[Array]) -> dict[str, float]:
        sums = np.zeros(3)
        for batch in held_out:
            placed = jax.tree.map(lambda a: _place(a, rows), batch)
            sums += np.array(jax.device_get(one(leaves, *placed)), float)
        loss = sums[0] / sums[1]
        if isinstance(batches, WorldBatches):
            return {"eval_loss": loss, "excess_loss": sums[2] / sums[1]}
        per_token = batches.store.bytes_per_token("validation")
        return {"eval_loss": loss, "bits_per_byte": loss / math.log(2) / per_token}

    return evaluate


def _place(array: Any, sharding: NamedSharding) -> Array:
    """An array that every process can make, laid on the mesh; each process hands over its own part."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


# The loop.


class _Stop:
    """Whether SIGTERM or Ctrl-C has asked for an orderly end. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals, where this is the main thread, until the end of the block."""

        def handle(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = signal.Signals(number).name

        try:
            before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now: all processes answer alike, or some would wait for ever in a collective."""
        if jax.process_count() == 1:
            return self.asked is not None
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(self.asked is not None))))


class _Progress:
    """A bar that rewrites its line on a terminal; plain lines otherwise. Only the first process speaks."""

    def __init__(self, steps: int, out: TextIO) -> None:
        self.steps, self.out = steps, out
        self.live = out.isatty()
        self.speaks = jax.process_index() == 0
        self.note = ""

    def line(self, message: str) -> None:
        """Print a line that stays."""
        if self.speaks:
            print(("\r\x1b[K" if self.live else "") + message, file=self.out, flush=True)

    def bar(self, step: int) -> None:
        """Show how far the run is; nothing where the output is not a terminal."""
        if self.speaks and self.live:
            done = round(24 * step / self.steps)
            self.out.write(f"\r\x1b[K[{'#' * done}{'.' * (24 - done)}] {step}/{self.steps} {self.note}")
            self.out.flush()


class _Metrics:
    """What the calls report: fetched one log interval late, so that the device never waits, and timed."""

    def __init__(self, config: TrainConfig, file: Path, rate: optax.Schedule, resumed: int) -> None:
        self.config, self.file, self.rate = config, file, rate
        self.windows: list[list[tuple[int, dict[str, Array]]]] = [[]]
        self.last_good = resumed
        self.clock = time.perf_counter()
        if jax.process_index() == 0:
            # What was logged after the step that training goes on from will be logged again.
            kept = [json.dumps(row) + "\n" for row in read_metrics(file) if row["step"] <= resumed]
            partial = file.with_suffix(".jsonl.tmp")
            partial.write_text("".join(kept), "utf-8")
            os.replace(partial, file)

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """The metrics of a call whose first step is `step`."""
        self.windows[-1].append((step, metrics))

    def fetch(self, everything: bool = False) -> list[dict[str, float]]:
        """Close the current window, and return the rows of those before it, or of all. Raises TrainingDiverged."""
        if self.windows[-1]:
            self.windows.append([])
        ready = self.windows[:-1] if everything else self.windows[:-2]
        self.windows = self.windows[len(ready) :]
        return [self._row(window) for window in ready]

    def check(self) -> None:
        """Wait for all that has been dispatched. Raises TrainingDiverged if any of it is not finite."""
        for window in self.windows:
            self._values(window)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the rates."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def _values(self, window: Sequence[tuple[int, dict[str, Array]]]) -> tuple[np.ndarray, np.ndarray]:
        """Losses and gradient norms of a window's steps."""
        if not window:
            return np.zeros(0), np.zeros(0)
        fetched = jax.device_get([metrics for _, metrics in window])
        losses, norms = (np.concatenate([m[name] for m in fetched]) for name in ("loss", "grad_norm"))
        bad = ~(np.isfinite(losses) & np.isfinite(norms))
        if bad.any():
            first = int(np.argmax(bad))
            raise self.diverged(window[0][0] + first, f"is {losses[first]} (gradient norm {norms[first]})")
        return losses, norms

    def diverged(self, step: int, what: str) -> TrainingDiverged:
        """The error for a loss that is not finite."""
        return TrainingDiverged(
            f"the loss at step {step} {what}. The last good checkpoint is step {self.last_good}. "
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


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    resume: bool | int = False,
    overwrite: bool = False,
    out: TextIO = sys.stdout,
) -> dict[str, float]:
    """Run `config` in the folder `workdir` and return the last evaluation's metrics.

    resume: go on from the latest state in the folder (True), or from that of a step. overwrite: delete a run that
    is there. Raises ConfigError rather than touch another run's folder, and TrainingDiverged on a loss that is not
    finite, before it can reach a checkpoint. On SIGTERM or Ctrl-C it finishes the jitted call, saves, says how to
    resume, and returns.
    """
    workdir = Path(workdir)
    config = resolve(config)
    mesh = make_mesh(config.mesh)
    if (config.batch_size // config.accumulate) % mesh.shape["data"]:
        raise ConfigError(
            f"batch_size: expected batch_size / accumulate to be a multiple of the {mesh.shape['data']} ways of the "
            f"mesh's data axis, got {config.batch_size} / {config.accumulate}."
        )
    _check_kernels(config)
    stop, progress = _Stop(), _Progress(config.steps, out)
    batches = make_batches(config, progress.line)
    update = optimizer(config.optim, config.steps)
    state = make_state(config, update, mesh)
    structure = jax.tree.structure(state)
    evaluate = make_evaluation(config, batches, mesh, jax.tree.structure(state.model))
    call = make_call(config, batches, update, mesh, state)

    # The folder is touched last: a config that cannot be built leaves what is there alone.
    store = batches.store if isinstance(batches, TextBatches) else None
    definition = definition_of(config, batches.vocabulary, store)
    if jax.process_index() == 0:
        prepare_workdir(workdir, definition, resume=resume is not False, overwrite=overwrite)
    checkpoints = Checkpoints(workdir, config, definition)
    _introduce(config, workdir, mesh, state, progress)

    with contextlib.closing(checkpoints), stop.listening():
        step = 0
        if resume is not False:
            step, state, forgotten = checkpoints.resume(state, None if resume is True else resume)
            later = f"; what was saved at {', '.join(map(str, forgotten))} is deleted" if forgotten else ""
            progress.line(f"resumed from step {step}{later}")
        metrics = _Metrics(config, workdir / "metrics.jsonl", schedule(config.optim, config.steps), step)
        per_token = None if store is None else store.bytes_per_token("train")
        leaves = jax.tree.leaves(state)
        del state  # its buffers are donated to the first call

        def report(rows: Sequence[Mapping[str, float]]) -> None:
            for row in rows:
                metrics.write(row)
                progress.note = f"loss {row['loss']:.4f}"
                bits = "" if per_token is None else f"  {row['loss'] / math.log(2) / per_token:.4f} bits per byte"
                progress.line(
                    f"step {row['step']:>6}/{config.steps}  loss {row['loss']:.4f} nats{bits}  lr {row['lr']:.2e}  "
                    f"{row['tokens_per_second']:,.0f} tokens/s"
                )

        def save(resumable: bool) -> dict[str, float]:
            """Evaluate this step, and save it if it is to be kept; checked first, so that no NaN is ever saved."""
            metrics.check()
            if step % config.log_every == 0:
                report(metrics.fetch(everything=True))
            with metrics.paused():
                state = jax.tree.unflatten(structure, leaves)
                scores = evaluate(jax.tree.leaves(state.model))
                if not all(map(math.isfinite, scores.values())):
                    raise metrics.diverged(step, f"is {scores['eval_loss']} on held-out paths")
                metrics.write({"step": step, **scores})
                progress.line(f"step {step:>6}/{config.steps}  {_readable(scores)}")
                if keep:
                    checkpoints.save(step, state.model, scores["eval_loss"], state if resumable else None)
                    metrics.last_good = step
            return scores

        def inputs_of(step: int) -> Any:
            return jax.tree.map(
                lambda a: _place(a, NamedSharding(mesh, PartitionSpec(*(None, "data")[: np.ndim(a)]))),
                batches.inputs(step, config.steps_per_call),
            )

        keep = True
        if step >= config.steps:
            progress.line(f"{workdir} is finished. To analyse it: python analyze.py {workdir}")
            known = [row for row in read_metrics(workdir / "metrics.jsonl") if "eval_loss" in row]
            return {name: value for name, value in known[-1].items() if name != "step"} if known else {}
        scores: dict[str, float] = save(resumable=True) if step == 0 else {}
        compiled = call.lower(leaves, inputs_of(step)).compile()
        metrics.clock = time.perf_counter()
        while step < config.steps:
            leaves, reported = compiled(leaves, inputs_of(step))
            metrics.add(step, reported)
            step += config.steps_per_call
            progress.bar(step)
            if step % config.log_every == 0:
                report(metrics.fetch())
            stopping = stop.agreed()
            resumable = stopping or step % config.checkpoint.every == 0 or step == config.steps
            keep = resumable or step in checkpoints.series
            if keep or step % config.eval_every == 0:
                scores = save(resumable)
            if config.sample_every and step % config.sample_every == 0:
                with metrics.paused():
                    progress.line(_sample(config, batches, jax.tree.unflatten(structure, leaves).model, step))
            if stopping and step < config.steps:
                checkpoints.close()
                progress.line(f"stopped at step {step}, and saved. To go on: the same command with --resume")
                return scores
        report(metrics.fetch(everything=True))
    progress.line(f"done: {workdir}. To analyse it: python analyze.py {workdir}")
    return scores


def _check_kernels(config: TrainConfig) -> None:
    kernels = {getattr(aggregate, "kernel", None) for aggregate, _ in resolved_layers(config.model)}
    if "cudnn" in kernels and jax.default_backend() != "gpu":
        raise ConfigError(
            f"kernel: expected 'plain' or 'xla' on {jax.default_backend()}, got 'cudnn', which needs an NVIDIA GPU."
        )


def _introduce(config: TrainConfig, workdir: Path, mesh: Mesh, state: State, progress: _Progress) -> None:
    parameters = sum(a.size for a in jax.tree.leaves(state.model))
    kernels = {
        getattr(layer.aggregate, "kernel", None) for block in state.model.layers.blocks for layer in block.period
    } - {None}
    kind = jax.devices()[0].device_kind
    progress.line(
        f"{config.name}: {parameters:,} parameters, {config.compute_dtype}, "
        + (f"attention kernel {', '.join(sorted(map(str, kernels)))}, " if kernels else "")
        + f"on {mesh.size} x {kind} ({mesh.shape['data']} data x {mesh.shape['model']} model), in {workdir}"
    )


def _readable(scores: Mapping[str, float]) -> str:
    units = {"eval_loss": "nats per token", "excess_loss": "nats above the ideal observer", "bits_per_byte": ""}
    return "  ".join(f"{name} {value:.5f} {units[name]}".rstrip() for name, value in scores.items())


def _sample(config: TrainConfig, batches: WorldBatches | TextBatches, model: Transformer, step: int) -> str:
    """A path that the model samples, as it is shown during training."""
    vocabulary = batches.vocabulary
    begin = vocabulary.begin if vocabulary.begin is not None else 0
    key = stream(jax.random.key(config.seed), f"sample {step}")
    steps = min(config.model.max_length - 1, 120) or 1
    tokens = _sampler(steps)(model, jnp.array([begin]), key)
    shown = vocabulary.decode(np.concatenate([[begin], np.asarray(tokens)]))
    return f"step {step:>6}/{config.steps}  sample: {shown!r}"


@functools.cache
def _sampler(steps: int) -> Any:
    return jax.jit(lambda model, prompt, key: sample_paths(model, prompt, key, steps, 1).tokens[0])


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with every default of the model and the world written out, so that a run's folder stays true."""
    data = config.data
    if isinstance(data, WorldData):
        data = WorldData(data.world, worlds.make(data.world, **data.params).params)
    return dataclasses.replace(config, model=resolve_model(config.model), data=data)
