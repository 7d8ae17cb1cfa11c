"""OPT (Zhang et al., arXiv 2205.01068), and Galactica (Taylor et al., arXiv 2211.09085), which is stored as one.

OPT-350m is not loaded: its token vectors are narrower than its stream, and maps between the two surround the layers.
"""

from jaxwalk.aggregates import attention
from jaxwalk.config import MLPConfig, ModelConfig
from jaxwalk.pretrained._family import Family, Keys, Tensor, Tensors
from jaxwalk.pretrained.gpt2 import ACTIVATIONS

OFFSET = 2  # rows of the table of positions before that of position 0


def config(keys: Keys) -> ModelConfig:
    """Pre- or post-norm layers of attention and MLPs, and a table of positions that begins at its third row."""
    width = keys("hidden_size")
    keys.expect("word_embed_proj_dim", width)
    keys.expect("_remove_final_layer_norm", False)
    keys.expect("learned_embeddings", True)
    keys.expect("scale_embeddings", False)
    bias, affine = keys("enable_bias", True), keys("layer_norm_elementwise_affine", True)
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=keys("max_position_embeddings"),
        width=width,
        depth=keys("num_hidden_layers"),
        aggregate=attention.Config(heads=keys("num_attention_heads"), bias=bias),
        filter=MLPConfig(keys("ffn_dim"), keys.choose("activation_function", ACTIVATIONS, "relu"), bias=bias),
        placement="pre" if keys("do_layer_norm_before", True) else "post",
        norm_bias=affine,
        norm_scale=affine,
        position_offset=OFFSET,
        tied=keys("tie_word_embeddings", True),
    )


def tensors(config: ModelConfig) -> Tensors:
    """Queries, keys and values apart. A layer's second norm has the name of the model's final one."""
    layer = "model.decoder.layers.{}"
    return {
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "layers/{}/aggregate_norm": f"{layer}.self_attn_layer_norm",
        "layers/{}/aggregate/qkv": tuple(Tensor(f"{layer}.self_attn.{part}_proj", (config.width,)) for part in "qkv"),
        "layers/{}/aggregate/out": f"{layer}.self_attn.out_proj",
        "layers/{}/filter_norm": f"{layer}.final_layer_norm",
        "layers/{}/filter/up": f"{layer}.fc1",
        "layers/{}/filter/down": f"{layer}.fc2",
        "norm": "model.decoder.final_layer_norm",
        "unembed": "lm_head",
    }


FAMILY = Family(
    model_types=("opt",),
    config=config,
    tensors=tensors,
    prefix="model.",
    harmless={
        **dict.fromkeys(("dropout", "activation_dropout", "layerdrop"), "acts in training only"),
        "init_std": "acts before training only",
    },
)
