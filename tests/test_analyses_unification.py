"""One description for all aggregates: its forms agree in every family, and matrices that are fixed do not vary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.aggregates.lru import LRU
from jaxwalk.analyses import NotApplicable, Subject, unification
from tests.conftest import model_of, quick

MESS3 = jw.worlds.make("mess3")
CHOICES = {"vocab_size": 3, "max_length": 8}


def finding_of(*, untrained=False, paths=16, **choices):
    null = model_of(0.1, seed=7, **CHOICES, **choices) if untrained else None
    return unification.analyse(Subject(model_of(**CHOICES, **choices), untrained=null, world=MESS3), paths=paths)


@pytest.mark.parametrize("aggregate", quick({"gru"}, ["attention", "gru", "mamba", "rwkv7", "hyena", "retention"]))
def test_the_forms_of_every_family_agree(aggregate):
    finding = finding_of(aggregate=aggregate)
    assert [check.name for check in finding.checks if check.passed] == ["parallel_form", "recurrent_form"]
    assert 0 <= finding.measured["data_share"] <= finding.measured["largest_data_share"] <= 1.2
    assert finding.decision == "not testable here"  # by construction, so it supports nothing
    assert finding.claims == ("C7",)


def test_a_wrong_matrix_fails_the_check(monkeypatch):
    right = LRU.mixing_rows
    monkeypatch.setattr(LRU, "mixing_rows", lambda *args: 1.001 * right(*args))
    finding = unification.analyse(Subject(model_of(vocab_size=3, max_length=7, aggregate="lru"), world=MESS3), paths=8)
    assert [check.passed for check in finding.checks] == [False, True]


@pytest.mark.parametrize("aggregate", ["causal_mean", "fixed_mixing"])
def test_a_fixed_matrix_does_not_depend_on_the_data(aggregate):
    assert finding_of(aggregate=aggregate).measured["data_share"] == pytest.approx(0, abs=1e-9)


def test_the_share_by_hand():
    subject = Subject(model_of(**CHOICES), world=MESS3)
    finding = unification.analyse(subject, paths=12)
    record = jax.jit(lambda path: subject.model.walk(path, record_mixing=(0, 1)).mixing)
    fit, held_out = (
        [record(jnp.asarray(path)) for path in subject.draw(12, to_fit=to_fit).tokens] for to_fit in (True, False)
    )
    causal = np.tril(np.ones((8, 8), bool))
    for layer in (0, 1):
        mean = np.mean([A[layer] for A in fit], axis=0)[:, causal]
        entries = np.stack([A[layer] for A in held_out])[:, :, causal]
        share = np.sum((entries - mean) ** 2) / np.sum((entries - mean.mean()) ** 2)
        assert finding.arrays["data_share_model"][layer] == pytest.approx(share, rel=1e-4)
    assert finding.measured["data_share"] == pytest.approx(finding.arrays["data_share_model"].mean())


def test_layers_of_several_kinds_beside_the_untrained_model():
    finding = finding_of(aggregate=("causal_mean", "attention"), untrained=True)
    np.testing.assert_allclose(finding.arrays["data_share_model"][0], 0, atol=1e-9)
    assert finding.arrays["data_share_model"][1] > 0
    assert finding.measured["largest_data_share"] == pytest.approx(2 * finding.measured["data_share"])
    assert {"fixed_A", "untrained"} <= set(finding.null)
    low, high = finding.interval["data_share"]
    assert low < finding.measured["data_share"] < high


def test_what_it_makes_no_sense_for():
    with pytest.raises(NotApplicable, match="mixing matrix"):
        finding_of(depth=0)
