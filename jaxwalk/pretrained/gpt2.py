"""GPT-2 (Radford et al., 2019, Language Models are Unsupervised Multitask Learners), DistilGPT-2 and their kin."""

from collections.abc import Iterable
from typing import Any

from jaxwalk.aggregates import attention
from jaxwalk.config import MLPConfig, ModelConfig
from jaxwalk.pretrained._family import GGUF, Family, Keys, Tensors, first_layer

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def config(keys: Keys) -> ModelConfig:
    """Pre-norm layers of attention and MLPs with biases, and a table of positions."""
    keys.expect("scale_attn_weights", True)
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    width = keys("n_embd")
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=keys("n_positions"),
        width=width,
        depth=keys("n_layer"),
        aggregate=attention.Config(heads=keys("n_head")),
        filter=MLPConfig(
            keys("n_inner", None) or 4 * width, keys.choose("activation_function", ACTIVATIONS, "gelu_new")
        ),
        norm_eps=keys("layer_norm_epsilon", 1e-5),
        tied=keys("tie_word_embeddings", True),
    )


def tensors(config: ModelConfig) -> Tensors:
    """Queries, keys and values in one, as ours are."""
    return {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "layers/{}/aggregate_norm": "transformer.h.{}.ln_1",
        "layers/{}/aggregate/qkv": "transformer.h.{}.attn.c_attn",
        "layers/{}/aggregate/out": "transformer.h.{}.attn.c_proj",
        "layers/{}/filter_norm": "transformer.h.{}.ln_2",
        "layers/{}/filter/up": "transformer.h.{}.mlp.c_fc",
        "layers/{}/filter/down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "unembed": "lm_head",
    }


def describe(config: ModelConfig) -> dict[str, Any]:
    """config.json of such a model."""
    aggregate, filter = first_layer(config)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": aggregate.heads,
        "n_inner": filter.hidden or 4 * config.width,
        "activation_function": names[filter.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def from_gguf(keys: Keys, tensors: Iterable[str]) -> dict[str, Any]:
    """config.json of llama.cpp's metadata."""
    return {
        "n_positions": keys("context_length"),
        "n_embd": keys("embedding_length"),
        "n_layer": keys("block_count"),
        "n_head": keys("attention.head_count"),
        "n_inner": keys("feed_forward_length"),
        "layer_norm_epsilon": keys("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in set(tensors),
        "vocab_size": keys("vocab_size"),
    }


FAMILY = Family(
    model_types=("gpt2",),
    config=config,
    tensors=tensors,
    prefix="transformer.",
    conv1d=True,
    harmless={
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), "acts in training only"),
        **dict.fromkeys(
            (
                "summary_activation",
                "summary_first_dropout",
                "summary_proj_to_labels",
                "summary_type",
                "summary_use_proj",
            ),
            "describes a head for another task",
        ),
        "n_ctx": "n_positions by an older name",
        "reorder_and_upcast_attn": "precision only: scores are in float32 here always",
    },
    ignored={r"\.attn\.(masked_)?bias$": "the causal mask"},
    describe=describe,
    gguf=GGUF("gpt2", from_gguf),
)
