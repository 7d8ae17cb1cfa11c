"""Qwen3 (arXiv 2505.09388): Qwen2 with norms of each head's queries and keys, and without its biases."""

from jaxwalk.config import ModelConfig
from jaxwalk.pretrained import llama, qwen2
from jaxwalk.pretrained._family import GGUF, Family, Keys
from jaxwalk.pretrained._rope import rope


def config(keys: Keys) -> ModelConfig:
    """As Qwen2."""
    positions = rope(keys, keys("max_position_embeddings"))
    eps, bias = keys("rms_norm_eps", 1e-6), keys("attention_bias", False)
    aggregate = llama.heads(keys, positions, head_width=128, qk_norm=True, qk_norm_eps=eps, bias=bias)
    return llama.model(keys, positions, qwen2.by_layer(keys, aggregate), llama.activation(keys))


FAMILY = Family(
    model_types=("qwen3",),
    config=config,
    tensors=llama.tensors,
    prefix="model.",
    ignored=llama.COMPUTED,
    gguf=GGUF("qwen3", qwen2.from_gguf, consumed=llama.ROPE_TENSORS),
)
