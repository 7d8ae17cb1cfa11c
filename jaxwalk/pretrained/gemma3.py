"""Gemma 3 (arXiv 2503.19786), its text part: Gemma 2 with norms of queries and keys instead of caps on scores.

Layers with a window have rotary positions of their own. Of the models that read images too, the part that reads text.
"""

from collections.abc import Mapping
from typing import Any

from jaxwalk.config import ModelConfig
from jaxwalk.pretrained import gemma2, llama
from jaxwalk.pretrained._family import GGUF, Family, Keys
from jaxwalk.pretrained._rope import rope_of

# Published configs leave out what is as in transformers' Gemma3TextConfig.
_DEFAULTS = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def config(keys: Keys) -> ModelConfig:
    """Five layers with a window, then one without, unless `layer_types` or `sliding_window_pattern` says otherwise."""
    if keys("text_config", None) is not None:
        keys.open("text_config")
        keys.expect("final_logit_softcapping", None)  # transformers caps the logits of the text part alone only
    keys.given = {**_DEFAULTS, **keys.given}
    length, period = keys("max_position_embeddings"), keys("sliding_window_pattern", 6)
    written = dict(keys("rope_parameters", {}))
    if extra := written.keys() - {"full_attention", "sliding_attention"}:
        keys.problems.append(f"rope_parameters: expected full_attention and sliding_attention, got {sorted(extra)}")
    full = {"rope_theta": keys("rope_theta", None)}, keys("rope_scaling", {}), written.get("full_attention") or {}
    near = {"rope_theta": keys("rope_local_base_freq", None)}, written.get("sliding_attention") or {}
    everywhere, nearby = rope_of(keys, full, length, 1e6), rope_of(keys, near, length, 1e4)

    norms: dict[str, Any] = {"qk_norm": True, "qk_norm_eps": keys("rms_norm_eps", 1e-6), "qk_norm_unit_offset": True}
    choices = {**gemma2.choices(keys), **norms}
    windows = llama.windows(keys, keys.nullable("sliding_window", 4096), lambda layer: (layer + 1) % period != 0)
    aggregates = tuple(
        llama.heads(keys, everywhere if window is None else nearby, window=window, **choices) for window in windows
    )
    shorter = min(everywhere, nearby, key=lambda positions: positions.max_length)
    return gemma2.model(keys, shorter, aggregates, keys("final_logit_softcapping", None))


def from_gguf(keys: Keys, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of llama.cpp's metadata. Without a window in it, none slides."""
    window = keys("attention.sliding_window", None)
    near = {"rope_theta": keys("rope.freq_base_swa", 10000.0)}
    return {
        **gemma2.metadata(keys, tensors, largest=62),
        "rope_parameters": {"full_attention": llama.rope_metadata(keys, tensors, 1e6), "sliding_attention": near},
        "sliding_window": window,
        "sliding_window_pattern": 1 if window is None else keys("attention.sliding_window_pattern", 6),
        "final_logit_softcapping": keys("final_logit_softcapping", None),
    }


FAMILY = Family(
    model_types=("gemma3_text", "gemma3"),
    config=config,
    tensors=gemma2.tensors,
    prefix="model.",
    harmless={
        **gemma2.HARMLESS,
        "attn_logit_softcapping": "not used: the model has none, whatever this says",
        "_sliding_window_pattern": "layer_types says it",
        **dict.fromkeys(
            ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
            "describes images, which are no part of a path",
        ),
    },
    ignored={
        **llama.COMPUTED,
        r"^(model\.)?(vision_tower|multi_modal_projector)\.": "reads images, which are no part of a path",
    },
    renamed={r"^language_model\.(model\.|lm_head\.)": r"\1", r"^(model\.)?language_model\.": "model."},
    gguf=GGUF("gemma3", from_gguf, gemma2.undo, llama.ROPE_TENSORS),
)
