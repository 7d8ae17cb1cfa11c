"""What heads share whose A is learned by position, as a table, and does not look at the tokens."""

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, put, runs_and_positions
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, module, wide


@dataclass(frozen=True)
class TableConfig(AggregateConfig):
    """The choices that all of them have."""

    heads: int = 4
    bias: bool = True

    def check(self) -> Iterable[str]:
        if self.heads < 1:
            yield f"heads: expected at least 1, got {self.heads}"

    def check_width(self, width: int) -> None:
        """Raises ConfigError unless the heads share the width."""
        if width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width}, got {self.heads}.")


class State(NamedTuple):
    """The values seen so far."""

    values: Float[Array, "G N K"]
    position: Int[Array, ""]


@module
class TableAggregate(Aggregate):
    """Linear values, mixed in each head as a table says; a family says what its `weights` are."""

    granularity: ClassVar[Literal["head", "channel", "state"]] = "head"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"value"})

    value: Linear = nnx.data()
    out: Linear = nnx.data()

    @property
    @abc.abstractmethod
    def heads(self) -> int:
        """G."""

    @abc.abstractmethod
    def weights(
        self, rows: Int[Array, " R"], columns: Int[Array, " C"], allowed: Bool[Array, "R C"]
    ) -> Float[Array, "G R C"]:
        """A, at positions in their documents: 0 where a row may not look, NaN in a row beyond the table."""

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        return jax.vmap(self.value)(x).reshape(len(x), self.heads, -1).transpose(1, 0, 2)

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        runs, positions = runs_and_positions(segments, len(x))
        columns = jnp.arange(len(x))
        rows = columns if rows is None else rows
        return self.weights(positions[rows], positions, causal_mask(rows, columns, runs))

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(y.transpose(1, 0, 2).reshape(y.shape[1], -1))

    def init_state(self, length: int) -> State:
        weight = self.value.weight
        return State(jnp.zeros((self.heads, length, weight.shape[-1] // self.heads), weight.dtype), jnp.array(0))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        values = self.init_state(length).values.at[:, : len(x)].set(self.values(x))
        return self(x), State(values, jnp.array(len(x)))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        position = state.position
        values = put(state.values, position, self.values(x[None])[:, 0])
        columns = jnp.arange(values.shape[1])
        A = self.weights(position[None], columns, causal_mask(position[None], columns))
        y = self.readout(A.astype(values.dtype) @ values, x[None])[0]
        return State(values, position + 1), jnp.where(position < values.shape[1], y, jnp.nan)


def entries(table: Float[Array, "*G M M"], rows: Int[Array, " R"], columns: Int[Array, " C"]) -> Float[Array, "*G R C"]:
    """The table at these positions, in at least float32; NaN beyond it."""
    found = table.at[..., rows[:, None], columns[None, :]].get(mode="fill", fill_value=jnp.nan)
    return found.astype(wide(table.dtype))
