"""The time-mixing of RWKV-4 (Peng et al., arXiv 2305.13048): a decaying weighted average, gated by a receptance."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, last
from jaxwalk.aggregates._convolution import compose_shift, shifted
from jaxwalk.config import AggregateConfig
from jaxwalk.filters import Linear, held, indices, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The time-mixing of RWKV-4, with the width of the model."""

    name: ClassVar[str] = "rwkv4"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "RWKV4":
        keys = jax.random.split(key, 4)
        receptance, k, value = (Linear.init(width, width, bias=False, key=one) for one in keys[:3])
        layer_index = jnp.asarray(layer, jnp.float32)
        # The names of these two ratios are those of the authors' code.
        ratio_0_to_1, ratio_1_to_almost_0 = layer_index / max(depth - 1, 1), 1 - layer_index / depth
        channel = jnp.arange(width, dtype=jnp.float32)
        fraction = channel / width
        share = fraction**ratio_1_to_almost_0
        return RWKV4(
            shares=jnp.stack([fraction ** (0.5 * ratio_1_to_almost_0), share, share + 0.3 * ratio_0_to_1]),
            receptance=receptance,
            key=k,
            value=value,
            log_rate=-5 + 8 * (channel / max(width - 1, 1)) ** (0.7 + 1.3 * ratio_0_to_1),
            bonus=math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1),
            out=Linear.init(width, width, bias=False, gain=1 / math.sqrt(2 * depth), key=keys[3]),
        )


class Sums(NamedTuple):
    """Sums over positions, in log-sum-exp form.

    Attributes:
        max: the maximum of the weights w.
        numerator: the sum of exp(w - max) v.
        denominator: the sum of exp(w - max).
    """

    max: Float[Array, "*n D"]
    numerator: Float[Array, "*n D"]
    denominator: Float[Array, "*n D"]


class Memory(NamedTuple):
    """The previous input, and the sums in at least float32."""

    previous: Float[Array, " D"]
    sums: Sums


@module
class RWKV4(Aggregate):
    """out(sigmoid(r_i) * wkv_i), where wkv_i is a weighted average of v_j over j <= i in each channel.

    The weights are exp(k_j - (i - 1 - j) rate) for j < i, with rate = exp(log_rate), and exp(bonus + k_i) for j = i. r,
    k and v are linear in the token shift share * x_i + (1 - share) * x_(i-1), each with its own shares.

    Shares, decays and bonus are initialised as in the paper. The matrices of r, k and `out`, which the paper
    initialises to zero, are initialised like those of other aggregates. `rwkv4_channel_mix` is the channel-mixing that
    follows in a block of RWKV-4.

    Mixing matrix: exact, two per channel. The first, with values value(share * x_j), is sigmoid(r_i) times the
    normalised weights. The second, with values value((1 - share) * x_j), is the first times the shift by one position.
    The readout adds the two.
    Held coefficients: A.
    Memory: the previous input, and the sums over positions.
    """

    granularity = "channel"

    shares: Float[Array, "3 D"] = nnx.data()
    """The share of the current position in the token shift, for r, k and v."""
    receptance: Linear = nnx.data()
    key: Linear = nnx.data()
    value: Linear = nnx.data()
    log_rate: Float[Array, " D"] = nnx.data()
    bonus: Float[Array, " D"] = nnx.data()
    out: Linear = nnx.data()

    def _receptance_and_keys(self, x: Array, previous: Array) -> tuple[Array, Array]:
        share_r, share_k = self.shares[0][None], self.shares[1][None]
        r = jax.vmap(self.receptance)(share_r * x + (1 - share_r) * previous)
        k = jax.vmap(self.key)(share_k * x + (1 - share_k) * previous)
        return jax.nn.sigmoid(r.astype(wide(x.dtype))), k.astype(wide(x.dtype))

    def _shifted_values(self, x: Array, previous: Array) -> Array:
        share = self.shares[2][None]
        return jax.vmap(self.value)(share * x + (1 - share) * previous).astype(wide(x.dtype))

    def _rate_and_bonus(self) -> tuple[Array, Array]:
        dtype = wide(self.bonus.dtype)
        return jnp.exp(self.log_rate.astype(dtype)), self.bonus.astype(dtype)

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T 1"]:
        share = self.shares[2][None]
        current, previous = jax.vmap(self.value)(share * x), jax.vmap(self.value)((1 - share) * x)
        return jnp.concatenate([current, previous], axis=1).T[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        r, k = self._receptance_and_keys(x, shifted(x, 1, documents))
        rate, bonus = self._rate_and_bonus()
        age = (rows[:, None] - 1 - indices(len(x))[None, :]).astype(k.dtype)[None]  # -1 at the current position
        weights = k.T[:, None] + jnp.where(age < 0, bonus[:, None, None], -rate[:, None, None] * age)
        weights = jnp.where(documents.visible(rows)[None], weights, jnp.finfo(k.dtype).min)
        A = jax.nn.softmax(weights, axis=-1) * r[rows].T[..., None]
        return jnp.concatenate([A, compose_shift(A, 1, documents)])

    def readout(self, y: Float[Array, "G R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        current, previous = jnp.split(y[..., 0].T, 2, axis=1)
        return jax.vmap(self.out)(current + previous)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        previous = shifted(x, 1, documents)
        (r, k), v = held(self._receptance_and_keys(x, previous), hold), self._shifted_values(x, previous)
        rate, bonus = self._rate_and_bonus()
        first = documents.first[:, None]
        sums = cumulative_sums(jnp.where(first, -jnp.inf, -rate[None]), Sums(k, v, jnp.ones_like(k)))
        past = jax.tree.map(
            lambda a, empty: jnp.where(first, empty, jnp.concatenate([empty[:1], a[:-1]])), sums, empty_sums(k)
        )
        y = jax.vmap(self.out)((r * average(past, bonus[None] + k, v)).astype(x.dtype))
        return y, Memory(last(x, count), jax.tree.map(lambda a: last(a, count), sums))

    def init_memory(self, length: int) -> Any:
        previous = jnp.zeros_like(self.bonus)
        return Memory(previous, empty_sums(previous.astype(wide(previous.dtype))))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        current, previous = x[None], memory.previous[None]
        (r, k), v = self._receptance_and_keys(current, previous), self._shifted_values(current, previous)
        (r, k, v), (rate, bonus) = (r[0], k[0], v[0]), self._rate_and_bonus()
        y = self.out((r * average(memory.sums, bonus + k, v)).astype(x.dtype))
        return Memory(x, accumulate(memory.sums, -rate, Sums(k, v, jnp.ones_like(k)))), y


def empty_sums(like: Float[Array, "*n D"]) -> Sums:
    """The sums over no positions, with the shape and dtype of `like`."""
    return Sums(jnp.full_like(like, -jnp.inf), jnp.zeros_like(like), jnp.zeros_like(like))


def accumulate(sums: Sums, log_decay: Float[Array, "*n D"], terms: Sums) -> Sums:
    """`sums`, decayed, plus `terms`, relative to the larger of their maxima, so that no exponential overflows.

    The maximum cancels between numerator and denominator, so it needs no derivative.
    """
    decayed = sums.max + log_decay
    new_max = lax.stop_gradient(jnp.maximum(decayed, terms.max))
    old, new = jnp.exp(decayed - new_max), jnp.exp(terms.max - new_max)
    return Sums(
        new_max,
        old * sums.numerator + new * terms.numerator,
        old * sums.denominator + new * terms.denominator,
    )


def average(past: Sums, weight: Float[Array, "*n D"], v: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """The weighted average over the past and the current position, with its weight and value."""
    total = accumulate(past, jnp.zeros_like(weight), Sums(weight, v, jnp.ones_like(v)))
    return total.numerator / total.denominator


def cumulative_sums(log_decay: Float[Array, "T D"], terms: Sums) -> Sums:
    """The decayed sums up to each position, by a scan on CPU and an associative scan elsewhere."""

    def sequential(log_decay: Array, terms: Sums) -> Sums:
        def step(sums: Sums, position: tuple[Array, Sums]) -> tuple[Sums, Sums]:
            sums = accumulate(sums, *position)
            return sums, sums

        return lax.scan(step, empty_sums(terms.max[0]), (log_decay, terms))[1]

    def parallel(log_decay: Array, terms: Sums) -> Sums:
        def combine(first: tuple[Array, Sums], second: tuple[Array, Sums]) -> tuple[Array, Sums]:
            return first[0] + second[0], accumulate(first[1], *second)

        return lax.associative_scan(combine, (log_decay, terms))[1]

    return lax.platform_dependent(log_decay, terms, cpu=sequential, default=parallel)
