"""What gated recurrent networks share: gates that read the network's own past, and the mixing matrix they make.

Channel by channel s_i = keep_i s_(i-1) + write_i v_i and h_i = read_i s_i, where gates and candidates v_i are
functions of x_i and h_(i-1). So h = A v with A_ij = read_i (product of keep over j < m <= i) write_j: no more than
algebra, but v is no filter of one position, hence the kind "conditional".
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, runs_and_positions
from jaxwalk.aggregates._diagonal import rows_of
from jaxwalk.filters import Key, Linear, held, module, tanh_gate, wide


class Gates(NamedTuple):
    """The factors of one position, in each channel, in at least float32."""

    value: Float[Array, "*n H"]
    keep: Float[Array, "*n H"]
    write: Float[Array, "*n H"]
    read: Float[Array, "*n H"]


class State(NamedTuple):
    """h first, and what else the cell remembers, in at least float32."""

    memory: Float[Array, "N H"]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class RecurrentNetwork(Aggregate):
    """The recurrence above; G is the H channels of the hidden state. A family says what its `cell` is.

    Held are all gates, and tanh(a) / a, which leaves the recurrence affine in the inputs. Only the product with the
    hidden state is in the scan; that with the inputs is taken for all positions before.
    """

    granularity: ClassVar[Literal["head", "channel", "state"]] = "channel"
    kind: ClassVar[Literal["exact", "conditional", "none"]] = "conditional"
    memories: ClassVar[int]
    """N, the vectors that the cell remembers."""

    reads: ClassVar[frozenset[str]] = frozenset({"input"})

    input: Linear = nnx.data()
    """To the arguments of all gates and of the candidate, side by side."""
    recurrent: Linear = nnx.data()
    """Likewise from the hidden state."""
    out: Linear = nnx.data()

    @abc.abstractmethod
    def cell(
        self, memory: Float[Array, "N H"], given: Float[Array, " E"], hold: bool
    ) -> tuple[Float[Array, "N H"], Gates]:
        """The next memory and the factors that led to it. given: what the inputs give the gates."""

    def _given(self, x: Array) -> Array:
        return jax.vmap(self.input)(x).astype(wide(x.dtype))

    def _from_hidden(self, h: Array) -> Array:
        return self.recurrent(h.astype(self.recurrent.weight.dtype)).astype(h.dtype)

    def _run(
        self, x: Array, segments: Array | None, of: Callable[[Array, Gates], Any], hold: bool = False
    ) -> tuple[Array, Any]:
        """The last memory, and `of` each position's memory and factors."""

        def step(memory: Array, at: tuple[Array, Array]) -> tuple[Array, Any]:
            given, first = at
            memory, gates = self.cell(jnp.where(first, 0, memory), given, hold)
            return memory, of(memory, gates)

        _, positions = runs_and_positions(segments, len(x))
        return lax.scan(step, self.init_state(0).memory, (self._given(x), positions == 0))

    def values(
        self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None, *, hold: bool = False
    ) -> Float[Array, "H T 1"]:
        _, v = self._run(x, segments, lambda memory, gates: gates.value, hold)
        return v.astype(x.dtype).T[..., None]

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Int[Array, " T"] | None = None
    ) -> Float[Array, "H R T"]:
        rows = jnp.arange(len(x)) if rows is None else rows
        _, (_, keep, write, read) = self._run(x, segments, lambda memory, gates: gates)
        first = (runs_and_positions(segments, len(x))[1] == 0)[:, None]
        return rows_of(rows, jnp.where(first, 0, keep), write, read[rows]).transpose(2, 1, 0)

    def readout(self, y: Float[Array, "H R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[..., 0].T)

    def __call__(self, x: Float[Array, "T D"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        return self._parallel(x, segments)[1]

    def _parallel(self, x: Array, segments: Array | None) -> tuple[Array, Array]:
        memory, h = self._run(x, segments, lambda memory, gates: memory[0])
        return memory, jax.vmap(self.out)(h.astype(x.dtype))

    def init_state(self, length: int) -> State:
        weight = self.recurrent.weight
        return State(jnp.zeros((self.memories, len(weight)), wide(weight.dtype)), jnp.array(0), jnp.array(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        memory, y = self._parallel(x, None)
        return y, State(memory, jnp.array(len(x)), jnp.array(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        memory, _ = self.cell(state.memory, self._given(x[None])[0], False)
        position = state.position + 1
        y = self.out(memory[0].astype(x.dtype))
        return State(memory, position, state.length), jnp.where(position <= state.length, y, jnp.nan)


def recurrent_weights(hidden: int, gates: int, *, bias: bool, key: Key) -> Linear:
    """An orthogonal matrix for each gate, side by side (Saxe et al., arXiv 1312.6120); zero bias (or none)."""
    square = jax.random.orthogonal(key, hidden, (gates,), jnp.float32)
    return Linear(
        square.transpose(1, 0, 2).reshape(hidden, -1), jnp.zeros(gates * hidden, jnp.float32) if bias else None
    )


def tanh(a: Float[Array, "*n"], hold: bool) -> Float[Array, "*n"]:
    """tanh(a); if `hold`, as the constant tanh(a) / a times a."""
    return held(tanh_gate(a), hold) * a if hold else jnp.tanh(a)
