"""What elementwise recurrences share: h_t = a_t h_(t-1) + b_t, real or complex, and the rows of their mixing matrices.

A document starts with a decay a of 0, which forgets what was before it. Nothing is divided by a product of decays, and
no logarithms are subtracted, so that decays of 0 and 1 are exact and have finite derivatives.
"""

import operator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Num


def recur(decay: Num[Array, " T *n"], entering: Num[Array, " T *n"], start: Num[Array, "*n"]) -> Num[Array, " T *n"]:
    """All h_t, from `start` before the first position.

    A scan on CPU, where it is several times faster; elsewhere an associative scan (Blelloch 1990), which takes
    log T steps.
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

    What position rows[i] reads of what position j wrote: rows of A, source positions first. Where the last axis is
    a state that a channel is the sum of, use `summed_rows_of`, which does not keep it.
    """
    return _carried_back(rows, decay, writes, reads, operator.mul)


def summed_rows_of(
    rows: Int[Array, " R"], decay: Num[Array, "T *n N"], writes: Num[Array, "T *n N"], reads: Num[Array, "R *n N"]
) -> Num[Array, " T R *n"]:
    """`rows_of`, summed over the last axis, the state."""
    return _carried_back(rows, decay, writes, reads, lambda carried, write: jnp.sum(carried * write, axis=-1))


def _carried_back(rows, decay, writes, reads, of):  # type: ignore[no-untyped-def]
    asks = (rows[None] == jnp.arange(len(decay), dtype=rows.dtype)[:, None]).reshape(
        len(decay), len(rows), *(1,) * (reads.ndim - 1)
    )

    def back(carried: Array, at: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        asked, decay, write = at
        carried = jnp.where(asked, reads, carried)
        return carried * decay[None], of(carried, write[None])

    dtype = jnp.result_type(decay, reads)
    return lax.scan(back, jnp.zeros(reads.shape, dtype), (asks, decay, writes), reverse=True)[1]
