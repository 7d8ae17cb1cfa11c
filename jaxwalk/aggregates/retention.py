"""Retention (Sun et al., arXiv 2307.08621): linear attention with rotary positions and a fixed decay per head."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._linear import Coefficients, LinearAggregate, LinearConfig, standardised
from jaxwalk.aggregates._rotary import frequencies, rotate
from jaxwalk.config import ConfigError
from jaxwalk.filters import Linear, held, module

THETA = 10000.0  # base of the rotation frequencies, as in the paper's code


@dataclass(frozen=True)
class Config(LinearConfig):
    """Multi-scale retention. By default K = width / heads and, as in the paper, V = 2 K."""

    name: ClassVar[str] = "retention"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "Retention":
        K, V = self._widths(width, values=2)
        if K % 2:
            raise ConfigError(f"key_width: expected an even number, as queries are rotated in pairs, got {K}.")
        key_qkv, key_gate, key_out = jax.random.split(key, 3)
        return Retention(
            qkv=Linear.init(width, self.heads * (2 * K + V), bias=self.bias, key=key_qkv),
            gate=Linear.init(width, self.heads * V, bias=self.bias, key=key_gate),
            out=Linear.init(self.heads * V, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            heads=self.heads,
            chunk=self.chunk,
        )


@module
class Retention(LinearAggregate):
    """A_ij = d^(i-j) q_i . k_j / sqrt(K), with q and k rotated by position and d = 1 - 2^(-5-h) in head h = 0, 1, ...

    The readout is out(swish(gate(x)) * GroupNorm(y)), with one head per group. The paper's normalisations of the rows
    of A are left out, as GroupNorm cancels them.

    Mixing matrix: exact, one per head.
    Held coefficients: A, swish(gate(x)) and 1/std.
    Memory: S.
    """

    reads = frozenset({"qkv", "gate"})

    gate: Linear = nnx.data()

    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        q, k = self.queries_and_keys(x)
        q, k = (rotate(a, positions, frequencies(q.shape[-1], THETA)) for a in (q, k))
        log_decay = jnp.log1p(-(2.0 ** -(5 + jnp.arange(self.heads, dtype=q.dtype))))
        return Coefficients(
            q / math.sqrt(q.shape[-1]), k, jnp.broadcast_to(log_decay[:, None, None], (*q.shape[:2], 1))
        )

    def readout(self, y: Float[Array, "G T V"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        gate = held(jax.nn.silu(jax.vmap(self.gate)(x)), hold)
        return jax.vmap(self.out)(gate * self.merge(standardised(y, centre=True, hold=hold)))
