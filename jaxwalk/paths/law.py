"""The law of the next token and the probability of a path."""

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
    """Log-probabilities log p(v | v_1..v_t) of the next token at every position t of a path, in nats.

    Args:
        model: the model.
        tokens: [T], the path. A traced id that is out of range makes the result NaN from its position on.
        segments: [T], the document of each position: see `Transformer.walk`.

    Returns:
        [T, V].

    Raises:
        ValueError: if `tokens` is not a path of the model.
    """
    path = prepare(model, tokens, segments)
    return path.cut(_next_log_probs(model, path.tokens, path.segments))


@jax.jit
def _next_log_probs(model: Transformer, tokens: Array, segments: Array | None) -> Array:
    return laws(model, tokens, segments)


def laws(model: Transformer, tokens: Int[Array, " T"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T V"]:
    """`next_log_probs` without checks, for use inside a compiled program."""
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
    """Log-probability log P(v_1..v_T | the first `given` tokens) of a path, in nats.

    It is the sum of the log-probabilities of the steps after the given tokens.

    Args:
        model: the model.
        tokens: [T], the path. The last token is scored but not walked, so T may be max_length + 1.
        given: the number of leading tokens that are conditioned on, at least 1: a model has no law for the first token.
            A begin-of-path token counts as given.
        nudge: [S, T, D], added at each station of the walk.
        segments: [T], the document of each position. Steps into padding (segment 0) or across documents are not scored.
        patch, vectors, mixing: the interventions of `Transformer.walk`, over all T positions. A function in `mixing`
            receives the matrix [G, T-1, T-1] of the positions that are walked.

    Returns:
        [], at most 0. NaN if traced tokens or a traced `given` are out of range.

    Raises:
        ValueError: if `tokens` is not a path of the model, `given` is not between 1 and T, or a shape is wrong.
    """
    return _scored(_path_log_prob, model, tokens, given, nudge, segments, patch, vectors, mixing)[0]


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
    """The N = T - 1 terms of `path_log_prob`: entry t is log p(v_{t+2} | v_1..v_{t+1}), or 0 where it is not scored.

    Takes the arguments of `path_log_prob` and raises the same errors.
    """
    terms, length = _scored(_step_log_probs, model, tokens, given, nudge, segments, patch, vectors, mixing)
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
    """Run `program` on the checked and padded arguments; also return the length of the path."""
    mixing = dict(mixing or {})
    exact = any(callable(A) for A in mixing.values())  # a function of a matrix must see its true size
    path = prepare(model, tokens, segments, nudge, patch, vectors, mixing, longest=model.max_length + 1, exact=exact)
    T = path.length
    given = check_given(given, T)
    edits = checked_interventions(model, T, nudge, patch)
    check_shape("vectors", vectors, (T, model.width))
    check_mixing(model, T, mixing, ())
    overrides, functions = None, Functions()
    if nudge is not None or patch is not None or vectors is not None or mixing:
        padded = {n: A if callable(A) else path.pad(path.pad(A, 1), 2)[:, :-1, :-1] for n, A in mixing.items()}
        matrices, functions = plan(model.layers, padded, ())
        overrides = jax.tree.map(lambda a: path.pad(a, 1), edits), path.pad(vectors), matrices
    return program(model, path.tokens, given, path.count, path.segments, overrides, functions=functions), T


@functools.partial(jax.jit, static_argnames="functions")
def _path_log_prob(*args: Any, functions: Functions) -> Array:
    return scores(*args, functions=functions).sum()


@functools.partial(jax.jit, static_argnames="functions")
def _step_log_probs(*args: Any, functions: Functions) -> Array:
    return scores(*args, functions=functions)


def scores(
    model: Transformer,
    tokens: Int[Array, " T"],
    given: Any = 1,
    count: Any = None,
    segments: Int[Array, " T"] | None = None,
    overrides: tuple[Interventions, Array | None, Matrices] | None = None,
    *,
    functions: Functions | None = None,
) -> Float[Array, " N"]:
    """`step_log_probs` without checks, for use inside a compiled program.

    Args:
        model: the model.
        tokens: [T], the path, possibly padded.
        given: the number of tokens that are conditioned on.
        count: the number of tokens before the padding; None means all.
        segments: [T], the document of each position.
        overrides: interventions, token vectors and mixing matrices; None walks the model as it is.
        functions: the functions that replace mixing matrices.
    """
    if len(tokens) == 1:
        return jnp.zeros(0, wide(model.embed.table.dtype))
    before, after = tokens[:-1], tokens[1:]
    before_segments = None if segments is None else segments[:-1]
    if overrides is None:
        context = model.contexts(before, before_segments)
    else:
        edits, vectors, matrices = overrides
        edits = jax.tree.map(lambda a: a[:, :-1], edits)
        vectors = None if vectors is None else vectors[:-1]
        context = model.walked(before, before_segments, edits, vectors, matrices, functions=functions).context
    terms = log_probs_of(model, context, after)
    scored = scored_steps(len(tokens), given, segments)
    if count is not None:
        scored &= indices(1, len(tokens)) < count
    terms = jnp.where(scored, terms, 0)
    length = len(tokens) if count is None else count
    # Multiplying, unlike jnp.where, makes the derivatives NaN as well.
    return terms * jnp.where((given >= 1) & (given <= length), 1, jnp.nan)


def log_probs_of(model: Transformer, context: Float[Array, "N D"], tokens: Int[Array, " N"]) -> Float[Array, " N"]:
    """Log-probability of each token after its context, in nats; NaN for an id out of range."""
    # logsumexp instead of log_softmax, so that log-probabilities of all tokens are never materialised.
    logits = jax.vmap(model.logits)(context)
    index = indices(len(tokens))
    selected = logits.at[index, tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return selected - jax.nn.logsumexp(logits, axis=-1)


def scored_steps(length: int, given: Any = 1, segments: Int[Array, " T"] | None = None) -> Bool[Array, " N"]:
    """Which of the N = length - 1 steps are scored: those after the `given` tokens and within one document."""
    scored = indices(1, length) >= given
    if segments is not None:
        scored &= (segments[1:] == segments[:-1]) & (segments[1:] != 0)
    return scored


def expectation(log_p: Float[Array, "*n V"], values: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """Expectation of `values` under the law p. A token with p = 0 contributes 0, even if its value is infinite."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * values, 0), axis=-1)


def entropy(log_p: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """Entropy -sum p log p of each law, in nats."""
    return -expectation(log_p, log_p)
