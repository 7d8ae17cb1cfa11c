"""Hyena (Poli et al., arXiv 2302.10866): long convolutions, with filters computed by a network, and gates."""

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
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Key, Linear, held, indices, module, stream, wide

# Windows decay to DECAY_TARGET at these fractions of the longest lag, in the slowest and in the fastest channel.
DECAY_TARGET = 0.01
SLOW_DECAY, FAST_DECAY = 1.5, 0.3


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The Hyena operator."""

    name: ClassVar[str] = "hyena"
    order: int = 2
    """The number of long convolutions, each followed by a gate."""
    taps: int = 3
    """Taps of the short convolutions of values and gates."""
    filter_width: int = 64
    """Width of the hidden layers of the network that computes the filters."""
    bands: int = 16
    """The number of cosines, and of sines, of the lag that are inputs of that network, besides the lag itself."""
    frequency: float = 14.0
    """omega, the frequency at which the initial filters vary with the lag."""
    bias: bool = True
    """Biases of the input and output maps."""

    def check(self) -> Iterable[str]:
        for field in ("order", "taps", "filter_width", "bands"):
            if getattr(self, field) < 1:
                yield f"{field}: expected at least 1, got {getattr(self, field)}"
        if not 0 < self.frequency < math.inf:
            yield f"frequency: expected a positive number, got {self.frequency}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "Hyena":
        N, E = self.order, width
        key_value, key_gate, key_value_conv, key_gate_conv, key_filters, key_direct, key_out = jax.random.split(key, 7)
        return Hyena(
            value=Linear.init(width, E, bias=self.bias, key=key_value),
            gate=Linear.init(width, N * E, bias=self.bias, key=key_gate),
            value_convolution=ShortConvolution.init(E, self.taps, bias=False, key=key_value_conv),
            gate_convolution=ShortConvolution.init(N * E, self.taps, bias=False, key=key_gate_conv),
            filters=Filters.init(N, E, max_length, self, key=key_filters),
            direct=jax.random.normal(key_direct, (N, E), jnp.float32),
            out=Linear.init(E, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            max_length=max_length,
        )


@module
class Filters(nnx.Module):
    """Filters h(lag) = window(lag) * network(lag) of N convolutions in E channels.

    The network is an MLP with sine activations. Its inputs are the lag, as a fraction of the longest one, and cosines
    and sines of it. The window decays exponentially, at a different rate in each channel. The rates and the frequencies
    of the inputs are fixed.
    """

    layers: tuple[Linear, ...] = nnx.data()
    order: int
    max_length: int
    bands: int

    @staticmethod
    def init(order: int, channels: int, max_length: int, config: Config, *, key: Key) -> "Filters":
        """Filters with uniform weights and biases as in SIREN (Sitzmann et al., arXiv 2006.09661).

        In the paper, all activations are sin(omega a). Here omega is a factor of the initial weights of the first layer
        instead. Filters vary as quickly, but rounding errors are not amplified by omega in each layer, which would be
        too much in bfloat16.

        The last layer has no bias, and is scaled so that an initial filter has an energy of about one for any number of
        lags. In the released code the energy grows with their number, and the output with energy^(order / 2).
        """
        widths = [1 + 2 * config.bands, *[config.filter_width] * 3, order * channels]
        bounds = [config.frequency, math.sqrt(6), math.sqrt(6), math.sqrt(6)]
        layers: list[Linear] = []
        for n, m, bound in zip(widths[:-1], widths[1:], bounds, strict=True):
            weight_and_bias = jax.random.uniform(stream(key, f"{len(layers)}"), (n + 1, m), jnp.float32, -bound, bound)
            layers.append(Linear(weight_and_bias[:-1] / math.sqrt(n), weight_and_bias[-1] / math.sqrt(n)))
        # With weights of variance 2 / n and sines of mean square 1/2, the output of the network has variance 1.
        energy = jnp.sum(_window(channels, max_length, max_length, jnp.float32) ** 2, axis=0)
        last = layers[-1].weight.reshape(-1, order, channels) * lax.rsqrt(energy)[None, None]
        layers[-1] = Linear(last.reshape(-1, order * channels), None)
        return Filters(tuple(layers), order, max_length, config.bands)

    def __call__(self, length: int) -> Float[Array, "N length E"]:
        """The filters at lags below `length`, in at least float32."""
        dtype = wide(self.layers[0].weight.dtype)
        relative_lag = jnp.arange(length, dtype=dtype) / max(self.max_length - 1, 1)
        base_angles = 2 * math.pi / self.max_length * jnp.arange(length, dtype=dtype)
        angles = base_angles[:, None] * jnp.linspace(1e-4, self.bands - 1, self.bands, dtype=dtype)[None]
        h = jnp.concatenate([relative_lag[:, None], jnp.cos(angles), -jnp.sin(angles)], axis=1)
        *inner, last = jax.tree.map(lambda a: a.astype(dtype), self.layers)
        for layer in inner:
            h = jnp.sin(jax.vmap(layer)(h))
        h = jax.vmap(last)(h).reshape(length, self.order, -1).swapaxes(0, 1)
        return h * _window(h.shape[-1], length, self.max_length, dtype)[None]


def _window(channels: int, length: int, max_length: int, dtype: Any) -> Float[Array, "length E"]:
    relative_lag = jnp.arange(length, dtype=dtype) / max(max_length - 1, 1)
    rates = jnp.linspace(1 / SLOW_DECAY, 1 / FAST_DECAY, channels, dtype=dtype) * math.log(1 / DECAY_TARGET)
    return jnp.exp(-relative_lag[:, None] * rates[None])


class Memory(NamedTuple):
    """The inputs of the long convolutions, in at least float32, and the last inputs of the short ones, latest first."""

    inputs: Float[Array, "N length E"]
    value_taps: Float[Array, "past E"]
    gate_taps: Float[Array, "past F"]


@module
class Hyena(Aggregate):
    """z_1 = C value(x), z_(n+1) = x_n * (H_n z_n) for n = 1 ... N, y = out(z_(N+1)), in each channel.

    C is the matrix of a short convolution, x_n the short convolution of a linear map of x, and H_n the lower-triangular
    matrix of a long convolution, with entries h_n(i - j), plus `direct` on the diagonal. Positions are counted in each
    document; beyond `max_length` the output is NaN.

    Differences from the released code: it leaves out H_1, and so has one fewer long convolution; it has biases in the
    short convolutions, which would require additional values here; and it learns omega and the inputs of the filter
    network.

    Mixing matrix: exact, one per channel, A = diag(x_N) H_N ... diag(x_1) H_1 C, with values value(x). The gates x_n
    are part of A, as they depend on earlier positions.
    Held coefficients: A.
    Memory: the inputs of all long convolutions at all positions, and the last inputs of the short ones.
    """

    granularity = "channel"
    reads = frozenset({"value", "gate"})

    value: Linear = nnx.data()
    gate: Linear = nnx.data()
    """To x_1, then x_2, ..., before their short convolution."""
    value_convolution: ShortConvolution = nnx.data()
    gate_convolution: ShortConvolution = nnx.data()
    filters: Filters = nnx.data()
    direct: Float[Array, "N E"] = nnx.data()
    out: Linear = nnx.data()
    max_length: int

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "E T 1"]:
        return jax.vmap(self.value)(x).T[:, :, None]

    def readout(self, y: Float[Array, "E R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[:, :, 0].T)

    def _gates(self, gates: Float[Array, "T F"]) -> Float[Array, "N T E"]:
        return gates.reshape(len(gates), self.direct.shape[-2], -1).swapaxes(0, 1).astype(wide(gates.dtype))

    def _taps(self, length: int) -> Float[Array, "N length E"]:
        """The first column of each H, at lags below `length`."""
        return self.filters(length).at[:, 0].add(self.direct.astype(wide(self.direct.dtype)))

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "E R T"]:
        gates = self._gates(self.gate_convolution(jax.vmap(self.gate)(x), documents))

        def channel_rows(channel: tuple[Array, Array]) -> Array:
            # Multiplied from the left, so that only one [T, T] matrix exists at a time.
            taps, gates = channel
            A = jax.nn.one_hot(rows, len(x), dtype=gates.dtype)
            for h, gate in zip(taps[::-1], gates[::-1], strict=True):
                A = (A * gate[None]) @ _toeplitz(h, documents)
            return A

        A = lax.map(channel_rows, _by_channel(self._taps(len(x)), gates))
        A = self.value_convolution.compose(A, documents)
        return jnp.where((documents.position[rows] < self.max_length)[None, :, None], A, jnp.nan)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        value, gate = jax.vmap(self.value)(x), jax.vmap(self.gate)(x)
        z = self.value_convolution(value, documents).astype(wide(x.dtype))
        gates = held(self._gates(self.gate_convolution(gate, documents)), hold)
        taps = held(self._taps(len(x)), hold)
        # Packed documents are convolved by matrices: rounding errors of Fourier transforms would leak across documents.
        if documents.ids is None:
            z, inputs = self._convolved(z, taps, gates)
        else:
            z, inputs = self._packed(z, taps, gates, documents), ()  # type: ignore[assignment]  # never decoded
        memory = Memory(
            inputs,
            self.value_convolution.memory_after(value, count),
            self.gate_convolution.memory_after(gate, count),
        )
        return self._out(z, documents.position, x.dtype), memory

    def _convolved(self, z: Float[Array, "T E"], taps: Array, gates: Float[Array, "N T E"]) -> tuple[Array, Array]:
        """The combined values of a single document by Fourier transforms, and the input of each long convolution."""
        T, inputs = len(z), []
        for h, gate in zip(jnp.fft.rfft(taps, 2 * T, axis=1), gates, strict=True):
            inputs.append(z)
            z = gate * jnp.fft.irfft(h * jnp.fft.rfft(z, 2 * T, axis=0), 2 * T, axis=0)[:T]
        return z, jnp.stack(inputs)

    def _packed(self, z: Float[Array, "T E"], taps: Array, gates: Array, documents: Documents) -> Float[Array, "T E"]:
        """The combined values of packed documents, by matrices."""

        @jax.checkpoint  # otherwise reverse mode would store a matrix for each channel
        def channel_values(channel: tuple[Array, Array, Array]) -> Array:
            taps, gates, z = channel
            for h, gate in zip(taps, gates, strict=True):
                z = gate * (_toeplitz(h, documents) @ z)
            return z

        return lax.map(channel_values, (*_by_channel(taps, gates), z.T)).T

    def _out(self, z: Float[Array, "T E"], positions: Int[Array, " T"], dtype: Any) -> Float[Array, "T D"]:
        return jnp.where((positions < self.max_length)[:, None], jax.vmap(self.out)(z.astype(dtype)), jnp.nan)

    def init_memory(self, length: int) -> Any:
        N, E = self.direct.shape[-2:]
        inputs = jnp.zeros((N, length, E), wide(self.direct.dtype))
        return Memory(inputs, self.value_convolution.init_memory(), self.gate_convolution.init_memory())

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        length = memory.inputs.shape[1]
        value_taps, z = self.value_convolution.step(memory.value_taps, self.value(x))
        gate_taps, gates = self.gate_convolution.step(memory.gate_taps, self.gate(x))
        # As the filters do not depend on the memory, XLA computes them once for all steps of a loop.
        taps = self._taps(length)
        lags = position - indices(length)
        past = jnp.einsum("nte,nte->ne", jnp.where((lags > 0)[None, :, None], taps[:, lags], 0), memory.inputs)
        z, inputs = z.astype(taps.dtype), []
        for n, gate in enumerate(self._gates(gates[None])[:, 0]):
            inputs.append(z)
            z = gate * (past[n] + taps[n, 0] * z)
        stored = memory.inputs.at[:, position].set(jnp.stack(inputs), mode="drop")
        return Memory(stored, value_taps, gate_taps), self._out(z[None], position[None], x.dtype)[0]


def _by_channel(*by_convolution: Float[Array, "N T E"]) -> tuple[Float[Array, "E N T"], ...]:
    return tuple(a.transpose(2, 0, 1) for a in by_convolution)


def _toeplitz(h: Float[Array, " T"], documents: Documents) -> Float[Array, "T T"]:
    """The matrix of a long convolution of one channel, zero between different documents."""
    index = indices(len(h))
    return jnp.where(documents.visible(index), h[index[:, None] - index[None]], 0)
