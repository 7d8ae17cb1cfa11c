"""Associative recall: pairs of a key and a value, where a key that comes again brings the same value again."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxwalk.worlds._parameters import require
from jaxwalk.worlds._world import World


class _AssociativeRecall(World):
    def __init__(self, keys: int, values: int) -> None:
        self.keys, self.values = keys, values
        symbols = [*(f"k{i}" for i in range(keys)), *(f"v{i}" for i in range(values))]
        params = {"keys": keys, "values": values}
        super().__init__(keys + values, symbols, name="associative_recall", params=params)

    def _laws(self, tokens: Int32[Array, " T"]) -> Float[Array, "T+1 V"]:
        ids = jnp.arange(self.vocab_size)
        any_key = jnp.where(ids < self.keys, 1 / self.keys, 0)
        any_value = jnp.where(ids < self.keys, 0, 1 / self.values)

        # The value that each key had, 0 (a key) for none. A path with a key in a value's place is impossible.
        def read(value_of: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            t, before, token = at
            key = jnp.minimum(token, self.keys - 1)
            known = jnp.where(value_of[key] > 0, ids == value_of[key], any_value)
            law = jnp.where(t % 2 == 0, known, any_key)
            return jnp.where(t % 2 == 0, value_of, value_of.at[before].set(token, mode="drop")), law

        before = jnp.concatenate([jnp.zeros(min(len(tokens), 1), jnp.int32), tokens[:-1]])
        _, laws = jax.lax.scan(read, jnp.zeros(self.keys, jnp.int32), (jnp.arange(len(tokens)), before, tokens))
        return jnp.log(jnp.concatenate([any_key[None], laws]))

    def _sample(self, key: Array, n: int, length: int) -> Int32[Array, "n length"]:
        return _sample(self, key, n, length)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample(world: _AssociativeRecall, key: Array, n: int, length: int) -> Array:
    of_key, of_path = jax.random.split(key)
    keys = jax.random.randint(of_key, (n, (length + 1) // 2), 0, world.keys)
    value_of = jax.random.randint(of_path, (n, world.keys), world.keys, world.vocab_size)
    pairs = jnp.stack([keys, jnp.take_along_axis(value_of, keys, axis=1)], axis=2)
    return pairs.reshape(n, 2 * keys.shape[1])[:, :length]


def associative_recall(keys: int = 8, values: int = 8) -> World:
    """Keys k0, k1, ... at even positions, uniform; after a key the value it had before in this path, else any.

    keys, values: how many there are, at least 1 of each; `keys + values` tokens. A value v0, v1, ... that a key has
    for the first time is uniform, so that a path is one draw of a map from keys to values: what a model must carry is
    all pairs so far.

    The task of Ba et al. 2016 (1610.06258), as a language with an exact law; Arora et al. 2023 (2312.04927) trace to
    it most of the difference between attention and other aggregates.
    """
    require(keys >= 1 and values >= 1, "at least 1 of each", keys=keys, values=values)
    return _AssociativeRecall(keys, values)
