"""The placement of parameters on a mesh of devices."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Pattern of a parameter's path -> its partition. The first match applies; without one, the parameter is replicated.
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/(table|weight)$", PartitionSpec("model", None)),
    (r"(qkv|value|up|gate)/weight$", PartitionSpec(None, "model")),
    (r"(qkv|value|up|gate)/bias$", PartitionSpec("model")),
    (r"(out|down)/weight$", PartitionSpec("model", None)),
)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of a pytree of arrays or ShapeDtypeStructs, by `SHARDING_RULES`.

    The optimizer's moments have paths that end like those of their parameters, so they are placed alike. A leaf whose
    sizes are not divisible by the mesh is replicated.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in SHARDING_RULES if re.search(pattern, name)), PartitionSpec())
        ways = [1 if axis is None else mesh.shape[axis] for axis in spec]
        # A rule applies to the last axes: stacked layers and the members of a sweep have additional leading axes.
        axes = leaf.shape[leaf.ndim - len(spec) :]
        if len(spec) > leaf.ndim or any(n % w for n, w in zip(axes, ways, strict=True)):
            return NamedSharding(mesh, PartitionSpec())
        spec = PartitionSpec(*(None,) * (leaf.ndim - len(spec)), *spec)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)
