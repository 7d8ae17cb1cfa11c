"""Replacing and recording the mixing matrices of individual layers, within a single scan over the layers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxwalk.aggregates._contract import Aggregate, Documents
from jaxwalk.filters import held, indices
from jaxwalk.model.inputs import check_shape
from jaxwalk.model.stack import Layers, Place

Mixing = Float[Array, "G T T"] | Callable[[Float[Array, "G T T"]], Float[Array, "G T T"]]
"""A mixing matrix to use in place of that of a layer, or a function that computes it from that of the layer."""
Slot = tuple[int, int]
"""(block, member of its period): the layers that share one part of a compiled walk."""


class Matrices(NamedTuple):
    """The matrices to replace and to record: arguments of a compiled walk.

    Repetitions are traced, so that the same program is used for all layers of a slot.

    Attributes:
        replaced: for each slot, pairs (repetition, matrix [G, T, T]).
        recorded: for each slot, the repetitions [k].
    """

    replaced: dict[Slot, tuple[tuple[Any, Any], ...]]
    recorded: dict[Slot, Any]


class Functions(NamedTuple):
    """The functions to apply to matrices: the static part of a compiled walk.

    Attributes:
        replaced: tuples (slot, repetition, layer index, function).
    """

    replaced: tuple[tuple[Slot, int, int, Callable[[Array], Array]], ...] = ()


def plan(layers: Layers, mixing: Mapping[int, Any], record: Sequence[int]) -> tuple[Matrices, Functions]:
    """The arguments and the static part of a walk.

    Args:
        layers: the layers of the model.
        mixing: {layer index: matrix or function}, the replacements.
        record: the indices of the layers whose matrices are recorded.
    """
    replaced: dict[Slot, list[Any]] = {}
    recorded: dict[Slot, list[int]] = {}
    functions = []
    for layer_index, replacement in sorted(mixing.items()):
        block, member, repetition = layers.place(layer_index)
        if callable(replacement):
            functions.append(((block, member), int(repetition), layer_index, replacement))
        else:
            replaced.setdefault((block, member), []).append((np.int32(repetition), replacement))
    for layer_index in sorted(set(record)):
        block, member, repetition = layers.place(layer_index)
        recorded.setdefault((block, member), []).append(int(repetition))
    return (
        Matrices(
            {slot: tuple(pairs) for slot, pairs in replaced.items()},
            {slot: np.array(repetitions, np.int32) for slot, repetitions in recorded.items()},
        ),
        Functions(tuple(functions)),
    )


def recorded_order(layers: Layers, record: Sequence[int]) -> list[int]:
    """The indices of the recorded layers, in the order of the matrices from `Mixer.recorded`."""
    return sorted(set(record), key=lambda layer_index: (layers.place(layer_index)[:2], layer_index))


class Mixer:
    """Combines positions in the layers of one walk, replacing and recording mixing matrices."""

    def __init__(
        self,
        layers: Layers,
        documents: Documents,
        *,
        hold: bool = False,
        matrices: Matrices | None = None,
        functions: Functions | None = None,
        every: Callable[[Any, Array], Array] | None = None,
    ) -> None:
        """A mixer for one walk.

        Args:
            layers: the layers of the model.
            documents: the documents of the path.
            hold: whether to hold the data-dependent coefficients of aggregates.
            matrices: the matrices to replace and to record.
            functions: the functions to apply to matrices.
            every: (layer index, matrix) -> the matrix to use, applied in every layer.
        """
        self.layers, self.documents, self.hold, self.every = layers, documents, hold, every
        self.matrices = matrices or Matrices({}, {})
        self.functions = (functions or Functions()).replaced

    def buffers(self, x: Float[Array, "T D"]) -> dict[Slot, Float[Array, "k G T T"]]:
        """Empty buffers for the recorded matrices, to be carried through the layers."""
        buffers = {}
        for (block, member), repetitions in self.matrices.recorded.items():
            aggregate = self.layers.blocks[block].layer(member, 0).aggregate
            A = jax.eval_shape(lambda x, a=aggregate: a.mixing(x, segments=self.documents), x)
            buffers[block, member] = jnp.zeros((len(repetitions), *A.shape), A.dtype)
        return buffers

    def combine(
        self, aggregate: Aggregate, x: Float[Array, "T D"], place: Place, layer_index: Any, buffers: Any
    ) -> tuple[Float[Array, "T D"], Any]:
        """Apply the aggregate of a layer, replacing its matrix and recording it if requested.

        Args:
            aggregate: the aggregate.
            x: [T, D], its input.
            place: the place of the layer in the stack.
            layer_index: the index of the layer, used only by `every`.
            buffers: the buffers for recorded matrices.

        Returns:
            The output [T, D], and the updated buffers.
        """
        slot, repeats = (place.block, place.member), self.layers.blocks[place.block].repeats
        changes, recorded = self._changes(slot, layer_index), self.matrices.recorded.get(slot)
        if not changes and recorded is None:
            return aggregate.parallel(x, self.documents, hold=self.hold)[0], buffers

        def with_matrix(buffer: Any) -> tuple[Array, Any]:
            A = aggregate.mixing(x, segments=self.documents)
            for repetition, change in changes:
                if repetition is None or repeats == 1:
                    A = change(A)
                else:
                    A = lax.cond(place.repetition == repetition, change, _unchanged, A)
            A = held(A, self.hold)
            if recorded is not None:
                entry = jnp.where(recorded == place.repetition, indices(len(recorded)), len(recorded)).min()
                buffer = buffer.at[entry].set(A, mode="drop")
            return aggregate.apply_mixing(x, A, self.documents, hold=self.hold), buffer

        def without_matrix(buffer: Any) -> tuple[Array, Any]:
            return aggregate.parallel(x, self.documents, hold=self.hold)[0], buffer

        repetitions = [repetition for repetition, _ in changes] + ([] if recorded is None else [*recorded])
        buffer = buffers.get(slot)
        if any(repetition is None for repetition in repetitions) or len(repetitions) >= repeats:
            y, buffer = with_matrix(buffer)
        else:
            needed = jnp.stack([place.repetition == repetition for repetition in repetitions]).any()
            y, buffer = lax.cond(needed, with_matrix, without_matrix, buffer)
        return y, buffers if buffer is None else {**buffers, slot: buffer}

    def _changes(self, slot: Slot, layer_index: Any) -> list[tuple[Any, Callable[[Array], Array]]]:
        """The changes to matrices of this slot: pairs (repetition or None for all, function of the matrix)."""
        changes: list[tuple[Any, Callable[[Array], Array]]] = []
        for repetition, matrix in self.matrices.replaced.get(slot, ()):
            changes.append((repetition, functools.partial(_replace, "mixing", functools.partial(_constant, matrix))))
        for function_slot, repetition, layer, function in self.functions:
            if function_slot == slot:
                changes.append((repetition, functools.partial(_replace, f"mixing[{layer}] as a function", function)))
        if self.every is not None:
            layer_function = functools.partial(self.every, layer_index)
            changes.append((None, functools.partial(_replace, "mixing of every layer", layer_function)))
        return changes

    def recorded(self, buffers: Any) -> tuple[Array, ...]:
        """The recorded matrices by slot, in the order of `recorded_order`."""
        return tuple(matrix for slot in sorted(self.matrices.recorded) for matrix in buffers[slot])


def _unchanged(A: Array) -> Array:
    return A


def _constant(matrix: Array, A: Array) -> Array:
    return matrix


def _replace(name: str, function: Callable[[Array], Array], A: Array) -> Array:
    """function(A), checked to have the shape of A."""
    replacement = function(A)
    check_shape(name, replacement, A.shape)
    return replacement.astype(A.dtype)
