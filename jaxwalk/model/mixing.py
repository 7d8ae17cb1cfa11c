"""Mixing matrices of a walk that are replaced or recorded, layer by layer, inside one scan over the layers."""

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
"""A mixing matrix to use in place of a layer's, or a function from the layer's matrix to another."""
Slot = tuple[int, int]
"""A member of the period of a block: the layers that one piece of a compiled walk stands for."""


class Matrices(NamedTuple):
    """What a walk is asked to do with mixing matrices: the arguments of its program.

    replaced: for each slot, (repetition, matrix [G, T, T]) pairs. recorded: for each slot, repetitions [k].
        Repetitions are traced, so that one program serves all layers of a slot.
    """

    replaced: dict[Slot, tuple[tuple[Any, Any], ...]]
    recorded: dict[Slot, Any]


class Functions(NamedTuple):
    """The static part: for each layer with a function, its slot, repetition, number and function."""

    replaced: tuple[tuple[Slot, int, int, Callable[[Array], Array]], ...] = ()


def plan(layers: Layers, mixing: Mapping[int, Any], record: Sequence[int]) -> tuple[Matrices, Functions]:
    """The arguments and the static part for `mixing` = {layer: matrix or function} and the layers to `record`."""
    replaced: dict[Slot, list[Any]] = {}
    recorded: dict[Slot, list[int]] = {}
    functions = []
    for number, given in sorted(mixing.items()):
        block, member, index = layers.place(number)
        if callable(given):
            functions.append(((block, member), int(index), number, given))
        else:
            replaced.setdefault((block, member), []).append((np.int32(index), given))
    for number in sorted(set(record)):
        block, member, index = layers.place(number)
        recorded.setdefault((block, member), []).append(int(index))
    return (
        Matrices(
            {slot: tuple(pairs) for slot, pairs in replaced.items()},
            {slot: np.array(indices, np.int32) for slot, indices in recorded.items()},
        ),
        Functions(tuple(functions)),
    )


def recorded_order(layers: Layers, record: Sequence[int]) -> list[int]:
    """The layers in the order in which `Mixer.recorded` returns their matrices."""
    return sorted(set(record), key=lambda number: (layers.place(number)[:2], number))


class Mixer:
    """How the layers of one walk combine positions, with matrices replaced and recorded as asked."""

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
        """`every`: (layer number, its matrix) -> the matrix to use, in every layer."""
        self.layers, self.documents, self.hold, self.every = layers, documents, hold, every
        self.matrices = matrices or Matrices({}, {})
        self.functions = (functions or Functions()).replaced

    def buffers(self, x: Float[Array, "T D"]) -> dict[Slot, Float[Array, "k G T T"]]:
        """Room for the recorded matrices, to be carried through the layers."""
        room = {}
        for (block, member), repetitions in self.matrices.recorded.items():
            aggregate = self.layers.blocks[block].layer(member, 0).aggregate
            A = jax.eval_shape(lambda x, a=aggregate: a.mixing(x, segments=self.documents), x)
            room[block, member] = jnp.zeros((len(repetitions), *A.shape), A.dtype)
        return room

    def combine(
        self, aggregate: Aggregate, x: Float[Array, "T D"], place: Place, number: Any, buffers: Any
    ) -> tuple[Float[Array, "T D"], Any]:
        """The output of the aggregate of layer `number`, and the buffers, with its matrix recorded if it is asked
        for."""
        slot, repeats = (place.block, place.member), self.layers.blocks[place.block].repeats
        changes, recorded = self._changes(slot, number), self.matrices.recorded.get(slot)
        if not changes and recorded is None:
            return aggregate.parallel(x, self.documents, hold=self.hold)[0], buffers

        def with_matrix(buffer: Any) -> tuple[Array, Any]:
            A = aggregate.mixing(x, segments=self.documents)
            for index, change in changes:
                A = (
                    change(A)
                    if index is None or repeats == 1
                    else lax.cond(place.repetition == index, change, _same, A)
                )
            A = held(A, self.hold)
            if recorded is not None:
                row = jnp.where(recorded == place.repetition, indices(len(recorded)), len(recorded)).min()
                buffer = buffer.at[row].set(A, mode="drop")
            return aggregate.apply_mixing(x, A, self.documents, hold=self.hold), buffer

        def without(buffer: Any) -> tuple[Array, Any]:
            return aggregate.parallel(x, self.documents, hold=self.hold)[0], buffer

        chosen = [index for index, _ in changes] + ([] if recorded is None else [*recorded])
        buffer = buffers.get(slot)
        if any(index is None for index in chosen) or len(chosen) >= repeats:
            y, buffer = with_matrix(buffer)
        else:
            asked = jnp.stack([place.repetition == index for index in chosen]).any()
            y, buffer = lax.cond(asked, with_matrix, without, buffer)
        return y, buffers if buffer is None else {**buffers, slot: buffer}

    def _changes(self, slot: Slot, number: Any) -> list[tuple[Any, Callable[[Array], Array]]]:
        """The changes to matrices of this slot: (repetition, or None for all of them; function of the matrix)."""
        changes: list[tuple[Any, Callable[[Array], Array]]] = []
        for index, matrix in self.matrices.replaced.get(slot, ()):
            changes.append((index, functools.partial(_replaced, "mixing", functools.partial(_constant, matrix))))
        for where, repetition, layer, function in self.functions:
            if where == slot:
                changes.append((repetition, functools.partial(_replaced, f"mixing[{layer}] as a function", function)))
        if self.every is not None:
            of_layer = functools.partial(self.every, number)
            changes.append((None, functools.partial(_replaced, "mixing of every layer", of_layer)))
        return changes

    def recorded(self, buffers: Any) -> tuple[Array, ...]:
        """The recorded matrices, slot by slot: see `recorded_order`."""
        return tuple(matrix for slot in sorted(self.matrices.recorded) for matrix in buffers[slot])


def _same(A: Array) -> Array:
    return A


def _constant(matrix: Array, A: Array) -> Array:
    return matrix


def _replaced(what: str, function: Callable[[Array], Array], A: Array) -> Array:
    """function(A). Raises ValueError for another shape, which could silently broadcast."""
    other = function(A)
    check_shape(what, other, A.shape)
    return other.astype(A.dtype)
