"""The loss, the optimizer and the training step, compiled as one donated call on a mesh."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxwalk.config import ConfigError, MeshConfig, OptimConfig, TrainConfig
from jaxwalk.filters import Key, stream
from jaxwalk.model.build import astype, init, unrolled
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import scored_steps, scores
from jaxwalk.sharding import shardings
from jaxwalk.training._data import Batches


def batch_loss(
    model: Transformer, tokens: Int[Array, "B N"], segments: Int[Array, "B N"] | None = None, axis: str | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """-log P summed over a batch of paths, in nats, and the number of predicted tokens.

    `axis` is the mesh axis that the batch is sharded over. Without it, a sharded kernel inside vmap gathers the whole
    batch.
    """
    score = lambda t, s: -scores(model, t, segments=s).sum()
    total = jax.vmap(score, spmd_axis_name=axis)(tokens, segments).sum()
    if segments is None:
        return total, jnp.array(tokens.shape[0] * (tokens.shape[1] - 1))
    return total, jax.vmap(lambda s: scored_steps(tokens.shape[1], segments=s))(segments).sum()


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step."""
    warmup = min(config.warmup, steps)
    rise = optax.linear_schedule(0.0, config.lr, warmup)
    final = config.lr * config.final_lr
    remaining = max(steps - warmup, 1)
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(config.lr)], [warmup])
    if config.schedule == "cosine":
        return optax.join_schedules(
            [rise, optax.cosine_decay_schedule(config.lr, remaining, config.final_lr)], [warmup]
        )
    decay = min(math.ceil(config.decay_share * steps), remaining)
    stable = optax.constant_schedule(config.lr)
    fall = optax.linear_schedule(config.lr, final, decay)
    return optax.join_schedules([rise, stable, fall], [warmup, steps - decay])


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv 1711.05101) with weight decay on the fields named in `decays`."""
    adamw = optax.adamw(
        schedule(config, steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
    return adamw if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def decay_mask(model: Any) -> Any:
    """Which leaves of a model weight decay applies to: the fields that their module names in `decays`."""

    def module_mask(module: Any) -> Any:
        declared: frozenset[str] = getattr(module, "decays", frozenset())
        leaves, structure = jax.tree_util.tree_flatten_with_path(
            module, is_leaf=lambda node: _is_submodule(node, module)
        )
        masks = [
            module_mask(node) if isinstance(node, nnx.Module) else getattr(path[0], "name", None) in declared
            for path, node in leaves
        ]
        return jax.tree.unflatten(structure, masks)

    return module_mask(model)


def _is_submodule(node: Any, module: Any) -> bool:
    return isinstance(node, nnx.Module) and node is not module


class State(NamedTuple):
    """The state of training: float32 parameters and the state of the optimizer."""

    model: Transformer
    optimizer: Any


def initial_state(config: TrainConfig, update: optax.GradientTransformation, key: Key) -> State:
    """The state at step 0. `key` is the root key of a run, `jax.random.key(seed)`."""
    model = init(config.model, stream(key, "model"))
    model = unrolled(model) if unrolls(config) else model
    return State(model, update.init(model))


def unrolls(config: TrainConfig) -> bool:
    """Whether layers are unrolled in training: by default on CPU, where it is faster, with up to 12 layers."""
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
    """One step on the tokens and segments of `batch`: the state after it, and {"loss", "grad_norm"}, [] each.

    `axis` is the mesh axis that the batch is sharded over.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def gradient(model: Transformer, tokens: Array, segments: Array | None) -> tuple[tuple[Array, Array], Transformer]:
        def loss(model: Transformer) -> tuple[Array, Array]:
            return batch_loss(astype(model, dtype), tokens, segments, axis=axis)

        return jax.value_and_grad(loss, has_aux=True)(model)

    if config.accumulate == 1:
        (total, count), sums = gradient(state.model, *batch)
    else:
        # Part i is rows i, i + accumulate, ..., so that every part has rows on all devices.
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
    """The mesh (data, model). Raises ConfigError if there are too few devices, or a process would have none."""
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
    batches: Batches,
    update: optax.GradientTransformation,
    mesh: Mesh,
    state: Any,
) -> jax.stages.Wrapped:
    """The jitted call: (leaves of the state, inputs) -> (leaves, {"loss", "grad_norm"} [steps_per_call]).

    It takes leaves because flattening a deep model in Python at every call would cost more than dispatching it. Of
    `state`, only structure and shapes are used.
    """
    structure = jax.tree.structure(state)
    placement = jax.tree.leaves(shardings(state, mesh))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def step(state: State, inputs: Any) -> tuple[State, dict[str, Array]]:
        batch = jax.tree.map(lambda a: lax.with_sharding_constraint(a, rows), batches.batch(inputs))
        return train_step(config, update, state, batch, axis="data")

    def call(leaves: list[Array], inputs: Any) -> tuple[list[Array], dict[str, Array]]:
        state, metrics = lax.scan(step, jax.tree.unflatten(structure, leaves), inputs)
        return jax.tree.leaves(state), metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(call, donate_argnums=0, in_shardings=(placement, None), out_shardings=(placement, replicated))


def make_state(config: TrainConfig, update: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state at step 0, created with the shardings of its leaves."""

    def fresh() -> State:
        return initial_state(config, update, jax.random.key(config.seed))

    return jax.jit(fresh, out_shardings=shardings(jax.eval_shape(fresh), mesh))()
