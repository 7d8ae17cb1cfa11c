"""Mamba-2 (Dao and Gu, arXiv 2405.21060): state space duality, heads with one decay each."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, runs_and_positions
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._linear import backward, chunked, forward
from jaxwalk.aggregates._state_space import softplus_inverse, steps_between
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, held, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """State space duality. The paper's choices, but for a number of heads in place of their width of 64."""

    name: ClassVar[str] = "mamba2"
    expand: int = 2
    """Channels of all heads together: expand x width."""
    heads: int = 4
    state: int = 128
    """N, rows of each head's state."""
    groups: int = 1
    """Of heads, which share B and C, and of channels, over which the norm is taken."""
    conv: int = 4
    """Taps of the short convolution."""
    conv_bias: bool = True
    """Of the short convolution. With it there are twice as many channels of values: those that carry the bias are
    sources of their own."""
    bias: bool = False
    """Of the maps in and out, that to dt among them, which has a `dt_bias` besides."""
    norm_eps: float = 1e-5
    """Of the norm in the readout."""
    chunk: int = 32
    """Positions that the parallel form takes at once: a matter of speed alone. Any length of sequence will do."""

    def check(self) -> Iterable[str]:
        for what in ("expand", "heads", "state", "groups", "conv", "chunk"):
            if getattr(self, what) < 1:
                yield f"{what}: expected at least 1, got {getattr(self, what)}"
        if not self.norm_eps > 0:
            yield f"norm_eps: expected more than 0, got {self.norm_eps}"
        if self.groups >= 1 and self.heads % self.groups:
            yield f"groups: expected a divisor of heads = {self.heads}, got {self.groups}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "Mamba2":
        E, H, mixed = self.expand * width, self.heads, self.expand * width + 2 * self.groups * self.state
        if E % H:
            raise ConfigError(f"heads: expected a divisor of expand * width = {E}, got {H}.")
        key_mixed, key_gate, key_conv, key_dt, key_bias, key_rate, key_out = jax.random.split(key, 7)
        return Mamba2(
            mixed=Linear.init(width, mixed, bias=self.bias, key=key_mixed),
            gate=Linear.init(width, E, bias=self.bias, key=key_gate),
            dt=Linear.init(width, H, bias=self.bias, key=key_dt),
            dt_bias=softplus_inverse(steps_between(key_bias, (H,), 0.001, 0.1)),
            conv=ShortConvolution.init(mixed, self.conv, bias=self.conv_bias, key=key_conv),
            A_log=jnp.log(jax.random.uniform(key_rate, (H,), jnp.float32, 1, 16)),
            skip=jnp.ones(H, jnp.float32),
            scale=jnp.ones(E, jnp.float32),
            out=Linear.init(E, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            groups=self.groups,
            norm_eps=self.norm_eps,
            chunk=self.chunk,
        )


class Selected(NamedTuple):
    """What the state space model is made of, in at least float32, and what enters it."""

    C: Float[Array, "H T N"]
    B: Float[Array, "H T N"]
    """Times dt."""
    log_decay: Float[Array, "H T 1"]
    u: Float[Array, "H T P"]


class State(NamedTuple):
    """The last inputs of the convolution, latest first, and the states, in at least float32."""

    inputs: Float[Array, "past M"]
    S: Float[Array, "H N P"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class Mamba2(Aggregate):
    """S_i = exp(dt_i A) S_(i-1) + dt_i B_i u_i^T, y_i = S_i^T C_i + D u_i, per head of P channels.

    u, B, C = silu(conv(mixed(x))); A = -exp(A_log); dt = softplus(dt(x) + dt_bias). The readout is
    out(RMSNorm(silu(gate(x)) * y)), group by group. G is the channels, as the convolution is of each channel its own.
    Kind of A: exact. It is what the head makes of its inputs, times the gate of their silu, times the convolution; D is
    on the diagonal of the first. A bias of the convolution enters between the two, as further channels of values, added
    up in the readout. Held, besides A, are silu(gate(x)) and 1/rms.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"mixed", "gate", "dt"})

    mixed: Linear = nnx.data()
    """To u, B and C before the convolution, in this order."""
    gate: Linear = nnx.data()
    dt: Linear = nnx.data()
    dt_bias: Float[Array, " H"] = nnx.data()
    conv: ShortConvolution = nnx.data()
    A_log: Float[Array, " H"] = nnx.data()
    skip: Float[Array, " H"] = nnx.data()
    """D of the paper."""
    scale: Float[Array, " E"] = nnx.data()
    """Of the norm."""
    out: Linear = nnx.data()
    groups: int
    norm_eps: float
    chunk: int

    @property
    def _channels(self) -> int:
        """Of all heads."""
        return self.scale.shape[0]

    @property
    def _conv(self) -> ShortConvolution:
        """The part of the convolution that u goes through."""
        weight, bias, E = self.conv.weight, self.conv.bias, self._channels
        return ShortConvolution(weight[:, :E], None if bias is None else bias[:E])

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        E, bias = self._channels, self._conv.bias
        linear = Linear(self.mixed.weight[:, :E], None if self.mixed.bias is None else self.mixed.bias[:E])
        v = jax.vmap(linear)(x).T
        if bias is not None:
            v = jnp.concatenate([v, jnp.broadcast_to(bias[:, None], v.shape)])
        return v[..., None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        convolved = self.conv(jax.vmap(self.mixed)(x), segments)
        s = self._reset(self._select(x, convolved), segments)
        A = jax.vmap(functools.partial(backward, rows, beta=None))(s.C, s.B, s.log_decay)
        own = jax.nn.one_hot(rows, len(x), dtype=A.dtype)
        A = A + self.skip.astype(A.dtype)[:, None, None] * own[None]
        gate = jax.nn.sigmoid(convolved[:, : self._channels].astype(A.dtype)).T
        A = jnp.repeat(A, self._channels // len(A), axis=0) * gate[:, None]
        through = self._conv.through(A, segments)
        return through if self.conv.bias is None else jnp.concatenate([through, A])

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        sets = y[..., 0].reshape(-1, self._channels, y.shape[1])
        gated = held(jax.nn.silu(jax.vmap(self.gate)(x)), hold) * sets.sum(0).T
        grouped = gated.reshape(len(x), self.groups, -1)
        return jax.vmap(self.out)(_normalised(grouped, self.norm_eps, hold).reshape(len(x), -1) * self.scale[None])

    def _select(self, x: Float[Array, "T D"], convolved: Float[Array, "T M"]) -> Selected:
        E, H, dtype = self._channels, len(self.A_log), wide(x.dtype)
        N = (convolved.shape[1] - E) // (2 * self.groups)
        u, B, C = jnp.split(jax.nn.silu(convolved).astype(dtype), [E, E + self.groups * N], axis=-1)
        B, C = (a.reshape(len(x), self.groups, N).transpose(1, 0, 2) for a in (B, C))
        B, C = (jnp.repeat(a, H // self.groups, axis=0) for a in (B, C))
        dt = jax.nn.softplus((jax.vmap(self.dt)(x) + self.dt_bias[None]).astype(dtype)).T[..., None]
        rates = jnp.exp(self.A_log.astype(dtype))
        return Selected(C, dt * B, -rates[:, None, None] * dt, u.reshape(len(x), H, -1).transpose(1, 0, 2))

    def _reset(self, s: Selected, segments: Array | None) -> Selected:
        """With a decay of 0 where a document begins."""
        starts = runs_and_positions(segments, s.u.shape[1])[1] == 0
        return s._replace(log_decay=jnp.where(starts[None, :, None], -jnp.inf, s.log_decay))

    def _read(self, y: Float[Array, "H T P"], u: Float[Array, "H T P"], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """From what the heads read to the output."""
        y = y + self.skip.astype(y.dtype)[:, None, None] * u
        return self.readout(y.transpose(0, 2, 1).reshape(-1, len(x), 1).astype(x.dtype), x)

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Array, Array]:
        v = jax.vmap(self.mixed)(x)
        s = self._reset(self._select(x, self.conv(v, segments)), segments)
        y, S = jax.vmap(functools.partial(chunked, beta=None, chunk=self.chunk))(s.C, s.B, s.log_decay, v=s.u)
        return self._read(y, s.u, x), v, S

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._parallel(x, segments)[0]

    def init_state(self, length: int) -> State:
        E, H = self._channels, len(self.A_log)
        N = (self.conv.weight.shape[1] - E) // (2 * self.groups)
        S = jnp.zeros((H, N, E // H), wide(self.A_log.dtype))
        return State(self.conv.init_state(), S, jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, v, S = self._parallel(x, None)
        return y, State(self.conv.state_after(v), S, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        inputs, convolved = self.conv.step(state.inputs, self.mixed(x))
        s = self._select(x[None], convolved[None])
        S, y = jax.vmap(functools.partial(forward, beta=None))(
            state.S, s.C[:, 0], s.B[:, 0], s.log_decay[:, 0], v=s.u[:, 0]
        )
        y = self._read(y[:, None], s.u, x[None])[0]
        position = state.position + 1
        return State(inputs, S, position, state.length), jnp.where(position <= state.length, y, jnp.nan)


def _normalised(y: Float[Array, "*n E"], eps: float, hold: bool) -> Float[Array, "*n E"]:
    """y / sqrt(mean y^2 + eps). The size of y is taken out first: what is read of a state may have a square that
    float32 does not hold."""
    wider = y.astype(wide(y.dtype))
    size = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(wider), -1, keepdims=True), 1))
    unit = wider / size
    return (unit * held(lax.rsqrt(jnp.mean(unit * unit, -1, keepdims=True) + eps / size / size), hold)).astype(y.dtype)
