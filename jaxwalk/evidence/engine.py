"""The engine of the analyses: it maps a pure function of one path over many paths, in bounded memory.

All models of one shape, such as the trained one, an untrained one and those of other training steps, go through one
compiled program, as arguments. Matrix products have the highest precision.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxwalk.evidence.finding import NotApplicable

PRECISION = "highest"
"""The precision of all matrix products in analyses."""
ELEMENTS = 1 << 22
"""About the most numbers that a batch of paths holds."""
LARGEST_BATCH = 256

Measure = Callable[..., Any]
"""A pure function (model, *per_path, *shared) -> arrays, written for one path."""

_progress: ContextVar[Callable[[int, int], None] | None] = ContextVar("progress", default=None)


@contextmanager
def reporting(progress: Callable[[int, int], None]) -> Iterator[None]:
    """Within the block, `measure` calls progress(paths done, paths in all) after each batch."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def measure(
    function: Measure, model: Any, *per_path: np.ndarray, shared: tuple[Any, ...] = (), elements: int = ELEMENTS
) -> Any:
    """`function(model, *path, *shared)` for each path, as float64 arrays on the host.

    Args:
        function: pure, written for one path, and defined at the top level of a module: each function is compiled once
            for each shape of its arguments.
        model: a model, or any pytree of arrays, which `function` gets as it is.
        *per_path: arrays [n, ...], of which `function` gets one row each.
        shared: further arguments, which are the same for all paths.
        elements: about the most numbers that a batch may hold.

    Returns:
        The results, with paths as a new first axis.

    Raises:
        NotApplicable: if a result is NaN.
    """
    n = len(per_path[0])
    size = _batch_size(function, model, per_path, shared, elements)
    parts = []
    for start in range(0, n, size):
        batch = tuple(_filled(np.asarray(a[start : start + size]), size) for a in per_path)
        result = _mapped(function, model, _on_all_devices(batch), shared)
        parts.append(jax.tree.map(lambda a, start=start: np.asarray(a, np.float64)[: n - start], result))
        if (progress := _progress.get()) is not None:
            progress(min(start + size, n), n)
    results = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    if any(np.isnan(a).any() for a in jax.tree.leaves(results)):
        raise NotApplicable(f"{function.__name__}: expected numbers, got NaN. Analyse an earlier step.")
    return results


@functools.partial(jax.jit, static_argnames="function")
def _mapped(function: Measure, model: Any, batch: tuple[Any, ...], shared: tuple[Any, ...]) -> Any:
    with jax.default_matmul_precision(PRECISION):
        return jax.vmap(lambda *path: function(model, *path, *shared))(*batch)


def _batch_size(
    function: Measure, model: Any, per_path: tuple[np.ndarray, ...], shared: tuple[Any, ...], elements: int
) -> int:
    """The number of paths in a batch: a power of two, times the number of devices."""
    one = tuple(jax.ShapeDtypeStruct(np.shape(a)[1:], jax.dtypes.canonicalize_dtype(a.dtype)) for a in per_path)
    result = jax.eval_shape(lambda m, p, s: function(m, *p, *s), model, one, shared)
    widest = 4 * getattr(model, "width", 0) + getattr(model, "vocab_size", 0)
    each = max(sum(a.size for a in jax.tree.leaves(result)), int(np.prod(np.shape(per_path[0])[1:])) * widest, 1)
    devices = len(_devices())
    size = min(LARGEST_BATCH, max(1, elements // each), -(-len(per_path[0]) // devices))
    return (1 << (size.bit_length() - 1) if size & (size - 1) else size) * devices


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """The rows, with the last one repeated until there are `size`, so that all batches have one shape."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def _on_all_devices(batch: tuple[np.ndarray, ...]) -> Any:
    """The batch, divided over the devices."""
    devices = _devices()
    if len(devices) == 1:
        return batch
    sharding = NamedSharding(Mesh(np.array(devices), ("paths",)), PartitionSpec("paths"))
    return jax.device_put(batch, sharding)


def _devices() -> list[Any]:
    """All accelerators of this host, or one CPU device, as XLA uses every core for it anyway."""
    devices = jax.local_devices()
    return devices[:1] if devices[0].platform == "cpu" else devices
