"""The vocabulary of a pretrained model: from its folder's tokenizer.json, or from the tables inside a GGUF file."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxwalk.checkpoint import CheckpointError
from jaxwalk.text import TokenizerVocabulary


def of_folder(folder: Path, config: Mapping[str, Any], size: int) -> TokenizerVocabulary | None:
    """The vocabulary of a Hugging Face folder; None without tokenizer.json: token ids are all that is needed.

    The begin-of-path token is what the model's own tokenizer puts before a text, which need not be its bos_token.
    Raises CheckpointError for one that cannot be read, or that is another model's.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        tokenizer = file.read_text("utf-8")
        parts = json.loads(tokenizer)
        said: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                said.update(json.loads((folder / name).read_text("utf-8")))
        begin = _put_before(parts.get("post_processor"))
        adds = said.get("add_bos_token")
        if adds is not None:  # it has the last word
            begin = (_bos(parts, said, config) if begin is None else begin) if adds else None
        return TokenizerVocabulary(tokenizer, begin, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as the model's tokenizer ({type(error).__name__}: {error}). Remove it to load the "
            "model without: token ids still work."
        ) from error


def begins_with(token: str, id: int) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts a token before every text."""
    first: list[Any] = [{"SpecialToken": {"id": token, "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, *first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def _put_before(processor: Mapping[str, Any] | None) -> int | None:
    """The token that a post-processor puts before a text, if it does."""
    for one in (processor or {}).get("processors", [processor]):
        if one and one["type"] == "TemplateProcessing" and "SpecialToken" in one["single"][0]:
            return one["special_tokens"][one["single"][0]["SpecialToken"]["id"]]["ids"][0]
        if one and one["type"] in ("BertProcessing", "RobertaProcessing"):
            return one["cls"][1]
    return None


def _bos(parts: Mapping[str, Any], said: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The id of the bos_token, or, without a word about one, the config's bos_token_id."""
    token = said.get("bos_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is None:
        return None if "bos_token" in said else config.get("bos_token_id")
    added = {one["content"]: one["id"] for one in parts.get("added_tokens") or ()}
    vocabulary = parts["model"]["vocab"]
    return added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)


def _byte_level(regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = _byte_level(True)
# Every digit is a word of its own before the rest is split as for GPT-2, so that no space goes with it.
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}

# How words are split before pairs are merged, by the kind that a GGUF file names: after llama.cpp's list of them in
# llama-vocab.cpp and the tokenizer.json of the models that each is for.
_PRETOKENIZERS: Mapping[str, dict[str, Any]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3"), _split(_WORDS % r"\p{N}{1,3}")),
    "qwen2": _split(_WORDS % r"\p{N}"),
}
_NORMALIZERS = {"qwen2": {"type": "NFC"}}
_WHOLE_WORDS = ("llama-bpe", "llama3")  # a word that is a token is that token, whatever its pairs would merge to
_NORMAL, _CONTROL, _USER = 1, 3, 4  # types of tokens; the last two are read out of a text by their names


def of_gguf(metadata: Mapping[str, Any], size: int) -> TokenizerVocabulary | None:
    """The vocabulary in a GGUF file; None, with a warning that says why, for kinds that are not known."""
    kind, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        return None
    if kind != "llama" and (kind != "gpt2" or pre not in _PRETOKENIZERS):
        warnings.warn(
            f"its tokenizer is of a kind that is not known here (model {kind!r}, pre-tokenizer {pre!r}; known: model "
            f"'llama', and model 'gpt2' with {', '.join(sorted(_PRETOKENIZERS))}). The vocabulary is None; token ids "
            "still work.",
            stacklevel=3,
        )
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind_of == _CONTROL,
        }
        for i, (token, kind_of) in enumerate(zip(tokens, types, strict=True))
        if kind_of in (_CONTROL, _USER)
    ]
    made = _sentencepiece(metadata, tokens, types) if kind == "llama" else _byte_pairs(metadata, tokens, pre)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
        **made,
    }
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    if not metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _WHOLE_WORDS):
        begin = None
    if begin is not None:
        tokenizer["post_processor"] = begins_with(tokens[begin], begin)
    return TokenizerVocabulary(json.dumps(tokenizer, ensure_ascii=False), begin, size)


def _byte_pairs(metadata: Mapping[str, Any], tokens: Sequence[str], pre: str) -> dict[str, Any]:
    """Byte-level pairs, merged in the order of the list of merges."""
    return {
        "normalizer": _NORMALIZERS.get(pre),
        "pre_tokenizer": _PRETOKENIZERS[pre],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    """SentencePiece's pairs: any two neighbours that make a token are merged, those of the highest score first.

    Text is not split into words before, spaces are "\u2581", and characters without a token are bytes.
    """
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.scores: expected one for each of {len(tokens)} tokens, got "
            f"{'none' if scores is None else len(scores)}. Without them pairs have no order."
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merged = {i for i, kind in enumerate(types) if kind in (_NORMAL, _USER)}
    ordered = sorted((i for i in merged if len(tokens[i]) > 1), key=lambda i: (-scores[i], i))
    merges = [
        [left, right]
        for i in ordered
        for left, right in ((tokens[i][:cut], tokens[i][cut:]) for cut in range(1, len(tokens[i])))
        if vocabulary.get(left) in merged and vocabulary.get(right) in merged
    ]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepended = [{"type": "Prepend", "prepend": "\u2581"}] if prefixed else []
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepended, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *stripped,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
