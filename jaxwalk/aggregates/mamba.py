"""Mamba (Gu and Dao, arXiv 2312.00752): a state space model with input-dependent step sizes, B and C."""

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
from jaxwalk.aggregates._diagonal import recur_and_read, summed_recurrence_rows
from jaxwalk.aggregates._state_space import log_uniform, softplus_inverse
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, activate, held, indices, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The selective state space model, with the defaults of the paper."""

    name: ClassVar[str] = "mamba"
    expand: int = 2
    """The state space model has expand x width channels."""
    state: int = 16
    """N, the size of the state of each channel."""
    dt_rank: int | None = None
    """Rank of the map to the step sizes; by default width / 16, rounded up."""
    conv: int = 4
    """Taps of the short convolution."""
    conv_bias: bool = True
    """Bias of the short convolution. It doubles the number of value channels, as it is a separate source in A v."""
    bias: bool = False
    """Biases of the input and output maps."""

    def check(self) -> Iterable[str]:
        for field in ("expand", "state", "dt_rank", "conv"):
            value = getattr(self, field)
            if value is not None and value < 1:
                yield f"{field}: expected at least 1, got {value}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "Mamba":
        E, N, R = self.expand * width, self.state, self.dt_rank or math.ceil(width / 16)
        key_value, key_gate, key_conv, key_select, key_dt, key_bias, key_out = jax.random.split(key, 7)
        dt = jax.random.uniform(key_dt, (R, E), jnp.float32, -(R**-0.5), R**-0.5)
        return Mamba(
            value=Linear.init(width, E, bias=self.bias, key=key_value),
            gate=Linear.init(width, E, bias=self.bias, key=key_gate),
            conv=ShortConvolution.init(E, self.conv, bias=self.conv_bias, key=key_conv),
            select=Linear.init(E, R + 2 * N, bias=False, key=key_select),
            dt=Linear(dt, softplus_inverse(log_uniform(key_bias, (E,), 0.001, 0.1))),
            A_log=jnp.log(jnp.broadcast_to(jnp.arange(1, N + 1, dtype=jnp.float32)[:, None], (N, E))),
            skip=jnp.ones(E, jnp.float32),
            out=Linear.init(E, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


class Selected(NamedTuple):
    """The input-dependent coefficients, in at least float32, and where the state is reset or left unchanged."""

    dt: Float[Array, "T E"]
    B: Float[Array, "T N"]
    C: Float[Array, "T N"]
    first: Bool[Array, " T"]
    """Whether the position starts a document, which resets the state."""
    padding: Bool[Array, " T"]
    """Whether the position is padding, which leaves the state unchanged."""


class Memory(NamedTuple):
    """The last inputs of the convolution, latest first, and the states, in at least float32."""

    inputs: Float[Array, "past E"]
    h: Float[Array, "N E"]


@module
class Mamba(Aggregate):
    """u = silu(conv(value(x))), h_i = exp(dt_i A) h_(i-1) + dt_i B_i u_i, y_i = C_i . h_i + D u_i, in each channel.

    h has N elements; A = -exp(A_log); dt = softplus(dt(.)), B and C are functions of u. The readout is
    out(silu(gate(x)) * y).

    Mixing matrix: exact, one per channel. It is the matrix of the state space model, with D on its diagonal, times the
    diagonal matrix of the gates of the silu, times the matrix of the convolution. A bias of the convolution has value
    channels of its own, without the last factor, which the readout adds.
    Held coefficients: A and silu(gate(x)).
    Memory: h, and the last inputs of the convolution.
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
    """D in the paper."""
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

        def coefficients(s: Selected) -> tuple[Array, Array]:
            return _decay(s, rates), s.B[:, None] * s.dt[None]

        reads = jnp.broadcast_to(s.C[rows][..., None], (len(rows), *rates.shape))
        A = summed_recurrence_rows(rows, coefficients, s, reads).transpose(2, 1, 0)
        A = A + self.skip.astype(A.dtype)[:, None, None] * jax.nn.one_hot(rows, len(x), dtype=A.dtype)[None]
        A = A * jax.nn.sigmoid(convolved.astype(A.dtype)).T[:, None]
        composed = self.conv.compose(A, documents)
        return composed if self.conv.bias is None else jnp.concatenate([composed, A])

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
        """The outputs of the state space model for inputs u, and the last state."""
        rates, wider = self._rates(), u.astype(s.dt.dtype)

        def coefficients(position: tuple[Selected, Array]) -> tuple[Array, Array, Array]:
            s, inputs = position
            return _decay(s, rates), s.B[:, None] * jnp.where(s.padding, 0, inputs)[None], s.C[:, None]

        y, last = recur_and_read(coefficients, (s, s.dt * wider), start)
        return (y + self.skip.astype(y.dtype)[None] * wider).astype(u.dtype), last

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


def _decay(s: Selected, rates: Float[Array, "N E"]) -> Float[Array, "N E"]:
    """The decays at one position: 0 at the start of a document, 1 in padding."""
    decay = jnp.where(s.first, 0, jnp.exp(s.dt[None] * rates))
    return jnp.where(s.padding, 1, decay)
