"""The contract of an aggregate, and the document conventions that all of them share."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from jaxwalk.filters import held, indices

Memory = Any
"""What an aggregate carries from position to position: a pytree of arrays of fixed shapes."""
Count = Int[Array, ""] | int | None
"""The number of leading positions that are real, where the rest is padding; None if all are."""


class NoMixingError(TypeError):
    """An aggregate was asked for a mixing matrix that it does not have."""


class Documents(NamedTuple):
    """The documents that a sequence is packed from.

    run: [T], the index of each position's document, or None if there is one document. An id that comes back after
        another one starts a new document.
    position: [T], each position's place within its document, from 0.
    """

    run: Int[Array, " T"] | None
    position: Int[Array, " T"]

    @property
    def first(self) -> Bool[Array, " T"]:
        """Where a document begins."""
        return self.position == 0

    def visible(self, rows: Int[Array, " R"]) -> Bool[Array, "R T"]:
        """[i, j]: whether position rows[i] may look at position j: not after it, and of the same document."""
        return causal_mask(rows, indices(len(self.position)), self.run)


Segments = Int[Array, " T"] | Documents | None
"""Segment ids [T], or the documents already read from them; None is a single document."""


def documents_of(segments: Segments, length: int) -> Documents:
    """The documents of `length` positions."""
    if isinstance(segments, Documents):
        return segments
    index = indices(length)
    if segments is None:
        return Documents(None, index)
    border = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    start = jax.lax.cummax(jnp.where(border, index, 0))
    return Documents(jnp.cumsum(border, dtype=jnp.int32) - 1, index - start)


class State(NamedTuple):
    """The decoding state of one aggregate: its memory, how many positions it has seen, and the most it may see."""

    memory: Memory
    position: Int[Array, ""]
    length: Int[Array, ""]


class Aggregate(nnx.Module, abc.ABC):
    """A causal combination across positions: y_i = sum over j <= i of A_ij v_j, then a position-wise readout.

    The values v are made by a filter, the mixing matrix A by an association of positions. G is the number of heads or
    channels with an A of their own. The laws, to which the tests hold every aggregate: `readout(mixing(x) @ values(x),
    x)` equals `__call__(x)` equals the steps one by one; no position depends on a later one; nothing crosses a document
    border; a prefix gives the prefix of the output; and `held` is affine in x.

    A family implements `values`, `mixing_rows` and `readout`. Everything else follows from these; where there is a
    faster parallel form than A v, or a smaller memory than all inputs, it also implements `parallel`, `init_memory` and
    `advance`. A family of kind "none" implements only these last three, and has no held decomposition.

    Class attributes:
        granularity: what has an A of its own: a "head", whose K channels of values share it; a "channel", so that
            K = 1; or an element of the "state", where a channel is the sum of several elements.
        kind: what A means. "exact": y = A v, and v_j is a function of position j alone, so that A is all that passes
            between positions. "conditional": y = A v holds, but v_j itself depends on positions before j, as where the
            gates of a recurrent network read its past. "none": there is no such A.
        decays: the names of the array fields that weight decay applies to; those of submodules declare their own.
        reads: the names of the `Linear` fields that read the residual stream, if it is read in no other way; empty if
            it is read coordinate by coordinate. These are what turns with a rotation of the space.
        writes: the names of the `Linear` fields that write to the residual stream.
        varying: the static fields that may differ between the layers of one stack (see `setting`), by name, and a
            neutral value of each.
    """

    granularity: Literal["head", "channel", "state"] = "head"
    kind: Literal["exact", "conditional", "none"] = "exact"
    decays: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset({"out"})
    varying: Mapping[str, Any] = {}

    # What a family implements.

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        """The vectors that are combined. With `hold`, their data-dependent coefficients are constants.

        `segments` matters to conditional values only.
        """
        raise self._none("values")

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        """The stated rows of A."""
        raise self._none("mixing matrix")

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        """The output at some positions from their combined values y and inputs x, position by position."""
        raise self._none("readout")

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Memory]:
        """All positions at once, and the memory after the first `count` of them, in a form that `allocate` completes.

        With `hold`, all data-dependent coefficients are constants, A among them.
        """
        A = held(self.mixing(x, segments=documents), hold)
        return self.apply_mixing(x, A, documents, hold=hold), x

    def init_memory(self, length: int) -> Memory:
        """The memory before the first of at most `length` positions. The default remembers all inputs, [length, D]."""
        leaf = jax.tree.leaves(self)[0]
        return jnp.zeros((length, self.width), leaf.dtype)  # type: ignore[attr-defined]  # such a family has a width

    def advance(
        self, memory: Memory, x: Float[Array, " D"], position: Int[Array, ""]
    ) -> tuple[Memory, Float[Array, " D"]]:
        """The next position, which is number `position`: the memory after it, and its output."""
        memory = put(memory[None], position, x[None])[0]
        return memory, self.at(memory, jnp.minimum(position, len(memory) - 1))

    def allocate(self, memory: Memory, length: int, count: Count = None) -> Memory:
        """The memory of `parallel` in the shapes of `init_memory(length)`, with room for what follows."""

        def fit(empty: Array, filled: Array) -> Array:
            if empty.shape == filled.shape:
                return filled
            return jax.lax.dynamic_update_slice(empty, filled.astype(empty.dtype), (0,) * empty.ndim)

        return jax.tree.map(fit, self.init_memory(length), memory)

    def setting(self) -> Any:
        """The `varying` fields as arrays, for a scan over layers in which they differ.

        A family with such fields also has a data field `scanned`, None by default, that takes precedence over them.
        """
        return None

    @classmethod
    def common_setting(cls, values: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """The `varying` fields of a stack of layers with these `values`: those that its memory is sized by."""
        return tuple(cls.varying.values())

    def plain(self) -> "Aggregate":
        """The same function without fused kernels, which have no forward-mode derivative."""
        return self

    # What follows.

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Segments = None
    ) -> Float[Array, "G R T"]:
        """The mixing matrix A, or the stated rows of it."""
        rows = indices(len(x)) if rows is None else rows.astype(jnp.int32)
        return self.mixing_rows(x, rows, documents_of(segments, len(x)))

    def __call__(self, x: Float[Array, "T D"], segments: Segments = None) -> Float[Array, "T D"]:
        """The parallel form."""
        return self.parallel(x, documents_of(segments, len(x)))[0]

    def held(self, x: Float[Array, "T D"], segments: Segments = None) -> Float[Array, "T D"]:
        """The parallel form with all data-dependent coefficients held: the same value, affine in x."""
        return self.parallel(x, documents_of(segments, len(x)), hold=True)[0]

    def apply_mixing(
        self, x: Float[Array, "T D"], mixing: Float[Array, "G T T"], segments: Segments = None, *, hold: bool = False
    ) -> Float[Array, "T D"]:
        """The output if A were `mixing`: readout(mixing @ values(x), x)."""
        values = self.values(x, segments, hold=hold)
        return self.readout(mixing.astype(values.dtype) @ values, x, hold=hold)

    def at(
        self, x: Float[Array, "T D"], position: Int[Array, ""], segments: Segments = None, *, hold: bool = False
    ) -> Float[Array, " D"]:
        """The output at one position; where A is exact, by that row of it alone."""
        documents = documents_of(segments, len(x))
        if self.kind != "exact":  # conditional values are computed one after another: one row costs as much as all
            return self.parallel(x, documents, hold=hold)[0][position]
        A = held(self.mixing(x, position[None], documents), hold)
        values = self.values(x, documents, hold=hold)
        return self.readout(A.astype(values.dtype) @ values, x[position][None], hold=hold)[0]

    def init_state(self, length: int) -> State:
        """The state before the first of at most `length` positions."""
        return State(self.init_memory(length), jnp.int32(0), jnp.int32(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        """The parallel form over a prefix, and the state after it, for at most `length` positions in all."""
        y, memory = self.parallel(x, documents_of(None, len(x)))
        return y, State(self.allocate(memory, length), jnp.int32(len(x)), jnp.int32(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        """The next position. Beyond the state's length the output is NaN."""
        memory, y = self.advance(state.memory, x, state.position)
        y = jnp.where(state.position < state.length, y, jnp.nan)
        return State(memory, state.position + 1, state.length), y

    def state_size(self, length: int) -> int:
        """How many numbers are carried from step to step after `length` positions."""
        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: self.init_memory(length))) if a.ndim)

    def _none(self, what: str) -> NoMixingError:
        return NoMixingError(
            f"{type(self).__name__} has no {what}: it is no sum of weighted values (kind {self.kind!r}). It has the "
            "parallel form, steps, walks, gradients, sensitivities and lenses; decompositions and mixing overrides "
            "need an aggregate of kind 'exact' or 'conditional'."
        )


def causal_mask(
    rows: Int[Array, " R"],
    columns: Int[Array, " C"],
    runs: Int[Array, " T"] | None = None,
    window: Int[Array, ""] | Float[Array, ""] | int | None = None,
) -> Bool[Array, "R C"]:
    """Where a row may look: at columns not after it, in its own run, fewer than `window` positions back."""
    allowed = columns[None, :] <= rows[:, None]
    if window is not None:
        allowed &= rows[:, None] - columns[None, :] < window
    if runs is not None:
        allowed &= runs[rows][:, None] == runs[columns][None, :]
    return allowed


def put(cache: Float[Array, "G N K"], slot: Int[Array, ""], value: Float[Array, "G K"]) -> Float[Array, "G N K"]:
    """`cache` with `value` written at `slot`; unchanged where there is no such slot."""
    return cache.at[:, slot].set(value, mode="drop", wrap_negative_indices=False)


def last(sequence: Num[Array, " T *n"], count: Count) -> Num[Array, "*n"]:
    """The element at the last of the first `count` positions (at the last position if None)."""
    return sequence[-1] if count is None else sequence[count - 1]


def keep_first(sequence: Float[Array, "*n T K"], count: Count, fill: float = 0) -> Float[Array, "*n T K"]:
    """`sequence` with positions from `count` on replaced by `fill`; positions are the last axis but one."""
    if count is None:
        return sequence
    return jnp.where((indices(sequence.shape[-2]) < count)[:, None], sequence, fill)
