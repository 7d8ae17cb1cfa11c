"""Hyena (Poli et al., arXiv 2302.10866): long convolutions, by filters that a network makes, and gates."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, runs_and_positions
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Key, Linear, module, stream, wide

DECAYED = 0.01  # what windows decay to, at these shares of the longest lag: the slowest channel's and the fastest's
SLOWEST, FASTEST = 1.5, 0.3


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The Hyena operator."""

    name: ClassVar[str] = "hyena"
    order: int = 2
    """How many long convolutions, each with a gate after it."""
    taps: int = 3
    """Of the short convolutions of values and gates."""
    filter_width: int = 64
    """The hidden width of the network that makes the filters."""
    bands: int = 16
    """How many cosines, and sines, of the lag it is given, beside the lag itself."""
    frequency: float = 14.0
    """omega, how quickly the filters vary with the lag as they start."""
    bias: bool = True
    """Of the maps in and out."""

    def check(self) -> Iterable[str]:
        for what in ("order", "taps", "filter_width", "bands"):
            if getattr(self, what) < 1:
                yield f"{what}: expected at least 1, got {getattr(self, what)}"
        if not 0 < self.frequency < math.inf:
            yield f"frequency: expected a positive number, got {self.frequency}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "Hyena":
        N, E = self.order, width
        key_value, key_gate, key_short, key_shorter, key_filters, key_direct, key_out = jax.random.split(key, 7)
        return Hyena(
            value=Linear.init(width, E, bias=self.bias, key=key_value),
            gate=Linear.init(width, N * E, bias=self.bias, key=key_gate),
            value_convolution=ShortConvolution.init(E, self.taps, bias=False, key=key_short),
            gate_convolution=ShortConvolution.init(N * E, self.taps, bias=False, key=key_shorter),
            filters=Filters.init(N, E, max_length, self, key=key_filters),
            direct=jax.random.normal(key_direct, (N, E), jnp.float32),
            out=Linear.init(E, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            max_length=max_length,
        )


@module
class Filters(nnx.Module):
    """h_n(lag) = window(lag) * network(lag), for each of N convolutions and E channels.

    The network is an MLP, whose activation is the sine, of the lag, as a share of the longest one, and of cosines and
    sines of it. The window decays exponentially, at a rate of each channel's own. Rates and features are fixed.
    """

    layers: tuple[Linear, ...] = nnx.data()
    order: int
    max_length: int
    bands: int

    @staticmethod
    def init(order: int, channels: int, max_length: int, config: Config, *, key: Key) -> "Filters":
        """Uniform weights, as in SIREN (Sitzmann et al., arXiv 2006.09661), and biases; the last layer has no bias.

        The paper has sin(omega a) throughout. Here omega is in the first layer's weights, as they start: filters vary
        as quickly, but what rounds a weight is not amplified by omega in each layer, which bfloat16 could not bear.

        The last layer is scaled so that a filter starts with an energy of about one, however many lags there are. As
        released, the energy grows with their number, and the output with its root to the power of the order.
        """
        widths = [1 + 2 * config.bands, *[config.filter_width] * 3, order * channels]
        bounds = [config.frequency, math.sqrt(6), math.sqrt(6), math.sqrt(6)]
        layers: list[Linear] = []
        for n, m, bound in zip(widths[:-1], widths[1:], bounds, strict=True):
            both = jax.random.uniform(stream(key, f"{len(layers)}"), (n + 1, m), jnp.float32, -bound, bound)
            layers.append(Linear(both[:-1] / math.sqrt(n), both[-1] / math.sqrt(n)))
        # With these weights, of variance 2 / n, and sines, of mean square 1/2, what the network gives has variance 1.
        energy = jnp.sum(_window(channels, max_length, max_length, jnp.float32) ** 2, axis=0)
        last = layers[-1].weight.reshape(-1, order, channels) * lax.rsqrt(energy)[None, None]
        layers[-1] = Linear(last.reshape(-1, order * channels), None)
        return Filters(tuple(layers), order, max_length, config.bands)

    def __call__(self, length: int) -> Float[Array, "N length E"]:
        """At lags below `length`, in at least float32."""
        dtype = wide(self.layers[0].weight.dtype)
        share = jnp.arange(length, dtype=dtype) / max(self.max_length - 1, 1)
        turns = 2 * math.pi / self.max_length * jnp.arange(length, dtype=dtype)
        angles = turns[:, None] * jnp.linspace(1e-4, self.bands - 1, self.bands, dtype=dtype)[None]
        h = jnp.concatenate([share[:, None], jnp.cos(angles), -jnp.sin(angles)], axis=1)
        *inner, last = jax.tree.map(lambda a: a.astype(dtype), self.layers)
        for layer in inner:
            h = jnp.sin(jax.vmap(layer)(h))
        h = jax.vmap(last)(h).reshape(length, self.order, -1).swapaxes(0, 1)
        return h * _window(h.shape[-1], length, self.max_length, dtype)[None]


def _window(channels: int, length: int, max_length: int, dtype: Any) -> Float[Array, "length E"]:
    share = jnp.arange(length, dtype=dtype) / max(max_length - 1, 1)
    rates = jnp.linspace(1 / SLOWEST, 1 / FASTEST, channels, dtype=dtype) * math.log(1 / DECAYED)
    return jnp.exp(-share[:, None] * rates[None])


class State(NamedTuple):
    """What was given to each long convolution, in at least float32, and what the short ones still see."""

    inputs: Float[Array, "N length E"]
    value_taps: Float[Array, "past E"]
    gate_taps: Float[Array, "past F"]
    position: Int[Array, ""]


@module
class Hyena(Aggregate):
    """z_1 = C value(x), z_(n+1) = x_n * (H_n z_n), y = out(z_(N+1)), for n up to the order N, channel by channel.

    C is the matrix of a short convolution, x_n a short convolution of a linear map, and H_n the lower-triangular matrix
    of a long convolution: h_n(i - j), and on the diagonal `direct` too. Kind of A: exact, with the values value(x) and
    A = diag(x_N) H_N .. diag(x_1) H_1 C. All gates are in A, as they look at the positions before. G is the channels.
    Nothing is held but A.

    Lags are counted in shares of `max_length`, and positions in each document; beyond `max_length` they give NaN. The
    released code leaves out H_1, and so has one long convolution less; it adds biases to the short convolutions, which
    would be values of their own here; and it learns features and omega.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"value", "gate"})

    value: Linear = nnx.data()
    gate: Linear = nnx.data()
    """x_1, then x_2, ..."""
    value_convolution: ShortConvolution = nnx.data()
    gate_convolution: ShortConvolution = nnx.data()
    filters: Filters = nnx.data()
    direct: Float[Array, "N E"] = nnx.data()
    out: Linear = nnx.data()
    max_length: int

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "E T 1"]:
        return jax.vmap(self.value)(x).T[:, :, None]

    def readout(self, y: Float[Array, "E T 1"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(y[:, :, 0].T)

    def _gates(self, gates: Float[Array, "T F"]) -> Float[Array, "N T E"]:
        return gates.reshape(len(gates), len(self.direct), -1).swapaxes(0, 1).astype(wide(gates.dtype))

    def _taps(self, length: int) -> Float[Array, "N length E"]:
        """The first column of each H, of as many lags."""
        return self.filters(length).at[:, 0].add(self.direct.astype(wide(self.direct.dtype)))

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "E R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        runs, positions = runs_and_positions(segments, len(x))
        gates = self._gates(self.gate_convolution(jax.vmap(self.gate)(x), segments))

        def channel(at: tuple[Array, Array]) -> Array:
            # From the left, so that no more than one long matrix is there at a time.
            taps, gates = at
            A = (rows[:, None] == jnp.arange(len(x))[None]).astype(gates.dtype)
            for h, gate in zip(taps[::-1], gates[::-1], strict=True):
                A = (A * gate[None]) @ _toeplitz(h, runs)
            return A

        A = lax.map(channel, _by_channel(self._taps(len(x)), gates))
        A = self.value_convolution.through(A, segments)
        return jnp.where((positions[rows] < self.max_length)[None, :, None], A, jnp.nan)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        if segments is None:
            return self._parallel(x)[0]
        # Fourier transforms would leak, by rounding, from one document into the next.
        runs, positions = runs_and_positions(segments, len(x))
        z = self.value_convolution(jax.vmap(self.value)(x), segments).astype(wide(x.dtype))
        gates = self._gates(self.gate_convolution(jax.vmap(self.gate)(x), segments))

        @jax.checkpoint  # else reverse mode would keep a matrix for each channel
        def channel(at: tuple[Array, Array, Array]) -> Array:
            taps, gates, z = at
            for h, gate in zip(taps, gates, strict=True):
                z = gate * (_toeplitz(h, runs) @ z)
            return z

        z = lax.map(channel, (*_by_channel(self._taps(len(x)), gates), z.T)).T
        return self._out(z, positions, x.dtype)

    def _out(self, z: Float[Array, "T E"], positions: Int[Array, " T"], dtype: Any) -> Float[Array, "T D"]:
        return jnp.where((positions < self.max_length)[:, None], jax.vmap(self.out)(z.astype(dtype)), jnp.nan)

    def _parallel(self, x: Float[Array, "T D"]) -> tuple[Array, State]:
        """All positions of one document by Fourier transforms, and the state after them."""
        T = len(x)
        value, gate = jax.vmap(self.value)(x), jax.vmap(self.gate)(x)
        z = self.value_convolution(value).astype(wide(x.dtype))
        taps = jnp.fft.rfft(self._taps(T), 2 * T, axis=1)
        inputs = []
        for h, x_n in zip(taps, self._gates(self.gate_convolution(gate)), strict=True):
            inputs.append(z)
            z = x_n * jnp.fft.irfft(h * jnp.fft.rfft(z, 2 * T, axis=0), 2 * T, axis=0)[:T]
        state = State(
            jnp.stack(inputs),
            self.value_convolution.state_after(value),
            self.gate_convolution.state_after(gate),
            jnp.array(T),
        )
        return self._out(z, jnp.arange(T), x.dtype), state

    def init_state(self, length: int) -> State:
        shape = (len(self.direct), length, self.direct.shape[1])
        inputs = jnp.zeros(shape, wide(self.direct.dtype))
        return State(inputs, self.value_convolution.init_state(), self.gate_convolution.init_state(), jnp.array(0))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, state = self._parallel(x)
        inputs = self.init_state(length).inputs.at[:, : len(x)].set(state.inputs)
        return y, state._replace(inputs=inputs)

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        position, length = state.position, state.inputs.shape[1]
        value_taps, z = self.value_convolution.step(state.value_taps, self.value(x))
        gate_taps, gates = self.gate_convolution.step(state.gate_taps, self.gate(x))
        # The filters do not depend on the state: a compiler makes them once for all steps.
        taps = self._taps(length)
        lags = position - jnp.arange(length)
        before = jnp.where((lags > 0)[None, :, None], taps[:, lags], 0)
        before, z, given = jnp.einsum("nte,nte->ne", before, state.inputs), z.astype(taps.dtype), []
        for n, gate in enumerate(self._gates(gates[None])[:, 0]):
            given.append(z)
            z = gate * (before[n] + taps[n, 0] * z)
        inputs = state.inputs.at[:, position].set(jnp.stack(given), mode="drop")
        y = self._out(z[None], position[None], x.dtype)[0]
        return State(inputs, value_taps, gate_taps, position + 1), jnp.where(position < length, y, jnp.nan)


def _by_channel(*by_convolution: Float[Array, "N T E"]) -> tuple[Float[Array, "E N T"], ...]:
    return tuple(a.transpose(2, 0, 1) for a in by_convolution)


def _toeplitz(h: Float[Array, " T"], runs: Int[Array, " T"]) -> Float[Array, "T T"]:
    """The matrix of a long convolution of one channel, within documents."""
    index = jnp.arange(len(h))
    lags = index[:, None] - index[None]
    return jnp.where(causal_mask(index, index, runs), h[lags], 0)
