"""Contributions of the tokens of a path to the log-probability of a token: four methods, and how far each adds up.

The held attribution is complete by construction: its parts sum to the log-probability itself. The other three measure
what changes when token vectors are replaced by a baseline, and their sums are compared with the total change. None of
them is *the* answer: they agree for a function that is affine in the token vectors, and differ where it is not.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxwalk._loops import map_in_batches
from jaxwalk._products import exact
from jaxwalk.filters import indices, wide
from jaxwalk.model.build import plain
from jaxwalk.model.inputs import Index, Segments, Tokens, check_index, prepare
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import log_probs_of
from jaxwalk.probes.decomposition import by_token, check_dtype, check_error, log_prob_readout
from jaxwalk.probes.gradients import contexts_of, token_vectors

CELLS, NODES, GRID = 32, 4, 256
"""Integrated gradients: cells of Gauss-Legendre quadrature, nodes per cell, and points of the grid that places the
cells."""
BATCH = 8
"""The number of occluded paths that are walked together."""


class Attribution(NamedTuple):
    """Contributions of tokens to a log-probability, or to a difference of log-probabilities, in nats.

    Attributes:
        by_token: [T].
        rest: [], what is not due to any token.
        whole: [], what the contributions should sum to.
        gap: [], by_token.sum() + rest - whole, 0 for a complete attribution.
    """

    by_token: Float[Array, " T"]
    rest: Float[Array, ""]
    whole: Float[Array, ""]
    gap: Float[Array, ""]


def held_attribution(
    model: Transformer, tokens: Tokens, token: Index, at: Index = -1, segments: Segments | None = None
) -> Attribution:
    """log p(token | tokens up to `at`), in nats, split by the held-coefficient decomposition, in one backward pass.

    Args:
        model: the model, in float32 or float64.
        tokens: [T], the path.
        token: the id whose log-probability is split.
        at: the position that the token follows.
        segments: [T], the document of each position.

    Returns:
        The attribution; `rest` is due to position vectors, biases and the entropy.

    Raises:
        ValueError, DecompositionError: as in `decompose`.
    """
    check_dtype(model)
    path = prepare(model, tokens, segments, token, at)
    token = check_index("token", token, model.vocab_size, from_end=False)
    at = check_index("at", at, path.length)
    attribution, error = _held_attribution(model, path.tokens, token, at, path.segments)
    check_error(error, model)
    return attribution._replace(by_token=path.cut(attribution.by_token))


@jax.jit
@exact
def _held_attribution(
    model: Transformer, tokens: Array, token: Array, at: Array, segments: Array | None
) -> tuple[Attribution, Array]:
    """The attribution and the error of the decomposition."""
    tokens = jnp.where((token < 0) | (at < 0), -1, tokens)
    context = plain(model).contexts(tokens, segments)[at]
    direction, constant = log_prob_readout(model, context, token)
    parts = by_token(model, tokens, segments, at, np.int32(model.stations), direction[None])
    rest = parts.by_position.sum() + parts.bias[0] + constant
    whole = log_probs_of(model, context[None], token[None])[0]
    return _attribution(parts.by_token[:, 0], rest, whole), parts.error


def gradient_attribution(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index = -1,
    segments: Segments | None = None,
    baseline: Float[Array, " D"] | None = None,
) -> Attribution:
    """Gradient times (token vector - baseline): a first-order estimate of how log p(token) differs from the baseline.

    Args:
        model, tokens, token, at, segments: as in `held_attribution`, in any dtype.
        baseline: [D], the vector that replaces every token vector; the mean token vector by default.

    Returns:
        The attribution; `whole` is log p(token) minus its value with every token vector at the baseline.

    Raises:
        ValueError: if `tokens` is not a path of the model, a token or position is out of range, or a shape is wrong.
    """
    return _run(_gradient, model, tokens, token, at, segments, baseline)


def integrated_gradients(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index = -1,
    segments: Segments | None = None,
    baseline: Float[Array, " D"] | None = None,
) -> Attribution:
    """The gradient integrated along the straight line from the baseline (Sundararajan et al., arXiv 1703.01365).

    Complete up to quadrature error: Gauss-Legendre quadrature in cells that are shorter where the log-probability is
    more curved. Avoid a baseline of zeros, which starts at the singularity of the first norm. Takes the arguments of
    `gradient_attribution` and raises the same errors.
    """
    return _run(_integrate, model, tokens, token, at, segments, baseline)


def occlusion(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index = -1,
    segments: Segments | None = None,
    baseline: Float[Array, " D"] | None = None,
) -> Attribution:
    """How far log p(token) falls when one token vector at a time is replaced by the baseline.

    The gap is due to interactions between tokens. Takes the arguments of `gradient_attribution` and raises the same
    errors.
    """
    return _run(_occlude, model, tokens, token, at, segments, baseline)


Method = Callable[[Callable[[Array], Array], Array, Array], Array]
"""(log-probability as a function of token vectors, token vectors [T, D], baselines [T, D]) -> by_token [T]."""


def _run(
    method: Method,
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index,
    segments: Segments | None,
    baseline: Array | None,
) -> Attribution:
    path = prepare(model, tokens, segments, token, at, baseline)
    token = check_index("token", token, model.vocab_size, from_end=False)
    at = check_index("at", at, path.length)
    if baseline is not None and jnp.shape(baseline) != (model.width,):
        raise ValueError(f"baseline: expected a vector [{model.width}], got shape {jnp.shape(baseline)}.")
    attribution = _attribute(model, path.tokens, token, at, path.segments, baseline, method=method)
    return attribution._replace(by_token=path.cut(attribution.by_token))


@functools.partial(jax.jit, static_argnames="method")
def _attribute(
    model: Transformer,
    tokens: Array,
    token: Array,
    at: Array,
    segments: Array | None,
    baseline: Array | None,
    *,
    method: Method,
) -> Attribution:
    tokens = jnp.where((token < 0) | (at < 0), -1, tokens)  # an index out of range makes everything NaN
    contexts = contexts_of(model, tokens, segments)

    def score(vectors: Array) -> Array:
        return log_probs_of(model, contexts(vectors)[at][None], token[None])[0]

    vectors = token_vectors(model, tokens)
    baseline = jax.vmap(model.embed.vector)(model.embed.table).mean(0) if baseline is None else baseline
    baselines = jnp.broadcast_to(baseline.astype(vectors.dtype), vectors.shape)
    whole = score(vectors) - score(baselines)
    return _attribution(method(score, vectors, baselines), jnp.zeros_like(whole), whole)


def _attribution(by_token: Array, rest: Array, whole: Array) -> Attribution:
    return Attribution(by_token, rest, whole, by_token.sum() + rest - whole)


def _gradient(score: Callable[[Array], Array], vectors: Array, baselines: Array) -> Array:
    dtype = wide(vectors.dtype)
    return jnp.sum(jax.grad(score)(vectors).astype(dtype) * (vectors - baselines).astype(dtype), axis=-1)


def _occlude(score: Callable[[Array], Array], vectors: Array, baselines: Array) -> Array:
    # Index T, which is out of range, scores the unchanged path. It is scored in the same batches as the others because
    # another program would round differently, and tokens without any effect would be credited with the difference.
    T = len(vectors)
    occluded_score = lambda j: score(vectors.at[j].set(baselines[jnp.minimum(j, T - 1)], mode="drop"))
    scores = map_in_batches(occluded_score, indices(T + 1), BATCH)
    return scores[T] - scores[:T]


def _integrate(score: Callable[[Array], Array], vectors: Array, baselines: Array) -> Array:
    direction, dtype = vectors - baselines, vectors.dtype
    slope = lambda a: jax.jvp(lambda a: score(baselines + a.astype(dtype) * direction), (a,), (jnp.ones_like(a),))[1]
    # Cells of equal curvature, plus a tenth of it spread evenly so that no cell is long.
    wide_dtype = wide(dtype)
    grid = jnp.linspace(0, 1, GRID + 1, dtype=wide_dtype)
    curvature = jnp.sqrt(jnp.abs(jnp.diff(map_in_batches(slope, grid, 16))))
    density = curvature + 0.1 * curvature.mean() + jnp.finfo(curvature.dtype).tiny
    cumulative = jnp.concatenate([jnp.zeros_like(density[:1]), jnp.cumsum(density) / density.sum()])
    ends = jnp.interp(jnp.linspace(0, 1, CELLS + 1, dtype=wide_dtype), cumulative, grid)
    nodes, weights = (jnp.asarray(a, wide_dtype) for a in np.polynomial.legendre.leggauss(NODES))
    width = jnp.diff(ends)
    points = (ends[:-1, None] + width[:, None] * (nodes + 1)[None] / 2).reshape(-1)
    point_weights = (width[:, None] * weights[None] / 2).reshape(-1)

    def add(total: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        a, weight = item
        return total + weight * jax.grad(score)(baselines + a.astype(dtype) * direction).astype(wide_dtype), None

    total = lax.scan(add, jnp.zeros(vectors.shape, wide_dtype), (points, point_weights))[0]
    return jnp.sum(total * direction.astype(wide_dtype), axis=-1)
