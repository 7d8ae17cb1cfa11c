"""DeltaNet (Schlag et al., arXiv 2102.11174; Yang et al., 2406.06484): linear attention with the delta rule.

Where linear attention adds a new value to the one stored for a key, the delta rule replaces it.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._delta import ConvolvedDeltaRule, DeltaConfig, DeltaRule
from jaxwalk.aggregates._linear import standardised
from jaxwalk.filters import Linear, module, stream, wide


@dataclass(frozen=True)
class Config(DeltaConfig):
    """DeltaNet. By default K = V = width / heads."""

    name: ClassVar[str] = "delta_net"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "DeltaNet":
        K, V = self._widths(width)
        key_qkv, key_beta, key_out = jax.random.split(key, 3)
        E = self.heads * (2 * K + V)
        fields: dict[str, Any] = {
            "qkv": Linear.init(width, E, bias=self.bias, key=key_qkv),
            "beta": Linear.init(width, self.heads, bias=self.bias, key=key_beta),
            "out": Linear.init(self.heads * V, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            "heads": self.heads,
            "chunk": self.chunk,
        }
        if self.conv is None:
            return DeltaNet(**fields)
        conv = ShortConvolution.init(E, self.conv, bias=False, key=stream(key, "conv"))
        return ConvolvedDeltaNet(conv=conv, **fields)


@module
class DeltaNet(DeltaRule):
    """S_i = (I - b_i k_i k_i^T) S_(i-1) + b_i k_i v_i^T, b = sigmoid(beta(x)), y_i = S_i^T q_i.

    q and k are normalised to length 1 after a swish. The readout is out(RMSNorm(y)), with the norm per head.

    Mixing matrix: exact, one per head.
    Held coefficients: A and 1/rms.
    Memory: S.
    """

    def log_decay(self, x: Float[Array, "T D"]) -> Float[Array, "G T 1"]:
        return jnp.zeros((self.heads, len(x), 1), wide(x.dtype))

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(self.merge(standardised(self.by_head(y), centre=False, hold=hold)))


@module
class ConvolvedDeltaNet(ConvolvedDeltaRule, DeltaNet):
    """DeltaNet with the short convolutions of the second paper, which give each channel its own A."""
