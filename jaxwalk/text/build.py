"""Building a token store on disk: documents are assigned to two splits, tokenised, and written."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxwalk.config import TextData
from jaxwalk.text._encoding import group_texts, to_utf8
from jaxwalk.text._errors import CorpusError
from jaxwalk.text.corpora import OFFLINE_HINT, documents, local_files, pydoc_topics
from jaxwalk.text.store import SPLITS, STARTS_DTYPE, SplitName, TokenStore, read_store, tokens_dtype
from jaxwalk.text.vocabularies import BPEVocabulary, ByteVocabulary

FORMAT_VERSION = 1
"""Version of the store on disk, and of the rules by which documents become tokens and splits."""

_REPORT_EVERY = 10_000_000
"""Tokens between two lines of progress."""
_BPE_SAMPLE_SIZE = 1 << 26
"""Characters of the training documents that BPE is trained on."""
_SPLIT_KEY = "split"
"""Key of the hash that assigns documents to splits.

Any key would do. The documents of "pydoc" are few and of uneven size; of several keys tried, this one holds out about
the same share of their text as of their number, on Python 3.11 and 3.12.
"""


def open_store(config: TextData, report: Callable[[str], object] | None = None) -> TokenStore:
    """The token store of a config, built below `config.store` on first use and only opened after that.

    The store's folder is named by a fingerprint of the corpus, the tokenizer and the format. Local files are
    identified by their content. A dataset on the hub is identified by its name, so its store opens without a network,
    but a new revision is not noticed: delete the folder to read it.

    With `config.max_tokens`, which counts begin-of-path tokens, the validation split takes at most its share
    `config.validation` and the training split at most the rest. Documents are read until both are full or the corpus
    ends.

    A BPE vocabulary is trained on the first 2^26 characters of the training documents, and the corpus is then read a
    second time. The folder appears only when it is complete, and several processes may build it at once. A process
    that is killed leaves a folder `.unfinished-...`, which is never read and may be deleted.

    Args:
        config: The corpus, the tokenizer, and where stores are.
        report: Called with a line of progress from time to time; for example `print`.

    Raises:
        CorpusError: if the corpus cannot be read or is too small.
        StoreError: if the store on disk is damaged.
    """
    inputs = _fingerprint_inputs(config)
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.corpus).name).strip("-.") or "corpus"
    folder = Path(config.store).expanduser() / f"{name[:40]}-{config.tokenizer}-{fingerprint[:16]}"
    if not folder.exists():
        _build(config, folder, {"fingerprint": fingerprint, "corpus": config.corpus, "made_from": inputs}, report)
    return read_store(folder, fingerprint)


def _fingerprint_inputs(config: TextData) -> dict[str, Any]:
    """Everything that the content of the store depends on, as JSON data."""
    if config.corpus == "pydoc":
        texts = json.dumps(pydoc_topics(config)).encode()
        corpus: dict[str, Any] = {"pydoc": hashlib.sha256(texts).hexdigest()}
    elif (files := local_files(config)) is not None:
        digests = []
        for file in files:
            with file.open("rb") as content:
                digests.append([file.suffix.lower(), hashlib.file_digest(content, "sha256").hexdigest()])
        corpus = {"files": digests, "column": config.column}
    else:
        corpus = {"hub": config.corpus, "subset": config.subset, "split": config.split, "column": config.column}
    return {
        "format": FORMAT_VERSION,
        "corpus": corpus,
        "max_tokens": config.max_tokens,
        "validation": [config.validation, _SPLIT_KEY],
        "tokenizer": [config.tokenizer, config.vocab_size],
    }


# Splits: which documents train, and which are held out.


def _split_documents(config: TextData) -> Iterator[tuple[SplitName, str]]:
    """Yield each document with its split. Both splits get at least one.

    A hash of the document decides, so equal documents are in the same split, and a document stays in its split when
    others are added or removed. There are two exceptions: if a split would be empty, the last document of the corpus
    goes to it; if there is only one document, it is divided and its end is held out.
    """
    used: set[SplitName] = set()
    previous = None  # one document behind, because the last one is treated differently
    for text in documents(config):
        if previous is not None:
            split = _split_of(previous, config.validation)
            used.add(split)
            yield split, previous
        previous = text
    last = previous
    if last is None:
        raise CorpusError(f"corpus {config.corpus!r}: expected documents, got none with any text. {OFFLINE_HINT}")
    if used:
        empty = [split for split in SPLITS if split not in used]
        yield (empty[0] if empty else _split_of(last, config.validation)), last
    elif len(last) < 2:
        raise CorpusError(
            f"corpus {config.corpus!r}: expected at least 2 characters, to train on one and hold out another, got "
            f"{last!r}. Use a longer text."
        )
    else:
        end = min(max(1, round(len(last) * (1 - config.validation))), len(last) - 1)
        yield "train", last[:end]
        yield "validation", last[end:]


def _split_of(text: str, validation: float) -> SplitName:
    """The split that the document's hash selects: "validation" with probability `validation`."""
    digest = hashlib.blake2b(to_utf8(text), digest_size=8, person=_SPLIT_KEY.encode()).digest()
    return "validation" if int.from_bytes(digest, "little") < validation * 2**64 else "train"


# Writing.


@dataclass
class _SplitWriter:
    """Appends documents to the two files of one split, up to `max_tokens` tokens."""

    tokens_file: BinaryIO
    starts_file: BinaryIO
    vocabulary: ByteVocabulary | BPEVocabulary
    max_tokens: int | None
    tokens: int = 0
    documents: int = 0
    bytes: int = 0

    @property
    def full(self) -> bool:
        # A document is at least two tokens: the begin-of-path token and one of text.
        return self.max_tokens is not None and self.max_tokens - self.tokens < 2

    def add(self, text: np.ndarray) -> None:
        """Append a document: the begin-of-path token, then as many tokens of its text as there is space for."""
        if self.full:
            return
        if self.max_tokens is not None:
            text = text[: self.max_tokens - self.tokens - 1]
        document = np.concatenate([[self.vocabulary.begin], text])
        self.tokens_file.write(document.astype(tokens_dtype(self.vocabulary)).tobytes())
        self.starts_file.write(np.array(self.tokens, dtype=STARTS_DTYPE).tobytes())
        self.tokens += len(text) + 1
        self.documents += 1
        self.bytes += int(self.vocabulary.lengths[text].sum())

    def counts(self) -> dict[str, int]:
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


def _build(config: TextData, folder: Path, metadata: dict[str, Any], report: Callable[[str], object] | None) -> None:
    """Write the store to `folder`, by way of an unfinished folder beside it."""
    max_tokens = _max_tokens_of_splits(config)
    vocabulary: ByteVocabulary | BPEVocabulary = ByteVocabulary()
    if config.tokenizer == "bpe":
        if report:
            report(f"text: training a BPE vocabulary of {config.vocab_size} tokens on {config.corpus}")
        vocabulary = BPEVocabulary.train(_bpe_sample(config), config.vocab_size)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".unfinished-{folder.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        with contextlib.ExitStack() as files:
            writers = {}
            for split in SPLITS:
                tokens_file = files.enter_context((unfinished / f"{split}.tokens").open("wb"))
                starts_file = files.enter_context((unfinished / f"{split}.starts").open("wb"))
                writers[split] = _SplitWriter(tokens_file, starts_file, vocabulary, max_tokens[split])
            _write_documents(config, vocabulary, writers, report)
        metadata = {
            **metadata,
            "splits": {split: writer.counts() for split, writer in writers.items()},
            "vocabulary": vocabulary.to_dict(),
        }
        (unfinished / "store.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        try:
            os.rename(unfinished, folder)
        except OSError:
            # If another process was faster, its store has the same fingerprint and so the same content.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _max_tokens_of_splits(config: TextData) -> dict[SplitName, int | None]:
    """The largest number of tokens in each split; None for no limit."""
    if config.max_tokens is None:
        return {"train": None, "validation": None}
    validation = round(config.max_tokens * config.validation)
    max_tokens: dict[SplitName, int | None] = {"train": config.max_tokens - validation, "validation": validation}
    if min(validation, config.max_tokens - validation) < 2:
        raise CorpusError(
            f"max_tokens: expected at least 2 tokens for each split, got {max_tokens} from "
            f"max_tokens={config.max_tokens}, validation={config.validation}. Raise max_tokens."
        )
    return max_tokens


def _bpe_sample(config: TextData) -> Iterator[str]:
    """Yield the start of the training documents, which BPE is trained on. Held-out text stays unseen."""
    characters = 0
    for split, text in _split_documents(config):
        if split == "train":
            yield text[: _BPE_SAMPLE_SIZE - characters]
            characters += len(text)
            if characters >= _BPE_SAMPLE_SIZE:
                return


def _write_documents(
    config: TextData,
    vocabulary: ByteVocabulary | BPEVocabulary,
    writers: Mapping[SplitName, _SplitWriter],
    report: Callable[[str], object] | None,
) -> None:
    """Tokenise and write documents until the corpus ends or both splits are full."""
    last_reported = 0
    for group in group_texts(_split_documents(config)):
        encoded = vocabulary.encode_all([text for _, text in group])
        for (split, _), tokens in zip(group, encoded, strict=True):
            writers[split].add(tokens)
        total = sum(writer.tokens for writer in writers.values())
        if report and total - last_reported >= _REPORT_EVERY:
            last_reported = total
            report(f"text: tokenised {total:,} tokens of {config.corpus}")
        if all(writer.full for writer in writers.values()):
            break
