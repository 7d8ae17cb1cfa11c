"""What the delta rules share: normalised keys, strengths, and short convolutions before queries, keys and values."""

import abc
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import runs_and_positions
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._linear import (
    Coefficients,
    LinearAggregate,
    LinearConfig,
    State,
    backward,
    chunked,
    direction,
    forward,
)
from jaxwalk.filters import Linear, module


@dataclass(frozen=True)
class DeltaConfig(LinearConfig):
    """The choices that all of them have."""

    conv: int | None = None
    """Taps of short convolutions before queries, keys and values, 4 in the papers. With them values go through a swish
    too, and each channel has an A of its own. None: no convolutions, and one A for each head."""

    def check(self) -> Iterable[str]:
        yield from super().check()
        if self.conv is not None and self.conv < 1:
            yield f"conv: expected at least 1, got {self.conv}"

    def _conv(self, qkv: Linear, key: Any) -> ShortConvolution | None:
        if self.conv is None:
            return None
        return ShortConvolution.init(qkv.weight.shape[1], self.conv, bias=False, key=key)


class ConvolvedState(NamedTuple):
    """The last inputs of the convolutions, latest first, and the state of the recurrence."""

    inputs: Float[Array, "past M"]
    recurrent: State


@module
class DeltaRule(LinearAggregate):
    """S_i = d_i (I - b_i k_i k_i^T) S_(i-1) + b_i k_i v_i^T, b = sigmoid(beta(x)), q and k of length 1 after a swish.

    With convolutions q, k and v are swish(conv(.)) of what the matrix gives, and A, channel by channel, is that of the
    recurrence times the gate of the values' swish times their convolution.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"qkv", "beta"})

    beta: Linear = nnx.data()
    conv: ShortConvolution | None = nnx.data()
    """Of queries, keys and values, in this order."""

    @property
    def granularity(self) -> Literal["head", "channel", "state"]:  # type: ignore[override]
        return "head" if self.conv is None else "channel"

    @abc.abstractmethod
    def log_decay(self, x: Float[Array, "T D"]) -> Float[Array, "G T 1"]:
        """The logarithms of d."""

    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        return self._coefficients(x, *self.queries_and_keys(x))

    def _coefficients(self, x: Array, q: Array, k: Array) -> Coefficients:
        beta = jax.nn.sigmoid(self.split(jax.vmap(self.beta)(x)))
        return Coefficients(direction(jax.nn.silu(q)), direction(jax.nn.silu(k)), self.log_decay(x), beta)

    def _from(self, x: Array, convolved: Float[Array, "T M"]) -> tuple[Coefficients, Float[Array, "G T V"]]:
        """The coefficients, and the values before their swish."""
        q, k = jnp.split(convolved[:, : self._keys], 2, axis=-1)
        return self._coefficients(x, self.split(q), self.split(k)), self.split(convolved[:, self._keys :])

    def _convolved(self, x: Array, segments: Array | None) -> tuple[Array, Coefficients, Array]:
        """What goes into the convolution, and what is made of what comes out; decays are 0 where documents begin."""
        given = jax.vmap(self.qkv)(x)
        c, v = self._from(x, self.conv(given, segments))  # type: ignore[misc]
        starts = runs_and_positions(segments, len(x))[1] == 0
        return given, c._replace(log_decay=jnp.where(starts[None, :, None], -jnp.inf, c.log_decay)), v

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        v = super().values(x, segments, hold=hold)
        return v if self.conv is None else v.transpose(0, 2, 1).reshape(-1, len(x), 1)

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        if self.conv is None:
            return super().mixing(x, rows, segments)
        rows = jnp.arange(len(x)) if rows is None else rows
        _, c, v = self._convolved(x, segments)
        A = jax.vmap(functools.partial(backward, rows))(*c)
        A = A[:, None] * jax.nn.sigmoid(v).transpose(0, 2, 1)[:, :, None]
        ofv = ShortConvolution(self.conv.weight[:, self._keys :], None)
        return ofv.through(A.reshape(-1, *A.shape[2:]), segments)

    def by_head(self, y: Float[Array, "G T K"]) -> Float[Array, "H T V"]:
        """Channels of one head together."""
        return y if self.conv is None else y[..., 0].reshape(self.heads, -1, y.shape[1]).transpose(0, 2, 1)

    def _read(self, y: Float[Array, "H T V"], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.readout(y.transpose(0, 2, 1).reshape(-1, len(x), 1).astype(x.dtype), x)

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Any]:
        if self.conv is None:
            return super()._parallel(x, segments)
        given, c, v = self._convolved(x, segments)
        y, S = jax.vmap(functools.partial(chunked, chunk=self.chunk))(*c, jax.nn.silu(v))
        return self._read(y, x), (given, S)

    def init_state(self, length: int) -> State | ConvolvedState:  # type: ignore[override]
        state = super().init_state(length)
        return state if self.conv is None else ConvolvedState(self.conv.init_state(), state)

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State | ConvolvedState]:  # type: ignore[override]
        if self.conv is None:
            return super().prefill(x, length)
        y, (given, S) = self._parallel(x, None)
        return y, ConvolvedState(self.conv.state_after(given), State(S, jnp.array(len(x)), jnp.array(length)))

    def step(self, state: Any, x: Float[Array, " D"]) -> tuple[Any, Float[Array, " D"]]:
        if self.conv is None:
            return super().step(state, x)
        (inputs, convolved), (S, position, length) = self.conv.step(state.inputs, self.qkv(x)), state.recurrent
        c, v = self._from(x[None], convolved[None])
        q, k, log_decay, beta = jax.tree.map(lambda a: a[:, 0], c)
        S, y = jax.vmap(forward)(S, q, k, log_decay, beta, jax.nn.silu(v[:, 0]))
        y = self._read(y[:, None], x[None])[0]
        state = ConvolvedState(inputs, State(S, position + 1, length))
        return state, jnp.where(position < length, y, jnp.nan)
