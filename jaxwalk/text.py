"""Text: vocabularies, corpora, the token store, and batches as a pure function of (seed, step).

text -> documents -> tokens -> a memory-mapped store -> packed windows with segment ids. Numpy only: no jax here.

    store = open_store(TextData(corpus="pydoc"))                      # tokenised once, then only opened
    tokens, segments = store.batch(seed=0, step=7, batch_size=12, length=65)

Documents are packed end to end, each after its begin-of-path token. `segments` numbers the documents of a
window from 1, and is 0 on padding. A model that keeps positions and associations inside a segment scores a
packed window exactly as it scores the pieces of documents in it one by one.
"""

import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, ClassVar, Literal, TypeVar, get_args

import numpy as np
from jaxtyping import Int, Int32, Integer

from jaxwalk.config import ConfigError, TextData, unknown

FORMAT_VERSION = 1
"""Version of the store on disk, and of the rules by which documents become tokens and splits."""

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
Label = TypeVar("Label")

_BYTES = tuple(bytes([b]) for b in range(256))
_PIECE = 1 << 18  # characters; longer texts are handed to BPE in pieces, as it needs some 160 bytes for each
_GROUP = 1 << 20  # characters of documents that are tokenised together
_REPORT_EVERY = 10_000_000  # tokens
_BPE_SAMPLE = 1 << 26  # characters of the training documents that BPE is trained on
# Key of the hash that holds documents out. Any would do; of a few that were tried, under this one the share of
# the *text* is near that of the documents for the few and uneven ones of "pydoc", on Python 3.11 and 3.12.
_SPLIT_KEY = "split"


class CorpusError(ConfigError):
    """A corpus that cannot be read: says what was expected, what was got, and the remedy."""


class StoreError(ConfigError):
    """A token store that cannot be used: says what is wrong with it, and the remedy."""


# Vocabularies: encode, decode, begin, size, symbol, to_dict.


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected Unicode, got the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}. Remove it, or read the text with its true encoding."
        ) from error


def _checked(tokens: Any, size: int) -> Integer[np.ndarray, " N"]:
    tokens = np.asarray(tokens)
    if tokens.size == 0:
        tokens = tokens.astype(np.int32)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens: expected integers [N], got {tokens.dtype} {list(tokens.shape)}. Decode one path at a time."
        )
    wrong = np.flatnonzero((tokens < 0) | (tokens >= size))
    if wrong.size:
        raise ValueError(
            f"tokens: expected ids from 0 to {size - 1}, got {tokens[wrong[0]]} at position {wrong[0]}. "
            f"Use the vocabulary that the tokens were made with."
        )
    return tokens


def _displayed(token: bytes) -> str:
    def shown(char: str) -> str:
        if "\udc80" <= char <= "\udcff":  # how "surrogateescape" marks a byte that is not part of valid UTF-8
            return f"\\x{ord(char) - 0xDC00:02x}"
        if char == " ":
            return "␣"
        return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")

    return "".join(map(shown, token.decode("utf-8", "surrogateescape")))


class _ByteLevel:
    """What the two text vocabularies share: tokens that spell bytes, and a last one that begins a path."""

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes of every token but the begin-of-path token."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """How many tokens there are, the begin-of-path token among them."""
        return len(self.spellings) + 1

    @property
    def begin(self) -> int:
        """Id of the begin-of-path token, the last one. It spells nothing: no text encodes to it."""
        return len(self.spellings)

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " V"]:
        """Bytes that every token spells; 0 for the begin-of-path token."""
        return np.array([*map(len, self.spellings), 0], dtype=np.int64)

    def decode(self, tokens: Any) -> str:
        """The text that tokens [N] spell. The begin-of-path token spells nothing, so it is left out.

        `decode(encode(text)) == text` for every text. Tokens that spell no valid UTF-8, as a model may
        sample them, give U+FFFD where it is broken. Raises ValueError for ids out of range.
        """
        tokens = _checked(tokens, self.size)
        return b"".join(self.spellings[t] for t in tokens if t != self.begin).decode("utf-8", "replace")

    def symbol(self, token: int) -> str:
        r"""One token for display: a space as "␣", other unprintables escaped (`\n`), broken UTF-8 as `\xe2`."""
        (token,) = _checked([token], self.size)
        return "<begin>" if token == self.begin else _displayed(self.spellings[token])


@dataclass(frozen=True)
class ByteVocabulary(_ByteLevel):
    """Ids 0..255 are the bytes of UTF-8; 256 begins a path. V = 257."""

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes of every token but the begin-of-path token."""
        return _BYTES

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """The bytes of `text` as ids [N], without the begin-of-path token. Raises ValueError for surrogates."""
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `vocabulary_from_dict` makes an equal vocabulary."""
        return {"kind": "bytes"}


def byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte, as in GPT-2: printable bytes are themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return {chr(b if b in printable else next(others)): b for b in range(256)}


@dataclass(frozen=True)
class BPEVocabulary(_ByteLevel):
    """Byte-level byte-pair encoding (Sennrich et al. 1508.07909, over bytes as in GPT-2), lossless for every text.

    tokenizer: the JSON text of a `tokenizers.Tokenizer` without special tokens. The begin-of-path token is
        not in it, since it would then be read out of texts that happen to spell its name: it is the id after.

    Raises ValueError for a text that is no such JSON. Decoding needs no `tokenizers`; encoding does.
    """

    tokenizer: str

    def __post_init__(self) -> None:
        if not set(_BYTES) <= set(self.spellings):
            raise ValueError(
                "tokenizer: expected byte-level BPE with a token for each of the 256 bytes, got fewer. "
                "Train it with BPEVocabulary.train."
            )

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "BPEVocabulary":
        """A vocabulary of `size` tokens: 256 bytes, the most frequent merges in `texts`, the begin-of-path token.

        Deterministic in its arguments. Raises ValueError if `size` is below 257, CorpusError if the texts
        have too few pairs that occur twice to reach it.
        """
        if size < 257:
            raise ValueError(f"size: expected at least 257 (256 bytes and the begin-of-path token), got {size}.")
        tokenizers = optional("tokenizers")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size - 1,
            min_frequency=2,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # `_utf8` first: for a surrogate the library would only say that it expected a string.
        pieces = (piece for text in texts for piece in _pieces(_utf8(text).decode()))
        tokenizer.train_from_iterator(pieces, trainer)
        vocabulary = cls(tokenizer.to_str())
        if vocabulary.size < size:
            raise CorpusError(
                f"BPE: expected {size} tokens, but these texts have merges for {vocabulary.size} only. "
                f"Set vocab_size to {vocabulary.size} or less, or give more text."
            )
        return vocabulary

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes of every token but the begin-of-path token."""
        letters = byte_letters()
        try:
            model = json.loads(self.tokenizer)["model"]
            if model["type"] != "BPE":
                raise ValueError(f"its model is {model['type']!r}")
            spelled = {i: bytes(letters[c] for c in token) for token, i in model["vocab"].items()}
            return tuple(spelled[i] for i in range(len(spelled)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"tokenizer: expected the JSON of a byte-level BPE tokenizer without special tokens, got one "
                f"that cannot be read ({type(error).__name__}: {error}). Train it with BPEVocabulary.train."
            ) from error

    @functools.cached_property
    def _encoder(self) -> Any:
        return optional("tokenizers").Tokenizer.from_str(self.tokenizer)

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """Token ids [N] of `text`, without the begin-of-path token. Raises ValueError for surrogates."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        for text in texts:
            _utf8(text)
        tokens: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups((i, piece) for i, text in enumerate(texts) for piece in _pieces(text)):
            encoded = self._encoder.encode_batch_fast([piece for _, piece in group])
            for (i, _), encoding in zip(group, encoded, strict=True):
                tokens[i].append(np.array(encoding.ids, dtype=np.int32))
        return [np.concatenate(of_text) for of_text in tokens]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `vocabulary_from_dict` makes an equal vocabulary."""
        return {"kind": "bpe", "tokenizer": self.tokenizer}


# A newline between two visible ASCII characters is a word of its own to byte-level BPE, whatever is around it:
# the tokens of a text cut after it are the tokens of the two parts.
_SEAM = re.compile(r"(?<=[!-~])\n(?=[!-~])")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE and (seam := _SEAM.search(text, start + _PIECE)):
        yield text[start : seam.end()]
        start = seam.end()
    yield text[start:]


def _groups(texts: Iterable[tuple[Label, str]]) -> Iterator[list[tuple[Label, str]]]:
    """The labelled texts in lists of about `_GROUP` characters: enough for all cores, in bounded memory."""
    group: list[tuple[Label, str]] = []
    characters = 0
    for label, text in texts:
        group.append((label, text))
        characters += len(text)
        if characters >= _GROUP:
            yield group
            group, characters = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class SymbolVocabulary:
    """The tokens of a world by name: token v is `symbols[v]`. There is no begin-of-path token.

    Raises ValueError for no symbols, symbols that occur twice, are empty or hold whitespace.
    """

    symbols: tuple[str, ...]
    begin: ClassVar[None] = None

    def __post_init__(self) -> None:
        times = collections.Counter(self.symbols)
        wrong = [s for s in self.symbols if not s or any(c.isspace() for c in s) or times[s] > 1]
        if wrong or not self.symbols:
            raise ValueError(
                f"symbols: expected at least one, each distinct, not empty and without whitespace, got "
                f"{wrong[0] if wrong else self.symbols!r}. Rename it."
            )

    @property
    def size(self) -> int:
        """How many symbols there are."""
        return len(self.symbols)

    @functools.cached_property
    def _match(self) -> re.Pattern[str]:
        # Alternatives are tried in order, so the longest symbol comes first.
        longest_first = sorted(self.symbols, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: v for v, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """Token ids [N]: the longest symbol at each place, from left to right; whitespace between is skipped.

        Raises ValueError for a symbol that is not in the vocabulary, with its position and the choices.
        """
        tokens, at = [], 0
        while at < len(text):
            if text[at].isspace():
                at += 1
            elif found := self._match.match(text, at):
                tokens.append(self._ids[found[0]])
                at = found.end()
            else:
                symbol = text[at:].split(maxsplit=1)[0]
                raise ValueError(
                    f"text: unknown symbol {symbol[:20]!r} at character {at}. "
                    f"Choices: {' '.join(self.symbols[:100])}{' ...' if self.size > 100 else ''}"
                )
        return np.array(tokens, dtype=np.int32)

    def decode(self, tokens: Any) -> str:
        """The symbols of tokens [N], joined by spaces where any symbol is longer than one character.

        `encode(decode(tokens))` gives the tokens again. Raises ValueError for ids out of range.
        """
        between = " " if any(len(s) > 1 for s in self.symbols) else ""
        return between.join(self.symbols[t] for t in _checked(tokens, self.size))

    def symbol(self, token: int) -> str:
        """One token for display."""
        (token,) = _checked([token], self.size)
        return self.symbols[token]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `vocabulary_from_dict` makes an equal vocabulary."""
        return {"kind": "symbols", "symbols": list(self.symbols)}


@dataclass(frozen=True)
class TokenizerVocabulary:
    """The tokenizer that came with a pretrained model, as the `tokenizers` library runs it.

    tokenizer: the JSON text of a `tokenizers.Tokenizer`. Names of its special tokens are read out of a text.
    begin: the token that begins a path, if the model has one. Decoding leaves it out.
    size: V of the model, which may have rows that no token uses.

    Raises ValueError for ids that the model does not have.
    """

    tokenizer: str
    begin: int | None
    size: int

    def __post_init__(self) -> None:
        last = max((*self._names, -1 if self.begin is None else self.begin))
        if not 0 <= last < self.size or (self.begin or 0) < 0:
            raise ValueError(
                f"tokenizer: expected ids from 0 to {self.size - 1}, of which the model has token vectors, got {last}. "
                "It is another model's tokenizer."
            )

    @functools.cached_property
    def _parts(self) -> dict[str, Any]:
        try:
            parts = json.loads(self.tokenizer)
            return {**parts, "model": dict(parts["model"])}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"tokenizer: expected the JSON of a tokenizer, got one that cannot be read ({type(error).__name__}: "
                f"{error})."
            ) from error

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        return {added["id"]: added["content"] for added in self._parts.get("added_tokens") or ()}

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        vocabulary = self._parts["model"].get("vocab", {})
        if isinstance(vocabulary, list):  # unigram: (token, score)
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        return {i: token for token, i in vocabulary.items()} | self._added

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes that every token spells, special ones their names; b"" for ids without a token."""
        byte_level = '"ByteLevel"' in json.dumps([self._parts.get(k) for k in ("pre_tokenizer", "decoder")])
        letters = byte_letters()

        def spelled(i: int) -> bytes:
            token = self._names.get(i, "")
            if i not in self._added and byte_level and all(c in letters for c in token):
                return bytes(letters[c] for c in token)
            if i not in self._added and re.fullmatch("<0x[0-9A-F]{2}>", token):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode("utf-8", "surrogatepass")

        return tuple(map(spelled, range(self.size)))

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " V"]:
        """Bytes that every token spells; 0 for the begin-of-path token."""
        return np.array([0 if i == self.begin else len(s) for i, s in enumerate(self.spellings)], dtype=np.int64)

    @functools.cached_property
    def _encoder(self) -> Any:
        encoder = optional("tokenizers").Tokenizer.from_str(self.tokenizer)
        encoder.no_truncation()  # which a file may ask for, and which would cut texts silently
        encoder.no_padding()
        return encoder

    @functools.cached_property
    def _unknown(self) -> int | None:
        model = self._parts["model"]
        name = model.get("unk_token")
        ids = {token: i for i, token in self._names.items()}
        return model.get("unk_id") if "unk_id" in model else ids.get(name)

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """Token ids [N] of `text`; no special tokens are added. Raises ValueError for what it cannot represent."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        for text in texts:
            _utf8(text)
        encodings = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token == self._unknown and text[start:end].strip() != self._names.get(token):
                    raise ValueError(
                        f"text: the tokenizer cannot represent {text[start:end][:20]!r} at character {start}. "
                        "Leave it out, or give token ids."
                    )
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, tokens: Any) -> str:
        """The text of tokens [N], special ones by their names, but for the begin-of-path token, which is left out.

        Where a tokenizer is not lossless, neither is this. Raises ValueError for ids out of range.
        """
        tokens = _checked(tokens, self.size)
        return self._encoder.decode([int(t) for t in tokens if t != self.begin], skip_special_tokens=False)

    def symbol(self, token: int) -> str:
        """One token for display, as `BPEVocabulary.symbol` has it; special tokens by their names."""
        (token,) = _checked([token], self.size)
        return _displayed(self.spellings[token]) or f"<{token}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `vocabulary_from_dict` makes an equal vocabulary."""
        return {"kind": "tokenizer", "tokenizer": self.tokenizer, "begin": self.begin, "size": self.size}


Vocabulary = ByteVocabulary | BPEVocabulary | SymbolVocabulary | TokenizerVocabulary

_VOCABULARIES: dict[str, type] = {
    "bytes": ByteVocabulary,
    "bpe": BPEVocabulary,
    "symbols": SymbolVocabulary,
    "tokenizer": TokenizerVocabulary,
}


def vocabulary_from_dict(data: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that `to_dict` gave. Raises ValueError for an unknown kind, or other than its fields."""
    kind = data.get("kind")
    if kind not in _VOCABULARIES:
        raise ValueError(unknown("kind of vocabulary", kind, _VOCABULARIES))
    cls = _VOCABULARIES[kind]
    given, expected = data.keys() - {"kind"}, {f.name for f in dataclasses.fields(cls)}
    if given != expected:
        raise ValueError(
            f"vocabulary of kind {kind!r}: expected the fields {sorted(expected)}, got {sorted(given)}. "
            f"Give what `to_dict` returned."
        )
    if kind == "symbols":
        if not isinstance(data["symbols"], list) or not all(isinstance(s, str) for s in data["symbols"]):
            raise ValueError(
                f"symbols: expected a list of strings, got {data['symbols']!r}. Give what `to_dict` returned."
            )
        return SymbolVocabulary(tuple(data["symbols"]))
    return cls(**{name: data[name] for name in expected})


# Corpora: a TextData -> its documents.

_OFFLINE = (
    "Without a network, use corpus='pydoc' (English that ships inside CPython), "
    "or a local .txt, .jsonl or .parquet file, folder or glob."
)
_LOADERS = {".jsonl": "json", ".parquet": "parquet"}
_SUFFIXES = (".txt", *_LOADERS)
_HUB_TIMEOUT = 10.0  # seconds to find out whether the hub answers; its own client retries for minutes


def documents(config: TextData) -> Iterator[str]:
    """The documents of the corpus, in a fixed order. Texts that are empty or null are no documents.

    - "pydoc": the topics of CPython's own help, `pydoc_data.topics`, sorted by topic: 79 documents, about
      480 kB of English. The text differs a little between Python versions.
    - Local files, sorted by path: a .txt file is one document, a row of a .jsonl or .parquet file is one,
      its text in `config.column`. A folder is searched to its depths; other suffixes in it are left out.
    - Everything that is not on disk, and has no wildcard and none of these suffixes, is a dataset on the hub.

    Rows are streamed, from local files always: memory does not grow with the corpus, only with its largest
    document. Raises CorpusError for what cannot be read: no such corpus, no network, no such column, not
    text, not UTF-8 (with file and byte).
    """
    if config.corpus == "pydoc":
        yield from _pydoc(config).values()
    elif (files := _files(config)) is not None:
        for file in files:
            yield from _txt(file) if file.suffix.lower() == ".txt" else _rows_of_file(file, config)
    else:
        yield from _hub(config)


def _pydoc(config: TextData) -> dict[str, str]:
    _refuse_hub_choices(config)
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise CorpusError(
            "corpus 'pydoc': expected the module pydoc_data.topics of CPython's standard library, but this "
            "Python was installed without it. Use another Python, or a local .txt, .jsonl or .parquet file."
        ) from error
    return {topic: topics[topic] for topic in sorted(topics) if topics[topic]}


def _refuse_hub_choices(config: TextData) -> None:
    if config.subset is not None or config.split != "train":
        raise CorpusError(
            f"corpus {config.corpus!r}: expected no subset and split='train', as only datasets on the hub have "
            f"several, got subset={config.subset!r}, split={config.split!r}. Name the files that you want by a glob."
        )


def _files(config: TextData) -> list[Path] | None:
    """The local files of the corpus; None if it names none, and so must be on the hub."""
    path = Path(config.corpus).expanduser()
    wildcards = glob.has_magic(config.corpus)
    if not (path.exists() or wildcards or path.suffix.lower() in _SUFFIXES or path.is_absolute()):
        return None
    _refuse_hub_choices(config)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(path.rglob("*"))
    elif wildcards:
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    else:
        raise CorpusError(f"corpus {config.corpus!r}: no such file (looked in {Path.cwd()}). {_OFFLINE}")
    files = [f for f in found if f.suffix.lower() in _SUFFIXES and f.is_file()]
    if not files:
        what = f"of {len(found)} found, none has" if found else "nothing found with"
        raise CorpusError(
            f"corpus {config.corpus!r}: expected {', '.join(_SUFFIXES)} files; {what} such a suffix. "
            f"Rename or convert them. {_OFFLINE}"
        )
    return files


def _txt(file: Path) -> Iterator[str]:
    try:
        # Not read_text, which turns "\r\n" into "\n".
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error.object[error.start], error.start) from error
    if text:
        yield text


def _not_utf8(file: Path, byte: int, at: int) -> CorpusError:
    return CorpusError(
        f"{file}: expected UTF-8, got the byte 0x{byte:02x} at offset {at}, which cannot stand there. "
        f"Convert the file (iconv -f ENCODING -t UTF-8), or leave it out of the corpus."
    )


def _rows_of_file(file: Path, config: TextData) -> Iterator[str]:
    if file.stat().st_size == 0:
        return iter(())
    datasets = optional("datasets")
    loader = _LOADERS[file.suffix.lower()]

    def rows() -> Iterator[dict[str, Any]]:
        # Streaming, or a copy of the corpus would be written to the cache below the home folder.
        loaded = datasets.load_dataset(loader, data_files=[str(file)], split="train", streaming=True)
        yield from loaded

    def failed(error: Exception, row: int) -> CorpusError:
        not_utf8 = _find_not_utf8(file) if loader == "json" else None
        return not_utf8 or CorpusError(
            f"{file}: could not be read as {file.suffix} after {row} rows ({_cause(error)}). Repair the file, "
            f"or leave it out of the corpus."
        )

    return _texts(rows(), config.column, str(file), failed)


def _find_not_utf8(file: Path) -> CorpusError | None:
    """The error for the first byte that is not UTF-8, if any. The loader knows its place in a buffer only."""
    at = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return _not_utf8(file, line[error.start], at + error.start)
            at += len(line)
    return None


def _texts(
    rows: Iterator[Mapping[str, Any]], column: str, source: str, failed: Callable[[Exception, int], CorpusError]
) -> Iterator[str]:
    """The texts in one column of the rows. What goes wrong in reading a row is raised as `failed(error, row)`."""
    for number in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:  # the loaders raise many kinds, all of which mean the same here
            raise failed(error, number) from error
        if row is None:
            return
        if column not in row:
            raise CorpusError(
                f"{source}, row {number}: {unknown('column', column, row)} Set `column` to the one that holds the text."
            )
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise CorpusError(
                f"{source}, row {number}: expected text in column {column!r}, got {type(text).__name__}. "
                f"Set `column` to one that holds text; there are {', '.join(sorted(row))}."
            )
        if text:
            yield text


def _hub(config: TextData) -> Iterator[str]:
    datasets, hub = optional("datasets"), optional("huggingface_hub")

    def rows() -> Iterator[dict[str, Any]]:
        try:
            api = hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
            api.dataset_info(config.corpus, timeout=_HUB_TIMEOUT)
        except hub.errors.OfflineModeIsEnabled:
            pass  # asked for by the user: a copy in the cache is still good
        loaded = datasets.load_dataset(config.corpus, config.subset, split=config.split, streaming=config.streaming)
        if not config.streaming and config.column in loaded.column_names:
            loaded = loaded.select_columns([config.column])
        yield from loaded

    def failed(error: Exception, row: int) -> CorpusError:
        return CorpusError(
            f"corpus {config.corpus!r}: no such file or folder here, and as a dataset on the Hugging Face hub "
            f"(subset={config.subset!r}, split={config.split!r}) it failed after {row} rows ({_cause(error)}). "
            f"Check its name and the network. {_OFFLINE} A dataset that was downloaded before is read "
            f"from its cache with the environment variable HF_HUB_OFFLINE=1."
        )

    return _texts(rows(), config.column, f"corpus {config.corpus!r}", failed)


def _cause(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def optional(name: str, extra: str = "text") -> ModuleType:
    """A module of a package that only the extra `extra` needs. Raises ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {name!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'jaxwalk[{extra}]'"
        ) from error


# Splits: which documents train, and which are held out.


def _divided(config: TextData) -> Iterator[tuple[SplitName, str]]:
    """The documents, each with the split it is in; both splits have at least one.

    A document's own hash decides, so equal documents are on the same side, and a document stays there when
    others come and go. Two exceptions: where that leaves a split empty, the corpus's last document goes to
    it; the only document of a corpus is cut in two, its end held out.
    """
    filled: set[SplitName] = set()
    last = None
    for text in documents(config):
        if last is not None:
            split = _side(last, config.validation)
            filled.add(split)
            yield split, last
        last = text
    if last is None:
        raise CorpusError(f"corpus {config.corpus!r}: expected documents, got none with any text. {_OFFLINE}")
    if filled:
        empty = [split for split in SPLITS if split not in filled]
        yield (empty[0] if empty else _side(last, config.validation)), last
    elif len(last) < 2:
        raise CorpusError(
            f"corpus {config.corpus!r}: expected at least 2 characters to train on and to hold out, got {last!r}."
        )
    else:
        cut = min(max(1, round(len(last) * (1 - config.validation))), len(last) - 1)
        yield "train", last[:cut]
        yield "validation", last[cut:]


def _side(text: str, validation: float) -> SplitName:
    digest = hashlib.blake2b(_utf8(text), digest_size=8, person=_SPLIT_KEY.encode()).digest()
    return "validation" if int.from_bytes(digest, "little") < validation * 2**64 else "train"


# The store: tokenised once, then memory-mapped.


@dataclass(frozen=True, eq=False)
class Split:
    """One side of a store: its documents, packed end to end.

    tokens: [N], memory-mapped; every document is its begin-of-path token, then its text.
    starts: [documents], memory-mapped; where each document starts in `tokens`.
    bytes: of UTF-8 text in all documents together; begin-of-path tokens count as none.
    """

    tokens: Integer[np.ndarray, " N"]
    starts: Int[np.ndarray, " documents"]
    bytes: int

    def document(self, index: int) -> Int32[np.ndarray, " n"]:
        """Tokens [n] of one document, the begin-of-path token first. Raises IndexError if there is none."""
        if not 0 <= index < len(self.starts):
            raise IndexError(f"document: expected 0 to {len(self.starts) - 1}, got {index}.")
        end = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.tokens)
        return self.tokens[self.starts[index] : end].astype(np.int32)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A tokenised corpus, and its batches. Made by `open_store`, on disk, or by `cut`, in memory.

    folder: where it is; None if it is in memory. fingerprint: of corpus, tokenizer and format. vocabulary: what the
    tokens are.
    """

    folder: Path | None
    fingerprint: str
    vocabulary: ByteVocabulary | BPEVocabulary | TokenizerVocabulary
    train: Split
    validation: Split

    def split(self, name: str) -> Split:
        """The split called `name`. Raises ConfigError for another name than "train" and "validation"."""
        if name not in SPLITS:
            raise ConfigError(unknown("split", name, SPLITS))
        return self.train if name == "train" else self.validation

    def batch(
        self, seed: int, step: int, batch_size: int, length: int, split: str = "train"
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
        """Tokens and segments, both [batch_size, length]: a pure function of the arguments and the store.

        A row is a window of the packed split at a uniformly random place; one may start or end inside a
        document. Segments number a row's documents from 1. A split shorter than `length` gives rows that
        hold all of it, then padding: token 0, segment 0. Raises ValueError for a seed or step below 0, or
        sizes below 1.
        """
        _require(seed=(seed, 0), step=(step, 0), batch_size=(batch_size, 1), length=(length, 1))
        side = self.split(split)
        places = max(1, len(side.tokens) - length + 1)
        # Raw bits: numpy keeps the stream of a bit generator fixed, but not what Generator's methods make of
        # it. Of 2^64 the remainder's bias is nothing.
        bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(step, SPLITS.index(split))))  # type: ignore[arg-type]
        return _windows(side, (bits.random_raw(batch_size) % places).astype(np.int64), length)

    def windows(
        self,
        split: str,
        length: int,
        stride: int | None = None,
        limit: int | None = None,
        batch_size: int = 64,
    ) -> Iterator[tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]]:
        """Tokens and segments of consecutive windows over the whole split, in batches [batch_size, length].

        stride: tokens from one window's start to the next; by default `length`, where every token is in
            exactly one window. With `length` - 1 every *step* between two tokens is: a window's first token,
            which is given and not scored, is the last one of the window before.
        limit: the first so many windows only.

        The last window and the last batch are filled up with padding (token 0, segment 0), so that one
        compiled function fits all batches. Raises ValueError for sizes below 1 and strides above `length`.
        """
        stride = length if stride is None else stride
        _require(length=(length, 1), stride=(stride, 1), batch_size=(batch_size, 1))
        if limit is not None:
            _require(limit=(limit, 1))
        if stride > length:
            raise ValueError(f"stride: expected at most length = {length}, as gaps would be left out, got {stride}.")
        side = self.split(split)
        count = 1 + max(0, -(-(len(side.tokens) - length) // stride))
        count = count if limit is None else min(count, limit)

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for first in range(0, count, batch_size):
                row = np.arange(first, first + batch_size)
                # Rows that only fill the batch start behind the split's end, where all is padding.
                yield _windows(side, np.where(row < count, row * stride, len(side.tokens)), length)

        return batches()

    def bytes_per_token(self, split: str = "validation") -> float:
        """Bytes of UTF-8 per token of text in the split; exactly 1 for the byte vocabulary.

        Begin-of-path tokens count neither as bytes nor as tokens, for they are given and never predicted:

            bits per byte = nats per predicted token / ln 2 / bytes_per_token
        """
        side = self.split(split)
        return side.bytes / (len(side.tokens) - len(side.starts))


def _require(**sizes: tuple[int, int]) -> None:
    for name, (value, least) in sizes.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")


def _windows(
    side: Split, at: Int[np.ndarray, " B"], length: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    place = at[:, None] + np.arange(length)
    document = np.searchsorted(side.starts, place, side="right")
    segments = document - document[:, :1] + 1
    end = len(side.tokens)
    if np.max(place) < end:
        return side.tokens[place].astype(np.int32), segments.astype(np.int32)
    real = place < end
    tokens = side.tokens[np.minimum(place, end - 1)]
    return np.where(real, tokens, 0).astype(np.int32), np.where(real, segments, 0).astype(np.int32)


def open_store(config: TextData, report: Callable[[str], object] | None = None) -> TokenStore:
    """The token store of the config; made below `config.store` if it is not there yet, then only opened.

    Its folder is named by a fingerprint of the corpus, the tokenizer and the format. Local files count by their
    content; a dataset on the hub counts by its name, and so is found again without a network, but a new
    revision of it is not noticed: delete the folder for that.

    With `max_tokens` (begin-of-path tokens count), the share `validation` of it is the most that is held out,
    the rest the most that trains; documents are read until both are full, or the corpus ends.

    The folder appears whole or not at all, and several processes may make it at once. (One that is killed leaves
    a folder `.unfinished-...` behind, which is never read and may be deleted.) BPE is trained on the
    first 64 M characters of the training documents, and the corpus is then read a second time.

    report: takes a line of progress now and then, such as `print`.
    Raises CorpusError for a corpus that cannot be read or is too small, StoreError for a damaged store.
    """
    made_from = _made_from(config)
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.corpus).name).strip("-.") or "corpus"
    folder = Path(config.store).expanduser() / f"{name[:40]}-{config.tokenizer}-{fingerprint[:16]}"
    if not folder.exists():
        _build(config, folder, {"fingerprint": fingerprint, "corpus": config.corpus, "made_from": made_from}, report)
    return _open(folder, fingerprint)


CUTS = (128, 64, 32, 16)
"""The lengths of pieces that `cut` tries."""
ENOUGH, FEWEST = 64, 8
"""How many measured pieces it wants, and has to have."""
EVERY = 4
"""Of how many pieces one is for nulls."""


def cut(corpus: str, vocabulary: Vocabulary, longest: int, length: int | None = None) -> TokenStore:
    """A text that is looked at, not trained on, in memory: each document is a piece of it, of `length` + 1 tokens.

    corpus: a text file in UTF-8, or whatever `documents` reads. Its documents are cut end to end, so that no token but
    the begin-of-path token, which every piece begins with where the vocabulary has one, is in two pieces; what is left
    at a document's end is no piece. Every fourth piece is in the split "train", for nulls that are fitted, the others
    are in "validation".
    longest: the most tokens that the model walks. length: by default the longest of `CUTS` at which there are enough
    pieces.

    Raises CorpusError for a corpus that cannot be read, or that is too short for 8 pieces to be measured; ConfigError
    for a length that the model cannot walk, and for a vocabulary of symbols.
    """
    if isinstance(vocabulary, SymbolVocabulary):
        raise ConfigError("text: expected a model of text, got one whose tokens are the symbols of a world.")
    if length is not None and not 2 <= length <= longest:
        raise ConfigError(f"length: expected from 2 to {longest}, the most tokens the model walks, got {length}.")
    path = Path(corpus).expanduser()
    plain = path.is_file() and path.suffix.lower() not in _LOADERS  # whatever it is called
    read = _txt(path) if plain else documents(TextData(corpus=corpus))
    groups = _groups((None, text) for text in read)
    texts = [tokens for group in groups for tokens in vocabulary.encode_all([text for _, text in group])]
    begin = np.array([] if vocabulary.begin is None else [vocabulary.begin], np.int32)

    def pieces(length: int) -> Int32[np.ndarray, "pieces N"]:
        own = length + 1 - len(begin)
        none = np.empty((0, own), np.int32)
        rows = np.concatenate([none, *(text[: len(text) // own * own].reshape(-1, own) for text in texts)])
        return np.concatenate([np.broadcast_to(begin, (len(rows), len(begin))), rows], axis=1)

    tried = [cut for cut in CUTS if cut <= longest] or [longest]
    rows = pieces(length or next((cut for cut in tried if len(pieces(cut)) * (EVERY - 1) >= ENOUGH * EVERY), tried[-1]))
    fitted = np.arange(len(rows)) % EVERY == EVERY - 1
    if (~fitted).sum() < FEWEST:
        raise CorpusError(
            f"corpus {corpus!r}: expected at least {FEWEST * EVERY // (EVERY - 1)} pieces of {rows.shape[1] - 1} "
            f"tokens, of which one in {EVERY} is for nulls, got {len(rows)}. Give more text, or shorter pieces."
        )

    def split(rows: Int32[np.ndarray, "pieces N"]) -> Split:
        starts = np.arange(len(rows)) * rows.shape[1]
        return Split(rows.ravel(), starts, int(vocabulary.lengths[rows[:, 1:]].sum()))

    fingerprint = hashlib.sha256(rows.tobytes()).hexdigest()
    return TokenStore(None, fingerprint, vocabulary, train=split(rows[fitted]), validation=split(rows[~fitted]))


def read_store(folder: str | os.PathLike[str], fingerprint: str) -> TokenStore:
    """The store in a folder that `open_store` made. Raises StoreError if it is damaged or has another fingerprint."""
    return _open(Path(folder), fingerprint)


def _made_from(config: TextData) -> dict[str, Any]:
    """All that the store's content depends on, as JSON data."""
    if config.corpus == "pydoc":
        texts = json.dumps(_pydoc(config)).encode()
        corpus: dict[str, Any] = {"pydoc": hashlib.sha256(texts).hexdigest()}
    elif (files := _files(config)) is not None:
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


@dataclass
class _Writer:
    """Appends documents to the two files of one split, up to `room` tokens."""

    token_file: BinaryIO
    start_file: BinaryIO
    vocabulary: ByteVocabulary | BPEVocabulary
    room: int | None
    tokens: int = 0
    documents: int = 0
    bytes: int = 0

    @property
    def full(self) -> bool:
        # A begin-of-path token alone would be a document without text.
        return self.room is not None and self.room - self.tokens < 2

    def add(self, text: np.ndarray) -> None:
        if self.full:
            return
        if self.room is not None:
            text = text[: self.room - self.tokens - 1]
        document = np.concatenate([[self.vocabulary.begin], text])
        self.token_file.write(document.astype(_dtype(self.vocabulary)).tobytes())
        self.start_file.write(np.array(self.tokens, dtype="<i8").tobytes())
        self.tokens += len(text) + 1
        self.documents += 1
        self.bytes += int(self.vocabulary.lengths[text].sum())

    def counts(self) -> dict[str, int]:
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


def _dtype(vocabulary: ByteVocabulary | BPEVocabulary) -> str:
    return "<u2" if vocabulary.size <= 1 << 16 else "<u4"


def _build(config: TextData, folder: Path, about: dict[str, Any], report: Callable[[str], object] | None) -> None:
    rooms: dict[SplitName, int | None] = {"train": None, "validation": None}
    if config.max_tokens is not None:
        held_out = round(config.max_tokens * config.validation)
        rooms = {"train": config.max_tokens - held_out, "validation": held_out}
        if min(held_out, config.max_tokens - held_out) < 2:
            raise CorpusError(
                f"max_tokens: expected room for 2 tokens or more on both sides, got {rooms} of "
                f"max_tokens={config.max_tokens}, validation={config.validation}. Raise max_tokens."
            )
    vocabulary: ByteVocabulary | BPEVocabulary = ByteVocabulary()
    if config.tokenizer == "bpe":
        if report:
            report(f"text: training a BPE vocabulary of {config.vocab_size} tokens on {config.corpus}")
        vocabulary = BPEVocabulary.train(_sample(config), config.vocab_size)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".unfinished-{folder.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        with contextlib.ExitStack() as files:
            writers = {}
            for split in SPLITS:
                token_file = files.enter_context((unfinished / f"{split}.tokens").open("wb"))
                start_file = files.enter_context((unfinished / f"{split}.starts").open("wb"))
                writers[split] = _Writer(token_file, start_file, vocabulary, rooms[split])
            _write(config, vocabulary, writers, report)
        about = {
            **about,
            "splits": {split: writer.counts() for split, writer in writers.items()},
            "vocabulary": vocabulary.to_dict(),
        }
        (unfinished / "store.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        try:
            os.rename(unfinished, folder)
        except OSError:
            # Another process was first. Its store has the same fingerprint: same content.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    config: TextData,
    vocabulary: ByteVocabulary | BPEVocabulary,
    writers: Mapping[SplitName, _Writer],
    report: Callable[[str], object] | None,
) -> None:
    reported = 0
    for group in _groups(_divided(config)):
        encoded = vocabulary.encode_all([text for _, text in group])
        for (split, _), tokens in zip(group, encoded, strict=True):
            writers[split].add(tokens)
        done = sum(writer.tokens for writer in writers.values())
        if report and done - reported >= _REPORT_EVERY:
            reported = done
            report(f"text: tokenised {done:,} tokens of {config.corpus}")
        if all(writer.full for writer in writers.values()):
            break


def _sample(config: TextData) -> Iterator[str]:
    """What BPE is trained on: training documents only, so that held-out text stays unseen."""
    characters = 0
    for split, text in _divided(config):
        if split == "train":
            yield text[: _BPE_SAMPLE - characters]
            characters += len(text)
            if characters >= _BPE_SAMPLE:
                return


def _open(folder: Path, fingerprint: str) -> TokenStore:
    remedy = f"Delete the folder {folder}: it is made again at the next run."
    try:
        about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        found, counts = about["fingerprint"], about["splits"]
        vocabulary = vocabulary_from_dict(about["vocabulary"])
        numbers = {split: {k: int(counts[split][k]) for k in ("tokens", "documents", "bytes")} for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / 'store.json'}: cannot be read ({_cause(error)}). {remedy}") from error
    if found != fingerprint:
        raise StoreError(
            f"{folder}: expected the store with fingerprint {fingerprint}, got {found}: it was made from another "
            f"corpus or tokenizer, or by another version. {remedy}"
        )
    if not isinstance(vocabulary, ByteVocabulary | BPEVocabulary):
        kind = "symbols" if isinstance(vocabulary, SymbolVocabulary) else "a tokenizer"
        raise StoreError(f"{folder}: expected a vocabulary of bytes or bpe, got {kind}. {remedy}")

    def mapped(name: str, dtype: str, count: int) -> np.ndarray:
        file, size = folder / name, count * np.dtype(dtype).itemsize
        actual = file.stat().st_size if file.is_file() else None
        if actual != size or size == 0:
            raise StoreError(f"{file}: expected {size} bytes, more than 0, got {actual or 'none'}. {remedy}")
        # A plain view: indexing a np.memmap costs several times as much as what it looks up.
        return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(count,)))

    sides = {
        split: Split(
            tokens=mapped(f"{split}.tokens", _dtype(vocabulary), n["tokens"]),
            starts=mapped(f"{split}.starts", "<i8", n["documents"]),
            bytes=n["bytes"],
        )
        for split, n in numbers.items()
    }
    return TokenStore(folder, fingerprint, vocabulary, sides["train"], sides["validation"])
