"""Rotary positions of a config.json, in all the forms that versions of transformers have written."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxwalk.config import (
    ConfigError,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    unknown,
)
from jaxwalk.pretrained._family import Keys


class Rope(NamedTuple):
    """What a config.json says about rotary positions.

    theta, scaling: those of attention.
    share: how much of a head's channels is rotated.
    max_length: the longest path for which the checkpoint rotates so.
    """

    theta: float
    scaling: RopeScaling | None
    share: float
    max_length: int


def rope(keys: Keys, length: int, theta: float = 10000.0, share: float | None = None) -> Rope:
    """Rotary positions that are the same in all layers: `rope_parameters`, or `rope_scaling` and keys beside it.

    length: the longest path that the config names.
    theta, share: where it names none. A share of None is that of families that always rotate all channels.
    """
    beside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    places = {name: keys(name, None) for name in beside}, keys("rope_scaling", {}), keys("rope_parameters", {})
    return rope_of(keys, places, length, theta, share)


def rope_of(
    keys: Keys, places: tuple[Mapping[str, Any], ...], length: int, theta: float, share: float | None = None
) -> Rope:
    """The same of `places`, dictionaries that must agree. What is wrong with them is among the problems of `keys`."""
    given: dict[str, Any] = {}
    for place in places:
        for name, value in dict(place).items():
            name = "rope_type" if name == "type" else name
            value = "longrope" if (name, value) == ("rope_type", "su") else value  # as LongRoPE was called at first
            if value is not None and given.setdefault(name, value) != value:
                keys.problems.append(f"{name}: expected one value, got {given[name]!r} and {value!r}")
    inner, failure, scaling = Keys(given), None, None
    kind, theta = inner("rope_type", "default"), inner("rope_theta", theta)
    if share is None:
        inner.expect("partial_rotary_factor", 1.0)
        share = 1.0
    share = inner("partial_rotary_factor", share)
    if kind in _SCALINGS:
        try:
            scaling, length = _SCALINGS[kind](inner, length)
        except (ConfigError, TypeError, ValueError, ArithmeticError) as error:  # of values that are problems themselves
            failure = error
    else:
        inner.problems.append(unknown("rope_type", kind, _SCALINGS))
    harmless = ("finetuned", *(["original_max_position_embeddings"] if kind == "default" else []))
    if problems := inner.finish(harmless, failure):
        keys.problems.append(f"rotary positions of rope_type {kind!r}: " + "; ".join(problems))
    return Rope(float(theta), scaling, share, length)


# Each: the scaling, and the longest path that it holds for. Formulas: transformers, modeling_rope_utils.py.


def _default(keys: Keys, length: int) -> tuple[None, int]:
    return None, length


def _linear(keys: Keys, length: int) -> tuple[LinearScaling, int]:
    return LinearScaling(keys("factor")), length


def _dynamic(keys: Keys, length: int) -> tuple[None, int]:
    # "NTK-aware": the base grows with the length of the input, from max_position_embeddings on. Up to there, which is
    # the longest path of the model here, nothing is scaled, so that the factor has no part in it.
    keys("factor")
    return None, length


def _llama3(keys: Keys, length: int) -> tuple[Llama3Scaling, int]:
    original = keys("original_max_position_embeddings", length)
    low, high = keys("low_freq_factor"), keys("high_freq_factor")
    return Llama3Scaling(keys("factor"), low, high, original), length


def _yarn(keys: Keys, length: int) -> tuple[YarnScaling, int]:
    original = keys("original_max_position_embeddings", length)
    factor = keys("factor", length / original)
    gain, mscale, mscale_all_dim = (keys(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if gain is None and mscale and mscale_all_dim:
        gain = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
    fast, slow = keys("beta_fast", None) or 32, keys("beta_slow", None) or 1
    return YarnScaling(factor, original, fast, slow, gain, keys("truncate", True)), length


def _longrope(keys: Keys, length: int) -> tuple[LongRopeScaling, int]:
    original = keys("original_max_position_embeddings")
    factor, gain = keys("factor", length / original), keys("attention_factor", None)
    if gain is None:
        gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    # transformers rotates by the short factors if the input is no longer than the original length, and otherwise by
    # the long ones, at all its positions. The factors here do not change with the input (see LongRopeScaling). The
    # short ones are taken, as most paths are short, and the model ends where they do: no path that it accepts would be
    # rotated otherwise. The gain is that of the whole length, in either case.
    keys("long_factor")
    return LongRopeScaling(tuple(map(float, keys("short_factor"))), float(gain)), min(length, original)


_SCALINGS: Mapping[str, Callable[[Keys, int], tuple[RopeScaling | None, int]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
