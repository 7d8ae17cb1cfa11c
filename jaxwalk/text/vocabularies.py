"""Vocabularies: the bytes of UTF-8, byte-level BPE, and the symbols of a world.

Every vocabulary is a frozen dataclass with `size`, `begin` (the id of its begin-of-path token, or None), `encode`,
`decode`, `symbol` (one token for display) and `to_dict`, which `vocabulary_from_dict` reads back. Those of text also
have `encode_all`, and `spellings` and `lengths`: the bytes that each token spells, and how many they are. The
vocabulary of a pretrained model is in `tokenizer.py`.
"""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, Int32

from jaxwalk.config import unknown
from jaxwalk.text._encoding import byte_letters, check_tokens, chunk_text, display, group_texts, to_utf8
from jaxwalk.text._errors import CorpusError, optional
from jaxwalk.text.tokenizer import TokenizerVocabulary

_BYTES = tuple(bytes([b]) for b in range(256))


class _ByteLevel:
    """Base of the vocabularies whose tokens spell bytes, and whose last token is the begin-of-path token."""

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes that each token spells, all but the begin-of-path token."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """The number of tokens, including the begin-of-path token."""
        return len(self.spellings) + 1

    @property
    def begin(self) -> int:
        """The id of the begin-of-path token, which is the last one. No text encodes to it."""
        return len(self.spellings)

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " V"]:
        """The number of bytes that each token spells; 0 for the begin-of-path token."""
        return np.array([*map(len, self.spellings), 0], dtype=np.int64)

    def decode(self, tokens: Any) -> str:
        """The text that `tokens` [N] spell, without begin-of-path tokens.

        `decode(encode(text)) == text` for every text. Tokens that a model samples may spell invalid UTF-8, which
        decodes to U+FFFD.

        Raises:
            ValueError: for ids out of range.
        """
        tokens = check_tokens(tokens, self.size)
        return b"".join(self.spellings[t] for t in tokens if t != self.begin).decode("utf-8", "replace")

    def symbol(self, token: int) -> str:
        r"""One token for display: a space as "␣", other unprintables escaped (`\n`), invalid UTF-8 as `\xe2`.

        Raises:
            ValueError: for an id out of range.
        """
        (token,) = check_tokens([token], self.size)
        return "<begin>" if token == self.begin else display(self.spellings[token])


@dataclass(frozen=True)
class ByteVocabulary(_ByteLevel):
    """The bytes of UTF-8 as ids 0 to 255, and the begin-of-path token 256: V = 257."""

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes that each token spells, all but the begin-of-path token."""
        return _BYTES

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """The bytes of `text` as ids [N], without the begin-of-path token.

        Raises:
            ValueError: for a lone surrogate.
        """
        return np.frombuffer(to_utf8(text), dtype=np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as plain JSON data, which `vocabulary_from_dict` reads back."""
        return {"kind": "bytes"}


@dataclass(frozen=True)
class BPEVocabulary(_ByteLevel):
    """Byte-level byte-pair encoding, lossless for every text (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2).

    Decoding does not need the package `tokenizers`; training and encoding do.

    Attributes:
        tokenizer: The JSON text of a `tokenizers.Tokenizer` without special tokens. The begin-of-path token is the id
            after its last one. It is not in the tokenizer, which would read it from texts that contain its name.

    Raises:
        ValueError: if `tokenizer` is not the JSON of such a tokenizer.
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
        """A vocabulary of `size` tokens: the 256 bytes, the most frequent merges in `texts`, the begin-of-path token.

        The result depends on nothing but the arguments.

        Raises:
            ValueError: if `size` is below 257.
            CorpusError: if too few pairs occur twice in the texts to reach `size`.
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
        # `to_utf8` reports a lone surrogate and its position; the library would only say that it expected a string.
        chunks = (chunk for text in texts for chunk in chunk_text(to_utf8(text).decode()))
        tokenizer.train_from_iterator(chunks, trainer)
        vocabulary = cls(tokenizer.to_str())
        if vocabulary.size < size:
            raise CorpusError(
                f"BPE: expected {size} tokens, got {vocabulary.size}: no further pairs occur twice in these texts. "
                f"Set vocab_size to {vocabulary.size} or less, or train on more text."
            )
        return vocabulary

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes that each token spells, all but the begin-of-path token."""
        letters = byte_letters()
        try:
            model = json.loads(self.tokenizer)["model"]
            if model["type"] != "BPE":
                raise ValueError(f"its model is {model['type']!r}")
            spelling_of_id = {i: bytes(letters[c] for c in token) for token, i in model["vocab"].items()}
            return tuple(spelling_of_id[i] for i in range(len(spelling_of_id)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "tokenizer: expected the JSON of a byte-level BPE tokenizer without special tokens, got one "
                f"that cannot be read ({type(error).__name__}: {error}). Train it with BPEVocabulary.train."
            ) from error

    @functools.cached_property
    def _encoder(self) -> Any:
        return optional("tokenizers").Tokenizer.from_str(self.tokenizer)

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """The token ids [N] of `text`, without the begin-of-path token.

        Raises:
            ValueError: for a lone surrogate.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, computed on all cores."""
        for text in texts:
            to_utf8(text)
        tokens: list[list[np.ndarray]] = [[] for _ in texts]
        for group in group_texts((i, chunk) for i, text in enumerate(texts) for chunk in chunk_text(text)):
            encodings = self._encoder.encode_batch_fast([chunk for _, chunk in group])
            for (i, _), encoding in zip(group, encodings, strict=True):
                tokens[i].append(np.array(encoding.ids, dtype=np.int32))
        return [np.concatenate(chunks) for chunks in tokens]

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as plain JSON data, which `vocabulary_from_dict` reads back."""
        return {"kind": "bpe", "tokenizer": self.tokenizer}


@dataclass(frozen=True)
class SymbolVocabulary:
    """The tokens of a world by name: token v is `symbols[v]`. There is no begin-of-path token.

    Raises:
        ValueError: if there are no symbols, or if one occurs twice, is empty or contains whitespace.
    """

    symbols: tuple[str, ...]
    begin: ClassVar[None] = None

    def __post_init__(self) -> None:
        counts = collections.Counter(self.symbols)
        wrong = [s for s in self.symbols if not s or any(c.isspace() for c in s) or counts[s] > 1]
        if wrong or not self.symbols:
            raise ValueError(
                "symbols: expected at least one, each distinct, not empty and without whitespace, got "
                f"{wrong[0] if wrong else self.symbols!r}. Give each token a name that meets these conditions."
            )

    @property
    def size(self) -> int:
        """The number of symbols."""
        return len(self.symbols)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        # A regex tries alternatives in order, so the longest symbol comes first.
        longest_first = sorted(self.symbols, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: v for v, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """The token ids [N] of `text`: from left to right the longest symbol that matches, skipping whitespace.

        Raises:
            ValueError: for a symbol that is not in the vocabulary.
        """
        tokens, position = [], 0
        while position < len(text):
            if text[position].isspace():
                position += 1
            elif match := self._pattern.match(text, position):
                tokens.append(self._ids[match[0]])
                position = match.end()
            else:
                symbol = text[position:].split(maxsplit=1)[0]
                raise ValueError(
                    f"text: unknown symbol {symbol[:20]!r} at character {position}. "
                    f"Choices: {' '.join(self.symbols[:100])}{' ...' if self.size > 100 else ''}"
                )
        return np.array(tokens, dtype=np.int32)

    def decode(self, tokens: Any) -> str:
        """The symbols of `tokens` [N], separated by spaces if any symbol is longer than one character.

        `encode(decode(tokens))` gives the tokens again.

        Raises:
            ValueError: for ids out of range.
        """
        separator = " " if any(len(s) > 1 for s in self.symbols) else ""
        return separator.join(self.symbols[t] for t in check_tokens(tokens, self.size))

    def symbol(self, token: int) -> str:
        """One token for display. Raises ValueError for an id out of range."""
        (token,) = check_tokens([token], self.size)
        return self.symbols[token]

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as plain JSON data, which `vocabulary_from_dict` reads back."""
        return {"kind": "symbols", "symbols": list(self.symbols)}


TextVocabulary = ByteVocabulary | BPEVocabulary | TokenizerVocabulary
Vocabulary = TextVocabulary | SymbolVocabulary

_VOCABULARIES: dict[str, type] = {
    "bytes": ByteVocabulary,
    "bpe": BPEVocabulary,
    "symbols": SymbolVocabulary,
    "tokenizer": TokenizerVocabulary,
}


def vocabulary_from_dict(data: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that `to_dict` wrote as `data`.

    Raises:
        ValueError: for an unknown kind, and for fields that are not those of the kind.
    """
    kind = data.get("kind")
    if kind not in _VOCABULARIES:
        raise ValueError(unknown("kind of vocabulary", kind, _VOCABULARIES))
    cls = _VOCABULARIES[kind]
    fields, expected = data.keys() - {"kind"}, {f.name for f in dataclasses.fields(cls)}
    if fields != expected:
        raise ValueError(
            f"vocabulary of kind {kind!r}: expected the fields {sorted(expected)}, got {sorted(fields)}. "
            "Pass the data that `to_dict` returned."
        )
    if kind == "symbols":
        if not isinstance(data["symbols"], list) or not all(isinstance(s, str) for s in data["symbols"]):
            raise ValueError(
                f"symbols: expected a list of strings, got {data['symbols']!r}. Pass the data that `to_dict` returned."
            )
        return SymbolVocabulary(tuple(data["symbols"]))
    return cls(**{name: data[name] for name in expected})
