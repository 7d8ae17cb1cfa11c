"""Softmax attention (Vaswani et al., arXiv 1706.03762), multi-head or grouped-query (Ainslie et al., 2305.13245)."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, causal_mask, put
from jaxwalk.aggregates._rotary import frequencies, gain, rotate
from jaxwalk.config import AggregateConfig, ConfigError, LongRopeScaling, RopeScaling
from jaxwalk.filters import Linear, RMSNorm, held, indices, module, softcapped, wide


@dataclass(frozen=True)
class Config(AggregateConfig):
    """Attention. Positions are encoded here (RoPE, ALiBi) or at the embedding (`ModelConfig.positions`)."""

    name: ClassVar[str] = "attention"
    heads: int = 4
    kv_heads: int | None = None
    """Heads of keys and values, each shared by heads / kv_heads query heads; by default, equal to `heads`."""
    head_width: int | None = None
    """The width of a head, K; by default width / heads."""
    positions: Literal["none", "rope", "alibi"] = "none"
    rope_theta: float = 10000.0
    rope_width: int | None = None
    """The number of leading channels of each head that RoPE rotates; by default all."""
    rope_scaling: RopeScaling | None = None
    scale: float | None = None
    """The factor on q . k; by default 1 / sqrt(head_width)."""
    softcap: float | None = None
    """Scores become cap * tanh(scores / cap), as in Gemma 2 (Bello et al., arXiv 1611.09940)."""
    window: int | None = None
    """A position sees itself and the window - 1 positions before it; by default all before it."""
    qk_norm: bool = False
    """RMS-normalise queries and keys (Henry et al., arXiv 2010.04245)."""
    qk_norm_over: Literal["head", "width"] = "head"
    """Normalise over the channels of each head, or of all heads together, as in OLMo 2."""
    qk_norm_eps: float = 1e-5
    qk_norm_unit_offset: bool = False
    """That norm multiplies by 1 + scale, as in Gemma 3."""
    bias: bool = True
    """Biases of queries, keys and values, and of the output unless `out_bias` is given."""
    out_bias: bool | None = None
    kernel: Literal["plain", "xla", "cudnn"] = "plain"
    """Plain JAX, or the implementation of `jax.nn.dot_product_attention` (float32 and narrower only)."""

    def check(self) -> Iterable[str]:
        for field in ("heads", "kv_heads", "head_width", "window"):
            value = getattr(self, field)
            if value is not None and value < 1:
                yield f"{field}: expected at least 1, got {value}"
        for field in ("rope_theta", "softcap"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                yield f"{field}: expected more than 0, got {value}"
        if not self.qk_norm_eps >= 0:
            yield f"qk_norm_eps: expected at least 0, got {self.qk_norm_eps}"
        if self.kv_heads and self.heads > 0 and self.heads % self.kv_heads:
            yield f"kv_heads: expected a divisor of heads = {self.heads}, got {self.kv_heads}"
        for field in ("rope_width", "rope_scaling"):
            if getattr(self, field) is not None and self.positions != "rope":
                yield f"{field}: expected positions = 'rope', got {self.positions!r}"
        if self.softcap is not None and self.kernel != "plain":
            yield f"kernel: expected 'plain' with a soft cap, which fused kernels lack, got {self.kernel!r}"
        if self.positions == "rope" and self.head_width and self.head_width > 0:
            yield from self._check_rope(self.head_width)

    def _check_rope(self, head_width: int) -> Iterable[str]:
        width = head_width if self.rope_width is None else self.rope_width
        if self.rope_width is None and width % 2:
            yield f"head_width: expected an even number with RoPE, got {width}"
        elif not 2 <= width <= head_width or width % 2:
            yield f"rope_width: expected an even number from 2 to the head width {head_width}, got {width}"
        elif isinstance(self.rope_scaling, LongRopeScaling) and len(self.rope_scaling.factors) != width // 2:
            yield f"rope_scaling.factors: expected {width // 2}, half the width rotated, got " + str(
                len(self.rope_scaling.factors)
            )

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "Attention":
        if self.head_width is None and width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width} (or head_width given), got {self.heads}.")
        K = self.head_width or width // self.heads
        errors = list(self._check_rope(K)) if self.positions == "rope" else []
        if errors:
            raise ConfigError(f"attention, with a head width of width / heads = {K}: " + "; ".join(errors) + ".")
        kv_heads = self.kv_heads or self.heads
        key_qkv, key_out = jax.random.split(key)

        def norm(heads: int) -> RMSNorm:
            channels = K if self.qk_norm_over == "head" else heads * K
            return RMSNorm.init(channels, eps=self.qk_norm_eps, unit_offset=self.qk_norm_unit_offset)

        return Attention(
            qkv=Linear.init(width, (self.heads + 2 * kv_heads) * K, bias=self.bias, key=key_qkv),
            out=Linear.init(
                self.heads * K,
                width,
                bias=self.bias if self.out_bias is None else self.out_bias,
                gain=1 / math.sqrt(2 * depth),
                key=key_out,
            ),
            q_norm=norm(self.heads) if self.qk_norm else None,
            k_norm=norm(kv_heads) if self.qk_norm else None,
            heads=self.heads,
            kv_heads=kv_heads,
            positions=self.positions,
            rope_theta=self.rope_theta,
            rope_width=K if self.rope_width is None else self.rope_width,
            rope_scaling=self.rope_scaling,
            scale=1 / math.sqrt(K) if self.scale is None else self.scale,
            softcap=self.softcap,
            window=self.window,
            kernel=self.kernel,
        )


class Memory(NamedTuple):
    """The cached keys and values, in a ring buffer with a slot for each position in the window, or for all positions.

    Attributes:
        keys: [G, N, K], one per group of heads.
        values: [G, N, K].
        positions: [N], the position in each slot, or -1 if it is empty.
    """

    keys: Float[Array, "G N K"]
    values: Float[Array, "G N K"]
    positions: Int[Array, " N"]


class Scanned(NamedTuple):
    """The options that may differ between stacked layers, as arrays: window, rotary frequencies, and their gain."""

    window: Int[Array, ""]
    frequencies: Float[Array, " F"]
    gain: Float[Array, ""]


UNLIMITED = 1 << 30
"""The window that stands for none, where the windows of stacked layers differ."""


@module
class Attention(Aggregate):
    """A_ij = softmax over j <= i of scale q_i . k_j.

    Keys and values are shared by groups of query heads: head h uses group h // (heads / kv_heads).

    Mixing matrix: exact, one per query head.
    Held coefficients: A.
    Memory: keys and values of all positions in the window.
    """

    reads = frozenset({"qkv"})
    varying = {"window": None, "rope_theta": 1.0, "rope_scaling": None}  # noqa: RUF012

    qkv: Linear = nnx.data()
    """The projection to the queries, keys and values of all heads, in this order."""
    out: Linear = nnx.data()
    q_norm: RMSNorm | None = nnx.data()
    """Over the queries of each head or of all heads together, depending on its width."""
    k_norm: RMSNorm | None = nnx.data()
    heads: int
    kv_heads: int
    positions: Literal["none", "rope", "alibi"]
    rope_theta: float
    rope_width: int
    rope_scaling: RopeScaling | None
    scale: float
    softcap: float | None
    window: int | None
    kernel: Literal["plain", "xla", "cudnn"]
    scanned: Scanned | None = nnx.data(default=None)

    @property
    def head_width(self) -> int:
        """The width of a head, K."""
        return self.out.weight.shape[-2] // self.heads

    def setting(self) -> Scanned:
        F = self.rope_width if self.positions == "rope" else 0
        return Scanned(
            jnp.array(UNLIMITED if self.window is None else self.window, jnp.int32),
            jnp.array(frequencies(F, self.rope_theta, self.rope_scaling), jnp.result_type(float)),
            jnp.array(gain(self.rope_scaling), jnp.result_type(float)),
        )

    @classmethod
    def common_setting(cls, values: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        windows = [window for window, *_ in values]
        return None if None in windows else max(windows), *list(cls.varying.values())[1:]

    def _window(self) -> Any:
        return self.window if self.scanned is None else self.scanned.window

    def _rotate(self, x: Array, positions: Array) -> Array:
        if self.positions != "rope":
            return x
        if self.scanned is not None:
            return rotate(x, positions, self.scanned.frequencies, self.scanned.gain)
        freqs = frequencies(self.rope_width, self.rope_theta, self.rope_scaling)
        return rotate(x, positions, freqs, gain(self.rope_scaling))

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries [H, T, K], keys [kv, T, K], values [kv, T, K] of x [T, D] at `positions` [T]."""
        H, N, K = self.heads, self.kv_heads, self.head_width
        q, k, v = jnp.split(jax.vmap(self.qkv)(x), (H * K, (H + N) * K), axis=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        q, k, v = (part.reshape(len(x), -1, K).transpose(1, 0, 2) for part in (q, k, v))
        return self._rotate(q, positions), self._rotate(k, positions), v

    def _weights(self, q: Array, k: Array, rows: Array, columns: Array, allowed: Array) -> Array:
        """A [H, R, C] for queries [H, R, K] at positions `rows` and keys [kv, C, K] at positions `columns`."""
        q = (q * self.scale).reshape(self.kv_heads, -1, self.head_width)
        scores = jnp.einsum("grk,gck->grc", q, k, preferred_element_type=wide(q.dtype))
        scores = scores.reshape(self.heads, len(rows), len(columns))
        if self.softcap is not None:
            scores = softcapped(scores, self.softcap)
        if self.positions == "alibi":
            scores = scores + alibi(self.heads, rows, columns, scores.dtype)
        # Finite rather than -inf, which would make rows without any allowed column NaN, gradients included.
        return jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min), axis=-1)

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        v = jax.vmap(self.qkv.columns((self.heads + self.kv_heads) * self.head_width))(x)
        v = v.reshape(len(x), self.kv_heads, self.head_width).transpose(1, 0, 2)
        return jnp.repeat(v, self.heads // self.kv_heads, axis=0)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        q, k, _ = self._project(x, documents.position)
        columns = indices(len(x))
        return self._weights(q[:, rows], k, rows, columns, causal_mask(rows, columns, documents.ids, self._window()))

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y.transpose(1, 0, 2).reshape(y.shape[1], -1))

    def _combine(self, A: Array, v: Array) -> Array:
        """A [H, R, C] times the values [kv, C, K] of each head's group: [H, R, K]."""
        grouped = A.astype(v.dtype).reshape(self.kv_heads, -1, A.shape[-1])
        return (grouped @ v).reshape(self.heads, -1, self.head_width)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        T = len(x)
        q, k, v = self._project(x, documents.position)
        index = indices(T)
        if self.kernel != "plain" and x.dtype != jnp.float64 and not hold:
            y = self._fused(q, k, v, index, causal_mask(index, index, documents.ids, self._window()))
        else:
            # Two blocks of queries, the first of which skips the keys of the second, save a quarter of the work.
            ends = (T,) if T < 128 else (T // 2, T)
            blocks = []
            for start, end in zip((0, *ends), ends, strict=False):
                rows, columns = index[start:end], index[:end]
                allowed = causal_mask(rows, columns, documents.ids, self._window())
                A = held(self._weights(q[:, start:end], k[:, :end], rows, columns, allowed), hold)
                blocks.append(self._combine(A, v[:, :end]))
            y = jnp.concatenate(blocks, axis=1)
        return self.readout(y, x), (k, v)

    def _fused(self, q: Array, k: Array, v: Array, index: Array, allowed: Array) -> Array:
        # An explicit mask, as some kernels were found to ignore document borders when asked for causal attention.
        bias = None
        if self.positions == "alibi":
            bias = alibi(self.heads, index, index, jnp.float32)[None].astype(q.dtype)
        q, k, v = (a.transpose(1, 0, 2)[None] for a in (q, k, v))
        kernel: Any = self.kernel
        y = jax.nn.dot_product_attention(q, k, v, bias, allowed[None, None], scale=self.scale, implementation=kernel)
        return y[0].transpose(1, 0, 2)

    def init_memory(self, length: int) -> Any:
        N = length if self.window is None else min(self.window, length)
        cache = jnp.zeros((self.kv_heads, N, self.head_width), self.out.weight.dtype)
        return Memory(cache, cache, jnp.full(N, -1, jnp.int32))

    def allocate(self, memory: Any, length: int, count: Count = None) -> Any:
        (k, v), empty = memory, self.init_memory(length)
        P = k.shape[1] if count is None else count
        slots = indices(len(empty.positions))
        # Slot s holds the last position p < P with p = s modulo the number of slots; p < 0 means an empty slot.
        positions = P - 1 - (P - 1 - slots) % len(slots)
        source = jnp.clip(positions, 0, k.shape[1] - 1)
        return Memory(k[:, source], v[:, source], jnp.where(positions >= 0, positions, -1))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        q, k, v = self._project(x[None], position[None])
        slot = position % len(memory.positions)
        keys, values = put(memory.keys, slot, k[:, 0]), put(memory.values, slot, v[:, 0])
        columns = memory.positions.at[slot].set(position)
        allowed = (columns >= 0)[None] & causal_mask(position[None], columns, None, self._window())
        A = self._weights(q, keys, position[None], columns, allowed)
        return Memory(keys, values, columns), self.out(self._combine(A, values).reshape(-1))

    def plain(self) -> "Attention":
        return dataclasses.replace(self, kernel="plain")


def _normed(norm: RMSNorm, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """`x` normalised over consecutive blocks of channels of the width of `norm`."""
    return jax.vmap(jax.vmap(norm))(x.reshape(len(x), -1, norm.scale.shape[-1])).reshape(x.shape)


def alibi(heads: int, rows: Int[Array, " R"], columns: Int[Array, " C"], dtype: Any) -> Float[Array, "H R C"]:
    """ALiBi's bias on scores, -slope x distance, with slope 2^(-8h / heads) in head h (Press et al., arXiv 2108.12409).

    If the number of heads is not a power of two, the slopes are those of the next lower power, followed by every second
    one of the next higher power, as in the paper's code.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]

    lower = 2 ** int(math.log2(heads))
    slopes = geometric(lower) + geometric(2 * lower)[0::2][: heads - lower]
    distance = (rows[:, None] - columns[None, :]).astype(dtype)
    return -jnp.array(slopes, dtype)[:, None, None] * distance[None]
