"""Llama and what is built like it: TinyLlama, SmolLM, SmolLM2 (Touvron et al., arXiv 2302.13971, 2307.09288)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxwalk.aggregates import attention
from jaxwalk.config import Activation, AggregateConfig, MLPConfig, ModelConfig
from jaxwalk.pretrained._family import GGUF, Family, Keys, Tensor, Tensors, first_layer
from jaxwalk.pretrained._rope import Rope, rope


def config(keys: Keys) -> ModelConfig:
    """Pre-norm layers of grouped-query attention with rotary positions, and gated MLPs."""
    keys.expect("rope_interleaved", False)
    positions = rope(keys, keys("max_position_embeddings"))
    aggregate = heads(keys, positions, bias=keys("attention_bias", False))
    return model(keys, positions, aggregate, activation(keys), mlp_bias=keys("mlp_bias", False))


# What the families that are built like Llama share.


def activation(keys: Keys, name: str = "hidden_act", default: str = "silu") -> Activation:
    """The activation of the MLPs."""
    return keys.choose(name, {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}, default)


def heads(keys: Keys, positions: Rope, *, head_width: int | None = None, **choices: Any) -> attention.Config:
    """Grouped-query attention with the rotary positions `positions`; `head_width` is where the config names none."""
    count, head_width = keys("num_attention_heads"), keys("head_dim", head_width)
    return attention.Config(
        heads=count,
        kv_heads=keys("num_key_value_heads", count),
        head_width=head_width,
        positions="rope",
        rope_theta=positions.theta,
        # Rounded as in transformers.
        rope_width=None
        if positions.share == 1
        else int((head_width or keys("hidden_size") // count) * positions.share),
        rope_scaling=positions.scaling,
        **choices,
    )


def model(
    keys: Keys,
    positions: Rope,
    aggregate: AggregateConfig | tuple[AggregateConfig, ...],
    activation: Activation,
    *,
    mlp_bias: bool = False,
    eps: float = 1e-6,
    tied: bool = False,
    **choices: Any,
) -> ModelConfig:
    """A model of RMS norms and gated MLPs, pre-norm unless `choices` say otherwise."""
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=positions.max_length,
        width=keys("hidden_size"),
        depth=keys("num_hidden_layers"),
        aggregate=aggregate,
        filter=MLPConfig(keys("intermediate_size"), activation, gated=True, bias=mlp_bias),
        norm="rms_norm",
        norm_eps=keys("rms_norm_eps", eps),
        positions="none",
        tied=keys("tie_word_embeddings", tied),
        **choices,
    )


def windows(keys: Keys, window: int | None, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer, None where a layer sees all before it.

    As `layer_types` says, or in configs older than that key, and without it, the layers that `slides` picks.
    """
    depth = keys("num_hidden_layers")
    kinds = keys("layer_types", ["sliding_attention" if slides(i) else "full_attention" for i in range(depth)])
    if len(kinds) != depth or not set(kinds) <= {"sliding_attention", "full_attention"}:
        keys.problems.append(
            f"layer_types: expected 'sliding_attention' or 'full_attention' for each of {depth} layers, got {kinds}"
        )
    if "sliding_attention" in kinds and window is None:
        keys.problems.append("sliding_window: expected a value, as layers slide, got none")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def tensors(config: ModelConfig) -> Tensors:
    """Queries, keys and values apart. Not every family has norms of queries and keys."""
    aggregate, _ = first_layer(config)
    H, G = aggregate.heads, aggregate.kv_heads or aggregate.heads
    K = aggregate.head_width or config.width // H
    layer, attends = "model.layers.{}", "model.layers.{}.self_attn"
    return {
        "embed": "model.embed_tokens",
        "layers/{}/aggregate_norm": f"{layer}.input_layernorm",
        "layers/{}/aggregate/qkv": (
            Tensor(f"{attends}.q_proj", (H * K,)),
            Tensor(f"{attends}.k_proj", (G * K,)),
            Tensor(f"{attends}.v_proj", (G * K,)),
        ),
        "layers/{}/aggregate/q_norm": f"{attends}.q_norm",
        "layers/{}/aggregate/k_norm": f"{attends}.k_norm",
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


def metadata(keys: Keys, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's metadata says of any of this kin, as config.json."""
    width, count = keys("embedding_length"), keys("attention.head_count")
    head_width = keys("attention.key_length", width // count)
    keys.expect("attention.value_length", head_width)
    keys.expect("expert_count", 0)
    return {
        "vocab_size": keys("vocab_size"),
        "max_position_embeddings": keys("context_length"),
        "hidden_size": width,
        "num_hidden_layers": keys("block_count"),
        "num_attention_heads": count,
        "num_key_value_heads": keys("attention.head_count_kv", count),
        "head_dim": head_width,
        "intermediate_size": keys("feed_forward_length"),
        "rms_norm_eps": keys("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


ROPE_TENSORS = ("rope_freqs.weight",)


def rope_metadata(keys: Keys, tensors: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """Rotary positions of all channels: `rope_parameters`, of metadata and of the tensor `rope_freqs`."""
    head_width = keys("attention.key_length", keys("embedding_length") // keys("attention.head_count"))
    keys.expect("rope.dimension_count", head_width)
    theta, kind = keys("rope.freq_base", theta), keys("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        # What each frequency is divided by: this is how Llama 3's scaling is written, already worked out.
        keys.expect("rope.scaling.type", "none")
        factors = tensors["rope_freqs.weight"].data.tolist()
        return {
            "rope_theta": theta,
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": keys("context_length"),
        }
    if kind == "none":
        return {"rope_theta": theta}
    scaled = {"rope_theta": theta, "rope_type": kind, "factor": keys("rope.scaling.factor")}
    if kind == "yarn":
        scaled |= {
            "original_max_position_embeddings": keys("rope.scaling.original_context_length"),
            "beta_fast": keys("rope.scaling.yarn_beta_fast", None),
            "beta_slow": keys("rope.scaling.yarn_beta_slow", None),
        }
    elif kind != "linear":
        keys.problems.append(f"rope.scaling.type: expected none, linear or yarn, got {kind!r}")
    keys("rope.scaling.finetuned", None)  # a remark
    return scaled


def from_gguf(keys: Keys, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of llama.cpp's metadata."""
    return {
        **metadata(keys, tensors),
        "rope_parameters": rope_metadata(keys, tensors),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def undo(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of queries and keys in their order again: llama.cpp turns pairs (2k, 2k + 1), and so interleaves them."""
    aggregate, _ = first_layer(config)
    heads = {"q_proj": aggregate.heads, "k_proj": aggregate.kv_heads}.get(name.split(".")[-2])
    if not heads:
        return array
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


COMPUTED = {r"\.rotary_emb\.inv_freq$": "computed from rope_theta"}

FAMILY = Family(
    model_types=("llama",),
    config=config,
    tensors=tensors,
    prefix="model.",
    ignored=COMPUTED,
    describe=describe,
    gguf=GGUF("llama", from_gguf, undo, ROPE_TENSORS),
)
