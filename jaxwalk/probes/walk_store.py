"""Walks on disk: selected stations, context vectors and mixing matrices of many paths.

Paths are walked in batches, and each batch is written as soon as it is computed, so that memory holds one batch. The
arrays are `.npy` files, which are read back memory-mapped.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxwalk.model.transformer import Transformer

FORMAT = 1
"""Version of the folder's layout. A newer version cannot be read."""


class WalkStore(NamedTuple):
    """Memory-mapped walks of n paths of T tokens. Row i of every array belongs to path i.

    Attributes:
        tokens: [n, T].
        stations: [n, len(station_numbers), T, D].
        station_numbers: the indices of the stored stations, from 0 to S-1.
        context: [n, T, D], or None.
        mixing: {layer: [n, G, T, T]}.
    """

    tokens: np.ndarray
    stations: np.ndarray
    station_numbers: tuple[int, ...]
    context: np.ndarray | None
    mixing: dict[int, np.ndarray]


def write_walks(
    model: Transformer,
    paths: Int[np.ndarray, "n T"] | Int[Array, "n T"],
    folder: str | os.PathLike[str],
    *,
    stations: Sequence[int] | None = None,
    context: bool = True,
    mixing: Sequence[int] = (),
    dtype: Any = np.float32,
    batch: int = 64,
) -> WalkStore:
    """Walk `paths` and write the selected arrays into `folder`, which must be new or empty.

    A folder whose writing was interrupted cannot be opened.

    Args:
        model: the model.
        paths: [n, T], of at most max_length tokens each.
        folder: the folder to write to.
        stations: indices of the stations to write, from 0 to S-1; by default all.
        context: whether to write the context vectors.
        mixing: the layers whose mixing matrices are written.
        dtype: the dtype of the files.
        batch: the number of paths that are walked together.

    Returns:
        The store, memory-mapped.

    Raises:
        ValueError: if a station, layer or token does not exist, or paths are too long.
        FileExistsError: if the folder is not empty.
    """
    rows = np.asarray(paths)
    if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"paths: expected integers [n, T], at least one, got {rows.dtype} of shape {rows.shape}.")
    if rows.min() < 0 or rows.max() >= model.vocab_size:
        raise ValueError(f"paths: expected ids from 0 to {model.vocab_size - 1}, got {rows.min()} to {rows.max()}.")
    if rows.shape[1] > model.max_length:
        raise ValueError(f"paths: expected at most {model.max_length} tokens each (max_length), got {rows.shape[1]}.")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}.")
    S = 2 * model.depth + 1
    station_numbers = tuple(range(S)) if stations is None else tuple(stations)
    for name, selected, size in (("stations", station_numbers, S), ("mixing", tuple(mixing), model.depth)):
        if wrong := [index for index in selected if not 0 <= index < size]:
            raise ValueError(f"{name}: expected numbers from 0 to {size - 1}, got {', '.join(map(str, wrong))}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected a new or empty folder. Walks are not overwritten.")

    batch = min(batch, len(rows))
    files: dict[str, np.memmap] = {}
    for start in range(0, len(rows), batch):
        first = min(start, len(rows) - batch)  # the last batch overlaps the previous one, to have the same size
        arrays = _walks(
            model,
            jnp.asarray(rows[first : first + batch]),
            stations=station_numbers,
            context=context,
            mixing=tuple(mixing),
        )
        for name, values in arrays.items():
            if name not in files:
                file_dtype = rows.dtype if name == "tokens" else np.dtype(dtype)
                shape = (len(rows), *values.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", file_dtype, shape)
            files[name][start : start + batch] = np.asarray(values)[start - first :]
    for file in files.values():
        file.flush()
    metadata = {"format": FORMAT, "stations": list(station_numbers), "context": context, "mixing": list(mixing)}
    # Written last: it marks the folder as complete.
    (folder / "walks.json").write_text(json.dumps(metadata), "utf-8")
    return read_walks(folder)


@functools.partial(jax.jit, static_argnames=("stations", "context", "mixing"))
def _walks(
    model: Transformer, rows: Array, *, stations: tuple[int, ...], context: bool, mixing: tuple[int, ...]
) -> dict[str, Array]:
    walk = jax.vmap(lambda row: model.walk(row, record_mixing=mixing))(rows)
    arrays = {"tokens": rows, "stations": walk.stations[:, np.array(stations, int)]}
    if context:
        arrays["context"] = walk.context
    return arrays | {f"mixing_{layer}": walk.mixing[layer] for layer in mixing}


def read_walks(folder: str | os.PathLike[str]) -> WalkStore:
    """The walks in `folder`, memory-mapped.

    Raises:
        FileNotFoundError: if the folder holds no walks, or writing them was interrupted.
        ValueError: if they were written in a newer format.
    """
    folder = Path(folder)
    if not (folder / "walks.json").is_file():
        raise FileNotFoundError(f"{folder}: expected walks.json, which write_walks writes last. Write them again.")
    metadata = json.loads((folder / "walks.json").read_text("utf-8"))
    if metadata["format"] > FORMAT:
        raise ValueError(f"{folder}: expected format {FORMAT} or older, got {metadata['format']}. Use a newer jaxwalk.")
    load = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
    return WalkStore(
        load("tokens"),
        load("stations"),
        tuple(metadata["stations"]),
        load("context") if metadata["context"] else None,
        {layer: load(f"mixing_{layer}") for layer in metadata["mixing"]},
    )
