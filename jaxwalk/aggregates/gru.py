"""Gated recurrent unit (Cho et al., arXiv 1406.1078), in the form of PyTorch and cuDNN."""

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
    """A gated recurrent unit and a linear map of its hidden state."""

    name: ClassVar[str] = "gru"
    hidden: int | None = None
    """H, the width of the hidden state; the width of the model by default."""
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

    A_ij = (z_i ... z_(j+1)) (1 - z_j) in each channel and v_j = n_j. Kind of A: conditional. Held are r, z and
    tanh(a) / a of the candidate. The gate r multiplies U h + c where the paper has U (r * h): PyTorch's form, which
    has one product with h. z is the paper's, the share that is kept. As in the paper, recurrent matrices are
    initially orthogonal; the others, to which it gives a deviation of 0.01, are initialised as elsewhere here.
    """

    memories: ClassVar[int] = 1

    def cell(
        self, memory: Float[Array, "1 H"], inputs: Float[Array, " E"], hold: bool
    ) -> tuple[Float[Array, "1 H"], Gates]:
        """r, z and n, in this order, as PyTorch has them."""
        h = memory[0]
        (Wr, Wz, Wn), (Ur, Uz, Un) = jnp.split(inputs, 3), jnp.split(self._from_hidden(h), 3)
        r, z = held(jax.nn.sigmoid(Wr + Ur), hold), held(jax.nn.sigmoid(Wz + Uz), hold)
        n = tanh(Wn + r * Un, hold)
        return (z * h + (1 - z) * n)[None], Gates(n, z, 1 - z, jnp.ones_like(z))
