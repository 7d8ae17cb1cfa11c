"""Derivatives of path probabilities and of context vectors. Ordinary ones: nothing is held.

All take one path, with fused kernels replaced by their plain form where a derivative needs it, and are batched
with `jax.vmap`. All raise ValueError for tokens that are no path of the model. Units: nats, and units of embedding
space, in which token vectors and context vectors are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxwalk.filters import module
from jaxwalk.paths import path_log_prob, step_log_probs
from jaxwalk.transformer import Index, Layer, Segments, Tokens, Transformer, Walk, check_index, check_tokens, plain

COMPILING = 1.5e11
"""How many products of two numbers take about as long as compiling a block of rows."""
PASSED = 1 << 21
"""About how many numbers the arrays of the backward passes that run together may have: what caches hold."""
WRITTEN_OUT = 1 << 28
"""How many numbers the Jacobians of filters may have that are written out for `context_sensitivity`."""


def token_vectors(model: Transformer, tokens: Tokens) -> Float[Array, "T D"]:
    """The token vectors e_v of a path."""
    return jax.vmap(model.embed)(check_tokens(model, tokens))


def path_gradient(
    model: Transformer, tokens: Tokens, given: int = 1, segments: Segments | None = None
) -> Float[Array, "T D"]:
    """d log P(path | given) / d token vectors, in nats per unit of embedding space, through the walk only.

    Entry j says how the path's probability moves when the j-th token's vector moves, as a point that is walked
    through; the same vector's role as an output vector, where tied, is not part of it. The last token is not
    walked through: its entry is zero.
    """
    tokens = check_tokens(model, tokens, model.max_length + 1)
    model = plain(model)

    def score(vectors: Array) -> Array:
        return step_log_probs(model, tokens, given, segments=segments, vectors=vectors).sum()

    return jax.grad(score)(jax.vmap(model.embed)(tokens))


def station_gradient(
    model: Transformer,
    tokens: Tokens,
    given: int = 1,
    segments: Segments | None = None,
    *,
    of: Callable[[Walk], Float[Array, ""]] | None = None,
) -> Float[Array, "S T D"]:
    """d log P(path | given) / d nudge, in nats per unit: the gradient at every station, in one backward pass.

    of: a scalar of the walk to differentiate instead, as in `lambda walk: walk.context[-1] @ direction`; all T tokens
    are then walked, and `given` says nothing.
    """
    model = plain(model)
    tokens = check_tokens(model, tokens, model.max_length + (of is None))
    nudge = jnp.zeros((2 * model.depth + 1, len(tokens), model.width), model.embed.table.dtype)
    if of is not None:
        return jax.grad(lambda nudge: of(model.walk(tokens, nudge=nudge, segments=segments)))(nudge)
    return jax.grad(lambda nudge: path_log_prob(model, tokens, given, nudge, segments))(nudge)


def context_sensitivity(model: Transformer, tokens: Tokens, segments: Segments | None = None) -> Float[Array, "T T"]:
    """|d c_t / d token vector_j| in the Frobenius norm, row t, column j: how far moving a token moves each context.

    Exact, by reverse mode: T x D backward passes, each over the path up to the end of its block of rows, some
    directions at a time. Memory is bounded at any T and D: about `PASSED` numbers for each array of a pass, and at most
    twice `WRITTEN_OUT` for the filters' Jacobians, whole and of a block. Above the diagonal it is exactly zero. It is
    the size of a local derivative, and no share of anything: rows do not sum to a whole.
    """
    return _sensitivity(model, check_tokens(model, tokens), None if segments is None else jnp.asarray(segments))


@jax.jit
def _sensitivity(model: Transformer, tokens: Array, segments: Array | None) -> Array:
    T = len(tokens)
    # Each block is compiled by itself: as many as pay. With 8 the work is 9/16 of that with one.
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    work = T**2 * model.width * (weights + 4 * T * model.width * model.depth)
    size = -(-T // max(1, min(8, T // 4, round((work / COMPILING) ** 0.5))))
    starts = range(0, T, size)
    model = _filters_written_out(plain(model), tokens, segments)

    def block(start: int) -> Callable[[], Array]:
        end = min(start + size, T)
        part = tokens[:end], None if segments is None else segments[:end]
        return lambda: jnp.pad(_sensitivity_rows(model, *part, start + jnp.arange(size)), ((0, 0), (0, T - end)))

    # A switch in a loop, so that what one block needs in memory is free again for the next.
    blocks = [block(start) for start in starts]
    return lax.map(lambda n: lax.switch(n, blocks), jnp.arange(len(blocks))).reshape(-1, T)[:T]


def _sensitivity_rows(model: Transformer, tokens: Array, segments: Array | None, rows: Array) -> Array:
    """The stated rows; zeros for those after the end."""
    T, D, dtype = len(tokens), model.width, model.embed.table.dtype
    below = dataclasses.replace(model, layers=model.layers[:-1], norm=None)  # whose contexts the last layer is given
    given = below.walk(tokens, segments=segments).context
    pull_below = _context_vjp(below, tokens, segments)
    passes = -(-D // max(1, min(64, PASSED // (T * max(4 * T, D)))))  # as with four heads
    together = -(-D // passes)

    def row(t: Array) -> Array:
        pull_last = jax.vjp(lambda x: _context(model, x, t, segments), given)[1]

        def add(squares: Array, directions: Array) -> tuple[Array, None]:
            pulled = jax.vmap(pull_last, out_axes=1)(jax.nn.one_hot(directions, D, dtype=dtype))[0]
            return squares + jnp.sum(jax.vmap(pull_below, 1, 1)(pulled) ** 2, axis=(1, 2)), None

        directions = jnp.arange(passes * together).reshape(passes, together)
        return jnp.where(t < T, jnp.sqrt(lax.scan(add, jnp.zeros(T, dtype), directions)[0]), 0)

    return lax.map(row, rows)


def _context(model: Transformer, x: Float[Array, "T D"], t: Array, segments: Array | None) -> Float[Array, " D"]:
    """The context vector at t where the last layer is given x: of what that layer does, one row."""
    if not model.layers:
        return model.context(x[t])
    layer = model.layers[-1]
    h = layer.source(x, layer.aggregate_norm)
    y = layer.aggregate.at(h, t, segments)[None]
    return model.context(layer(x[t][None], lambda _: y)[0][1, 0])


def _filters_written_out(model: Transformer, tokens: Array, segments: Array | None) -> Transformer:
    """The same function of this path, with the Jacobians of as many filter steps written out as fit, but the last."""
    fitting = WRITTEN_OUT // (len(tokens) * model.width**2)
    stations = model.walk(tokens, segments=segments).stations
    layers = list(model.layers)
    for number, layer in enumerate(layers[:-1][:fitting]):  # of the last one, one position is passed a row
        if layer.filter is not None:
            read = layer.read_by_filter(*stations[2 * number : 2 * number + 2])
            fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
            layers[number] = _WrittenOut(**fields, jacobian=jax.vmap(functools.partial(_filter_jacobian, layer))(read))
    return dataclasses.replace(model, layers=tuple(layers), remat=False)


def _filter_jacobian(layer: Layer, x: Float[Array, " D"]) -> Float[Array, "D D"]:
    pull = jax.vjp(lambda x: layer.filtered(x[None])[0], x)[1]
    return lax.map(lambda c: pull(c)[0], jnp.eye(len(x), dtype=x.dtype), batch_size=min(len(x), 64))


@module
class _WrittenOut(Layer):
    """A layer whose derivative meets the filter step as one product with its Jacobian, [D, D] for each position.

    An MLP of 4 D neurons has 8 D^2 weights, each of which a cotangent would meet: with T x D of them, that is most of
    the work, and the Jacobian is paid for by the first D. It holds for the path that it was made of, and its prefixes.
    """

    jacobian: Float[Array, "T D D"] = nnx.data(kw_only=True)

    def filtered(self, x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        y = lax.stop_gradient(super().filtered(x))
        return y + jnp.einsum("tij,tj->ti", self.jacobian[: len(x)], x - lax.stop_gradient(x))


def context_jvp(
    model: Transformer, tokens: Tokens, tangents: Float[Array, "T D"], segments: Segments | None = None
) -> Float[Array, "T D"]:
    """How the context vectors move when the token vectors move along `tangents`: J t, by forward mode."""
    return jax.jvp(_contexts(model, tokens, segments), (token_vectors(model, tokens),), (tangents,))[1]


def context_vjp(
    model: Transformer, tokens: Tokens, cotangents: Float[Array, "T D"], segments: Segments | None = None
) -> Float[Array, "T D"]:
    """How the token vectors would have to move to raise sum(cotangents * contexts) fastest: J' c, by reverse mode."""
    return _context_vjp(model, tokens, segments)(cotangents)


class Spectrum(NamedTuple):
    """The largest singular values of a Jacobian J [D, D], with their vectors: J right_i = values_i left_i.

    values: [k], falling. left: [k, D], how the context vector moves. right: [k, D], along which the token vector
    moves. residual: [k], the most that each value may be off: |J' left_i - values_i right_i|, in units of the values.
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

    Golub-Kahan-Lanczos bidiagonalisation, fully reorthogonalised: each of the `steps` (by default 2k + 16, at most D)
    is one Jacobian-vector product each way. Look at `residual`, and take more steps where it is too large. A source
    after `at` has a spectrum of zeros. Raises ValueError for positions that do not exist and a k that is not from 1
    to D.
    """
    tokens = check_tokens(model, tokens)
    T, D = len(tokens), model.width
    source, at = check_index("source", source, T), check_index("at", at, T)
    steps = min(2 * k + 16, D) if steps is None else steps
    if not 1 <= k <= steps <= D:
        raise ValueError(f"k, steps: expected 1 <= k <= steps <= {D} (the width), got k = {k}, steps = {steps}.")
    segments = None if segments is None else jnp.asarray(segments)
    tokens = jnp.where((source < 0) | (at < 0), -1, tokens)  # of a position that is not there everything is NaN
    return _spectrum(plain(model), tokens, segments, source, at, k, steps)


@functools.partial(jax.jit, static_argnames=("k", "steps"))
def _spectrum(
    model: Transformer, tokens: Array, segments: Array | None, source: Array, at: Array, k: int, steps: int
) -> Spectrum:
    vectors = token_vectors(model, tokens)
    context = lambda v: _contexts(model, tokens, segments)(vectors.at[source].set(v))[at]
    _, push = jax.linearize(context, vectors[source])
    pull = jax.linear_transpose(push, vectors[source])
    D, dtype = model.width, vectors.dtype

    def orthogonal(x: Array, basis: Array) -> tuple[Array, Array]:
        """x without its part in the rows of `basis`, as a unit vector, and its length; twice is enough."""
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
    (left, right, _), (alpha, beta) = lax.scan(step, start, jnp.arange(steps))
    U, values, Vt = jnp.linalg.svd(jnp.diag(alpha) + jnp.diag(beta[:-1], 1))
    residual = beta[-1] * jnp.abs(U[-1])
    return Spectrum(values[:k], (U.T @ left)[:k], (Vt @ right)[:k], residual[:k])


def _contexts(model: Transformer, tokens: Tokens, segments: Segments | None) -> Callable[[Array], Array]:
    """The function that is differentiated: token vectors [T, D] -> context vectors [T, D]."""
    model = plain(model)
    return lambda vectors: model.walk(tokens, vectors=vectors, segments=segments).context


def _context_vjp(model: Transformer, tokens: Tokens, segments: Segments | None) -> Callable[[Array], Array]:
    pull = jax.vjp(_contexts(model, tokens, segments), token_vectors(model, tokens))[1]
    return lambda cotangents: pull(cotangents)[0]
