"""The vocabulary of a pretrained model, encoded and decoded by the `tokenizers` library."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from jaxwalk.text._encoding import byte_letters, check_tokens, display, to_utf8
from jaxwalk.text._errors import optional


@dataclass(frozen=True)
class TokenizerVocabulary:
    """The tokenizer that came with a pretrained model, as the `tokenizers` library runs it.

    Attributes:
        tokenizer: The JSON text of a `tokenizers.Tokenizer`. The names of its special tokens encode to those tokens.
        begin: The id of the token that begins a path, or None. Decoding omits it.
        size: V of the model. The model may have rows that no token uses.

    Raises:
        ValueError: if the tokenizer cannot be read, or has ids that the model does not have.
    """

    tokenizer: str
    begin: int | None
    size: int

    def __post_init__(self) -> None:
        largest = max((*self._token_names, -1 if self.begin is None else self.begin))
        if not 0 <= largest < self.size or (self.begin or 0) < 0:
            raise ValueError(
                f"tokenizer: expected ids from 0 to {self.size - 1}, as the model has {self.size} token vectors, got "
                f"{largest}. Use the tokenizer of this model."
            )

    @functools.cached_property
    def _definition(self) -> dict[str, Any]:
        try:
            definition = json.loads(self.tokenizer)
            return {**definition, "model": dict(definition["model"])}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "tokenizer: expected the JSON of a `tokenizers.Tokenizer`, got one that cannot be read "
                f"({type(error).__name__}: {error}). Pass the text of a tokenizer.json."
            ) from error

    @functools.cached_property
    def _added_tokens(self) -> dict[int, str]:
        return {token["id"]: token["content"] for token in self._definition.get("added_tokens") or ()}

    @functools.cached_property
    def _token_names(self) -> dict[int, str]:
        ids = self._definition["model"].get("vocab", {})
        if isinstance(ids, list):  # a unigram model has pairs (token, score)
            ids = {token: i for i, (token, _) in enumerate(ids)}
        return {i: token for token, i in ids.items()} | self._added_tokens

    @functools.cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes that each token spells: the names of special tokens, and b"" for ids without a token."""
        byte_level = '"ByteLevel"' in json.dumps([self._definition.get(k) for k in ("pre_tokenizer", "decoder")])
        letters = byte_letters()

        def spelling(i: int) -> bytes:
            token = self._token_names.get(i, "")
            if i not in self._added_tokens and byte_level and all(c in letters for c in token):
                return bytes(letters[c] for c in token)
            if i not in self._added_tokens and re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's byte tokens
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode("utf-8", "surrogatepass")

        return tuple(map(spelling, range(self.size)))

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " V"]:
        """The number of bytes that each token spells; 0 for the begin-of-path token."""
        return np.array([0 if i == self.begin else len(s) for i, s in enumerate(self.spellings)], dtype=np.int64)

    @functools.cached_property
    def _encoder(self) -> Any:
        encoder = optional("tokenizers").Tokenizer.from_str(self.tokenizer)
        # A tokenizer's file may ask for both, which would silently change what a text encodes to.
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    @functools.cached_property
    def _unknown_token(self) -> int | None:
        model = self._definition["model"]
        ids = {token: i for i, token in self._token_names.items()}
        return model.get("unk_id") if "unk_id" in model else ids.get(model.get("unk_token"))

    def encode(self, text: str) -> Int32[np.ndarray, " N"]:
        """The token ids [N] of `text`, without special tokens around them.

        Raises:
            ValueError: for text that the tokenizer cannot represent, and for a lone surrogate.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, computed on all cores."""
        for text in texts:
            to_utf8(text)
        encodings = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                # A text may spell out the name of the unknown token.
                if token == self._unknown_token and text[start:end].strip() != self._token_names.get(token):
                    raise ValueError(
                        f"text: the tokenizer cannot represent {text[start:end][:20]!r} at character {start}. "
                        "Remove it, or pass token ids instead of text."
                    )
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, tokens: Any) -> str:
        """The text of `tokens` [N], with special tokens as their names and without begin-of-path tokens.

        Encoding and decoding again gives the same text only if the tokenizer is lossless.

        Raises:
            ValueError: for ids out of range.
        """
        tokens = check_tokens(tokens, self.size)
        return self._encoder.decode([int(t) for t in tokens if t != self.begin], skip_special_tokens=False)

    def symbol(self, token: int) -> str:
        """One token for display, in the form of `BPEVocabulary.symbol`; special tokens as their names.

        Raises:
            ValueError: for an id out of range.
        """
        (token,) = check_tokens([token], self.size)
        return display(self.spellings[token]) or f"<{token}>"

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as plain JSON data, which `vocabulary_from_dict` reads back."""
        return {"kind": "tokenizer", "tokenizer": self.tokenizer, "begin": self.begin, "size": self.size}
