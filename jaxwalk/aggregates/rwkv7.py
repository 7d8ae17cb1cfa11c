"""The time-mixing of RWKV-7 (Peng et al., arXiv 2503.14456): a generalised delta rule in a state that decays."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._contract import Aggregate, runs_and_positions
from jaxwalk.aggregates._convolution import moved_back, shifted
from jaxwalk.aggregates._linear import direction
from jaxwalk.config import AggregateConfig, ConfigError
from jaxwalk.filters import LayerNorm, Linear, held, module, wide

FASTEST = math.exp(-0.5)  # the largest rate of decay, so that a decay is at least 0.545


@dataclass(frozen=True)
class Config(AggregateConfig):
    """The time-mixing of RWKV-7, with K = V = width / heads, which is 64 in the paper."""

    name: ClassVar[str] = "rwkv7"
    heads: int = 4
    rank: int | None = None
    """Of the maps to decays and learning rates. The default is about 2.5 sqrt(width), at least 32, as the paper says,
    and at most the width."""
    gate_rank: int | None = None
    """Of the map to the gate. The default is twice as much, likewise."""
    chunk: int = 16
    """Positions that the parallel form takes at once: a matter of speed alone. Any length of sequence will do."""

    def check(self) -> Iterable[str]:
        for what in ("heads", "rank", "gate_rank", "chunk"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"
        if self.chunk > 64:
            yield f"chunk: expected at most 64, as products of so many decays are divided by, got {self.chunk}"

    def init(self, *, width: int, max_length: int, layer: int, depth: int, key: Any) -> "RWKV7":
        if width % self.heads:
            raise ConfigError(f"heads: expected a divisor of width = {width}, got {self.heads}.")
        K = width // self.heads
        rank, gate_rank = (
            given or min(width, max(32, round(share * math.sqrt(width) / 32) * 32))
            for given, share in ((self.rank, 2.5), (self.gate_rank, 5))
        )
        keys = jax.random.split(key, 7)
        deep, shallow = layer / max(depth - 1, 1), 1 - layer / depth
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
        # Uniform up to 0.5, 0.05 and 0.5 over sqrt(width) in the paper; here normal with the same deviations.
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
                jnp.full(width, ((layer + 1) / depth) ** 0.7, jnp.float32), jnp.zeros(width, jnp.float32), 1e-5 * K
            ),
            out=Linear.init(width, width, bias=False, gain=1 / math.sqrt(2 * depth), key=keys[6]),
            heads=self.heads,
            chunk=self.chunk,
        )


class Coefficients(NamedTuple):
    """All that the recurrence is made of, values aside, in at least float32, by the names in `RWKV7`."""

    r: Float[Array, "*n K"]
    log_decay: Float[Array, "*n K"]
    """log w."""
    k: Float[Array, "*n K"]
    c: Float[Array, "*n K"]
    e: Float[Array, "*n K"]
    """a * c, so that a transition is diag(w) - e c^T."""


class State(NamedTuple):
    """The input before, and the matrices S in at least float32."""

    before: Float[Array, " D"]
    S: Float[Array, "H K V"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class RWKV7(Aggregate):
    """S_i = (diag(w_i) - (a_i * c_i) c_i^T) S_(i-1) + k_i v_i^T and y_i = S_i^T r_i in each head, S of [K, V].

    w = exp(-exp(-1/2) sigmoid(decay_up(tanh(decay(x))))) decays each key channel; a = sigmoid(rate_up(rate(x))) is
    the learning rate; c = removal * key(x), over its length in each head, is the direction whose old value goes, and
    k = key(x) * (1 + (a - 1) * replacement) the one that the new value is written by; r = receptance(x), v = value(x).
    The output is out(g * (LayerNorm(y) + (r . (bonus * k)) v)), the norm and the bonus head by head, with the gate
    g = gate_up(sigmoid(gate(x))). For x each of r, w, k, v, a and g takes a mix x_i + share * (x_(i-1) - x_i), with
    shares of its own ("token shift").

    Kind of A: exact. G is 5 times the heads: value((1 - share) * x_j) with A_ij = r_i^T (transitions after j up to i)
    k_j; value(share * x_j) with that A moved back by a position; the same two values with the bonus on the diagonal,
    and that moved back, which the norm does not see; and x_j itself with A the shift by a position. These last carry
    the token before to the readout, for g, which comes after the norm and so cannot be in A; g is held, and they add
    nothing to the output themselves. Held are g and 1 / std.

    Left out is the residual of the first layer's values, as a layer here knows of no other. `out` starts as elsewhere
    here, where the paper has zero.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "head"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "exact"

    shares: Float[Array, "6 D"] = nnx.data()
    """Of the position before in the mix, for r, w, k, v, a and g."""
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
        """Those of the recurrence, and those of the bonus, [H, T, 1]."""
        k = self._split(jax.vmap(self.key)(self._mix(2, x, before)))
        decay = jax.vmap(lambda x: self.decay_up(jnp.tanh(self.decay(x))))(self._mix(1, x, before))
        rate = jax.vmap(lambda x: self.rate_up(self.rate(x)))(self._mix(4, x, before))
        r = self._split(jax.vmap(self.receptance)(self._mix(0, x, before)))
        a = jax.nn.sigmoid(self._split(rate))
        removal, replacement, bonus = (self._split(p[None]) for p in (self.removal, self.replacement, self.bonus))
        c, k = direction(k * removal), k * (1 + (a - 1) * replacement)
        of_bonus = jnp.sum(r * bonus * k, axis=-1, keepdims=True)
        return Coefficients(r, -FASTEST * jax.nn.sigmoid(self._split(decay)), k, c, a * c), of_bonus

    def _gate(self, x: Array, before: Array) -> Array:
        return jax.vmap(lambda x: self.gate_up(jax.nn.sigmoid(self.gate(x))))(self._mix(5, x, before))

    def _output(self, y: Array, direct: Array, gate: Array, hold: bool = False) -> Array:
        """From what is combined, and what is added after the norm, both [H, R, V]."""
        norms = jax.tree.map(lambda a: a.reshape(self.heads, -1), self.norm)
        normed = jax.vmap(lambda norm, y: jax.vmap(functools.partial(norm, hold=hold))(y))(norms, y)
        return jax.vmap(self.out)(held(gate, hold) * (normed + direct).transpose(1, 0, 2).reshape(y.shape[1], -1))

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "G T K"]:
        share = self.shares[3][None]
        own, before = jax.vmap(self.value)((1 - share) * x), jax.vmap(self.value)(share * x)
        each = jnp.stack([own, before, own, before, x]).reshape(5, len(x), self.heads, -1)
        return each.transpose(0, 2, 1, 3).reshape(5 * self.heads, len(x), -1)

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "G R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        _, positions = runs_and_positions(segments, len(x))
        c, bonus = self._coefficients(x, shifted(x, 1, segments))
        A = jax.vmap(functools.partial(backward, rows, positions == 0))(c)
        same = jnp.broadcast_to(rows[:, None] == jnp.arange(len(x))[None], A.shape).astype(A.dtype)
        direct = same * bonus[:, rows]
        return jnp.concatenate(
            [A, moved_back(A, 1, segments), direct, *moved_back(jnp.stack([direct, same]), 1, segments)]
        )

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        own, shift, direct, direct_shift, before = y.reshape(5, self.heads, *y.shape[1:])
        gate = self._gate(x, before.transpose(1, 0, 2).reshape(x.shape))
        return self._output(own + shift, direct + direct_shift, gate, hold)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._parallel(x, segments)[1]

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Array]:
        first = runs_and_positions(segments, len(x))[1] == 0

        def all_of_it(c: Coefficients, v: Array) -> tuple[Array, Array]:
            return jax.vmap(functools.partial(chunked, first, chunk=self.chunk))(c, v)

        return self._through(all_of_it, x, shifted(x, 1, segments))

    def _through(self, recurrence: Callable[..., tuple[Array, Array]], x: Array, before: Array) -> tuple[Array, Array]:
        """The state after these positions, and their outputs."""
        c, bonus = self._coefficients(x, before)
        v = self._split(jax.vmap(self.value)(self._mix(3, x, before)))
        S, y = recurrence(c, v)
        return S, self._output(y.astype(x.dtype), (bonus * v).astype(x.dtype), self._gate(x, before))

    def init_state(self, length: int) -> State:
        before, K = jnp.zeros_like(self.bonus), len(self.bonus) // self.heads
        return State(before, jnp.zeros((self.heads, K, K), wide(before.dtype)), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        S, y = self._parallel(x, None)
        return y, State(x[-1], S, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        def one(c: Coefficients, v: Array) -> tuple[Array, Array]:
            S, y = jax.vmap(forward)(state.S, *jax.tree.map(lambda a: a[:, 0], (c, v)))
            return S, y[:, None]

        S, y = self._through(one, x[None], state.before[None])
        position = state.position + 1
        return State(x, S, position, state.length), jnp.where(position <= state.length, y[0], jnp.nan)


# The three algorithms, for one head.


def forward(S: Float[Array, "K V"], c: Coefficients, v: Float[Array, " V"]) -> tuple[Array, Array]:
    """One position: the next state, and what r reads of it."""
    S = jnp.exp(c.log_decay)[:, None] * S - c.e[:, None] * (c.c @ S)[None] + c.k[:, None] * v[None]
    return S, c.r @ S


def backward(rows: Int[Array, " R"], first: Bool[Array, " T"], c: Coefficients) -> Float[Array, "R T"]:
    """Rows of A: the transposed recurrence, which carries each row's r back to the keys. Memory R (K + T)."""
    asked = c.r[rows]

    def back(r: Array, at: tuple[Array, Array, Coefficients]) -> tuple[Array, Array]:
        j, first, c = at
        r = jnp.where((rows == j)[:, None], asked, r)
        before = r * jnp.exp(c.log_decay)[None] - (r @ c.e)[:, None] * c.c[None]
        return jnp.where(first, 0, before), r @ c.k

    sources = jnp.arange(len(first), dtype=rows.dtype), first, c
    return lax.scan(back, jnp.zeros_like(asked), sources, reverse=True)[1].T


class Chunk(NamedTuple):
    """A chunk of C positions as a map of the state it finds: y = reads @ S + own, and S <- carries @ S + writes."""

    reads: Float[Array, "C K"]
    own: Float[Array, "C V"]
    carries: Float[Array, "K K"]
    writes: Float[Array, "K V"]


def chunked(
    first: Bool[Array, " T"], c: Coefficients, v: Float[Array, "T V"], chunk: int
) -> tuple[Float[Array, "K V"], Float[Array, "T V"]]:
    """The state after all positions, and what r reads at each: a scan over chunks, quadratic within them."""
    T = len(v)
    C = max(1, min(chunk, T))

    def cut(a: Array) -> Array:
        # Zeros at the end: nothing is written or removed, and a log-decay of 0 leaves the state as it is.
        return jnp.pad(a, ((0, -T % C), *((0, 0),) * (a.ndim - 1))).reshape(-1, C, *a.shape[1:])

    chunks = jax.vmap(_chunk)(*jax.tree.map(cut, (first, c, v)))

    def advance(S: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        return at[0] @ S + at[1], S

    S, found = lax.scan(advance, jnp.zeros_like(chunks.writes[0]), (chunks.carries, chunks.writes))
    return S, (chunks.reads @ found + chunks.own).reshape(-1, v.shape[1])[:T]


def _chunk(first: Array, c: Coefficients, v: Array) -> Chunk:
    C = len(v)
    documents = jnp.cumsum(first)
    same, found = documents[:, None] == documents[None], (documents == 0)[:, None]
    sees, saw = same & jnp.tri(C, dtype=bool), same & jnp.tri(C, k=-1, dtype=bool)
    # Decays up to each position, of its document alone. Of a decay the least is 0.545, so that the product of a
    # chunk's can be divided by, as the authors' kernels do.
    up_to = jnp.matmul(sees.astype(v.dtype), c.log_decay, precision="highest")
    reading, removing = c.r * jnp.exp(up_to), c.c * jnp.exp(up_to - c.log_decay)
    written, erased = c.k * jnp.exp(-up_to), c.e * jnp.exp(-up_to)

    def products(a: Array, b: Array, mask: Array) -> Array:
        return jnp.where(mask, a @ b.T, 0)

    # u_i = S_(i-1)^T c_i, what is removed at i, is triangular in u: u = own + forgets @ S.
    system = jnp.eye(C, dtype=v.dtype) + products(removing, erased, saw)
    given = jnp.concatenate([products(removing, written, saw) @ v, jnp.where(found, removing, 0)], axis=1)
    own, forgets = jnp.split(solve_triangular(system, given, lower=True, unit_diagonal=True), [v.shape[1]], axis=1)
    last = jnp.where(same[-1][:, None], jnp.exp(up_to[-1])[None], 0)
    written_on, erased_on = (last * written).T, (last * erased).T
    of_erased = products(reading, erased, sees)
    return Chunk(
        jnp.where(found, reading, 0) - of_erased @ forgets,
        products(reading, written, sees) @ v - of_erased @ own,
        jnp.diag(jnp.where(found[-1], jnp.exp(up_to[-1]), 0)) - erased_on @ forgets,
        written_on @ v - erased_on @ own,
    )
