"""Filters: position-wise maps of vectors, [D] -> [E]. A filter sees a single position, so it cannot mix positions.

Dimension names, here and in every signature of the library: B batch, T positions, D width, V vocabulary, L layers,
H heads, G mixing matrices of an aggregate, K head width, S = 2L+1 stations, E any other width.

Modules are Flax NNX modules used as plain pytrees: frozen dataclasses with arrays as data fields and options as static
fields. Parameters are their only leaves, and computation is in the dtype of the parameters, except for means and
variances, which are computed in at least float32.

With `hold=True` every data-dependent coefficient (of a norm, a gate, an activation) is held: its gradient is stopped,
which makes a filter affine in its input. This is the "detached Jacobian" of Golden, arXiv 2505.24293;
`jaxwalk.probes.decomposition` builds on it.
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
    """Decorate an `nnx.Module` as a frozen dataclass: a pytree of its data fields, with all other fields static.

    The class attribute `decays` names the array fields that weight decay applies to. By default it applies to none.
    """
    return dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)


def stream(key: Key, name: str) -> Key:
    """The key of the random stream `name`, derived from the root key `key`."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def wide(dtype: Any) -> Any:
    """The dtype for reductions over values of `dtype`: at least float32."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def indices(start: int, stop: int | None = None) -> Int[Array, " N"]:
    """`jnp.arange` in int32, the dtype of all indices of this library even if 64-bit types are enabled."""
    return jnp.arange(start, stop, dtype=jnp.int32)


def held(coefficients: Any, hold: bool) -> Any:
    """Stop the gradient of `coefficients`, an array or a pytree of arrays, if `hold`."""
    return lax.stop_gradient(coefficients) if hold else coefficients


def row(table: Float[Array, "N D"], index: Int[Array, ""]) -> Float[Array, " D"]:
    """Row `index` of `table`; NaN if `index` is out of range, where plain indexing would clamp or wrap around."""
    return table.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def normal(key: Key, shape: tuple[int, ...], std: float) -> Array:
    """Normally distributed float32 parameters with standard deviation `std`."""
    return std * jax.random.normal(key, shape, jnp.float32)


TABLE_STD = 0.02  # initial standard deviation of token, position and output vectors, as in GPT-2


@module
class Embed(nnx.Module):
    """Token vectors e_v: the rows of the embedding matrix times `scale`, normalised if there is a norm.

    An id out of range gives NaN. `scale` is rounded to the dtype of the matrix, as in the models that use one. A norm
    here (BLOOM, RWKV) sees one token and no context, so its bias and its statistics are part of the token vector.
    """

    decays = frozenset({"table"})

    table: Float[Array, "V D"] = nnx.data()
    scale: float = 1.0
    norm: "Norm | None" = nnx.data(default=None)

    @staticmethod
    def init(vocab_size: int, width: int, *, scale: float = 1.0, norm: "Norm | None" = None, key: Key) -> "Embed":
        """An embedding with normally distributed token vectors, whose magnitude does not depend on `scale`."""
        return Embed(normal(key, (vocab_size, width), TABLE_STD / scale), scale, norm)

    def __call__(self, token: Int[Array, ""]) -> Float[Array, " D"]:
        return self.vector(row(self.table, token))

    def vector(self, row: Float[Array, " D"]) -> Float[Array, " D"]:
        """The token vector of a row of the embedding matrix."""
        scaled = row if self.scale == 1 else row * self.scale
        return scaled if self.norm is None else self.norm(scaled)


@module
class Unembed(nnx.Module):
    """Logits c . u_v + b_v of a context vector c, for output vectors u_v.

    If tied, `weight` is None and the output vectors are the rows of the embedding matrix. With a `softcap`, the logits
    become softcap * tanh(logits / softcap).
    """

    decays = frozenset({"weight"})

    weight: Float[Array, "V D"] | None = nnx.data()
    bias: Float[Array, " V"] | None = nnx.data()
    softcap: float | None = None

    @staticmethod
    def init(
        vocab_size: int, width: int, *, tied: bool, bias: bool, softcap: float | None = None, key: Key
    ) -> "Unembed":
        """An unembedding with normally distributed output vectors, unless tied, and a zero bias if `bias`."""
        weight = None if tied else normal(key, (vocab_size, width), TABLE_STD)
        return Unembed(weight, jnp.zeros(vocab_size, jnp.float32) if bias else None, softcap)

    def __call__(self, context: Float[Array, " D"], token_table: Float[Array, "V D"]) -> Float[Array, " V"]:
        """The logits, in at least float32. `token_table` is the embedding matrix, used only if tied."""
        logits = self.uncapped(context, token_table)
        return logits if self.softcap is None else softcapped(logits, self.softcap)

    def uncapped(self, context: Float[Array, " D"], token_table: Float[Array, "V D"]) -> Float[Array, " V"]:
        """The logits before the soft cap."""
        weight = token_table if self.weight is None else self.weight
        if context.dtype == wide(context.dtype):
            logits = times_columns(context, weight)
        else:
            logits = jnp.dot(weight, context, preferred_element_type=wide(context.dtype))
        return logits if self.bias is None else logits + self.bias.astype(logits.dtype)


def softcapped(a: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """cap * tanh(a / cap): a smooth clipping of `a` to the interval from -cap to cap."""
    return cap * jnp.tanh(a / cap)


def softcap_gate(a: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """The held coefficient of a soft cap: softcapped(a) / a, with its limit 1 at 0."""
    return tanh_gate(a / cap)


def tanh_gate(a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """tanh(a) / a, with its limit 1 at 0. It is computed as a power series near 0, so that derivatives are finite."""
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
        """A layer norm with a scale of 1 and a bias of 0, each None if not requested."""
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
        """An RMS norm with a multiplier of 1."""
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
    """The affine map x W + b."""

    decays = frozenset({"weight"})

    weight: Float[Array, "D E"] = nnx.data()
    bias: Float[Array, " E"] | None = nnx.data()

    @staticmethod
    def init(width_in: int, width_out: int, *, bias: bool, gain: float = 1.0, key: Key) -> "Linear":
        """Normally distributed weights with standard deviation gain / sqrt(width_in), and a zero bias if `bias`."""
        weight = normal(key, (width_in, width_out), gain / math.sqrt(width_in))
        return Linear(weight, jnp.zeros(width_out, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " E"]:
        y = times(x, self.weight)
        return y if self.bias is None else y + self.bias

    def columns(self, start: int, stop: int | None = None) -> "Linear":
        """The map to the outputs from `start` to `stop` alone."""
        return Linear(self.weight[..., start:stop], None if self.bias is None else self.bias[..., start:stop])


def _gelu_gate(a: Array) -> Array:
    return 0.5 * (1 + lax.erf(a * math.sqrt(0.5)))


def _gelu_tanh_gate(a: Array) -> Array:
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a * a * a)))


# Every activation is phi(a) = gate(a) a, and its gate is the held coefficient. Gates are in closed form, as the
# quotient phi(a) / a would be NaN at 0.
GATES = {
    "gelu": _gelu_gate,
    "gelu_tanh": _gelu_tanh_gate,
    "relu": lambda a: (a > 0).astype(a.dtype),
    "silu": jax.nn.sigmoid,
}


def activate(a: Float[Array, "*n"], activation: Activation, hold: bool) -> Float[Array, "*n"]:
    """The activation phi(a) = gate(a) a, elementwise; with `hold`, the gate is held."""
    return held(GATES[activation](a), hold) * a


@module
class MLP(nnx.Module):
    """down(phi(up(x))). The held coefficients are the gates of phi, one per hidden neuron."""

    reads = frozenset({"up"})
    writes = frozenset({"down"})

    up: Linear = nnx.data()
    down: Linear = nnx.data()
    activation: Activation = "gelu"

    def hidden(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " E"]:
        """The activations of the hidden neurons."""
        return activate(self.up(x), self.activation, hold)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        return self.down(self.hidden(x, hold=hold))


@module
class GatedMLP(nnx.Module):
    """down(phi(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202). The held coefficients are phi(gate(x))."""

    reads = frozenset({"gate", "up"})
    writes = frozenset({"down"})

    gate: Linear = nnx.data()
    up: Linear = nnx.data()
    down: Linear = nnx.data()
    activation: Activation = "silu"

    def hidden(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " E"]:
        """The activations of the hidden neurons."""
        return held(activate(self.gate(x), self.activation, False), hold) * self.up(x)

    def __call__(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        return self.down(self.hidden(x, hold=hold))


@module
class LearnedPositions(nnx.Module):
    """Learned position vectors: the row `position + offset` of a table. A position beyond the table gives NaN."""

    decays = frozenset({"table"})

    table: Float[Array, "M D"] = nnx.data()
    offset: int = 0

    @staticmethod
    def init(max_length: int, width: int, *, offset: int = 0, key: Key) -> "LearnedPositions":
        """A table of normally distributed position vectors for `max_length` positions."""
        return LearnedPositions(normal(key, (max_length + offset, width), TABLE_STD), offset)

    @property
    def max_length(self) -> int:
        """The number of positions that the table covers."""
        return self.table.shape[-2] - self.offset

    def __call__(self, position: Int[Array, ""]) -> Float[Array, " D"]:
        return row(self.table, jnp.where(position < 0, -1, position + self.offset))


@module
class SinusoidalPositions(nnx.Module):
    """Position vectors of sines, then cosines, of geometrically spaced frequencies (Vaswani et al., arXiv 1706.03762).

    They are computed rather than stored, as optimisers would update a table in the pytree, and scaled to the initial
    magnitude of token vectors, which they would otherwise dominate.
    """

    width: int
    scale: float = TABLE_STD

    def __call__(self, position: Int[Array, ""]) -> Float[Array, " D"]:
        half = (self.width + 1) // 2
        dtype = jnp.result_type(float)
        angles = position.astype(dtype) * 10000.0 ** (-jnp.arange(half, dtype=dtype) / half)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])[: self.width]
        return self.scale * math.sqrt(2) * waves
