"""The spectrum of the Jacobian of one context vector with respect to one token vector, matrix-free."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxwalk.filters import indices
from jaxwalk.model.inputs import Index, Segments, Tokens, check_index, prepare
from jaxwalk.model.transformer import Transformer
from jaxwalk.probes.gradients import contexts_of, token_vectors


class Spectrum(NamedTuple):
    """The largest singular values of a Jacobian J [D, D] with their vectors: J right_i = values_i left_i.

    Attributes:
        values: [k], in decreasing order.
        left: [k, D], unit directions in which the context vector moves.
        right: [k, D], unit directions in which the token vector moves.
        residual: [k], |J' left_i - values_i right_i|, a bound on the error of each value.
    """

    values: Float[Array, " k"]
    left: Float[Array, "k D"]
    right: Float[Array, "k D"]
    residual: Float[Array, " k"]


def context_spectrum(
    model: Transformer,
    tokens: Tokens,
    source: Index,
    at: Index = -1,
    k: int = 8,
    *,
    steps: int | None = None,
    segments: Segments | None = None,
) -> Spectrum:
    """The top k singular values and vectors of d context_at / d token vector_source, without forming the Jacobian.

    Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation. Each step takes one Jacobian-vector and one
    vector-Jacobian product. The spectrum is zero if `source` comes after `at`.

    Args:
        model: the model.
        tokens: [T], the path.
        source: the position of the token vector.
        at: the position of the context vector.
        k: the number of singular values, from 1 to D.
        steps: the number of iterations, from k to D; by default 2k + 16, at most D. Increase it if `residual` is too
            large.
        segments: [T], the document of each position.

    Returns:
        The singular values and vectors.

    Raises:
        ValueError: if `tokens` is not a path of the model, a position does not exist, or k or steps is out of range.
    """
    path = prepare(model, tokens, segments, source, at)
    D = model.width
    source, at = check_index("source", source, path.length), check_index("at", at, path.length)
    steps = min(2 * k + 16, D) if steps is None else steps
    if not 1 <= k <= steps <= D:
        raise ValueError(f"k, steps: expected 1 <= k <= steps <= {D} (the width), got k = {k}, steps = {steps}.")
    return _spectrum(model, path.tokens, path.segments, source, at, k=k, steps=steps)


@functools.partial(jax.jit, static_argnames=("k", "steps"))
def _spectrum(
    model: Transformer, tokens: Array, segments: Array | None, source: Array, at: Array, *, k: int, steps: int
) -> Spectrum:
    tokens = jnp.where((source < 0) | (at < 0), -1, tokens)  # an index out of range makes everything NaN
    vectors = token_vectors(model, tokens)
    contexts = contexts_of(model, tokens, segments)
    _, push = jax.linearize(lambda v: contexts(vectors.at[source].set(v))[at], vectors[source])
    pull = jax.linear_transpose(push, vectors[source])
    D, dtype = model.width, vectors.dtype

    def orthogonalised(x: Array, basis: Array) -> tuple[Array, Array]:
        """x orthogonalised against the rows of `basis`, as a unit vector, and its length before normalisation."""
        for _ in range(2):  # once leaves rounding errors; twice is enough
            x = x - (basis @ x) @ basis
        length = jnp.linalg.norm(x)
        return x / jnp.maximum(length, jnp.finfo(dtype).tiny), length

    def step(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        left, right, v = carry
        right = right.at[i].set(v)
        u, alpha = orthogonalised(push(v), left)
        left = left.at[i].set(u)
        v, beta = orthogonalised(pull(u)[0], right)
        return (left, right, v), (alpha, beta)

    empty = jnp.zeros((steps, D), dtype)
    first = jax.random.normal(jax.random.key(0), (D,), dtype)
    start = (empty, empty, first / jnp.linalg.norm(first))
    (left, right, _), (alpha, beta) = lax.scan(step, start, indices(steps))
    U, values, Vt = jnp.linalg.svd(jnp.diag(alpha) + jnp.diag(beta[:-1], 1))
    residual = beta[-1] * jnp.abs(U[-1])
    missing = (source < 0) | (at < 0)
    spectrum = Spectrum(values[:k], (U.T @ left)[:k], (Vt @ right)[:k], residual[:k])
    return jax.tree.map(lambda a: jnp.where(missing, jnp.nan, a), spectrum)
