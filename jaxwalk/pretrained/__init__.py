"""Pretrained models: foreign checkpoints, loaded as the same Transformer that training makes.

A file `foo.py` here defines `FAMILY`: which config keys of which model types mean what, and which tensors are which
parameters (see `_family.py`). That is all there is to adding one. Formats, tokenizers and the hub are in files with an
underscore. What could be loaded wrongly is refused.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxwalk import checkpoint
from jaxwalk.checkpoint import CheckpointError
from jaxwalk.config import ConfigError, ModelConfig
from jaxwalk.model.transformer import Transformer
from jaxwalk.pretrained._export import export
from jaxwalk.pretrained._family import Family, Store, assemble, families, family_of, read_config
from jaxwalk.pretrained._gguf import GGUFFile, GGUFTensors
from jaxwalk.pretrained._hub import download, is_repository, revisions
from jaxwalk.pretrained._safetensors import PICKLED, Safetensors, files_of, refusal
from jaxwalk.pretrained._series import by_step, name_of, subfolders
from jaxwalk.pretrained._tokenizer import of_folder, of_gguf
from jaxwalk.text import Vocabulary

__all__ = ["config_of", "export", "is_foreign", "load", "names", "series"]

_WEIGHTS = (".safetensors", ".gguf", *PICKLED)


def names() -> tuple[str, ...]:
    """The names of all families."""
    return tuple(families())


def series(source: str | os.PathLike[str], stage: str | None = None) -> dict[int, str]:
    """The steps of training that a source has, in order: step -> the revision or the sub-folder that its model is in.

    source: the id of a repository with branches or tags named after steps, as Pythia's ("step1000") and OLMo's
        ("step1000-tokens4B", "stage1-step1000-tokens5B") are; or a folder with sub-folders so named, or as
        transformers' Trainer names them ("checkpoint-1000"). There are none elsewhere.
    stage: what comes before the step ("stage2-ingredient1") where steps are counted anew; by default the first by name.

    Without a network a repository's steps are those in the hub's cache. `load(source, step=...)` loads one. Raises
    CheckpointError for two names of one step, and where nothing can be known of a repository; ConfigError for a stage
    that is not there.
    """
    names = revisions(str(source)) if _on_hub(source) else subfolders(Path(source))
    return by_step(names, stage)


def load(
    source: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    *,
    step: int | Literal["latest", "best"] = "latest",
    revision: str | None = None,
) -> tuple[Transformer, Vocabulary | None]:
    """A model and its vocabulary: `model, vocabulary`. The vocabulary is None where there is none.

    source: a run's folder, or one step copied from it; a folder as Hugging Face's transformers writes it, with
        config.json, safetensors and perhaps tokenizer.json, or one with such sub-folders, named after steps of
        training; a .safetensors file, with these beside it; a .gguf file; or the id of a repository on the Hugging Face
        hub.
    dtype: of parameters and computation. Tensors are cast one by one, so that there are never two copies of a model.
    mesh: devices to place the parameters on, in parts, as training does; by default all are on one device.
    step: of a run: a kept step's number, the latest, or the best by evaluation loss. Of a pretrained model: one of
        `series(source)`; by default the model itself, or the latest where there are only steps.
    revision: of a repository on the hub: a branch, tag or commit.

    The vocabulary has encode(str) -> [N], which adds no special tokens, decode([N]) -> str, and begin: id or None.
    Parameters are what the file holds, transposed, concatenated and cast, but never altered. Raises CheckpointError
    for what is not there or cannot be read, and for what would be another model: config keys that are not known, and
    tensors that are missing, not known or misshapen, each named. Raises ConfigError for a dtype that is no float, and
    for a step or a revision of what has none.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"dtype: expected a floating-point one, got {dtype}. Parameters are real numbers.")
    if _is_run(source, revision):
        return checkpoint.load(source, dtype, mesh, step=step)
    found = _opened(source, step, revision)
    model = assemble(found.family, found.config, found.tensors(), dtype, mesh, found.place)
    return model, found.vocabulary()


def config_of(
    source: str | os.PathLike[str], *, step: int | Literal["latest"] = "latest", revision: str | None = None
) -> ModelConfig:
    """The model that `load` makes of a foreign `source`, without its parameters: to initialise one like it, say.

    Raises as `load` does, and ConfigError for a run's folder, which has its config in `checkpoint.Run`.
    """
    if _is_run(source, revision):
        raise ConfigError(f"source: expected a pretrained model, got {source}. See jaxwalk.checkpoint.Run for runs.")
    return _opened(source, step, revision).config


def is_foreign(source: str | os.PathLike[str]) -> bool:
    """Whether `load` takes this for a foreign checkpoint, and not for a run's folder or a step of one."""
    return not _is_run(source, None)


class _Opened(NamedTuple):
    """A checkpoint whose tensors are not read yet. place: what errors name."""

    family: Family
    config: ModelConfig
    tensors: Callable[[], Store]
    vocabulary: Callable[[], Vocabulary | None]
    place: Path


def _is_run(source: str | os.PathLike[str], revision: str | None) -> bool:
    path, on_hub = Path(source), _on_hub(source)
    if revision is not None and not on_hub:
        raise ConfigError(f"revision: expected a repository on the hub to take it from, got {path}.")
    if on_hub or path.is_file() or _is_foreign(path):
        return False
    return (path / "config.json").is_file() or not series(path)


def _opened(source: str | os.PathLike[str], step: int | Literal["latest", "best"], revision: str | None) -> _Opened:
    path = Path(source)
    if revision is not None and step != "latest":
        raise ConfigError(f"step: expected no revision beside it, got {revision!r}, which is one step already.")
    if _on_hub(source):
        revision = revision if step == "latest" else name_of(step, series(source), source)
        return _opened_folder(download(str(source), revision))
    if step != "latest" or not (path.is_file() or _is_foreign(path)):
        return _opened(path / name_of(step, series(path), path), "latest", None)
    if path.is_file():
        return _opened_file(path)
    if not (path / "config.json").is_file():
        return _opened_file(next(path.glob("*.gguf")))
    return _opened_folder(path)


def _on_hub(source: str | os.PathLike[str]) -> bool:
    path = Path(source)
    return not path.exists() and is_repository(source) and path.suffix not in _WEIGHTS


def _is_foreign(folder: Path) -> bool:
    """Whether this is the folder of a pretrained model: with a config.json that is none of ours, or one GGUF file."""
    if not (folder / "config.json").is_file():
        return folder.is_dir() and len(list(folder.glob("*.gguf"))) == 1
    if (folder / "checkpoints").is_dir():
        return False
    return not {"format_version", "config"} <= _read_json(folder / "config.json").keys()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        given = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(given, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(given).__name__}.")
    return given


def _opened_file(path: Path) -> _Opened:
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        family, config = file.model()
        return _Opened(
            family,
            config,
            lambda: GGUFTensors(file, family, config),
            lambda: of_gguf(file.metadata, config.vocab_size),
            path,
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            refusal(path) if path.suffix in PICKLED else f"{path}: expected a .safetensors or .gguf file, or a folder."
        )
    if not (path.parent / "config.json").is_file():
        raise CheckpointError(
            f"{path}: expected config.json beside it, which says what its tensors are; there is none."
        )
    return _opened_folder(path.parent, path)


def _opened_folder(folder: Path, file: Path | None = None) -> _Opened:
    given = _read_json(folder / "config.json")
    try:
        family = family_of(given.get("model_type"))
        config = read_config(family, given)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return _Opened(
        family,
        config,
        lambda: Safetensors([file] if file is not None else files_of(folder)),
        lambda: of_folder(folder, given, config.vocab_size),
        file or folder,
    )
