"""Text: vocabularies, corpora, token stores, and batches as a pure function of (seed, step).

Corpora yield documents, a vocabulary encodes them as tokens, and a memory-mapped store packs the tokens of all
documents end to end, each document after its begin-of-path token. Batches are windows of the packed tokens:

    store = open_store(TextData(corpus="pydoc"))  # tokenised on first use, then only opened
    tokens, segments = store.batch(seed=0, step=7, batch_size=12, length=65)

`segments` numbers the documents of a window from 1, and is 0 on padding. A model that restricts positions and
associations to one segment scores a packed window exactly as it scores the pieces of documents in it one by one.

Everything here uses NumPy and does not import JAX. The packages of the extra `text` are imported where they are used.
"""

from jaxwalk.text._encoding import byte_letters
from jaxwalk.text._errors import CorpusError, StoreError, optional
from jaxwalk.text.build import open_store
from jaxwalk.text.corpora import documents
from jaxwalk.text.pieces import cut
from jaxwalk.text.store import SPLITS, Split, TokenStore, read_store
from jaxwalk.text.tokenizer import TokenizerVocabulary
from jaxwalk.text.vocabularies import (
    BPEVocabulary,
    ByteVocabulary,
    SymbolVocabulary,
    Vocabulary,
    vocabulary_from_dict,
)

__all__ = [
    "SPLITS",
    "BPEVocabulary",
    "ByteVocabulary",
    "CorpusError",
    "Split",
    "StoreError",
    "SymbolVocabulary",
    "TokenStore",
    "TokenizerVocabulary",
    "Vocabulary",
    "byte_letters",
    "cut",
    "documents",
    "open_store",
    "optional",
    "read_store",
    "vocabulary_from_dict",
]
