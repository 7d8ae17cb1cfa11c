"""minGRU (Feng et al., arXiv 2410.01201): a gated recurrent unit whose gates do not read the hidden state."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, runs_and_positions
from jaxwalk.aggregates._diagonal import recur, rows_of
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, module, tanh_gate, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A minGRU and a linear map of its hidden state."""

    name: ClassVar[str] = "min_gru"
    hidden: int | None = None
    """H, the width of the hidden state, which the paper makes 1 to 4 times that of the model. The default is 1."""
    positive: bool = False
    """Candidates g(W x) > 0, as where the paper computes with logarithms, instead of W x. See `MinGRU`."""
    bias: bool = True

    def check(self) -> Iterable[str]:
        if self.hidden is not None and self.hidden < 1:
            yield f"hidden: expected at least 1, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "MinGRU":
        H = self.hidden or width
        key_gate, key_value, key_out = jax.random.split(key, 3)
        return MinGRU(
            gate=Linear.init(width, H, bias=self.bias, key=key_gate),
            value=Linear.init(width, H, bias=self.bias, key=key_value),
            bias=jnp.full(H, 0.5, jnp.float32) if self.positive else None,
            out=Linear.init(H, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


class State(NamedTuple):
    """The hidden state, in at least float32."""

    h: Float[Array, " H"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class MinGRU(Aggregate):
    """h_i = (1 - z_i) h_(i-1) + z_i v_i, z = sigmoid(gate(x)), v = value(x), in each channel, then `out`.

    A_ij = (1 - z_i) ... (1 - z_(j+1)) z_j. Kind of A: exact. With `positive` v = g(value(x)), g(a) = a + 1/2 for a >= 0
    and sigmoid(a) below, which is s(a) a + 1/2 with s = 1 or tanh(a/2) / 2a; s is held. The 1/2 is learned: what is
    added has to be a parameter to have a part of its own in a decomposition. The paper sums logarithms then, for
    stability; nothing is lost here without, as no product of decays is divided by. Left out is the convolution that
    the paper puts before it in its language models.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"gate", "value"})

    gate: Linear = nnx.data()
    value: Linear = nnx.data()
    bias: Float[Array, " H"] | None = nnx.data()
    """What g adds to each channel, 1/2 at the start; None where candidates are value(x)."""
    out: Linear = nnx.data()

    def _candidates(self, x: Array, hold: bool) -> Array:
        a = jax.vmap(self.value)(x)
        if self.bias is None:
            return a
        slope = jnp.where(a >= 0, 1, tanh_gate(a / 2) / 4)
        return held(slope, hold) * a + self.bias[None]

    def _factors(self, x: Array, segments: Array | None) -> tuple[Array, Array]:
        """What is kept and what is taken in: 1 - z, 0 where a document begins, and z."""
        a = jax.vmap(self.gate)(x).astype(wide(x.dtype))
        first = (runs_and_positions(segments, len(x))[1] == 0)[:, None]
        return jnp.where(first, 0, jax.nn.sigmoid(-a)), jax.nn.sigmoid(a)

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "H T 1"]:
        return self._candidates(x, hold).T[..., None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "H R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        keep, write = self._factors(x, segments)
        return rows_of(rows, keep, write, jnp.ones_like(keep[rows])).transpose(2, 1, 0)

    def readout(self, y: Float[Array, "H R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[..., 0].T)

    def _hidden(self, x: Array, segments: Array | None) -> Array:
        keep, write = self._factors(x, segments)
        return recur(keep, write * self._candidates(x, False).astype(write.dtype), self.init_state(0).h)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(self._hidden(x, segments).astype(x.dtype))

    def init_state(self, length: int) -> State:
        H, dtype = self.out.weight.shape[-2], wide(self.out.weight.dtype)
        return State(jnp.zeros(H, dtype), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        h = self._hidden(x, None)
        return jax.vmap(self.out)(h.astype(x.dtype)), State(h[-1], jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        a = self.gate(x).astype(state.h.dtype)
        v = self._candidates(x[None], False)[0].astype(a.dtype)
        h = jax.nn.sigmoid(-a) * state.h + jax.nn.sigmoid(a) * v
        position = state.position + 1
        return State(h, position, state.length), jnp.where(
            position <= state.length, self.out(h.astype(x.dtype)), jnp.nan
        )
