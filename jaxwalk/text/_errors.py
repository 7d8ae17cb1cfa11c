"""Errors of corpora and token stores, and the import of packages that only an extra installs."""

import importlib
from types import ModuleType

from jaxwalk.config import ConfigError


class CorpusError(ConfigError):
    """A corpus that cannot be read, or that has too little text for its purpose."""


class StoreError(ConfigError):
    """A token store that is damaged, or that was built from something other than expected."""


def one_line(error: BaseException) -> str:
    """The type and message of an exception on one line, the message limited to 300 characters."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def optional(name: str, extra: str = "text") -> ModuleType:
    """The module `name` of a package that only the extra `extra` installs.

    Raises:
        ImportError: if it cannot be imported; the message has the command that installs the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {name!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'jaxwalk[{extra}]'"
        ) from error
