"""Mamba (Gu and Dao, arXiv 2312.00752), as transformers writes it: state-spaces/mamba-130m-hf and alike.

A block is a layer without a filter. There is no GGUF: llama.cpp keeps -exp(A_log) in the place of A_log, and the
logarithm of a rounded exponential is not the parameter any more.
"""

from jaxwalk.aggregates import mamba
from jaxwalk.config import ModelConfig
from jaxwalk.pretrained._family import Family, Keys, Raw, Tensor, Tensors, causal_conv1d, first_layer

MAX_LENGTH = 2048
"""Of a path, which config.json does not bound: what the published models were trained on."""

HARMLESS = {
    **dict.fromkeys(
        (
            "rescale_prenorm_residual",
            "time_step_floor",
            "time_step_init_scheme",
            "time_step_max",
            "time_step_min",
            "time_step_scale",
        ),
        "says how parameters start",
    ),
    "residual_in_fp32": "precision only: the stream has the dtype of the parameters here",
    "fused_add_norm": "speed only",
    "pad_vocab_size_multiple": "vocab_size is what it was padded to",
}


def config(keys: Keys) -> ModelConfig:
    """Pre-norm layers of Mamba alone."""
    keys.choose("hidden_act", {"silu": "silu", "swish": "silu"}, "silu")
    width, depth, expand = keys("hidden_size"), keys("num_hidden_layers"), keys("expand", 2)
    rank = keys("time_step_rank", "auto")
    same_by_older_names(keys, width, depth, expand)
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=MAX_LENGTH,
        width=width,
        depth=depth,
        aggregate=mamba.Config(
            expand=expand,
            state=keys("state_size", 16),
            dt_rank=None if rank == "auto" else rank,
            conv=keys("conv_kernel", 4),
            conv_bias=keys("use_conv_bias", True),
            bias=keys("use_bias", False),
        ),
        filter=None,
        norm="rms_norm",
        norm_eps=keys("layer_norm_epsilon", 1e-5),
        positions="none",
        tied=keys("tie_word_embeddings", True),
    )


def same_by_older_names(keys: Keys, width: int, depth: int, expand: int) -> None:
    """Keys of the original format, which conversions of it have kept."""
    for name in ("intermediate_size", "d_inner"):
        keys.expect(name, expand * width)
    keys.expect("d_model", width)
    keys.expect("n_layer", depth)
    keys.expect("rms_norm", True)
    keys.expect("ssm_cfg", {})


def tensors(config: ModelConfig) -> Tensors:
    """What enters the convolution and the gate are one linear map there, and A_log is the other way round."""
    aggregate, _ = first_layer(config)
    E, N, mixer = aggregate.expand * config.width, aggregate.state, "backbone.layers.{}.mixer"
    return {
        "embed": "backbone.embeddings",
        "layers/{}/aggregate_norm": "backbone.layers.{}.norm",
        "layers/{}/aggregate/value": Tensor(f"{mixer}.in_proj", (2, E), (0,)),
        "layers/{}/aggregate/gate": Tensor(f"{mixer}.in_proj", (2, E), (1,)),
        "layers/{}/aggregate/conv": f"{mixer}.conv1d",
        "layers/{}/aggregate/conv/weight": causal_conv1d(f"{mixer}.conv1d", E, aggregate.conv),
        "layers/{}/aggregate/select": f"{mixer}.x_proj",
        "layers/{}/aggregate/dt": f"{mixer}.dt_proj",
        "layers/{}/aggregate/A_log": Raw(f"{mixer}.A_log", (E, N), lambda array: array.T),
        "layers/{}/aggregate/skip": Raw(f"{mixer}.D", (E,)),
        "layers/{}/aggregate/out": f"{mixer}.out_proj",
        "norm": "backbone.norm_f",
        "unembed": "lm_head",
    }


FAMILY = Family(
    model_types=("mamba",),
    config=config,
    tensors=tensors,
    prefix="backbone.",
    harmless={
        **HARMLESS,
        **dict.fromkeys(("use_associative_scan", "use_mambapy"), "says how the same recurrence is computed"),
    },
)
