"""Llama and what is built like it: TinyLlama, SmolLM, SmolLM2 (Touvron et al., arXiv 2302.13971, 2307.09288)."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxwalk.aggregates import attention
from jaxwalk.config import MLPConfig, ModelConfig
from jaxwalk.pretrained._family import GGUF, Family, Keys, Tensor, Tensors, first_layer


def config(keys: Keys) -> ModelConfig:
    """Pre-norm layers of grouped-query attention with rotary positions, and gated MLPs."""
    keys.expect("rope_interleaved", False)
    keys.choose("hidden_act", {"silu": "silu"}, "silu")
    heads = keys("num_attention_heads")
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=keys("max_position_embeddings"),
        width=keys("hidden_size"),
        depth=keys("num_hidden_layers"),
        aggregate=attention.Config(
            heads=heads,
            kv_heads=keys("num_key_value_heads", heads),
            head_width=keys("head_dim", None),
            positions="rope",
            rope_theta=keys.rope_theta(),
            bias=keys("attention_bias", False),
        ),
        filter=MLPConfig(keys("intermediate_size"), "silu", gated=True, bias=keys("mlp_bias", False)),
        norm="rms_norm",
        norm_eps=keys("rms_norm_eps", 1e-6),
        positions="none",
        tied=keys("tie_word_embeddings", False),
    )


def tensors(config: ModelConfig) -> Tensors:
    """Queries, keys and values apart."""
    aggregate, _ = first_layer(config)
    heads, kv_heads = aggregate.heads, aggregate.kv_heads or aggregate.heads
    K = aggregate.head_width or config.width // heads
    layer, attends = "model.layers.{}", "model.layers.{}.self_attn"
    return {
        "embed": "model.embed_tokens",
        "layers/{}/aggregate_norm": f"{layer}.input_layernorm",
        "layers/{}/aggregate/qkv": (
            Tensor(f"{attends}.q_proj", (heads * K,)),
            Tensor(f"{attends}.k_proj", (kv_heads * K,)),
            Tensor(f"{attends}.v_proj", (kv_heads * K,)),
        ),
        "layers/{}/aggregate/out": f"{attends}.o_proj",
        "layers/{}/filter_norm": f"{layer}.post_attention_layernorm",
        "layers/{}/filter/gate": f"{layer}.mlp.gate_proj",
        "layers/{}/filter/up": f"{layer}.mlp.up_proj",
        "layers/{}/filter/down": f"{layer}.mlp.down_proj",
        "norm": "model.norm",
        "unembed": "lm_head",
    }


def describe(config: ModelConfig) -> dict[str, Any]:
    """config.json, readable by transformers before and after version 5."""
    aggregate, filter = first_layer(config)
    heads = aggregate.heads
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": heads,
        "num_key_value_heads": aggregate.kv_heads or heads,
        "head_dim": aggregate.head_width or config.width // heads,
        "rope_theta": aggregate.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": aggregate.rope_theta},
        "attention_bias": aggregate.bias,
        "intermediate_size": filter.hidden or 4 * config.width,
        "hidden_act": "silu",
        "mlp_bias": filter.bias,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def from_gguf(keys: Keys, tensors: Iterable[str]) -> dict[str, Any]:
    """config.json of llama.cpp's metadata."""
    tensors = set(tensors)
    width, heads = keys("embedding_length"), keys("attention.head_count")
    head_width = keys("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        keys.expect(name, head_width)
    keys.expect("rope.scaling.type", "none")
    keys.expect("expert_count", 0)
    return {
        "vocab_size": keys("vocab_size"),
        "max_position_embeddings": keys("context_length"),
        "hidden_size": width,
        "num_hidden_layers": keys("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys("attention.head_count_kv", heads),
        "head_dim": head_width,
        "rope_theta": keys("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "intermediate_size": keys("feed_forward_length"),
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "rms_norm_eps": keys("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def undo(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of queries and keys in their order again: llama.cpp turns pairs (2k, 2k + 1), and so interleaves them."""
    aggregate, _ = first_layer(config)
    heads = {"q_proj": aggregate.heads, "k_proj": aggregate.kv_heads}.get(name.split(".")[-2])
    if not heads:
        return array
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


FAMILY = Family(
    model_types=("llama",),
    config=config,
    tensors=tensors,
    prefix="model.",
    ignored={r"\.rotary_emb\.inv_freq$": "computed from rope_theta"},
    describe=describe,
    gguf=GGUF("llama", from_gguf, undo),
)
