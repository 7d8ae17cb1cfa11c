"""No mixing, A = I: a baseline that sees only the current token, with the parameters of a causal mean."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A linear map of each position."""

    name: ClassVar[str] = "identity"
    bias: bool = True

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "Identity":
        key_value, key_out = jax.random.split(key)
        return Identity(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class Identity(Aggregate):
    """A = I.

    Mixing matrix: exact, a single one (G = 1), the same for all inputs.
    Memory: none.
    """

    reads = frozenset({"value"})

    value: Linear = nnx.data()
    out: Linear = nnx.data()

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "1 T D"]:
        return jax.vmap(self.value)(x)[None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "1 R T"]:
        return jax.nn.one_hot(rows, len(x), dtype=wide(x.dtype))[None]

    def readout(self, y: Float[Array, "1 R D"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[0])

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        return self.readout(self.values(x), x), ()

    def init_memory(self, length: int) -> Any:
        return ()

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        return (), self.out(self.value(x))
