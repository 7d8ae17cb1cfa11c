"""Mamba-2 (Dao and Gu, arXiv 2405.21060), as transformers writes it: mistralai/Mamba-Codestral-7B-v0.1 and alike.

A block is a layer without a filter. There is no GGUF, for the reason that Mamba has none.
"""

import math

from jaxwalk.aggregates import mamba2
from jaxwalk.config import ModelConfig
from jaxwalk.pretrained._family import Family, Keys, Raw, Tensor, Tensors, causal_conv1d, first_layer
from jaxwalk.pretrained.mamba import HARMLESS, MAX_LENGTH, same_by_older_names


def config(keys: Keys) -> ModelConfig:
    """Pre-norm layers of Mamba-2 alone."""
    keys.choose("hidden_act", {"silu": "silu", "swish": "silu"}, "silu")
    # A limit would bound dt in one pass over a path, but not in transformers' decoding: two models.
    keys.expect("time_step_limit", [0.0, math.inf], [0.0, {"__float__": "Infinity"}])
    width, depth, expand = keys("hidden_size"), keys("num_hidden_layers"), keys("expand", 2)
    heads, eps = keys("num_heads"), keys("layer_norm_epsilon", 1e-5)
    same_by_older_names(keys, width, depth, expand)
    keys.expect("head_dim", expand * width // heads)
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=MAX_LENGTH,
        width=width,
        depth=depth,
        aggregate=mamba2.Config(
            expand=expand,
            heads=heads,
            state=keys("state_size", 128),
            groups=keys("n_groups", 8),
            conv=keys("conv_kernel", 4),
            conv_bias=keys("use_conv_bias", True),
            bias=keys("use_bias", False),
            norm_eps=eps,
        ),
        filter=None,
        norm="rms_norm",
        norm_eps=eps,
        positions="none",
        tied=keys("tie_word_embeddings", False),
    )


def tensors(config: ModelConfig) -> Tensors:
    """One linear map to the gate, what enters the convolution, and dt, in this order."""
    aggregate, _ = first_layer(config)
    E, H, mixer = aggregate.expand * config.width, aggregate.heads, "backbone.layers.{}.mixer"
    M = E + 2 * aggregate.groups * aggregate.state

    def rows(start: int, stop: int) -> Tensor:
        return Tensor(f"{mixer}.in_proj", (E + M + H,), (slice(start, stop),))

    return {
        "embed": "backbone.embeddings",
        "layers/{}/aggregate_norm": "backbone.layers.{}.norm",
        "layers/{}/aggregate/gate": rows(0, E),
        "layers/{}/aggregate/mixed": rows(E, E + M),
        "layers/{}/aggregate/dt": rows(E + M, E + M + H),
        "layers/{}/aggregate/dt_bias": Raw(f"{mixer}.dt_bias", (H,)),
        "layers/{}/aggregate/conv": f"{mixer}.conv1d",
        "layers/{}/aggregate/conv/weight": causal_conv1d(f"{mixer}.conv1d", M, aggregate.conv),
        "layers/{}/aggregate/A_log": Raw(f"{mixer}.A_log", (H,)),
        "layers/{}/aggregate/skip": Raw(f"{mixer}.D", (H,)),
        "layers/{}/aggregate/scale": Raw(f"{mixer}.norm.weight", (E,)),
        "layers/{}/aggregate/out": f"{mixer}.out_proj",
        "norm": "backbone.norm_f",
        "unembed": "lm_head",
    }


FAMILY = Family(
    model_types=("mamba2",),
    config=config,
    tensors=tensors,
    prefix="backbone.",
    harmless={
        **HARMLESS,
        "chunk_size": "speed only",
        "norm_before_gate": "never read: the gate comes before the norm, whatever older versions wrote here",
        "time_step_rank": "of Mamba, and never read",
    },
)
