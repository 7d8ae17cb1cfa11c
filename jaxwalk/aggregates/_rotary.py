"""Rotary position embedding (Su et al., arXiv 2104.09864), and the rescaling of its frequencies for long contexts."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxwalk.config import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from jaxwalk.filters import wide


def frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> list[float]:
    """Rotation frequencies of the width / 2 pairs of channels, in radians per position.

    That of pair k is theta^(-2k / width), rescaled as in `modeling_rope_utils.py` of `transformers`.
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
            weights = [(scaling.original_length * f / (2 * math.pi) - low) / (high - low) for f in plain]
        case YarnScaling():

            def pair(turns: float) -> float:
                """The fractional index of the pair that makes this many turns within the original length."""
                return width * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

            first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            length = last - first or 0.001
            weights = [1 - (k - first) / length for k in range(width // 2)]
    weights = [min(max(w, 0), 1) for w in weights]  # interpolate: 1 is the unscaled frequency, 0 the scaled one
    return [f * (w + (1 - w) / scaling.factor) for f, w in zip(plain, weights, strict=True)]


def gain(scaling: RopeScaling | None) -> float:
    """The factor on rotated channels: the `attention_factor` of the scaling, or 1 if it has none."""
    if isinstance(scaling, YarnScaling) and scaling.attention_factor is None:
        return 0.1 * math.log(scaling.factor) + 1
    return getattr(scaling, "attention_factor", 1.0)


def rotate(
    x: Float[Array, "H T K"],
    positions: Int[Array, " T"],
    frequencies: Float[Array, " F"] | Sequence[float],
    gain: Float[Array, ""] | float = 1.0,
) -> Float[Array, "H T K"]:
    """Rotate the first 2F channels: pair (k, k + F) by the angle position * frequencies[k].

    Args:
        x: [H, T, K], queries or keys.
        positions: [T], their positions.
        frequencies: [F], in radians per position.
        gain: the factor on the rotated channels.

    Returns:
        [H, T, K].
    """
    dtype, F = wide(x.dtype), len(frequencies)
    angles = positions.astype(dtype)[:, None] * jnp.asarray(frequencies, dtype)[None]
    gain = jnp.asarray(gain, dtype)
    cos, sin = (gain * jnp.cos(angles))[None], (gain * jnp.sin(angles))[None]
    first, second = jnp.split(x[..., : 2 * F].astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if x.shape[-1] == 2 * F else jnp.concatenate([rotated, x[..., 2 * F :]], axis=-1)
