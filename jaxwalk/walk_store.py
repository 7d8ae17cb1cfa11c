"""Walks on disk: chosen stations, context vectors and mixing matrices of many paths, for research of your own.

Paths are walked in batches and each is written as it comes, so that memory holds one batch, and read back as
memory-mapped arrays, so that it holds what is looked at. One `.npy` file per array, which any tool opens.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxwalk.transformer import Transformer

FORMAT = 1
"""Of the folder; a newer one may hold what this version does not know."""


class WalkStore(NamedTuple):
    """Walks of n paths of T tokens, memory-mapped; row i of every array is path i.

    tokens: [n, T]. stations: [n, len(station_numbers), T, D]. station_numbers: which they are, of 0 to S-1. context:
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
    """Walk `paths` and write what was asked for into `folder`, which must be new or empty.

    stations: their numbers, of 0 to S-1; by default all. context: whether the context vectors are written. mixing:
    the layers whose matrices are. dtype: of what is written. batch: how many paths are walked together. What is
    written in part, because the writing was interrupted, cannot be opened. Raises ValueError for stations, layers or
    tokens that do not exist, FileExistsError for a folder that holds something.
    """
    rows = np.asarray(paths)
    if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"paths: expected integers [n, T], at least one, got {rows.dtype} of shape {rows.shape}.")
    if rows.min() < 0 or rows.max() >= model.vocab_size:
        raise ValueError(f"paths: expected ids from 0 to {model.vocab_size - 1}, got {rows.min()} to {rows.max()}.")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}.")
    S = 2 * model.depth + 1
    numbers = tuple(range(S)) if stations is None else tuple(stations)
    for what, asked, size in (("stations", numbers, S), ("mixing", tuple(mixing), model.depth)):
        if stray := [number for number in asked if not 0 <= number < size]:
            raise ValueError(f"{what}: expected numbers from 0 to {size - 1}, got {', '.join(map(str, stray))}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected a new or empty folder. Walks that are there are not overwritten.")

    @jax.jit
    def walked(model: Transformer, rows: Array) -> dict[str, Array]:
        walk = jax.vmap(lambda row: model.walk(row, record_mixing=tuple(mixing)))(rows)
        found = {"tokens": rows, "stations": walk.stations[:, np.array(numbers, int)]}
        found |= {"context": walk.context} if context else {}
        return found | {f"mixing_{layer}": walk.mixing[layer] for layer in mixing}

    batch = min(batch, len(rows))
    files: dict[str, np.memmap] = {}
    for start in range(0, len(rows), batch):
        # The last batch is moved back to full size, so that one program takes all of them.
        first = min(start, len(rows) - batch)
        for name, values in walked(model, jnp.asarray(rows[first : first + batch])).items():
            if name not in files:
                kind = rows.dtype if name == "tokens" else np.dtype(dtype)
                shape = (len(rows), *values.shape[1:])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
            files[name][start : start + batch] = np.asarray(values)[start - first :]
    for file in files.values():
        file.flush()
    about = {"format": FORMAT, "stations": list(numbers), "context": context, "mixing": list(mixing)}
    (folder / "walks.json").write_text(json.dumps(about), "utf-8")  # last: it says that all the rest is there
    return read_walks(folder)


def read_walks(folder: str | os.PathLike[str]) -> WalkStore:
    """The walks in `folder`, memory-mapped. Raises FileNotFoundError where none were written to the end."""
    folder = Path(folder)
    if not (folder / "walks.json").is_file():
        raise FileNotFoundError(f"{folder}: expected walks.json, which write_walks leaves when it is done. Write anew.")
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
