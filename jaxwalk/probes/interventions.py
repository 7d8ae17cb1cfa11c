"""Sweeps of interventions: the effect on a path's probability of a change at each place of the walk, one at a time.

An intervention is an argument of the walk (`nudge`, `patch`, `mixing`), and its effect is a difference of
`path_log_prob`, in nats, given the first tokens of the path. Each function sweeps over all places in one compiled
program. The baseline is computed by the same program without a change, so that a change that has no effect gives
exactly 0. Effects at different places do not sum to the effect of changing them together. All functions take a single
path; batch with `jax.vmap`.
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
"""The number of changed walks that are walked together."""


def patch_effects(
    model: Transformer, tokens: Tokens, stations: Float[Array, "S T D"], given: Index = 1
) -> Float[Array, "S T"]:
    """Change of log P(path | given) when one station at one position is replaced by that of `stations`.

    Args:
        model: the model.
        tokens: [T], the path.
        stations: [S, T, D], such as those of another path with the same number of tokens.
        given: the number of leading tokens that are conditioned on.

    Returns:
        [S, T], in nats. The last token is scored but not walked, so its column is 0, whatever `stations` holds there.

    Raises:
        ValueError: if `tokens` is not a path of the model, `given` is not between 1 and T, or a shape is wrong.
    """
    path = _prepare(model, tokens, "stations", stations)
    given = check_given(given, path.length)
    return path.cut(_patch_effects(model, path.tokens, given, path.count, path.pad(stations, 1)), 1)


@jax.jit
def _patch_effects(model: Transformer, tokens: Array, given: Any, count: Array, stations: Array) -> Array:
    def edits_at(where: Array) -> Interventions:
        return Interventions(where=where, by=stations.astype(model.embed.table.dtype))

    return _station_effects(model, tokens, given, count, edits_at)


def nudge_effects(
    model: Transformer, tokens: Tokens, nudge: Float[Array, "S T D"], given: Index = 1
) -> Float[Array, "S T"]:
    """Change of log P(path | given) when `nudge` is added at one station of one position.

    For small nudges, this is their product with `station_gradient`. To add one steering vector [D] everywhere, pass
    `jnp.broadcast_to(vector, (S, T, D))`.

    Args:
        model: the model.
        tokens: [T], the path.
        nudge: [S, T, D].
        given: the number of leading tokens that are conditioned on.

    Returns:
        [S, T], in nats. The last token is not walked, so its column is 0.

    Raises:
        ValueError: if `tokens` is not a path of the model, `given` is not between 1 and T, or a shape is wrong.
    """
    path = _prepare(model, tokens, "nudge", nudge)
    given = check_given(given, path.length)
    return path.cut(_nudge_effects(model, path.tokens, given, path.count, path.pad(nudge, 1)), 1)


@jax.jit
def _nudge_effects(model: Transformer, tokens: Array, given: Any, count: Array, nudge: Array) -> Array:
    def edits_at(where: Array) -> Interventions:
        return Interventions(nudge=nudge.astype(model.embed.table.dtype), nudge_where=where)

    return _station_effects(model, tokens, given, count, edits_at)


def mixing_effects(
    model: Transformer,
    tokens: Tokens,
    replacement: Callable[[Float[Array, "G T T"]], Float[Array, "G T T"]],
    given: Index = 1,
) -> Float[Array, "L G"]:
    """Change of log P(path | given) when the mixing matrix of one head (or channel) of one layer is replaced.

    Args:
        model: the model.
        tokens: [T], the path.
        replacement: maps the mixing matrices [G, T-1, T-1] of a layer to their replacements. It is static in the
            compiled program: pass the same function object to avoid recompilation.
        given: the number of leading tokens that are conditioned on.

    Returns:
        [L, G], in nats. G is the largest number of heads in any layer; NaN for heads that a layer does not have.

    Raises:
        ValueError: if `tokens` is not a path of the model, `given` is not between 1 and T, or a shape is wrong.
    """
    path = prepare(model, tokens, longest=model.max_length + 1, exact=True)
    given = check_given(given, path.length)
    return _mixing_effects(model, path.tokens, given, replacement=replacement)


@functools.partial(jax.jit, static_argnames="replacement")
def _mixing_effects(model: Transformer, tokens: Array, given: Any, *, replacement: Any) -> Array:
    heads = []
    for block in model.layers.blocks:
        heads += [_heads(block.layer(member, 0), model.width) for member in range(len(block.period))] * block.repeats
    max_heads = max(heads, default=0)
    before, after = tokens[:-1], tokens[1:]
    valid = (given >= 1) & (given <= len(tokens))

    def score(place: Array) -> Array:
        def override(layer_index: Any, A: Array) -> Array:
            replaced = replacement(A)
            check_shape("replacement", replaced, A.shape)
            chosen = indices(A.shape[0]) == place - layer_index * max_heads
            return jnp.where(chosen[:, None, None], replaced, A)

        terms = log_probs_of(model, model.walked(before, every=override).context, after)
        return jnp.where(scored_steps(len(tokens), given), terms, 0).sum() * jnp.where(valid, 1, jnp.nan)

    effects = _sweep(score, model.depth * max_heads).reshape(model.depth, max_heads)
    return jnp.where(indices(max_heads)[None] < jnp.array(heads, int).reshape(-1, 1), effects, jnp.nan)


def _heads(layer: Layer, width: int) -> int:
    """The number of heads (or channels) of a layer."""
    x = jax.ShapeDtypeStruct((1, width), jnp.float32)
    return jax.eval_shape(lambda x: layer.aggregate.mixing(x), x).shape[0]


def _prepare(model: Transformer, tokens: Tokens, name: str, stations: Array) -> Path:
    path = prepare(model, tokens, None, stations, longest=model.max_length + 1)
    check_shape(name, stations, (model.stations, path.length, model.width))
    return path


def _station_effects(
    model: Transformer, tokens: Array, given: Any, count: Array, edits_at: Callable[[Array], Interventions]
) -> Float[Array, "S T"]:
    S, T = model.stations, len(tokens)

    def score(place: Array) -> Array:
        where = (indices(S * T) == place).reshape(S, T)
        return scores(model, tokens, given, count, None, (edits_at(where), None, Matrices({}, {}))).sum()

    return _sweep(score, S * T).reshape(S, T)


def _sweep(score: Callable[[Array], Array], places: int) -> Float[Array, " places"]:
    """The score with a change at each place, minus the score without a change: place -1 of the same program."""
    scores_at = map_in_batches(score, indices(-1, places), BATCH)
    return scores_at[1:] - scores_at[0]
