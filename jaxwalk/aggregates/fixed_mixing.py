"""Fixed attention patterns: a learned mixing matrix of positions that does not depend on the tokens."""

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
    """Heads of linear values, each mixed by a softmax over a learned table of positions."""

    name: ClassVar[str] = "fixed_mixing"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "FixedMixing":
        self.check_width(width)
        key_value, key_out, key_logits = jax.random.split(key, 3)
        return FixedMixing(
            value=Linear.init(width, width, bias=self.bias, key=key_value),
            out=Linear.init(width, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            # Nearly zero: initially almost the causal mean, but different in each head.
            logits=normal(key_logits, (self.heads, max_length, max_length), 0.02),
        )


@module
class FixedMixing(TableAggregate):
    """A_ij = softmax over j <= i of logits[g, i, j], with positions counted in each document.

    Positions beyond the table give NaN.

    Mixing matrix: exact, one per head, the same for all inputs.
    Memory: the values of all positions.
    """

    decays = frozenset({"logits"})

    logits: Float[Array, "G M M"] = nnx.data()

    @property
    def heads(self) -> int:
        return self.logits.shape[-3]

    def weights(
        self, rows: Int[Array, " R"], columns: Int[Array, " C"], allowed: Bool[Array, "R C"]
    ) -> Float[Array, "G R C"]:
        logits = entries(self.logits, rows, columns)
        return jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(logits.dtype).min), axis=-1)
