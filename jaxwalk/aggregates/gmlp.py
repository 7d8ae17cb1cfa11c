"""gMLP (Liu et al., arXiv 2105.08050), made causal: a gate that combines positions by a learned matrix."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, causal_mask, put
from jaxwalk.aggregates._table import entries
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import LayerNorm, Linear, activate, held, indices, module, normal, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A gMLP block, which includes a filter: the paper's model is `ModelConfig(aggregate="gmlp", filter=None)`."""

    name: ClassVar[str] = "gmlp"
    hidden: int | None = None
    """d_ffn of the paper, split between the two branches; by default 6 x width, as there."""
    bias: bool = True
    """Biases of the input and output maps. The bias per position is always present."""

    def check(self) -> Iterable[str]:
        if self.hidden is not None and (self.hidden < 2 or self.hidden % 2):
            yield f"hidden: expected an even number of at least 2, as two branches share it, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "GMLP":
        branch = (self.hidden or 6 * width) // 2
        key_gate, key_value, key_out, key_table = jax.random.split(key, 4)
        return GMLP(
            gate=Linear.init(width, branch, bias=self.bias, key=key_gate),
            value=Linear.init(width, branch, bias=self.bias, key=key_value),
            norm=LayerNorm.init(branch),
            # Nearly zero, so that the layer initially computes out(u), without mixing positions.
            table=normal(key_table, (max_length, max_length), 1e-3 / math.sqrt(max_length)),
            scale=jnp.ones(max_length, jnp.float32),
            bias=jnp.ones(1, jnp.float32),
            out=Linear.init(branch, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class GMLP(Aggregate):
    """y_i = out(u_i * (sum over j <= i of table_ij LayerNorm(z_j) + b_i)), u = GELU(gate(x)), z = GELU(value(x)).

    b_i = scale_i * bias is the bias per position of the paper, shared by all channels. Positions are counted in each
    document, and positions beyond the table give NaN. Initially, with a table near zero and b = 1, the output is
    out(u), all of which is due to `bias`.

    Differences from the paper: the table is lower triangular rather than bidirectional; the norm and the residual
    connection around the block are those of the layer; the tiny attention beside the table (aMLP) is left out.

    Mixing matrix: exact, the same for all inputs. G = 2: the table, with values LayerNorm(z), and diag(scale), with the
    constant value `bias`.
    Held coefficients: the gate of GELU and 1/std in the values, and u in the readout.
    Memory: LayerNorm(z) of all positions.
    """

    decays = frozenset({"table"})
    reads = frozenset({"gate", "value"})

    gate: Linear = nnx.data()
    value: Linear = nnx.data()
    norm: LayerNorm = nnx.data()
    table: Float[Array, "M M"] = nnx.data()
    scale: Float[Array, " M"] = nnx.data()
    bias: Float[Array, " 1"] = nnx.data()
    out: Linear = nnx.data()

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "2 T K"]:
        z = self._normed(x, hold)
        return jnp.stack([z, jnp.broadcast_to(self.bias, z.shape)])

    def _normed(self, x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T K"]:
        return jax.vmap(lambda x: self.norm(activate(self.value(x), "gelu", hold), hold=hold))(x)

    def _weights(self, rows: Array, columns: Array, allowed: Array) -> Array:
        return jnp.where(allowed, entries(self.table, rows, columns), 0)

    def _scales(self, positions: Array) -> Array:
        scale = self.scale.astype(wide(self.scale.dtype))
        return scale.at[positions].get(mode="fill", fill_value=jnp.nan)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "2 R T"]:
        positions = documents.position
        diagonal = jnp.where(rows[:, None] == indices(len(x))[None], self._scales(positions[rows])[:, None], 0)
        return jnp.stack([self._weights(positions[rows], positions, documents.visible(rows)), diagonal])

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        u = held(jax.vmap(lambda x: activate(self.gate(x), "gelu", False))(x), hold)
        return jax.vmap(self.out)(u * y.sum(0))

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        z = self._normed(x, hold)
        A = self._weights(documents.position, documents.position, documents.visible(indices(len(x))))
        return self._gated(A, z, documents.position, x, hold), z[None]

    def _gated(self, A: Array, z: Array, positions: Array, x: Array, hold: bool = False) -> Array:
        """The outputs at `positions`, given rows A of the table and values z, with b added instead of mixed."""
        b = (self._scales(positions) * self.bias.astype(A.dtype)).astype(x.dtype)
        return self.readout((A.astype(x.dtype) @ z + b[:, None])[None], x, hold=hold)

    def init_memory(self, length: int) -> Any:
        return jnp.zeros((1, length, self.value.weight.shape[-1]), self.value.weight.dtype)

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        values = put(memory, position, self._normed(x[None])[None, 0])
        columns = indices(values.shape[1])
        A = self._weights(position[None], columns, causal_mask(position[None], columns))
        return values, self._gated(A, values[0], position[None], x[None])[0]
