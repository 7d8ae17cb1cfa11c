"""Softmax attention (Vaswani et al., arXiv 1706.03762), multi-head or grouped-query (Ainslie et al., 2305.13245)."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, causal_mask, put, runs_and_positions
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, RMSNorm, module, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """Attention. Positions may enter here (RoPE, ALiBi), or at the embedding (`ModelConfig.positions`)."""

    name: ClassVar[str] = "attention"
    heads: int = 4
    kv_heads: int | None = None
    """Heads of keys and values, each shared by heads / kv_heads query heads; by default as many as `heads`."""
    head_width: int | None = None
    """By default width / heads."""
    positions: Literal["none", "rope", "alibi"] = "none"
    rope_theta: float = 10000.0
    window: int | None = None
    """A position sees itself and the window - 1 before it; by default all before it."""
    qk_norm: bool = False
    """RMS-normalise queries and keys, per head (Henry et al., arXiv 2010.04245)."""
    bias: bool = True
    kernel: Literal["plain", "xla", "cudnn"] = "plain"
    """Plain, or `jax.nn.dot_product_attention` with that implementation (float32 and narrower only)."""

    def check(self) -> Iterable[str]:
        for what in ("heads", "kv_heads", "head_width", "window"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"
        if self.kv_heads and self.heads > 0 and self.heads % self.kv_heads:
            yield f"kv_heads: expected a divisor of heads = {self.heads}, got {self.kv_heads}"
        if self.positions == "rope" and self.head_width and self.head_width % 2:
            yield f"head_width: expected an even number with RoPE, got {self.head_width}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "Attention":
        if self.head_width is None and width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width} (or head_width given), got {self.heads}.")
        K = self.head_width or width // self.heads
        if self.positions == "rope" and K % 2:
            raise ConfigError(f"width: expected an even head width with RoPE, got width / heads = {K}.")
        kv_heads = self.kv_heads or self.heads
        key_qkv, key_out = jax.random.split(key)
        return Attention(
            qkv=Linear.init(width, (self.heads + 2 * kv_heads) * K, bias=self.bias, key=key_qkv),
            out=Linear.init(self.heads * K, width, bias=self.bias, gain=1 / math.sqrt(2 * depth), key=key_out),
            q_norm=RMSNorm.init(K) if self.qk_norm else None,
            k_norm=RMSNorm.init(K) if self.qk_norm else None,
            heads=self.heads,
            kv_heads=kv_heads,
            positions=self.positions,
            rope_theta=self.rope_theta,
            window=self.window,
            kernel=self.kernel,
        )


class State(NamedTuple):
    """Keys and values of the positions seen, in a ring of the window's size where there is a window."""

    keys: Float[Array, "G N K"]
    values: Float[Array, "G N K"]
    seen: Int[Array, " N"]
    """The position in each slot, -1 if none."""
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class Attention(Aggregate):
    """A = softmax over j <= i of q_i . k_j / sqrt(K); G is the query heads. Kind of A: exact.

    Keys and values of a group are shared by its query heads, in order: head h uses group h // (heads / kv_heads).
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "head"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"

    qkv: Linear = nnx.data()
    """Queries, keys and values of all heads, in this order, from one matrix."""
    out: Linear = nnx.data()
    q_norm: RMSNorm | None = nnx.data()
    k_norm: RMSNorm | None = nnx.data()
    heads: int
    kv_heads: int
    positions: Literal["none", "rope", "alibi"]
    rope_theta: float
    window: int | None
    kernel: Literal["plain", "xla", "cudnn"]

    @property
    def head_width(self) -> int:
        """K."""
        return self.out.weight.shape[-2] // self.heads

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries [H, T, K], keys [kv, T, K], values [kv, T, K] of x [T, D] at `positions` [T]."""
        H, N, K = self.heads, self.kv_heads, self.head_width
        parts = jnp.split(jax.vmap(self.qkv)(x), (H * K, (H + N) * K), axis=-1)
        q, k, v = (part.reshape(len(x), -1, K).transpose(1, 0, 2) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = jax.vmap(jax.vmap(self.q_norm))(q), jax.vmap(jax.vmap(self.k_norm))(k)
        if self.positions == "rope":
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        return q, k, v

    def _weights(self, q: Array, k: Array, rows: Array, columns: Array, allowed: Array) -> Array:
        """A [H, R, C] for queries [H, R, K] at positions `rows` and keys [kv, C, K] at positions `columns`."""
        q = (q / math.sqrt(self.head_width)).reshape(self.kv_heads, -1, self.head_width)
        scores = jnp.einsum("grk,gck->grc", q, k, preferred_element_type=wide(q.dtype))
        scores = scores.reshape(self.heads, len(rows), len(columns))
        if self.positions == "alibi":
            scores = scores + alibi(self.heads, rows, columns, scores.dtype)
        # A finite floor, as a row of a state may have nothing to see, and -inf - -inf is NaN in the gradient.
        return jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min), axis=-1)

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        first = (self.heads + self.kv_heads) * self.head_width
        bias = None if self.qkv.bias is None else self.qkv.bias[first:]
        v = jax.vmap(Linear(self.qkv.weight[:, first:], bias))(x)
        v = v.reshape(len(x), self.kv_heads, self.head_width).transpose(1, 0, 2)
        return jnp.repeat(v, self.heads // self.kv_heads, axis=0)

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        runs, positions = runs_and_positions(segments, len(x))
        q, k, _ = self._project(x, positions)
        columns = jnp.arange(len(x))
        rows = columns if rows is None else rows
        return self._weights(q[:, rows], k, rows, columns, causal_mask(rows, columns, runs, self.window))

    def readout(self, y: Float[Array, "G T K"], x: Float[Array, "T D"], *, hold: bool = False) -> Float[Array, "T D"]:
        return jax.vmap(self.out)(y.transpose(1, 0, 2).reshape(y.shape[1], -1))

    def _combine(self, A: Array, v: Array) -> Array:
        """A [H, R, C] times the values [kv, C, K] of each head's group: [H, R, K]."""
        grouped = A.astype(v.dtype).reshape(self.kv_heads, -1, A.shape[-1])
        return (grouped @ v).reshape(self.heads, -1, self.head_width)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._parallel(x, segments)[0]

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Array, Array]:
        T = len(x)
        runs, positions = runs_and_positions(segments, T)
        q, k, v = self._project(x, positions)
        index = jnp.arange(T)
        borders = None if segments is None else runs
        if self.kernel != "plain" and x.dtype != jnp.float64:
            y = self._fused(q, k, v, index, causal_mask(index, index, borders, self.window))
        else:
            # In two blocks of queries, the first never touches the keys of the second: a quarter of the work less.
            ends = (T,) if T < 128 else (T // 2, T)
            blocks = []
            for start, end in zip((0, *ends), ends, strict=False):
                rows, columns = index[start:end], index[:end]
                allowed = causal_mask(rows, columns, borders, self.window)
                blocks.append(
                    self._combine(self._weights(q[:, start:end], k[:, :end], rows, columns, allowed), v[:, :end])
                )
            y = jnp.concatenate(blocks, axis=1)
        return self.readout(y, x), k, v

    def _fused(self, q: Array, k: Array, v: Array, index: Array, allowed: Array) -> Array:
        # The whole mask is passed: kernels that are told of causality only have been seen to ignore the borders.
        bias = None
        if self.positions == "alibi":
            bias = alibi(self.heads, index, index, jnp.float32)[None].astype(q.dtype)
        q, k, v = (a.transpose(1, 0, 2)[None] for a in (q, k, v))
        kernel: Any = self.kernel
        y = jax.nn.dot_product_attention(q, k, v, bias, allowed[None, None], implementation=kernel)
        return y[0].transpose(1, 0, 2)

    def init_state(self, length: int) -> State:
        N = length if self.window is None else min(self.window, length)
        cache = jnp.zeros((self.kv_heads, N, self.head_width), self.out.weight.dtype)
        return State(cache, cache, jnp.full(N, -1), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, k, v = self._parallel(x, None)
        state = self.init_state(length)
        N, P = len(state.seen), len(x)
        kept = jnp.arange(max(P - N, 0), P)
        slots = kept % N
        return y, State(
            state.keys.at[:, slots].set(k[:, kept]),
            state.values.at[:, slots].set(v[:, kept]),
            state.seen.at[slots].set(kept),
            jnp.array(P),
            state.length,
        )

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        position = state.position
        q, k, v = self._project(x[None], position[None])
        slot = position % len(state.seen)
        keys, values = put(state.keys, slot, k[:, 0]), put(state.values, slot, v[:, 0])
        seen = state.seen.at[slot].set(position)
        allowed = (seen >= 0)[None] & causal_mask(position[None], seen, None, self.window)
        A = self._weights(q, keys, position[None], seen, allowed)
        y = self.out(self._combine(A, values).reshape(-1))
        y = jnp.where(position < state.length, y, jnp.nan)
        return State(keys, values, seen, position + 1, state.length), y

    def plain(self) -> "Attention":
        return dataclasses.replace(self, kernel="plain")


def rotate(x: Float[Array, "H T K"], positions: Int[Array, " T"], theta: float) -> Float[Array, "H T K"]:
    """Rotary position embedding (Su et al., arXiv 2104.09864): pairs (k, k + K/2) turn by position * theta^(-2k/K)."""
    half = x.shape[-1] // 2
    dtype = wide(x.dtype)
    angles = positions.astype(dtype)[:, None] * (theta ** (-jnp.arange(half, dtype=dtype) / half))[None]
    cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def alibi(heads: int, rows: Int[Array, " R"], columns: Int[Array, " C"], dtype: Any) -> Float[Array, "H R C"]:
    """ALiBi's penalty on scores, -slope x distance (Press et al., arXiv 2108.12409); slope 2^(-8 h / heads) of head h.

    Where the number of heads is no power of two, the paper's code takes the slopes of the next lower power and
    then every second one of the next higher: so do we.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]

    lower = 2 ** int(math.log2(heads))
    slopes = geometric(lower) + geometric(2 * lower)[0::2][: heads - lower]
    distance = (rows[:, None] - columns[None, :]).astype(dtype)
    return -jnp.array(slopes, dtype)[:, None, None] * distance[None]
