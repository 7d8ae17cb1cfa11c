"""The channel-mixing of RWKV-4 (Peng et al., arXiv 2305.13048): a token shift, and a gated MLP of what it gives."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate
from jaxwalk.aggregates._convolution import moved_back, shifted
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, module


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The channel-mixing of RWKV-4. `rwkv4,rwkv4_channel_mix` without filters are the blocks of RWKV-4."""

    name: ClassVar[str] = "rwkv4_channel_mix"
    hidden: int | None = None
    """Width of the hidden layer; by default 4 x width."""

    def check(self) -> Iterable[str]:
        if self.hidden is not None and self.hidden < 1:
            yield f"hidden: expected at least 1, got {self.hidden}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "RWKV4ChannelMix":
        key_receptance, key_up, key_down = jax.random.split(key, 3)
        E = self.hidden or 4 * width
        share = (jnp.arange(width, dtype=jnp.float32) / width) ** (1 - layer / depth)
        return RWKV4ChannelMix(
            shares=jnp.stack([share, share]),
            receptance=Linear.init(width, width, bias=False, key=key_receptance),
            up=Linear.init(width, E, bias=False, key=key_up),
            down=Linear.init(E, width, bias=False, gain=1 / math.sqrt(2 * depth), key=key_down),
        )


class State(NamedTuple):
    """The input before."""

    before: Float[Array, " D"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class RWKV4ChannelMix(Aggregate):
    """sigmoid(receptance(r_i)) * down(relu(up(k_i))^2), r and k each the mix share * x_i + (1 - share) * x_(i-1).

    It looks back, by one position, and so it is an aggregate. Kind of A: exact. All that passes between positions is
    the token shift: G is the channels of r, then those of k, the values are the input itself, and A has a share on its
    diagonal and the rest of one before it, the same for all inputs. The MLP is the readout, position by position. Held,
    besides A, are sigmoid(receptance(r)) and the gate of the square, relu(up(k)).

    Shares start as in the paper, which starts the matrices of the receptance and `down` at zero: they start as
    elsewhere here.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    writes: ClassVar[frozenset[str]] = frozenset({"down"})

    shares: Float[Array, "2 D"] = nnx.data()
    """Of the position itself in the mix, for r and k."""
    receptance: Linear = nnx.data()
    up: Linear = nnx.data()
    """RWKV's key."""
    down: Linear = nnx.data()
    """RWKV's value."""

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T 1"]:
        return jnp.concatenate([x, x], axis=1).T[..., None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        own = jax.nn.one_hot(jnp.arange(len(x)) if rows is None else rows, len(x), dtype=self.shares.dtype)[None]
        share = self.shares.reshape(-1)[:, None, None]
        return share * own + (1 - share) * moved_back(own, 1, segments)

    def readout(self, y: Float[Array, "G R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        r, k = jnp.split(y[..., 0].T, 2, axis=1)
        receptance = jax.nn.sigmoid(jax.vmap(self.receptance)(r))
        up = jax.vmap(self.up)(k)
        return held(receptance, hold) * jax.vmap(self.down)(held(jax.nn.relu(up), hold) * up)

    def _shifted(self, x: Float[Array, "T D"], before: Float[Array, "T D"]) -> Float[Array, "T D"]:
        share = self.shares[:, None]
        mixed = share * x[None] + (1 - share) * before[None]
        return self.readout(mixed.transpose(0, 2, 1).reshape(-1, len(x), 1), x)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._shifted(x, shifted(x, 1, segments))

    def init_state(self, length: int) -> State:
        weight = self.receptance.weight
        return State(jnp.zeros(weight.shape[0], weight.dtype), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        return self(x), State(x[-1], jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        y, position = self._shifted(x[None], state.before[None])[0], state.position + 1
        return State(x, position, state.length), jnp.where(position <= state.length, y, jnp.nan)
