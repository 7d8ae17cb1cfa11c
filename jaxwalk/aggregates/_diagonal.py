"""What elementwise recurrences share: h_t = a_t h_(t-1) + b_t, real or complex, and the rows of their mixing matrices.

A document starts with a decay a of 0, which forgets what was before it. Nothing is divided by a product of decays, and
no logarithms are subtracted, so that decays of 0 and 1 are exact and have finite derivatives.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Num


def recur(decay: Num[Array, " T *n"], entering: Num[Array, " T *n"], start: Num[Array, "*n"]) -> Num[Array, " T *n"]:
    """All h_t, from `start` before the first position.

    A scan on CPU, where it is 1.3 to 3 times faster with its gradient; elsewhere an associative scan (Blelloch 1990),
    which takes log T steps. Chunks and unrolling gain nothing: it waits for memory.
    """

    def one_by_one(decay: Array, entering: Array, start: Array) -> Array:
        def step(h: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            h = at[0] * h + at[1]
            return h, h

        return lax.scan(step, start, (decay, entering))[1]

    def all_at_once(decay: Array, entering: Array, start: Array) -> Array:
        return associative(decay, entering.at[0].add(decay[0] * start))

    return lax.platform_dependent(decay, entering, start, cpu=one_by_one, default=all_at_once)


def associative(decay: Num[Array, " T *n"], entering: Num[Array, " T *n"]) -> Num[Array, " T *n"]:
    """`recur` from a start of zeros, by an associative scan."""

    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    return lax.associative_scan(join, (decay, entering))[1]


def rows_of(
    rows: Int[Array, " R"], decay: Num[Array, " T *n"], writes: Num[Array, " T *n"], reads: Num[Array, " R *n"]
) -> Num[Array, " T R *n"]:
    """[j, i, ...]: reads_i (the product of the decays after j up to i) writes_j, and 0 for j > i.

    What position rows[i] reads of what position j wrote: rows of A, source positions first.
    """

    def back(carried: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        j, decay, write = at
        carried = jnp.where((rows == j).reshape(-1, *(1,) * (reads.ndim - 1)), reads, carried)
        return carried * decay[None], carried * write[None]

    dtype = jnp.result_type(decay, reads)
    sources = jnp.arange(len(decay), dtype=rows.dtype), decay, writes
    return lax.scan(back, jnp.zeros(reads.shape, dtype), sources, reverse=True)[1]


def recur_and_read(
    parts: Callable[[Any], tuple[Array, Array, Array]], at: Any, start: Num[Array, " N *n"]
) -> tuple[Num[Array, " T *n"], Num[Array, " N *n"]]:
    """sum over N of reads_t h_t for all t, and the last h, where decay_t, entering_t and reads_t are parts(at_t).

    `recur` for states that are much larger than what they are made of and what is read of them: on CPU these exist
    for one position at a time, and of a forward pass only the states are kept for the backward pass, in which the
    decays are made again. With its gradient it is 2 to 4 times faster than making them before the scan.
    """

    def one_by_one(at: Any, start: Array) -> tuple[Array, Array]:
        @jax.checkpoint
        def step(h: Array, at: Any) -> tuple[Array, Array]:
            decay, entering, reads = parts(at)
            h = decay * h + entering
            return h, jnp.sum(reads * h, axis=0)

        last, y = lax.scan(step, start, at)
        return y, last

    def all_at_once(at: Any, start: Array) -> tuple[Array, Array]:
        decay, entering, reads = jax.vmap(parts)(at)
        h = associative(decay, entering.at[0].add(decay[0] * start))
        return jnp.sum(reads * h, axis=1), h[-1]

    return lax.platform_dependent(at, start, cpu=one_by_one, default=all_at_once)


def rows_read(
    rows: Int[Array, " R"],
    parts: Callable[[Any], tuple[Array, Array]],
    at: Any,
    reads: Num[Array, "R N *n"],
) -> Num[Array, " T R *n"]:
    """`rows_of` for such states, summed over the state, the first axis: decay_t and writes_t are parts(at_t)."""

    def back(carried: Array, source: tuple[Array, Any]) -> tuple[Array, Array]:
        j, at = source
        decay, writes = parts(at)
        carried = jnp.where((rows == j).reshape(-1, *(1,) * (reads.ndim - 1)), reads, carried)
        return carried * decay[None], jnp.sum(carried * writes[None], axis=1)

    sources = jnp.arange(len(jax.tree.leaves(at)[0]), dtype=rows.dtype), at
    return lax.scan(back, jnp.zeros_like(reads), sources, reverse=True)[1]
