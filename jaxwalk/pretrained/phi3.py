"""Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905): Llama, its matrices in one, and LongRoPE for the longer of them."""

from collections.abc import Mapping
from typing import Any

from jaxwalk.config import ModelConfig
from jaxwalk.pretrained import llama
from jaxwalk.pretrained._family import GGUF, Family, Keys, Tensor, Tensors, first_layer
from jaxwalk.pretrained._rope import rope


def config(keys: Keys) -> ModelConfig:
    """As Llama, without biases; a window slides in all layers, or in none.

    A model with LongRoPE ends at the length that it was first trained on, `original_max_position_embeddings`: beyond it
    transformers rotates all positions otherwise. With a greater `max_length` put in its place the factors stay.
    """
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.expect(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        keys.expect(name, 1)
    positions = rope(keys, keys("max_position_embeddings"), share=1.0)
    aggregate = llama.heads(keys, positions, window=keys("sliding_window", None), bias=False)
    return llama.model(keys, positions, aggregate, llama.activation(keys), eps=1e-5)


def tensors(config: ModelConfig) -> Tensors:
    """Queries, keys and values in one, as ours are; gate and up in one, the gate first."""
    _, filter = first_layer(config)
    both, rows = "model.layers.{}.mlp.gate_up_proj", (2, filter.hidden)
    return {
        **llama.tensors(config),
        "layers/{}/aggregate/qkv": "model.layers.{}.self_attn.qkv_proj",
        "layers/{}/filter/gate": Tensor(both, rows, (0,)),
        "layers/{}/filter/up": Tensor(both, rows, (1,)),
    }


def from_gguf(keys: Keys, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of llama.cpp's metadata. It writes LongRoPE's factors as tensors, and a window of 0 for none.

    The window is the model's, as transformers has it; llama.cpp itself leaves it out at present.
    """
    written = llama.metadata(keys, tensors)
    head_width, original = written["head_dim"], keys("rope.scaling.original_context_length", None)
    positions = {
        "rope_theta": keys("rope.freq_base", 10000.0),
        "partial_rotary_factor": keys("rope.dimension_count", head_width) / head_width,
        "original_max_position_embeddings": original,
    }
    gain = keys("rope.scaling.attn_factor", None)
    if "rope_factors_short.weight" in tensors:
        sets = {f"{which}_factor": tensors[f"rope_factors_{which}.weight"].data.tolist() for which in ("short", "long")}
        positions |= {"rope_type": "longrope", "attention_factor": gain, **sets}
    return {
        **written,
        "rope_parameters": positions,
        "sliding_window": keys("attention.sliding_window", 0) or None,
    }


FAMILY = Family(
    model_types=("phi3",),
    config=config,
    tensors=tensors,
    prefix="model.",
    harmless=dict.fromkeys(("resid_pdrop", "embd_pdrop"), "acts in training only"),
    ignored=llama.COMPUTED,
    gguf=GGUF("phi3", from_gguf, consumed=("rope_factors_short.weight", "rope_factors_long.weight")),
)
