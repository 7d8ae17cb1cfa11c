"""Loops over many items in bounded memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxwalk.filters import indices


def map_in_batches(function: Callable[[Any], Any], items: Any, batch: int) -> Any:
    """Apply `function` to each item, vmapped over `batch` items at a time. For use inside a compiled program.

    Args:
        function: maps one item to a pytree of arrays.
        items: a pytree of arrays with the items along their first axis.
        batch: the number of items that are processed together.

    Returns:
        The results, stacked along the first axis.
    """
    n = len(jax.tree.leaves(items)[0])
    size = max(1, min(batch, n))
    # Pad the last batch by repeating the last item: `lax.map` with a remainder would compile `function` twice.
    batches = jnp.minimum(indices(-(-n // size) * size), n - 1).reshape(-1, size)
    results = lax.map(lambda rows: jax.vmap(function)(jax.tree.map(lambda a: a[rows], items)), batches)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], results)
