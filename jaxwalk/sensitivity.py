"""Derivatives of path probabilities and of context vectors. Ordinary ones: nothing is held.

All take one path, with fused kernels replaced by their plain form where a derivative needs it, and are batched
with `jax.vmap`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxwalk.paths import path_log_prob, step_log_probs
from jaxwalk.transformer import Segments, Tokens, Transformer, check_tokens, plain


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

    vectors = jax.vmap(model.embed)(tokens)
    if len(tokens) == 1:
        return jnp.zeros_like(vectors)
    return jnp.concatenate([jax.grad(score)(vectors[:-1]), jnp.zeros_like(vectors[-1:])])


def station_gradient(
    model: Transformer, tokens: Tokens, given: int = 1, segments: Segments | None = None
) -> Float[Array, "S T D"]:
    """d log P(path | given) / d nudge: the gradient at every station and position, in one backward pass."""
    tokens = check_tokens(model, tokens, model.max_length + 1)
    model = plain(model)
    nudge = jnp.zeros((2 * model.depth + 1, len(tokens), model.width), model.token_vectors.dtype)
    return jax.grad(lambda nudge: path_log_prob(model, tokens, given, nudge, segments))(nudge)


def context_sensitivity(model: Transformer, tokens: Tokens, segments: Segments | None = None) -> Float[Array, "T T"]:
    """|d c_t / d token vector_j| in the Frobenius norm, row t, column j: how far moving a token moves each context.

    Computed row by row in reverse mode, so that memory is that of one row's Jacobian, [D, T, D], never
    [T, D, T, D]. Above the diagonal it is exactly zero. It is the size of a local derivative, and no share of
    anything: rows do not sum to a whole.
    """
    return _sensitivity(model, check_tokens(model, tokens), segments)


@jax.jit
def _sensitivity(model: Transformer, tokens: Array, segments: Segments | None) -> Array:
    pull = _context_vjp(model, tokens, segments)

    def row(t: Array) -> Array:
        def norms(cotangent: Array) -> Array:
            jacobian_row = pull(jnp.zeros((len(tokens), model.width), cotangent.dtype).at[t].set(cotangent))
            return jnp.sum(jacobian_row**2, axis=-1)

        return jnp.sqrt(jax.vmap(norms)(jnp.eye(model.width, dtype=model.token_vectors.dtype)).sum(0))

    return lax.map(row, jnp.arange(len(tokens)))


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


def _contexts(model: Transformer, tokens: Tokens, segments: Segments | None) -> Callable[[Array], Array]:
    """The function that is differentiated: token vectors [T, D] -> context vectors [T, D]."""
    model = plain(model)
    return lambda vectors: model.walk(tokens, vectors=vectors, segments=segments).context


def _context_vjp(model: Transformer, tokens: Tokens, segments: Segments | None) -> Callable[[Array], Array]:
    pull = jax.vjp(_contexts(model, tokens, segments), token_vectors(model, tokens))[1]
    return lambda cotangents: pull(cotangents)[0]
