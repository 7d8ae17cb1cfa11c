"""Linear recurrences over a matrix-valued state: three algorithms for one mixing matrix.

Per head a state S [K, V] takes in a key and a value at each position, and is read by a query:

    S_i = diag(d_i) S_(i-1) + k_i v_i^T,    y_i = S_i^T q_i,

with decays d_i in [0, 1], one per head or one per key channel; or, by the delta rule of strength b_i,

    S_i = (I - b_i k_i k_i^T) diag(d_i) S_(i-1) + b_i k_i v_i^T.

In both cases y = A v. `forward` takes one position; `backward` carries queries back to the keys, which gives rows of A;
`chunked` takes whole chunks at once (Yang et al., arXiv 2312.06635), with the delta rule in its WY representation
(Yang et al., arXiv 2406.06484, 2412.06464). Decays are represented by their logarithms, which are summed over each span
and never subtracted, so that a decay of 0, whose logarithm is -inf, is exact and has finite derivatives. A document
starts with such a decay, which resets the state.
"""

import abc
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, keep_first
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, held, module, wide


@dataclass(frozen=True)
class LinearConfig(AggregateConfig):
    """The choices that all linear recurrences have."""

    heads: int = 4
    key_width: int | None = None
    """K, the width of each head's queries and keys; by default a share of width / heads."""
    value_width: int | None = None
    """V, the width of each head's values; by default a share of width / heads."""
    bias: bool = False
    chunk: int = 32
    """Positions per chunk of the parallel form. It affects speed only, and need not divide the sequence length."""

    def check(self) -> Iterable[str]:
        for what in ("heads", "key_width", "value_width", "chunk"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"

    def _widths(self, width: int, *, keys: float = 1, values: float = 1) -> tuple[int, int]:
        """K and V, by default these shares of width / heads. Raises ConfigError if heads do not divide the width."""
        if (self.key_width is None or self.value_width is None) and width % self.heads:
            raise ConfigError(
                f"heads: expected a divisor of width = {width} (or key_width and value_width given), got {self.heads}."
            )
        share = width // self.heads
        return self.key_width or max(1, int(keys * share)), self.value_width or int(values * share)


class Coefficients(NamedTuple):
    """What A is made of, in at least float32: queries, keys, log-decays and, for the delta rule, strengths."""

    q: Float[Array, "G T K"]
    k: Float[Array, "G T K"]
    log_decay: Float[Array, "G T E"]
    """E is 1, or K where each key channel has its own decay."""
    beta: Float[Array, "G T 1"] | None = None

    def delimited(self, documents: Documents, count: Count = None) -> "Coefficients":
        """With a state that is reset where documents begin, and unchanged by positions from `count` on."""
        log_decay = jnp.where(documents.first[None, :, None], -jnp.inf, self.log_decay)
        return self._replace(k=keep_first(self.k, count), log_decay=keep_first(log_decay, count))


@module
class LinearAggregate(Aggregate):
    """The recurrence above; G is the heads, the memory is S. A family defines its `coefficients` and its `readout`."""

    reads = frozenset({"qkv"})

    qkv: Linear = nnx.data()
    """One matrix for the queries, keys and values of all heads, in this order."""
    out: Linear = nnx.data()
    heads: int
    chunk: int

    @abc.abstractmethod
    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        """What A is made of, position by position."""

    def state_input(self, v: Float[Array, "G T V"]) -> Float[Array, "G T W"]:
        """What the state takes in: the values, and perhaps further channels."""
        return v

    def combined(self, y: Float[Array, "G T W"], *, hold: bool = False) -> Float[Array, "G T V"]:
        """The combined values, from what the queries read from the state."""
        return y

    @property
    def _keys(self) -> int:
        """The number of columns of `qkv` before the values."""
        return self.qkv.weight.shape[-1] - self.out.weight.shape[-2]

    def split(self, y: Float[Array, "T E"]) -> Float[Array, "G T K"]:
        """Heads first, in at least float32."""
        return y.reshape(len(y), self.heads, -1).transpose(1, 0, 2).astype(wide(y.dtype))

    def merge(self, y: Float[Array, "G T V"]) -> Float[Array, "T E"]:
        """The heads side by side."""
        return y.transpose(1, 0, 2).reshape(y.shape[1], -1)

    def queries_and_keys(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "G T K"], Float[Array, "G T K"]]:
        """The queries and keys that the matrix produces."""
        q, k = jnp.split(jax.vmap(self.qkv.columns(0, self._keys))(x), 2, axis=-1)
        return self.split(q), self.split(k)

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T V"]:
        v = jax.vmap(self.qkv.columns(self._keys))(x)
        return v.reshape(len(x), self.heads, -1).transpose(1, 0, 2)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        c = self.coefficients(x, documents.position).delimited(documents)
        return jax.vmap(functools.partial(backward, rows))(c)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        c = held(self.coefficients(x, documents.position).delimited(documents, count), hold)
        v = self.state_input(self.values(x, hold=hold).astype(c.q.dtype))
        y, S = jax.vmap(functools.partial(chunked, chunk=self.chunk))(c, v)
        return self.readout(self.combined(y, hold=hold).astype(x.dtype), x, hold=hold), S

    def init_memory(self, length: int) -> Any:
        width, dtype = self.out.weight.shape[-2] // self.heads, self.out.weight.dtype
        v = self.state_input(jnp.zeros((self.heads, 1, width), wide(dtype)))
        return jnp.zeros((self.heads, self._keys // (2 * self.heads), v.shape[-1]), v.dtype)

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        c = self.coefficients(x[None], position[None])
        v = self.state_input(self.values(x[None]).astype(c.q.dtype))
        S, y = jax.vmap(forward)(memory, *jax.tree.map(lambda a: a[:, 0], (c, v)))
        return S, self.readout(self.combined(y[:, None]).astype(x.dtype), x[None])[0]


def standardised(y: Float[Array, "*n V"], *, centre: bool, hold: bool) -> Float[Array, "*n V"]:
    """Each head's vector divided by its root mean square, after subtracting its mean if `centre`.

    This is LayerNorm or RMSNorm per head, or GroupNorm with one head per group, without a scale, which the linear map
    that follows absorbs. The held coefficient is 1 / root mean square.
    """
    wider = y.astype(wide(y.dtype))
    wider = wider - wider.mean(-1, keepdims=True) if centre else wider
    return (wider * held(lax.rsqrt(jnp.mean(wider * wider, -1, keepdims=True) + 1e-5), hold)).astype(y.dtype)


def direction(x: Float[Array, "*n K"]) -> Float[Array, "*n K"]:
    """x / |x|, and 0 for 0."""
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


# The three algorithms, for one head: coefficients [T, ...], or those of one position.


def forward(S: Float[Array, "K V"], c: Coefficients, v: Float[Array, " V"]) -> tuple[Array, Array]:
    """One position: the next state [K, V], and what the query reads from it [V]."""
    S = jnp.exp(c.log_decay)[:, None] * S
    u = v if c.beta is None else c.beta * (v - c.k @ S)
    S = S + c.k[:, None] * u[None]
    return S, c.q @ S


def backward(rows: Int[Array, " R"], c: Coefficients) -> Float[Array, "R T"]:
    """Rows of A by the transposed recurrence, which carries each row's query back to the keys. Memory R (K + T)."""
    queries = c.q[rows]

    def back(r: Array, source: tuple[Array, Coefficients]) -> tuple[Array, Array]:
        j, at = source
        r = jnp.where((rows == j)[:, None], queries, r)
        a = r @ at.k
        if at.beta is not None:
            a = a * at.beta
            r = r - a[:, None] * at.k[None]
        return r * jnp.exp(at.log_decay)[None], a

    sources = jnp.arange(len(c.q), dtype=rows.dtype), c
    return lax.scan(back, jnp.zeros_like(queries), sources, reverse=True)[1].T


class Chunk(NamedTuple):
    """A chunk of C positions as a map of the state S before it: u = inputs - forgets @ S, y = reads @ S + scores @
    u."""

    scores: Float[Array, "C C"]
    reads: Float[Array, "C K"]
    inputs: Float[Array, "C V"]
    forgets: Float[Array, "C K"] | None
    writes: Float[Array, "C K"]
    decay: Float[Array, " E"]


def chunked(c: Coefficients, v: Float[Array, "T V"], *, chunk: int) -> tuple[Float[Array, "T V"], Float[Array, "K V"]]:
    """All positions, and the state after them: quadratic within chunks of `chunk` positions, a scan across them."""
    T, V = v.shape
    C = max(1, min(chunk, T))

    def cut(a: Array) -> Array:
        # Padded with zeros: nothing is written, and a log-decay of 0 leaves the state unchanged.
        return jnp.pad(a, ((0, -T % C), (0, 0))).reshape(-1, C, a.shape[-1])

    def advance(S: Array, c: Chunk) -> tuple[Array, Array]:
        u = c.inputs if c.forgets is None else c.inputs - c.forgets @ S
        return c.decay[:, None] * S + c.writes.T @ u, c.reads @ S + c.scores @ u

    chunks = jax.vmap(_chunk)(*jax.tree.map(cut, (c, v)))
    S, y = lax.scan(advance, jnp.zeros((c.q.shape[-1], V), c.q.dtype), chunks)
    return y.reshape(-1, V)[:T], S


def _chunk(c: Coefficients, v: Array) -> Chunk:
    (q, k, log_decay, beta), C = c, len(v)
    later = jnp.tri(C, k=-1, dtype=bool)  # [i, j]: i > j
    # [i, j]: the sum over i >= m > j.
    spans = jnp.cumsum(jnp.where(later[:, :, None], log_decay[:, None], 0), axis=0)
    retained = jnp.exp(jnp.where(jnp.tri(C, dtype=bool)[:, :, None], spans, -jnp.inf))
    since_start = jnp.exp(log_decay[:1] + spans[:, 0])

    def products(a: Array) -> Array:
        """a_i . (product of decays after j up to i) k_j, for j <= i."""
        if retained.shape[-1] == 1:
            return (a @ k.T) * retained[..., 0]
        return jnp.einsum("ijk,jk->ij", a[:, None] * retained, k)

    inputs, forgets = v, None
    if beta is not None:
        # u_i = beta_i (v_i - S_(i-1)^T diag(d_i) k_i), where S contains the u before i: a triangular system for u.
        system = jnp.eye(C, dtype=q.dtype) + jnp.where(later, beta * products(k), 0)
        right = beta * jnp.concatenate([v, k * since_start], axis=-1)
        solved = solve_triangular(system, right, lower=True, unit_diagonal=True)
        inputs, forgets = solved[:, : v.shape[-1]], solved[:, v.shape[-1] :]
    return Chunk(products(q), q * since_start, inputs, forgets, k * retained[-1], since_start[-1])
