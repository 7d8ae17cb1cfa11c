"""A fixed pattern: attention whose A is learned by position and does not look at the tokens."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, put, runs_and_positions
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, module, normal, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """Heads of linear values, each mixed by a softmax over a learned table of positions."""

    name: ClassVar[str] = "fixed_mixing"
    heads: int = 4
    bias: bool = True

    def check(self) -> Iterable[str]:
        if self.heads < 1:
            yield f"heads: expected at least 1, got {self.heads}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "FixedMixing":
        if width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width}, got {self.heads}.")
        key_value, key_out, key_logits = jax.random.split(key, 3)
        return FixedMixing(
            # Near zero, so that it starts as the causal mean, with heads that differ.
            logits=normal(key_logits, (self.heads, max_length, max_length), 0.02),
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


class State(NamedTuple):
    """The values seen so far."""

    values: Float[Array, "G N K"]
    position: Int[Array, ""]


@module
class FixedMixing(Aggregate):
    """A_ij = softmax over j <= i of logits[g, i, j], i and j counted in each document. G is the heads.

    Kind of A: exact, the same for all inputs. Positions beyond the table give NaN.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "head"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"

    logits: Float[Array, "G M M"] = nnx.data()
    value: Linear = nnx.data()
    out: Linear = nnx.data()

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        return self._heads(jax.vmap(self.value)(x)).transpose(1, 0, 2)

    def _heads(self, v: Array) -> Array:
        return v.reshape(*v.shape[:-1], self.logits.shape[0], -1)

    def _weights(self, rows: Array, columns: Array, allowed: Array) -> Array:
        logits = self.logits.at[:, rows[:, None], columns[None, :]].get(mode="fill", fill_value=jnp.nan)
        logits = logits.astype(wide(logits.dtype))
        return jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(logits.dtype).min), axis=-1)

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        runs, positions = runs_and_positions(segments, len(x))
        columns = jnp.arange(len(x))
        rows = columns if rows is None else rows
        return self._weights(positions[rows], positions, causal_mask(rows, columns, runs))

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(y.transpose(1, 0, 2).reshape(y.shape[1], -1))

    def init_state(self, length: int) -> State:
        G = self.logits.shape[0]
        K = self.value.weight.shape[-1] // G
        return State(jnp.zeros((G, length, K), self.value.weight.dtype), jnp.array(0))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        values = self.values(x)
        cache = self.init_state(length).values.at[:, : len(x)].set(values)
        return self(x), State(cache, jnp.array(len(x)))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        position = state.position
        values = put(state.values, position, self._heads(self.value(x)))
        columns = jnp.arange(values.shape[1])
        A = self._weights(position[None], columns, causal_mask(position[None], columns))
        y = self.out((A.astype(values.dtype) @ values).reshape(-1))
        return State(values, position + 1), jnp.where(position < values.shape[1], y, jnp.nan)
