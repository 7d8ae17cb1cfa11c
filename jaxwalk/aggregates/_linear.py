"""Linear recurrences over a matrix-valued state, with three algorithms for the same mixing matrix.

In each head, the state S [K, V] is updated with a key and a value at each position, and read by a query:

    S_i = diag(d_i) S_(i-1) + k_i v_i^T,    y_i = S_i^T q_i,

with decays d_i in [0, 1], one per head or one per key channel; or, by the delta rule with strength b_i,

    S_i = (I - b_i k_i k_i^T) diag(d_i) S_(i-1) + b_i k_i v_i^T.

In both cases y = A v. `forward` advances by one position; `backward` propagates queries back to the keys, which gives
rows of A; `chunked` processes chunks of positions in parallel (Yang et al., arXiv 2312.06635), using the WY
representation for the delta rule (Yang et al., arXiv 2406.06484, 2412.06464).

Decays are represented by their logarithms, which are summed over each span and never subtracted, so that a decay of 0,
whose logarithm is -inf, is exact and has finite derivatives. A document starts with such a decay, which resets the
state.
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

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, mask_padding
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, held, module, wide


@dataclass(frozen=True)
class LinearConfig(AggregateConfig):
    """Options common to all linear recurrences."""

    heads: int = 4
    key_width: int | None = None
    """K, the width of each head's queries and keys; by default a multiple of width / heads."""
    value_width: int | None = None
    """V, the width of each head's values; by default a multiple of width / heads."""
    bias: bool = False
    chunk: int = 32
    """Positions per chunk of the parallel form. It affects speed only, and need not divide the sequence length."""

    def check(self) -> Iterable[str]:
        for field in ("heads", "key_width", "value_width", "chunk"):
            value = getattr(self, field)
            if value is not None and value < 1:
                yield f"{field}: expected at least 1, got {value}"

    def _widths(self, width: int, *, keys: float = 1, values: float = 1) -> tuple[int, int]:
        """K and V, by default `keys` and `values` times width / heads.

        Raises:
            ConfigError: if a default is needed and the heads do not divide the width.
        """
        if (self.key_width is None or self.value_width is None) and width % self.heads:
            raise ConfigError(
                f"heads: expected a divisor of width = {width} (or key_width and value_width given), got {self.heads}."
            )
        head_width = width // self.heads
        return self.key_width or max(1, int(keys * head_width)), self.value_width or int(values * head_width)


class Coefficients(NamedTuple):
    """The factors of A, in at least float32: queries, keys, log-decays and, for the delta rule, strengths."""

    q: Float[Array, "G T K"]
    k: Float[Array, "G T K"]
    log_decay: Float[Array, "G T E"]
    """E is 1, or K where each key channel has its own decay."""
    beta: Float[Array, "G T 1"] | None = None

    def delimited(self, documents: Documents, count: Count = None) -> "Coefficients":
        """The same, but resetting the state at the start of each document, and leaving it unchanged in the padding."""
        log_decay = jnp.where(documents.first[None, :, None], -jnp.inf, self.log_decay)
        return self._replace(k=mask_padding(self.k, count), log_decay=mask_padding(log_decay, count))


@module
class LinearAggregate(Aggregate):
    """A linear recurrence, as defined in the docstring of this module. A family defines `coefficients` and `readout`.

    Mixing matrix: exact, one per head. Memory: S, in at least float32.
    """

    reads = frozenset({"qkv"})

    qkv: Linear = nnx.data()
    """One matrix for the queries, keys and values of all heads, in this order."""
    out: Linear = nnx.data()
    heads: int
    chunk: int

    @abc.abstractmethod
    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        """The factors of A, for inputs at these positions within their documents."""

    def state_input(self, v: Float[Array, "G T V"]) -> Float[Array, "G T W"]:
        """The values that enter the state, possibly with additional channels."""
        return v

    def combined(self, y: Float[Array, "G T W"], *, hold: bool = False) -> Float[Array, "G T V"]:
        """The combined values, given what the queries read from the state."""
        return y

    @property
    def _qk_width(self) -> int:
        """The number of columns of `qkv` for queries and keys, which precede those for values."""
        return self.qkv.weight.shape[-1] - self.out.weight.shape[-2]

    def split(self, y: Float[Array, "T E"]) -> Float[Array, "G T K"]:
        """Split channels into heads, in at least float32."""
        return y.reshape(len(y), self.heads, -1).transpose(1, 0, 2).astype(wide(y.dtype))

    def merge(self, y: Float[Array, "G T V"]) -> Float[Array, "T E"]:
        """The inverse of `split`: concatenate the channels of all heads."""
        return y.transpose(1, 0, 2).reshape(y.shape[1], -1)

    def queries_and_keys(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "G T K"], Float[Array, "G T K"]]:
        """The queries and keys, as projected from x."""
        q, k = jnp.split(jax.vmap(self.qkv.columns(0, self._qk_width))(x), 2, axis=-1)
        return self.split(q), self.split(k)

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T V"]:
        v = jax.vmap(self.qkv.columns(self._qk_width))(x)
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
        return jnp.zeros((self.heads, self._qk_width // (2 * self.heads), v.shape[-1]), v.dtype)

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        c = self.coefficients(x[None], position[None])
        v = self.state_input(self.values(x[None]).astype(c.q.dtype))
        S, y = jax.vmap(forward)(memory, *jax.tree.map(lambda a: a[:, 0], (c, v)))
        return S, self.readout(self.combined(y[:, None]).astype(x.dtype), x[None])[0]


def standardised(y: Float[Array, "*n V"], *, centre: bool, hold: bool) -> Float[Array, "*n V"]:
    """Vectors divided by their root mean square, after subtracting their mean if `centre`.

    This is LayerNorm or RMSNorm per head, or GroupNorm with one head per group, without a scale, which the linear map
    that follows would absorb. The held coefficient is 1/rms.
    """
    wider = y.astype(wide(y.dtype))
    wider = wider - wider.mean(-1, keepdims=True) if centre else wider
    return (wider * held(lax.rsqrt(jnp.mean(wider * wider, -1, keepdims=True) + 1e-5), hold)).astype(y.dtype)


def direction(x: Float[Array, "*n K"]) -> Float[Array, "*n K"]:
    """The unit vector x / |x|, or 0 for x = 0."""
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


# The three algorithms, for one head. Coefficients are [T, ...], or those of a single position in `forward`.


def forward(S: Float[Array, "K V"], c: Coefficients, v: Float[Array, " V"]) -> tuple[Array, Array]:
    """The state [K, V] after the next position, and what the query reads from it, [V]."""
    S = jnp.exp(c.log_decay)[:, None] * S
    u = v if c.beta is None else c.beta * (v - c.k @ S)
    S = S + c.k[:, None] * u[None]
    return S, c.q @ S


def backward(rows: Int[Array, " R"], c: Coefficients) -> Float[Array, "R T"]:
    """Rows of A by the transposed recurrence, from each row's query back to the keys. It needs memory for R (K + T)."""
    queries = c.q[rows]

    def step_back(q: Array, source: tuple[Array, Coefficients]) -> tuple[Array, Array]:
        j, c = source
        q = jnp.where((rows == j)[:, None], queries, q)
        a = q @ c.k
        if c.beta is not None:
            a = a * c.beta
            q = q - a[:, None] * c.k[None]
        return q * jnp.exp(c.log_decay)[None], a

    sources = jnp.arange(len(c.q), dtype=rows.dtype), c
    return lax.scan(step_back, jnp.zeros_like(queries), sources, reverse=True)[1].T


class Chunk(NamedTuple):
    """A chunk of C positions as a function of the state S before it.

    With u = inputs - erasures @ S, the outputs are reads @ S + scores @ u, and the state after it is
    diag(decay) S + writes^T u. Without the delta rule, `erasures` is None.
    """

    scores: Float[Array, "C C"]
    reads: Float[Array, "C K"]
    inputs: Float[Array, "C V"]
    erasures: Float[Array, "C K"] | None
    writes: Float[Array, "C K"]
    decay: Float[Array, " E"]


def chunked(c: Coefficients, v: Float[Array, "T V"], *, chunk: int) -> tuple[Float[Array, "T V"], Float[Array, "K V"]]:
    """The combined values and the last state: all pairs of positions within a chunk, and a scan across chunks."""
    T, V = v.shape
    C = max(1, min(chunk, T))

    def split(a: Array) -> Array:
        # Padding with zeros writes nothing, and a log-decay of 0 leaves the state unchanged.
        return jnp.pad(a, ((0, -T % C), (0, 0))).reshape(-1, C, a.shape[-1])

    def advance(S: Array, c: Chunk) -> tuple[Array, Array]:
        u = c.inputs if c.erasures is None else c.inputs - c.erasures @ S
        return c.decay[:, None] * S + c.writes.T @ u, c.reads @ S + c.scores @ u

    chunks = jax.vmap(_chunk)(*jax.tree.map(split, (c, v)))
    S, y = lax.scan(advance, jnp.zeros((c.q.shape[-1], V), c.q.dtype), chunks)
    return y.reshape(-1, V)[:T], S


def _chunk(c: Coefficients, v: Array) -> Chunk:
    (q, k, log_decay, beta), C = c, len(v)
    earlier = jnp.tri(C, k=-1, dtype=bool)  # [i, j]: j < i
    # [i, j]: the sum of log-decays at positions m with j < m <= i.
    spans = jnp.cumsum(jnp.where(earlier[:, :, None], log_decay[:, None], 0), axis=0)
    retained = jnp.exp(jnp.where(jnp.tri(C, dtype=bool)[:, :, None], spans, -jnp.inf))
    since_start = jnp.exp(log_decay[:1] + spans[:, 0])

    def products(a: Array) -> Array:
        """[i, j]: a_i . (d_(j+1) ... d_i) k_j for j <= i, else 0."""
        if retained.shape[-1] == 1:
            return (a @ k.T) * retained[..., 0]
        return jnp.einsum("ijk,jk->ij", a[:, None] * retained, k)

    inputs, erasures = v, None
    if beta is not None:
        # u_i = beta_i (v_i - S_(i-1)^T diag(d_i) k_i). As S depends on earlier u, this is a triangular system for u.
        system = jnp.eye(C, dtype=q.dtype) + jnp.where(earlier, beta * products(k), 0)
        rhs = beta * jnp.concatenate([v, k * since_start], axis=-1)
        solution = solve_triangular(system, rhs, lower=True, unit_diagonal=True)
        inputs, erasures = solution[:, : v.shape[-1]], solution[:, v.shape[-1] :]
    return Chunk(products(q), q * since_start, inputs, erasures, k * retained[-1], since_start[-1])
