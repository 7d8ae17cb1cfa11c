"""Heads whose mixing matrix is a learned table of positions, independent of the tokens."""

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, causal_mask, put
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, indices, module, wide


@dataclass(frozen=True)
class TableConfig(AggregateConfig):
    """Options common to all tables of positions."""

    heads: int = 4
    bias: bool = True

    def check(self) -> Iterable[str]:
        if self.heads < 1:
            yield f"heads: expected at least 1, got {self.heads}"

    def check_width(self, width: int) -> None:
        """Check that the heads divide the width.

        Raises:
            ConfigError: if they do not.
        """
        if width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width}, got {self.heads}.")


@module
class TableAggregate(Aggregate):
    """Linear values, mixed in each head by a table. A family defines its `weights`.

    Memory: the values of all positions.
    """

    reads = frozenset({"value"})

    value: Linear = nnx.data()
    out: Linear = nnx.data()

    @property
    @abc.abstractmethod
    def heads(self) -> int:
        """The number of heads, G."""

    @abc.abstractmethod
    def weights(
        self, rows: Int[Array, " R"], columns: Int[Array, " C"], allowed: Bool[Array, "R C"]
    ) -> Float[Array, "G R C"]:
        """Entries of A.

        Args:
            rows: [R], positions within their documents.
            columns: [C], positions within their documents.
            allowed: [R, C], whether the row may depend on the column.

        Returns:
            [G, R, C], zero where not allowed, NaN in rows beyond the table.
        """

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        return jax.vmap(self.value)(x).reshape(len(x), self.heads, -1).transpose(1, 0, 2)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        return self.weights(documents.position[rows], documents.position, documents.visible(rows))

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y.transpose(1, 0, 2).reshape(y.shape[1], -1))

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        values, A = self.values(x), self.mixing(x, segments=documents)
        return self.readout(A.astype(values.dtype) @ values, x), values

    def init_memory(self, length: int) -> Any:
        weight = self.value.weight
        return jnp.zeros((self.heads, length, weight.shape[-1] // self.heads), weight.dtype)

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        values = put(memory, position, self.values(x[None])[:, 0])
        columns = indices(values.shape[1])
        A = self.weights(position[None], columns, causal_mask(position[None], columns))
        return values, self.readout(A.astype(values.dtype) @ values, x[None])[0]


def entries(table: Float[Array, "*G M M"], rows: Int[Array, " R"], columns: Int[Array, " C"]) -> Float[Array, "*G R C"]:
    """The entries of `table` at these rows and columns, in at least float32; NaN beyond the table."""
    selected = table.at[..., rows[:, None], columns[None, :]].get(mode="fill", fill_value=jnp.nan)
    return selected.astype(wide(table.dtype))
