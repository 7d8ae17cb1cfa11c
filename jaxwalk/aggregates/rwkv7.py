"""The time-mixing of RWKV-7 (Peng et al., arXiv 2503.14456): a generalised delta rule in a state that decays."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, keep_first, last
from jaxwalk.aggregates._convolution import moved_back, shifted
from jaxwalk.aggregates._linear import direction
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import LayerNorm, Linear, held, module, wide

FASTEST = math.exp(-0.5)  # the largest rate of decay, which makes every decay at least 0.545


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The time-mixing of RWKV-7, with K = V = width / heads, which is 64 in the paper."""

    name: ClassVar[str] = "rwkv7"
    heads: int = 4
    rank: int | None = None
    """Rank of the maps to decays and learning rates; by default about 2.5 sqrt(width), at least 32, as in the paper,
    and at most the width."""
    gate_rank: int | None = None
    """Rank of the map to the gate; by default twice as much, likewise."""
    chunk: int = 16
    """Positions per chunk of the parallel form. It affects speed only, and need not divide the sequence length."""

    def check(self) -> Iterable[str]:
        for what in ("heads", "rank", "gate_rank", "chunk"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"
        if self.chunk > 64:
            yield f"chunk: expected at most 64, as products of so many decays are divided by, got {self.chunk}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "RWKV7":
        if width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width}, got {self.heads}.")
        K = width // self.heads
        rank, gate_rank = (
            choice or min(width, max(32, round(share * math.sqrt(width) / 32) * 32))
            for choice, share in ((self.rank, 2.5), (self.gate_rank, 5))
        )
        keys = jax.random.split(key, 7)
        number = jnp.asarray(layer, jnp.float32)
        deep, shallow = number / max(depth - 1, 1), 1 - number / depth
        channel = jnp.arange(width, dtype=jnp.float32)
        across = channel / max(width - 1, 1)
        in_head = 2 * (channel % K) / max(K - 1, 1) - 1
        zigzag = in_head * jnp.abs(in_head)

        def low_rank(key: Any, rank: int, bias: Array | None) -> tuple[Linear, Linear]:
            up = Linear.init(rank, width, bias=False, gain=0.1, key=key)
            return Linear(jnp.zeros((width, rank), jnp.float32), None), Linear(up.weight, bias)

        fade = -6 + 6 * across ** (1 + deep**0.3) + 0.5 + 2.5 * zigzag
        decay, decay_up = low_rank(keys[0], rank, fade)
        rate, rate_up = low_rank(keys[1], rank, -0.19 + 0.3 * zigzag + 0.4 * (across - 0.5))
        gate, gate_up = low_rank(keys[2], gate_rank, None)
        # The paper has uniform distributions up to 0.5, 0.05 and 0.5 over sqrt(width); these have the same deviations.
        receptance, k, value = (
            Linear.init(width, width, bias=False, gain=bound / math.sqrt(3), key=one)
            for bound, one in zip((0.5, 0.05, 0.5), keys[3:6], strict=True)
        )
        powers = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], jnp.float32)[:, None] * shallow
        return RWKV7(
            shares=1 - (channel / width)[None] ** powers,
            receptance=receptance,
            key=k,
            value=value,
            decay=decay,
            decay_up=decay_up,
            rate=rate,
            rate_up=rate_up,
            gate=gate,
            gate_up=gate_up,
            removal=0.71 - 0.1 * (across - 0.5),
            replacement=jnp.full(width, 1.02, jnp.float32),
            bonus=jnp.full(width, -0.04, jnp.float32),
            norm=LayerNorm(
                jnp.full(width, ((number + 1) / depth) ** 0.7, jnp.float32), jnp.zeros(width, jnp.float32), 1e-5 * K
            ),
            out=Linear.init(width, width, bias=False, gain=1 / math.sqrt(2 * depth), key=keys[6]),
            heads=self.heads,
            chunk=self.chunk,
        )


class Coefficients(NamedTuple):
    """The coefficients of the recurrence, in at least float32, with the names they have in `RWKV7`."""

    r: Float[Array, "*n K"]
    log_decay: Float[Array, "*n K"]
    """log w."""
    k: Float[Array, "*n K"]
    c: Float[Array, "*n K"]
    e: Float[Array, "*n K"]
    """a * c, so that a transition is diag(w) - e c^T."""


class Memory(NamedTuple):
    """The previous input, and the matrices S in at least float32."""

    before: Float[Array, " D"]
    S: Float[Array, "H K V"]


@module
class RWKV7(Aggregate):
    """S_i = (diag(w_i) - (a_i * c_i) c_i^T) S_(i-1) + k_i v_i^T and y_i = S_i^T r_i in each head, S of [K, V].

    w = exp(-exp(-1/2) sigmoid(decay_up(tanh(decay(x))))) decays each key channel; a = sigmoid(rate_up(rate(x))) is
    the learning rate; c = removal * key(x), divided by its length in each head, is the direction whose old value is
    removed, and k = key(x) * (1 + (a - 1) * replacement) the one that the new value is written by; r = receptance(x),
    v = value(x). The output is out(g * (LayerNorm(y) + (r . (bonus * k)) v)), the norm and the bonus head by head, with
    the gate g = gate_up(sigmoid(gate(x))). In place of x each of r, w, k, v, a and g takes a mix x_i + share *
    (x_(i-1) - x_i), with its own shares ("token shift").

    Kind of A: exact. G is 5 times the heads: value((1 - share) * x_j) with A_ij = r_i^T (transitions after j up to i)
    k_j; value(share * x_j) with that A moved back by a position; the same two values with the bonus on the diagonal,
    and that moved back, which the norm does not see; and x_j itself with A the shift by a position. The last group
    carries the previous token to the readout for g, which comes after the norm and so cannot be in A; g is held, so the
    group adds nothing to the output itself. Held are g and 1 / std.

    The residual of the first layer's values is left out, as a layer here cannot read another layer. `out` is
    initialised as elsewhere here, where the paper has zero.
    """

    shares: Float[Array, "6 D"] = nnx.data()
    """The share of the previous position in the mix, for r, w, k, v, a and g."""
    receptance: Linear = nnx.data()
    key: Linear = nnx.data()
    value: Linear = nnx.data()
    decay: Linear = nnx.data()
    decay_up: Linear = nnx.data()
    rate: Linear = nnx.data()
    rate_up: Linear = nnx.data()
    gate: Linear = nnx.data()
    gate_up: Linear = nnx.data()
    removal: Float[Array, " D"] = nnx.data()
    replacement: Float[Array, " D"] = nnx.data()
    bonus: Float[Array, " D"] = nnx.data()
    norm: LayerNorm = nnx.data()
    out: Linear = nnx.data()
    heads: int
    chunk: int

    def _mix(self, number: int, x: Array, before: Array) -> Array:
        return x + self.shares[number][None] * (before - x)

    def _split(self, y: Array) -> Array:
        """Heads first, in at least float32."""
        return y.reshape(len(y), self.heads, -1).transpose(1, 0, 2).astype(wide(y.dtype))

    def _coefficients(self, x: Array, before: Array) -> tuple[Coefficients, Array]:
        """The coefficients of the recurrence, and those of the bonus, [H, T, 1]."""
        k = self._split(jax.vmap(self.key)(self._mix(2, x, before)))
        decay = jax.vmap(lambda x: self.decay_up(jnp.tanh(self.decay(x))))(self._mix(1, x, before))
        rate = jax.vmap(lambda x: self.rate_up(self.rate(x)))(self._mix(4, x, before))
        r = self._split(jax.vmap(self.receptance)(self._mix(0, x, before)))
        a = jax.nn.sigmoid(self._split(rate))
        removal, replacement, bonus = (self._split(p[None]) for p in (self.removal, self.replacement, self.bonus))
        c, k = direction(k * removal), k * (1 + (a - 1) * replacement)
        bonus = jnp.sum(r * bonus * k, axis=-1, keepdims=True)
        return Coefficients(r, -FASTEST * jax.nn.sigmoid(self._split(decay)), k, c, a * c), bonus

    def _gate(self, x: Array, before: Array) -> Array:
        return jax.vmap(lambda x: self.gate_up(jax.nn.sigmoid(self.gate(x))))(self._mix(5, x, before))

    def _output(self, y: Array, direct: Array, gate: Array, hold: bool = False) -> Array:
        """The output from the combined values, and from what is added after the norm, both [H, R, V]."""
        norms = jax.tree.map(lambda a: a.reshape(self.heads, -1), self.norm)
        normed = jax.vmap(lambda norm, y: jax.vmap(functools.partial(norm, hold=hold))(y))(norms, y)
        return jax.vmap(self.out)(held(gate, hold) * (normed + direct).transpose(1, 0, 2).reshape(y.shape[1], -1))

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        share = self.shares[3][None]
        current, before = jax.vmap(self.value)((1 - share) * x), jax.vmap(self.value)(share * x)
        groups = jnp.stack([current, before, current, before, x]).reshape(5, len(x), self.heads, -1)
        return groups.transpose(0, 2, 1, 3).reshape(5 * self.heads, len(x), -1)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        c, bonus = self._coefficients(x, shifted(x, 1, documents))
        A = jax.vmap(functools.partial(backward, rows, documents.first))(c)
        identity = jnp.broadcast_to(jax.nn.one_hot(rows, len(x), dtype=A.dtype), A.shape)
        direct = identity * bonus[:, rows]
        return jnp.concatenate(
            [A, moved_back(A, 1, documents), direct, *moved_back(jnp.stack([direct, identity]), 1, documents)]
        )

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        current, moved, direct, direct_moved, before = y.reshape(5, self.heads, *y.shape[1:])
        gate = self._gate(x, before.transpose(1, 0, 2).reshape(x.shape))
        return self._output(current + moved, direct + direct_moved, gate, hold)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        before = shifted(x, 1, documents)
        c, bonus = held(self._coefficients(x, before), hold)
        # Padding neither decays, removes nor writes, so that the last state is that of the last real position.
        c = c._replace(**{name: keep_first(getattr(c, name), count) for name in ("log_decay", "k", "e")})
        v = self._split(jax.vmap(self.value)(self._mix(3, x, before)))
        S, y = jax.vmap(functools.partial(chunked, documents.first, chunk=self.chunk))(c, v)
        y = self._output(y.astype(x.dtype), (bonus * v).astype(x.dtype), self._gate(x, before), hold)
        return y, Memory(last(x, count), S)

    def init_memory(self, length: int) -> Any:
        before, K = jnp.zeros_like(self.bonus), self.bonus.shape[-1] // self.heads
        return Memory(before, jnp.zeros((self.heads, K, K), wide(before.dtype)))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        current, before = x[None], memory.before[None]
        c, bonus = self._coefficients(current, before)
        v = self._split(jax.vmap(self.value)(self._mix(3, current, before)))
        S, y = jax.vmap(forward)(memory.S, *jax.tree.map(lambda a: a[:, 0], (c, v)))
        y = self._output(y[:, None].astype(x.dtype), (bonus * v).astype(x.dtype), self._gate(current, before))[0]
        return Memory(x, S), y


# The three algorithms, for one head.


def forward(S: Float[Array, "K V"], c: Coefficients, v: Float[Array, " V"]) -> tuple[Array, Array]:
    """One position: the next state, and what r reads from it."""
    S = jnp.exp(c.log_decay)[:, None] * S - c.e[:, None] * (c.c @ S)[None] + c.k[:, None] * v[None]
    return S, c.r @ S


def backward(rows: Int[Array, " R"], first: Bool[Array, " T"], c: Coefficients) -> Float[Array, "R T"]:
    """Rows of A: the transposed recurrence, which carries each row's r back to the keys. Memory R (K + T)."""
    queries = c.r[rows]

    def back(r: Array, at: tuple[Array, Array, Coefficients]) -> tuple[Array, Array]:
        j, first, c = at
        r = jnp.where((rows == j)[:, None], queries, r)
        before = r * jnp.exp(c.log_decay)[None] - (r @ c.e)[:, None] * c.c[None]
        return jnp.where(first, 0, before), r @ c.k

    sources = jnp.arange(len(first), dtype=rows.dtype), first, c
    return lax.scan(back, jnp.zeros_like(queries), sources, reverse=True)[1].T


class Chunk(NamedTuple):
    """A chunk of C positions as a map of the state S before it: y = reads @ S + direct, and S <- carries @ S +
    writes."""

    reads: Float[Array, "C K"]
    direct: Float[Array, "C V"]
    carries: Float[Array, "K K"]
    writes: Float[Array, "K V"]


def chunked(
    first: Bool[Array, " T"], c: Coefficients, v: Float[Array, "T V"], chunk: int
) -> tuple[Float[Array, "K V"], Float[Array, "T V"]]:
    """The state after all positions, and what r reads at each: a scan across chunks, quadratic within them."""
    T = len(v)
    C = max(1, min(chunk, T))

    def cut(a: Array) -> Array:
        # Padded with zeros: nothing is written or removed, and a log-decay of 0 leaves the state unchanged.
        return jnp.pad(a, ((0, -T % C), *((0, 0),) * (a.ndim - 1))).reshape(-1, C, *a.shape[1:])

    chunks = jax.vmap(_chunk)(*jax.tree.map(cut, (first, c, v)))

    def advance(S: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        return at[0] @ S + at[1], S

    S, before = lax.scan(advance, jnp.zeros_like(chunks.writes[0]), (chunks.carries, chunks.writes))
    return S, (chunks.reads @ before + chunks.direct).reshape(-1, v.shape[1])[:T]


def _chunk(first: Array, c: Coefficients, v: Array) -> Chunk:
    C = len(v)
    documents = jnp.cumsum(first)
    same, continues = documents[:, None] == documents[None], (documents == 0)[:, None]
    up_to_row, before_row = same & jnp.tri(C, dtype=bool), same & jnp.tri(C, k=-1, dtype=bool)
    # Products of decays up to each position, within its document. A decay is at least 0.545, so that dividing by the
    # product over a chunk is safe; the authors' kernels do so too.
    log_products = jnp.matmul(up_to_row.astype(v.dtype), c.log_decay, precision="highest")
    reading, removing = c.r * jnp.exp(log_products), c.c * jnp.exp(log_products - c.log_decay)
    written, erased = c.k * jnp.exp(-log_products), c.e * jnp.exp(-log_products)

    def products(a: Array, b: Array, mask: Array) -> Array:
        return jnp.where(mask, a @ b.T, 0)

    # u_i = S_(i-1)^T c_i, what is removed at i, solves a triangular system: u = inputs + forgets @ S.
    system = jnp.eye(C, dtype=v.dtype) + products(removing, erased, before_row)
    right = jnp.concatenate([products(removing, written, before_row) @ v, jnp.where(continues, removing, 0)], axis=1)
    solved = solve_triangular(system, right, lower=True, unit_diagonal=True)
    inputs, forgets = jnp.split(solved, [v.shape[1]], axis=1)
    to_end = jnp.where(same[-1][:, None], jnp.exp(log_products[-1])[None], 0)
    written_at_end, erased_at_end = (to_end * written).T, (to_end * erased).T
    of_erased = products(reading, erased, up_to_row)
    return Chunk(
        jnp.where(continues, reading, 0) - of_erased @ forgets,
        products(reading, written, up_to_row) @ v - of_erased @ inputs,
        jnp.diag(jnp.where(continues[-1], jnp.exp(log_products[-1]), 0)) - erased_at_end @ forgets,
        written_at_end @ v - erased_at_end @ inputs,
    )
