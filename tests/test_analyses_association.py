"""The ladder of mixing matrices: by hand, and by models whose patterns are known to be fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwalk.analyses import NotApplicable, association
from jaxwalk.paths import step_log_probs
from tests.conftest import model_of
from tests.test_analyses_geometry import MESS3, holds, subject_of

COSTS = [f"cost_{name}" for name in association.RUNGS]


def test_association():
    finding = association.analyse(subject_of(), paths=24, per_layer=16)
    holds(finding, "association_bias", "fixed_share", "loss", "largest_layer_cost", *COSTS)
    assert set(finding.interval) == set(finding.measured)
    assert {f"{name}.untrained" for name in COSTS} <= set(finding.null)
    bias, share = (finding.measured[name] for name in ("association_bias", "fixed_share"))
    assert bias + share == pytest.approx(1)
    best = finding.conventions["fixed_A"].split(",")[0]
    assert bias == pytest.approx(finding.measured[f"cost_{best}"] / finding.measured["cost_identity"])
    assert [f.name for f in finding.figures] == ["ladder", "layers"]


def test_the_rungs_by_hand():
    subject = subject_of(untrained=False)
    model, n = subject.model, 12
    finding = association.analyse(subject, paths=n, per_layer=8)
    rows = np.asarray(MESS3.sample(jax.random.fold_in(jax.random.key(0), 0x5EED), 2 * n, 9))
    record = jax.jit(lambda model, tokens: model.walk(tokens, record_mixing=(0, 1)).mixing)
    patterns = [record(model, row[:-1]) for row in rows]
    eye, mean = np.eye(8), np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None]
    shared = {
        "identity": {layer: np.stack([eye] * 4) for layer in (0, 1)},
        "causal_mean": {layer: np.stack([mean] * 4) for layer in (0, 1)},
        "corpus_mean": {layer: np.mean([A[layer] for A in patterns[:n]], axis=0) for layer in (0, 1)},
    }

    # The mixing of a path is over its N positions, of which the last is not walked.
    padded = lambda A: jnp.pad(jnp.asarray(A, jnp.float32), ((0, 0), (0, 1), (0, 1)))

    steps = jax.jit(lambda model, row, mixing: step_log_probs(model, row, mixing=mixing))

    def loss(row, mixing):
        return float(-steps(model, row, {n: padded(A) for n, A in mixing.items()}).mean())

    own = np.array([loss(row, {}) for row in rows[n:]])
    for name, A in shared.items():
        expected = np.mean([loss(row, A) for row in rows[n:]]) - own.mean()
        assert finding.measured[f"cost_{name}"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        for layer in (0, 1):
            alone = np.mean([loss(row, {layer: A[layer]}) for row in rows[n : n + 8]]) - own[:8].mean()
            row = list(association.RUNGS).index(name)
            assert finding.arrays["layer_cost"][row, layer] == pytest.approx(alone, rel=1e-3, abs=1e-5)
    lent = np.mean([loss(rows[i], patterns[i - 1]) for i in range(n, 2 * n)]) - own.mean()
    assert finding.measured["cost_other_path"] == pytest.approx(lent, rel=1e-3, abs=1e-5)
    assert finding.measured["loss"] == pytest.approx(own.mean(), rel=1e-5)


@pytest.mark.parametrize("aggregate", ["causal_mean", "fixed_mixing"])
def test_a_model_with_fixed_patterns_loses_nothing_by_another_paths(aggregate):
    finding = association.analyse(subject_of(aggregate=aggregate, untrained=False), paths=16, per_layer=8)
    for name in ("cost_corpus_mean", "cost_other_path", "layers_alone_corpus_mean"):
        if name in finding.measured:
            assert finding.measured[name] == pytest.approx(0, abs=1e-5)
    assert abs(finding.measured["cost_identity"]) > 1e-3


def test_a_causal_mean_has_no_association_bias():
    finding = association.analyse(subject_of(aggregate="causal_mean", untrained=False), paths=128, per_layer=8)
    assert finding.measured["association_bias"] == pytest.approx(0, abs=1e-4)
    assert finding.measured["fixed_share"] == pytest.approx(1, abs=1e-4)
    # Equal weights in any order are the same.
    assert finding.measured["cost_shuffled_keys"] == pytest.approx(0, abs=1e-5)
    assert finding.measured["cost_causal_mean"] == pytest.approx(0, abs=1e-5)


def test_a_model_that_does_not_mix_has_no_ratio():
    finding = association.analyse(subject_of(aggregate="identity", untrained=False), paths=16, per_layer=8)
    holds(finding, "cost_identity")
    assert "association_bias" not in finding.measured
    assert "undefined" in finding.verdict
    assert finding.measured["cost_identity"] == pytest.approx(0, abs=1e-6)


def test_layers_of_different_kinds_and_batches_of_any_size(monkeypatch):
    subject = subject_of(aggregate=("causal_mean", "attention"), untrained=False)
    whole = association.analyse(subject, paths=16, per_layer=10)
    monkeypatch.setattr(association, "FLOATS", 2500)
    parts = association.analyse(subject, paths=16, per_layer=10)
    for name in whole.measured:
        if "shuffled" not in name:  # whose orders are drawn batch by batch
            assert parts.measured[name] == pytest.approx(whole.measured[name], rel=1e-3, abs=1e-5), name
    rows = [list(association.RUNGS).index(name) for name in association.RUNGS if name != "shuffled_keys"]
    np.testing.assert_allclose(parts.arrays["layer_cost"][rows], whole.arrays["layer_cost"][rows], 1e-3, 1e-5)


def test_single_layers_of_a_large_model(monkeypatch):
    subject = subject_of(untrained=False)
    whole = association.analyse(subject, paths=24, per_layer=8)
    monkeypatch.setattr(association, "WORK", 1.0)
    some = association.analyse(subject, paths=24, per_layer=16)
    best = some.conventions["fixed_A"].split(",")[0]
    assert some.arrays["layer_rung"].tolist() == [association.RUNGS[name] for name in ("identity", best)]
    for name in (*COSTS, "largest_layer_cost", "layers_alone_identity"):
        assert some.measured[name] == pytest.approx(whole.measured[name], rel=1e-5, abs=1e-7)


def test_what_it_makes_no_sense_for():
    with pytest.raises(NotApplicable, match="no layers"):
        association.analyse(subject_of(depth=0, untrained=False))
    with pytest.raises(NotApplicable, match="at least 8 paths"):
        association.analyse(subject_of(untrained=False), paths=4)
    with pytest.raises(NotApplicable, match="two tokens"):
        association.analyse(subject_of(untrained=False, max_length=1))


def test_without_mixing_a_context_is_its_own_token_alone():
    model = model_of(vocab_size=3, max_length=8, positions="none")
    eye = {layer: lambda A: jnp.broadcast_to(jnp.eye(A.shape[-1]), A.shape) for layer in (0, 1)}
    contexts = model.walk(jnp.array([0, 1, 2, 1, 0, 0, 2]), mixing=eye).context
    np.testing.assert_allclose(contexts[1], contexts[3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(contexts[0], contexts[4], rtol=1e-5, atol=1e-6)
