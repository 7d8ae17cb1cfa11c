"""Copying after a delay: a random string, a wait, and the same string again."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxwalk.worlds._parameters import require
from jaxwalk.worlds._world import World


class _CopyAfterDelay(World):
    def __init__(self, letters: int, string: int, delay: int) -> None:
        self.letters, self.string, self.delay = letters, string, delay
        self.wait, self.go = letters, letters + 1  # the last two tokens
        self.back = string + delay + 1  # from a letter to the same one in the string before
        self.period = self.back + string
        symbols = [*(f"s{i}" for i in range(letters)), "wait", "go"]
        params = {"letters": letters, "string": string, "delay": delay}
        super().__init__(letters + 2, symbols, name="copy_after_delay", params=params)

    def _laws(self, tokens: Int32[Array, " T"]) -> Float[Array, "T+1 V"]:
        t = jnp.arange(len(tokens) + 1)
        phase, ids = t % self.period, jnp.arange(self.vocab_size)
        # Before the first copy there is nothing to look back to, and no phase that asks for it.
        copied = jnp.concatenate([jnp.zeros(self.back, jnp.int32), tokens])[: len(t)]
        due = jnp.where(phase < self.back - 1, self.wait, jnp.where(phase < self.back, self.go, copied))
        drawn = jnp.where(ids < self.letters, 1 / self.letters, 0)
        return jnp.log(jnp.where((phase < self.string)[:, None], drawn, due[:, None] == ids))

    def _sample(self, key: Array, n: int, length: int) -> Int32[Array, "n length"]:
        return _sample(self, key, n, length)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample(world: _CopyAfterDelay, key: Array, n: int, length: int) -> Array:
    cycles = -(-length // world.period)
    drawn = jax.random.randint(key, (n, cycles, world.string), 0, world.letters)
    waits = jnp.full((n, cycles, world.delay), world.wait, drawn.dtype)
    go = jnp.full((n, cycles, 1), world.go, drawn.dtype)
    cycle = jnp.concatenate([drawn, waits, go, drawn], axis=2)
    return cycle.reshape(n, cycles * world.period)[:, :length]


def copy_after_delay(letters: int = 8, string: int = 4, delay: int = 8) -> World:
    """`string` random letters, `delay` times the token "wait", one "go", the same letters again; and over again.

    letters: how many there are, s0, s1, ..., at least 1, uniform and independent; `letters + 2` tokens.
    string: how many are to be kept in mind, at least 1. delay: for how long, at least 0.

    A path starts with a string. All that is uncertain are its letters, so a cycle of 2 string + delay + 1 tokens costs
    string * log(letters) nats, and a model that keeps nothing in mind pays that twice. In the copy there is one thing
    to remember for each token, and it lies string + delay + 1 tokens back.

    Hochreiter & Schmidhuber 1997 (Neural Computation 9(8)) ask whether what was seen before a delay is still there
    after it; this form, which repeats a string after a marker, is that of Arjovsky et al. 2016 (1511.06464).
    """
    require(
        letters >= 1 and string >= 1 and delay >= 0,
        "letters >= 1, string >= 1 and delay >= 0",
        letters=letters,
        string=string,
        delay=delay,
    )
    return _CopyAfterDelay(letters, string, delay)
