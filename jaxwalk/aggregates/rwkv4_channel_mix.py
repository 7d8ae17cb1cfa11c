"""The channel-mixing of RWKV-4 (Peng et al., arXiv 2305.13048): a token shift, then a gated MLP."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, last
from jaxwalk.aggregates._convolution import compose_shift, shifted
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, module


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The channel-mixing of RWKV-4. Alternating layers `rwkv4,rwkv4_channel_mix` without filters are its blocks."""

    name: ClassVar[str] = "rwkv4_channel_mix"
    hidden: int | None = None
    """Width of the hidden layer; by default 4 x width."""

    def check(self) -> Iterable[str]:
        if self.hidden is not None and self.hidden < 1:
            yield f"hidden: expected at least 1, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "RWKV4ChannelMix":
        key_receptance, key_up, key_down = jax.random.split(key, 3)
        E = self.hidden or 4 * width
        ratio_1_to_almost_0 = 1 - jnp.asarray(layer, jnp.float32) / depth
        share = (jnp.arange(width, dtype=jnp.float32) / width) ** ratio_1_to_almost_0
        return RWKV4ChannelMix(
            shares=jnp.stack([share, share]),
            receptance=Linear.init(width, width, bias=False, key=key_receptance),
            up=Linear.init(width, E, bias=False, key=key_up),
            down=Linear.init(E, width, bias=False, gain=1 / math.sqrt(2 * depth), key=key_down),
        )


@module
class RWKV4ChannelMix(Aggregate):
    """sigmoid(receptance(r_i)) * down(relu(up(k_i))^2).

    r and k are token shifts share * x_i + (1 - share) * x_(i-1), each with its own shares. As it depends on the
    previous position, it is an aggregate rather than a filter. The MLP is its readout.

    Shares are initialised as in the paper. The matrices of the receptance and `down`, which the paper initialises to
    zero, are initialised like those of other aggregates.

    Mixing matrix: exact, one per channel of r and then of k, the same for all inputs. The values are the inputs; A has
    the share on its diagonal and 1 - share below it.
    Held coefficients: sigmoid(receptance(r)), and relu(up(k)) as the gate of the square.
    Memory: the previous input.
    """

    granularity = "channel"
    writes = frozenset({"down"})

    shares: Float[Array, "2 D"] = nnx.data()
    """The share of the current position in the token shift, for r and k."""
    receptance: Linear = nnx.data()
    up: Linear = nnx.data()
    """The key of RWKV."""
    down: Linear = nnx.data()
    """The value of RWKV."""

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T 1"]:
        return jnp.concatenate([x, x], axis=1).T[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        identity = jax.nn.one_hot(rows, len(x), dtype=self.shares.dtype)[None]
        share = self.shares.reshape(-1)[:, None, None]
        return share * identity + (1 - share) * compose_shift(identity, 1, documents)

    def readout(self, y: Float[Array, "G R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        r, k = jnp.split(y[..., 0].T, 2, axis=1)
        receptance = jax.nn.sigmoid(jax.vmap(self.receptance)(r))
        up = jax.vmap(self.up)(k)
        return held(receptance, hold) * jax.vmap(self.down)(held(jax.nn.relu(up), hold) * up)

    def _output(self, x: Float[Array, "T D"], previous: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        share = self.shares[:, None]
        mixed = share * x[None] + (1 - share) * previous[None]
        return self.readout(mixed.transpose(0, 2, 1).reshape(-1, len(x), 1), x, hold=hold)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        return self._output(x, shifted(x, 1, documents), hold), last(x, count)

    def init_memory(self, length: int) -> Any:
        return jnp.zeros(self.receptance.weight.shape[-2], self.receptance.weight.dtype)

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        return x, self._output(x[None], memory[None])[0]
