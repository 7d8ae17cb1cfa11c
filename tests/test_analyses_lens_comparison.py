"""The comparison of lenses: exact at the last station, better than the logit lens where they are fitted, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import NotApplicable, lens_comparison
from jaxwalk.probes import Lens
from tests.test_analyses_geometry import holds, subject_of

NAMES = ("logit", "jacobian", "least_squares", "tuned")
FEW = {"paths": 16, "jacobians": 8, "steps": 60, "batch": 32}


def test_lens_comparison():
    subject = subject_of(unembed_bias=True)
    finding = lens_comparison.analyse(subject, **FEW)
    holds(finding, *(f"{what}_{name}" for what in ("kl", "agreement", "share") for name in NAMES))
    assert set(finding.interval) == set(finding.measured)
    assert {f"{name}.untrained" for name in finding.measured} <= set(finding.null)
    for name in NAMES:
        assert finding.arrays[f"kl_{name}"][-1] == pytest.approx(0, abs=1e-6)
        share = 1 - finding.measured[f"kl_{name}"] / finding.null[f"kl_{name}.one_law"]
        assert finding.measured[f"share_{name}"] == pytest.approx(share)

    # The logit lens, and the law for all contexts, by hand from the definition.
    rows = subject.paths(32)
    stations = jax.vmap(lambda row: subject.model.walk(row).stations)(rows)[:, :, 1:]
    law = lambda x: jax.nn.log_softmax(subject.model.logits(subject.model.context(x)))
    laws = np.asarray(jax.vmap(jax.vmap(jax.vmap(law)))(stations), float)  # [32, S, 7, V]
    final = laws[:, -1:]
    kl = (np.exp(final) * (final - laws)).sum(-1)[16:].mean((0, 2))
    np.testing.assert_allclose(finding.arrays["kl_logit"], kl, rtol=1e-4, atol=1e-6)
    mean = np.log(np.exp(final[:16, 0]).mean((0, 1)))
    one_law = (np.exp(final) * (final - mean)).sum(-1)[16:].mean()
    assert finding.null["kl_tuned.one_law"] == pytest.approx(one_law, rel=1e-4)

    # The fitted maps are kept, and read what the finding says.
    lens = Lens(*(jnp.asarray(finding.arrays[f"tuned_{what}"]) for what in ("weight", "bias")))
    read = np.asarray(jax.vmap(lambda x: jw.lens_log_probs(subject.model, lens, x))(stations[16:]), float)
    kl = (np.exp(final[16:]) * (final[16:] - read)).sum(-1).mean((0, 2))
    np.testing.assert_allclose(finding.arrays["kl_tuned"], kl, rtol=1e-3, atol=1e-5)


def test_batches_of_any_size(monkeypatch):
    subject = subject_of(untrained=False)
    whole = lens_comparison.analyse(subject, **FEW)
    monkeypatch.setattr(lens_comparison, "FLOATS", 3 * 8 * 5 * 16)
    parts = lens_comparison.analyse(subject, **FEW)
    for name, value in whole.measured.items():
        assert parts.measured[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_large_model_gets_only_the_lenses_that_cost_little():
    finding = lens_comparison.analyse(subject_of(), **FEW, work=1.0)
    holds(finding, "kl_logit", "kl_least_squares", "share_logit")
    for name in ("jacobian", "tuned"):
        assert f"kl_{name}" not in finding.measured
        assert "left out" in finding.conventions[name]
    assert "on 8 others" in finding.conventions["fitted"]


def test_what_it_makes_no_sense_for():
    with pytest.raises(NotApplicable, match="no layers"):
        lens_comparison.analyse(subject_of(depth=0, untrained=False))
    with pytest.raises(NotApplicable, match="one token"):
        lens_comparison.analyse(subject_of(max_length=1, untrained=False))
