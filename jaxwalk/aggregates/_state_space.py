"""What state space models share: how their steps start, and (below) complex diagonal ones."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwalk.filters import Key


def steps_between(key: Key, shape: tuple[int, ...], low: float, high: float) -> Float[Array, "..."]:
    """Step sizes with uniform logarithms: time scales from 1 / high to 1 / low positions."""
    return jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))


def softplus_inverse(y: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log(exp(y) - 1)."""
    return jnp.log(jnp.expm1(y))
