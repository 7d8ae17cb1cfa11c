"""Sweeps: one model definition trained from several seeds and learning rates side by side, as one program.

    swept = jw.sweep.train(config, seeds=(0, 1, 2), lrs=(1e-3, 3e-3))
    swept.losses[-1]  # held-out loss of the six members
    model = swept.member(4)

A member is what the ordinary loop (`training.train`) makes of the same config, seed and learning rate, to rounding.
Everything stays in memory: no checkpoints, no folder.
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
    """M members, the learning rates of the first seed first.

    config: resolved, with the seed whose held-out paths all members are scored on. seeds, lrs: of each member.
    models: every leaf [M, ...]. steps: [E], when the members were scored, from 0 to the last. losses: [E, M], nats per
    predicted token on held-out paths, the same for all members; NaN from where a member has diverged.
    """

    config: TrainConfig
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    models: Transformer
    steps: Int[np.ndarray, " E"]
    losses: Float[np.ndarray, "E M"]

    def member(self, number: int) -> Transformer:
        """The model of one member. Raises ValueError for a member that there is not."""
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
    """Train `config` from each of `seeds` at each peak learning rate of `lrs` (by default the config's).

    A seed decides initialisation and data, as it does for the ordinary loop, so that what differs between seeds is all
    that chance decides; the members of one seed share both, and so do the sweeps of different models. Members are
    scored every `eval_every` steps, on the held-out paths of `config.seed`. The config's mesh, checkpoints, logs and
    samples are left alone: a sweep runs on the first device. report: takes a line at each scoring.

    Raises ConfigError for a config that cannot be trained, and for seeds or rates that are none, repeated or negative.
    """
    config = training.resolve(config)
    seeds, rates = tuple(seeds), (config.optim.lr,) if lrs is None else tuple(lrs)
    for what, given in (("seeds", seeds), ("lrs", rates)):
        if not given or len(set(given)) < len(given) or not all(value >= 0 for value in given):
            raise ConfigError(f"{what}: expected at least one, all different and none below 0, got {list(given)}.")
    batches = training.make_batches(config, report)
    # A schedule is proportional to its peak, and AdamW's update to its learning rate, so the rate can be traced.
    at_rate_one = training.optimizer(dataclasses.replace(config.optim, lr=1.0), config.steps)
    update_at = lambda lr: optax.chain(at_rate_one, optax.scale(lr))
    over_rates, over_seeds = (None, 0, 0), (0, None, 0)  # of what a seed has, what a rate has, what a member has

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
        def together(state: training.State, inputs: Any) -> tuple[training.State, None]:
            one_seed = jax.vmap(step, over_rates)
            return jax.vmap(one_seed, over_seeds)(jax.vmap(batch)(keys, inputs), lrs, state), None

        return lax.scan(together, state, inputs)[0]

    sources = [
        dataclasses.replace(batches, seed=seed) if isinstance(batches, training.TextBatches) else batches
        for seed in seeds
    ]

    def inputs_of(step: int) -> Any:
        of_seeds = [source.inputs(step, config.steps_per_call) for source in sources]
        return jax.tree.map(lambda *rows: np.stack(rows, axis=1), *of_seeds)

    held_out = batches.evaluation(config.eval_batches)
    score = jax.jit(jax.vmap(jax.vmap(training.batch_loss, (0, None, None)), (0, None, None)))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    lr_values = jnp.array(rates, jnp.float32)
    state = jax.jit(jax.vmap(jax.vmap(start, over_rates[:2]), over_seeds[:2]))(keys, lr_values)
    advance = jax.jit(call, donate_argnums=0)
    steps, losses = [], []
    for done in range(0, config.steps + 1, config.steps_per_call):
        if done % config.eval_every == 0 or done == config.steps:
            parts = [score(state.model, *part) for part in held_out]
            total, count = (np.sum([np.asarray(part[i], float) for part in parts], axis=0) for i in range(2))
            steps.append(done)
            losses.append((total / count).ravel())
            if report is not None:
                report(f"step {done:>6}/{config.steps}  " + "  ".join(f"{loss:.4f}" for loss in losses[-1]))
        if done < config.steps:
            state = advance(state, keys, lr_values, inputs_of(done))
    return Sweep(
        config=config,
        seeds=tuple(seed for seed in seeds for _ in rates),
        lrs=tuple(lr for _ in seeds for lr in rates),
        models=jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), state.model),
        steps=np.array(steps),
        losses=np.array(losses),
    )


def held_out_losses(
    models: Transformer, paths: Int[np.ndarray, "n N"] | Int[Array, "n N"], batch_size: int = 64
) -> Float[np.ndarray, "M n"]:
    """The mean loss of each path under each of M stacked models, in nats per token after the first.

    paths: none of their tokens is padding. At most `batch_size` of them are walked at a time, by all models together.
    Raises ValueError for paths that are no matrix of at least one path of two tokens, and a batch of none.
    """
    paths = np.asarray(paths)
    if paths.ndim != 2 or len(paths) < 1 or paths.shape[1] < 2 or batch_size < 1:
        raise ValueError(
            f"paths: expected [n, N], at least 1 path of 2 tokens, in batches of at least 1, got shape "
            f"{list(paths.shape)} in batches of {batch_size}. Stack paths of one length."
        )
    size = min(batch_size, len(paths))
    whole = np.concatenate([paths, np.repeat(paths[-1:], -len(paths) % size, axis=0)])  # one program for all batches
    parts = [np.asarray(_losses(models, whole[at : at + size]), np.float64) for at in range(0, len(whole), size)]
    return np.concatenate(parts, axis=1)[:, : len(paths)]


@jax.jit
def _losses(models: Transformer, paths: Int[Array, "B N"]) -> Float[Array, "M B"]:
    one = lambda model, path: -scores(model, path).mean()
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(models, paths)


class HeldOut(NamedTuple):
    """Held-out paths [n, N] to choose with, and others, none in both, to report on.

    world, store: where they come from; one of them is None.
    """

    choosing: Int[np.ndarray, "n N"]
    own: Int[np.ndarray, "n N"]
    world: Any = None
    store: Any = None


def held_out(config: TrainConfig, n: int) -> HeldOut:
    """n paths of max_length + 1 tokens to choose with, and n others; of text as many as there are, none overlapping."""
    N = config.model.max_length + 1
    if isinstance(config.data, WorldData):
        world = worlds.make(config.data.world, **config.data.params)
        rows = np.asarray(world.sample(jax.random.fold_in(jax.random.key(config.seed), 0x5EED), 2 * n, N))
        return HeldOut(rows[:n], rows[n:], world=world)
    store = text.open_store(config.data)
    windows = store.windows("validation", N)
    whole = np.array([t for tokens, runs in windows for t, run in zip(tokens, runs, strict=True) if (run == 1).all()])
    n = min(n, len(whole) // 2)
    # Those of one document follow each other, so the two sets take turns.
    return HeldOut(whole[1::2][:n], whole[::2][:n], store=store)


def flops(config: ModelConfig) -> float:
    """Floating-point operations of scoring one path of max_length + 1 tokens, as XLA counts them.

    A scan's body counts once, however often it runs, which for recurrent aggregates is too few. NaN where the backend
    does not count.
    """
    model = jax.eval_shape(lambda: unrolled(init(config, jax.random.key(0))))  # a scan over layers counts one
    path = jax.ShapeDtypeStruct((config.max_length + 1,), jnp.int32)
    counted = jax.jit(path_log_prob).lower(model, path).cost_analysis() or {}
    return float(counted.get("flops", math.nan))


def count_parameters(config: ModelConfig) -> int:
    """How many parameters a model of this config has."""
    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: init(config, jax.random.key(0)))))


def match_parameters(config: ModelConfig, target: int) -> ModelConfig:
    """`config` with the hidden width of its filters, one for all layers, that brings it nearest to `target` parameters.

    What is left of the difference, `count_parameters` says: at most half of what one hidden unit has in all layers.
    Raises ConfigError where there is no filter, or where the rest of the model is too large already.
    """

    def with_hidden(hidden: int) -> ModelConfig:
        def widened(filter: MLPConfig | None) -> MLPConfig | None:
            return None if filter is None else dataclasses.replace(filter, hidden=hidden)

        chosen = config.filter
        return dataclasses.replace(
            config, filter=tuple(map(widened, chosen)) if isinstance(chosen, tuple) else widened(chosen)
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
