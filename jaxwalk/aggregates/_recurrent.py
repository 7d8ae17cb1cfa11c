"""Gated recurrent networks (GRU, LSTM), whose gates depend on the hidden state, and their mixing matrices.

In each channel, s_i = keep_i s_(i-1) + write_i v_i and h_i = read_i s_i, where the gates and the candidates v_i are
functions of x_i and h_(i-1). Hence h = A v with A_ij = read_i (keep_(j+1) ... keep_i) write_j. This identity is exact,
but v_j is not a function of position j alone, so A is of kind "conditional".
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, Count, Documents, Segments, documents_of, last
from jaxwalk.aggregates._diagonal import recurrence_rows
from jaxwalk.filters import Key, Linear, held, module, tanh_gate, wide


class Gates(NamedTuple):
    """The candidates and gates of a position in each channel, in at least float32."""

    value: Float[Array, "*n H"]
    keep: Float[Array, "*n H"]
    write: Float[Array, "*n H"]
    read: Float[Array, "*n H"]


@module
class RecurrentNetwork(Aggregate):
    """A gated recurrent network, as defined in the docstring of this module. A family defines its `cell`.

    Only the product with the hidden state is inside the scan; the product with the inputs is computed for all positions
    beforehand.

    Mixing matrix: conditional, one per channel of the hidden state.
    Held coefficients: all gates, and the factors tanh(a) / a, so that the recurrence is affine in the inputs.
    Memory: the vectors that the cell carries, starting with h, in at least float32.
    """

    granularity = "channel"
    kind = "conditional"
    memories: ClassVar[int]
    """N, the number of vectors that the cell carries."""
    reads = frozenset({"input"})

    input: Linear = nnx.data()
    """From the input to the arguments of all gates and of the candidate, concatenated."""
    recurrent: Linear = nnx.data()
    """The same from the hidden state."""
    out: Linear = nnx.data()

    @abc.abstractmethod
    def cell(
        self, memory: Float[Array, "N H"], inputs: Float[Array, " E"], hold: bool
    ) -> tuple[Float[Array, "N H"], Gates]:
        """The next memory and the gates that produced it, given `inputs`, the output of `input` at the position."""

    def _inputs(self, x: Array) -> Array:
        return jax.vmap(self.input)(x).astype(wide(x.dtype))

    def _from_hidden(self, h: Array) -> Array:
        return self.recurrent(h.astype(self.recurrent.weight.dtype)).astype(h.dtype)

    def _run(self, x: Array, documents: Documents, collect: Callable[[Array, Gates], Any], hold: bool = False) -> Any:
        """`collect` of the memory after each position and of its gates."""

        def step(memory: Array, position: tuple[Array, Array]) -> tuple[Array, Any]:
            inputs, first = position
            memory, gates = self.cell(jnp.where(first, 0, memory), inputs, hold)
            return memory, collect(memory, gates)

        return lax.scan(step, self.init_memory(len(x)), (self._inputs(x), documents.first))[1]

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "H T 1"]:
        v = self._run(x, documents_of(segments, len(x)), lambda memory, gates: gates.value, hold)
        return v.astype(x.dtype).T[..., None]

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "H R T"]:
        gates = self._run(x, documents, lambda memory, gates: gates)
        keep = jnp.where(documents.first[:, None], 0, gates.keep)
        return recurrence_rows(rows, keep, gates.write, gates.read[rows]).transpose(2, 1, 0)

    def readout(self, y: Float[Array, "H R 1"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        return jax.vmap(self.out)(y[..., 0].T)

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Any]:
        memory = self._run(x, documents, lambda memory, gates: memory, hold)
        return jax.vmap(self.out)(memory[:, 0].astype(x.dtype)), last(memory, count)

    def init_memory(self, length: int) -> Any:
        weight = self.recurrent.weight
        return jnp.zeros((self.memories, weight.shape[-2]), wide(weight.dtype))

    def advance(self, memory: Any, x: Float[Array, " D"], position: Int[Array, ""]) -> tuple[Any, Float[Array, " D"]]:
        memory, _ = self.cell(memory, self._inputs(x[None])[0], False)
        return memory, self.out(memory[0].astype(x.dtype))


def recurrent_weights(hidden: int, gates: int, *, bias: bool, key: Key) -> Linear:
    """An orthogonal matrix per gate (Saxe et al., arXiv 1312.6120), concatenated; a zero bias if `bias`."""
    orthogonal = jax.random.orthogonal(key, hidden, (gates,), jnp.float32)
    weight = orthogonal.transpose(1, 0, 2).reshape(hidden, -1)
    return Linear(weight, jnp.zeros(gates * hidden, jnp.float32) if bias else None)


def tanh(a: Float[Array, "*n"], hold: bool) -> Float[Array, "*n"]:
    """tanh(a); with `hold`, as the product of a and the held coefficient tanh(a) / a."""
    return held(tanh_gate(a), hold) * a if hold else jnp.tanh(a)
