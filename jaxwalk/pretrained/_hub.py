"""Repositories of the Hugging Face hub, brought to a local folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from jaxwalk.checkpoint import CheckpointError
from jaxwalk.pretrained._family import family_of
from jaxwalk.text import optional

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
    that is not there, or gated, and without a network.
    """
    hub = optional("huggingface_hub", "pretrained")
    config = _fetched(repository, revision, lambda: hub.hf_hub_download(repository, "config.json", revision=revision))
    try:
        given = json.loads(Path(config).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config}: cannot be read as JSON ({error}).") from error
    family_of(given.get("model_type"))
    download = lambda: hub.snapshot_download(repository, revision=revision, allow_patterns=list(_FILES))
    return Path(_fetched(repository, revision, download))


def _fetched(repository: str, revision: str | None, fetch: Callable[[], str]) -> str:
    errors = optional("huggingface_hub.errors", "pretrained")
    named = f"{repository!r}" + (f" at revision {revision!r}" if revision else "")
    local = "a folder with config.json and model.safetensors, or a .gguf file, copied from a machine that has them"
    try:
        return fetch()
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{named} on the Hugging Face hub is gated: accept its terms on its page, then set HF_TOKEN to a token "
            f"of your account, or give {local}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{named}: the repository is on the Hugging Face hub, but has no such revision."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{named}: no such file or folder here, nor in the hub's cache, and the Hugging Face hub cannot be "
            f"reached. Give {local}."
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
            f"({type(error).__name__}: {error}). Give {local}."
        ) from error
