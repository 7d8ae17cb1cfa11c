"""Gemma 2 (arXiv 2408.00118): sandwich norms, soft caps, and a window that slides in every second layer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxwalk.config import ModelConfig
from jaxwalk.pretrained import llama
from jaxwalk.pretrained._family import GGUF, Family, Keys, Tensors
from jaxwalk.pretrained._rope import Rope, rope


def config(keys: Keys) -> ModelConfig:
    """Layers with and without a window in turn, unless `layer_types` says otherwise."""
    positions = rope(keys, keys("max_position_embeddings"))
    cap = keys.nullable("attn_logit_softcapping", 50.0)
    aggregate = llama.heads(keys, positions, softcap=cap, **choices(keys))
    windows = llama.windows(keys, keys.nullable("sliding_window", 4096), lambda layer: layer % 2 == 0)
    aggregates = tuple(dataclasses.replace(aggregate, window=window) for window in windows)
    return model(keys, positions, aggregates, keys.nullable("final_logit_softcapping", 30.0))


# What Gemma 2 and Gemma 3 share.


def choices(keys: Keys) -> dict[str, Any]:
    """Choices of the attention."""
    keys.expect("use_bidirectional_attention", False)
    scale = keys("query_pre_attn_scalar", 256) ** -0.5
    return {"head_width": 256, "scale": scale, "bias": keys("attention_bias", False)}


def model(keys: Keys, positions: Rope, aggregates: tuple[Any, ...], cap: float | None) -> ModelConfig:
    """Scaled token vectors, norms around each step that multiply by 1 + their weight, and tied output vectors."""
    return llama.model(
        keys,
        positions,
        aggregates,
        llama.activation(keys, "hidden_activation", "gelu_pytorch_tanh"),
        tied=True,
        placement="sandwich",
        norm_unit_offset=True,
        embed_scale=math.sqrt(keys("hidden_size")),
        logit_softcap=cap,
    )


def tensors(config: ModelConfig) -> Tensors:
    """Llama's, but for the norms, of which there are more."""
    layer = "model.layers.{}"
    return {
        **llama.tensors(config),
        "layers/{}/aggregate_out_norm": f"{layer}.post_attention_layernorm",
        "layers/{}/filter_norm": f"{layer}.pre_feedforward_layernorm",
        "layers/{}/filter_out_norm": f"{layer}.post_feedforward_layernorm",
    }


def metadata(keys: Keys, tensors: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """What llama.cpp's metadata says of both, as config.json; `largest` is the depth of the largest model.

    What scores are scaled by is not written. llama.cpp knows it by the depth: so do we.
    """
    written = llama.metadata(keys, tensors)
    width, heads = written["hidden_size"], written["num_attention_heads"]
    scalar = width // heads if written["num_hidden_layers"] == largest else written["head_dim"]
    return {**written, "query_pre_attn_scalar": scalar}


def from_gguf(keys: Keys, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of llama.cpp's metadata."""
    keys.expect("attention.sliding_window_pattern", 2)
    return {
        **metadata(keys, tensors, largest=46),
        "rope_parameters": llama.rope_metadata(keys, tensors),
        "sliding_window": keys("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys("final_logit_softcapping", 30.0),
    }


def undo(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Weights of norms again: llama.cpp writes what they multiply by, which is 1 + the weight."""
    return array - 1 if name.endswith("norm.weight") else array


HARMLESS = {
    "hidden_act": "hidden_activation decides",
    "sliding_window_size": "sliding_window decides",
}

FAMILY = Family(
    model_types=("gemma2",),
    config=config,
    tensors=tensors,
    prefix="model.",
    harmless=HARMLESS,
    ignored=llama.COMPUTED,
    gguf=GGUF("gemma2", from_gguf, undo, llama.ROPE_TENSORS),
)
