"""The time-mixing of RWKV-7 (Peng et al., arXiv 2503.14456): a generalised delta rule in a state that decays."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

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

    def check(self) -> Iterable[str]:
        for what in ("heads", "rank", "gate_rank"):
            value = getattr(self, what)
            if value is not None and value < 1:
                yield f"{what}: expected at least 1, got {value}"

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
        )


class Coefficients(NamedTuple):
    """All that A is made of, head by head, in at least float32. A document begins with decays and `reads` of 0."""

    r: Float[Array, "*T H K"]
    decay: Float[Array, "*T H K"]
    k: Float[Array, "*T H K"]
    """What values are written by."""
    reads: Float[Array, "*T H K"]
    """The direction whose old value is removed"""
    erases: Float[Array, "*T H K"]
    """and that direction times the learning rates."""
    bonus: Float[Array, "*T H"]


class State(NamedTuple):
    """The input before, and the matrices S in at least float32."""

    before: Float[Array, " D"]
    S: Float[Array, "H K V"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class RWKV7(Aggregate):
    """S_i = (diag(w_i) - (a_i * c_i) c_i^T) S_(i-1) + k_i v_i^T and y_i = S_i^T r_i in each head, S of [K, V].

    w = exp(-exp(-1/2) sigmoid(decay_up(tanh(decay(x))))), in each key channel; a = sigmoid(rate_up(rate(x))), the
    learning rates; c = removal * key(x) over its length in each head; k = key(x) * (1 + (a - 1) * replacement). Each
    of r, w, k, v, a and the gate g = gate_up(sigmoid(gate(x))) takes for x a mix x_i + share * (x_(i-1) - x_i), with
    shares of its own ("token shift"). The output is out(g * (LayerNorm(y) + (r . (bonus * k)) v)), head by head up to
    the sum.

    Kind of A: exact. G is 5 times the heads: value((1 - share) * x_j) with A_ij = r_i^T (transitions after j up to i)
    k_j; value(share * x_j) with that A moved back by a position; the same two values with the bonus on the diagonal,
    and that moved back, which the norm does not see; and x_j itself with A the shift by a position. That last carries
    the token before to the readout, which takes g from it. g comes after the norm, so that it cannot be in A; held, it
    is constant, and these heads add nothing. Held are g and 1 / std.

    Left out is the residual of the first layer's values, which makes the layers one network: a layer is alone here.
    `out` starts as elsewhere here, which the paper starts at zero.
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

    def _mix(self, number: int, x: Array, before: Array) -> Array:
        return x + self.shares[number][None] * (before - x)

    def _split(self, y: Array) -> Array:
        """Heads apart, in at least float32."""
        return y.reshape(len(y), self.heads, -1).astype(wide(y.dtype))

    def _coefficients(self, x: Array, before: Array, first: Array) -> Coefficients:
        k = jax.vmap(self.key)(self._mix(2, x, before))
        decay = jax.vmap(lambda x: self.decay_up(jnp.tanh(self.decay(x))))(self._mix(1, x, before))
        rate = jax.vmap(lambda x: self.rate_up(self.rate(x)))(self._mix(4, x, before))
        r = self._split(jax.vmap(self.receptance)(self._mix(0, x, before)))
        w, a = jnp.exp(-FASTEST * jax.nn.sigmoid(self._split(decay))), jax.nn.sigmoid(self._split(rate))
        removal, replacement, bonus = (self._split(p[None]) for p in (self.removal, self.replacement, self.bonus))
        reads, k = direction(self._split(k) * removal), self._split(k) * (1 + (a - 1) * replacement)
        first = first[:, None, None]
        return Coefficients(
            r, jnp.where(first, 0, w), k, jnp.where(first, 0, reads), a * reads, jnp.sum(r * bonus * k, axis=-1)
        )

    def _gate(self, x: Array, before: Array) -> Array:
        return jax.vmap(lambda x: self.gate_up(jax.nn.sigmoid(self.gate(x))))(self._mix(5, x, before))

    def _output(self, y: Array, direct: Array, gate: Array, hold: bool = False) -> Array:
        """From what is combined, and what is added after the norm, both [R, H, V]."""
        R, H, V = y.shape
        norms = jax.tree.map(lambda a: a.reshape(H, V), self.norm)
        normed = jax.vmap(jax.vmap(lambda norm, y: norm(y, hold=hold)), (None, 0))(norms, y)
        return jax.vmap(self.out)(held(gate, hold) * (normed + direct).reshape(R, -1))

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
        c = self._coefficients(x, shifted(x, 1, segments), positions == 0)
        same = (rows[:, None] == jnp.arange(len(x))[None])[None].astype(c.r.dtype)
        A, direct = backward(rows, c), same * c.bonus[rows].T[..., None]
        before = [moved_back(a, 1, segments) for a in (A, direct, jnp.broadcast_to(same, A.shape))]
        return jnp.concatenate([A, before[0], direct, *before[1:]])

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        own, shift, direct, direct_shift, before = y.reshape(5, self.heads, *y.shape[1:]).transpose(0, 2, 1, 3)
        gate = self._gate(x, before.reshape(len(x), -1))
        return self._output(own + shift, direct + direct_shift, gate, hold)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        _, positions = runs_and_positions(segments, len(x))
        return self._forward(self.init_state(0).S, x, shifted(x, 1, segments), positions == 0)[1]

    def _forward(self, S: Array, x: Array, before: Array, first: Array) -> tuple[Array, Array]:
        """The state after these positions, and their outputs."""
        c = self._coefficients(x, before, first)
        v = self._split(jax.vmap(self.value)(self._mix(3, x, before)))
        S, y = lax.scan(forward, S, (c, v))
        y, direct = y.astype(x.dtype), (c.bonus[..., None] * v).astype(x.dtype)
        return S, self._output(y, direct, self._gate(x, before))

    def init_state(self, length: int) -> State:
        before, K = jnp.zeros_like(self.bonus), len(self.bonus) // self.heads
        return State(before, jnp.zeros((self.heads, K, K), wide(before.dtype)), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        S, y = self._forward(self.init_state(0).S, x, shifted(x, 1), jnp.arange(len(x)) == 0)
        return y, State(x[-1], S, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        S, y = self._forward(state.S, x[None], state.before[None], jnp.zeros(1, bool))
        position = state.position + 1
        return State(x, S, position, state.length), jnp.where(position <= state.length, y[0], jnp.nan)


def forward(S: Float[Array, "H K V"], at: tuple[Coefficients, Float[Array, "H V"]]) -> tuple[Array, Array]:
    """One position of all heads: the next state, and what r reads of it."""
    c, v = at
    removed = jnp.einsum("hk,hkv->hv", c.reads, S)
    S = c.decay[:, :, None] * S - c.erases[:, :, None] * removed[:, None] + c.k[:, :, None] * v[:, None]
    return S, jnp.einsum("hk,hkv->hv", c.r, S)


def backward(rows: Int[Array, " R"], c: Coefficients) -> Float[Array, "H R T"]:
    """Rows of A: the transposed recurrence, which carries each row's r back to the keys."""
    asked = c.r[rows].transpose(1, 0, 2)

    def back(r: Array, at: tuple[Array, Coefficients]) -> tuple[Array, Array]:
        j, c = at
        r = jnp.where((rows == j)[None, :, None], asked, r)
        removed = jnp.einsum("hrk,hk->hr", r, c.erases)
        carried = r * c.decay[:, None] - removed[..., None] * c.reads[:, None]
        return carried, jnp.einsum("hrk,hk->hr", r, c.k)

    sources = jnp.arange(len(c.r), dtype=rows.dtype), c
    return lax.scan(back, jnp.zeros_like(asked), sources, reverse=True)[1].transpose(1, 2, 0)
