"""The layers of a model, stored as they are walked: stacked, so that one compiled layer is scanned over all of them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from jaxwalk.filters import indices, module
from jaxwalk.model.layer import Layer

Carry = TypeVar("Carry")
ByBlock = Any
"""Per-layer data as the stack stores it: for each block, a tuple over its period of pytrees with leaves [n, ...]."""


class Place(NamedTuple):
    """Where a layer is: the block, the member of its period, and the repetition, which is traced inside a scan."""

    block: int
    member: int
    repetition: Int[Array, ""] | int


@module
class Block(nnx.Module):
    """A period of layers that is repeated n times: each leaf is [n, ...], over the repetitions.

    varying: for each member of the period, the values of its aggregate's `varying` fields in each repetition, or None
        where all repetitions have the same.
    """

    period: tuple[Layer, ...] = nnx.data()
    repeats: int
    varying: tuple[tuple[tuple[Any, ...], ...] | None, ...]

    def __len__(self) -> int:
        return len(self.period) * self.repeats

    def layer(self, member: int, index: int) -> Layer:
        """One layer by itself. Leaves may be arrays or ShapeDtypeStructs."""
        layer, varying = jax.tree.map(lambda leaf: _entry(leaf, index), self.period[member]), self.varying[member]
        return layer if varying is None else _with_varying(layer, varying[index])

    def settings(self) -> tuple[Any, ...]:
        """The varying fields of each member as arrays with the repetitions as first axis; None where all are alike."""

        def one(member: int) -> Any:
            values = self.varying[member]
            if values is None:
                return None
            layers = [_with_varying(self.period[member], value) for value in values]
            return jax.tree.map(lambda *a: jnp.stack(a), *(layer.aggregate.setting() for layer in layers))

        return tuple(one(member) for member in range(len(self.period)))


@module
class Layers(nnx.Module):
    """The layers of a model, a sequence of `Layer`s that is stored in blocks.

    `layers[3]` is one layer, `len(layers)` the depth. To change layers, make new ones: `Layers.of([*layers[:3],
    other])`.
    """

    blocks: tuple[Block, ...] = nnx.data()

    @staticmethod
    def of(layers: Sequence[Layer], *, unroll: bool = False) -> "Layers":
        """The layers, stacked over the shortest periods of layers alike in structure and shapes.

        With `unroll` each is a block of its own, so that a walk is compiled layer by layer.
        """
        layers = list(layers)
        runs = [(1, 1)] * len(layers) if unroll else repetitions([_kind(layer) for layer in layers])
        blocks, start = [], 0
        for period, repeats in runs:
            members = [layers[start + m : start + period * repeats : period] for m in range(period)]
            blocks.append(_block(members))
            start += period * repeats
        return Layers(tuple(blocks))

    def __len__(self) -> int:
        return sum(len(block) for block in self.blocks)

    @overload
    def __getitem__(self, number: int) -> Layer: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[Layer, ...]: ...

    def __getitem__(self, number: int | slice) -> Layer | tuple[Layer, ...]:
        if isinstance(number, slice):
            return tuple(self[i] for i in range(*number.indices(len(self))))
        place = self.place(number)
        return self.blocks[place.block].layer(place.member, int(place.repetition))

    def __iter__(self) -> Iterator[Layer]:
        return (self[number] for number in range(len(self)))

    def place(self, number: int) -> Place:
        """Where layer `number` is. Raises IndexError if there is none."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"layer: expected one from 0 to {len(self) - 1}, got {number}.")
        number, block = number % len(self), 0
        while number >= len(self.blocks[block]):
            number -= len(self.blocks[block])
            block += 1
        index, member = divmod(number, len(self.blocks[block].period))
        return Place(block, member, index)

    def at(self, place: Place) -> Layer:
        """The layer at a place whose index may be traced. Inside a compiled program this copies one layer."""
        block = self.blocks[place.block]
        layer, setting = jax.tree.map(
            lambda a: a[place.repetition], (block.period[place.member], block.settings()[place.member])
        )
        return _with_setting(layer, setting)

    def all_but_last(self) -> "Layers":
        """The layers without the last one."""
        *blocks, block = self.blocks
        if block.repeats > 1:
            period = jax.tree.map(lambda a: a[:-1], block.period)
            varying = tuple(None if values is None else values[:-1] for values in block.varying)
            blocks.append(Block(period, block.repeats - 1, varying))
        rest = [block.layer(member, block.repeats - 1) for member in range(len(block.period) - 1)]
        return Layers((*blocks, *Layers.of(rest).blocks))

    def init_memory(self, length: int) -> ByBlock:
        """The decoding memory of every layer before the first of at most `length` positions."""
        init = jax.vmap(lambda layer: layer.aggregate.init_memory(length))
        return tuple(
            tuple(init(layer) if jax.tree.leaves(jax.eval_shape(init, layer)) else () for layer in block.period)
            for block in self.blocks
        )

    def split(self, tree: Any) -> ByBlock:
        """Leaves [L, ...], with layers as their first axis, by block."""
        parts, start = [], 0
        for block in self.blocks:
            p, n = len(block.period), block.repeats

            def member(a: Any, m: int, start: int = start, p: int = p, n: int = n) -> Any:
                part = a if n * p == len(a) else a[start : start + n * p]
                return part.reshape(n, p, *part.shape[1:])[:, m] if p > 1 else part

            parts.append(tuple(jax.tree.map(lambda a, m=m: member(a, m), tree) for m in range(p)))
            start += len(block)
        return tuple(parts)

    def join(self, by_block: ByBlock) -> Any:
        """The inverse of `split`: leaves [L, ...] in the order of the layers."""

        def interleave(*members: Array) -> Array:
            return members[0] if len(members) == 1 else jnp.stack(members, axis=1).reshape(-1, *members[0].shape[1:])

        parts = [jax.tree.map(interleave, *members) for members in by_block]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    def scan(
        self,
        body: Callable[[Layer, Place, Carry, Any], tuple[Carry, Any]],
        carry: Carry,
        by_block: ByBlock | None = None,
        *,
        remat: bool = False,
        reverse: bool = False,
    ) -> tuple[Carry, ByBlock]:
        """`body(layer, place, carry, x) -> (carry, y)` through all layers, in order.

        Args:
            body: called once for each member of each block while tracing.
            carry: what is passed from layer to layer.
            by_block: per-layer inputs x, as `split` returns them.
            remat: whether to recompute each period in the backward pass.
            reverse: from the last layer to the first.

        Returns:
            The last carry, and the outputs y by block.
        """
        outputs: list[Any] = [None] * len(self.blocks)
        order = range(len(self.blocks))
        for b in reversed(order) if reverse else order:
            block = self.blocks[b]
            members = range(len(block.period))

            def step(carry: Any, args: Any, b: int = b, members: range = members) -> tuple[Any, Any]:
                layers, settings, xs, index = args
                ys: list[Any] = [None] * len(members)
                for m in reversed(members) if reverse else members:
                    layer = _with_setting(layers[m], settings[m])
                    carry, ys[m] = body(layer, Place(b, m, index), carry, xs[m])
                return carry, tuple(ys)

            run = jax.checkpoint(step) if remat else step
            xs = (None,) * len(members) if by_block is None else by_block[b]
            if block.repeats == 1:
                first = jax.tree.map(lambda a: a[0], (block.period, block.settings(), xs))
                carry, ys = run(carry, (*first, 0))
                outputs[b] = jax.tree.map(lambda y: y[None], ys)
            else:
                args = (block.period, block.settings(), xs, indices(block.repeats))
                carry, outputs[b] = lax.scan(run, carry, args, reverse=reverse)
        return carry, tuple(outputs)


def repetitions(kinds: Sequence[Any]) -> list[tuple[int, int]]:
    """Consecutive runs (period, repeats) that cover `kinds`, found greedily: each saves the most layers it can."""
    runs, start = [], 0
    while start < len(kinds):
        rest, best = kinds[start:], (1, 1)
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[period * repeats : period * (repeats + 1)] == rest[:period]:
                repeats += 1
            if period * (repeats - 1) > best[0] * (best[1] - 1):
                best = (period, repeats)
        runs.append(best)
        start += best[0] * best[1]
    return runs


def _entry(leaf: Any, index: int) -> Any:
    """One entry of a stacked leaf."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sharding = leaf.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
    return leaf[index]


def _varying(layer: Layer) -> tuple[Any, ...]:
    return tuple(getattr(layer.aggregate, name) for name in layer.aggregate.varying)


def _with_varying(layer: Layer, values: tuple[Any, ...]) -> Layer:
    if not values:
        return layer
    fields = dict(zip(layer.aggregate.varying, values, strict=True))
    aggregate: Any = layer.aggregate
    return dataclasses.replace(layer, aggregate=dataclasses.replace(aggregate, **fields))


def _with_setting(layer: Layer, setting: Any) -> Layer:
    """The layer with its aggregate's varying fields given as arrays, if they are."""
    if setting is None:
        return layer
    aggregate: Any = layer.aggregate
    return dataclasses.replace(layer, aggregate=dataclasses.replace(aggregate, scanned=setting))


def _kind(layer: Layer) -> Any:
    """What layers must have in common to be stacked: everything but the values of arrays and of varying fields."""
    alike = _with_varying(layer, tuple(layer.aggregate.varying.values()))
    return jax.tree.structure(alike), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(layer))


def _block(members: Sequence[Sequence[Layer]]) -> Block:
    """The block whose member m of repetition r is members[m][r]."""
    period, varying = [], []
    for layers in members:
        values = tuple(_varying(layer) for layer in layers)
        same = all(value == values[0] for value in values)
        varying.append(None if same else values)
        if not same:
            common = type(layers[0].aggregate).common_setting(values)
            layers = [_with_varying(layer, common) for layer in layers]
        period.append(jax.tree.map(lambda *leaves: _stacked(leaves), *layers))
    return Block(tuple(period), len(members[0]), tuple(varying))


def _stacked(leaves: Sequence[Any]) -> Any:
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        return np.stack(leaves)
    return leaves[0][None] if len(leaves) == 1 else jnp.stack(leaves)
