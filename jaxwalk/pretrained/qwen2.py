"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases of queries, keys and values only."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwalk.aggregates import attention
from jaxwalk.config import ModelConfig
from jaxwalk.pretrained import llama
from jaxwalk.pretrained._family import GGUF, Family, Keys
from jaxwalk.pretrained._rope import rope


def config(keys: Keys) -> ModelConfig:
    """As Llama; a window may slide in some layers."""
    keys.expect("use_mrope", False)
    positions = rope(keys, keys("max_position_embeddings"))
    aggregate = llama.heads(keys, positions, bias=True, out_bias=False)
    return llama.model(keys, positions, by_layer(keys, aggregate), llama.activation(keys))


def by_layer(keys: Keys, aggregate: attention.Config) -> tuple[attention.Config, ...]:
    """The attention of each layer, with a window from layer `max_window_layers` on where windows are used."""
    first, window = keys("max_window_layers", 28), keys.nullable("sliding_window", 4096)
    window = window if keys("use_sliding_window", False) else None
    windows = llama.windows(keys, window, lambda layer: window is not None and layer >= first)
    return tuple(dataclasses.replace(aggregate, window=window) for window in windows)


def from_gguf(keys: Keys, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of llama.cpp's metadata, which knows no windows of this family."""
    return {**llama.metadata(keys, tensors), "rope_parameters": llama.rope_metadata(keys, tensors)}


FAMILY = Family(
    model_types=("qwen2",),
    config=config,
    tensors=llama.tensors,
    prefix="model.",
    ignored=llama.COMPUTED,
    gguf=GGUF("qwen2", from_gguf, consumed=llama.ROPE_TENSORS),
)
