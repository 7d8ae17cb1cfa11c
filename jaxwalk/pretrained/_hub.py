"""Repositories of the Hugging Face hub, brought to a local folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jaxwalk.checkpoint import CheckpointError
from jaxwalk.pretrained._family import family_of
from jaxwalk.text import optional

T = TypeVar("T")

_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def is_repository(source: object) -> bool:
    """Whether this could be the id of a repository: "gpt2", "HuggingFaceTB/SmolLM2-135M"."""
    return isinstance(source, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def download(repository: str, revision: str | None) -> Path:
    """The folder that a repository's config, safetensors and tokenizer are in, from the cache where they are there.

    A model of a family that we lack is refused before its tensors are fetched. Raises CheckpointError for a repository
    that is not there, or gated, or has no safetensors, and without a network.
    """
    hub = optional("huggingface_hub", "pretrained")
    config = _fetched(repository, revision, lambda: hub.hf_hub_download(repository, "config.json", revision=revision))
    try:
        given = json.loads(Path(config).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config}: cannot be read as JSON ({error}).") from error
    family_of(given.get("model_type"))
    download = lambda: hub.snapshot_download(repository, revision=revision, allow_patterns=list(_FILES))
    folder = Path(_fetched(repository, revision, download))
    if not any(folder.glob("*.safetensors")):
        at = "" if revision is None else f", revision={revision!r}"
        raise CheckpointError(
            f"{_named(repository, revision)} has no safetensors, and pickled weights are not read: a pickle runs "
            "whatever code is in it. Where you trust it, convert it with transformers: AutoModelForCausalLM."
            f"from_pretrained({repository!r}{at}).save_pretrained(folder), and load the folder."
        )
    return folder


def revisions(repository: str) -> list[str]:
    """The names of a repository's branches and tags; without a network of those in the cache.

    Raises CheckpointError for a repository that is not there, or gated, or not in the cache and without a network.
    """
    hub = optional("huggingface_hub", "pretrained")
    try:
        refs = _fetched(
            repository,
            None,
            lambda: hub.list_repo_refs(repository),
            "a folder with a sub-folder for each step (step0, step1000, ...)",
        )
    except CheckpointError:
        cache = Path(optional("huggingface_hub.constants", "pretrained").HF_HUB_CACHE)
        cached = cache / f"models--{repository.replace('/', '--')}" / "refs"
        if not cached.is_dir():
            raise
        return [path.name for path in cached.iterdir()]
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _named(repository: str, revision: str | None) -> str:
    return f"{repository!r}" + (f" at revision {revision!r}" if revision else "")


def _fetched(
    repository: str,
    revision: str | None,
    fetch: Callable[[], T],
    local: str = "a folder with config.json and model.safetensors, or a .gguf file",
) -> T:
    errors = optional("huggingface_hub.errors", "pretrained")
    named = _named(repository, revision)
    try:
        return fetch()
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{named} on the Hugging Face hub is gated: accept its terms on its page, then set HF_TOKEN to a token "
            f"of your account, or give {local}, copied from a machine that has them."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{named}: the repository is on the Hugging Face hub, but has no such revision."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{named}: no such file or folder here, nor in the hub's cache, and the Hugging Face hub cannot be "
            f"reached. Give {local}, copied from a machine that has them."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{named}: no such file or folder here, and no such repository on the Hugging Face hub (or a private one: "
            "set HF_TOKEN). Check its name."
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"{named}: the repository has no config.json: it is no model that can be loaded."
        ) from error
    except Exception as error:  # the client raises those of whichever HTTP library it uses
        raise CheckpointError(
            f"{named}: no such file or folder here, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}: {error}). Give {local}, copied from a machine that has them."
        ) from error
