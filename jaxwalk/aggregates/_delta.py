"""The delta rule, and the delta rule behind short convolutions: normalised keys and strengths b = sigmoid(beta(x))."""

import abc
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Count, Documents, Segments
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.aggregates._linear import (
    Coefficients,
    LinearAggregate,
    LinearConfig,
    backward,
    chunked,
    direction,
    forward,
)
from jaxwalk.filters import Linear, held, module


@dataclass(frozen=True)
class DeltaConfig(LinearConfig):
    """The choices that all delta rules have."""

    conv: int | None = None
    """Taps of short convolutions before queries, keys and values, 4 in the papers. With them values also pass through a
    swish, and each channel has its own A. None: no convolutions, and one A per head."""

    def check(self) -> Iterable[str]:
        yield from super().check()
        if self.conv is not None and self.conv < 1:
            yield f"conv: expected at least 1, got {self.conv}"


@module
class DeltaRule(LinearAggregate):
    """S_i = d_i (I - b_i k_i k_i^T) S_(i-1) + b_i k_i v_i^T, b = sigmoid(beta(x)), q and k of length 1 after a
    swish."""

    reads = frozenset({"qkv", "beta"})

    beta: Linear = nnx.data()

    @abc.abstractmethod
    def log_decay(self, x: Float[Array, "T D"]) -> Float[Array, "G T 1"]:
        """The logarithms of d."""

    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        return self.delta_coefficients(x, *self.queries_and_keys(x))

    def delta_coefficients(self, x: Float[Array, "T D"], q: Array, k: Array) -> Coefficients:
        """The coefficients from queries and keys [G, T, K] before their swish."""
        beta = jax.nn.sigmoid(self.split(jax.vmap(self.beta)(x)))
        return Coefficients(direction(jax.nn.silu(q)), direction(jax.nn.silu(k)), self.log_decay(x), beta)

    def by_head(self, y: Float[Array, "G T K"]) -> Float[Array, "H T V"]:
        """Combined values with one entry per head."""
        return y


class ConvolvedMemory(NamedTuple):
    """The last inputs of the convolutions, latest first, and the matrices S."""

    inputs: Float[Array, "past M"]
    S: Float[Array, "H K V"]


@module
class ConvolvedDeltaRule(DeltaRule):
    """The delta rule of q, k, v = swish(conv(.)) of what the matrix produces. G is the channels.

    A, channel by channel, is that of the recurrence times the gate of the values' swish times their convolution.
    """

    granularity = "channel"

    conv: ShortConvolution = nnx.data()
    """Of queries, keys and values, in this order."""

    def _convolved(self, x: Array, convolved: Float[Array, "T M"]) -> tuple[Coefficients, Float[Array, "H T V"]]:
        """The coefficients, and the values before their swish."""
        q, k = jnp.split(convolved[:, : self._keys], 2, axis=-1)
        return self.delta_coefficients(x, self.split(q), self.split(k)), self.split(convolved[:, self._keys :])

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T 1"]:
        return super().values(x, segments, hold=hold).transpose(0, 2, 1).reshape(-1, len(x), 1)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        c, v = self._convolved(x, self.conv(jax.vmap(self.qkv)(x), documents))
        A = jax.vmap(functools.partial(backward, rows))(c.delimited(documents))
        A = A[:, None] * jax.nn.sigmoid(v).transpose(0, 2, 1)[:, :, None]
        conv_of_values = ShortConvolution(self.conv.weight[:, self._keys :], None)
        return conv_of_values.through(A.reshape(-1, *A.shape[2:]), documents)

    def by_head(self, y: Float[Array, "G T 1"]) -> Float[Array, "H T V"]:
        return y[..., 0].reshape(self.heads, -1, y.shape[1]).transpose(0, 2, 1)

    def _read(self, y: Float[Array, "H T V"], x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        return self.readout(y.transpose(0, 2, 1).reshape(-1, len(x), 1).astype(x.dtype), x, hold=hold)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        entering = jax.vmap(self.qkv)(x)
        c, v = self._convolved(x, self.conv(entering, documents))
        c, gate = held((c.delimited(documents, count), jax.nn.sigmoid(v)), hold)
        y, S = jax.vmap(functools.partial(chunked, chunk=self.chunk))(c, gate * v)
        return self._read(y, x, hold), ConvolvedMemory(self.conv.memory_after(entering, count), S)

    def init_memory(self, length: int) -> Any:
        return ConvolvedMemory(self.conv.init_memory(), super().init_memory(length))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        inputs, convolved = self.conv.step(memory.inputs, self.qkv(x))
        c, v = self._convolved(x[None], convolved[None])
        S, y = jax.vmap(forward)(memory.S, *jax.tree.map(lambda a: a[:, 0], (c, jax.nn.silu(v))))
        return ConvolvedMemory(inputs, S), self._read(y[:, None], x[None])[0]
