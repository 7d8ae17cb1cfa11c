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
    """A long short-term memory and a linear map of its hidden state."""

    name: ClassVar[str] = "lstm"
    hidden: int | None = None
    """H, the width of the cell and of the hidden state. The default is the width of the model."""
    bias: bool = True
    """Without biases the forget gate has no initial bias of 1 either."""

    def check(self) -> Iterable[str]:
        if self.hidden is not None and self.hidden < 1:
            yield f"hidden: expected at least 1, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "LSTM":
        H = self.hidden or width
        key_input, key_recurrent, key_out = jax.random.split(key, 3)
        input = Linear.init(width, 4 * H, bias=False, key=key_input)
        # A forget-gate bias of 1 lets it remember before training (Gers et al.; Jozefowicz et al. 2015).
        bias = jnp.zeros((4, H), jnp.float32).at[1].set(1).reshape(-1) if self.bias else None
        return LSTM(
            input=Linear(input.weight, bias),
            recurrent=recurrent_weights(H, 4, bias=False, key=key_recurrent),
            out=Linear.init(H, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
        )


@module
class LSTM(RecurrentNetwork):
    """c_i = f_i c_(i-1) + in_i g_i, h_i = o_i tanh(c_i), where g = tanh(W x + b + U h) in, f, o = sigmoid(likewise).

    A_ij = o_i (tanh(c_i) / c_i) (f_i ... f_(j+1)) in_j in each channel and v_j = g_j. Kind of A: conditional. Held are
    the three gates and tanh(a) / a of cell and candidate. The "vanilla" cell of Greff et al. (arXiv 1503.04069)
    without its peepholes, as in PyTorch, whose two biases are one here, as they only occur as a sum.
    """

    memories: ClassVar[int] = 2

    def cell(
        self, memory: Float[Array, "2 H"], inputs: Float[Array, " E"], hold: bool
    ) -> tuple[Float[Array, "2 H"], Gates]:
        """in, f, g and o, in this order, as PyTorch has them. The memory is h and c."""
        h, c = memory
        i, f, g, o = jnp.split(inputs + self._from_hidden(h), 4)
        i, f, o = (held(jax.nn.sigmoid(a), hold) for a in (i, f, o))
        g = tanh(g, hold)
        c = f * c + i * g
        return jnp.stack([o * tanh(c, hold), c]), Gates(g, f, i, o * tanh_gate(c))
