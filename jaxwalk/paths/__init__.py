"""Paths through embedding space: their probabilities, sampling, exact search, entropies and events.

Every function takes a single path or prompt; batch with `jax.vmap`. Logarithms are natural, so log-probabilities and
entropies are in nats.
"""

from jaxwalk.paths.estimates import (
    ENUMERABLE,
    Estimate,
    continuations,
    enumerated_log_probs,
    event_probability,
    path_entropy,
    visits,
)
from jaxwalk.paths.law import (
    entropy,
    expectation,
    next_log_probs,
    path_log_prob,
    scored_steps,
    step_log_probs,
)
from jaxwalk.paths.sampling import Paths, Proposal, Tilt, altered_law, sample_paths
from jaxwalk.paths.search import top_paths
from jaxwalk.paths.tree import PrefixTree, prefix_tree

__all__ = [
    "ENUMERABLE",
    "Estimate",
    "Paths",
    "PrefixTree",
    "Proposal",
    "Tilt",
    "altered_law",
    "continuations",
    "entropy",
    "enumerated_log_probs",
    "event_probability",
    "expectation",
    "next_log_probs",
    "path_entropy",
    "path_log_prob",
    "prefix_tree",
    "sample_paths",
    "scored_steps",
    "step_log_probs",
    "top_paths",
    "visits",
]
