"""Induction: each path has a successor of its own for every token, which shows only by what has followed it."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxwalk.worlds._parameters import require
from jaxwalk.worlds._world import World

_CERTAIN = 1e3  # exp(-1e3) is 0 in float64 too: without noise, a successor seen once is known


class _Induction(World):
    def __init__(self, vocab_size: int, noise: float) -> None:
        self.noise = noise
        super().__init__(vocab_size, name="induction", params={"vocab_size": vocab_size, "noise": noise})

    def _laws(self, tokens: Int32[Array, " T"]) -> Float[Array, "T+1 V"]:
        V, noise = self.vocab_size, self.noise
        # A step x -> y is (1 - noise + noise/V) / (noise/V) times as likely where f(x) = y as where it is not, and
        # successors are independent, so the posterior of f(x) is the softmax of counts times the log of that ratio.
        weight = min(math.log1p((1 - noise) * V / noise), _CERTAIN) if noise else _CERTAIN

        def read(counts: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
            before, token = step
            counts = counts.at[before, token].add(1, mode="drop")
            return counts, (1 - noise) * jax.nn.softmax(weight * counts[token]) + noise / V

        # No token comes before the first: that step is counted in no row.
        before = jnp.concatenate([jnp.full(min(len(tokens), 1), V, jnp.int32), tokens[:-1]])
        _, laws = jax.lax.scan(read, jnp.zeros((V, V), float), (before, tokens))
        return jnp.log(jnp.concatenate([jnp.full((1, V), 1 / V), laws]))

    def _sample(self, key: Array, n: int, length: int) -> Int32[Array, "n length"]:
        return _sample(self, key, n, length)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample(world: _Induction, key: Array, n: int, length: int) -> Array:
    of_path, of_first, of_noise, of_step = jax.random.split(key, 4)
    successor = jax.random.randint(of_path, (n, world.vocab_size), 0, world.vocab_size)
    first = jax.random.randint(of_first, (n,), 0, world.vocab_size)
    noisy = jax.random.uniform(of_noise, (length, n)) < world.noise
    random = jax.random.randint(of_step, (length, n), 0, world.vocab_size)

    def walk(token: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        noisy, random = step
        return jnp.where(noisy, random, successor[jnp.arange(n), token]), token

    return jax.lax.scan(walk, first, (noisy, random))[1].T


def induction(vocab_size: int = 8, noise: float = 0.1) -> World:
    """Each path draws a map f from tokens to tokens; the next token is f(current), with probability `noise` any.

    vocab_size: V, at least 2. f(x) is uniform and independent for each x, and so is the first token.
    noise: 0 to 1, the probability that the next token is uniform over all V instead.

    The law is the posterior predictive given the steps of this path, which an observer who does not know f cannot
    beat: with n(x, y) steps from x to y and r = 1 + (1 - noise) V / noise,

        p(z | path ending in x) = (1 - noise) r^n(x, z) / sum_y r^n(x, y) + noise / V.

    What an induction head does (Olsson et al. 2022, 2209.11895): find where the current token was, copy what
    followed. Chains drawn anew for each path are those of Edelman et al. 2024 (2402.11004).
    """
    require(
        vocab_size >= 2 and 0 <= noise <= 1, "vocab_size >= 2 and 0 <= noise <= 1", vocab_size=vocab_size, noise=noise
    )
    return _Induction(vocab_size, noise)
