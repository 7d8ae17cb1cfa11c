"""The loss on held-out paths and, for worlds, its excess over the loss of the ideal observer."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxwalk import worlds
from jaxwalk.config import TrainConfig
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import laws
from jaxwalk.training._data import Batches, WorldBatches, place
from jaxwalk.training._step import batch_loss


def make_evaluation(
    config: TrainConfig, batches: Batches, mesh: Mesh, structure: Any
) -> Callable[[Sequence[Array]], dict[str, float]]:
    """The evaluation: leaves of a model with this tree `structure` -> metrics on held-out paths.

    "eval_loss" is in nats per token. For worlds, "excess_loss" is the mean over held-out contexts of KL(world || model)
    of the next token, in nats per token: in expectation exactly the difference between the loss and that of the ideal
    observer, and never negative. For text, "bits_per_byte" is the loss in other units.
    """
    held_out = batches.evaluation(config.eval_batches)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    world = batches.world if isinstance(batches, WorldBatches) else None

    def excess(world: worlds.World, model: Transformer, tokens: Array) -> Array:
        log_truth = world.next_log_probs(tokens)[1:-1]
        log_p = laws(model, tokens[:-1])
        return jnp.where(jnp.isneginf(log_truth), 0, jnp.exp(log_truth) * (log_truth - log_p)).sum()

    @jax.jit
    def evaluate_batch(leaves: Sequence[Array], tokens: Array, segments: Array | None) -> tuple[Array, ...]:
        model = jax.tree.unflatten(structure, leaves)
        total, count = batch_loss(model, tokens, segments, axis="data")
        excess_sum = jnp.zeros(())
        if world is not None:
            excess_sum = jax.vmap(functools.partial(excess, world, model))(tokens).sum()
        return total, count, excess_sum

    def evaluate(leaves: Sequence[Array]) -> dict[str, float]:
        sums = np.zeros(3)
        for batch in held_out:
            placed = jax.tree.map(lambda a: place(a, rows), batch)
            sums += np.array(jax.device_get(evaluate_batch(leaves, *placed)), float)
        loss = sums[0] / sums[1]
        if isinstance(batches, WorldBatches):
            return {"eval_loss": loss, "excess_loss": sums[2] / sums[1]}
        per_token = batches.store.bytes_per_token("validation")
        return {"eval_loss": loss, "bits_per_byte": loss / math.log(2) / per_token}

    return evaluate
