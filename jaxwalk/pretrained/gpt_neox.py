"""GPT-NeoX (Black et al., arXiv 2204.06745) and Pythia (Biderman et al., arXiv 2304.01373).

Not from GGUF: llama.cpp writes down neither the activation, of which the two have different ones, nor the base of
rotary positions.
"""

from jaxwalk.aggregates import attention
from jaxwalk.config import MLPConfig, ModelConfig
from jaxwalk.pretrained._family import Family, Keys, Tensor, Tensors, first_layer
from jaxwalk.pretrained._rope import Rope, rope_of
from jaxwalk.pretrained.gpt2 import ACTIVATIONS


def config(keys: Keys) -> ModelConfig:
    """Layers of attention and MLPs, by default from the same stream; rotary positions for a share of the channels."""
    width, heads = keys("hidden_size"), keys("num_attention_heads")
    positions = rotary(keys)
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=positions.max_length,
        width=width,
        depth=keys("num_hidden_layers"),
        aggregate=attention.Config(
            heads=heads,
            positions="rope",
            rope_theta=positions.theta,
            rope_width=int(width // heads * positions.share),
            rope_scaling=positions.scaling,
            bias=keys("attention_bias", True),
        ),
        filter=MLPConfig(keys("intermediate_size"), keys.choose("hidden_act", ACTIVATIONS, "gelu")),
        placement="parallel" if keys("use_parallel_residual", True) else "pre",
        norm_eps=keys("layer_norm_eps", 1e-5),
        positions="none",
        tied=keys("tie_word_embeddings", False),
    )


def rotary(keys: Keys) -> Rope:
    """Rotary positions, by this family's names or by those of all."""
    own = {"rope_theta": keys("rotary_emb_base", None), "partial_rotary_factor": keys("rotary_pct", None)}
    places = (own, keys("rope_scaling", {}), keys("rope_parameters", {}))
    return rope_of(keys, places, keys("max_position_embeddings"), 10000.0, 0.25)


def tensors(config: ModelConfig) -> Tensors:
    """Queries, keys and values in one, a head's three after another."""
    heads = first_layer(config)[0].heads
    layer = "gpt_neox.layers.{}"
    rows = (heads, 3, config.width // heads)
    return {
        "embed": "gpt_neox.embed_in",
        "layers/{}/aggregate_norm": f"{layer}.input_layernorm",
        "layers/{}/aggregate/qkv": tuple(
            Tensor(f"{layer}.attention.query_key_value", rows, (slice(None), part)) for part in range(3)
        ),
        "layers/{}/aggregate/out": f"{layer}.attention.dense",
        "layers/{}/filter_norm": f"{layer}.post_attention_layernorm",
        "layers/{}/filter/up": f"{layer}.mlp.dense_h_to_4h",
        "layers/{}/filter/down": f"{layer}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "unembed": "embed_out",
    }


FAMILY = Family(
    model_types=("gpt_neox",),
    config=config,
    tensors=tensors,
    prefix="gpt_neox.",
    ignored={
        r"\.attention\.(masked_)?bias$": "the causal mask",
        r"\.attention\.rotary_emb\.inv_freq$": "computed from the base of rotary positions",
    },
)
