"""The safetensors format: 8 bytes with the length of a JSON header, the header, raw little-endian numbers.

https://github.com/huggingface/safetensors. Read here rather than by the package of that name, whose NumPy side
copies what it reads: files are mapped into memory, one file or several with an index.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxwalk.checkpoint import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as the format says


class _Entry(NamedTuple):
    file: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    start: int


class Safetensors:
    """The tensors of one file, or of all files of a model.

    Raises CheckpointError for files that are cut short or damaged, and names them.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        self._files: list[mmap.mmap] = []
        for file in files:
            try:
                entries = _open(file)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
                raise CheckpointError(
                    f"{file}: cannot be read as safetensors ({error}). Download it again, or convert it again."
                ) from error
            if twice := entries.keys() & self._entries.keys():
                raise CheckpointError(f"{file}: tensors that another file has too: {', '.join(sorted(twice))}.")
            self._entries.update(entries)
            self._files.extend({id(entry.file): entry.file for entry in entries.values()}.values())
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.refused = {name: entry.dtype for name, entry in self._entries.items() if entry.dtype not in DTYPES}

    def read(self, name: str) -> np.ndarray:
        """A view of the file."""
        entry = self._entries[name]
        count = math.prod(entry.shape)
        return np.frombuffer(entry.file, DTYPES[entry.dtype], count, entry.start).reshape(entry.shape)

    def release(self) -> None:
        """Take what has been read out of resident memory: it is in the file still."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)


_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


def _open(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"expected at least 8 bytes, got {size}")
    with path.open("rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    (length,) = struct.unpack("<Q", file[:8])
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file[8 : 8 + length].decode("utf-8"))
    header.pop("__metadata__", None)
    entries, data = {}, 8 + length
    for name, given in header.items():
        dtype, shape, (start, end) = given["dtype"], tuple(map(int, given["shape"])), given["data_offsets"]
        if dtype in _SIZES and end - start != math.prod(shape) * _SIZES[dtype]:
            raise ValueError(f"{name}: {end - start} bytes for {dtype} {list(shape)}")
        if not 0 <= start <= end <= size - data:
            raise ValueError(f"cut short: expected {data + end} bytes or more for {name}, got {size}")
        entries[name] = _Entry(file, dtype, shape, data + start)
    return entries


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: the one, or those of the index.

    Raises CheckpointError where there are none, or not all, with the way out of other formats.
    """
    index = folder / "model.safetensors.index.json"
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: cannot be read ({type(error).__name__}: {error}).") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(f"{folder}: files that its index names are missing: {', '.join(missing)}.")
        return [folder / name for name in names]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise CheckpointError(refusal(folder / pickled[0]))
    raise CheckpointError(
        f"{folder}: expected model.safetensors, or model.safetensors.index.json with the files it names, "
        f"got {', '.join(p.name for p in others) or 'neither'}."
    )


PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def refusal(path: Path) -> str:
    """Why a file of pickled arrays, or of another format of weights, is not read, and what to do."""
    return (
        f"{path}: expected safetensors or GGUF, got {path.suffix}, a format that is not read: a pickle runs whatever "
        "code is in it. Where you trust it, convert it with transformers: AutoModelForCausalLM.from_pretrained("
        "folder).save_pretrained(new_folder), and load the new folder."
    )


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one file, sorted as the format asks: wide numbers first, so that all are aligned, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order, start = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0
    for name in order:
        array = tensors[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(
                np.ascontiguousarray(tensors[name]).data
                if tensors[name].dtype != ml_dtypes.bfloat16
                else np.ascontiguousarray(tensors[name]).view(np.uint16).data
            )
