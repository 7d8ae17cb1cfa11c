"""Gated linear attention (Yang et al., arXiv 2312.06635): input-dependent decays of each key channel."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._linear import Coefficients, LinearAggregate, LinearConfig, standardised
from jaxwalk.filters import Linear, held, module

TEMPERATURE = 16.0  # as in the paper, to keep initial decays close to 1


@dataclass(frozen=True)
class Config(LinearConfig):
    """Gated linear attention. By default V = width / heads and, as in the paper, K = V / 2."""

    name: ClassVar[str] = "gated_linear_attention"
    chunk: int = 16
    decay_rank: int = 16
    """Rank of the map from the input to its decays."""

    def check(self) -> Iterable[str]:
        yield from super().check()
        if self.decay_rank < 1:
            yield f"decay_rank: expected at least 1, got {self.decay_rank}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "GatedLinearAttention":
        K, V = self._widths(width, keys=0.5)
        key_qkv, key_decay, key_up, key_gate, key_out = jax.random.split(key, 5)
        return GatedLinearAttention(
            qkv=Linear.init(width, self.heads * (2 * K + V), bias=self.bias, key=key_qkv),
            decay=Linear.init(width, self.decay_rank, bias=False, key=key_decay),
            decay_up=Linear.init(self.decay_rank, self.heads * K, bias=True, key=key_up),
            gate=Linear.init(width, self.heads * V, bias=self.bias, key=key_gate),
            out=Linear.init(self.heads * V, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            heads=self.heads,
            chunk=self.chunk,
        )


@module
class GatedLinearAttention(LinearAggregate):
    """A_ij = q_i . (d_i ... d_(j+1) * k_j), d = sigmoid(decay_up(decay(x)))^(1/16) in each key channel.

    The readout is out(swish(gate(x)) * LayerNorm(y)), with the norm per head.

    Mixing matrix: exact, one per head.
    Held coefficients: A, swish(gate(x)) and 1/std.
    Memory: S.
    """

    reads = frozenset({"qkv", "decay", "gate"})

    decay: Linear = nnx.data()
    decay_up: Linear = nnx.data()
    gate: Linear = nnx.data()

    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        q, k = self.queries_and_keys(x)
        logits = self.split(jax.vmap(lambda a: self.decay_up(self.decay(a)))(x))
        return Coefficients(q, k, jax.nn.log_sigmoid(logits) / TEMPERATURE)

    def readout(self, y: Float[Array, "G T V"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        gate = held(jax.nn.silu(jax.vmap(self.gate)(x)), hold)
        return jax.vmap(self.out)(gate * self.merge(standardised(y, centre=True, hold=hold)))
