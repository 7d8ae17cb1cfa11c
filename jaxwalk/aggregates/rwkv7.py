"""The time-mixing of RWKV-7 (Peng et al., arXiv 2503.14456): a generalised delta rule with decays per channel."""

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

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, last, mask_padding
from jaxwalk.aggregates._convolution import compose_shift, shifted
from jaxwalk.aggregates._linear import direction
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import LayerNorm, Linear, held, module, wide

MAX_RATE = math.exp(-0.5)  # the largest decay rate, so that every decay is at least exp(-MAX_RATE) = 0.545


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The time-mixing of RWKV-7, with K = V = width / heads (64 in the paper)."""

    name: ClassVar[str] = "rwkv7"
    heads: int = 4
    rank: int | None = None
    """Rank of the maps to decays and learning rates. By default about 2.5 sqrt(width) and at least 32, as in the paper,
    but at most the width."""
    gate_rank: int | None = None
    """Rank of the map to the gate. By default about 5 sqrt(width), with the same bounds."""
    chunk: int = 16
    """Positions per chunk of the parallel form. It affects speed only, and need not divide the sequence length."""

    def check(self) -> Iterable[str]:
        for field in ("heads", "rank", "gate_rank", "chunk"):
            value = getattr(self, field)
            if value is not None and value < 1:
                yield f"{field}: expected at least 1, got {value}"
        if self.chunk > 64:
            yield f"chunk: expected at most 64, as decays are divided by over a chunk, got {self.chunk}"

    def init(self, *, width: int, max_length: int, layer: Any, depth: int, key: Any) -> "RWKV7":
        if width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width}, got {self.heads}.")
        K = width // self.heads
        rank, gate_rank = (
            choice or min(width, max(32, round(factor * math.sqrt(width) / 32) * 32))
            for choice, factor in ((self.rank, 2.5), (self.gate_rank, 5))
        )
        keys = jax.random.split(key, 7)
        layer_index = jnp.asarray(layer, jnp.float32)
        # The names of these two ratios, and of `zigzag`, are those of the authors' code.
        ratio_0_to_1, ratio_1_to_almost_0 = layer_index / max(depth - 1, 1), 1 - layer_index / depth
        channel = jnp.arange(width, dtype=jnp.float32)
        fraction = channel / max(width - 1, 1)
        within_head = 2 * (channel % K) / max(K - 1, 1) - 1
        zigzag = within_head * jnp.abs(within_head)

        def low_rank(key: Any, rank: int, bias: Array | None) -> tuple[Linear, Linear]:
            up = Linear.init(rank, width, bias=False, gain=0.1, key=key)
            return Linear(jnp.zeros((width, rank), jnp.float32), None), Linear(up.weight, bias)

        decay_bias = -6 + 6 * fraction ** (1 + ratio_0_to_1**0.3) + 0.5 + 2.5 * zigzag
        decay, decay_up = low_rank(keys[0], rank, decay_bias)
        rate, rate_up = low_rank(keys[1], rank, -0.19 + 0.3 * zigzag + 0.4 * (fraction - 0.5))
        gate, gate_up = low_rank(keys[2], gate_rank, None)
        # The paper has uniform weights with bounds 0.5, 0.05 and 0.5 over sqrt(width). These have equal variances.
        receptance, k, value = (
            Linear.init(width, width, bias=False, gain=bound / math.sqrt(3), key=one)
            for bound, one in zip((0.5, 0.05, 0.5), keys[3:6], strict=True)
        )
        powers = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2], jnp.float32)[:, None] * ratio_1_to_almost_0
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
            removal=0.71 - 0.1 * (fraction - 0.5),
            replacement=jnp.full(width, 1.02, jnp.float32),
            bonus=jnp.full(width, -0.04, jnp.float32),
            norm=LayerNorm(
                scale=jnp.full(width, ((layer_index + 1) / depth) ** 0.7, jnp.float32),
                bias=jnp.zeros(width, jnp.float32),
                eps=1e-5 * K,
            ),
            out=Linear.init(width, width, bias=False, gain=1 / math.sqrt(2 * depth), key=keys[6]),
            heads=self.heads,
            chunk=self.chunk,
        )


class Coefficients(NamedTuple):
    """The coefficients of the recurrence of `RWKV7`, in at least float32."""

    r: Float[Array, "*n K"]
    log_decay: Float[Array, "*n K"]
    """log w."""
    k: Float[Array, "*n K"]
    c: Float[Array, "*n K"]
    e: Float[Array, "*n K"]
    """a * c, so that the state transition is diag(w) - e c^T."""


class Memory(NamedTuple):
    """The previous input, and the states S, in at least float32."""

    previous: Float[Array, " D"]
    S: Float[Array, "H K V"]


@module
class RWKV7(Aggregate):
    """S_i = (diag(w_i) - (a_i * c_i) c_i^T) S_(i-1) + k_i v_i^T and y_i = S_i^T r_i, with a state S [K, V] per head.

    - w = exp(-exp(-1/2) sigmoid(decay_up(tanh(decay(x))))) is the decay of each key channel.
    - a = sigmoid(rate_up(rate(x))) is the learning rate.
    - c = removal * key(x), normalised to length 1 in each head, is the key whose old value is removed.
    - k = key(x) * (1 + (a - 1) * replacement) is the key of the new value v = value(x).
    - r = receptance(x) is the query.

    The output is out(g * (LayerNorm(y) + (r . (bonus * k)) v)), with the norm and the bonus per head and the gate
    g = gate_up(sigmoid(gate(x))). In all these, x stands for the token shift x_i + share * (x_(i-1) - x_i), with
    separate shares for r, w, k, v, a and g.

    Differences from the paper: there is no residual connection to the values of the first layer, as layers here cannot
    read other layers, and `out` is initialised like that of other aggregates instead of to zero.

    Mixing matrix: exact, five per head.
    1. A_ij = r_i^T (transitions after j up to i) k_j, with values value((1 - share) * x_j).
    2. The A of 1, times the shift by one position, with values value(share * x_j).
    3. The bonus on the diagonal, with the values of 1. It bypasses the norm, as does 4.
    4. The A of 3, times the shift, with the values of 2.
    5. The shift, with values x_j. It passes the previous input to the readout for g, which comes after the norm and so
       cannot be part of A. As g is held, this group does not contribute to the output.
    Held coefficients: A, g and 1/std.
    Memory: the previous input, and S.
    """

    shares: Float[Array, "6 D"] = nnx.data()
    """The share of the previous position in the token shift, for r, w, k, v, a and g."""
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

    def _token_shift(self, index: int, x: Array, previous: Array) -> Array:
        return x + self.shares[index][None] * (previous - x)

    def _split(self, y: Array) -> Array:
        """Split channels into heads, in at least float32."""
        return y.reshape(len(y), self.heads, -1).transpose(1, 0, 2).astype(wide(y.dtype))

    def _coefficients(self, x: Array, previous: Array) -> tuple[Coefficients, Array]:
        """The coefficients of the recurrence, and of the bonus, [H, T, 1]."""
        k = self._split(jax.vmap(self.key)(self._token_shift(2, x, previous)))
        decay = jax.vmap(lambda x: self.decay_up(jnp.tanh(self.decay(x))))(self._token_shift(1, x, previous))
        rate = jax.vmap(lambda x: self.rate_up(self.rate(x)))(self._token_shift(4, x, previous))
        r = self._split(jax.vmap(self.receptance)(self._token_shift(0, x, previous)))
        a = jax.nn.sigmoid(self._split(rate))
        removal, replacement, bonus = (self._split(p[None]) for p in (self.removal, self.replacement, self.bonus))
        c, k = direction(k * removal), k * (1 + (a - 1) * replacement)
        bonus = jnp.sum(r * bonus * k, axis=-1, keepdims=True)
        return Coefficients(r, -MAX_RATE * jax.nn.sigmoid(self._split(decay)), k, c, a * c), bonus

    def _gate(self, x: Array, previous: Array) -> Array:
        return jax.vmap(lambda x: self.gate_up(jax.nn.sigmoid(self.gate(x))))(self._token_shift(5, x, previous))

    def _output(self, y: Array, direct: Array, gate: Array, hold: bool = False) -> Array:
        """The output, given the combined values, and the direct term that is added after the norm, both [H, R, V]."""
        norms = jax.tree.map(lambda a: a.reshape(self.heads, -1), self.norm)
        normed = jax.vmap(lambda norm, y: jax.vmap(functools.partial(norm, hold=hold))(y))(norms, y)
        return jax.vmap(self.out)(held(gate, hold) * (normed + direct).transpose(1, 0, 2).reshape(y.shape[1], -1))

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        share = self.shares[3][None]
        current, previous = jax.vmap(self.value)((1 - share) * x), jax.vmap(self.value)(share * x)
        groups = jnp.stack([current, previous, current, previous, x]).reshape(5, len(x), self.heads, -1)
        return groups.transpose(0, 2, 1, 3).reshape(5 * self.heads, len(x), -1)

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        c, bonus = self._coefficients(x, shifted(x, 1, documents))
        A = jax.vmap(functools.partial(backward, rows, documents.first))(c)
        identity = jnp.broadcast_to(jax.nn.one_hot(rows, len(x), dtype=A.dtype), A.shape)
        direct = identity * bonus[:, rows]
        return jnp.concatenate(
            [A, compose_shift(A, 1, documents), direct, *compose_shift(jnp.stack([direct, identity]), 1, documents)]
        )

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        current, shifted_back, direct, direct_shifted_back, previous = y.reshape(5, self.heads, *y.shape[1:])
        gate = self._gate(x, previous.transpose(1, 0, 2).reshape(x.shape))
        return self._output(current + shifted_back, direct + direct_shifted_back, gate, hold)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        previous = shifted(x, 1, documents)
        c, bonus = held(self._coefficients(x, previous), hold)
        # Padding neither decays, removes nor writes, so that the last state is the one before the padding.
        c = c._replace(**{name: mask_padding(getattr(c, name), count) for name in ("log_decay", "k", "e")})
        v = self._split(jax.vmap(self.value)(self._token_shift(3, x, previous)))
        S, y = jax.vmap(functools.partial(chunked, documents.first, chunk=self.chunk))(c, v)
        y = self._output(y.astype(x.dtype), (bonus * v).astype(x.dtype), self._gate(x, previous), hold)
        return y, Memory(last(x, count), S)

    def init_memory(self, length: int) -> Any:
        previous, K = jnp.zeros_like(self.bonus), self.bonus.shape[-1] // self.heads
        return Memory(previous, jnp.zeros((self.heads, K, K), wide(previous.dtype)))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        current, previous = x[None], memory.previous[None]
        c, bonus = self._coefficients(current, previous)
        v = self._split(jax.vmap(self.value)(self._token_shift(3, current, previous)))
        S, y = jax.vmap(forward)(memory.S, *jax.tree.map(lambda a: a[:, 0], (c, v)))
        y = self._output(y[:, None].astype(x.dtype), (bonus * v).astype(x.dtype), self._gate(current, previous))[0]
        return Memory(x, S), y


# The three algorithms, for one head.


def forward(S: Float[Array, "K V"], c: Coefficients, v: Float[Array, " V"]) -> tuple[Array, Array]:
    """The state after the next position, and what r reads from it."""
    S = jnp.exp(c.log_decay)[:, None] * S - c.e[:, None] * (c.c @ S)[None] + c.k[:, None] * v[None]
    return S, c.r @ S


def backward(rows: Int[Array, " R"], first: Bool[Array, " T"], c: Coefficients) -> Float[Array, "R T"]:
    """Rows of A by the transposed recurrence, from each row's r back to the keys. It needs memory for R (K + T)."""
    queries = c.r[rows]

    def step_back(r: Array, source: tuple[Array, Array, Coefficients]) -> tuple[Array, Array]:
        j, first, c = source
        r = jnp.where((rows == j)[:, None], queries, r)
        earlier = r * jnp.exp(c.log_decay)[None] - (r @ c.e)[:, None] * c.c[None]
        return jnp.where(first, 0, earlier), r @ c.k

    sources = jnp.arange(len(first), dtype=rows.dtype), first, c
    return lax.scan(step_back, jnp.zeros_like(queries), sources, reverse=True)[1].T


class Chunk(NamedTuple):
    """A chunk of C positions as a function of the state S before it.

    The outputs are reads @ S + direct, and the state after it is transition @ S + writes.
    """

    reads: Float[Array, "C K"]
    direct: Float[Array, "C V"]
    transition: Float[Array, "K K"]
    writes: Float[Array, "K V"]


def chunked(
    first: Bool[Array, " T"], c: Coefficients, v: Float[Array, "T V"], chunk: int
) -> tuple[Float[Array, "K V"], Float[Array, "T V"]]:
    """The last state, and what r reads at each position: all pairs within a chunk, and a scan across chunks."""
    T = len(v)
    C = max(1, min(chunk, T))

    def split(a: Array) -> Array:
        # Padding with zeros writes and removes nothing, and a log-decay of 0 leaves the state unchanged.
        return jnp.pad(a, ((0, -T % C), *((0, 0),) * (a.ndim - 1))).reshape(-1, C, *a.shape[1:])

    chunks = jax.vmap(_chunk)(*jax.tree.map(split, (first, c, v)))

    def advance(S: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        transition, writes = chunk
        return transition @ S + writes, S

    S, initial = lax.scan(advance, jnp.zeros_like(chunks.writes[0]), (chunks.transition, chunks.writes))
    return S, (chunks.reads @ initial + chunks.direct).reshape(-1, v.shape[1])[:T]


def _chunk(first: Array, c: Coefficients, v: Array) -> Chunk:
    C = len(v)
    documents = jnp.cumsum(first)
    same, continues = documents[:, None] == documents[None], (documents == 0)[:, None]
    up_to_row, before_row = same & jnp.tri(C, dtype=bool), same & jnp.tri(C, k=-1, dtype=bool)
    # Logarithms of the products of decays up to each position, within its document. As a decay is at least 0.545,
    # dividing by the product over a chunk is safe, as in the authors' kernels.
    log_products = jnp.matmul(up_to_row.astype(v.dtype), c.log_decay, precision="highest")
    reading, removing = c.r * jnp.exp(log_products), c.c * jnp.exp(log_products - c.log_decay)
    written, erased = c.k * jnp.exp(-log_products), c.e * jnp.exp(-log_products)

    def products(a: Array, b: Array, mask: Array) -> Array:
        return jnp.where(mask, a @ b.T, 0)

    # What is removed at i, u_i = S_(i-1)^T c_i, is the solution of a triangular system: u = inputs + from_state @ S.
    system = jnp.eye(C, dtype=v.dtype) + products(removing, erased, before_row)
    rhs = jnp.concatenate([products(removing, written, before_row) @ v, jnp.where(continues, removing, 0)], axis=1)
    solution = solve_triangular(system, rhs, lower=True, unit_diagonal=True)
    inputs, from_state = jnp.split(solution, [v.shape[1]], axis=1)
    to_end = jnp.where(same[-1][:, None], jnp.exp(log_products[-1])[None], 0)
    written_at_end, erased_at_end = (to_end * written).T, (to_end * erased).T
    erased_scores = products(reading, erased, up_to_row)
    return Chunk(
        jnp.where(continues, reading, 0) - erased_scores @ from_state,
        products(reading, written, up_to_row) @ v - erased_scores @ inputs,
        jnp.diag(jnp.where(continues[-1], jnp.exp(log_products[-1]), 0)) - erased_at_end @ from_state,
        written_at_end @ v - erased_at_end @ inputs,
    )
