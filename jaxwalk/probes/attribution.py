"""What each token of a path contributes to the log-probability of a token: four answers, and how far each adds up.

The held attribution is complete by construction: its parts sum to the log-probability itself. The other three ask what
changes when token vectors are replaced by a baseline, and their sums are compared with the whole change. None of them
is *the* answer: they agree for a function that is affine in the token vectors, and differ where it is not.
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

CELLS, NODES, SCAN = 32, 4, 256
"""Integrated gradients: cells of Gauss's rule, its nodes per cell, and the points at which the path is surveyed
first."""
TOGETHER = 8
"""How many occluded paths are walked together."""


class Attribution(NamedTuple):
    """by_token: [T], in nats. rest: [], what is due to no token. whole: [], what all of it should sum to. gap: [],
    by_token.sum() + rest - whole, 0 for a complete attribution."""

    by_token: Float[Array, " T"]
    rest: Float[Array, ""]
    whole: Float[Array, ""]
    gap: Float[Array, ""]


def held_attribution(
    model: Transformer, tokens: Tokens, token: Index, at: Index = -1, segments: Segments | None = None
) -> Attribution:
    """log p(token | tokens up to `at`) split by the held-coefficient decomposition, in one backward pass.

    Args:
        model: in float32 or float64.
        tokens: [T], the path.
        token: the id whose log-probability is split.
        at: the position after which it comes.
        segments: [T], the document of each position.

    Returns:
        The attribution; `rest` is the part of positions, biases and the entropy.

    Raises:
        ValueError, DecompositionError: as `decompose` does.
    """
    check_dtype(model)
    path = prepare(model, tokens, segments, token, at)
    token = check_index("token", token, model.vocab_size, from_end=False)
    at = check_index("at", at, path.length)
    attribution, error = _held(model, path.tokens, token, at, path.segments)
    check_error(error, model)
    return attribution._replace(by_token=path.cut(attribution.by_token))


@jax.jit
@exact
def _held(
    model: Transformer, tokens: Array, token: Array, at: Array, segments: Array | None
) -> tuple[Attribution, Array]:
    """The attribution, and the error of the decomposition."""
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
    """Gradient times (token vector - baseline): the first-order estimate of log p(token) minus its value at the
    baseline.

    Args:
        model, tokens, token, at, segments: as in `held_attribution`.
        baseline: [D], what every token vector is replaced by; the mean token vector by default.

    Raises:
        ValueError: for tokens that are no path, a token or position out of range, and a wrong shape.
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

    Complete up to quadrature: Gauss's rule in cells that are short where the log-probability bends. A baseline of zeros
    would start at the singularity of the first norm. Arguments and errors are those of `gradient_attribution`.
    """
    return _run(_integrated, model, tokens, token, at, segments, baseline)


def occlusion(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index = -1,
    segments: Segments | None = None,
    baseline: Float[Array, " D"] | None = None,
) -> Attribution:
    """How far log p(token) falls when one token vector at a time is replaced by the baseline.

    The gap is what tokens contribute together and not alone. Arguments and errors are those of `gradient_attribution`.
    """
    return _run(_occluded, model, tokens, token, at, segments, baseline)


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
    attribution = _attributed(model, path.tokens, token, at, path.segments, baseline, method=method)
    return attribution._replace(by_token=path.cut(attribution.by_token))


@functools.partial(jax.jit, static_argnames="method")
def _attributed(
    model: Transformer,
    tokens: Array,
    token: Array,
    at: Array,
    segments: Array | None,
    baseline: Array | None,
    *,
    method: Method,
) -> Attribution:
    tokens = jnp.where((token < 0) | (at < 0), -1, tokens)  # for a token or position that is none all is NaN
    contexts = contexts_of(model, tokens, segments)

    def score(vectors: Array) -> Array:
        return log_probs_of(model, contexts(vectors)[at][None], token[None])[0]

    vectors = token_vectors(model, tokens)
    baseline = jax.vmap(model.embed.vector)(model.embed.table).mean(0) if baseline is None else baseline
    start = jnp.broadcast_to(baseline.astype(vectors.dtype), vectors.shape)
    whole = score(vectors) - score(start)
    return _attribution(method(score, vectors, start), jnp.zeros_like(whole), whole)


def _attribution(by_token: Array, rest: Array, whole: Array) -> Attribution:
    return Attribution(by_token, rest, whole, by_token.sum() + rest - whole)


def _gradient(score: Callable[[Array], Array], vectors: Array, start: Array) -> Array:
    dtype = wide(vectors.dtype)
    return jnp.sum(jax.grad(score)(vectors).astype(dtype) * (vectors - start).astype(dtype), axis=-1)


def _occluded(score: Callable[[Array], Array], vectors: Array, start: Array) -> Array:
    # The unchanged path is scored in the same batches as the others, at index T: another program rounds differently,
    # and tokens that cannot matter would be given that difference.
    T = len(vectors)
    one = lambda j: score(vectors.at[j].set(start[jnp.minimum(j, T - 1)], mode="drop"))
    scores = map_in_batches(one, indices(T + 1), TOGETHER)
    return scores[T] - scores[:T]


def _integrated(score: Callable[[Array], Array], vectors: Array, start: Array) -> Array:
    way, dtype = vectors - start, vectors.dtype
    slope = lambda a: jax.jvp(lambda a: score(start + a.astype(dtype) * way), (a,), (jnp.ones_like(a),))[1]
    # Cells of equal bending, of which a tenth is spread evenly so that no cell is long.
    at_least32 = wide(dtype)
    grid = jnp.linspace(0, 1, SCAN + 1, dtype=at_least32)
    bend = jnp.sqrt(jnp.abs(jnp.diff(map_in_batches(slope, grid, 16))))
    density = bend + 0.1 * bend.mean() + jnp.finfo(bend.dtype).tiny
    reached = jnp.concatenate([jnp.zeros_like(density[:1]), jnp.cumsum(density) / density.sum()])
    ends = jnp.interp(jnp.linspace(0, 1, CELLS + 1, dtype=at_least32), reached, grid)
    nodes, weights = (jnp.asarray(a, at_least32) for a in np.polynomial.legendre.leggauss(NODES))
    width = jnp.diff(ends)
    points = (ends[:-1, None] + width[:, None] * (nodes + 1)[None] / 2).reshape(-1)
    shares = (width[:, None] * weights[None] / 2).reshape(-1)

    def add(total: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        a, share = item
        return total + share * jax.grad(score)(start + a.astype(dtype) * way).astype(at_least32), None

    total = lax.scan(add, jnp.zeros(vectors.shape, at_least32), (points, shares))[0]
    return jnp.sum(total * way.astype(at_least32), axis=-1)
