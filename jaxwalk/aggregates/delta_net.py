"""DeltaNet (Schlag et al., arXiv 2102.11174; Yang et al., 2406.06484): a key's old value is replaced, not added to."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._linear import Coefficients, LinearAggregate, LinearConfig, direction, standardised
from jaxwalk.filters import Linear, module


@dataclass(frozen=True)
class Config(LinearConfig):
    """The delta rule. By default K = V = width / heads."""

    name: ClassVar[str] = "delta_net"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "DeltaNet":
        K, V = self._widths(width)
        key_qkv, key_beta, key_out = jax.random.split(key, 3)
        return DeltaNet(
            qkv=Linear.init(width, self.heads * (2 * K + V), bias=self.bias, key=key_qkv),
            beta=Linear.init(width, self.heads, bias=self.bias, key=key_beta),
            out=Linear.init(self.heads * V, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            heads=self.heads,
            chunk=self.chunk,
        )


@module
class DeltaNet(LinearAggregate):
    """S_i = (I - b_i k_i k_i^T) S_(i-1) + b_i k_i v_i^T, b = sigmoid(beta(x)), q and k of length 1 after a swish.

    Kind of A: exact. The readout is out(RMSNorm(y)), head by head; held is 1/rms. The short convolutions that the
    second paper puts before queries, keys and values are left out: values are of one position here.
    """

    beta: Linear = nnx.data()

    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        q, k = (direction(jax.nn.silu(a)) for a in self.queries_and_keys(x))
        beta = jax.nn.sigmoid(self.split(jax.vmap(self.beta)(x)))
        return Coefficients(q, k, jnp.zeros_like(beta), beta)

    def readout(self, y: Float[Array, "G T V"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(self.merge(standardised(y, centre=False, hold=hold)))
