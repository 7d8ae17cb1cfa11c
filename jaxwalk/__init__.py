"""jaxwalk: transformers as movement through embedding space, pure functions in JAX and Flax.

A `model` is a pytree, `tokens` is an integer array [T], and everything here is a pure function of
the two, written for one path and batched with `jax.vmap`. Names resolve on first use, so importing
the package, or asking a command line for its help, does not import jax.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # the same names for editors and type checkers, which do not run __getattr__
    from jaxwalk import (
        aggregates as aggregates,
        analyses as analyses,
        checkpoint as checkpoint,
        comparison as comparison,
        config as config,
        evidence as evidence,
        filters as filters,
        model as model,
        paths as paths,
        pretrained as pretrained,
        probes as probes,
        report as report,
        sharding as sharding,
        sweep as sweep,
        text as text,
        training as training,
        worlds as worlds,
    )
    from jaxwalk.config import (
        MLPConfig as MLPConfig,
        ModelConfig as ModelConfig,
        TextData as TextData,
        TrainConfig as TrainConfig,
        WorldData as WorldData,
    )
    from jaxwalk.evidence.finding import Finding as Finding
    from jaxwalk.model import (
        Layer as Layer,
        Layers as Layers,
        Transformer as Transformer,
        Walk as Walk,
        astype as astype,
        context_vector as context_vector,
        encoding_walk as encoding_walk,
        init as init,
        init_state as init_state,
        prefill as prefill,
        step as step,
    )
    from jaxwalk.paths import (
        Estimate as Estimate,
        Paths as Paths,
        Tilt as Tilt,
        event_probability as event_probability,
        next_log_probs as next_log_probs,
        path_entropy as path_entropy,
        path_log_prob as path_log_prob,
        prefix_tree as prefix_tree,
        sample_paths as sample_paths,
        top_paths as top_paths,
        visits as visits,
    )
    from jaxwalk.pretrained import export as export, load as load
    from jaxwalk.probes import (
        LOGIT_LENS as LOGIT_LENS,
        Attribution as Attribution,
        Decomposition as Decomposition,
        Lens as Lens,
        Spectrum as Spectrum,
        WalkStore as WalkStore,
        context_jvp as context_jvp,
        context_sensitivity as context_sensitivity,
        context_spectrum as context_spectrum,
        context_vjp as context_vjp,
        decompose as decompose,
        decompose_heads as decompose_heads,
        decompose_neurons as decompose_neurons,
        decompose_steps as decompose_steps,
        decompose_steps_by_token as decompose_steps_by_token,
        fisher_lengths as fisher_lengths,
        gradient_attribution as gradient_attribution,
        held_attribution as held_attribution,
        integrated_gradients as integrated_gradients,
        jacobian_lens as jacobian_lens,
        least_squares_lens as least_squares_lens,
        lens_log_probs as lens_log_probs,
        log_prob_readout as log_prob_readout,
        logit_readout as logit_readout,
        mixing_effects as mixing_effects,
        nudge_effects as nudge_effects,
        occlusion as occlusion,
        patch_effects as patch_effects,
        path_gradient as path_gradient,
        read_walks as read_walks,
        station_gradient as station_gradient,
        step_divergences as step_divergences,
        tuned_lens as tuned_lens,
        write_walks as write_walks,
    )

__all__ = [*_OWNER, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _OWNER:
        return getattr(importlib.import_module(_OWNER[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxwalk.{name}")
    raise AttributeError(f"module 'jaxwalk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
