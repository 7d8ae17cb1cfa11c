"""The spectrum of the derivative of one context vector with respect to one token vector, matrix-free."""

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
    """The largest singular values of a Jacobian J [D, D], with their vectors: J right_i = values_i left_i.

    values: [k], in decreasing order. left: [k, D], how the context vector moves. right: [k, D], along which the token
    vector moves. residual: [k], a bound on the error of each value: |J' left_i - values_i right_i|.
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

    Golub-Kahan-Lanczos bidiagonalisation with full reorthogonalisation: each step is one Jacobian-vector product each
    way. A source after `at` has a spectrum of zeros.

    Args:
        model: the model.
        tokens: [T], the path.
        source: the position of the token vector that moves.
        at: the position of the context vector.
        k: how many singular values, from 1 to D.
        steps: of the iteration; by default 2k + 16, at most D. Take more where `residual` is too large.
        segments: [T], the document of each position.

    Raises:
        ValueError: for positions that do not exist, and a k or steps out of range.
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
    tokens = jnp.where((source < 0) | (at < 0), -1, tokens)  # at a position that does not exist everything is NaN
    vectors = token_vectors(model, tokens)
    contexts = contexts_of(model, tokens, segments)
    _, push = jax.linearize(lambda v: contexts(vectors.at[source].set(v))[at], vectors[source])
    pull = jax.linear_transpose(push, vectors[source])
    D, dtype = model.width, vectors.dtype

    def orthogonal(x: Array, basis: Array) -> tuple[Array, Array]:
        """x without its part in the rows of `basis`, as a unit vector, and its length. Twice is enough."""
        for _ in range(2):
            x = x - (basis @ x) @ basis
        length = jnp.linalg.norm(x)
        return x / jnp.maximum(length, jnp.finfo(dtype).tiny), length

    def step(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        left, right, v = carry
        right = right.at[i].set(v)
        u, alpha = orthogonal(push(v), left)
        left = left.at[i].set(u)
        v, beta = orthogonal(pull(u)[0], right)
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
