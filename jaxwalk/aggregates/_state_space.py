"""What state space models share: how they are discretised, how they start, and how their outputs are gated.

A diagonal state h_n' = lambda_n h_n + (B u)_n of complex numbers, in conjugate pairs of which one is kept, is taken by
steps of length dt: h_i = exp(dt lambda) h_(i-1) + (exp(dt lambda) - 1) / lambda * B u_i (zero-order hold).
"""

import abc
import functools
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Complex, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, runs_and_positions
from jaxwalk.aggregates._diagonal import recur
from jaxwalk.filters import Key, Linear, activate, held, module, wide


def steps_between(key: Key, shape: tuple[int, ...], low: float, high: float) -> Float[Array, "*n"]:
    """Step sizes with uniform logarithms: time scales from 1 / high to 1 / low positions."""
    return jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))


def softplus_inverse(y: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log(exp(y) - 1)."""
    return jnp.log(jnp.expm1(y))


def zero_order_hold(poles: Complex[Array, "*n"], dt: Float[Array, "*n"]) -> tuple[Array, Array]:
    """The logarithm of the decay of a step, and the factor on what enters at it. The poles are not 0."""
    log_decay = poles * dt.astype(poles.dtype)
    return log_decay, jnp.expm1(log_decay) / poles


def widened(a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """In at least float32."""
    return a.astype(wide(a.dtype))


def complex_of(real: Float[Array, "*n"], imag: Float[Array, "*n"]) -> Complex[Array, "*n"]:
    """In at least complex64."""
    return lax.complex(widened(real), widened(imag))


@module
class GatedOutput(nnx.Module):
    """value(g) * sigmoid(gate(g)), g = GELU(y). The held coefficients are both gates, Phi(y) and sigmoid(gate(g)).

    Without `value`, g itself is gated.
    """

    value: Linear | None = nnx.data()
    gate: Linear = nnx.data()

    def __call__(self, y: Float[Array, " E"], *, hold: bool = False) -> Float[Array, " D"]:
        g = activate(y, "gelu", hold)
        return held(jax.nn.sigmoid(self.gate(g)), hold) * (g if self.value is None else self.value(g))


class State(NamedTuple):
    """h, in at least complex64."""

    h: Complex[Array, " N"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class StateSpace(Aggregate):
    """h_i = decay * h_(i-1) + factor * B u_i, y_i = Re(C h_i) + D u_i, of N complex numbers that all channels enter and
    leave. A family says what its decays and factors are.

    G is the real parts and the imaginary parts of the decay's powers, one for each number of the state, then the
    direct term's groups. A number's value is complex, K = 2, and Re(h) is Re(A) Re(v) - Im(A) Im(v). The direct term
    has an A that is the identity, and channels in pairs.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "state"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"

    B_re: Float[Array, "D N"] = nnx.data()
    B_im: Float[Array, "D N"] = nnx.data()
    C_re: Float[Array, "N D"] = nnx.data()
    C_im: Float[Array, "N D"] = nnx.data()
    skip: Float[Array, " D"] = nnx.data()
    """D of the papers."""
    output: GatedOutput = nnx.data()

    @abc.abstractmethod
    def discrete(self) -> tuple[Complex[Array, " N"], Complex[Array, " N"]]:
        """The logarithms of the decays, and the factors on what enters."""

    def _entering(self, x: Float[Array, "T D"]) -> Float[Array, "T M"]:
        """Real parts, then imaginary parts: M = 2 N."""
        B = complex_of(self.B_re, self.B_im) * self.discrete()[1][None]
        weight = jnp.concatenate([B.real, B.imag], axis=1).astype(x.dtype)
        return jax.vmap(Linear(weight, None))(x)

    def _output(self, parts: Float[Array, "T M"], direct: Float[Array, "T D"], hold: bool = False) -> Array:
        """From the real and imaginary parts of the states."""
        C = jnp.concatenate([self.C_re, -self.C_im])
        y = jax.vmap(Linear(C, None))(parts) + direct
        return jax.vmap(functools.partial(self.output, hold=hold))(y)

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        v = self._entering(x).reshape(len(x), 2, -1).transpose(2, 0, 1)
        direct = jnp.pad(x * self.skip[None], ((0, 0), (0, x.shape[1] % 2)))
        return jnp.concatenate([v, v, direct.reshape(len(x), -1, 2).transpose(1, 0, 2)])

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        columns = jnp.arange(len(x))
        rows = columns if rows is None else rows
        log_decay = self.discrete()[0]
        runs, _ = runs_and_positions(segments, len(x))
        lags = jnp.maximum(rows[:, None] - columns[None], 0).astype(log_decay.dtype)
        powers = jnp.exp(log_decay[:, None, None] * lags[None])
        powers = jnp.where(causal_mask(rows, columns, runs)[None], powers, 0)
        own = (rows[:, None] == columns[None]).astype(powers.real.dtype)
        pairs = (x.shape[1] + 1) // 2
        return jnp.concatenate([powers.real, powers.imag, jnp.broadcast_to(own, (pairs, *own.shape))])

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        N, D = self.C_re.shape
        by_re, by_im, direct = y[:N], y[N : 2 * N], y[2 * N :]
        h = jnp.concatenate([by_re[..., 0] - by_im[..., 1], by_re[..., 1] + by_im[..., 0]])
        return self._output(h.T, direct.transpose(1, 0, 2).reshape(y.shape[1], -1)[:, :D], hold)

    def _scan(self, x: Array, keep: Array, start: Array) -> tuple[Array, Array]:
        """The output, and the last state."""
        decay = jnp.where(keep[:, None], jnp.exp(self.discrete()[0])[None], 0)
        h = recur(decay, complex_of(*jnp.split(self._entering(x), 2, axis=-1)), start)
        parts = jnp.concatenate([h.real, h.imag], axis=-1).astype(x.dtype)
        return self._output(parts, x * self.skip[None]), h[-1]

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._scan(x, runs_and_positions(segments, len(x))[1] > 0, self.init_state(len(x)).h)[0]

    def init_state(self, length: int) -> State:
        zeros = jnp.zeros(self.B_re.shape[1], wide(self.B_re.dtype))
        return State(complex_of(zeros, zeros), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, h = self._scan(x, jnp.ones(len(x), bool), self.init_state(length).h)
        return y, State(h, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        y, h = self._scan(x[None], jnp.ones(1, bool), state.h)
        position = state.position + 1
        return State(h, position, state.length), jnp.where(position <= state.length, y[0], jnp.nan)
