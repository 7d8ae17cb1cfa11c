"""Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers et al. 2000)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxwalk.aggregates._recurrent import Gates, RecurrentNetwork, recurrent_weights, tanh
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, module, tanh_gate


@dataclass(frozen=True)
class Config(AggregateConfig):
    """A long short-term memory, followed by a linear map of its hidden state."""

    name: ClassVar[str] = "lstm"
    hidden: int | None = None
    """H, the width of the cell state and of the hidden state; by default the width of the model."""
    bias: bool = True
    """Whether there are biases, including the initial bias of 1 of the forget gate."""

    def check(self) -> Iterable[str]:
        if self.hidden is not None and self.hidden < 1:
            yield f"hidden: expected at least 1, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "LSTM":
        H = self.hidden or width
        key_input, key_recurrent, key_out = jax.random.split(key, 3)
        input = Linear.init(width, 4 * H, bias=False, key=key_input)
        # A forget-gate bias of 1 makes the initial cell retain its state (Gers et al. 2000; Jozefowicz et al. 2015).
        bias = jnp.zeros((4, H), jnp.float32).at[1].set(1).reshape(-1) if self.bias else None
        return LSTM(
            input=Linear(input.weight, bias),
            recurrent=recurrent_weights(H, 4, bias=False, key=key_recurrent),
            out=Linear.init(H, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class LSTM(RecurrentNetwork):
    """c_i = f_i c_(i-1) + in_i g_i, h_i = o_i tanh(c_i), with g = tanh(W x + b + U h).

    The gates in, f and o are sigmoids of arguments of the same form. This is the "vanilla" LSTM of Greff et al. (arXiv
    1503.04069) without peepholes, as in PyTorch, except that PyTorch's two biases, which only occur as a sum, are one.

    Mixing matrix: conditional, A_ij = o_i (tanh(c_i) / c_i) (f_i ... f_(j+1)) in_j in each channel, with v_j = g_j.
    Held coefficients: the three gates, and tanh(a) / a of the cell state and of the candidate.
    Memory: h and c.
    """

    memories: ClassVar[int] = 2

    def cell(
        self, memory: Float[Array, "2 H"], inputs: Float[Array, " E"], hold: bool
    ) -> tuple[Float[Array, "2 H"], Gates]:
        """The order of the gates is that of PyTorch: in, f, g, o. The memory is h, then c."""
        h, c = memory
        i, f, g, o = jnp.split(inputs + self._from_hidden(h), 4)
        i, f, o = (held(jax.nn.sigmoid(a), hold) for a in (i, f, o))
        g = tanh(g, hold)
        c = f * c + i * g
        return jnp.stack([o * tanh(c, hold), c]), Gates(g, f, i, o * tanh_gate(c))
