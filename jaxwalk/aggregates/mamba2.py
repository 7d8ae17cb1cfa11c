"""Mamba-2 (Dao and Gu, arXiv 2405.21060): state space duality, a selective state space with one decay per head."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._linear import Coefficients, backward, chunked, forward
from jaxwalk.aggregates._state_space import log_uniform, softplus_inverse
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, activate, held, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """State space duality, with the defaults of the paper. The number of heads is given instead of their width."""

    name: ClassVar[str] = "mamba2"
    expand: int = 2
    """All heads together have expand x width channels."""
    heads: int = 4
    state: int = 128
    """N, the number of rows of the state of each head."""
    groups: int = 1
    """Groups of heads that share B and C. The norm is over the channels of a group."""
    conv: int = 4
    """Taps of the short convolution."""
    conv_bias: bool = True
    """Bias of the short convolution. It doubles the number of value channels, as it is a separate source in A v."""
    bias: bool = False
    """Biases of the input and output maps, including the map to dt, which also has a `dt_bias`."""
    norm_eps: float = 1e-5
    """Epsilon of the norm in the readout."""
    chunk: int = 32
    """Positions per chunk of the parallel form. It affects speed only, and need not divide the sequence length."""

    def check(self) -> Iterable[str]:
        for field in ("expand", "heads", "state", "groups", "conv", "chunk"):
            if getattr(self, field) < 1:
                yield f"{field}: expected at least 1, got {getattr(self, field)}"
        if not self.norm_eps > 0:
            yield f"norm_eps: expected more than 0, got {self.norm_eps}"
        if self.groups >= 1 and self.heads % self.groups:
            yield f"groups: expected a divisor of heads = {self.heads}, got {self.groups}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "Mamba2":
        E, H, mixed = self.expand * width, self.heads, self.expand * width + 2 * self.groups * self.state
        if E % H:
            raise ConfigError(f"heads: expected a divisor of expand * width = {E}, got {H}.")
        key_mixed, key_gate, key_conv, key_dt, key_bias, key_rate, key_out = jax.random.split(key, 7)
        return Mamba2(
            mixed=Linear.init(width, mixed, bias=self.bias, key=key_mixed),
            gate=Linear.init(width, E, bias=self.bias, key=key_gate),
            dt=Linear.init(width, H, bias=self.bias, key=key_dt),
            dt_bias=softplus_inverse(log_uniform(key_bias, (H,), 0.001, 0.1)),
            conv=ShortConvolution.init(mixed, self.conv, bias=self.conv_bias, key=key_conv),
            A_log=jnp.log(jax.random.uniform(key_rate, (H,), jnp.float32, 1, 16)),
            skip=jnp.ones(H, jnp.float32),
            scale=jnp.ones(E, jnp.float32),
            out=Linear.init(E, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            groups=self.groups,
            norm_eps=self.norm_eps,
            chunk=self.chunk,
        )


class Memory(NamedTuple):
    """The last inputs of the convolution, latest first, and the states, in at least float32."""

    inputs: Float[Array, "past M"]
    S: Float[Array, "H N P"]


@module
class Mamba2(Aggregate):
    """S_i = exp(dt_i A) S_(i-1) + dt_i B_i u_i^T, y_i = S_i^T C_i + D u_i, in each head of P channels.

    u, B, C = silu(conv(mixed(x))); A = -exp(A_log); dt = softplus(dt(x) + dt_bias). The readout is
    out(RMSNorm(silu(gate(x)) * y)), with the norm per group.

    Mixing matrix: exact, one per channel, as each channel has its own convolution. It is the matrix of the head, with D
    on its diagonal, times the diagonal matrix of the gates of the silu, times the matrix of the convolution. A bias of
    the convolution has value channels of its own, without the last factor, which the readout adds.
    Held coefficients: A, silu(gate(x)) and 1/rms.
    Memory: S, and the last inputs of the convolution.
    """

    granularity = "channel"
    reads = frozenset({"mixed", "gate", "dt"})

    mixed: Linear = nnx.data()
    """To u, B and C before the convolution, in this order."""
    gate: Linear = nnx.data()
    dt: Linear = nnx.data()
    dt_bias: Float[Array, " H"] = nnx.data()
    conv: ShortConvolution = nnx.data()
    A_log: Float[Array, " H"] = nnx.data()
    skip: Float[Array, " H"] = nnx.data()
    """D in the paper."""
    scale: Float[Array, " E"] = nnx.data()
    """Scale of the norm in the readout."""
    out: Linear = nnx.data()
    groups: int
    norm_eps: float
    chunk: int

    @property
    def _channels(self) -> int:
        """The number of channels of all heads, E."""
        return self.scale.shape[-1]

    @property
    def _heads(self) -> int:
        """The number of heads, H."""
        return self.A_log.shape[-1]

    @property
    def _u_conv(self) -> ShortConvolution:
        """The convolution of the channels of u alone."""
        weight, bias, E = self.conv.weight, self.conv.bias, self._channels
        return ShortConvolution(weight[:, :E], None if bias is None else bias[:E])

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T 1"]:
        v, bias = jax.vmap(self.mixed.columns(0, self._channels))(x).T, self._u_conv.bias
        if bias is not None:
            v = jnp.concatenate([v, jnp.broadcast_to(bias[:, None], v.shape)])
        return v[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        convolved = self.conv(jax.vmap(self.mixed)(x), documents)
        c = self._select(x, jax.nn.silu(convolved))[0].delimited(documents)
        A = jax.vmap(functools.partial(backward, rows))(c)
        A = A + self.skip.astype(A.dtype)[:, None, None] * jax.nn.one_hot(rows, len(x), dtype=A.dtype)[None]
        gate = jax.nn.sigmoid(convolved[:, : self._channels].astype(A.dtype)).T
        A = jnp.repeat(A, self._channels // len(A), axis=0) * gate[:, None]
        composed = self._u_conv.compose(A, documents)
        return composed if self.conv.bias is None else jnp.concatenate([composed, A])

    def readout(self, y: Float[Array, "G R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        parts = y[..., 0].reshape(-1, self._channels, y.shape[1])
        gated = held(jax.nn.silu(jax.vmap(self.gate)(x)), hold) * parts.sum(0).T
        grouped = gated.reshape(len(x), self.groups, -1)
        return jax.vmap(self.out)(_normalised(grouped, self.norm_eps, hold).reshape(len(x), -1) * self.scale[None])

    def _select(self, x: Float[Array, "T D"], activated: Float[Array, "T M"]) -> tuple[Coefficients, Array]:
        """The coefficients of the recurrence, and its inputs u [H, T, P], in at least float32."""
        E, H, dtype = self._channels, self._heads, wide(x.dtype)
        N = (activated.shape[1] - E) // (2 * self.groups)
        u, B, C = jnp.split(activated.astype(dtype), [E, E + self.groups * N], axis=-1)
        B, C = (a.reshape(len(x), self.groups, N).transpose(1, 0, 2) for a in (B, C))
        B, C = (jnp.repeat(a, H // self.groups, axis=0) for a in (B, C))
        dt = jax.nn.softplus((jax.vmap(self.dt)(x) + self.dt_bias[None]).astype(dtype)).T[..., None]
        rates = jnp.exp(self.A_log.astype(dtype))
        return Coefficients(C, dt * B, -rates[:, None, None] * dt), u.reshape(len(x), H, -1).transpose(1, 0, 2)

    def _read(self, y: Float[Array, "H T P"], u: Float[Array, "H T P"], x: Array, hold: bool = False) -> Array:
        """The output, given what the heads read from their states."""
        y = y + self.skip.astype(y.dtype)[:, None, None] * u
        return self.readout(y.transpose(0, 2, 1).reshape(-1, len(x), 1).astype(x.dtype), x, hold=hold)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        v = jax.vmap(self.mixed)(x)
        c, u = self._select(x, activate(self.conv(v, documents), "silu", hold))
        c = held(c.delimited(documents, count), hold)
        y, S = jax.vmap(functools.partial(chunked, chunk=self.chunk))(c, u)
        return self._read(y, u, x, hold), Memory(self.conv.memory_after(v, count), S)

    def init_memory(self, length: int) -> Any:
        E, H = self._channels, self._heads
        N = (self.conv.weight.shape[-1] - E) // (2 * self.groups)
        return Memory(self.conv.init_memory(), jnp.zeros((H, N, E // H), wide(self.A_log.dtype)))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        inputs, convolved = self.conv.step(memory.inputs, self.mixed(x))
        c, u = self._select(x[None], jax.nn.silu(convolved)[None])
        S, y = jax.vmap(forward)(memory.S, *jax.tree.map(lambda a: a[:, 0], (c, u)))
        return Memory(inputs, S), self._read(y[:, None], u, x[None])[0]


def _normalised(y: Float[Array, "*n E"], eps: float, hold: bool) -> Float[Array, "*n E"]:
    """y / sqrt(mean y^2 + eps). The magnitude of y is factored out first, as its square may overflow float32."""
    wider = y.astype(wide(y.dtype))
    size = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(wider), -1, keepdims=True), 1))
    unit = wider / size
    return (unit * held(lax.rsqrt(jnp.mean(unit * unit, -1, keepdims=True) + eps / size / size), hold)).astype(y.dtype)
