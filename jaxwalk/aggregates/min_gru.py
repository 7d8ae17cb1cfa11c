"""minGRU (Feng et al., arXiv 2410.01201): a gated recurrent unit whose gates do not read the hidden state."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, last
from jaxwalk.aggregates._diagonal import recur, recurrence_rows
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, module, tanh_gate, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A minGRU, followed by a linear map of its hidden state."""

    name: ClassVar[str] = "min_gru"
    hidden: int | None = None
    """H, the width of the hidden state; by default the width of the model (in the paper, 1 to 4 times it)."""
    positive: bool = False
    """Positive candidates g(value(x)) instead of value(x), as in the paper's log-space computation. See `MinGRU`."""
    bias: bool = True

    def check(self) -> Iterable[str]:
        if self.hidden is not None and self.hidden < 1:
            yield f"hidden: expected at least 1, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "MinGRU":
        H = self.hidden or width
        key_gate, key_value, key_out = jax.random.split(key, 3)
        return MinGRU(
            gate=Linear.init(width, H, bias=self.bias, key=key_gate),
            value=Linear.init(width, H, bias=self.bias, key=key_value),
            bias=jnp.full(H, 0.5, jnp.float32) if self.positive else None,
            out=Linear.init(H, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class MinGRU(Aggregate):
    """h_i = (1 - z_i) h_(i-1) + z_i v_i, z = sigmoid(gate(x)), v = value(x), in each channel, then `out`.

    With `positive`, v = g(value(x)), where g(a) is a + 1/2 for a >= 0 and sigmoid(a) otherwise. This is s(a) a + 1/2,
    with s(a) = 1 for a >= 0 and tanh(a/2) / 2a otherwise. The 1/2 is a parameter, `bias`, as only parameters have a
    separate part in a decomposition. The paper computes this variant in log space for stability, which is unnecessary
    here, as nothing is divided by a product of decays. The convolution before it in the language models of the paper is
    left out.

    Mixing matrix: exact, one per channel, A_ij = (1 - z_i) ... (1 - z_(j+1)) z_j.
    Held coefficients: A and s.
    Memory: h, in at least float32.
    """

    granularity = "channel"
    reads = frozenset({"gate", "value"})

    gate: Linear = nnx.data()
    value: Linear = nnx.data()
    bias: Float[Array, " H"] | None = nnx.data()
    """The constant that g adds in each channel, initially 1/2; None if candidates are value(x)."""
    out: Linear = nnx.data()

    def _candidates(self, x: Array, hold: bool = False) -> Float[Array, "T H"]:
        a = jax.vmap(self.value)(x)
        if self.bias is None:
            return a
        slope = jnp.where(a >= 0, 1, tanh_gate(a / 2) / 4)
        return held(slope, hold) * a + self.bias[None]

    def _gates(self, x: Array, first: Array) -> tuple[Float[Array, "T H"], Float[Array, "T H"]]:
        """The keep gate, 1 - z, or 0 at the start of a document, and the write gate, z."""
        a = jax.vmap(self.gate)(x).astype(wide(x.dtype))
        return jnp.where(first[:, None], 0, jax.nn.sigmoid(-a)), jax.nn.sigmoid(a)

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "H T 1"]:
        return self._candidates(x, hold).T[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "H R T"]:
        keep, write = self._gates(x, documents.first)
        return recurrence_rows(rows, keep, write, jnp.ones_like(keep[rows])).transpose(2, 1, 0)

    def readout(self, y: Float[Array, "H R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[..., 0].T)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        keep, write = held(self._gates(x, documents.first), hold)
        h = recur(keep, write * self._candidates(x, hold).astype(write.dtype), self.init_memory(len(x)))
        return jax.vmap(self.out)(h.astype(x.dtype)), last(h, count)

    def init_memory(self, length: int) -> Any:
        return jnp.zeros(self.out.weight.shape[-2], wide(self.out.weight.dtype))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        keep, write = self._gates(x[None], position[None] == 0)
        h = keep[0] * memory + write[0] * self._candidates(x[None])[0].astype(memory.dtype)
        return h, self.out(h.astype(x.dtype))
