"""Token stores: the packed tokens of both splits, and batches of windows over them.

A store on disk is a folder with `store.json` (fingerprint, counts, vocabulary) and two files for each split:
`<split>.tokens`, its documents packed end to end, and `<split>.starts`, where each of them starts.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int, Int32, Integer

from jaxwalk.config import ConfigError, unknown
from jaxwalk.text._errors import StoreError, one_line
from jaxwalk.text.vocabularies import (
    BPEVocabulary,
    ByteVocabulary,
    SymbolVocabulary,
    TextVocabulary,
    vocabulary_from_dict,
)

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

STARTS_DTYPE = "<i8"
"""Type of the starts on disk."""


def tokens_dtype(vocabulary: ByteVocabulary | BPEVocabulary) -> str:
    """The type of the tokens on disk: the smallest that holds every id."""
    return "<u2" if vocabulary.size <= 1 << 16 else "<u4"


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a store: its documents, packed end to end.

    Attributes:
        tokens: [N], the begin-of-path token of each document (if the vocabulary has one), then its text.
        starts: [documents], the position in `tokens` at which each document starts.
        bytes: Bytes of UTF-8 of all documents, without the first token of each, which is never predicted.
        sources: [documents], the document of the corpus that each is a piece of; by default each is a whole one.
    """

    tokens: Integer[np.ndarray, " N"]
    starts: Int[np.ndarray, " documents"]
    bytes: int
    sources: Int[np.ndarray, " documents"] | None = None

    def document(self, index: int) -> Int32[np.ndarray, " n"]:
        """The tokens [n] of one document, including its begin-of-path token.

        Raises:
            IndexError: if there is no such document.
        """
        if not 0 <= index < len(self.starts):
            raise IndexError(f"document: expected 0 to {len(self.starts) - 1}, got {index}.")
        end = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.tokens)
        return self.tokens[self.starts[index] : end].astype(np.int32)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A tokenised corpus and its batches. `open_store` builds one on disk, `cut` one in memory.

    Attributes:
        folder: Where the store is on disk; None if it is in memory.
        fingerprint: Identifies the content. Stores on disk: a digest of corpus, tokenizer and format.
        vocabulary: What the tokens are.
        train: The training split.
        validation: The held-out split.
    """

    folder: Path | None
    fingerprint: str
    vocabulary: TextVocabulary
    train: Split
    validation: Split

    def split(self, name: str) -> Split:
        """The split called `name`.

        Raises:
            ConfigError: if the name is neither "train" nor "validation".
        """
        if name not in SPLITS:
            raise ConfigError(unknown("split", name, SPLITS))
        return self.train if name == "train" else self.validation

    def batch(
        self, seed: int, step: int, batch_size: int, length: int, split: str = "train"
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
        """One batch of random windows: a pure function of the arguments and the store.

        Each row is a window of the packed split at a uniformly random position, which may start or end inside a
        document. A split shorter than `length` gives rows that hold all of it, followed by padding.

        Args:
            seed: Of the run, at least 0.
            step: Of the run, at least 0. Every pair of seed and step gives a batch of its own.
            batch_size: B, the number of windows.
            length: T, the number of tokens in a window.
            split: "train" or "validation".

        Returns:
            Tokens and segments, both [B, T]. Segments number the documents of a row from 1. Padding is token 0,
            segment 0.

        Raises:
            ValueError: for a seed or step below 0, or a size below 1.
            ConfigError: for an unknown split.
        """
        _check_minimum(seed=(seed, 0), step=(step, 0), batch_size=(batch_size, 1), length=(length, 1))
        data = self.split(split)
        positions = max(1, len(data.tokens) - length + 1)
        # NumPy keeps the raw stream of a bit generator fixed across versions, but not the results of Generator's
        # methods. The bias of the remainder is negligible, as there are far fewer positions than 2^64.
        bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(step, SPLITS.index(split))))  # type: ignore[arg-type]
        return _windows_at(data, (bits.random_raw(batch_size) % positions).astype(np.int64), length)

    def windows(
        self,
        split: str,
        length: int,
        stride: int | None = None,
        limit: int | None = None,
        batch_size: int = 64,
    ) -> Iterator[tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]]:
        """Consecutive windows over the whole split, in batches of the same shape.

        The last window and the last batch are padded, so that one compiled function serves all batches.

        Args:
            split: "train" or "validation".
            length: T, the number of tokens in a window.
            stride: Tokens from the start of one window to the start of the next. By default `length`, with which
                every token is in exactly one window. With `length` - 1, every step from one token to the next is in
                exactly one window: the first token of a window, which is not scored, is the last of the one before.
            limit: Only the first `limit` windows; None for all.
            batch_size: B, the number of windows in a batch.

        Returns:
            An iterator of tokens and segments, both [B, T], as from `batch`.

        Raises:
            ValueError: for a size below 1, or a stride above `length`.
            ConfigError: for an unknown split.
        """
        stride = length if stride is None else stride
        _check_minimum(length=(length, 1), stride=(stride, 1), batch_size=(batch_size, 1))
        if limit is not None:
            _check_minimum(limit=(limit, 1))
        if stride > length:
            raise ValueError(
                f"stride: expected at most length = {length}, got {stride}, which would skip tokens between windows."
            )
        data = self.split(split)
        count = 1 + max(0, -(-(len(data.tokens) - length) // stride))
        count = count if limit is None else min(count, limit)

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for first in range(0, count, batch_size):
                window = np.arange(first, first + batch_size)
                # Windows beyond the count start at the end of the split, where everything is padding.
                yield _windows_at(data, np.where(window < count, window * stride, len(data.tokens)), length)

        return batches()

    def bytes_per_token(self, split: str = "validation") -> float:
        """Bytes of UTF-8 per token of text in the split; exactly 1 for the byte vocabulary.

        The first token of each document counts neither as bytes nor as a token, because it is never predicted:

            bits per byte = nats per predicted token / ln 2 / bytes_per_token

        Raises:
            ConfigError: for an unknown split.
        """
        data = self.split(split)
        return data.bytes / (len(data.tokens) - len(data.starts))


def _check_minimum(**values: tuple[int, int]) -> None:
    for name, (value, minimum) in values.items():
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}.")


def _windows_at(
    split: Split, starts: Int[np.ndarray, " B"], length: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Tokens and segments of the windows of the split that start at `starts`."""
    position = starts[:, None] + np.arange(length)
    document = np.searchsorted(split.starts, position, side="right")
    segments = document - document[:, :1] + 1
    end = len(split.tokens)
    if np.max(position) < end:
        return split.tokens[position].astype(np.int32), segments.astype(np.int32)
    inside = position < end
    tokens = split.tokens[np.minimum(position, end - 1)]
    return np.where(inside, tokens, 0).astype(np.int32), np.where(inside, segments, 0).astype(np.int32)


def read_store(folder: str | os.PathLike[str], fingerprint: str) -> TokenStore:
    """The store in a folder that `open_store` wrote, with its tokens memory-mapped.

    Raises:
        StoreError: if the store is damaged, or does not have this fingerprint.
    """
    path = Path(folder)
    remedy = f"Delete the folder {path}: the next run builds the store again."
    try:
        metadata = json.loads((path / "store.json").read_text(encoding="utf-8"))
        actual, counts = metadata["fingerprint"], metadata["splits"]
        vocabulary = vocabulary_from_dict(metadata["vocabulary"])
        counts = {name: {k: int(counts[name][k]) for k in ("tokens", "documents", "bytes")} for name in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path / 'store.json'}: cannot be read ({one_line(error)}). {remedy}") from error
    if actual != fingerprint:
        raise StoreError(
            f"{path}: expected the store with fingerprint {fingerprint}, got {actual}: it was built from another "
            f"corpus or tokenizer, or by another version. {remedy}"
        )
    if not isinstance(vocabulary, ByteVocabulary | BPEVocabulary):
        kind = "symbols" if isinstance(vocabulary, SymbolVocabulary) else "a tokenizer"
        raise StoreError(f"{path}: expected a vocabulary of bytes or bpe, got {kind}. {remedy}")

    def memory_map(name: str, dtype: str, count: int) -> np.ndarray:
        file, size = path / name, count * np.dtype(dtype).itemsize
        file_size = file.stat().st_size if file.is_file() else None
        if file_size != size or size == 0:
            raise StoreError(
                f"{file}: expected {size} bytes according to store.json, and at least one, got {file_size or 'none'}. "
                f"{remedy}"
            )
        # A plain view, because indexing a np.memmap costs several times as much as the lookup itself.
        return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(count,)))

    def read_split(name: SplitName) -> Split:
        tokens = memory_map(f"{name}.tokens", tokens_dtype(vocabulary), counts[name]["tokens"])
        starts = memory_map(f"{name}.starts", STARTS_DTYPE, counts[name]["documents"])
        return Split(tokens, starts, counts[name]["bytes"])

    return TokenStore(path, fingerprint, vocabulary, read_split("train"), read_split("validation"))
