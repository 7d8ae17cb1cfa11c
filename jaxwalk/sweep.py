"""Sweeps: one model definition trained from several seeds and learning rates side by side, as one program.

    swept = jw.sweep.train(config, seeds=(0, 1, 2), lrs=(1e-3, 3e-3))
    swept.losses[-1]  # held-out loss of the six members
    model = swept.member(4)

Each member equals, to rounding, the result of `training.train` with the same config, seed and learning rate. Everything
stays in memory: no folder, no checkpoints.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk import text, training, worlds
from jaxwalk.config import ConfigError, MLPConfig, ModelConfig, TrainConfig, WorldData
from jaxwalk.filters import Key, stream
from jaxwalk.model.build import init, unrolled
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import path_log_prob, scores


@dataclass(frozen=True)
class Sweep:
    """M members: the first seed with each learning rate, then the second seed, and so on.

    Attributes:
        config: the resolved config, whose seed selects the held-out paths that all members are scored on.
        seeds, lrs: the seed and the learning rate of each member.
        models: the trained models, every leaf [M, ...].
        steps: [E], the steps at which members were scored, from 0 to the last.
        losses: [E, M], nats per predicted token on held-out paths, which are the same for all members; NaN once a
            member has diverged.
    """

    config: TrainConfig
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    models: Transformer
    steps: Int[np.ndarray, " E"]
    losses: Float[np.ndarray, "E M"]

    def member(self, number: int) -> Transformer:
        """The model of one member. Raises ValueError for a member that does not exist."""
        if not 0 <= number < len(self.seeds):
            raise ValueError(f"member: expected one from 0 to {len(self.seeds) - 1}, got {number}.")
        return jax.tree.map(lambda a: a[number], self.models)


def train(
    config: TrainConfig,
    seeds: Sequence[int],
    lrs: Sequence[float] | None = None,
    *,
    report: Callable[[str], object] | None = None,
) -> Sweep:
    """Train `config` from each seed at each peak learning rate.

    As in `training.train`, a seed determines initialisation and data, so seeds differ in everything that is random. The
    members of one seed share both, and so do sweeps of different models. Members are scored every `eval_every` steps on
    the held-out paths of `config.seed`. The config's mesh, checkpoints, logs and samples are ignored: a sweep runs on
    the first device.

    Args:
        config: the config.
        seeds: the seeds.
        lrs: the peak learning rates; by default the config's.
        report: called with a line of text at each scoring.

    Returns:
        The sweep.

    Raises:
        ConfigError: if the config cannot be trained, or seeds or learning rates are missing, repeated or negative.
    """
    config = training.resolve(config)
    seeds, rates = tuple(seeds), (config.optim.lr,) if lrs is None else tuple(lrs)
    for name, values in (("seeds", seeds), ("lrs", rates)):
        if not values or len(set(values)) < len(values) or not all(value >= 0 for value in values):
            raise ConfigError(f"{name}: expected at least one, all different and none below 0, got {list(values)}.")
    batches = training.make_batches(config, report)
    held_out = batches.evaluation(config.eval_batches)
    program = _program(config, batches)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    lr_values = jnp.array(rates, jnp.float32)
    state = program.start(keys, lr_values)
    steps, losses = [], []
    for steps_done in range(0, config.steps + 1, config.steps_per_call):
        if steps_done % config.eval_every == 0 or steps_done == config.steps:
            parts = [program.score(state.model, *part) for part in held_out]
            total, count = (np.sum([np.asarray(part[i], float) for part in parts], axis=0) for i in range(2))
            steps.append(steps_done)
            losses.append((total / count).ravel())
            if report is not None:
                report(f"step {steps_done:>6}/{config.steps}  " + "  ".join(f"{loss:.4f}" for loss in losses[-1]))
        if steps_done < config.steps:
            state = program.advance(state, keys, lr_values, _inputs(config, batches, seeds, steps_done))
    return Sweep(
        config=config,
        seeds=tuple(seed for seed in seeds for _ in rates),
        lrs=tuple(lr for _ in seeds for lr in rates),
        models=jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), state.model),
        steps=np.array(steps),
        losses=np.array(losses),
    )


class _Program(NamedTuple):
    """The jitted functions of a sweep of S seeds (keys [S]) and L learning rates [L].

    Attributes:
        start: (keys, lrs) -> the states at step 0, every leaf [S, L, ...].
        advance: (states, keys, lrs, inputs of `_inputs`) -> the states after one call; it donates `states`.
        score: (models, tokens, segments) -> `training.batch_loss` of every member, [S, L] each.
    """

    start: jax.stages.Wrapped
    advance: jax.stages.Wrapped
    score: jax.stages.Wrapped


def _program(config: TrainConfig, batches: Any) -> _Program:
    # A schedule is proportional to its peak, and AdamW's update to its learning rate, so the rate can be traced.
    at_rate_one = training.optimizer(dataclasses.replace(config.optim, lr=1.0), config.steps)
    update_at = lambda lr: optax.chain(at_rate_one, optax.scale(lr))
    over_rates, over_seeds = (None, 0, 0), (0, None, 0)  # for arguments per seed, per learning rate and per member

    def start(key: Key, lr: Array) -> training.State:
        return training.initial_state(config, update_at(lr), key)

    def batch(key: Key, inputs: Any) -> Any:
        source = batches
        if isinstance(source, training.WorldBatches):
            source = dataclasses.replace(source, key=stream(key, "data"))
        return source.batch(inputs)

    def step(batch: Any, lr: Array, state: training.State) -> training.State:
        return training.train_step(config, update_at(lr), state, batch)[0]

    def call(state: training.State, keys: Key, lrs: Array, inputs: Any) -> training.State:
        def advance_members(state: training.State, inputs: Any) -> tuple[training.State, None]:
            one_seed = jax.vmap(step, over_rates)
            return jax.vmap(one_seed, over_seeds)(jax.vmap(batch)(keys, inputs), lrs, state), None

        return lax.scan(advance_members, state, inputs)[0]

    return _Program(
        start=jax.jit(jax.vmap(jax.vmap(start, over_rates[:2]), over_seeds[:2])),
        advance=jax.jit(call, donate_argnums=0),
        score=jax.jit(jax.vmap(jax.vmap(training.batch_loss, (0, None, None)), (0, None, None))),
    )


def _inputs(config: TrainConfig, batches: Any, seeds: Sequence[int], step: int) -> Any:
    """Inputs of a call from `step`: those of `steps_per_call` steps, with an axis of seeds after that of steps."""
    is_text = isinstance(batches, training.TextBatches)
    sources = [dataclasses.replace(batches, seed=seed) if is_text else batches for seed in seeds]
    of_seeds = [source.inputs(step, config.steps_per_call) for source in sources]
    return jax.tree.map(lambda *rows: np.stack(rows, axis=1), *of_seeds)


def held_out_losses(
    models: Transformer, paths: Int[np.ndarray, "n N"] | Int[Array, "n N"], batch_size: int = 64
) -> Float[np.ndarray, "M n"]:
    """The mean loss of each path under each of M stacked models, in nats per token after the first.

    Args:
        models: the models, every leaf [M, ...].
        paths: [n, N], without padding.
        batch_size: the number of paths that are walked at a time, by all models together.

    Returns:
        [M, n].

    Raises:
        ValueError: if there is not at least one path of at least two tokens, or `batch_size` is below 1.
    """
    paths = np.asarray(paths)
    if paths.ndim != 2 or len(paths) < 1 or paths.shape[1] < 2 or batch_size < 1:
        raise ValueError(
            f"paths: expected [n, N], at least 1 path of 2 tokens, in batches of at least 1, got shape "
            f"{list(paths.shape)} in batches of {batch_size}. Stack paths of one length."
        )
    size = min(batch_size, len(paths))
    padded = np.concatenate([paths, np.repeat(paths[-1:], -len(paths) % size, axis=0)])  # one program for all batches
    batches = [padded[start : start + size] for start in range(0, len(padded), size)]
    parts = [np.asarray(_losses(models, batch), np.float64) for batch in batches]
    return np.concatenate(parts, axis=1)[:, : len(paths)]


@jax.jit
def _losses(models: Transformer, paths: Int[Array, "B N"]) -> Float[Array, "M B"]:
    loss = lambda model, path: -scores(model, path).mean()
    return jax.vmap(jax.vmap(loss, (None, 0)), (0, None))(models, paths)


class HeldOut(NamedTuple):
    """Two disjoint sets of held-out paths, and where they come from.

    Attributes:
        choosing: [n, N], paths to choose with, for example a learning rate.
        own: [n, N], other paths, to report results on.
        world, store: the source of the paths; one of them is None.
    """

    choosing: Int[np.ndarray, "n N"]
    own: Int[np.ndarray, "n N"]
    world: Any = None
    store: Any = None


def held_out(config: TrainConfig, n: int) -> HeldOut:
    """n held-out paths of max_length + 1 tokens to choose with and n others to report on.

    For text, the paths do not overlap, and there are fewer if the validation split is too small.
    """
    N = config.model.max_length + 1
    if isinstance(config.data, WorldData):
        world = worlds.make(config.data.world, **config.data.params)
        rows = np.asarray(world.sample(jax.random.fold_in(jax.random.key(config.seed), 0x5EED), 2 * n, N))
        return HeldOut(rows[:n], rows[n:], world=world)
    store = text.open_store(config.data)
    windows = store.windows("validation", N)
    whole = np.array(
        [row for tokens, runs in windows for row, run in zip(tokens, runs, strict=True) if (run == 1).all()]
    )
    n = min(n, len(whole) // 2)
    # Windows of one document are consecutive: alternate, so that both sets sample all documents.
    return HeldOut(whole[1::2][:n], whole[::2][:n], store=store)


def flops(config: ModelConfig) -> float:
    """Floating-point operations to score one path of max_length + 1 tokens, as counted by XLA.

    XLA counts the body of a scan once, so the count is too low for recurrent aggregates. NaN if the backend does not
    count.
    """
    # Unrolled, since a scan over layers would be counted as one layer.
    model = jax.eval_shape(lambda: unrolled(init(config, jax.random.key(0))))
    path = jax.ShapeDtypeStruct((config.max_length + 1,), jnp.int32)
    counted = jax.jit(path_log_prob).lower(model, path).cost_analysis() or {}
    return float(counted.get("flops", math.nan))


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of a model with this config."""
    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: init(config, jax.random.key(0)))))


def match_parameters(config: ModelConfig, target: int) -> ModelConfig:
    """`config` with the hidden width of all filters set so that the model is closest to `target` parameters.

    The remaining difference (see `count_parameters`) is at most half the parameters of one hidden unit in all layers.

    Raises:
        ConfigError: if there is no filter, or the rest of the model is already too large.
    """

    def with_hidden(hidden: int) -> ModelConfig:
        def widened(filter: MLPConfig | None) -> MLPConfig | None:
            return None if filter is None else dataclasses.replace(filter, hidden=hidden)

        filters = config.filter
        return dataclasses.replace(
            config, filter=tuple(map(widened, filters)) if isinstance(filters, tuple) else widened(filters)
        )

    least = count_parameters(with_hidden(1))
    unit = count_parameters(with_hidden(2)) - least
    if not unit:
        raise ConfigError("filter: expected an MLP in some layer, whose width could be chosen, got none.")
    if target < least - unit / 2:
        raise ConfigError(
            f"target: expected at least {least}, the parameters with filters of one hidden unit, got {target}. "
            "Lower the width or the depth."
        )
    return with_hidden(max(1, 1 + round((target - least) / unit)))
