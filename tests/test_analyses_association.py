"""The ladder of mixing matrices: by hand, and by models whose patterns are known to be fixed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwalk.analyses import NotApplicable, Subject, association
from jaxwalk.evidence.finding import decide
from jaxwalk.paths import next_log_probs, step_log_probs
from tests.conftest import model_of
from tests.test_analyses_geometry import MESS3, subject_of

COSTS = [f"cost_{name}" for name in association.RUNGS]


def test_association():
    finding = association.analyse(subject_of(), paths=24, per_layer=16)
    json.dumps(finding.to_dict(), allow_nan=False)
    assert {"loss", "largest_layer_cost", *COSTS} <= set(finding.measured) == set(finding.interval)
    for name, (low, high) in finding.interval.items():
        assert low <= finding.measured[name] <= high, name
    assert {f"{name}.untrained" for name in COSTS} <= set(finding.null)
    assert [f.name for f in finding.figures] == ["ladder", "layers"]


def test_the_rungs_by_hand():
    subject = subject_of(untrained=False)
    model, n = subject.model, 12
    finding = association.analyse(subject, paths=n, per_layer=8)
    rows, others = (np.asarray(subject.draw(n, 9, to_fit=fit).tokens) for fit in (False, True))
    record = jax.jit(lambda model, tokens: model.walk(tokens, record_mixing=(0, 1)).mixing)
    patterns, fitted = ([record(model, row[:-1]) for row in each] for each in (rows, others))
    eye, mean = np.eye(8), np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None]
    shared = {
        "identity": {layer: np.stack([eye] * 4) for layer in (0, 1)},
        "causal_mean": {layer: np.stack([mean] * 4) for layer in (0, 1)},
        "corpus_mean": {layer: np.mean([A[layer] for A in fitted], axis=0) for layer in (0, 1)},
    }

    # The mixing of a path is over its N positions, of which the last is not walked.
    padded = lambda A: jnp.pad(jnp.asarray(A, jnp.float32), ((0, 0), (0, 1), (0, 1)))

    steps = jax.jit(lambda model, row, mixing: step_log_probs(model, row, mixing=mixing))

    def loss(row, mixing):
        return float(-steps(model, row, {n: padded(A) for n, A in mixing.items()}).mean())

    own = np.array([loss(row, {}) for row in rows])
    best = finding.conventions["best_fixed"].split(",")[0]
    for name, A in shared.items():
        expected = np.mean([loss(row, A) for row in rows]) - own.mean()
        assert finding.measured[f"cost_{name}"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        if name in ("identity", best):
            alone = [np.mean([loss(row, {layer: A[layer]}) for row in rows[:8]]) - own[:8].mean() for layer in (0, 1)]
            row = finding.arrays["layer_rung"].tolist().index(association.RUNGS[name])
            np.testing.assert_allclose(finding.arrays["layer_cost"][row], alone, rtol=1e-3, atol=1e-5)
    lent = np.mean([loss(rows[i], patterns[i - 1]) for i in range(n)]) - own.mean()
    assert finding.measured["cost_other_path"] == pytest.approx(lent, rel=1e-3, abs=1e-5)
    assert finding.measured["loss"] == pytest.approx(own.mean(), rel=1e-5)
    assert finding.measured["largest_layer_cost"] == pytest.approx(finding.arrays["layer_cost"][1].max())


@pytest.mark.parametrize("aggregate", ["causal_mean", "fixed_mixing"])
def test_a_model_with_fixed_patterns_loses_nothing_by_another_paths(aggregate):
    finding = association.analyse(subject_of(aggregate=aggregate, untrained=False), paths=16, per_layer=8)
    for name in ("cost_corpus_mean", "cost_other_path", "layers_alone_corpus_mean"):
        if name in finding.measured:
            assert finding.measured[name] == pytest.approx(0, abs=1e-5)
    assert abs(finding.measured["cost_identity"]) > 1e-3
    assert finding.decision != "supported"


def test_a_causal_mean_has_no_association_bias():
    finding = association.analyse(subject_of(aggregate="causal_mean", untrained=False), paths=128, per_layer=8)
    # Equal weights in any order are the same.
    assert finding.measured["cost_shuffled_keys"] == pytest.approx(0, abs=1e-5)
    assert finding.measured["cost_causal_mean"] == pytest.approx(0, abs=1e-5)
    if finding.measured["cost_identity"] > association.COST:
        assert finding.measured["association_bias"] == pytest.approx(0, abs=1e-4)


class OwnLaw:
    """A world whose law is that of a model, so that no other law predicts it better."""

    name, params = "own law", {}

    def __init__(self, model):
        self.model, self.vocab_size = model, model.vocab_size

    def sample(self, key, n, length):
        tokens = jax.random.randint(key, (n, length), 0, self.vocab_size)
        for t in range(1, length):
            laws = jax.vmap(next_log_probs, (None, 0))(self.model, tokens[:, :-1])[:, t - 1]
            tokens = tokens.at[:, t].set(jax.random.categorical(jax.random.fold_in(key, t), laws))
        return tokens


@pytest.mark.parametrize(("aggregate", "decision"), [("attention", "supported"), ("causal_mean", "contradicted")])
def test_the_bias_is_supported_where_a_depends_on_the_path(aggregate, decision):
    model = model_of(0.8, vocab_size=3, max_length=8, aggregate=aggregate)
    subject = Subject(model, untrained=model_of(0.2, vocab_size=3, max_length=8), world=OwnLaw(model))
    finding = association.analyse(subject, paths=256, per_layer=8)
    assert finding.decision == decision
    assert ("association_bias" in finding.measured) == (finding.measured["cost_identity"] > association.COST)
    if decision == "supported":
        assert finding.interval["association_bias"][0] > 0
    else:
        assert finding.measured.get("association_bias", 0) == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_untrained_models_support_no_bias():
    decisions = []
    for seed in range(20):
        model, untrained = (model_of(0.4, seed=100 * k + seed, vocab_size=3, max_length=8) for k in (1, 2))
        subject = Subject(model, untrained=untrained, world=MESS3, seed=seed)
        decisions.append(decide([association.analyse(subject, paths=32, per_layer=8)])[0].decision)
    assert decisions.count("supported") <= 1


def test_a_model_that_does_not_mix_has_no_ratio():
    finding = association.analyse(subject_of(aggregate="identity", untrained=False), paths=16, per_layer=8)
    assert "association_bias" not in finding.measured
    assert "undefined" in finding.conventions["association_bias"]
    assert finding.measured["cost_identity"] == pytest.approx(0, abs=1e-6)


def test_replacements_have_the_scale_of_the_patterns_they_replace():
    model = subject_of(aggregate="linear_mixer").model
    rows = np.asarray(MESS3.sample(jax.random.key(0), 12, 9), np.int32)
    ladder = association._Ladder(model, rows, rows, 0)
    for layers in zip(*ladder.patterns.values(), strict=True):
        for A in layers:
            np.testing.assert_allclose(A.sum(-1), layers[0].sum(-1), rtol=1e-4, atol=1e-5)
    assert np.abs(ladder.patterns["identity"][0].sum(-1) - 1).max() > 0.1


def test_a_fixed_pattern_takes_no_past_away_from_conditional_values():
    finding = association.analyse(subject_of(aggregate="gru", untrained=False), paths=16, per_layer=8)
    assert finding.decision == "not testable here"
    assert "values" in finding.primary[0].reason
    assert "association_bias" not in finding.measured


def test_layers_of_different_kinds_and_batches_of_any_size(monkeypatch):
    subject = subject_of(aggregate=("causal_mean", "attention"), untrained=False)
    whole = association.analyse(subject, paths=16, per_layer=10)
    monkeypatch.setattr(association, "FLOATS", 2500)
    parts = association.analyse(subject, paths=16, per_layer=10)
    for name in whole.measured:
        assert parts.measured[name] == pytest.approx(whole.measured[name], rel=1e-3, abs=1e-5), name
    np.testing.assert_allclose(parts.arrays["layer_cost"], whole.arrays["layer_cost"], 1e-3, 1e-5)


def test_single_layers_of_a_large_model(monkeypatch):
    subject = subject_of(untrained=False)
    whole = association.analyse(subject, paths=24, per_layer=8)
    monkeypatch.setattr(association, "WORK", 1.0)
    some = association.analyse(subject, paths=24)
    for name in (*COSTS, "largest_layer_cost", "layers_alone_identity"):
        assert some.measured[name] == pytest.approx(whole.measured[name], rel=1e-5, abs=1e-7)


def test_what_it_makes_no_sense_for(monkeypatch):
    with pytest.raises(NotApplicable, match="no layers"):
        association.analyse(subject_of(depth=0, untrained=False))
    with pytest.raises(NotApplicable, match="at least 8 paths"):
        association.analyse(subject_of(untrained=False), paths=4)
    with pytest.raises(NotApplicable, match="two tokens"):
        association.analyse(subject_of(untrained=False, max_length=1))
    monkeypatch.setattr(type(subject_of().model.layers[0].aggregate), "kind", "none")
    with pytest.raises(NotApplicable, match="no matrix that could be replaced"):
        association.analyse(subject_of(untrained=False))


def test_without_mixing_a_context_is_its_own_token_alone():
    model = model_of(vocab_size=3, max_length=8, positions="none")
    eye = {layer: lambda A: jnp.broadcast_to(jnp.eye(A.shape[-1]), A.shape) for layer in (0, 1)}
    contexts = model.walk(jnp.array([0, 1, 2, 1, 0, 0, 2]), mixing=eye).context
    np.testing.assert_allclose(contexts[1], contexts[3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(contexts[0], contexts[4], rtol=1e-5, atol=1e-6)
