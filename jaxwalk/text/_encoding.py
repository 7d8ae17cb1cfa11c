"""What several vocabularies need: UTF-8, checks and display of tokens, and texts in parts of bounded size."""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Integer

Label = TypeVar("Label")

_CHUNK_SIZE = 1 << 18
"""Characters of a long text that BPE encodes at once; the library needs about 160 bytes of memory per character."""
_GROUP_SIZE = 1 << 20
"""Characters of the texts that are encoded together."""

# Byte-level BPE never merges a newline between two visible ASCII characters with what is around it, so the tokens of
# a text divided after such a newline are the tokens of the two parts.
_CHUNK_BOUNDARY = re.compile(r"(?<=[!-~])\n(?=[!-~])")


def to_utf8(text: str) -> bytes:
    """`text` encoded as UTF-8.

    Raises:
        ValueError: if it has a lone surrogate.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected text that UTF-8 can encode, got the lone surrogate U+{ord(text[error.start]):04X} at "
            f"character {error.start}. Remove it, or decode the source of the text with its actual encoding."
        ) from error


def check_tokens(tokens: Any, size: int) -> Integer[np.ndarray, " N"]:
    """`tokens` as an integer array [N].

    Raises:
        ValueError: if they are not one sequence of integers from 0 to `size` - 1.
    """
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        tokens = tokens.astype(np.int32)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens: expected integers [N], got {tokens.dtype} {list(tokens.shape)}. "
            "Decode the integer ids of one path at a time."
        )
    wrong = np.flatnonzero((tokens < 0) | (tokens >= size))
    if wrong.size:
        raise ValueError(
            f"tokens: expected ids from 0 to {size - 1}, got {tokens[wrong[0]]} at position {wrong[0]}. "
            "Use the vocabulary that encoded the tokens."
        )
    return tokens


def display(token: bytes) -> str:
    r"""The bytes of a token as printable text: a space as "␣", other unprintables escaped (`\n`, `\xe2`)."""

    def escape(char: str) -> str:
        if "\udc80" <= char <= "\udcff":  # "surrogateescape" decodes a byte that is invalid in UTF-8 to one of these
            return f"\\x{ord(char) - 0xDC00:02x}"
        if char == " ":
            return "␣"
        return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")

    return "".join(map(escape, token.decode("utf-8", "surrogateescape")))


def byte_letters() -> dict[str, int]:
    """The byte that each letter of byte-level BPE stands for, as in GPT-2: printable bytes are their own letters."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return {chr(b if b in printable else next(others)): b for b in range(256)}


def chunk_text(text: str) -> Iterator[str]:
    """Yield consecutive chunks of `text` whose byte-level BPE tokens, concatenated, are those of the whole text.

    A chunk ends at the first boundary after `_CHUNK_SIZE` characters; a text without a boundary is one chunk.
    """
    start = 0
    while len(text) - start > _CHUNK_SIZE and (boundary := _CHUNK_BOUNDARY.search(text, start + _CHUNK_SIZE)):
        yield text[start : boundary.end()]
        start = boundary.end()
    yield text[start:]


def group_texts(texts: Iterable[tuple[Label, str]]) -> Iterator[list[tuple[Label, str]]]:
    """Yield the labelled texts in lists of about `_GROUP_SIZE` characters: enough for all cores, in bounded memory."""
    group: list[tuple[Label, str]] = []
    characters = 0
    for label, text in texts:
        group.append((label, text))
        characters += len(text)
        if characters >= _GROUP_SIZE:
            yield group
            group, characters = [], 0
    if group:
        yield group
