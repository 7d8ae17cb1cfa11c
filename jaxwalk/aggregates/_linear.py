"""What linear recurrences over a matrix-valued state share: three algorithms for one mixing matrix.

Per head a state S [K, V] takes in a key and a value at each position, and is read by a query:

    S_i = diag(d_i) S_(i-1) + k_i v_i^T,    y_i = S_i^T q_i,

with decays d_i in [0, 1], one per head or one per key channel; or, with the delta rule of strength b_i,

    S_i = (I - b_i k_i k_i^T) diag(d_i) S_(i-1) + b_i k_i v_i^T.

Both ways y = A v. `forward` takes one position; `backward` carries queries back to the keys, which gives rows of A;
`chunked` takes whole chunks at once (Yang et al., arXiv 2312.06635), with the delta rule through the WY representation
(Yang et al., arXiv 2406.06484, 2412.06464). Decays are kept as logarithms, and these are summed within each span, never
subtracted, so that a decay of 0, whose logarithm is -inf, is exact and has finite derivatives. A document starts with
such a decay: it resets the state.
"""

import abc
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, runs_and_positions
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import Linear, held, module, wide


@dataclass(frozen=True)
class LinearConfig(AggregateConfig):
    """The choices that all of them have."""

    heads: int = 4
    key_width: int | None = None
    """K, of each head's queries and keys. The default is a share of width / heads."""
    value_width: int | None = None
    """V, of each head's values. The default is a share of width / heads."""
    bias: bool = False
    chunk: int = 32
    """Positions that the parallel form takes at once: a matter of speed alone. Any length of sequence will do."""

    def check(self) -> Iterable[str]:
        for what in ("heads", "key_width", "value_width", "chunk"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"

    def _widths(self, width: int, *, keys: float = 1, values: float = 1) -> tuple[int, int]:
        """K and V, by default these shares of width / heads. Raises ConfigError if that is no whole number."""
        if (self.key_width is None or self.value_width is None) and width % self.heads:
            raise ConfigError(
                f"heads: expected a divisor of width = {width} (or key_width and value_width given), got {self.heads}."
            )
        share = width // self.heads
        return self.key_width or max(1, int(keys * share)), self.value_width or int(values * share)


class Coefficients(NamedTuple):
    """All that A is made of, in at least float32: queries and keys, log-decays and, for the delta rule, strengths."""

    q: Float[Array, "G T K"]
    k: Float[Array, "G T K"]
    log_decay: Float[Array, "G T E"]
    """E is 1, or K where each key channel has a decay of its own."""
    beta: Float[Array, "G T 1"] | None = None


class State(NamedTuple):
    """The matrices S, in at least float32."""

    S: Float[Array, "G K V"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class LinearAggregate(Aggregate):
    """The recurrence above; G is the heads. A family says what its `coefficients` and its `readout` are."""

    granularity: ClassVar[Literal["head", "channel", "state"]] = "head"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"
    reads: ClassVar[frozenset[str]] = frozenset({"qkv"})

    qkv: Linear = nnx.data()
    """Queries, keys and values of all heads, in this order, from one matrix."""
    out: Linear = nnx.data()
    heads: int
    chunk: int

    @abc.abstractmethod
    def coefficients(self, x: Float[Array, "T D"], positions: Int[Array, " T"]) -> Coefficients:
        """What A is made of, position by position."""

    @property
    def _keys(self) -> int:
        """The columns of `qkv` before the values."""
        return self.qkv.weight.shape[-1] - self.out.weight.shape[-2]

    def split(self, y: Float[Array, "T E"]) -> Float[Array, "G T K"]:
        """Heads first, in at least float32."""
        return y.reshape(len(y), self.heads, -1).transpose(1, 0, 2).astype(wide(y.dtype))

    def queries_and_keys(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "G T K"], Float[Array, "G T K"]]:
        """As the matrix gives them."""
        q, k = jnp.split(jax.vmap(_columns(self.qkv, slice(None, self._keys)))(x), 2, axis=-1)
        return self.split(q), self.split(k)

    def merge(self, y: Float[Array, "G T V"]) -> Float[Array, "T E"]:
        """The heads side by side."""
        return y.transpose(1, 0, 2).reshape(y.shape[1], -1)

    def carried(self, v: Float[Array, "G T V"]) -> Float[Array, "G T W"]:
        """What the state takes in of the values."""
        return v

    def combined(self, y: Float[Array, "G T W"]) -> Float[Array, "G T V"]:
        """The combined values from what the queries read."""
        return y

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T V"]:
        v = jax.vmap(_columns(self.qkv, slice(self._keys, None)))(x)
        return v.reshape(len(x), self.heads, -1).transpose(1, 0, 2)

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        return jax.vmap(functools.partial(backward, rows))(*self._reset(x, segments))

    def _reset(self, x: Array, segments: Array | None) -> Coefficients:
        """The coefficients, with a decay of 0 where a document begins."""
        _, positions = runs_and_positions(segments, len(x))
        c = self.coefficients(x, positions)
        return c._replace(log_decay=jnp.where((positions == 0)[None, :, None], -jnp.inf, c.log_decay))

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._parallel(x, segments)[0]

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Array]:
        c = self._reset(x, segments)
        v = self.carried(self.values(x).astype(c.q.dtype))
        y, S = jax.vmap(functools.partial(chunked, chunk=self.chunk))(*c, v)
        return self.readout(self.combined(y).astype(x.dtype), x), S

    def init_state(self, length: int) -> State:
        width, dtype = self.out.weight.shape[-2] // self.heads, self.out.weight.dtype
        v = self.carried(jnp.zeros((self.heads, 1, width), wide(dtype)))
        S = jnp.zeros((self.heads, self._keys // (2 * self.heads), v.shape[-1]), v.dtype)
        return State(S, jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        y, S = self._parallel(x, None)
        return y, State(S, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        c = self.coefficients(x[None], state.position[None])
        v = self.carried(self.values(x[None]).astype(c.q.dtype))
        q, k, log_decay, beta = jax.tree.map(lambda a: a[:, 0], c)
        S, y = jax.vmap(forward)(state.S, q, k, log_decay, beta, v[:, 0])
        y = self.readout(self.combined(y[:, None]).astype(x.dtype), x[None])[0]
        position = state.position + 1
        return State(S, position, state.length), jnp.where(position <= state.length, y, jnp.nan)


def _columns(linear: Linear, columns: slice) -> Linear:
    return Linear(linear.weight[:, columns], None if linear.bias is None else linear.bias[columns])


def standardised(y: Float[Array, "*n V"], *, centre: bool, hold: bool) -> Float[Array, "*n V"]:
    """Each head's vector over its root mean square, with its mean taken off before if `centre`.

    What LayerNorm and RMSNorm per head do, and GroupNorm of a head to a group. The map that follows absorbs a scale.
    The held coefficient is 1 / root mean square.
    """
    wider = y.astype(wide(y.dtype))
    wider = wider - wider.mean(-1, keepdims=True) if centre else wider
    return (wider * held(lax.rsqrt(jnp.mean(wider * wider, -1, keepdims=True) + 1e-5), hold)).astype(y.dtype)


def direction(x: Float[Array, "*n K"]) -> Float[Array, "*n K"]:
    """x / |x|; 0 stays 0."""
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


# The three algorithms, for one head. Without the delta rule `beta` is None.


def forward(
    S: Float[Array, "K V"],
    q: Float[Array, " K"],
    k: Float[Array, " K"],
    log_decay: Float[Array, " E"],
    beta: Float[Array, " 1"] | None,
    v: Float[Array, " V"],
) -> tuple[Float[Array, "K V"], Float[Array, " V"]]:
    """One position: the next state, and what the query reads of it."""
    S = jnp.exp(log_decay)[:, None] * S
    u = v if beta is None else beta * (v - k @ S)
    S = S + k[:, None] * u[None]
    return S, q @ S


def backward(
    rows: Int[Array, " R"],
    q: Float[Array, "T K"],
    k: Float[Array, "T K"],
    log_decay: Float[Array, "T E"],
    beta: Float[Array, "T 1"] | None,
) -> Float[Array, "R T"]:
    """Rows of A: the transposed recurrence, which carries each row's query back to the keys. Memory R (K + T)."""
    asked = q[rows]

    def back(r: Array, source: tuple[Array, Array, Array, Array | None]) -> tuple[Array, Array]:
        j, k, log_decay, beta = source
        r = jnp.where((rows == j)[:, None], asked, r)
        a = r @ k
        if beta is not None:
            a = a * beta
            r = r - a[:, None] * k[None]
        return r * jnp.exp(log_decay)[None], a

    sources = jnp.arange(len(q), dtype=rows.dtype), k, log_decay, beta
    return lax.scan(back, jnp.zeros_like(asked), sources, reverse=True)[1].T


class Chunk(NamedTuple):
    """A chunk of C positions as a map of the state it finds: u = own - forgets @ S, y = reads @ S + scores @ u."""

    scores: Float[Array, "C C"]
    reads: Float[Array, "C K"]
    own: Float[Array, "C V"]
    forgets: Float[Array, "C K"] | None
    writes: Float[Array, "C K"]
    decay: Float[Array, " E"]


def chunked(
    q: Float[Array, "T K"],
    k: Float[Array, "T K"],
    log_decay: Float[Array, "T E"],
    beta: Float[Array, "T 1"] | None,
    v: Float[Array, "T V"],
    chunk: int,
) -> tuple[Float[Array, "T V"], Float[Array, "K V"]]:
    """All positions, and the state after them: quadratic within chunks of `chunk` positions, a scan over chunks."""
    T = len(q)
    C = max(1, min(chunk, T))

    def cut(a: Array) -> Array:
        # Zeros at the end: nothing is written, and a log-decay of 0 leaves the state as it is.
        return jnp.pad(a, ((0, -T % C), (0, 0))).reshape(-1, C, a.shape[-1])

    def advance(S: Array, c: Chunk) -> tuple[Array, Array]:
        u = c.own if c.forgets is None else c.own - c.forgets @ S
        return c.decay[:, None] * S + c.writes.T @ u, c.reads @ S + c.scores @ u

    parts = jax.tree.map(cut, (q, k, log_decay, beta, v))
    S, y = lax.scan(advance, jnp.zeros((q.shape[-1], v.shape[-1]), q.dtype), jax.vmap(_chunk)(*parts))
    return y.reshape(-1, v.shape[-1])[:T], S


def _chunk(q: Array, k: Array, log_decay: Array, beta: Array | None, v: Array) -> Chunk:
    C = len(q)
    later = jnp.tri(C, k=-1, dtype=bool)  # of the row than of the column
    # [i, j]: the sum over i >= m > j.
    spans = jnp.cumsum(jnp.where(later[:, :, None], log_decay[:, None], 0), axis=0)
    kept = jnp.exp(jnp.where(jnp.tri(C, dtype=bool)[:, :, None], spans, -jnp.inf))
    since_start = jnp.exp(log_decay[:1] + spans[:, 0])

    def products(a: Array) -> Array:
        """a_i . (prod of decays) k_j, for j <= i."""
        if kept.shape[-1] == 1:
            return (a @ k.T) * kept[..., 0]
        return jnp.einsum("ijk,jk->ij", a[:, None] * kept, k)

    own, forgets = v, None
    if beta is not None:
        # u_i = beta_i (v_i - S_(i-1)^T diag(d_i) k_i), where S holds the u before i: triangular in u.
        system = jnp.eye(C, dtype=q.dtype) + jnp.where(later, beta * products(k), 0)
        given = beta * jnp.concatenate([v, k * since_start], axis=-1)
        solved = solve_triangular(system, given, lower=True, unit_diagonal=True)
        own, forgets = solved[:, : v.shape[-1]], solved[:, v.shape[-1] :]
    return Chunk(products(q), q * since_start, own, forgets, k * kept[-1], since_start[-1])
