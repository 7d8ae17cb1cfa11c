"""gMLP (Liu et al., arXiv 2105.08050), causal: a gate that looks at earlier positions through a learned matrix."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, put, runs_and_positions
from jaxwalk.aggregates._table import State, entries
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import LayerNorm, Linear, activate, held, module, normal, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A gMLP block. It is a layer's filter too: `ModelConfig(aggregate="gmlp", filter=None)` is the paper's model."""

    name: ClassVar[str] = "gmlp"
    hidden: int | None = None
    """d_ffn, which the two branches share; by default 6 x width, as in the paper."""
    bias: bool = True
    """Of the maps in and out. The bias by position is part of the block."""

    def check(self) -> Iterable[str]:
        if self.hidden is not None and (self.hidden < 2 or self.hidden % 2):
            yield f"hidden: expected an even number of at least 2, as two branches share it, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "GMLP":
        branch = (self.hidden or 6 * width) // 2
        key_gate, key_value, key_out, key_table = jax.random.split(key, 4)
        return GMLP(
            gate=Linear.init(width, branch, bias=self.bias, key=key_gate),
            value=Linear.init(width, branch, bias=self.bias, key=key_value),
            norm=LayerNorm.init(branch),
            # So near zero that it starts as a layer that looks at no other position: out(u).
            table=normal(key_table, (max_length, max_length), 1e-3 / math.sqrt(max_length)),
            scale=jnp.ones(max_length, jnp.float32),
            bias=jnp.ones(1, jnp.float32),
            out=Linear.init(branch, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class GMLP(Aggregate):
    """y_i = out(u_i * (sum over j <= i of table_ij LayerNorm(z_j) + b_i)), u = GELU(gate(x)), z = GELU(value(x)).

    Kind of A: exact, the same for all inputs. G = 2: the values LayerNorm(z), mixed by the table, and a value of one,
    which is the parameter `bias`, mixed by diag(scale): scale_i bias is b_i, the paper's bias by position, which all
    channels share. Held are GELU's gate and 1/std in the values and, in the readout, all of u, which is of the position
    itself. As it starts, with no table to speak of and b = 1, it is out(u), and all of that goes to `bias`.

    Positions are counted in each document; beyond the table they give NaN. The paper's matrix looks both ways: here it
    is lower triangular. Norm and residual around the block are the layer's, and a tiny attention beside the table
    (aMLP) is left out.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "head"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"gate", "value"})

    gate: Linear = nnx.data()
    value: Linear = nnx.data()
    norm: LayerNorm = nnx.data()
    table: Float[Array, "M M"] = nnx.data()
    scale: Float[Array, " M"] = nnx.data()
    bias: Float[Array, " 1"] = nnx.data()
    out: Linear = nnx.data()

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "2 T K"]:
        z = self._normed(x, hold)
        return jnp.stack([z, jnp.broadcast_to(self.bias, z.shape)])

    def _normed(self, x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T K"]:
        return jax.vmap(lambda x: self.norm(activate(self.value(x), "gelu", hold), hold=hold))(x)

    def _weights(self, rows: Array, columns: Array, allowed: Array) -> Array:
        return jnp.where(allowed, entries(self.table, rows, columns), 0)

    def _scales(self, positions: Array) -> Array:
        scale = self.scale.astype(wide(self.scale.dtype))
        return scale.at[positions].get(mode="fill", fill_value=jnp.nan)

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "2 R T"]:
        runs, positions = runs_and_positions(segments, len(x))
        columns = jnp.arange(len(x))
        rows = columns if rows is None else rows
        itself = jnp.where(rows[:, None] == columns[None], self._scales(positions[rows])[:, None], 0)
        return jnp.stack([self._weights(positions[rows], positions, causal_mask(rows, columns, runs)), itself])

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        u = held(jax.vmap(lambda x: activate(self.gate(x), "gelu", False))(x), hold)
        return jax.vmap(self.out)(u * y.sum(0))

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._parallel(x, segments)[0]

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Array]:
        runs, positions = runs_and_positions(segments, len(x))
        columns = jnp.arange(len(x))
        z = self._normed(x)
        A = self._weights(positions, positions, causal_mask(columns, columns, runs))
        return self._gated(A, z, positions, x), z

    def _gated(self, A: Array, z: Array, positions: Array, x: Array) -> Array:
        """The output at these positions of their documents from rows of the table, without a product for b."""
        b = (self._scales(positions) * self.bias.astype(A.dtype)).astype(x.dtype)
        return self.readout((A.astype(x.dtype) @ z + b[:, None])[None], x)

    def init_state(self, length: int) -> State:
        weight = self.value.weight
        return State(jnp.zeros((1, length, weight.shape[-1]), weight.dtype), jnp.array(0))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, z = self._parallel(x, None)
        return y, State(self.init_state(length).values.at[0, : len(x)].set(z), jnp.array(len(x)))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        position = state.position[None]
        values = put(state.values, state.position, self._normed(x[None])[None, 0])
        columns = jnp.arange(values.shape[1])
        A = self._weights(position, columns, causal_mask(position, columns))
        y = self._gated(A, values[0], position, x[None])[0]
        return State(values, state.position + 1), jnp.where(state.position < len(columns), y, jnp.nan)
