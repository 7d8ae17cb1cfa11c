"""GPT-Neo (Black et al., 2021, GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow)."""

import functools

from jaxwalk.aggregates import attention
from jaxwalk.config import MLPConfig, ModelConfig
from jaxwalk.pretrained._family import Family, Keys, Tensor, Tensors
from jaxwalk.pretrained.gpt2 import ACTIVATIONS


def config(keys: Keys) -> ModelConfig:
    """GPT-2's layers, but scores are not divided by sqrt(head_width); some layers have a window."""
    width = keys("hidden_size")
    kinds = [kind for period, times in keys("attention_types", [[["global", "local"], 12]]) for kind in period * times]
    keys.expect("attention_layers", kinds)
    windows, depth = {"global": None, "local": keys("window_size", 256)}, keys("num_layers")
    if len(kinds) != depth or not windows.keys() >= set(kinds):
        keys.problems.append(f"attention_types: expected 'global' or 'local' for each of {depth} layers, got {kinds}")
    attends = functools.partial(attention.Config, heads=keys("num_heads"), scale=1.0, bias=False, out_bias=True)
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=keys("max_position_embeddings"),
        width=width,
        depth=depth,
        aggregate=tuple(attends(window=windows.get(kind)) for kind in kinds),
        filter=MLPConfig(
            keys("intermediate_size", None) or 4 * width, keys.choose("activation_function", ACTIVATIONS, "gelu_new")
        ),
        norm_eps=keys("layer_norm_epsilon", 1e-5),
        tied=keys("tie_word_embeddings", True),
    )


def tensors(config: ModelConfig) -> Tensors:
    """Queries, keys and values apart."""
    attends = "transformer.h.{}.attn.attention"
    return {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "layers/{}/aggregate_norm": "transformer.h.{}.ln_1",
        "layers/{}/aggregate/qkv": tuple(Tensor(f"{attends}.{part}_proj", (config.width,)) for part in "qkv"),
        "layers/{}/aggregate/out": f"{attends}.out_proj",
        "layers/{}/filter_norm": "transformer.h.{}.ln_2",
        "layers/{}/filter/up": "transformer.h.{}.mlp.c_fc",
        "layers/{}/filter/down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "unembed": "lm_head",
    }


_SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")

FAMILY = Family(
    model_types=("gpt_neo",),
    config=config,
    tensors=tensors,
    prefix="transformer.",
    harmless={
        **dict.fromkeys(("embed_dropout", "resid_dropout"), "acts in training only"),
        **{f"summary_{name}": "describes a head for another task" for name in _SUMMARY},
    },
    ignored={r"\.attn\.attention\.(masked_)?bias$": "the causal mask"},
)
