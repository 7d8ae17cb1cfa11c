"""Sweeps of interventions: what a change at each place of the walk, one at a time, does to a path's probability.

An intervention is an argument of the walk (`nudge`, `patch`, `mixing`) and its effect is a difference of
`path_log_prob`, in nats, given the first tokens of the path. These functions make it everywhere, each in one compiled
program, against a baseline of the same program that changes nothing, so that a change that changes nothing has no
effect at all. Effects at different places do not sum to the effect of both. All raise ValueError for tokens that are
no path of the model and for a `given` that is not from 1 to T, and are batched with `jax.vmap`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwalk._loops import map_in_batches
from jaxwalk.filters import indices
from jaxwalk.model.inputs import Index, Path, Tokens, check_given, check_shape, prepare
from jaxwalk.model.layer import Interventions, Layer
from jaxwalk.model.mixing import Matrices
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import log_probs_of, scored_steps, scores

BATCH = 16
"""How many changed walks are walked together."""


def patch_effects(
    model: Transformer, tokens: Tokens, stations: Float[Array, "S T D"], given: Index = 1
) -> Float[Array, "S T"]:
    """How log P(path | given) changes when one station at one position is replaced by that of `stations`.

    Args:
        model: the model.
        tokens: [T], the path.
        stations: [S, T, D], such as those of another path of as many tokens.
        given: how many tokens are given.

    Returns:
        [S, T], in nats. The last token is scored but not walked: its column is 0, and what `stations` holds there does
        not matter.
    """
    path = _prepared(model, tokens, "stations", stations)
    given = check_given(given, path.length)
    return path.cut(_patch_effects(model, path.tokens, given, path.count, path.pad(stations, 1)), 1)


@jax.jit
def _patch_effects(model: Transformer, tokens: Array, given: Any, count: Array, stations: Array) -> Array:
    def altered(where: Array) -> Interventions:
        return Interventions(where=where, by=stations.astype(model.embed.table.dtype))

    return _station_effects(model, tokens, given, count, altered)


def nudge_effects(
    model: Transformer, tokens: Tokens, nudge: Float[Array, "S T D"], given: Index = 1
) -> Float[Array, "S T"]:
    """How log P(path | given) changes when `nudge` is added at one station of one position.

    For small nudges that is their product with `station_gradient`. One steering vector [D] everywhere is
    `jnp.broadcast_to(vector, (S, T, D))`.

    Args:
        model: the model.
        tokens: [T], the path.
        nudge: [S, T, D].
        given: how many tokens are given.

    Returns:
        [S, T], in nats. The column of the last token, which is not walked, is 0.
    """
    path = _prepared(model, tokens, "nudge", nudge)
    given = check_given(given, path.length)
    return path.cut(_nudge_effects(model, path.tokens, given, path.count, path.pad(nudge, 1)), 1)


@jax.jit
def _nudge_effects(model: Transformer, tokens: Array, given: Any, count: Array, nudge: Array) -> Array:
    def altered(where: Array) -> Interventions:
        return Interventions(nudge=nudge.astype(model.embed.table.dtype), nudge_where=where)

    return _station_effects(model, tokens, given, count, altered)


def mixing_effects(
    model: Transformer,
    tokens: Tokens,
    replacement: Callable[[Float[Array, "G T T"]], Float[Array, "G T T"]],
    given: Index = 1,
) -> Float[Array, "L G"]:
    """How log P(path | given) changes when the pattern of one head (or channel) of one layer is replaced.

    Args:
        model: the model.
        tokens: [T], the path.
        replacement: from the patterns of a layer to the new ones. It is part of the compiled program: pass the same
            function object again to reuse it.
        given: how many tokens are given.

    Returns:
        [L, G], in nats. G is the most heads that a layer has; where a layer has fewer, NaN.
    """
    path = prepare(model, tokens, longest=model.max_length + 1, exact=True)
    given = check_given(given, path.length)
    return _mixing_effects(model, path.tokens, given, replacement=replacement)


@functools.partial(jax.jit, static_argnames="replacement")
def _mixing_effects(model: Transformer, tokens: Array, given: Any, *, replacement: Any) -> Array:
    heads = []
    for block in model.layers.blocks:
        heads += [_heads(block.layer(member, 0), model.width) for member in range(len(block.period))] * block.repeats
    most = max(heads, default=0)
    before, after = tokens[:-1], tokens[1:]
    possible = (given >= 1) & (given <= len(tokens))

    def score(place: Array) -> Array:
        def every(number: Any, A: Array) -> Array:
            other = replacement(A)
            check_shape("replacement", other, A.shape)
            chosen = indices(A.shape[0]) == place - number * most
            return jnp.where(chosen[:, None, None], other, A)

        terms = log_probs_of(model, model.walked(before, every=every).context, after)
        return jnp.where(scored_steps(len(tokens), given), terms, 0).sum() * jnp.where(possible, 1, jnp.nan)

    effects = _effects(score, model.depth * most).reshape(model.depth, most)
    return jnp.where(indices(most)[None] < jnp.array(heads, int).reshape(-1, 1), effects, jnp.nan)


def _heads(layer: Layer, width: int) -> int:
    """G of a layer."""
    x = jax.ShapeDtypeStruct((1, width), jnp.float32)
    return jax.eval_shape(lambda x: layer.aggregate.mixing(x), x).shape[0]


def _prepared(model: Transformer, tokens: Tokens, what: str, stations: Array) -> Path:
    path = prepare(model, tokens, None, stations, longest=model.max_length + 1)
    check_shape(what, stations, (model.stations, path.length, model.width))
    return path


def _station_effects(
    model: Transformer, tokens: Array, given: Any, count: Array, altered: Callable[[Array], Interventions]
) -> Float[Array, "S T"]:
    S, T = model.stations, len(tokens)

    def score(place: Array) -> Array:
        where = (indices(S * T) == place).reshape(S, T)
        return scores(model, tokens, given, count, None, (altered(where), None, Matrices({}, {}))).sum()

    return _effects(score, S * T).reshape(S, T)


def _effects(score: Callable[[Array], Array], places: int) -> Float[Array, " places"]:
    """The score with a change at each place, minus that of the same program with no change, at place -1."""
    scored = map_in_batches(score, indices(-1, places), BATCH)
    return scored[1:] - scored[0]
