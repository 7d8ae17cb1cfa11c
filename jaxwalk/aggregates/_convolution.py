"""Short causal convolutions: a few taps per channel, and how they change a mixing matrix that comes after them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxwalk.aggregates._contract import Count, Segments, documents_of
from jaxwalk.filters import Key, indices, module


@module
class ShortConvolution(nnx.Module):
    """y_i = sum over n < taps of weight[n] x_(i-n), plus a bias, channel by channel, within a document.

    Mamba, Hyena and DeltaNet have it before the values. weight[0] belongs to the position itself, which reverses the
    order of PyTorch's causal Conv1d.
    """

    decays = frozenset({"weight"})

    weight: Float[Array, "taps E"] = nnx.data()
    bias: Float[Array, " E"] | None = nnx.data()

    @staticmethod
    def init(channels: int, taps: int, *, bias: bool, key: Key) -> "ShortConvolution":
        """Uniform weights up to 1 / sqrt(taps), PyTorch's default; a zero bias, or None."""
        bound = taps**-0.5
        weight = jax.random.uniform(key, (taps, channels), jnp.float32, -bound, bound)
        return ShortConvolution(weight, jnp.zeros(channels, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, "T E"], segments: Segments = None) -> Float[Array, "T E"]:
        """All positions."""
        y = jnp.zeros_like(x)
        for n, tap in enumerate(self.weight[: len(x)]):
            y = y + tap[None] * shifted(x, n, segments)
        return y if self.bias is None else y + self.bias[None]

    def init_memory(self) -> Float[Array, "past E"]:
        """The inputs before the first position: zeros."""
        return jnp.zeros((self.weight.shape[-2] - 1, self.weight.shape[-1]), self.weight.dtype)

    def memory_after(self, x: Float[Array, "T E"], count: Count = None) -> Float[Array, "past E"]:
        """The last of the first `count` inputs, latest first, that later positions still see."""
        ages = indices(self.weight.shape[-2] - 1)
        index = (len(x) if count is None else count) - 1 - ages
        return jnp.where((index >= 0)[:, None], x[jnp.maximum(index, 0)], 0)

    def step(self, memory: Float[Array, "past E"], x: Float[Array, " E"]) -> tuple[Array, Float[Array, " E"]]:
        """The next position: the memory after it, and its output."""
        seen = jnp.concatenate([x[None], memory])
        y = jnp.sum(self.weight * seen, axis=0)
        return seen[:-1], y if self.bias is None else y + self.bias

    def through(self, A: Float[Array, "E R T"], segments: Segments = None) -> Float[Array, "E R T"]:
        """A times the matrix of this convolution: how rows of A, channel by channel, combine the convolution's
        inputs."""
        total = jnp.zeros_like(A)
        for n, tap in enumerate(self.weight[: A.shape[-1]].astype(A.dtype)):
            # The weight of position j + n in A reaches input j through tap n.
            total = total + tap[:, None, None] * moved_back(A, n, segments)
        return total


def shifted(x: Float[Array, "T E"], n: int, segments: Segments = None) -> Float[Array, "T E"]:
    """x_(i-n) at position i; zero if that is before the start of the document."""
    past = jnp.pad(x, ((n, 0), (0, 0)))[: len(x)]
    return jnp.where((documents_of(segments, len(x)).position >= n)[:, None], past, 0)


def moved_back(A: Float[Array, "*G R T"], n: int, segments: Segments = None) -> Float[Array, "*G R T"]:
    """A times the matrix of `shifted`: A_i(j+n) at (i, j); zero if j + n is in another document or out of range."""
    T = A.shape[-1]
    ahead = jnp.pad(A, [(0, 0)] * (A.ndim - 1) + [(0, n)])[..., n:]
    inside = jnp.pad(documents_of(segments, T).position >= n, (0, n))[n:]
    return jnp.where(inside, ahead, 0)
