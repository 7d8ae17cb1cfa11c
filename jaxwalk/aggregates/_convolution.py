"""Short causal convolutions, with a few taps per channel, and their composition with a mixing matrix that follows."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxwalk.aggregates._contract import Count, Segments, documents_of
from jaxwalk.filters import Key, indices, module


@module
class ShortConvolution(nnx.Module):
    """y_i = sum over n < taps of weight[n] x_(i-n), plus a bias, in each channel and within a document.

    Mamba, Hyena and DeltaNet apply it before the recurrence. weight[0] belongs to the position itself: the reverse of
    the order in PyTorch's causal Conv1d.
    """

    decays = frozenset({"weight"})

    weight: Float[Array, "taps E"] = nnx.data()
    bias: Float[Array, " E"] | None = nnx.data()

    @staticmethod
    def init(channels: int, taps: int, *, bias: bool, key: Key) -> "ShortConvolution":
        """Uniform weights between -1 / sqrt(taps) and 1 / sqrt(taps), PyTorch's default; a zero bias if `bias`."""
        bound = taps**-0.5
        weight = jax.random.uniform(key, (taps, channels), jnp.float32, -bound, bound)
        return ShortConvolution(weight, jnp.zeros(channels, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, "T E"], segments: Segments = None) -> Float[Array, "T E"]:
        """The outputs of all positions."""
        y = jnp.zeros_like(x)
        for n, tap in enumerate(self.weight[: len(x)]):
            y = y + tap[None] * shifted(x, n, segments)
        return y if self.bias is None else y + self.bias[None]

    def init_memory(self) -> Float[Array, "past E"]:
        """The memory before the first position: inputs of zero."""
        return jnp.zeros((self.weight.shape[-2] - 1, self.weight.shape[-1]), self.weight.dtype)

    def memory_after(self, x: Float[Array, "T E"], count: Count = None) -> Float[Array, "past E"]:
        """The inputs before the padding that later positions depend on, latest first."""
        lags = indices(self.weight.shape[-2] - 1)
        index = (len(x) if count is None else count) - 1 - lags
        return jnp.where((index >= 0)[:, None], x[jnp.maximum(index, 0)], 0)

    def step(self, memory: Float[Array, "past E"], x: Float[Array, " E"]) -> tuple[Array, Float[Array, " E"]]:
        """The memory after the next position, and its output."""
        window = jnp.concatenate([x[None], memory])
        y = jnp.sum(self.weight * window, axis=0)
        return window[:-1], y if self.bias is None else y + self.bias

    def compose(self, A: Float[Array, "E R T"], segments: Segments = None) -> Float[Array, "E R T"]:
        """A times the matrix of this convolution, in each channel: the same mixing of the convolution's inputs."""
        total = jnp.zeros_like(A)
        for n, tap in enumerate(self.weight[: A.shape[-1]].astype(A.dtype)):
            # A weight on position j + n is, through tap n, a weight on input j.
            total = total + tap[:, None, None] * compose_shift(A, n, segments)
        return total


def shifted(x: Float[Array, "T E"], n: int, segments: Segments = None) -> Float[Array, "T E"]:
    """x delayed by n positions: x_(i-n) at position i, or zero if that is before the start of the document."""
    past = jnp.pad(x, ((n, 0), (0, 0)))[: len(x)]
    return jnp.where((documents_of(segments, len(x)).position >= n)[:, None], past, 0)


def compose_shift(A: Float[Array, "*G R T"], n: int, segments: Segments = None) -> Float[Array, "*G R T"]:
    """A times the matrix of `shifted`: A_i(j+n) at (i, j), or zero if j + n is out of range or in another document."""
    T = A.shape[-1]
    ahead = jnp.pad(A, [(0, 0)] * (A.ndim - 1) + [(0, n)])[..., n:]
    inside = jnp.pad(documents_of(segments, T).position >= n, (0, n))[n:]
    return jnp.where(inside, ahead, 0)
