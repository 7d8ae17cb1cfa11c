"""jaxwalk: transformers as movement through embedding space, pure functions in JAX and Flax.

A `model` is a pytree, `tokens` is an integer array [T], and everything here is a pure function of
the two, written for one path and batched with `jax.vmap`. Names resolve on first use, so importing
the package, or asking a command line for its help, does not import jax.
"""

import importlib
import importlib.metadata
from typing import Any

from jaxwalk._versions import refuse_faulty_jax

refuse_faulty_jax()

__version__ = "0.1.0"

# The one list of public names: name -> the room that owns it.
_ROOMS = {
    "jaxwalk.config": ("ModelConfig", "MLPConfig", "TrainConfig", "WorldData", "TextData"),
    "jaxwalk.model": (
        "Transformer",
        "Layer",
        "Layers",
        "Walk",
        "init",
        "astype",
        "encoding_walk",
        "context_vector",
        "init_state",
        "prefill",
        "step",
    ),
    "jaxwalk.paths": (
        "Paths",
        "Estimate",
        "Tilt",
        "next_log_probs",
        "path_log_prob",
        "sample_paths",
        "top_paths",
        "prefix_tree",
        "path_entropy",
        "event_probability",
        "visits",
    ),
    "jaxwalk.probes": (
        "path_gradient",
        "station_gradient",
        "context_sensitivity",
        "context_jvp",
        "context_vjp",
        "Spectrum",
        "context_spectrum",
        "Decomposition",
        "decompose",
        "decompose_steps",
        "decompose_steps_by_token",
        "decompose_heads",
        "decompose_neurons",
        "logit_readout",
        "log_prob_readout",
        "Lens",
        "LOGIT_LENS",
        "jacobian_lens",
        "least_squares_lens",
        "tuned_lens",
        "lens_log_probs",
        "fisher_lengths",
        "step_divergences",
        "patch_effects",
        "nudge_effects",
        "mixing_effects",
        "WalkStore",
        "write_walks",
        "read_walks",
        "Attribution",
        "held_attribution",
        "gradient_attribution",
        "integrated_gradients",
        "occlusion",
    ),
    "jaxwalk.pretrained": ("load", "export"),
    "jaxwalk.evidence.finding": ("Finding",),
}
_SUBMODULES = (
    "aggregates",
    "analyses",
    "checkpoint",
    "comparison",
    "config",
    "evidence",
    "filters",
    "model",
    "paths",
    "pretrained",
    "probes",
    "report",
    "sharding",
    "sweep",
    "text",
    "training",
    "worlds",
)
_OWNER = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [*_OWNER, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _OWNER:
        return getattr(importlib.import_module(_OWNER[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxwalk.{name}")
    raise AttributeError(f"module 'jaxwalk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
