"""Probes: gradients, influence maps, spectra, decompositions, attributions, lenses, interventions, stored walks."""

from jaxwalk.probes.attribution import (
    Attribution,
    gradient_attribution,
    held_attribution,
    integrated_gradients,
    occlusion,
)
from jaxwalk.probes.decomposition import (
    Decomposition,
    DecompositionError,
    Readout,
    decompose,
    decompose_heads,
    decompose_neurons,
    decompose_steps,
    decompose_steps_by_token,
    log_prob_readout,
    logit_readout,
)
from jaxwalk.probes.gradients import context_jvp, context_vjp, path_gradient, station_gradient
from jaxwalk.probes.influence import context_sensitivity
from jaxwalk.probes.interventions import mixing_effects, nudge_effects, patch_effects
from jaxwalk.probes.lenses import (
    LOGIT_LENS,
    Lens,
    Reading,
    fisher_lengths,
    jacobian_lens,
    least_squares_lens,
    lens_log_probs,
    step_divergences,
    tuned_lens,
)
from jaxwalk.probes.spectrum import Spectrum, context_spectrum
from jaxwalk.probes.walk_store import WalkStore, read_walks, write_walks

__all__ = [
    "LOGIT_LENS",
    "Attribution",
    "Decomposition",
    "DecompositionError",
    "Lens",
    "Reading",
    "Readout",
    "Spectrum",
    "WalkStore",
    "context_jvp",
    "context_sensitivity",
    "context_spectrum",
    "context_vjp",
    "decompose",
    "decompose_heads",
    "decompose_neurons",
    "decompose_steps",
    "decompose_steps_by_token",
    "fisher_lengths",
    "gradient_attribution",
    "held_attribution",
    "integrated_gradients",
    "jacobian_lens",
    "least_squares_lens",
    "lens_log_probs",
    "log_prob_readout",
    "logit_readout",
    "mixing_effects",
    "nudge_effects",
    "occlusion",
    "patch_effects",
    "path_gradient",
    "read_walks",
    "station_gradient",
    "step_divergences",
    "tuned_lens",
    "write_walks",
]
