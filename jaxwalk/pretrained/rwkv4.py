"""RWKV-4 (Peng et al., arXiv 2305.13048), as transformers writes it: RWKV/rwkv-4-169m-pile and alike.

A block is two layers without filters, time-mixing and channel-mixing, as both look back. There is no GGUF: llama.cpp
has later versions of RWKV alone.

So that float16 does not overflow, transformers halves the stream after every `rescale_every` blocks when it runs, not
when it trains, and the matrices that write to it likewise. All that reads the stream is behind a LayerNorm, which takes
the halving out again, but for its epsilon, which weighs 4 times as much after each. Here, as in training, the stream is
as it is: laws differ from those of transformers by what that epsilon does, and stations by powers of 2.
"""

from typing import Any

from jaxwalk.aggregates import rwkv4, rwkv4_channel_mix
from jaxwalk.config import ModelConfig
from jaxwalk.pretrained._family import Family, Keys, Raw, Tensors


def config(keys: Keys) -> ModelConfig:
    """Time-mixing and channel-mixing, of normed token vectors."""
    # Whatever this key says, the final norm has 1e-5 in transformers.
    keys.expect("layer_norm_epsilon", 1e-5)
    width = keys("hidden_size")
    keys.expect("attention_hidden_size", width)
    return ModelConfig(
        vocab_size=keys("vocab_size"),
        max_length=keys("context_length", 1024),
        width=width,
        depth=2 * keys("num_hidden_layers"),
        aggregate=(rwkv4.Config(), rwkv4_channel_mix.Config(keys("intermediate_size", None))),
        filter=None,
        positions="none",
        embed_norm=True,
        tied=keys("tie_word_embeddings", False),
    )


def tensors(config: ModelConfig) -> Tensors:
    """Layer 2i is the time-mixing of block i, layer 2i + 1 its channel-mixing."""
    vector = (1, 1, config.width)

    def shares(mixing: str, *names: str) -> tuple[Raw, ...]:
        return tuple(Raw(f"{mixing}.time_mix_{name}", vector, lambda array: array[0]) for name in names)

    found: dict[str, Any] = {
        "embed": "rwkv.embeddings",
        "embed/norm": "rwkv.blocks.0.pre_ln",
        "norm": "rwkv.ln_out",
        "unembed": "head",
    }
    for number in range(config.depth // 2):
        block, layer = f"rwkv.blocks.{number}", f"layers/{2 * number}"
        mixing = f"{block}.attention"
        found |= {
            f"{layer}/aggregate_norm": f"{block}.ln1",
            f"{layer}/aggregate/shares": shares(mixing, "receptance", "key", "value"),
            f"{layer}/aggregate/receptance": f"{mixing}.receptance",
            f"{layer}/aggregate/key": f"{mixing}.key",
            f"{layer}/aggregate/value": f"{mixing}.value",
            f"{layer}/aggregate/log_rate": Raw(f"{mixing}.time_decay", vector[2:]),
            f"{layer}/aggregate/bonus": Raw(f"{mixing}.time_first", vector[2:]),
            f"{layer}/aggregate/out": f"{mixing}.output",
        }
        layer, mixing = f"layers/{2 * number + 1}", f"{block}.feed_forward"
        found |= {
            f"{layer}/aggregate_norm": f"{block}.ln2",
            f"{layer}/aggregate/shares": shares(mixing, "receptance", "key"),
            f"{layer}/aggregate/receptance": f"{mixing}.receptance",
            f"{layer}/aggregate/up": f"{mixing}.key",
            f"{layer}/aggregate/down": f"{mixing}.value",
        }
    return found


FAMILY = Family(
    model_types=("rwkv",),
    config=config,
    tensors=tensors,
    prefix="rwkv.",
    harmless={"rescale_every": "the same function but for an epsilon, as said above"},
)
