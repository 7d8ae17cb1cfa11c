"""Gated DeltaNet (Yang et al., arXiv 2412.06464): the delta rule with input-dependent decays."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._delta import ConvolvedDeltaRule, DeltaConfig, DeltaRule
from jaxwalk.aggregates._linear import standardised
from jaxwalk.aggregates._state_space import log_uniform, softplus_inverse
from jaxwalk.filters import Linear, held, module, stream, wide


@dataclass(frozen=True)
class Config(DeltaConfig):
    """Gated DeltaNet. By default K = V = width / heads."""

    name: ClassVar[str] = "gated_delta_net"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "GatedDeltaNet":
        K, V = self._widths(width)
        key_qkv, key_beta, key_decay, key_gate, key_out, key_rate, key_bias = jax.random.split(key, 7)
        decay = Linear.init(width, self.heads, bias=False, key=key_decay)
        # Initial decays are those of Mamba-2: steps from 0.001 to 0.1, and rates from 1 to 16.
        steps = log_uniform(key_bias, (self.heads,), 0.001, 0.1)
        E = self.heads * (2 * K + V)
        fields: dict[str, Any] = {
            "qkv": Linear.init(width, E, bias=self.bias, key=key_qkv),
            "beta": Linear.init(width, self.heads, bias=self.bias, key=key_beta),
            "decay": Linear(decay.weight, softplus_inverse(steps)),
            "log_rate": jnp.log(jax.random.uniform(key_rate, (self.heads,), jnp.float32, 1, 16)),
            "gate": Linear.init(width, self.heads * V, bias=self.bias, key=key_gate),
            "out": Linear.init(self.heads * V, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            "heads": self.heads,
            "chunk": self.chunk,
        }
        if self.conv is None:
            return GatedDeltaNet(**fields)
        conv = ShortConvolution.init(E, self.conv, bias=False, key=stream(key, "conv"))
        return ConvolvedGatedDeltaNet(conv=conv, **fields)


@module
class GatedDeltaNet(DeltaRule):
    """S_i = d_i (I - b_i k_i k_i^T) S_(i-1) + b_i k_i v_i^T, d = exp(-rate * softplus(decay(x))).

    q, k and b are those of DeltaNet. The readout is out(swish(gate(x)) * RMSNorm(y)), with the norm per head.

    Mixing matrix: exact, one per head.
    Held coefficients: A, swish(gate(x)) and 1/rms.
    Memory: S.
    """

    reads = frozenset({"qkv", "beta", "decay", "gate"})

    decay: Linear = nnx.data()
    log_rate: Float[Array, " H"] = nnx.data()
    gate: Linear = nnx.data()

    def log_decay(self, x: Float[Array, "T D"]) -> Float[Array, "G T 1"]:
        rate = jnp.exp(self.log_rate.astype(wide(self.log_rate.dtype)))
        return -rate[:, None, None] * jax.nn.softplus(self.split(jax.vmap(self.decay)(x)))

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        gate = held(jax.nn.silu(jax.vmap(self.gate)(x)), hold)
        return jax.vmap(self.out)(gate * self.merge(standardised(self.by_head(y), centre=False, hold=hold)))


@module
class ConvolvedGatedDeltaNet(ConvolvedDeltaRule, GatedDeltaNet):
    """Gated DeltaNet with the short convolutions of the paper, which give each channel its own A."""

    log_rate: Float[Array, " H"] = nnx.data()  # repeated, as Flax looks for data fields in the first base only
