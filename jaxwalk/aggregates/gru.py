"""The gated recurrent unit (Cho et al., arXiv 1406.1078), in the form used by PyTorch and cuDNN."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwalk.aggregates._recurrent import Gates, RecurrentNetwork, recurrent_weights, tanh
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, module


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A gated recurrent unit, followed by a linear map of its hidden state."""

    name: ClassVar[str] = "gru"
    hidden: int | None = None
    """H, the width of the hidden state; by default the width of the model."""
    bias: bool = True

    def check(self) -> Iterable[str]:
        if self.hidden is not None and self.hidden < 1:
            yield f"hidden: expected at least 1, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "GRU":
        H = self.hidden or width
        key_input, key_recurrent, key_out = jax.random.split(key, 3)
        return GRU(
            input=Linear.init(width, 3 * H, bias=self.bias, key=key_input),
            recurrent=recurrent_weights(H, 3, bias=self.bias, key=key_recurrent),
            out=Linear.init(H, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class GRU(RecurrentNetwork):
    """h_i = z_i h_(i-1) + (1 - z_i) n_i, n = tanh(W x + b + r * (U h + c)), r and z = sigmoid(W' x + b' + U' h + c').

    As in PyTorch, r multiplies U h + c, which needs only one product with h; in the paper it multiplies h. As in the
    paper, z is the fraction of h that is kept, and recurrent matrices are initially orthogonal. The other matrices,
    which the paper initialises with a standard deviation of 0.01, are initialised like those of other aggregates.

    Mixing matrix: conditional, A_ij = (z_i ... z_(j+1)) (1 - z_j) in each channel, with v_j = n_j.
    Held coefficients: r, z, and tanh(a) / a of the candidate.
    Memory: h.
    """

    memories: ClassVar[int] = 1

    def cell(
        self, memory: Float[Array, "1 H"], inputs: Float[Array, " E"], hold: bool
    ) -> tuple[Float[Array, "1 H"], Gates]:
        """The order of the gates is that of PyTorch: r, z, n."""
        h = memory[0]
        (Wr, Wz, Wn), (Ur, Uz, Un) = jnp.split(inputs, 3), jnp.split(self._from_hidden(h), 3)
        r, z = held(jax.nn.sigmoid(Wr + Ur), hold), held(jax.nn.sigmoid(Wz + Uz), hold)
        n = tanh(Wn + r * Un, hold)
        return (z * h + (1 - z) * n)[None], Gates(n, z, 1 - z, jnp.ones_like(z))
