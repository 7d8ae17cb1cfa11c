"""Our models as folders that Hugging Face's transformers loads, with equal logits."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxwalk.aggregates import attention
from jaxwalk.config import ConfigError, MLPConfig, ModelConfig
from jaxwalk.filters import GatedMLP, LayerNorm, LearnedPositions, RMSNorm, SinusoidalPositions
from jaxwalk.model.build import init, resolved_layers
from jaxwalk.model.layer import Layer
from jaxwalk.model.layout import apart, path_of
from jaxwalk.model.transformer import Transformer
from jaxwalk.pretrained import _safetensors
from jaxwalk.pretrained._family import Family, Keys, differences, families, parameters
from jaxwalk.pretrained._tokenizer import begins_with
from jaxwalk.text import BPEVocabulary, ByteVocabulary, TokenizerVocabulary, Vocabulary, byte_letters


def export(model: Transformer, folder: str | os.PathLike[str], vocabulary: Vocabulary | None = None) -> None:
    """Write `model` as a folder of Hugging Face's transformers, Llama-shaped or GPT-2-shaped, whichever it is.

    `load(folder)` gives the same parameters bit for bit; transformers gives equal logits. With a vocabulary its
    tokenizer.json is written too. Raises ConfigError for a model that has no such shape, with every reason, for a
    folder that is not empty, and for a vocabulary of symbols, which is no tokenizer.
    """
    folder = Path(folder)
    config = _config_of(model)
    family, described = _fitting(config)
    names = {array.dtype for array in jax.tree.leaves(model)} - set(_safetensors.DTYPES.values())
    if names:
        raise ConfigError(
            f"dtype: expected float32, bfloat16 or float16, got {', '.join(map(str, names))}. Cast it with jw.astype."
        )
    tokenizer = None if vocabulary is None else _tokenizer(vocabulary)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: expected a new folder or an empty one, got files in it.")

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        path_of(keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(apart(jax.tree.map(np.asarray, model)))[0]
    }
    tensors: dict[str, np.ndarray] = {}
    for parameter in parameters(family, config):
        start = 0
        for part in parameter.parts:
            tensors[part.name] = parameter.stored(arrays[parameter.path], start, part)
            start += part.rows
    _safetensors.write(folder / "model.safetensors", tensors)
    begin = None if vocabulary is None else vocabulary.begin
    described = {**described, "dtype": str(arrays["embed/table"].dtype), "bos_token_id": begin, "eos_token_id": begin}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, "utf-8")
        named = None if begin is None else TokenizerVocabulary(tokenizer, None, model.vocab_size).symbol(begin)
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": named, "eos_token": named}
        (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def _config_of(model: Transformer) -> ModelConfig:
    """The config that such a model is made of. Raises ConfigError, with every reason, where no family can have it."""
    reasons = [
        f"layer {i}: its aggregate is {type(layer.aggregate).__name__}, not attention"
        for i, layer in enumerate(model.layers)
        if not isinstance(layer.aggregate, attention.Attention)
    ]
    reasons += [f"layer {i}: it has no filter" for i, layer in enumerate(model.layers) if layer.filter is None]
    if not model.depth:
        reasons.append("it has no layers")
    if model.norm is None:
        reasons.append("it has no final norm")
    if reasons:
        raise ConfigError("export: expected a model of attention and MLPs; " + "; ".join(reasons) + ".")
    norm: Any = model.norm
    kinds: dict[type, Any] = {LearnedPositions: "learned", SinusoidalPositions: "sinusoidal", type(None): "none"}
    config = ModelConfig(
        vocab_size=model.vocab_size,
        max_length=model.max_length,
        width=model.width,
        depth=model.depth,
        aggregate=tuple(_attention(layer) for layer in model.layers),
        filter=tuple(_filter(layer) for layer in model.layers),
        placement=model.layers[0].placement,
        norm="rms_norm" if isinstance(norm, RMSNorm) else "layer_norm",
        norm_bias=isinstance(norm, LayerNorm) and norm.bias is not None,
        norm_scale=norm.scale is not None,
        norm_eps=norm.eps,
        positions=kinds[type(model.positions)],
        tied=model.unembed.weight is None,
        unembed_bias=model.unembed.bias is not None,
        remat=model.remat,
    )
    made: Any = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    separate = [apart(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), m)) for m in (made, model)]
    kinds_of = [(jax.tree.structure(m), [a.shape for a in jax.tree.leaves(m)]) for m in separate]
    if kinds_of[0] != kinds_of[1]:
        raise ConfigError(
            "export: expected a model that is attention, MLPs and norms only, with norms and placement alike in all "
            "layers, as Llama and GPT-2 are; this one has scalings, caps or norms besides, or layers that differ."
        )
    return config


def _attention(layer: Layer) -> attention.Config:
    a: Any = layer.aggregate
    return attention.Config(
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_width=a.head_width,
        positions=a.positions,
        rope_theta=a.rope_theta,
        window=a.window,
        qk_norm=a.q_norm is not None,
        bias=a.qkv.bias is not None,
        kernel=a.kernel,
    )


def _filter(layer: Layer) -> MLPConfig:
    f: Any = layer.filter
    return MLPConfig(f.up.weight.shape[-1], f.activation, isinstance(f, GatedMLP), f.up.bias is not None)


def _fitting(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that a config comes back from as it was, and its config.json. ConfigError with all reasons if none."""
    reasons = []
    for name, family in families().items():
        if family.describe is None:
            continue
        described = family.describe(config)
        unfit = list(differences(_comparable(config), _comparable(family.config(Keys(described)))))
        if not unfit:
            return family, described
        reasons.append(f"as {name}: {'; '.join(unfit)}")
    raise ConfigError("export: no family has this shape. " + ". ".join(reasons) + ".")


def _comparable(config: ModelConfig) -> ModelConfig:
    """With every default written out, and without what is no part of the function."""

    def attention_of(given: Any) -> attention.Config:
        return dataclasses.replace(
            given,
            kv_heads=given.kv_heads or given.heads,
            head_width=given.head_width or config.width // given.heads,
            rope_theta=given.rope_theta if given.positions == "rope" else attention.Config.rope_theta,
            kernel="plain",
        )

    def filter_of(given: Any) -> MLPConfig:
        return dataclasses.replace(given, hidden=given.hidden or 4 * config.width)

    layers = resolved_layers(config)
    return dataclasses.replace(
        config,
        aggregate=tuple(attention_of(aggregate) for aggregate, _ in layers),
        filter=tuple(filter_of(filter) for _, filter in layers),
        norm_bias=config.norm_bias and config.norm == "layer_norm",
        remat=False,
    )


def _tokenizer(vocabulary: Vocabulary) -> str:
    """tokenizer.json of a vocabulary. Its begin-of-path token gets a name, and is read where a text has that name."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.tokenizer
    if isinstance(vocabulary, BPEVocabulary):
        made = json.loads(vocabulary.tokenizer)
    elif isinstance(vocabulary, ByteVocabulary):
        made = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "pre_tokenizer": {**_BYTE_LEVEL, "add_prefix_space": False},
            "post_processor": None,
            "model": {"type": "BPE", "vocab": byte_letters(), "merges": []},
        }
    else:
        raise ConfigError(
            f"vocabulary: expected bytes, BPE or a tokenizer, got {type(vocabulary).__name__}: symbols of a world are "
            "no tokenizer. Leave it out, and give token ids."
        )
    begin = {"id": vocabulary.begin, "content": _BEGIN, "special": True}
    begin |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    made |= {"added_tokens": [begin], "decoder": _BYTE_LEVEL}
    made["post_processor"] = begins_with(_BEGIN, vocabulary.begin)
    return json.dumps(made, ensure_ascii=False)


_BEGIN = "<|begin|>"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
