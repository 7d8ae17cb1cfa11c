"""The causal mean: uniform mixing without any association, a null model for attention."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, mask_padding
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A causal mean of linear values."""

    name: ClassVar[str] = "causal_mean"
    bias: bool = True

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "CausalMean":
        key_value, key_out = jax.random.split(key)
        return CausalMean(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class CausalMean(Aggregate):
    """A_ij = 1 / i for j <= i, with positions counted from 1 in each document.

    Mixing matrix: exact, a single one (G = 1), the same for all inputs.
    Memory: the sum of the values so far, in at least float32.
    """

    reads = frozenset({"value"})

    value: Linear = nnx.data()
    out: Linear = nnx.data()

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "1 T D"]:
        return jax.vmap(self.value)(x)[None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "1 R T"]:
        dtype = wide(x.dtype)
        return (documents.visible(rows).astype(dtype) / (documents.position[rows] + 1).astype(dtype)[:, None])[None]

    def readout(self, y: Float[Array, "1 R D"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[0])

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        y = self.apply_mixing(x, self.mixing(x, segments=documents))
        return y, mask_padding(self.values(x)[0].astype(wide(x.dtype)), count).sum(0)

    def init_memory(self, length: int) -> Any:
        return jnp.zeros(self.value.weight.shape[-1], wide(self.value.weight.dtype))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        total = memory + self.value(x).astype(memory.dtype)
        return total, self.out((total / (position + 1).astype(total.dtype)).astype(x.dtype))
