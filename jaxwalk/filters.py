"""Filters: maps of one vector, [D] -> [E]. A filter is given a single position, so it cannot mix positions.

Letters, here and in every signature of the library: B batch, T positions, D width, V vocabulary, L layers,
H heads, G heads or channels of an aggregate, K head width, S = 2L+1 stations, E any other width.

Modules are Flax NNX modules used as plain pytrees: frozen dataclasses with arrays as data and choices as static
fields. Parameters are their only leaves, and the dtype of the parameters is the dtype of the computation; means and
variances are taken in at least float32. With `hold=True` every data-dependent coefficient is held at its value (its
gradient is stopped), which makes a filter affine in its input. The idea is the "detached Jacobian" of Golden,
arXiv 2505.24293; `jaxwalk.probes.decomposition` builds on it.
"""

import dataclasses
import math
import typing
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk._products import times, times_columns
from jaxwalk.config import Activation

Key = Any
"""A `jax.random` key."""


@typing.dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(nnx.data, dataclasses.field))
def module(cls: type) -> Any:
    """Decorate an `nnx.Module` as a frozen dataclass: a pytree of its data fields; its other fields are static.

    A class attribute `decays` names the array fields that weight decay applies to; by default it applies to none.
    """
    return dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)


def stream(key: Key, name: str) -> Key:
    """The random stream called `name` under a root key."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def wide(dtype: Any) -> Any:
    """The dtype for reductions over values of `dtype`: at least float32."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def indices(start: int, stop: int | None = None) -> Int[Array, " N"]:
    """`jnp.arange` in int32, in which all indices of this library are, with or without 64-bit types."""
    return jnp.arange(start, stop, dtype=jnp.int32)


def held(coefficients: Any, hold: bool) -> Any:
    """`coefficients`, an array or a pytree of arrays, with their gradient stopped if `hold`."""
    return lax.stop_gradient(coefficients) if hold else coefficients


def row(table: Float[Array, "N D"], index: Int[Array, ""]) -> Float[Array, " D"]:
    """Row `index` of `table`; NaN if out of range, where plain indexing would clamp or wrap around silently."""
    return table.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def normal(key: Key, shape: tuple[int, ...], std: float) -> Array:
    """Normally distributed float32 parameters with standard deviation `std`."""
    return std * jax.random.normal(key, shape, jnp.float32)


TABLE_STD = 0.02  # initial standard deviation of token, position and output vectors, as in GPT-2


@module
class Embed(nnx.Module):
    """Token id -> token vector e_v: row v of the embedding matrix, times `scale`, normalised if there is a norm.

    An id out of range gives NaN. `scale` is rounded to the dtype of the matrix, as in the models that have one. A norm
    here (BLOOM, RWKV) sees one token and no context, so its bias and its statistics belong to the token vector.
    """

    decays = frozenset({"table"})

    table: Float[Array, "V D"] = nnx.data()
    scale: float = 1.0
    norm: "Norm | None" = nnx.data(default=None)

    @staticmethod
    def init(vocab_size: int, width: int, *, scale: float = 1.0, norm: "Norm | None" = None, key: Key) -> "Embed":
        """Normally distributed token vectors, whose size does not depend on `scale`."""
        return Embed(normal(key, (vocab_size, width), TABLE_STD / scale), scale, norm)

    def __call__(self, token: Int[Array, ""]) -> Float[Array, " D"]:
        return self.vector(row(self.table, token))

    def vector(self, row: Float[Array, " D"]) -> Float[Array, " D"]:
        """A row of the embedding matrix as a token vector."""
        scaled = row if self.scale == 1 else row * self.scale
        return scaled if self.norm is None else self.norm(scaled)


@module
class Unembed(nnx.Module):
    """Context vector -> logits c . u_v + b_v. If tied, `weight` is None and output vectors are the embedding matrix.

    With a `softcap` the logits become softcap * tanh(logits / softcap).
    """

    decays = frozenset({"weight"})

    weight: Float[Array, "V D"] | None = nnx.data()
    bias: Float[Array, " V"] | None = nnx.data()
    softcap: float | None = None

    @staticmethod
    def init(
        vocab_size: int, width: int, *, tied: bool, bias: bool, softcap: float | None = None, key: Key
    ) -> "Unembed":
        """Normally distributed output vectors (None if tied) and a zero bias (None unless requested)."""
        weight = None if tied else normal(key, (vocab_size, width), TABLE_STD)
        return Unembed(weight, jnp.zeros(vocab_size, jnp.float32) if bias else None, softcap)

    def __call__(self, context: Float[Array, " D"], token_table: Float[Array, "V D"]) -> Float[Array, " V"]:
        """Logits, in at least float32. `token_table` is the embedding matrix, which is used if tied."""
        logits = self.uncapped(context, token_table)
        return logits if self.softcap is None else softcapped(logits, self.softcap)

    def uncapped(self, context: Float[Array, " D"], token_table: Float[Array, "V D"]) -> Float[Array, " V"]:
        """Logits before the soft cap."""
        weight = token_table if self.weight is None else self.weight
        if context.dtype == wide(context.dtype):
            logits = times_columns(context, weight)
        else:
            logits = jnp.dot(weight, context, preferred_element_type=wide(context.dtype))
        return logits if self.bias is None else logits + self.bias.astype(logits.dtype)


def softcapped(a: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """cap * tanh(a / cap): close to `a` where that is small, never beyond the cap."""
    return cap * jnp.tanh(a / cap)


def softcap_gate(a: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """The coefficient of a soft cap that decompositions hold: softcapped(a) / a, and 1 at 0."""
    return tanh_gate(a / cap)


def tanh_gate(a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """tanh(a) / a, with its limit 1 at 0. Near 0 it is a power series, so that derivatives are finite."""
    near = jnp.abs(a) < 1e-2
    square = jnp.where(near, a * a, 0)
    series = 1 - square * (1 / 3 - square * (2 / 15 - square * 17 / 315))
    away = jnp.where(near, 1, a)
    return jnp.where(near, series, jnp.tanh(away) / away)


@module
class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias (Ba et al., arXiv 1607.06450). The held coefficient is 1/std."""

    scale: Float[Array, " D"] | None = nnx.data()
    bias: Float[Array, " D"] | None = nnx.data()
    eps: float = 1e-5

    @staticmethod
    def init(width: int, *, bias: bool = True, scale: bool = True, eps: float = 1e-5) -> "LayerNorm":
        """Scale 1 and bias 0, or None."""
        ones, zeros = jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32)
        return LayerNorm(ones if scale else None, zeros if bias else None, eps)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        centred = x.astype(wide(x.dtype))
        centred = centred - centred.mean()
        y = centred * held(lax.rsqrt(jnp.mean(centred * centred) + self.eps), hold)
        y = y.astype(x.dtype) if self.scale is None else y.astype(x.dtype) * self.scale
        return y if self.bias is None else y + self.bias


@module
class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich, arXiv 1910.07467). The held coefficient is 1/rms.

    With `unit_offset` the multiplier is 1 + scale, applied before rounding to the dtype of x (Gemma).
    """

    scale: Float[Array, " D"] = nnx.data()
    eps: float = 1e-5
    unit_offset: bool = False

    @staticmethod
    def init(width: int, *, eps: float = 1e-5, unit_offset: bool = False) -> "RMSNorm":
        """A multiplier of 1."""
        return RMSNorm(jnp.full(width, 0.0 if unit_offset else 1.0, jnp.float32), eps, unit_offset)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        y = x.astype(wide(x.dtype))
        y = y * held(lax.rsqrt(jnp.mean(y * y) + self.eps), hold)
        if self.unit_offset:
            return (y * (1 + self.scale.astype(y.dtype))).astype(x.dtype)
        return y.astype(x.dtype) * self.scale


Norm = LayerNorm | RMSNorm


@module
class Linear(nnx.Module):
    """x W + b."""

    decays = frozenset({"weight"})

    weight: Float[Array, "D E"] = nnx.data()
    bias: Float[Array, " E"] | None = nnx.data()

    @staticmethod
    def init(width_in: int, width_out: int, *, bias: bool, gain: float = 1.0, key: Key) -> "Linear":
        """Normally distributed weights with standard deviation gain / sqrt(width_in); a zero bias, or None."""
        weight = normal(key, (width_in, width_out), gain / math.sqrt(width_in))
        return Linear(weight, jnp.zeros(width_out, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " E"]:
        y = times(x, self.weight)
        return y if self.bias is None else y + self.bias

    def columns(self, start: int, stop: int | None = None) -> "Linear":
        """The part of this map that computes the outputs from `start` to `stop`."""
        return Linear(self.weight[..., start:stop], None if self.bias is None else self.bias[..., start:stop])


def _gelu_gate(a: Array) -> Array:
    return 0.5 * (1 + lax.erf(a * math.sqrt(0.5)))


def _gelu_tanh_gate(a: Array) -> Array:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a * a * a)))


# Every activation here is phi(a) = gate(a) a, and the gate is the coefficient that is held. It is written in closed
# form, never as the quotient phi(a) / a, which is NaN at 0.
GATES = {
    "gelu": _gelu_gate,
    "gelu_tanh": _gelu_tanh_gate,
    "relu": lambda a: (a > 0).astype(a.dtype),
    "silu": jax.nn.sigmoid,
}


def activate(a: Float[Array, "*n"], activation: Activation, hold: bool) -> Float[Array, "*n"]:
    """gate(a) a, elementwise; with `hold` the gate is a constant."""
    return held(GATES[activation](a), hold) * a


@module
class MLP(nnx.Module):
    """down(phi(up(x))). The held coefficients are the gates of phi, one per neuron."""

    reads = frozenset({"up"})
    writes = frozenset({"down"})

    up: Linear = nnx.data()
    down: Linear = nnx.data()
    activation: Activation = "gelu"

    def hidden(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " E"]:
        """The activations of the neurons."""
        return activate(self.up(x), self.activation, hold)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        return self.down(self.hidden(x, hold=hold))


@module
class GatedMLP(nnx.Module):
    """down(phi(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202). The whole gate branch is held."""

    reads = frozenset({"gate", "up"})
    writes = frozenset({"down"})

    gate: Linear = nnx.data()
    up: Linear = nnx.data()
    down: Linear = nnx.data()
    activation: Activation = "silu"

    def hidden(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " E"]:
        """The activations of the neurons."""
        return held(activate(self.gate(x), self.activation, False), hold) * self.up(x)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        return self.down(self.hidden(x, hold=hold))


@module
class LearnedPositions(nnx.Module):
    """Position -> row position + `offset` of a learned table. A position beyond the table gives NaN."""

    decays = frozenset({"table"})

    table: Float[Array, "M D"] = nnx.data()
    offset: int = 0

    @staticmethod
    def init(max_length: int, width: int, *, offset: int = 0, key: Key) -> "LearnedPositions":
        """Normally distributed position vectors."""
        return LearnedPositions(normal(key, (max_length + offset, width), TABLE_STD), offset)

    @property
    def max_length(self) -> int:
        """The number of positions that have a row."""
        return self.table.shape[-2] - self.offset

    def __call__(self, position: Int[Array, ""]) -> Float[Array, " D"]:
        return row(self.table, jnp.where(position < 0, -1, position + self.offset))


@module
class SinusoidalPositions(nnx.Module):
    """Position -> sines, then cosines, of geometrically spaced frequencies (Vaswani et al., arXiv 1706.03762).

    Computed, not stored: a fixed table would be a leaf, and optimisers update leaves. Scaled to the initial size of
    token vectors, which they would otherwise drown.
    """

    width: int
    scale: float = TABLE_STD

    def __call__(self, position: Int[Array, ""]) -> Float[Array, " D"]:
        half = (self.width + 1) // 2
        dtype = jnp.result_type(float)
        angles = position.astype(dtype) * 10000.0 ** (-jnp.arange(half, dtype=dtype) / half)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])[: self.width]
        return self.scale * math.sqrt(2) * waves
