"""The uniform causal mean: the aggregate with no association at all, the null of attention's mixing."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, runs_and_positions
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """Causal mean of linear values."""

    name: ClassVar[str] = "causal_mean"
    bias: bool = True

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "CausalMean":
        key_value, key_out = jax.random.split(key)
        return CausalMean(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


class State(NamedTuple):
    """The running sum, in at least float32."""

    total: Float[Array, " D"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class CausalMean(Aggregate):
    """A_ij = 1 / i for j <= i, i counted from 1 in each document. G = 1. Kind of A: exact, the same for all inputs."""

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
        runs, positions = runs_and_positions(segments, len(x))
        columns = jnp.arange(len(x))
        rows = columns if rows is None else rows
        allowed = causal_mask(rows, columns, runs)
        dtype = wide(x.dtype)
        return (allowed.astype(dtype) / (positions[rows] + 1).astype(dtype)[:, None])[None]

    def readout(self, y: Float[Array, "1 T D"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(y[0])

    def init_state(self, length: int) -> State:
        width, dtype = self.value.weight.shape[-1], wide(self.value.weight.dtype)
        return State(jnp.zeros(width, dtype), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        total = self.values(x)[0].astype(wide(x.dtype)).sum(0)
        return self(x), State(total, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        total = state.total + self.value(x).astype(state.total.dtype)
        position = state.position + 1
        y = self.out((total / position.astype(total.dtype)).astype(x.dtype))
        return State(total, position, state.length), jnp.where(position <= state.length, y, jnp.nan)
