"""Loops over many items in bounded memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxwalk.filters import indices


def map_in_batches(function: Callable[[Any], Any], items: Any, batch: int) -> Any:
    """`function` of each item, vmapped over `batch` items at a time; for use inside a compiled program.

    The last batch is filled up by repeating the last item: `lax.map` with a remainder would compile `function` twice.
    """
    n = len(jax.tree.leaves(items)[0])
    size = max(1, min(batch, n))
    index = jnp.minimum(indices(-(-n // size) * size), n - 1).reshape(-1, size)
    results = lax.map(lambda rows: jax.vmap(function)(jax.tree.map(lambda a: a[rows], items)), index)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], results)
