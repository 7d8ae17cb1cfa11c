"""Diagonal state space models: discretisation, initialisation and gated output.

A complex state h_n' = lambda_n h_n + (B u)_n, of which one element per conjugate pair is stored, is discretised with
step size dt by a zero-order hold: h_i = exp(dt lambda) h_(i-1) + (exp(dt lambda) - 1) / lambda * B u_i.
"""

import abc
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Complex, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, last
from jaxwalk.aggregates._diagonal import recur
from jaxwalk.filters import Key, Linear, activate, held, indices, module, wide


def log_uniform(key: Key, shape: tuple[int, ...], low: float, high: float) -> Float[Array, "*n"]:
    """Log-uniform step sizes between `low` and `high`: time scales from 1 / high to 1 / low positions."""
    return jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))


def softplus_inverse(y: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The inverse of softplus, log(exp(y) - 1)."""
    return jnp.log(jnp.expm1(y))


def zero_order_hold(poles: Complex[Array, "*n"], dt: Float[Array, "*n"]) -> tuple[Array, Array]:
    """The logarithms of the decays per step, and the factors on the inputs. No pole may be 0."""
    log_decay = poles * dt.astype(poles.dtype)
    return log_decay, jnp.expm1(log_decay) / poles


def widened(a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`a` in at least float32."""
    return a.astype(wide(a.dtype))


def to_complex(real: Float[Array, "*n"], imag: Float[Array, "*n"]) -> Complex[Array, "*n"]:
    """real + i imag, in at least complex64."""
    return lax.complex(widened(real), widened(imag))


@module
class GatedOutput(nnx.Module):
    """value(g) * sigmoid(gate(g)) with g = GELU(y); without `value`, g * sigmoid(gate(g)).

    Held coefficients: both gates, Phi(y) (that of GELU) and sigmoid(gate(g)).
    """

    value: Linear | None = nnx.data()
    gate: Linear = nnx.data()

    def __call__(self, y: Float[Array, " E"], *, hold: bool = False) -> Float[Array, " D"]:
        g = activate(y, "gelu", hold)
        return held(jax.nn.sigmoid(self.gate(g)), hold) * (g if self.value is None else self.value(g))


@module
class StateSpace(Aggregate):
    """h_i = decay * h_(i-1) + factor * B u_i, y_i = Re(C h_i) + D u_i, with N complex elements shared by all channels.

    A family defines the decays and factors.

    Mixing matrix: exact, the same for all inputs. In order: the real parts of the powers of each decay; their imaginary
    parts; and the identity, for the direct term. The values of the first two are the real and imaginary parts of the
    inputs of the state (K = 2), so that Re(h) = Re(A) Re(v) - Im(A) Im(v); those of the last are the channels of D u,
    in pairs.
    Held coefficients: the gates of the readout.
    Memory: h, in at least complex64.
    """

    granularity = "state"
    decays = frozenset({"B_re", "B_im", "C_re", "C_im"})

    B_re: Float[Array, "D N"] = nnx.data()
    B_im: Float[Array, "D N"] = nnx.data()
    C_re: Float[Array, "N D"] = nnx.data()
    C_im: Float[Array, "N D"] = nnx.data()
    skip: Float[Array, " D"] = nnx.data()
    """D in the papers."""
    output: GatedOutput = nnx.data()

    @abc.abstractmethod
    def discrete(self) -> tuple[Complex[Array, " N"], Complex[Array, " N"]]:
        """The logarithms of the decays, and the factors on the inputs, of the discretised state space."""

    def _state_inputs(self, x: Float[Array, "T D"]) -> Float[Array, "T M"]:
        """The inputs of the state: real parts, then imaginary parts, M = 2N."""
        B = to_complex(self.B_re, self.B_im) * self.discrete()[1][None]
        weight = jnp.concatenate([B.real, B.imag], axis=1).astype(x.dtype)
        return jax.vmap(Linear(weight, None))(x)

    def _output(self, state: Float[Array, "T M"], direct: Float[Array, "T D"], hold: bool = False) -> Array:
        """The output, given the real and imaginary parts of the states, and the direct term."""
        C = jnp.concatenate([self.C_re, -self.C_im])
        y = jax.vmap(Linear(C, None))(state) + direct
        return jax.vmap(functools.partial(self.output, hold=hold))(y)

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        v = self._state_inputs(x).reshape(len(x), 2, -1).transpose(2, 0, 1)
        direct = jnp.pad(x * self.skip[None], ((0, 0), (0, x.shape[1] % 2)))
        return jnp.concatenate([v, v, direct.reshape(len(x), -1, 2).transpose(1, 0, 2)])

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        columns = indices(len(x))
        log_decay = self.discrete()[0]
        lags = jnp.maximum(rows[:, None] - columns[None], 0).astype(log_decay.dtype)
        powers = jnp.exp(log_decay[:, None, None] * lags[None])
        powers = jnp.where(documents.visible(rows)[None], powers, 0)
        identity = (rows[:, None] == columns[None]).astype(powers.real.dtype)
        pairs = (x.shape[1] + 1) // 2
        return jnp.concatenate([powers.real, powers.imag, jnp.broadcast_to(identity, (pairs, *identity.shape))])

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        N, D = self.C_re.shape
        by_re, by_im, direct = y[:N], y[N : 2 * N], y[2 * N :]
        h = jnp.concatenate([by_re[..., 0] - by_im[..., 1], by_re[..., 1] + by_im[..., 0]])
        return self._output(h.T, direct.transpose(1, 0, 2).reshape(y.shape[1], -1)[:, :D], hold)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        decay = jnp.where(documents.first[:, None], 0, jnp.exp(self.discrete()[0])[None])
        h = recur(decay, to_complex(*jnp.split(self._state_inputs(x), 2, axis=-1)), self.init_memory(len(x)))
        return self._read(x, h, hold), last(h, count)

    def _read(self, x: Array, h: Complex[Array, "T N"], hold: bool = False) -> Array:
        state = jnp.concatenate([h.real, h.imag], axis=-1).astype(x.dtype)
        return self._output(state, x * self.skip[None], hold)

    def init_memory(self, length: int) -> Any:
        zeros = jnp.zeros(self.B_re.shape[-1], wide(self.B_re.dtype))
        return to_complex(zeros, zeros)

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        h = jnp.exp(self.discrete()[0]) * memory + to_complex(*jnp.split(self._state_inputs(x[None])[0], 2))
        return h, self._read(x[None], h[None])[0]
