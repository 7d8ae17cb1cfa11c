"""The law of the next token, and the probability of a path."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.filters import indices, wide
from jaxwalk.model.inputs import Index, Segments, Tokens, check_given, check_shape, cut, prepare
from jaxwalk.model.layer import Interventions
from jaxwalk.model.mixing import Functions, Matrices, Mixing, plan
from jaxwalk.model.transformer import Patch, Transformer, check_mixing, checked_interventions


def next_log_probs(model: Transformer, tokens: Tokens, segments: Segments | None = None) -> Float[Array, "T V"]:
    """log p(v | v_1..v_t) at every position t of one path, in nats.

    Args:
        model: the model.
        tokens: [T], the path. From a traced id that is out of range on, the result is NaN.
        segments: [T], the document of each position: see `Transformer.walk`.

    Returns:
        [T, V].

    Raises:
        ValueError: for tokens that are no path of the model.
    """
    path = prepare(model, tokens, segments)
    return path.cut(_next_log_probs(model, path.tokens, path.segments))


@jax.jit
def _next_log_probs(model: Transformer, tokens: Array, segments: Array | None) -> Array:
    return laws(model, tokens, segments)


def laws(model: Transformer, tokens: Int[Array, " T"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T V"]:
    """`next_log_probs` of a checked path, as part of another program."""
    return jax.nn.log_softmax(jax.vmap(model.logits)(model.contexts(tokens, segments)))


def path_log_prob(
    model: Transformer,
    tokens: Tokens,
    given: Index = 1,
    nudge: Float[Array, "S T D"] | None = None,
    segments: Segments | None = None,
    *,
    patch: Patch | None = None,
    vectors: Float[Array, "T D"] | None = None,
    mixing: Mapping[int, Mixing] | None = None,
) -> Float[Array, ""]:
    """log P(v_1..v_T | the first `given` tokens) in nats: the sum of the log-probabilities of the steps after them.

    Args:
        model: the model.
        tokens: [T], the path. The last token is scored but not walked, so T may be max_length + 1.
        given: at least 1, as a model has no law for the first token (a begin-of-path token is a given one).
        nudge: [S, T, D], added at each station of the walk.
        segments: [T], the document of each position. Steps into padding (0) or across a border are not scored.
        patch, vectors, mixing: the interventions of `Transformer.walk`, over all T positions; a function in `mixing`
            is called with the matrix [G, T-1, T-1] of the positions that are walked.

    Returns:
        [], at most 0; NaN for traced tokens or a traced `given` out of range.

    Raises:
        ValueError: for tokens that are no path of the model, a `given` that is not from 1 to T, and wrong shapes.
    """
    return _scored(_sum_of_steps, model, tokens, given, nudge, segments, patch, vectors, mixing)[0]


def step_log_probs(
    model: Transformer,
    tokens: Tokens,
    given: Index = 1,
    nudge: Float[Array, "S T D"] | None = None,
    segments: Segments | None = None,
    *,
    patch: Patch | None = None,
    vectors: Float[Array, "T D"] | None = None,
    mixing: Mapping[int, Mixing] | None = None,
) -> Float[Array, " N"]:
    """The N = T - 1 terms of `path_log_prob`: entry t is log p(v_{t+2} | v_1..v_{t+1}), 0 if it is not scored.

    Arguments and errors are those of `path_log_prob`.
    """
    terms, length = _scored(_steps, model, tokens, given, nudge, segments, patch, vectors, mixing)
    return cut(terms, length - 1)


def _scored(
    program: Any,
    model: Transformer,
    tokens: Tokens,
    given: Any,
    nudge: Any,
    segments: Segments | None,
    patch: Patch | None,
    vectors: Any,
    mixing: Mapping[int, Mixing] | None,
) -> tuple[Array, int]:
    """What `program` makes of the checked and padded arguments, and the length of the path."""
    mixing = dict(mixing or {})
    exact = any(callable(A) for A in mixing.values())  # a function of a matrix must see its true size
    path = prepare(model, tokens, segments, nudge, patch, vectors, mixing, longest=model.max_length + 1, exact=exact)
    T = path.length
    given = check_given(given, T)
    edits = checked_interventions(model, T, nudge, patch)
    check_shape("vectors", vectors, (T, model.width))
    check_mixing(model, T, mixing, ())
    altered, functions = None, Functions()
    if nudge is not None or patch is not None or vectors is not None or mixing:
        padded = {n: A if callable(A) else path.pad(path.pad(A, 1), 2)[:, :-1, :-1] for n, A in mixing.items()}
        matrices, functions = plan(model.layers, padded, ())
        altered = jax.tree.map(lambda a: path.pad(a, 1), edits), path.pad(vectors), matrices
    return program(model, path.tokens, given, path.count, path.segments, altered, functions=functions), T


@functools.partial(jax.jit, static_argnames="functions")
def _sum_of_steps(*args: Any, functions: Functions) -> Array:
    return scores(*args, functions=functions).sum()


@functools.partial(jax.jit, static_argnames="functions")
def _steps(*args: Any, functions: Functions) -> Array:
    return scores(*args, functions=functions)


def scores(
    model: Transformer,
    tokens: Int[Array, " T"],
    given: Any = 1,
    count: Any = None,
    segments: Int[Array, " T"] | None = None,
    altered: tuple[Interventions, Array | None, Matrices] | None = None,
    *,
    functions: Functions | None = None,
) -> Float[Array, " N"]:
    """`step_log_probs` of a checked path whose first `count` tokens are real, as part of another program.

    altered: interventions, token vectors and matrices; None for a walk without any.
    """
    if len(tokens) == 1:
        return jnp.zeros(0, wide(model.embed.table.dtype))
    before, after = tokens[:-1], tokens[1:]
    before_segments = None if segments is None else segments[:-1]
    if altered is None:
        context = model.contexts(before, before_segments)
    else:
        edits, vectors, matrices = altered
        edits = jax.tree.map(lambda a: a[:, :-1], edits)
        vectors = None if vectors is None else vectors[:-1]
        context = model.walked(before, before_segments, edits, vectors, matrices, functions=functions).context
    terms = log_probs_of(model, context, after)
    scored = scored_steps(len(tokens), given, segments)
    if count is not None:
        scored &= indices(1, len(tokens)) < count
    terms = jnp.where(scored, terms, 0)
    longest = len(tokens) if count is None else count
    # A product, so that derivatives are NaN too.
    return terms * jnp.where((given >= 1) & (given <= longest), 1, jnp.nan)


def log_probs_of(model: Transformer, context: Float[Array, "N D"], tokens: Int[Array, " N"]) -> Float[Array, " N"]:
    """log p(token) after each context; NaN for an id out of range."""
    # Not log_softmax and a gather: the row of log-probabilities is never written out.
    logits = jax.vmap(model.logits)(context)
    index = indices(len(tokens))
    chosen = logits.at[index, tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def scored_steps(length: int, given: Any = 1, segments: Int[Array, " T"] | None = None) -> Bool[Array, " N"]:
    """Which of the N = length - 1 steps of a path are scored: those after the `given` tokens, inside a document."""
    scored = indices(1, length) >= given
    if segments is not None:
        scored &= (segments[1:] == segments[:-1]) & (segments[1:] != 0)
    return scored


def expectation(log_p: Float[Array, "*n V"], values: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """E_p values; a token with p = 0 contributes nothing, whatever its value."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * values, 0), axis=-1)


def entropy(log_p: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """The entropy -sum p log p of each law, in nats."""
    return -expectation(log_p, log_p)
