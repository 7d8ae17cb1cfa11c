"""What each token of a path does to the log-probability of a token: four answers, and how far each is from adding up.

`held` is exact by construction: its parts sum to the log-probability itself. The other three ask what changes when
token vectors are replaced by a baseline, and their sums are held against the whole change. None of them is *the*
answer: they agree for a function that is affine in the token vectors, and differ where it is not.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxwalk.decomposition import decompose, log_prob_readout
from jaxwalk.transformer import Index, Segments, Tokens, Transformer, check_index, check_tokens, plain

CELLS, NODES, SCAN = 32, 4, 256


class Attribution(NamedTuple):
    """by_token [T] in nats; `rest`, what is due to no token; `whole`, what all of it should sum to; `gap`.

    gap = by_token.sum() + rest - whole: 0 for a complete attribution.
    """

    by_token: Float[Array, " T"]
    rest: Float[Array, ""]
    whole: Float[Array, ""]
    gap: Float[Array, ""]


def held_attribution(
    model: Transformer, tokens: Tokens, token: Index, at: Index = -1, segments: Segments | None = None
) -> Attribution:
    """log p(token | tokens up to `at`) by the held-coefficient decomposition.

    `rest` is the part of positions, biases and the entropy. One backward pass. Raises as `decompose` does.
    """
    tokens = check_tokens(model, tokens)
    at = check_index("at", at, len(tokens))
    segments = None if segments is None else jnp.asarray(segments)
    with jax.default_matmul_precision("highest"):
        context = _context(plain(model), jnp.where(at < 0, -1, tokens), segments, at)
        direction, constant = log_prob_readout(model, context, token)
        whole = jax.nn.log_softmax(model.logits(context))[token]
    parts = decompose(model, tokens, at, segments=segments, along=direction[None])
    rest = parts.by_position.sum() + parts.bias[0] + constant
    return _attribution(parts.by_token[:, 0], rest, whole)


@jax.jit
def _context(model: Transformer, tokens: Array, segments: Array | None, at: Array) -> Array:
    return model.walk(tokens, segments=segments).context[at]


def gradient_attribution(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index = -1,
    segments: Segments | None = None,
    baseline: Float[Array, " D"] | None = None,
) -> Attribution:
    """Gradient times (token vector - baseline): the first-order guess at log p(token) minus its value at the baseline.

    baseline: [D], what every token vector is replaced by; by default the mean token vector.
    """
    return _run(_gradient, *_prepared(model, tokens, token, at, segments, baseline))


def integrated_gradients(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index = -1,
    segments: Segments | None = None,
    baseline: Float[Array, " D"] | None = None,
) -> Attribution:
    """The gradient integrated along the straight line from the baseline (Sundararajan et al., arXiv 1703.01365).

    Complete but for quadrature: Gauss's rule in cells that are short where the log-probability bends. A baseline of
    zeros would start at the singularity of the first norm; by default it is the mean token vector.
    """
    return _run(_integrated, *_prepared(model, tokens, token, at, segments, baseline))


def occlusion(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index = -1,
    segments: Segments | None = None,
    baseline: Float[Array, " D"] | None = None,
) -> Attribution:
    """How far log p(token) falls when one token vector alone is replaced by the baseline: exact, token by token.

    The gap is what tokens do together and not alone.
    """
    return _run(_occluded, *_prepared(model, tokens, token, at, segments, baseline))


def _attribution(by_token: Array, rest: Array, whole: Array) -> Attribution:
    return Attribution(by_token, rest, whole, by_token.sum() + rest - whole)


def _prepared(
    model: Transformer,
    tokens: Tokens,
    token: Index,
    at: Index,
    segments: Segments | None,
    baseline: Array | None,
) -> tuple[Transformer, Array, Array, Array, Array | None, Array]:
    tokens = check_tokens(model, tokens)
    token = check_index("token", token, model.vocab_size, from_end=False)
    at = check_index("at", at, len(tokens))
    baseline = model.token_vectors.mean(0) if baseline is None else jnp.asarray(baseline)
    if baseline.shape != (model.width,):
        raise ValueError(f"baseline: expected a vector [{model.width}], got shape {baseline.shape}.")
    segments = None if segments is None else jnp.asarray(segments)
    # Of a token or a position that is not there everything is NaN.
    return plain(model), jnp.where((token < 0) | (at < 0), -1, tokens), token, at, segments, baseline


@functools.partial(jax.jit, static_argnames="method")
def _run(
    method: Callable[[Callable[[Array], Array], Array, Array], Array],
    model: Transformer,
    tokens: Array,
    token: Array,
    at: Array,
    segments: Array | None,
    baseline: Array,
) -> Attribution:
    def score(vectors: Array) -> Array:
        context = model.walk(tokens, vectors=vectors, segments=segments).context[at]
        return jax.nn.log_softmax(model.logits(context))[token]

    vectors = jax.vmap(model.embed)(tokens)
    start = jnp.broadcast_to(baseline, vectors.shape).astype(vectors.dtype)
    whole = score(vectors) - score(start)
    return _attribution(method(score, vectors, start), jnp.zeros_like(whole), whole)


def _gradient(score: Callable[[Array], Array], vectors: Array, start: Array) -> Array:
    return jnp.sum(jax.grad(score)(vectors) * (vectors - start), axis=-1)


def _occluded(score: Callable[[Array], Array], vectors: Array, start: Array) -> Array:
    # The whole path is scored in the batches that the others are scored in, filled up with it to one size: a batch of
    # another size rounds in another way, and tokens that cannot matter would get that difference.
    T, batch = len(vectors), min(len(vectors) + 1, 8)
    one = lambda j: score(vectors.at[j].set(start[jnp.minimum(j, T - 1)], mode="drop"))
    scores = lax.map(one, jnp.minimum(jnp.arange(-(-(T + 1) // batch) * batch), T), batch_size=batch)
    return scores[T] - scores[:T]


def _integrated(score: Callable[[Array], Array], vectors: Array, start: Array) -> Array:
    way = vectors - start
    slope = lambda a: jax.jvp(lambda a: score(start + a * way), (a,), (jnp.ones_like(a),))[1]
    # Cells of equal bending, of which a tenth is shared out evenly so that none is long.
    grid = jnp.linspace(0, 1, SCAN + 1, dtype=vectors.dtype)
    bend = jnp.sqrt(jnp.abs(jnp.diff(lax.map(slope, grid, batch_size=16))))
    density = bend + 0.1 * bend.mean() + jnp.finfo(bend.dtype).tiny
    reached = jnp.concatenate([jnp.zeros_like(density[:1]), jnp.cumsum(density) / density.sum()])
    ends = jnp.interp(jnp.linspace(0, 1, CELLS + 1, dtype=vectors.dtype), reached, grid)
    nodes, weights = (jnp.asarray(a, vectors.dtype) for a in np.polynomial.legendre.leggauss(NODES))
    width = jnp.diff(ends)
    points = (ends[:-1, None] + width[:, None] * (nodes + 1)[None] / 2).reshape(-1)
    shares = (width[:, None] * weights[None] / 2).reshape(-1)

    def add(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        a, share = one
        return total + share * jax.grad(score)(start + a * way), None

    return jnp.sum(lax.scan(add, jnp.zeros_like(vectors), (points, shares))[0] * way, axis=-1)
