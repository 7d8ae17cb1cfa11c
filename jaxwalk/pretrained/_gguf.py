"""GGUF, llama.cpp's format, through the `gguf` package: metadata, tensors, and what quantised numbers stand for."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ModelConfig, unknown
from jaxwalk.pretrained._family import Family, Keys, families, parameters, read_config
from jaxwalk.text import optional

# Namespaces of metadata that say nothing about the mathematics of a model: remarks, its tokenizer, how it was
# quantised. What is left is the architecture's, where every key must be known.
_REMARKS = ("general.", "tokenizer.", "quantize.", "GGUF.", "split.")


class GGUFFile:
    """The metadata and the tensors of a file. Raises CheckpointError for one that is damaged or in several parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        gguf = optional("gguf", "pretrained")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: Mapping[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # the package checks little, so that damage shows as any error of NumPy
            raise CheckpointError(
                f"{path}: cannot be read as GGUF, it is cut short or damaged ({type(error).__name__}: {error}). "
                "Download it again."
            ) from error
        self.map = reader.data
        if self.metadata.get("split.count", 1) > 1:
            raise CheckpointError(f"{path}: one part of several. Merge them with llama.cpp's llama-gguf-split --merge.")

    def model(self) -> tuple[Family, ModelConfig]:
        """The family and the config. Raises CheckpointError, with all that is wrong."""
        known = {f.gguf.architecture: (f, f.gguf) for f in families().values() if f.gguf is not None}
        architecture = self.metadata.get("general.architecture")
        if architecture not in known:
            raise CheckpointError(f"{self.path}: {unknown('architecture of a GGUF file', architecture, known)}")
        (family, dialect), prefix = known[architecture], f"{architecture}."
        given = {k.removeprefix(prefix): v for k, v in self.metadata.items() if not k.startswith(_REMARKS)}
        embedding = self.tensors.get("token_embd.weight")
        if embedding is not None:
            given.setdefault("vocab_size", int(embedding.shape[-1]))
        keys, failure, written = Keys(given), None, {}
        try:
            written = dialect.config(keys, self.tensors)
        except (TypeError, ArithmeticError) as error:  # of values that are problems themselves
            failure = error
        if problems := keys.finish((), failure):
            raise CheckpointError(f"{self.path}: metadata of {architecture!r}: " + "; ".join(problems) + ".")
        # llama.cpp stores every linear map as [out, in].
        return family._replace(conv1d=False), read_config(family, {"model_type": family.model_types[0], **written})


class GGUFTensors:
    """The tensors of a file by the names that they have in safetensors, dequantised when they are read."""

    def __init__(self, file: GGUFFile, family: Family, config: ModelConfig) -> None:
        self._file, self._family, self._config = file, family, config
        gguf = optional("gguf", "pretrained")
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(kinds[file.metadata["general.architecture"]], config.depth)
        wanted = [part.name for parameter in parameters(family, config) for part in parameter.parts]
        ours = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in wanted}
        consumed = () if family.gguf is None else family.gguf.consumed
        self._tensors = {ours.get(name) or name: t for name, t in file.tensors.items() if name not in consumed}
        self.shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in self._tensors.items()}
        one_of_each = {tensor.tensor_type: tensor for tensor in self._tensors.values()}
        unknown_kinds = {kind for kind, tensor in one_of_each.items() if not _readable(kind, tensor.data)}
        self.refused = {n: t.tensor_type.name for n, t in self._tensors.items() if t.tensor_type in unknown_kinds}

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32, with what llama.cpp did to it undone."""
        tensor = self._tensors[name]
        array = optional("gguf.quants", "pretrained").dequantize(tensor.data, tensor.tensor_type)
        array = array.reshape(self.shapes[name])
        return array if self._family.gguf is None else self._family.gguf.undo(name, array, self._config)

    def release(self) -> None:
        """Take what has been read out of resident memory: it is in the file still."""
        mapped = self._file.map.base
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def _readable(kind: Any, data: np.ndarray) -> bool:
    try:
        optional("gguf.quants", "pretrained").dequantize(data[:1], kind)
    except NotImplementedError:
        return False
    return True
