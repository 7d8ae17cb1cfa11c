"""Models with their layers apart, as they are on disk (`layers/7/...`), and stacked, as they are in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwalk.model.stack import Layers


def apart(tree: Any) -> Any:
    """`tree` with every stack of layers in it as a tuple of layers. Leaves may be arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda node: tuple(node) if _is_stack(node) else node, tree, is_leaf=_is_stack)


def stacked(template: Any, tree: Any) -> Any:
    """The inverse of `apart`: the leaves of `tree` in the structure of `template`."""

    def restack(node: Any, layers: Any) -> Any:
        if not _is_stack(node):
            return layers
        rest, blocks = list(layers), []
        for block in node.blocks:
            p, n = len(block.period), block.repeats
            members = [[rest[r * p + m] for r in range(n)] for m in range(p)]
            rest = rest[p * n :]
            leaves = [_stack_leaves(*(jax.tree.leaves(layer) for layer in layers)) for layers in members]
            flat = [leaf for member in leaves for leaf in member]
            blocks.append(jax.tree.unflatten(jax.tree.structure(block), flat))
        return Layers(tuple(blocks))

    return jax.tree.map(restack, template, tree, is_leaf=_is_stack)


def _stack_leaves(*layers: list[Any]) -> list[Any]:
    """The leaves of several layers, stacked: on the host if they are there."""
    stack = np.stack if all(isinstance(leaf, np.ndarray) for leaf in layers[0]) else jnp.stack
    return [stack(leaves) for leaves in zip(*layers, strict=True)]


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf as it is named on disk, with slashes: layers/7/aggregate/qkv/weight."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def stored_paths(template: Any) -> list[list[str]]:
    """For each leaf of `template`, in order, the paths of the separate leaves on disk that it is stacked from."""
    leaves, structure = jax.tree.flatten(template)
    # Each leaf is replaced by its number, repeated along its first axis, so that one layer's entry is the number too.
    numbered = [np.full(max(1, leaf.shape[0] if leaf.ndim else 1), number) for number, leaf in enumerate(leaves)]
    paths: list[list[str]] = [[] for _ in leaves]
    separate = apart(jax.tree.unflatten(structure, numbered))
    for keys, number in jax.tree_util.tree_flatten_with_path(separate)[0]:
        paths[int(np.ravel(number)[0])].append(path_of(keys))
    return paths


def _is_stack(node: Any) -> bool:
    return isinstance(node, Layers)
