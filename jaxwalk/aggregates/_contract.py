"""The interface of aggregates, and the conventions for documents that all of them share."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from jaxwalk.filters import held, indices

Memory = Any
"""What an aggregate carries from position to position in decoding: a pytree of arrays of fixed shapes."""
Count = Int[Array, ""] | int | None
"""The number of positions before the padding; None if there is no padding."""


class NoMixingError(TypeError):
    """Raised if a mixing matrix is requested from an aggregate that has none."""


class Documents(NamedTuple):
    """The documents that are packed into a sequence.

    Attributes:
        ids: [T], the document of each position, counted from 0, or None if there is only one document. A segment id
            that recurs after a different one starts a new document.
        position: [T], the position within its document, counted from 0.
    """

    ids: Int[Array, " T"] | None
    position: Int[Array, " T"]

    @property
    def first(self) -> Bool[Array, " T"]:
        """[T], whether each position is the first of its document."""
        return self.position == 0

    def visible(self, rows: Int[Array, " R"]) -> Bool[Array, "R T"]:
        """[i, j]: whether position rows[i] may depend on position j, an earlier or equal one of the same document."""
        return causal_mask(rows, indices(len(self.position)), self.ids)


Segments = Int[Array, " T"] | Documents | None
"""Segment ids [T], or the `Documents` derived from them; None stands for a single document."""


def documents_of(segments: Segments, length: int) -> Documents:
    """The documents of a sequence of `length` positions."""
    if isinstance(segments, Documents):
        return segments
    index = indices(length)
    if segments is None:
        return Documents(None, index)
    border = jnp.concatenate([jnp.ones(1, bool), segments[1:] != segments[:-1]])
    start = jax.lax.cummax(jnp.where(border, index, 0))
    return Documents(jnp.cumsum(border, dtype=jnp.int32) - 1, index - start)


class State(NamedTuple):
    """The decoding state of one aggregate.

    Attributes:
        memory: what the aggregate carries from position to position.
        position: the number of positions processed so far.
        length: the maximum number of positions.
    """

    memory: Memory
    position: Int[Array, ""]
    length: Int[Array, ""]


class Aggregate(nnx.Module, abc.ABC):
    """A causal combination of positions: y_i = sum over j <= i of A_ij v_j, then a position-wise readout.

    The values v are computed position by position, and the mixing matrix A from an association between positions.
    There are G mixing matrices, each for values of K channels. The tests check these laws for every aggregate:

    - `readout(mixing(x) @ values(x), x)`, `__call__(x)` and decoding step by step are equal.
    - No position depends on a later one, and none on another document.
    - The output for a prefix is the prefix of the output.
    - `held` is affine in x.

    A family implements `values`, `mixing_rows` and `readout`; everything else follows from these. If there is a faster
    parallel form than A v, or a memory smaller than all inputs, it also implements `parallel`, `init_memory` and
    `advance`. A family of kind "none" implements only these last three, and has no held decomposition.

    Attributes:
        granularity: what each A belongs to: a "head", whose K channels share it; a "channel", so that K = 1; or an
            element of the "state", where a channel is a sum over several elements.
        kind: what A means. "exact": y = A v, where v_j is a function of position j alone, so that A is all that passes
            between positions. "conditional": y = A v, but v_j itself depends on positions before j, as in a recurrent
            network whose gates read its past. "none": there is no such A.
        decays: the names of the array fields that weight decay applies to. Submodules declare their own.
        reads: the names of the `Linear` fields that read the residual stream, or none if it is also read coordinate by
            coordinate. A rotation of the embedding space is absorbed by rotating these fields and those in `writes`.
        writes: the names of the `Linear` fields that write to the residual stream.
        varying: the static fields that may differ between stacked layers (see `setting`): {name: neutral value}.
    """

    granularity: Literal["head", "channel", "state"] = "head"
    kind: Literal["exact", "conditional", "none"] = "exact"
    decays: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset({"out"})
    varying: Mapping[str, Any] = {}

    # To be implemented by a family.

    def values(self, x: Float[Array, "T D"], segments: Segments = None, *, hold: bool = False) -> Float[Array, "G T K"]:
        """The vectors that A combines.

        Args:
            x: [T, D], the inputs.
            segments: the documents; only conditional values depend on them.
            hold: whether to hold the data-dependent coefficients of the values.

        Returns:
            [G, T, K].

        Raises:
            NoMixingError: if the kind is "none".
        """
        raise self._no_mixing_error("values")

    def mixing_rows(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"], documents: Documents
    ) -> Float[Array, "G R T"]:
        """The requested rows of A.

        Args:
            x: [T, D], the inputs.
            rows: [R], the positions of the rows.
            documents: the documents of the sequence.

        Returns:
            [G, R, T], zero where a position may not depend on another.

        Raises:
            NoMixingError: if the kind is "none".
        """
        raise self._no_mixing_error("mixing matrix")

    def readout(self, y: Float[Array, "G R K"], x: Float[Array, "R D"], *, hold: bool = False) -> Float[Array, "R D"]:
        """The output of each position, given its combined values and its input.

        Args:
            y: [G, R, K], the combined values A v at R positions.
            x: [R, D], the inputs at the same positions.
            hold: whether to hold the data-dependent coefficients of the readout.

        Returns:
            [R, D].

        Raises:
            NoMixingError: if the kind is "none".
        """
        raise self._no_mixing_error("readout")

    def parallel(
        self, x: Float[Array, "T D"], documents: Documents, *, count: Count = None, hold: bool = False
    ) -> tuple[Float[Array, "T D"], Memory]:
        """The outputs of all positions at once, and what `allocate` needs to construct the memory after them.

        Args:
            x: [T, D], the inputs.
            documents: the documents of the sequence.
            count: the number of positions before the padding, after which the memory is taken.
            hold: whether to hold all data-dependent coefficients, including A.

        Returns:
            The outputs [T, D], and the argument `memory` of `allocate`.
        """
        A = held(self.mixing(x, segments=documents), hold)
        return self.apply_mixing(x, A, documents, hold=hold), x

    def init_memory(self, length: int) -> Memory:
        """The memory before the first of at most `length` positions. By default it is all inputs, [length, D]."""
        leaf = jax.tree.leaves(self)[0]
        return jnp.zeros((length, self.width), leaf.dtype)  # type: ignore[attr-defined]  # such families have a width

    def advance(
        self, memory: Memory, x: Float[Array, " D"], position: Int[Array, ""]
    ) -> tuple[Memory, Float[Array, " D"]]:
        """Process the next position.

        Args:
            memory: the memory before it.
            x: [D], its input.
            position: its index, counted from 0.

        Returns:
            The memory after it, and its output [D].
        """
        memory = put(memory[None], position, x[None])[0]
        return memory, self.at(memory, jnp.minimum(position, len(memory) - 1))

    def allocate(self, memory: Memory, length: int, count: Count = None) -> Memory:
        """The memory from `parallel`, completed and padded to the shapes of `init_memory(length)`.

        Args:
            memory: the second result of `parallel`.
            length: the maximum number of positions.
            count: the number of positions before the padding, as given to `parallel`.
        """

        def fit(empty: Array, filled: Array) -> Array:
            if empty.shape == filled.shape:
                return filled
            return jax.lax.dynamic_update_slice(empty, filled.astype(empty.dtype), (0,) * empty.ndim)

        return jax.tree.map(fit, self.init_memory(length), memory)

    def setting(self) -> Any:
        """The `varying` fields as arrays, for a scan over layers that differ in them; None without such fields.

        A family with varying fields also has a data field `scanned`, None by default, which takes precedence over them.
        """
        return None

    @classmethod
    def common_setting(cls, values: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """The `varying` fields of a stack of layers that have these `values`. They determine the size of its memory."""
        return tuple(cls.varying.values())

    def plain(self) -> "Aggregate":
        """The same aggregate without fused kernels, which lack forward-mode derivatives."""
        return self

    # Derived from the above.

    def mixing(
        self, x: Float[Array, "T D"], rows: Int[Array, " R"] | None = None, segments: Segments = None
    ) -> Float[Array, "G R T"]:
        """The mixing matrices A.

        Args:
            x: [T, D], the inputs.
            rows: [R], the positions of the requested rows; None for all.
            segments: [T], the document of each position; None for a single document.

        Returns:
            [G, R, T].

        Raises:
            NoMixingError: if the kind is "none".
        """
        rows = indices(len(x)) if rows is None else rows.astype(jnp.int32)
        return self.mixing_rows(x, rows, documents_of(segments, len(x)))

    def __call__(self, x: Float[Array, "T D"], segments: Segments = None) -> Float[Array, "T D"]:
        """The outputs [T, D] of all positions."""
        return self.parallel(x, documents_of(segments, len(x)))[0]

    def held(self, x: Float[Array, "T D"], segments: Segments = None) -> Float[Array, "T D"]:
        """The outputs [T, D] with all data-dependent coefficients held: the same values, but affine in x."""
        return self.parallel(x, documents_of(segments, len(x)), hold=True)[0]

    def apply_mixing(
        self, x: Float[Array, "T D"], mixing: Float[Array, "G T T"], segments: Segments = None, *, hold: bool = False
    ) -> Float[Array, "T D"]:
        """The outputs [T, D] with `mixing` [G, T, T] in place of A: readout(mixing @ values(x), x)."""
        values = self.values(x, segments, hold=hold)
        return self.readout(mixing.astype(values.dtype) @ values, x, hold=hold)

    def at(
        self, x: Float[Array, "T D"], position: Int[Array, ""], segments: Segments = None, *, hold: bool = False
    ) -> Float[Array, " D"]:
        """The output [D] at one position. If A is exact, only its row for that position is computed."""
        documents = documents_of(segments, len(x))
        if self.kind != "exact":  # conditional values are sequential, so one row costs as much as all
            return self.parallel(x, documents, hold=hold)[0][position]
        A = held(self.mixing(x, position[None], documents), hold)
        values = self.values(x, documents, hold=hold)
        return self.readout(A.astype(values.dtype) @ values, x[position][None], hold=hold)[0]

    def init_state(self, length: int) -> State:
        """The decoding state before the first of at most `length` positions."""
        return State(self.init_memory(length), jnp.int32(0), jnp.int32(length))

    def prefill(self, x: Float[Array, "P D"], length: int) -> tuple[Float[Array, "P D"], State]:
        """The outputs [P, D] for a prefix, and the state after it, for at most `length` positions in total."""
        y, memory = self.parallel(x, documents_of(None, len(x)))
        return y, State(self.allocate(memory, length), jnp.int32(len(x)), jnp.int32(length))

    def step(self, state: State, x: Float[Array, " D"]) -> tuple[State, Float[Array, " D"]]:
        """The state after the next position, and its output [D]; NaN beyond the state's length."""
        memory, y = self.advance(state.memory, x, state.position)
        y = jnp.where(state.position < state.length, y, jnp.nan)
        return State(memory, state.position + 1, state.length), y

    def state_size(self, length: int) -> int:
        """The number of scalars that decoding carries from step to step after `length` positions."""
        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: self.init_memory(length))) if a.ndim)

    def _no_mixing_error(self, name: str) -> NoMixingError:
        return NoMixingError(
            f"{type(self).__name__} has no {name}: it is not a weighted sum of values (kind {self.kind!r}). It has the "
            "parallel form, steps, walks, gradients, sensitivities and lenses; decompositions and mixing overrides "
            "need an aggregate of kind 'exact' or 'conditional'."
        )


def causal_mask(
    rows: Int[Array, " R"],
    columns: Int[Array, " C"],
    ids: Int[Array, " T"] | None = None,
    window: Int[Array, ""] | Float[Array, ""] | int | None = None,
) -> Bool[Array, "R C"]:
    """Which columns each row may depend on.

    Args:
        rows: [R], positions.
        columns: [C], positions.
        ids: [T], the document of each position; None for a single document.
        window: the number of positions that a row may depend on, itself included; None for all.

    Returns:
        [R, C]: whether the column is not after the row, in the same document, and within the window.
    """
    allowed = columns[None, :] <= rows[:, None]
    if window is not None:
        allowed &= rows[:, None] - columns[None, :] < window
    if ids is not None:
        allowed &= ids[rows][:, None] == ids[columns][None, :]
    return allowed


def put(cache: Float[Array, "G N K"], slot: Int[Array, ""], value: Float[Array, "G K"]) -> Float[Array, "G N K"]:
    """`cache` with `value` written at `slot`; unchanged if the slot is out of range."""
    return cache.at[:, slot].set(value, mode="drop", wrap_negative_indices=False)


def last(sequence: Num[Array, " T *n"], count: Count) -> Num[Array, "*n"]:
    """The element at the last position before the padding."""
    return sequence[-1] if count is None else sequence[count - 1]


def mask_padding(sequence: Float[Array, "*n T K"], count: Count) -> Float[Array, "*n T K"]:
    """`sequence` with zeros from position `count` on. Positions are the second to last axis."""
    if count is None:
        return sequence
    return jnp.where((indices(sequence.shape[-2]) < count)[:, None], sequence, 0)
