"""Rotary position embedding (Su et al., arXiv 2104.09864), and its rescaled frequencies for long contexts."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxwalk.config import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from jaxwalk.filters import wide


def frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> list[float]:
    """The angle, in radians, by which each of width / 2 pairs of channels turns from one position to the next.

    theta^(-2k / width) for pair k, rescaled by the formulas of `transformers`, `modeling_rope_utils.py`.
    """
    plain = [theta ** (-2 * k / width) for k in range(width // 2)]
    match scaling:
        case None:
            return plain
        case LinearScaling():
            return [f / scaling.factor for f in plain]
        case LongRopeScaling():
            return [f / factor for f, factor in zip(plain, scaling.factors, strict=True)]
        case Llama3Scaling():
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            share = [(scaling.original_length * f / (2 * math.pi) - low) / (high - low) for f in plain]
        case YarnScaling():

            def pair(turns: float) -> float:
                """The index of the pair, a fraction, that turns so often within the original length."""
                return width * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

            first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            length = last - first or 0.001
            share = [1 - (k - first) / length for k in range(width // 2)]
    share = [min(max(s, 0), 1) for s in share]  # of the unscaled frequency
    return [f * (s + (1 - s) / scaling.factor) for f, s in zip(plain, share, strict=True)]


def gain(scaling: RopeScaling | None) -> float:
    """The factor on rotated channels: the `attention_factor` of scalings that have one."""
    if isinstance(scaling, YarnScaling) and scaling.attention_factor is None:
        return 0.1 * math.log(scaling.factor) + 1
    return getattr(scaling, "attention_factor", 1.0)


def rotate(
    x: Float[Array, "H T K"],
    positions: Int[Array, " T"],
    frequencies: Float[Array, " F"] | Sequence[float],
    gain: Float[Array, ""] | float = 1.0,
) -> Float[Array, "H T K"]:
    """The first 2F channels turned: pair (k, k + F) by position times its frequency, and multiplied by `gain`."""
    dtype, F = wide(x.dtype), len(frequencies)
    angles = positions.astype(dtype)[:, None] * jnp.asarray(frequencies, dtype)[None]
    gain = jnp.asarray(gain, dtype)
    cos, sin = (gain * jnp.cos(angles))[None], (gain * jnp.sin(angles))[None]
    first, second = jnp.split(x[..., : 2 * F].astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if x.shape[-1] == 2 * F else jnp.concatenate([turned, x[..., 2 * F :]], axis=-1)
