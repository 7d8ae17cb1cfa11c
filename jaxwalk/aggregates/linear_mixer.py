"""A linear mixer: the token mixing of MLP-Mixer (Tolstikhin et al., arXiv 2105.01601), made causal and linear."""

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

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "LinearMixer":
        self.check_width(width)
        key_value, key_out, key_table = jax.random.split(key, 3)
        # The standard deviation is 1 / sqrt(fan-in), where the fan-in of a row is the number of positions it sees.
        visible = jnp.arange(1, max_length + 1, dtype=jnp.float32)[None, :, None]
        return LinearMixer(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            table=normal(key_table, (self.heads, max_length, max_length), 1) / jnp.sqrt(visible),
        )


@module
class LinearMixer(TableAggregate):
    """A_ij = table[g, i, j] for j <= i, with positions counted in each document. Entries may have any sign.

    Positions beyond the table give NaN.

    MLP-Mixer applies an MLP across positions, the same in all channels. With an activation between its two matrices
    there would be no A, so here it is a single matrix, which is lower triangular to be causal. The heads and the linear
    maps before and after are not in the paper: they make this `fixed_mixing` without the softmax. Biases per position
    are left out, as position vectors belong to the model.

    Mixing matrix: exact, one per head, the same for all inputs.
    Memory: the values of all positions.
    """

    decays = frozenset({"table"})

    table: Float[Array, "G M M"] = nnx.data()

    @property
    def heads(self) -> int:
        return self.table.shape[-3]

    def weights(
        self, rows: Int[Array, " R"], columns: Int[Array, " C"], allowed: Bool[Array, "R C"]
    ) -> Float[Array, "G R C"]:
        return jnp.where(allowed, entries(self.table, rows, columns), 0)
