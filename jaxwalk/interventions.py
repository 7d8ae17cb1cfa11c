"""Sweeps of interventions: what a change at each place of the walk, one at a time, does to a path's probability.

An intervention is an argument of the walk (`nudge`, `patch`, `mixing`) and its effect is a difference of
`path_log_prob`, in nats, given the first tokens of the path. These functions make it everywhere, each in one vmapped
program. Effects at different places do not sum to the effect of both. All raise ValueError for tokens that are no
path of the model, and are batched with `jax.vmap`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxwalk.paths import path_log_prob
from jaxwalk.transformer import Tokens, Transformer, check_shape, check_tokens

BATCH = 16
"""How many changed walks are walked together."""


def patch_effects(
    model: Transformer, tokens: Tokens, stations: Float[Array, "S T D"], given: int = 1
) -> Float[Array, "S T"]:
    """How log P(path | given) changes when one station at one position is replaced by that of `stations`.

    stations: those of another path of as many tokens, say. The last token is scored but not walked: its column is 0,
    and what `stations` holds there does not matter.
    """
    tokens = _checked(model, tokens, "stations", stations)
    S, T, _ = stations.shape

    def changed(place: Array) -> Array:
        where = (jnp.arange(S * T) == place).reshape(S, T)
        return path_log_prob(model, tokens, given, patch=(where, stations))

    return _effects(changed, path_log_prob(model, tokens, given), S * T).reshape(S, T)


def nudge_effects(
    model: Transformer, tokens: Tokens, nudge: Float[Array, "S T D"], given: int = 1
) -> Float[Array, "S T"]:
    """How log P(path | given) changes when `nudge` is added at one station of one position.

    For small nudges that is their product with `station_gradient`. One steering vector [D] everywhere is
    `jnp.broadcast_to(vector, (S, T, D))`. The column of the last token, which is not walked, is 0.
    """
    tokens = _checked(model, tokens, "nudge", nudge)
    S, T, _ = nudge.shape

    def changed(place: Array) -> Array:
        where = (jnp.arange(S * T) == place).reshape(S, T, 1)
        return path_log_prob(model, tokens, given, jnp.where(where, nudge, 0))

    return _effects(changed, path_log_prob(model, tokens, given), S * T).reshape(S, T)


def mixing_effects(
    model: Transformer,
    tokens: Tokens,
    replacement: Callable[[Float[Array, "G T T"]], Float[Array, "G T T"]],
    given: int = 1,
) -> Float[Array, "L G"]:
    """How log P(path | given) changes when the pattern of one head (or channel) of one layer is replaced.

    replacement: makes the new patterns of a layer from its own, as in `Transformer.walk`'s `mixing`. G is the most
    heads that a layer has; what a layer lacks is NaN.
    """
    tokens = check_tokens(model, tokens, model.max_length + 1)
    record = lambda tokens: model.walk(tokens, record_mixing=range(model.depth)).mixing
    heads = [A.shape[0] for _, A in sorted(jax.eval_shape(record, tokens[:1]).items())]
    most = max(heads, default=0)

    def replaced(number: int, place: Array, A: Array) -> Array:
        by = replacement(A)
        check_shape(f"replacement in layer {number}", by, A.shape)
        chosen = jnp.arange(A.shape[0]) == place - number * most
        return jnp.where(chosen[:, None, None], by, A)

    def changed(place: Array) -> Array:
        mixing = {number: functools.partial(replaced, number, place) for number in range(model.depth)}
        return path_log_prob(model, tokens, given, mixing=mixing)

    # Compared with the same program, so that a head whose pattern stays has no effect at all.
    effects = _effects(changed, changed(jnp.array(-1)), model.depth * most).reshape(model.depth, most)
    there = jnp.arange(most)[None] < jnp.array(heads, int).reshape(-1, 1)
    return jnp.where(there, effects, jnp.nan)


def _checked(model: Transformer, tokens: Tokens, what: str, stations: Array) -> Array:
    tokens = check_tokens(model, tokens, model.max_length + 1)
    check_shape(what, stations, (2 * model.depth + 1, len(tokens), model.width))
    return tokens


def _effects(changed: Callable[[Array], Array], as_is: Array, places: int) -> Float[Array, " places"]:
    return lax.map(changed, jnp.arange(places), batch_size=max(1, min(BATCH, places))) - as_is
