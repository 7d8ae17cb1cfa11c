"""Mamba (Gu and Dao, arXiv 2312.00752): a state space model whose steps, inputs and outputs the token selects."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._contract import Aggregate, runs_and_positions
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._diagonal import recur_and_read, rows_read
from jaxwalk.aggregates._state_space import softplus_inverse, steps_between
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The selective state space model, with the paper's choices."""

    name: ClassVar[str] = "mamba"
    expand: int = 2
    """Channels of the state space model: expand x width."""
    state: int = 16
    """N, numbers in the state of each channel."""
    dt_rank: int | None = None
    """Rank of the map to the steps. The default is width / 16, rounded up."""
    conv: int = 4
    """Taps of the short convolution."""
    conv_bias: bool = True
    """Of the short convolution. With it there are twice as many channels of values: those that carry the bias are
    sources of their own."""
    bias: bool = False
    """Of the maps in and out."""

    def check(self) -> Iterable[str]:
        for what in ("expand", "state", "dt_rank", "conv"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "Mamba":
        E, N, R = self.expand * width, self.state, self.dt_rank or math.ceil(width / 16)
        key_value, key_gate, key_conv, key_select, key_dt, key_bias, key_out = jax.random.split(key, 7)
        dt = jax.random.uniform(key_dt, (R, E), jnp.float32, -(R**-0.5), R**-0.5)
        return Mamba(
            value=Linear.init(width, E, bias=self.bias, key=key_value),
            gate=Linear.init(width, E, bias=self.bias, key=key_gate),
            conv=ShortConvolution.init(E, self.conv, bias=self.conv_bias, key=key_conv),
            select=Linear.init(E, R + 2 * N, bias=False, key=key_select),
            dt=Linear(dt, softplus_inverse(steps_between(key_bias, (E,), 0.001, 0.1))),
            A_log=jnp.log(jnp.broadcast_to(jnp.arange(1, N + 1, dtype=jnp.float32)[:, None], (N, E))),
            skip=jnp.ones(E, jnp.float32),
            out=Linear.init(E, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


class Selected(NamedTuple):
    """What the convolved inputs select, and whether the state before is kept; in at least float32."""

    dt: Float[Array, "T E"]
    B: Float[Array, "T N"]
    C: Float[Array, "T N"]
    keep: Bool[Array, " T"]


class State(NamedTuple):
    """The last inputs of the convolution, latest first, and the states, in at least float32."""

    inputs: Float[Array, "past E"]
    h: Float[Array, "N E"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class Mamba(Aggregate):
    """u = silu(conv(value(x))), h_i = exp(dt_i A) h_(i-1) + dt_i B_i u_i, y_i = C_i . h_i + D u_i, channel by channel.

    h is N numbers; A = -exp(A_log); dt = softplus(dt(.)), B and C are read of u. The readout is
    out(silu(gate(x)) * y). G is the channels. Kind of A: exact. It is what the state space model makes of its inputs,
    times the gate of their silu, times the convolution; D is on the diagonal of the first. A bias of the convolution
    enters between the two, as further channels of values, added up in the readout. Held, besides A, is silu(gate(x)).
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    undecayed: ClassVar[frozenset[str]] = frozenset({"A_log"})
    reads: ClassVar[frozenset[str]] = frozenset({"value", "gate"})

    value: Linear = nnx.data()
    gate: Linear = nnx.data()
    conv: ShortConvolution = nnx.data()
    select: Linear = nnx.data()
    """To the low-rank steps, B and C, in this order."""
    dt: Linear = nnx.data()
    A_log: Float[Array, "N E"] = nnx.data()
    skip: Float[Array, " E"] = nnx.data()
    """D of the paper."""
    out: Linear = nnx.data()

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        v = jax.vmap(self.value)(x).T
        if self.conv.bias is not None:
            v = jnp.concatenate([v, jnp.broadcast_to(self.conv.bias[:, None], v.shape)])
        return v[..., None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        convolved = self.conv(jax.vmap(self.value)(x), segments)
        s, rates = self._select(jax.nn.silu(convolved), segments), self._rates()

        def parts(at: Selected) -> tuple[Array, Array]:
            return _decay(at, rates), at.B[:, None] * at.dt[None]

        reads = jnp.broadcast_to(s.C[rows][..., None], (len(rows), *rates.shape))
        A = rows_read(rows, parts, s, reads).transpose(2, 1, 0)
        own = jax.nn.one_hot(rows, len(x), dtype=A.dtype)
        A = A + self.skip.astype(A.dtype)[:, None, None] * own[None]
        A = A * jax.nn.sigmoid(convolved.astype(A.dtype)).T[:, None]
        through = self.conv.through(A, segments)
        return through if self.conv.bias is None else jnp.concatenate([through, A])

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        sets = y[..., 0].reshape(-1, self.skip.shape[0], y.shape[1])
        return jax.vmap(self.out)(held(jax.nn.silu(jax.vmap(self.gate)(x)), hold) * sets.sum(0).T)

    def _rates(self) -> Float[Array, "N E"]:
        return -jnp.exp(self.A_log.astype(wide(self.A_log.dtype)))

    def _select(self, u: Float[Array, "T E"], segments: Array | None) -> Selected:
        R, N = self.dt.weight.shape[0], self.A_log.shape[0]
        low, B, C = jnp.split(jax.vmap(self.select)(u), [R, R + N], axis=-1)
        dt = jax.nn.softplus(jax.vmap(self.dt)(low).astype(wide(u.dtype)))
        keep = runs_and_positions(segments, len(u))[1] > 0
        return Selected(dt, B.astype(dt.dtype), C.astype(dt.dtype), keep)

    def _scan(self, u: Array, s: Selected, start: Array) -> tuple[Array, Array]:
        """The model from u on, before the readout, and the last state."""
        rates, wider = self._rates(), u.astype(s.dt.dtype)

        def parts(at: tuple[Selected, Array]) -> tuple[Array, Array, Array]:
            s, entering = at
            return _decay(s, rates), s.B[:, None] * entering[None], s.C[:, None]

        y, last = recur_and_read(parts, (s, s.dt * wider), start)
        return (y + self.skip.astype(y.dtype)[None] * wider).astype(u.dtype), last

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Array, Array]:
        v = jax.vmap(self.value)(x)
        u = jax.nn.silu(self.conv(v, segments))
        y, last = self._scan(u, self._select(u, segments), self._start())
        return self.readout(y.T[..., None], x), v, last

    def _start(self) -> Float[Array, "N E"]:
        return jnp.zeros(self.A_log.shape, wide(self.A_log.dtype))

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._parallel(x, segments)[0]

    def init_state(self, length: int) -> State:
        return State(self.conv.init_state(), self._start(), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, v, h = self._parallel(x, None)
        return y, State(self.conv.state_after(v), h, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        inputs, convolved = self.conv.step(state.inputs, self.value(x))
        u = jax.nn.silu(convolved)[None]
        y, h = self._scan(u, self._select(u, None)._replace(keep=jnp.ones(1, bool)), state.h)
        y = self.readout(y.T[..., None], x[None])[0]
        position = state.position + 1
        return State(inputs, h, position, state.length), jnp.where(position <= state.length, y, jnp.nan)


def _decay(at: Selected, rates: Float[Array, "N E"]) -> Float[Array, "N E"]:
    """Of one position; 0 where a document begins."""
    return jnp.where(at.keep, jnp.exp(at.dt[None] * rates), 0)
