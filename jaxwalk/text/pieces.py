"""Pieces of a text that a trained model is analysed on, as a token store in memory."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from jaxwalk.config import ConfigError, TextData
from jaxwalk.text._encoding import group_texts
from jaxwalk.text._errors import CorpusError
from jaxwalk.text.corpora import LOADERS, documents, read_text_file
from jaxwalk.text.store import Split, TokenStore
from jaxwalk.text.vocabularies import SymbolVocabulary, TextVocabulary, Vocabulary

_LENGTHS = (128, 64, 32, 16)
"""The default lengths of pieces, the most preferred first."""
_ENOUGH_MEASURED = 64
"""Measured pieces at which a default length is accepted."""
_MIN_MEASURED = 8
"""Measured pieces below which a text is refused."""
_NULL_PERIOD = 4
"""One in so many pieces is for fitting nulls; the others are measured."""


def cut(corpus: str, vocabulary: Vocabulary, longest: int, length: int | None = None) -> TokenStore:
    """A text for analysis, not for training, as a store in memory whose documents are pieces of `length` + 1 tokens.

    Each document of the corpus is divided into consecutive pieces; its remainder is dropped. If the vocabulary has a
    begin-of-path token, every piece begins with it. Every fourth piece is in the split "train", for fitting nulls; the
    others, which are measured, are in "validation".

    Args:
        corpus: A text file in UTF-8, or any corpus that `documents` reads.
        vocabulary: Of the model.
        longest: The largest number of tokens that the model walks.
        length: The tokens of a piece that the model walks, from 2 to `longest`; one more is only predicted. By
            default the longest of 128, 64, 32 and 16 that gives enough pieces.

    Raises:
        CorpusError: if the corpus cannot be read, or is too short for 8 measured pieces.
        ConfigError: for a length that the model cannot walk, and for a vocabulary of symbols.
    """
    if isinstance(vocabulary, SymbolVocabulary):
        raise ConfigError(
            "text: expected a model of text, got one whose tokens are the symbols of a world. Analyse it on its world."
        )
    if length is not None and not 2 <= length <= longest:
        raise ConfigError(
            f"length: expected from 2 to {longest}, the largest number of tokens that the model walks, got {length}."
        )
    texts = _encode_corpus(corpus, vocabulary)
    begin = np.array([] if vocabulary.begin is None else [vocabulary.begin], np.int32)
    pieces = _pieces(texts, begin, length or _default_length(texts, begin, longest))
    for_nulls = np.arange(len(pieces)) % _NULL_PERIOD == _NULL_PERIOD - 1
    if (~for_nulls).sum() < _MIN_MEASURED:
        raise CorpusError(
            f"corpus {corpus!r}: expected at least {_MIN_MEASURED * _NULL_PERIOD // (_NULL_PERIOD - 1)} pieces of "
            f"{pieces.shape[1] - 1} tokens, of which one in {_NULL_PERIOD} is for fitting nulls, got {len(pieces)}. "
            "Use a longer text, or shorter pieces."
        )

    def split(rows: Int32[np.ndarray, "rows N"]) -> Split:
        starts = np.arange(len(rows)) * rows.shape[1]
        return Split(rows.ravel(), starts, int(vocabulary.lengths[rows[:, 1:]].sum()))

    fingerprint = hashlib.sha256(pieces.tobytes()).hexdigest()
    train, validation = split(pieces[for_nulls]), split(pieces[~for_nulls])
    return TokenStore(None, fingerprint, vocabulary, train, validation)


def _encode_corpus(corpus: str, vocabulary: TextVocabulary) -> list[np.ndarray]:
    """The tokens of each document, without begin-of-path tokens."""
    path = Path(corpus).expanduser()
    # A file of text may have any suffix here, unlike in a corpus for training.
    is_text_file = path.is_file() and path.suffix.lower() not in LOADERS
    texts = read_text_file(path) if is_text_file else documents(TextData(corpus=corpus))
    groups = group_texts((None, text) for text in texts)
    return [tokens for group in groups for tokens in vocabulary.encode_all([text for _, text in group])]


def _pieces(texts: list[np.ndarray], begin: np.ndarray, length: int) -> Int32[np.ndarray, "pieces N"]:
    """All pieces of the texts, each of `length` + 1 tokens of which the first are `begin`."""
    size = length + 1 - len(begin)
    empty = np.empty((0, size), np.int32)
    rows = np.concatenate([empty, *(text[: len(text) // size * size].reshape(-1, size) for text in texts)])
    return np.concatenate([np.broadcast_to(begin, (len(rows), len(begin))), rows], axis=1)


def _default_length(texts: list[np.ndarray], begin: np.ndarray, longest: int) -> int:
    """The longest default length with enough measured pieces, or else the shortest that the model walks."""
    lengths = [length for length in _LENGTHS if length <= longest] or [longest]
    for length in lengths:
        if len(_pieces(texts, begin, length)) * (_NULL_PERIOD - 1) >= _ENOUGH_MEASURED * _NULL_PERIOD:
            return length
    return lengths[-1]
