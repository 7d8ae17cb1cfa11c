"""OLMo 2 (arXiv 2501.00656): norms of what a step adds, not of what it reads, and of all queries and keys at once."""

from typing import Any

from jaxwalk.config import ModelConfig
from jaxwalk.pretrained import llama, qwen2
from jaxwalk.pretrained._family import GGUF, Family, Keys, Tensors
from jaxwalk.pretrained._rope import rope


def config(keys: Keys) -> ModelConfig:
    """As Llama, but for its norms."""
    positions = rope(keys, keys("max_position_embeddings"))
    norms: dict[str, Any] = {"qk_norm": True, "qk_norm_over": "width", "qk_norm_eps": keys("rms_norm_eps", 1e-5)}
    aggregate = llama.heads(keys, positions, bias=keys("attention_bias", False), **norms)
    return llama.model(keys, positions, aggregate, llama.activation(keys), eps=1e-5, placement="res_post")


def tensors(config: ModelConfig) -> Tensors:
    """Llama's, but for the norms."""
    return {
        **llama.tensors(config),
        "layers/{}/aggregate_norm": "model.layers.{}.post_attention_layernorm",
        "layers/{}/filter_norm": "model.layers.{}.post_feedforward_layernorm",
    }


FAMILY = Family(
    model_types=("olmo2",),
    config=config,
    tensors=tensors,
    prefix="model.",
    ignored=llama.COMPUTED,
    gguf=GGUF("olmo2", qwen2.from_gguf, consumed=llama.ROPE_TENSORS),
)
