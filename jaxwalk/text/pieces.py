"""Pieces of a text that a trained model is analysed on, as a token store in memory."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Int32

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
"""About one in so many pieces is for fitting nulls; the others are measured."""
_FEWEST_SOURCES = 12
"""Documents below which blocks of consecutive pieces take their place, so that there are 8 or more to measure."""
_BLOCKS = 16
"""The number of these blocks."""


def cut(corpus: str, vocabulary: Vocabulary, longest: int, length: int | None = None) -> TokenStore:
    """A text for analysis, not for training, as a store in memory whose documents are pieces of `length` + 1 tokens.

    Each document of the corpus is divided into consecutive pieces; its remainder is dropped. If the vocabulary has a
    begin-of-path token, every piece begins with it. About every fourth document is in the split "train", for fitting
    nulls; the others, which are measured, are in "validation". `Split.sources` numbers the documents. Of a text with
    fewer than 12 documents, blocks of consecutive pieces take their place, so that what is measured holds for this
    text, not for others like it.

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
    length = length or _default_length(texts, begin, longest)
    pieces = _pieces(texts, begin, length)
    sources = _sources([len(_pieces([text], begin, length)) for text in texts])
    for_nulls = _for_nulls(sources)
    if (~for_nulls).sum() < _MIN_MEASURED:
        raise CorpusError(
            f"corpus {corpus!r}: expected at least {_MIN_MEASURED * _NULL_PERIOD // (_NULL_PERIOD - 1)} pieces of "
            f"{pieces.shape[1] - 1} tokens, of which one in {_NULL_PERIOD} is for fitting nulls, got {len(pieces)}. "
            "Use a longer text, or shorter pieces."
        )

    def split(chosen: Bool[np.ndarray, " pieces"]) -> Split:
        rows = pieces[chosen]
        starts = np.arange(len(rows)) * rows.shape[1]
        return Split(rows.ravel(), starts, int(vocabulary.lengths[rows[:, 1:]].sum()), sources[chosen])

    fingerprint = hashlib.sha256(pieces.tobytes()).hexdigest()
    train, validation = split(for_nulls), split(~for_nulls)
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


def _sources(counts: list[int]) -> Int[np.ndarray, " pieces"]:
    """The document, or the block, of each piece, given how many pieces each document has."""
    counts = [count for count in counts if count]
    if len(counts) >= _FEWEST_SOURCES:
        return np.repeat(np.arange(len(counts)), counts)
    pieces = sum(counts)
    return np.arange(pieces) * min(_BLOCKS, pieces) // max(pieces, 1)


def _for_nulls(sources: Int[np.ndarray, " pieces"]) -> Bool[np.ndarray, " pieces"]:
    """Which pieces are for fitting nulls: those of every source whose middle is the next that the period asks for."""
    chosen = np.zeros(len(sources), bool)
    taken = 0
    for source in np.unique(sources):
        rows = np.flatnonzero(sources == source)
        if _NULL_PERIOD * (taken + len(rows) / 2) <= rows[-1] + 1:
            chosen[rows] = True
            taken += len(rows)
    return chosen


def _default_length(texts: list[np.ndarray], begin: np.ndarray, longest: int) -> int:
    """The longest default length with enough measured pieces, or else the shortest that the model walks."""
    lengths = [length for length in _LENGTHS if length <= longest] or [longest]
    for length in lengths:
        if len(_pieces(texts, begin, length)) * (_NULL_PERIOD - 1) >= _ENOUGH_MEASURED * _NULL_PERIOD:
            return length
    return lengths[-1]
