"""Walks on disk: chosen stations, context vectors and mixing matrices of many paths.

Paths are walked in batches, each of which is written as it is computed, so that memory holds one batch. They are read
back as memory-mapped arrays. There is one `.npy` file per array, which any tool opens.
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
"""Version of the folder's layout; a newer one cannot be read."""


class WalkStore(NamedTuple):
    """Walks of n paths of T tokens, memory-mapped; row i of every array is path i.

    tokens: [n, T]. stations: [n, len(station_numbers), T, D]. station_numbers: their numbers, from 0 to S-1. context:
    [n, T, D], or None. mixing: {layer: [n, G, T, T]}.
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
    """Walk `paths` and write the chosen arrays into `folder`, which must be new or empty.

    A folder whose writing was interrupted cannot be opened.

    Args:
        model: the model.
        paths: [n, T], none longer than max_length.
        folder: where to write.
        stations: numbers from 0 to S-1; by default all.
        context: whether to write the context vectors.
        mixing: the layers whose mixing matrices are written.
        dtype: of the files.
        batch: how many paths are walked together.

    Returns:
        The store, memory-mapped.

    Raises:
        ValueError: for stations, layers or tokens that do not exist.
        FileExistsError: for a folder that is not empty.
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
    numbers = tuple(range(S)) if stations is None else tuple(stations)
    for what, chosen, size in (("stations", numbers, S), ("mixing", tuple(mixing), model.depth)):
        if wrong := [number for number in chosen if not 0 <= number < size]:
            raise ValueError(f"{what}: expected numbers from 0 to {size - 1}, got {', '.join(map(str, wrong))}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected a new or empty folder. Walks are not overwritten.")

    batch = min(batch, len(rows))
    files: dict[str, np.memmap] = {}
    for start in range(0, len(rows), batch):
        first = min(start, len(rows) - batch)  # the last batch overlaps the one before, so that all have one size
        arrays = _walks(
            model, jnp.asarray(rows[first : first + batch]), stations=numbers, context=context, mixing=tuple(mixing)
        )
        for name, values in arrays.items():
            if name not in files:
                kind = rows.dtype if name == "tokens" else np.dtype(dtype)
                shape = (len(rows), *values.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
            files[name][start : start + batch] = np.asarray(values)[start - first :]
    for file in files.values():
        file.flush()
    about = {"format": FORMAT, "stations": list(numbers), "context": context, "mixing": list(mixing)}
    (folder / "walks.json").write_text(json.dumps(about), "utf-8")  # written last: it marks the folder as complete
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
    """The walks in `folder`, memory-mapped. Raises FileNotFoundError unless they were written completely."""
    folder = Path(folder)
    if not (folder / "walks.json").is_file():
        raise FileNotFoundError(f"{folder}: expected walks.json, which write_walks writes last. Write them again.")
    about = json.loads((folder / "walks.json").read_text("utf-8"))
    if about["format"] > FORMAT:
        raise ValueError(f"{folder}: expected format {FORMAT} or older, got {about['format']}. Use a newer jaxwalk.")
    opened = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")
    return WalkStore(
        opened("tokens"),
        opened("stations"),
        tuple(about["stations"]),
        opened("context") if about["context"] else None,
        {layer: opened(f"mixing_{layer}") for layer in about["mixing"]},
    )
