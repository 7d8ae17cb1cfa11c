"""The delta rule (Schlag et al., arXiv 2102.11174), with or without short convolutions before it.

A state S maps keys to values. At each position the value stored for the key k_i is replaced by v_i, to the extent b_i:

    S_i = d_i (I - b_i k_i k_i^T) S_(i-1) + b_i k_i v_i^T,    b_i = sigmoid(beta(x_i)),

with queries and keys normalised to length 1 after a swish, and a decay d_i (1 in DeltaNet).
"""

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
    """Options common to all delta rules."""

    conv: int | None = None
    """Taps of short convolutions of queries, keys and values, 4 in the papers. With them, values also pass through a
    swish, and each channel has its own A. None for no convolutions and one A per head."""

    def check(self) -> Iterable[str]:
        yield from super().check()
        if self.conv is not None and self.conv < 1:
            yield f"conv: expected at least 1, got {self.conv}"


@module
class DeltaRule(LinearAggregate):
    """The delta rule, as defined in the docstring of this module. A family defines `log_decay` and its readout.

    Mixing matrix: exact, one per head. Memory: S, in at least float32.
    """

    reads = frozenset({"qkv", "beta"})

    beta: Linear = nnx.data()

    @abc.abstractmethod
    def log_decay(self, x: Float[Array, "T D"]) -> Float[Array, "G T 1"]:
        """The logarithms of the decays d."""

    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        return self.delta_coefficients(x, *self.queries_and_keys(x))

    def delta_coefficients(self, x: Float[Array, "T D"], q: Array, k: Array) -> Coefficients:
        """The coefficients, given the queries and keys [G, T, K] before the swish."""
        beta = jax.nn.sigmoid(self.split(jax.vmap(self.beta)(x)))
        return Coefficients(direction(jax.nn.silu(q)), direction(jax.nn.silu(k)), self.log_decay(x), beta)

    def by_head(self, y: Float[Array, "G T K"]) -> Float[Array, "H T V"]:
        """The combined values, arranged by head."""
        return y


class ConvolvedMemory(NamedTuple):
    """The last inputs of the convolutions, latest first, and the states S."""

    inputs: Float[Array, "past M"]
    S: Float[Array, "H K V"]


@module
class ConvolvedDeltaRule(DeltaRule):
    """The delta rule with q, k, v = swish(conv(qkv(x))).

    Mixing matrix: one per channel. It is the matrix of the recurrence, times the diagonal matrix of the gates of the
    values' swish, times the matrix of their convolution.
    """

    granularity = "channel"

    conv: ShortConvolution = nnx.data()
    """Convolution of the queries, keys and values, in this order."""

    def _split_convolved(self, x: Array, convolved: Float[Array, "T M"]) -> tuple[Coefficients, Float[Array, "H T V"]]:
        """The coefficients, and the values before the swish."""
        q, k = jnp.split(convolved[:, : self._qk_width], 2, axis=-1)
        return self.delta_coefficients(x, self.split(q), self.split(k)), self.split(convolved[:, self._qk_width :])

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T 1"]:
        return super().values(x, segments, hold=hold).transpose(0, 2, 1).reshape(-1, len(x), 1)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        c, v = self._split_convolved(x, self.conv(jax.vmap(self.qkv)(x), documents))
        A = jax.vmap(functools.partial(backward, rows))(c.delimited(documents))
        A = A[:, None] * jax.nn.sigmoid(v).transpose(0, 2, 1)[:, :, None]
        value_conv = ShortConvolution(self.conv.weight[:, self._qk_width :], None)
        return value_conv.compose(A.reshape(-1, *A.shape[2:]), documents)

    def by_head(self, y: Float[Array, "G T 1"]) -> Float[Array, "H T V"]:
        return y[..., 0].reshape(self.heads, -1, y.shape[1]).transpose(0, 2, 1)

    def _read(self, y: Float[Array, "H T V"], x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        return self.readout(y.transpose(0, 2, 1).reshape(-1, len(x), 1).astype(x.dtype), x, hold=hold)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        qkv = jax.vmap(self.qkv)(x)
        c, v = self._split_convolved(x, self.conv(qkv, documents))
        c, gate = held((c.delimited(documents, count), jax.nn.sigmoid(v)), hold)
        y, S = jax.vmap(functools.partial(chunked, chunk=self.chunk))(c, gate * v)
        return self._read(y, x, hold), ConvolvedMemory(self.conv.memory_after(qkv, count), S)

    def init_memory(self, length: int) -> Any:
        return ConvolvedMemory(self.conv.init_memory(), super().init_memory(length))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        inputs, convolved = self.conv.step(memory.inputs, self.qkv(x))
        c, v = self._split_convolved(x[None], convolved[None])
        S, y = jax.vmap(forward)(memory.S, *jax.tree.map(lambda a: a[:, 0], (c, jax.nn.silu(v))))
        return ConvolvedMemory(inputs, S), self._read(y[:, None], x[None])[0]
