"""What analyses say of models that have learned nothing: "supported" in at most one primary contrast of twenty."""

import dataclasses
import functools

import jax
import pytest

import jaxwalk as jw
from jaxwalk import sweep
from jaxwalk.analyses import Subject, run
from jaxwalk.config import OptimConfig, TrainConfig, WorldData
from jaxwalk.model import init, plain

pytestmark = pytest.mark.slow

SEEDS = 20
CONFIG = jw.ModelConfig(vocab_size=3, max_length=12, width=16, depth=3)
QUICK: dict[str, dict] = {
    "association": {"paths": 64, "per_layer": 8},
    "belief_geometry": {"paths": 256, "points": 27},
    "cloud": {"paths": 128},
    "decomposition": {"paths": 16, "length": 8},
    "encoding_walk": {"paths": 64},
    "extrapolation": {"paths": 320},
    "lens_comparison": {"paths": 32, "jacobians": 8, "steps": 60, "batch": 64},
    "narrowing": {"paths": 64, "contexts": 16},
    "organisation": {"paths": 64, "steps": 0},
    "path_law": {"paths": 128, "enumerated": 100, "samples": 500},
    "proximity": {"paths": 64},
    "unification": {"paths": 32},
}
"""Options that make each analysis quick."""
SKIPPED = ("prompt", "training_walk", "co_occurrence", "concept_space")
"""Analyses without primary contrasts, or without anything to measure on a world of three tokens."""


@functools.cache
def fresh(seed):
    return plain(init(CONFIG, jax.random.key(seed)))


def supported(subjects):
    """The share of primary contrasts that are supported, and which."""
    names = [name for name in jw.analyses.names() if name not in SKIPPED]
    options = {name: QUICK[name] for name in names if name in QUICK}
    decisions = []
    for subject in subjects:
        findings, _ = run(subject, names, options=options)
        decisions += [(f.name, c.quantity, c.null, c.decision) for f in findings for c in f.primary]
    wrong = [decision[:3] for decision in decisions if decision[3] == "supported"]
    assert len(decisions) > 10 * len(subjects)
    return len(wrong) / len(decisions), sorted(set(wrong))


@functools.cache
def trained(world, **params):
    """SEEDS models that were trained together on a world, and their untrained selves."""
    config = TrainConfig(
        name="null",
        data=WorldData(world, params),
        model=CONFIG,
        optim=OptimConfig(lr=3e-3, warmup=20),
        batch_size=32,
        steps=200,
        steps_per_call=20,
        eval_every=200,
        eval_batches=1,
    )
    ends, starts = (
        sweep.train(dataclasses.replace(config, **changes), seeds=range(SEEDS))
        for changes in ({}, {"optim": dataclasses.replace(config.optim, lr=0.0), "steps": 20})
    )
    return [(plain(ends.member(i)), plain(starts.member(i))) for i in range(SEEDS)]


def test_untrained_models_support_nothing():
    world = jw.worlds.mess3()
    share, which = supported(
        [Subject(fresh(seed), untrained=fresh(100 + seed), world=world, seed=seed) for seed in range(SEEDS)]
    )
    assert share <= 0.05, which


def test_models_of_independent_tokens_support_nothing():
    """One hidden state: no token says anything of another."""
    params = {"vocab_size": 3, "num_states": 1}
    world = jw.worlds.random_hmm(**params)
    share, which = supported(
        [
            Subject(model, untrained=start, world=world, seed=seed)
            for seed, (model, start) in enumerate(trained("random_hmm", **params))
        ]
    )
    assert share <= 0.05, which


def test_models_on_data_that_they_have_not_learned_support_nothing():
    """Trained on Mess3, and held against another world with each seed: what was learned is of no use there."""
    share, which = supported(
        [
            Subject(model, untrained=start, world=jw.worlds.random_hmm(vocab_size=3, seed=seed), seed=seed)
            for seed, (model, start) in enumerate(trained("mess3"))
        ]
    )
    assert share <= 0.05, which
