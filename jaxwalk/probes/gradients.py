"""Gradients of path probabilities, and products with the Jacobian of the context vectors. Nothing is held here.

All functions take one path and are batched with `jax.vmap`. Fused kernels are replaced by their plain form. Units are
nats, and units of embedding space, which token vectors and context vectors share.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwalk.aggregates._contract import documents_of
from jaxwalk.model.build import plain
from jaxwalk.model.inputs import Index, Segments, Tokens, check_given, check_shape, prepare
from jaxwalk.model.layer import Interventions, each_position
from jaxwalk.model.mixing import Matrices, Mixer
from jaxwalk.model.transformer import Transformer, Walk
from jaxwalk.paths.law import scores


def path_gradient(
    model: Transformer, tokens: Tokens, given: Index = 1, segments: Segments | None = None
) -> Float[Array, "T D"]:
    """d log P(path | the first `given` tokens) / d token vectors, in nats per unit of embedding space.

    Entry j says how the path's probability changes as the j-th token's vector moves, as a point that is walked through;
    the same vector's role as an output vector, where tied, is not part of it. The last token is not walked through: its
    entry is zero.

    Args:
        model: the model.
        tokens: [T], the path, of at most max_length + 1 tokens.
        given: how many tokens are given, at least 1.
        segments: [T], the document of each position.

    Raises:
        ValueError: for tokens that are no path of the model, and a `given` that is not from 1 to T.
    """
    path = prepare(model, tokens, segments, longest=model.max_length + 1)
    given = check_given(given, path.length)
    return path.cut(_path_gradient(model, path.tokens, given, path.count, path.segments))


@jax.jit
def _path_gradient(model: Transformer, tokens: Array, given: Any, count: Array, segments: Array | None) -> Array:
    model = plain(model)
    vectors = token_vectors(model, tokens)

    def score(vectors: Array) -> Array:
        altered = Interventions(), vectors, Matrices({}, {})
        return scores(model, tokens, given, count, segments, altered).sum()

    return jax.grad(score)(vectors)


def station_gradient(
    model: Transformer,
    tokens: Tokens,
    given: Index = 1,
    segments: Segments | None = None,
    *,
    of: Callable[[Walk], Float[Array, ""]] | None = None,
) -> Float[Array, "S T D"]:
    """d log P(path | given) / d nudge, in nats per unit: the gradient at every station, in one backward pass.

    Args:
        model, tokens, given, segments: as in `path_gradient`.
        of: a scalar of the walk to differentiate instead, as in `lambda walk: walk.context[-1] @ direction`. All T
            tokens are then walked, and `given` has no effect. It is part of the compiled program: pass the same
            function object again to reuse it.

    Raises:
        ValueError: for tokens that are no path of the model, and a `given` that is not from 1 to T.
    """
    if of is not None:  # a function of the walk must see its true length
        path = prepare(model, tokens, segments, exact=True)
        return _station_gradient_of(model, path.tokens, path.segments, of=of)
    path = prepare(model, tokens, segments, longest=model.max_length + 1)
    given = check_given(given, path.length)
    return path.cut(_station_gradient(model, path.tokens, given, path.count, path.segments), 1)


def _zero_nudge(model: Transformer, tokens: Array) -> Array:
    return jnp.zeros((model.stations, len(tokens), model.width), model.embed.table.dtype)


@jax.jit
def _station_gradient(model: Transformer, tokens: Array, given: Any, count: Array, segments: Array | None) -> Array:
    model = plain(model)

    def score(nudge: Array) -> Array:
        altered = Interventions(nudge), None, Matrices({}, {})
        return scores(model, tokens, given, count, segments, altered).sum()

    return jax.grad(score)(_zero_nudge(model, tokens))


@functools.partial(jax.jit, static_argnames="of")
def _station_gradient_of(
    model: Transformer, tokens: Array, segments: Array | None, *, of: Callable[[Walk], Array]
) -> Array:
    model = plain(model)
    return jax.grad(lambda nudge: of(model.walked(tokens, segments, Interventions(nudge))))(_zero_nudge(model, tokens))


def context_jvp(
    model: Transformer, tokens: Tokens, tangents: Float[Array, "T D"], segments: Segments | None = None
) -> Float[Array, "T D"]:
    """J t: how the context vectors move as the token vectors move along `tangents`, by forward mode.

    Raises ValueError for tokens that are no path of the model, and a wrong shape.
    """
    path = prepare(model, tokens, segments, tangents)
    check_shape("tangents", tangents, (path.length, model.width))
    return path.cut(_context_jvp(model, path.tokens, path.pad(tangents), path.segments))


@jax.jit
def _context_jvp(model: Transformer, tokens: Array, tangents: Array, segments: Array | None) -> Array:
    vectors = token_vectors(model, tokens)
    return jax.jvp(contexts_of(model, tokens, segments), (vectors,), (tangents.astype(vectors.dtype),))[1]


def context_vjp(
    model: Transformer, tokens: Tokens, cotangents: Float[Array, "T D"], segments: Segments | None = None
) -> Float[Array, "T D"]:
    """J' c: the gradient of sum(cotangents * contexts) with respect to the token vectors, by reverse mode.

    Raises ValueError for tokens that are no path of the model, and a wrong shape.
    """
    path = prepare(model, tokens, segments, cotangents)
    check_shape("cotangents", cotangents, (path.length, model.width))
    return path.cut(_context_vjp(model, path.tokens, path.pad(cotangents), path.segments))


@jax.jit
def _context_vjp(model: Transformer, tokens: Array, cotangents: Array, segments: Array | None) -> Array:
    contexts, pull = jax.vjp(contexts_of(model, tokens, segments), token_vectors(model, tokens))
    return pull(cotangents.astype(contexts.dtype))[0]


def token_vectors(model: Transformer, tokens: Tokens) -> Float[Array, "T D"]:
    """The token vectors e_v of a checked path; zeros for ids out of range."""
    ids = jnp.asarray(tokens)
    return jax.vmap(model.embed)(jnp.where((ids >= 0) & (ids < model.vocab_size), ids, 0))


def contexts_of(model: Transformer, tokens: Array, segments: Array | None) -> Callable[[Array], Array]:
    """The function that is differentiated: token vectors [T, D] -> context vectors [T, D], of a checked path."""
    model = plain(model)
    documents = documents_of(segments, len(tokens))

    def contexts(vectors: Array) -> Array:
        x = model.passed(model.embedded(tokens, documents, vectors), Mixer(model.layers, documents)).x
        missing = model.missing(tokens, documents)[:, None]
        return jnp.where(missing, jnp.nan, each_position(model.context)(x))

    return contexts
