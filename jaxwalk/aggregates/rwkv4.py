"""The time-mixing of RWKV-4 (Peng et al., arXiv 2305.13048): an average that decays, gated by a receptance."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, last
from jaxwalk.aggregates._convolution import moved_back, shifted
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, indices, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The time-mixing of RWKV-4, as wide as the model."""

    name: ClassVar[str] = "rwkv4"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "RWKV4":
        keys = jax.random.split(key, 4)
        receptance, k, value = (Linear.init(width, width, bias=False, key=one) for one in keys[:3])
        number = jnp.asarray(layer, jnp.float32)
        deep, shallow = number / max(depth - 1, 1), 1 - number / depth
        channel = jnp.arange(width, dtype=jnp.float32)
        share = channel / width
        return RWKV4(
            shares=jnp.stack([share ** (0.5 * shallow), share**shallow, share**shallow + 0.3 * deep]),
            receptance=receptance,
            key=k,
            value=value,
            log_rate=-5 + 8 * (channel / max(width - 1, 1)) ** (0.7 + 1.3 * deep),
            bonus=math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1),
            out=Linear.init(width, width, bias=False, gain=1 / math.sqrt(2 * depth), key=keys[3]),
        )


class Sums(NamedTuple):
    """Sums over positions of exp(weight) v and of exp(weight), as exp(top) * numerator and exp(top) * denominator."""

    top: Float[Array, "*n D"]
    numerator: Float[Array, "*n D"]
    denominator: Float[Array, "*n D"]


class Memory(NamedTuple):
    """The previous input, and the sums in at least float32."""

    before: Float[Array, " D"]
    sums: Sums


@module
class RWKV4(Aggregate):
    """out(sigmoid(r_i) * wkv_i), where wkv_i is the average of v_j for j <= i, with separate weights per channel.

    The weights are exp(k_j - (i - 1 - j) rate) for j < i, rate = exp(log_rate), and exp(bonus + k_i) for i itself. r, k
    and v are linear in the mix share * x_i + (1 - share) * x_(i-1), each with its own shares ("token shift").

    Kind of A: exact. G is twice the channels: value(share * x_j), with A_ij = sigmoid(r_i) times the weight over the
    sum of weights, and value((1 - share) * x_j), with the same A moved back by a position. The readout adds the two.

    Shares, decays and bonus are initialised as in the paper, which initialises the matrices of r, k and `out` to zero;
    here they are initialised like all others. The channel-mixing, which follows in a block of RWKV-4, is
    `rwkv4_channel_mix`.
    """

    granularity = "channel"

    shares: Float[Array, "3 D"] = nnx.data()
    """The share of the position itself in the mix, for r, k and v."""
    receptance: Linear = nnx.data()
    key: Linear = nnx.data()
    value: Linear = nnx.data()
    log_rate: Float[Array, " D"] = nnx.data()
    bonus: Float[Array, " D"] = nnx.data()
    out: Linear = nnx.data()

    def _receptance_and_keys(self, x: Array, before: Array) -> tuple[Array, Array]:
        r, k = self.shares[0][None], self.shares[1][None]
        r = jax.vmap(self.receptance)(r * x + (1 - r) * before)
        k = jax.vmap(self.key)(k * x + (1 - k) * before)
        return jax.nn.sigmoid(r.astype(wide(x.dtype))), k.astype(wide(x.dtype))

    def _mixed_values(self, x: Array, before: Array) -> Array:
        share = self.shares[2][None]
        return jax.vmap(self.value)(share * x + (1 - share) * before).astype(wide(x.dtype))

    def _rate_and_bonus(self) -> tuple[Array, Array]:
        dtype = wide(self.bonus.dtype)
        return jnp.exp(self.log_rate.astype(dtype)), self.bonus.astype(dtype)

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T 1"]:
        share = self.shares[2][None]
        current, before = jax.vmap(self.value)(share * x), jax.vmap(self.value)((1 - share) * x)
        return jnp.concatenate([current, before], axis=1).T[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        r, k = self._receptance_and_keys(x, shifted(x, 1, documents))
        rate, bonus = self._rate_and_bonus()
        past = (rows[:, None] - 1 - indices(len(x))[None, :]).astype(k.dtype)[None]  # -1 at the position itself
        weights = k.T[:, None] + jnp.where(past < 0, bonus[:, None, None], -rate[:, None, None] * past)
        weights = jnp.where(documents.visible(rows)[None], weights, jnp.finfo(k.dtype).min)
        A = jax.nn.softmax(weights, axis=-1) * r[rows].T[..., None]
        return jnp.concatenate([A, moved_back(A, 1, documents)])

    def readout(self, y: Float[Array, "G R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        current, before = jnp.split(y[..., 0].T, 2, axis=1)
        return jax.vmap(self.out)(current + before)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        before = shifted(x, 1, documents)
        (r, k), v = held(self._receptance_and_keys(x, before), hold), self._mixed_values(x, before)
        rate, bonus = self._rate_and_bonus()
        first = documents.first[:, None]
        sums = running(jnp.where(first, -jnp.inf, -rate[None]), Sums(k, v, jnp.ones_like(k)))
        past = jax.tree.map(
            lambda a, zero: jnp.where(first, zero, jnp.concatenate([zero[:1], a[:-1]])), sums, nothing(k)
        )
        y = jax.vmap(self.out)((r * read(past, bonus[None] + k, v)).astype(x.dtype))
        return y, Memory(last(x, count), jax.tree.map(lambda a: last(a, count), sums))

    def init_memory(self, length: int) -> Any:
        before = jnp.zeros_like(self.bonus)
        return Memory(before, nothing(before.astype(wide(before.dtype))))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        current, before = x[None], memory.before[None]
        (r, k), v = self._receptance_and_keys(current, before), self._mixed_values(current, before)
        (r, k, v), (rate, bonus) = (r[0], k[0], v[0]), self._rate_and_bonus()
        y = self.out((r * read(memory.sums, bonus + k, v)).astype(x.dtype))
        return Memory(x, added(memory.sums, -rate, Sums(k, v, jnp.ones_like(k)))), y


def nothing(like: Float[Array, "*n D"]) -> Sums:
    """The sums over no positions."""
    return Sums(jnp.full_like(like, -jnp.inf), jnp.zeros_like(like), jnp.zeros_like(like))


def added(sums: Sums, log_decay: Float[Array, "*n D"], more: Sums) -> Sums:
    """`sums`, decayed, plus `more`, relative to the larger of their maxima, so that no exponential overflows.

    The maximum cancels between numerator and denominator, so it needs no derivative.
    """
    faded = sums.top + log_decay
    top = lax.stop_gradient(jnp.maximum(faded, more.top))
    old, new = jnp.exp(faded - top), jnp.exp(more.top - top)
    return Sums(
        top,
        old * sums.numerator + new * more.numerator,
        old * sums.denominator + new * more.denominator,
    )


def read(past: Sums, weight: Float[Array, "*n D"], v: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """The average over the past and the position itself."""
    total = added(past, jnp.zeros_like(weight), Sums(weight, v, jnp.ones_like(v)))
    return total.numerator / total.denominator


def running(log_decay: Float[Array, "T D"], each: Sums) -> Sums:
    """The sums up to each position: a scan on CPU, elsewhere an associative one."""

    def one_by_one(log_decay: Array, each: Sums) -> Sums:
        def step(sums: Sums, at: tuple[Array, Sums]) -> tuple[Sums, Sums]:
            sums = added(sums, *at)
            return sums, sums

        return lax.scan(step, nothing(each.top[0]), (log_decay, each))[1]

    def all_at_once(log_decay: Array, each: Sums) -> Sums:
        def join(first: tuple[Array, Sums], second: tuple[Array, Sums]) -> tuple[Array, Sums]:
            return first[0] + second[0], added(first[1], *second)

        return lax.associative_scan(join, (log_decay, each))[1]

    return lax.platform_dependent(log_decay, each, cpu=one_by_one, default=all_at_once)
