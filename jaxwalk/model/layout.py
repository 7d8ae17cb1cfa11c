"""Conversion between separate layers, as on disk (`layers/7/...`), and stacked layers, as in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwalk.model.stack import Layers


def apart(tree: Any) -> Any:
    """`tree` with each stack of layers converted to a tuple of layers. Leaves may be arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda node: tuple(node) if _is_stack(node) else node, tree, is_leaf=_is_stack)


def stacked(template: Any, tree: Any) -> Any:
    """The inverse of `apart`: the layers of `tree`, stacked as in `template`."""

    def restack(node: Any, layers: Any) -> Any:
        if not _is_stack(node):
            return layers
        rest, blocks = list(layers), []
        for block in node.blocks:
            p, n = len(block.period), block.repeats
            members = [[rest[r * p + m] for r in range(n)] for m in range(p)]
            rest = rest[p * n :]
            by_member = [_stack_leaves(*(jax.tree.leaves(layer) for layer in member)) for member in members]
            leaves = [leaf for member in by_member for leaf in member]
            blocks.append(jax.tree.unflatten(jax.tree.structure(block), leaves))
        return Layers(tuple(blocks))

    return jax.tree.map(restack, template, tree, is_leaf=_is_stack)


def _stack_leaves(*layers: list[Any]) -> list[Any]:
    """Stack the corresponding leaves of several layers, on the host if that is where they are."""
    stack = np.stack if all(isinstance(leaf, np.ndarray) for leaf in layers[0]) else jnp.stack
    return [stack(leaves) for leaves in zip(*layers, strict=True)]


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf on disk, such as layers/7/aggregate/qkv/weight."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def stored_paths(template: Any) -> list[list[str]]:
    """For each leaf of `template`, in order, the paths on disk of the leaves that it is stacked from."""
    leaves, structure = jax.tree.flatten(template)
    # Replace each leaf by its index, repeated along its first axis, so that the entry of each layer is this index.
    leaf_indices = [np.full(max(1, leaf.shape[0] if leaf.ndim else 1), i) for i, leaf in enumerate(leaves)]
    paths: list[list[str]] = [[] for _ in leaves]
    separate = apart(jax.tree.unflatten(structure, leaf_indices))
    for keys, leaf_index in jax.tree_util.tree_flatten_with_path(separate)[0]:
        paths[int(np.ravel(leaf_index)[0])].append(path_of(keys))
    return paths


def _is_stack(node: Any) -> bool:
    return isinstance(node, Layers)
