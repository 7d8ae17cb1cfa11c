"""A short depthwise causal convolution: the component of Mamba, Hyena and DeltaNet that mixes nearby tokens."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A depthwise convolution of linear values."""

    name: ClassVar[str] = "causal_conv"
    taps: int = 4
    """The number of positions it sees, including the current one."""
    bias: bool = True
    """Biases of the input and output maps. The convolution has none, as the output map would absorb it."""

    def check(self) -> Iterable[str]:
        if self.taps < 1:
            yield f"taps: expected at least 1, got {self.taps}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "CausalConv":
        key_value, key_conv, key_out = jax.random.split(key, 3)
        return CausalConv(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            conv=ShortConvolution.init(width, self.taps, bias=False, key=key_conv),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class CausalConv(Aggregate):
    """A_ij = weight[i - j] for 0 <= i - j < taps, else 0.

    Mixing matrix: exact, one per channel, the same for all inputs.
    Memory: the last taps - 1 values, latest first.
    """

    granularity = "channel"
    reads = frozenset({"value"})

    value: Linear = nnx.data()
    conv: ShortConvolution = nnx.data()
    out: Linear = nnx.data()

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        return jax.vmap(self.value)(x).T[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        identity = jax.nn.one_hot(rows, len(x), dtype=wide(x.dtype))
        return self.conv.compose(jnp.broadcast_to(identity, (self.conv.weight.shape[-1], *identity.shape)), documents)

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[..., 0].T)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        v = jax.vmap(self.value)(x)
        return jax.vmap(self.out)(self.conv(v, documents)), self.conv.memory_after(v, count)

    def init_memory(self, length: int) -> Any:
        return self.conv.init_memory()

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        memory, y = self.conv.step(memory, self.value(x))
        return memory, self.out(y)
