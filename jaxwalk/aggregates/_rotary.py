"""Rotary position embedding (Su et al., arXiv 2104.09864), and how checkpoints change its frequencies for length."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxwalk.config import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from jaxwalk.filters import wide


def frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> list[float]:
    """The angle, in radians, that each of width / 2 pairs of channels turns by from one position to the next.

    theta^(-2k / width) for pair k, changed by `scaling`: the formulas of `transformers`, `modeling_rope_utils.py`.
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
            kept = [(scaling.original_length * f / (2 * math.pi) - low) / (high - low) for f in plain]
        case YarnScaling():

            def pair(turns: float) -> float:
                """The number of the pair, a fraction, that makes so many turns within the original length."""
                return width * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

            first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            length = last - first or 0.001
            kept = [1 - (k - first) / length for k in range(width // 2)]
    return [f * (s + (1 - s) / scaling.factor) for f, s in zip(plain, (min(max(s, 0), 1) for s in kept), strict=True)]


def gain(scaling: RopeScaling | None) -> float:
    """What rotated channels are multiplied by: the `attention_factor` of scalings that have one."""
    if isinstance(scaling, YarnScaling) and scaling.attention_factor is None:
        return 0.1 * math.log(scaling.factor) + 1
    return getattr(scaling, "attention_factor", 1.0)


def rotate(
    x: Float[Array, "H T K"],
    positions: Int[Array, " T"],
    theta: float,
    width: int | None = None,
    scaling: RopeScaling | None = None,
) -> Float[Array, "H T K"]:
    """The first `width` channels (by default all) turned: pair (k, k + width/2) by position times its frequency."""
    width = x.shape[-1] if width is None else width
    dtype = wide(x.dtype)
    angles = positions.astype(dtype)[:, None] * jnp.array(frequencies(width, theta, scaling), dtype)[None]
    cos, sin = gain(scaling) * jnp.cos(angles)[None], gain(scaling) * jnp.sin(angles)[None]
    first, second = jnp.split(x[..., :width].astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)
