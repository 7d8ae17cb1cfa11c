"""Batches as a function of the step: sampled on the device for worlds, read on the host for text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from jaxwalk import text, worlds
from jaxwalk.config import ConfigError, TrainConfig, WorldData
from jaxwalk.filters import Key, stream


@dataclass(frozen=True)
class WorldBatches:
    """Fresh paths of a world at every step, sampled inside the jitted call. `key` is the key of the run's data."""

    world: worlds.World
    vocabulary: Any
    batch_size: int
    length: int
    key: Key

    def inputs(self, step: int, count: int) -> Any:
        """Input of the jitted call for `count` steps from `step`: the steps [count]."""
        return jnp.arange(step, step + count)

    def batch(self, step: Int[Array, ""]) -> tuple[Int[Array, "B N"], None]:
        """Paths [B, N] of a step, and no segments. Traced."""
        return self.world.sample(jax.random.fold_in(self.key, step), self.batch_size, self.length), None

    def evaluation(self, batches: int) -> list[tuple[Array, None]]:
        """Held-out batches, the same at every evaluation."""
        key = stream(self.key, "evaluation")
        sample = jax.jit(lambda i: self.world.sample(jax.random.fold_in(key, i), self.batch_size, self.length))
        return [(sample(i), None) for i in range(batches)]


@dataclass(frozen=True)
class TextBatches:
    """Windows of a token store with the document of each position."""

    store: text.TokenStore
    batch_size: int
    length: int
    seed: int

    @property
    def vocabulary(self) -> Any:
        """The vocabulary of the store."""
        return self.store.vocabulary

    def inputs(self, step: int, count: int) -> Any:
        """Input of the jitted call for `count` steps from `step`: tokens and segments, [count, B, N] each."""
        rows = [self.store.batch(self.seed, step + i, self.batch_size, self.length) for i in range(count)]
        return tuple(np.stack(part) for part in zip(*rows, strict=True))

    def batch(self, inputs: tuple[Array, Array]) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
        """Tokens and segments of a step, which are its inputs."""
        return inputs

    def evaluation(self, batches: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Held-out batches, the same at every evaluation."""
        return [
            self.store.batch(self.seed, i, self.batch_size, self.length, split="validation") for i in range(batches)
        ]


Batches = WorldBatches | TextBatches


def make_batches(config: TrainConfig, report: Callable[[str], object] | None = None) -> Batches:
    """The data of a run. `report` is called with a line of text now and then while text is tokenised.

    Raises:
        ConfigError: if the vocabulary of the model does not match that of the data.
    """
    length = config.model.max_length + 1
    batches: Batches
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


def place(array: Any, sharding: NamedSharding) -> Array:
    """Shard an array that every process holds over the mesh; each process contributes its own part."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
