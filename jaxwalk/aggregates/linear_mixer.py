"""A linear mixer: MLP-Mixer (Tolstikhin et al., arXiv 2105.01601) made causal and linear."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._table import TableAggregate, TableConfig, entries
from jaxwalk.filters import Linear, module, normal


@dataclass(frozen=True)
class Config(TableConfig):
    """Heads of linear values, each mixed by a learned lower-triangular matrix over positions."""

    name: ClassVar[str] = "linear_mixer"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "LinearMixer":
        self.check_width(width)
        key_value, key_out, key_table = jax.random.split(key, 3)
        # Of the size of a matrix product's weights, in each row for as many positions as it looks at.
        looks_at = jnp.arange(1, max_length + 1, dtype=jnp.float32)[None, :, None]
        return LinearMixer(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            table=normal(key_table, (self.heads, max_length, max_length), 1) / jnp.sqrt(looks_at),
        )


@module
class LinearMixer(TableAggregate):
    """A_ij = table[g, i, j] for j <= i, of any size and sign, i and j counted in each document. G is the heads.

    Kind of A: exact, the same for all inputs; nothing but the values is held, and nothing in them needs it. Positions
    beyond the table give NaN.

    MLP-Mixer maps each channel's tokens by an MLP, the same for all channels. What makes that two matrices with an
    activation between them is left out, as it would leave no A: here it is one matrix, lower triangular so that no
    position looks ahead. Heads, which the paper has no use for, and linear maps before and after make it the
    `fixed_mixing` that has no softmax. Biases by position are left out too: position vectors are the model's.
    """

    table: Float[Array, "G M M"] = nnx.data()

    @property
    def heads(self) -> int:
        return len(self.table)

    def weights(
        self, rows: Int[Array, " R"], columns: Int[Array, " C"], allowed: Bool[Array, "R C"]
    ) -> Float[Array, "G R C"]:
        return jnp.where(allowed, entries(self.table, rows, columns), 0)
