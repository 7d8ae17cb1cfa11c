"""Mamba (Gu and Dao, arXiv 2312.00752): a state space model whose steps, inputs and outputs the token selects."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._diagonal import recur_and_read, rows_read
from jaxwalk.aggregates._state_space import softplus_inverse, steps_between
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, activate, held, indices, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The selective state space model, with the paper's choices."""

    name: ClassVar[str] = "mamba"
    expand: int = 2
    """Channels of the state space model: expand x width."""
    state: int = 16
    """N, the number of numbers in the state of each channel."""
    dt_rank: int | None = None
    """Rank of the map to the step sizes; width / 16, rounded up, by default."""
    conv: int = 4
    """Taps of the short convolution."""
    conv_bias: bool = True
    """Of the short convolution. It doubles the channels of values: those that carry the bias are separate sources."""
    bias: bool = False
    """Of the maps in and out."""

    def check(self) -> Iterable[str]:
        for what in ("expand", "state", "dt_rank", "conv"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "Mamba":
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
    """What the convolved inputs select, in at least float32, and what happens to the state before the position."""

    dt: Float[Array, "T E"]
    B: Float[Array, "T N"]
    C: Float[Array, "T N"]
    first: Bool[Array, " T"]
    """Where the state is reset."""
    padding: Bool[Array, " T"]
    """Where the state stays as it is."""


class Memory(NamedTuple):
    """The last inputs of the convolution, latest first, and the states, in at least float32."""

    inputs: Float[Array, "past E"]
    h: Float[Array, "N E"]


@module
class Mamba(Aggregate):
    """u = silu(conv(value(x))), h_i = exp(dt_i A) h_(i-1) + dt_i B_i u_i, y_i = C_i . h_i + D u_i, channel by channel.

    h is N numbers; A = -exp(A_log); dt = softplus(dt(.)), B and C are read from u. The readout is
    out(silu(gate(x)) * y). G is the channels. Kind of A: exact. It is the mixing matrix of the state space model, times
    the gate of the silu of its inputs, times the convolution; D is on the diagonal of the first. A bias of the
    convolution enters between the two, as further channels of values, which the readout adds up. Held, besides A, is
    silu(gate(x)).
    """

    granularity = "channel"
    reads = frozenset({"value", "gate"})

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

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T 1"]:
        v = jax.vmap(self.value)(x).T
        if self.conv.bias is not None:
            v = jnp.concatenate([v, jnp.broadcast_to(self.conv.bias[:, None], v.shape)])
        return v[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        convolved = self.conv(jax.vmap(self.value)(x), documents)
        s, rates = self._select(jax.nn.silu(convolved), documents.first), self._rates()

        def parts(at: Selected) -> tuple[Array, Array]:
            return _decay(at, rates), at.B[:, None] * at.dt[None]

        reads = jnp.broadcast_to(s.C[rows][..., None], (len(rows), *rates.shape))
        A = rows_read(rows, parts, s, reads).transpose(2, 1, 0)
        A = A + self.skip.astype(A.dtype)[:, None, None] * jax.nn.one_hot(rows, len(x), dtype=A.dtype)[None]
        A = A * jax.nn.sigmoid(convolved.astype(A.dtype)).T[:, None]
        through = self.conv.through(A, documents)
        return through if self.conv.bias is None else jnp.concatenate([through, A])

    def readout(self, y: Float[Array, "G R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        parts = y[..., 0].reshape(-1, self.skip.shape[0], y.shape[1])
        return jax.vmap(self.out)(held(jax.nn.silu(jax.vmap(self.gate)(x)), hold) * parts.sum(0).T)

    def _rates(self) -> Float[Array, "N E"]:
        return -jnp.exp(self.A_log.astype(wide(self.A_log.dtype)))

    def _select(self, u: Float[Array, "T E"], first: Array, count: Count = None) -> Selected:
        R, N = self.dt.weight.shape[-2], self.A_log.shape[-2]
        low, B, C = jnp.split(jax.vmap(self.select)(u), [R, R + N], axis=-1)
        dt = jax.nn.softplus(jax.vmap(self.dt)(low).astype(wide(u.dtype)))
        padding = indices(len(u)) >= (len(u) if count is None else count)
        return Selected(dt, B.astype(dt.dtype), C.astype(dt.dtype), first, padding)

    def _scan(self, u: Array, s: Selected, start: Array) -> tuple[Array, Array]:
        """The combined values of the inputs u, and the last state."""
        rates, wider = self._rates(), u.astype(s.dt.dtype)

        def parts(at: tuple[Selected, Array]) -> tuple[Array, Array, Array]:
            s, entering = at
            return _decay(s, rates), s.B[:, None] * jnp.where(s.padding, 0, entering)[None], s.C[:, None]

        y, after = recur_and_read(parts, (s, s.dt * wider), start)
        return (y + self.skip.astype(y.dtype)[None] * wider).astype(u.dtype), after

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        v = jax.vmap(self.value)(x)
        u = activate(self.conv(v, documents), "silu", hold)
        y, h = self._scan(u, held(self._select(u, documents.first, count), hold), self._start())
        return self.readout(y.T[..., None], x, hold=hold), Memory(self.conv.memory_after(v, count), h)

    def _start(self) -> Float[Array, "N E"]:
        return jnp.zeros(self.A_log.shape[-2:], wide(self.A_log.dtype))

    def init_memory(self, length: int) -> Any:
        return Memory(self.conv.init_memory(), self._start())

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        inputs, convolved = self.conv.step(memory.inputs, self.value(x))
        u = jax.nn.silu(convolved)[None]
        y, h = self._scan(u, self._select(u, position[None] == 0), memory.h)
        return Memory(inputs, h), self.readout(y.T[..., None], x[None])[0]


def _decay(at: Selected, rates: Float[Array, "N E"]) -> Float[Array, "N E"]:
    """The decays at one position: 0 where a document begins, 1 in padding."""
    decay = jnp.where(at.first, 0, jnp.exp(at.dt[None] * rates))
    return jnp.where(at.padding, 1, decay)
