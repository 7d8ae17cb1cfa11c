"""A short causal convolution, channel by channel: the part of Mamba, Hyena and DeltaNet that sees a few tokens back."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A convolution of linear values, with taps of its own for each channel."""

    name: ClassVar[str] = "causal_conv"
    taps: int = 4
    """How many positions it sees, its own among them."""
    bias: bool = True
    """Of the maps before and after. The convolution has none: the map after it would absorb it."""

    def check(self) -> Iterable[str]:
        if self.taps < 1:
            yield f"taps: expected at least 1, got {self.taps}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "CausalConv":
        key_value, key_conv, key_out = jax.random.split(key, 3)
        return CausalConv(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            conv=ShortConvolution.init(width, self.taps, bias=False, key=key_conv),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


class State(NamedTuple):
    """The last values, latest first."""

    values: Float[Array, "past D"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class CausalConv(Aggregate):
    """A_ij = weight[i - j], a weight for each channel and each of the last `taps` positions, and 0 further back.

    G is the channels. Kind of A: exact, the same for all inputs; nothing is held.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"value"})

    value: Linear = nnx.data()
    conv: ShortConvolution = nnx.data()
    out: Linear = nnx.data()

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        return jax.vmap(self.value)(x).T[..., None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        own = jax.nn.one_hot(rows, len(x), dtype=wide(x.dtype))
        return self.conv.through(jnp.broadcast_to(own, (self.conv.weight.shape[1], *own.shape)), segments)

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(y[..., 0].T)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(self.conv(jax.vmap(self.value)(x), segments))

    def init_state(self, length: int) -> State:
        return State(self.conv.init_state(), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        state = self.conv.state_after(jax.vmap(self.value)(x))
        return self(x), State(state, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        values, y = self.conv.step(state.values, self.value(x))
        position = state.position + 1
        return State(values, position, state.length), jnp.where(position <= state.length, self.out(y), jnp.nan)
