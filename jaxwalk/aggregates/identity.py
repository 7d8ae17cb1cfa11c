"""No mixing: A = I. The layer still sees the current token, and has the parameters of a causal mean."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """Linear values of the position itself."""

    name: ClassVar[str] = "identity"
    bias: bool = True

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "Identity":
        key_value, key_out = jax.random.split(key)
        return Identity(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


class State(NamedTuple):
    """Only a count: nothing is remembered."""

    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class Identity(Aggregate):
    """A = I. G = 1. Kind of A: exact, the same for all inputs."""

    granularity: ClassVar[Literal["head", "channel", "state"]] = "head"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"value"})

    value: Linear = nnx.data()
    out: Linear = nnx.data()

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "1 T D"]:
        return jax.vmap(self.value)(x)[None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "1 R T"]:
        A = jnp.eye(len(x), dtype=wide(x.dtype))
        return (A if rows is None else A[rows])[None]

    def readout(self, y: Float[Array, "1 T D"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(y[0])

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self.readout(self.values(x), x)

    def init_state(self, length: int) -> State:
        return State(jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        return self(x), State(jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        y = jnp.where(state.position < state.length, self.out(self.value(x)), jnp.nan)
        return State(state.position + 1, state.length), y
