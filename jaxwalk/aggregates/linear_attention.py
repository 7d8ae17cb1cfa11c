"""Linear attention (Katharopoulos et al., arXiv 2006.16236): weights phi(q) . phi(k), normalised to sum to one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Documents
from jaxwalk.aggregates._linear import Coefficients, LinearAggregate, LinearConfig
from jaxwalk.filters import Linear, held, module

FLOOR = 1e-6  # lower bound on the sum of weights in a row: features may all be 0 (relu) or underflow (elu)

FEATURES: dict[str, Callable[[Array], Array]] = {
    "elu": lambda a: jax.nn.elu(a) + 1,
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
}


@dataclass(frozen=True)
class Config(LinearConfig):
    """Linear attention. By default K = V = width / heads."""

    name: ClassVar[str] = "linear_attention"
    features: Literal["elu", "relu", "softmax"] = "elu"
    """The feature map phi of queries and keys: elu + 1, as in the paper; relu; or the softmax over the channels of a
    head (Shen et al., arXiv 1812.01243, for queries; Zhang et al., arXiv 2402.04347, for both)."""

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "LinearAttention":
        K, V = self._widths(width)
        key_qkv, key_out = jax.random.split(key)
        return LinearAttention(
            qkv=Linear.init(width, self.heads * (2 * K + V), bias=self.bias, key=key_qkv),
            out=Linear.init(self.heads * V, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            heads=self.heads,
            chunk=self.chunk,
            features=self.features,
        )


@module
class LinearAttention(LinearAggregate):
    """A_ij = phi(q_i) . phi(k_j) / sum over l <= i of phi(q_i) . phi(k_l).

    The denominator is at least `FLOOR`, for queries whose features are orthogonal to those of all keys.

    Mixing matrix: exact, one per head.
    Held coefficients: A.
    Memory: S, with an additional channel for the denominator.
    """

    features: Literal["elu", "relu", "softmax"]

    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        q, k = (FEATURES[self.features](a) for a in self.queries_and_keys(x))
        return Coefficients(q, k, jnp.zeros_like(q[..., :1]))

    def state_input(self, v: Float[Array, "G T V"]) -> Float[Array, "G T W"]:
        # A value channel of ones makes the state sum the keys as well, so that a query reads the sum of its weights.
        return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)

    def combined(self, y: Float[Array, "G T W"], *, hold: bool = False) -> Float[Array, "G T V"]:
        return y[..., :-1] / held(jnp.maximum(y[..., -1:], FLOOR), hold)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        A = super().mixing_rows(x, rows, documents)
        return A / jnp.maximum(A.sum(-1, keepdims=True), FLOOR)

    def readout(self, y: Float[Array, "G T V"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(self.merge(y))
