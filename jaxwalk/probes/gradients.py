"""Gradients of path probabilities, and products with the Jacobian of the context vectors. No coefficients are held.

All functions take a single path; batch with `jax.vmap`. Fused kernels are replaced by their plain form. Units are nats,
and units of embedding space, which token vectors and context vectors share.
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
    """Gradient of log P(path | the first `given` tokens) with respect to the token vectors, in nats per unit.

    Entry j is the change of the path's log-probability as the vector of the j-th token moves as an input of the walk.
    The role of the same vector as an output vector, if embeddings are tied, is not included. The last token is not
    walked, so its entry is zero.

    Args:
        model: the model.
        tokens: [T], the path, of at most max_length + 1 tokens.
        given: the number of leading tokens that are conditioned on, at least 1.
        segments: [T], the document of each position.

    Returns:
        [T, D].

    Raises:
        ValueError: if `tokens` is not a path of the model, or `given` is not between 1 and T.
    """
    path = prepare(model, tokens, segments, longest=model.max_length + 1)
    given = check_given(given, path.length)
    return path.cut(_path_gradient(model, path.tokens, given, path.count, path.segments))


@jax.jit
def _path_gradient(model: Transformer, tokens: Array, given: Any, count: Array, segments: Array | None) -> Array:
    model = plain(model)
    vectors = token_vectors(model, tokens)

    def score(vectors: Array) -> Array:
        overrides = Interventions(), vectors, Matrices({}, {})
        return scores(model, tokens, given, count, segments, overrides).sum()

    return jax.grad(score)(vectors)


def station_gradient(
    model: Transformer,
    tokens: Tokens,
    given: Index = 1,
    segments: Segments | None = None,
    *,
    of: Callable[[Walk], Float[Array, ""]] | None = None,
) -> Float[Array, "S T D"]:
    """Gradient of log P(path | given) with respect to a nudge at every station, in nats per unit, in one backward pass.

    Args:
        model, tokens, given, segments: as in `path_gradient`.
        of: a scalar function of the walk to differentiate instead, such as `lambda walk: walk.context[-1] @ direction`.
            All T tokens are then walked, and `given` has no effect. It is static in the compiled program: pass the same
            function object to avoid recompilation.

    Returns:
        [S, T, D].

    Raises:
        ValueError: if `tokens` is not a path of the model, or `given` is not between 1 and T.
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
        overrides = Interventions(nudge), None, Matrices({}, {})
        return scores(model, tokens, given, count, segments, overrides).sum()

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
    """Jacobian-vector product J t: how the context vectors change as the token vectors move along `tangents`.

    Args:
        model: the model.
        tokens: [T], the path.
        tangents: [T, D].
        segments: [T], the document of each position.

    Returns:
        [T, D].

    Raises:
        ValueError: if `tokens` is not a path of the model, or a shape is wrong.
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
    """Vector-Jacobian product J' c: the gradient of sum(cotangents * contexts) with respect to the token vectors.

    Args:
        model: the model.
        tokens: [T], the path.
        cotangents: [T, D].
        segments: [T], the document of each position.

    Returns:
        [T, D].

    Raises:
        ValueError: if `tokens` is not a path of the model, or a shape is wrong.
    """
    path = prepare(model, tokens, segments, cotangents)
    check_shape("cotangents", cotangents, (path.length, model.width))
    return path.cut(_context_vjp(model, path.tokens, path.pad(cotangents), path.segments))


@jax.jit
def _context_vjp(model: Transformer, tokens: Array, cotangents: Array, segments: Array | None) -> Array:
    contexts, pull = jax.vjp(contexts_of(model, tokens, segments), token_vectors(model, tokens))
    return pull(cotangents.astype(contexts.dtype))[0]


def token_vectors(model: Transformer, tokens: Tokens) -> Float[Array, "T D"]:
    """Token vectors e_v of a checked path; ids out of range are replaced by id 0."""
    ids = jnp.asarray(tokens)
    return jax.vmap(model.embed)(jnp.where((ids >= 0) & (ids < model.vocab_size), ids, 0))


def contexts_of(model: Transformer, tokens: Array, segments: Array | None) -> Callable[[Array], Array]:
    """The function token vectors [T, D] -> context vectors [T, D] of a checked path, for differentiation."""
    model = plain(model)
    documents = documents_of(segments, len(tokens))

    def contexts(vectors: Array) -> Array:
        x = model.run_layers(model.embedded(tokens, documents, vectors), Mixer(model.layers, documents)).x
        missing = model.missing(tokens, documents)[:, None]
        return jnp.where(missing, jnp.nan, each_position(model.context)(x))

    return contexts
