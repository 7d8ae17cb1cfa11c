"""What short causal convolutions share: a few taps for each channel, and what they do to a mixing matrix after them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import runs_and_positions
from jaxwalk.filters import Key, module


@module
class ShortConvolution(nnx.Module):
    """y_i = sum over n < taps of weight[n] x_(i-n), plus a bias, channel by channel, within a document.

    As in Mamba, Hyena and DeltaNet, where it comes before the values. weight[0] is of the position itself: the
    reverse of the order of PyTorch's causal Conv1d.
    """

    weight: Float[Array, "taps E"] = nnx.data()
    bias: Float[Array, " E"] | None = nnx.data()

    @staticmethod
    def init(channels: int, taps: int, *, bias: bool, key: Key) -> "ShortConvolution":
        """Uniform weights up to 1 / sqrt(taps), as PyTorch starts them; zero bias (or none)."""
        bound = taps**-0.5
        weight = jax.random.uniform(key, (taps, channels), jnp.float32, -bound, bound)
        return ShortConvolution(weight, jnp.zeros(channels, jnp.float32) if bias else None)

    def __call__(self, x: Float[Array, "T E"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T E"]:
        """All positions."""
        y = jnp.zeros_like(x)
        for n, tap in enumerate(self.weight[: len(x)]):
            y = y + tap[None] * shifted(x, n, segments)
        return y if self.bias is None else y + self.bias[None]

    def init_state(self) -> Float[Array, "past E"]:
        """The inputs before the first position: none, that is zeros."""
        return jnp.zeros((len(self.weight) - 1, self.weight.shape[1]), self.weight.dtype)

    def state_after(self, x: Float[Array, "P E"]) -> Float[Array, "past E"]:
        """The last inputs, latest first, that positions after a prefix still see."""
        return jnp.concatenate([x[::-1], self.init_state()])[: len(self.weight) - 1]

    def step(self, state: Float[Array, "past E"], x: Float[Array, " E"]) -> tuple[Array, Float[Array, " E"]]:
        """The next position."""
        seen = jnp.concatenate([x[None], state])
        y = jnp.sum(self.weight * seen, axis=0)
        return seen[:-1], y if self.bias is None else y + self.bias

    def through(self, A: Float[Array, "E R T"], segments: Int[Array, " T"] | None = None) -> Float[Array, "E R T"]:
        """A times this convolution's own matrix: how rows of A, channel by channel, combine what comes before it."""
        total = jnp.zeros_like(A)
        for n, tap in enumerate(self.weight[: A.shape[-1]].astype(A.dtype)):
            # What A makes of position j + n it makes, by tap n, of position j.
            total = total + tap[:, None, None] * moved_back(A, n, segments)
        return total


def shifted(x: Float[Array, "T E"], n: int, segments: Int[Array, " T"] | None = None) -> Float[Array, "T E"]:
    """x_(i-n) at position i; zero where that is before the start of its document."""
    past = jnp.pad(x, ((n, 0), (0, 0)))[: len(x)]
    return jnp.where((runs_and_positions(segments, len(x))[1] >= n)[:, None], past, 0)


def moved_back(A: Float[Array, "*G R T"], n: int, segments: Int[Array, " T"] | None = None) -> Float[Array, "*G R T"]:
    """A times the matrix of `shifted`: A_i(j+n) at (i, j); zero where j + n is of another document, or none."""
    T = A.shape[-1]
    ahead = jnp.pad(A, [(0, 0)] * (A.ndim - 1) + [(0, n)])[..., n:]
    inside = jnp.pad(runs_and_positions(segments, T)[1] >= n, (0, n))[n:]
    return jnp.where(inside, ahead, 0)
