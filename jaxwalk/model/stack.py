"""The layers of a model, stored stacked, so that a scan compiles a single layer for all that are alike."""

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
"""Per-layer data by block: for each block, a tuple over the members of its period of pytrees with leaves [n, ...]."""


class Place(NamedTuple):
    """The place of a layer in the stack.

    Attributes:
        block: the index of its block.
        member: its index in the period of the block.
        repetition: the repetition of the period; traced inside a scan.
    """

    block: int
    member: int
    repetition: Int[Array, ""] | int


@module
class Block(nnx.Module):
    """A period of layers that is repeated n times. Leaves are [n, ...].

    Attributes:
        period: the layers of the period, each stacked over the repetitions.
        repeats: n.
        varying: for each member of the period, the values of its aggregate's `varying` fields in each repetition, or
            None if they are equal in all repetitions.
    """

    period: tuple[Layer, ...] = nnx.data()
    repeats: int
    varying: tuple[tuple[tuple[Any, ...], ...] | None, ...]

    def __len__(self) -> int:
        return len(self.period) * self.repeats

    def layer(self, member: int, repetition: int) -> Layer:
        """A single layer. Leaves may be arrays or ShapeDtypeStructs."""
        layer, varying = jax.tree.map(lambda leaf: _entry(leaf, repetition), self.period[member]), self.varying[member]
        return layer if varying is None else _with_varying(layer, varying[repetition])

    def settings(self) -> tuple[Any, ...]:
        """The varying fields of each member as arrays [n, ...]; None if they are equal in all repetitions."""

        def member_setting(member: int) -> Any:
            values = self.varying[member]
            if values is None:
                return None
            layers = [_with_varying(self.period[member], value) for value in values]
            return jax.tree.map(lambda *a: jnp.stack(a), *(layer.aggregate.setting() for layer in layers))

        return tuple(member_setting(member) for member in range(len(self.period)))


@module
class Layers(nnx.Module):
    """The layers of a model: an immutable sequence of `Layer`s, stored in blocks.

    `layers[3]` is a layer and `len(layers)` the depth. To change layers, create a new sequence, such as
    `Layers.of([*layers[:3], other])`.
    """

    blocks: tuple[Block, ...] = nnx.data()

    @staticmethod
    def of(layers: Sequence[Layer], *, unroll: bool = False) -> "Layers":
        """Stack layers into blocks of repeated periods, whose layers are equal in structure and shapes.

        Args:
            layers: the layers, in order.
            unroll: whether to make a separate block for each layer, so that a walk is compiled layer by layer.
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
    def __getitem__(self, index: int) -> Layer: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Layer, ...]: ...

    def __getitem__(self, index: int | slice) -> Layer | tuple[Layer, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = self.place(index)
        return self.blocks[place.block].layer(place.member, int(place.repetition))

    def __iter__(self) -> Iterator[Layer]:
        return (self[i] for i in range(len(self)))

    def place(self, index: int) -> Place:
        """The place of a layer. Negative indices count from the end.

        Raises:
            IndexError: if there is no such layer.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"layer: expected one from 0 to {len(self) - 1}, got {index}.")
        remaining, block = index % len(self), 0
        while remaining >= len(self.blocks[block]):
            remaining -= len(self.blocks[block])
            block += 1
        repetition, member = divmod(remaining, len(self.blocks[block].period))
        return Place(block, member, repetition)

    def at(self, place: Place) -> Layer:
        """The layer at a place whose repetition may be traced. Inside a compiled program, this copies the layer."""
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
        """The decoding memories of all layers before the first of at most `length` positions."""
        init = jax.vmap(lambda layer: layer.aggregate.init_memory(length))
        return tuple(
            tuple(init(layer) if jax.tree.leaves(jax.eval_shape(init, layer)) else () for layer in block.period)
            for block in self.blocks
        )

    def split(self, tree: Any) -> ByBlock:
        """Convert a pytree with leaves [L, ...], in the order of the layers, to per-layer data by block."""
        parts, start = [], 0
        for block in self.blocks:
            p, n = len(block.period), block.repeats

            def of_member(a: Any, m: int, start: int = start, p: int = p, n: int = n) -> Any:
                part = a if n * p == len(a) else a[start : start + n * p]
                return part.reshape(n, p, *part.shape[1:])[:, m] if p > 1 else part

            parts.append(tuple(jax.tree.map(lambda a, m=m: of_member(a, m), tree) for m in range(p)))
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
        """Apply `body(layer, place, carry, x) -> (carry, y)` to all layers, in order.

        Args:
            body: the function, which is traced once for each member of each block.
            carry: what is passed from layer to layer.
            by_block: per-layer inputs x, as `split` returns them.
            remat: whether to recompute each period in the backward pass.
            reverse: whether to go from the last layer to the first.

        Returns:
            The last carry, and the outputs y by block.
        """
        outputs: list[Any] = [None] * len(self.blocks)
        order = range(len(self.blocks))
        for b in reversed(order) if reverse else order:
            block = self.blocks[b]
            members = range(len(block.period))

            def step(carry: Any, args: Any, b: int = b, members: range = members) -> tuple[Any, Any]:
                layers, settings, xs, repetition = args
                ys: list[Any] = [None] * len(members)
                for m in reversed(members) if reverse else members:
                    layer = _with_setting(layers[m], settings[m])
                    carry, ys[m] = body(layer, Place(b, m, repetition), carry, xs[m])
                return carry, tuple(ys)

            period_step = jax.checkpoint(step) if remat else step
            xs = (None,) * len(members) if by_block is None else by_block[b]
            if block.repeats == 1:
                first = jax.tree.map(lambda a: a[0], (block.period, block.settings(), xs))
                carry, ys = period_step(carry, (*first, 0))
                outputs[b] = jax.tree.map(lambda y: y[None], ys)
            else:
                args = (block.period, block.settings(), xs, indices(block.repeats))
                carry, outputs[b] = lax.scan(period_step, carry, args, reverse=reverse)
        return carry, tuple(outputs)


def repetitions(kinds: Sequence[Any]) -> list[tuple[int, int]]:
    """Partition `kinds` into consecutive runs (period, repeats), greedily: each run saves the most layers it can."""
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
    """Entry `index` of a stacked leaf."""
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
    """The layer with the varying fields of its aggregate replaced by arrays, unless `setting` is None."""
    if setting is None:
        return layer
    aggregate: Any = layer.aggregate
    return dataclasses.replace(layer, aggregate=dataclasses.replace(aggregate, scanned=setting))


def _kind(layer: Layer) -> Any:
    """What stacked layers must have in common: everything except the values of arrays and of varying fields."""
    neutral = _with_varying(layer, tuple(layer.aggregate.varying.values()))
    return jax.tree.structure(neutral), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(layer))


def _block(members: Sequence[Sequence[Layer]]) -> Block:
    """The block in which member m of repetition r is members[m][r]."""
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
