"""What contexts are made of, by models whose parts are known, and by the decomposition's own laws."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import NotApplicable, decomposition
from tests.conftest import model_of, supported_when_untrained
from tests.test_analyses_geometry import MESS3, holds, subject_of

SMALL = {"paths": 10, "length": 6}


def test_decomposition():
    subject = subject_of()
    finding = decomposition.analyse(subject, **SMALL)
    by_source = [f"share_{name}" for name in decomposition.SHARES]
    by_step = [f"share_{name}" for name in decomposition.STEPS]
    holds(finding, *by_source, *by_step, "cancellation", "occlusion_spearman")
    assert set(finding.measured) == set(finding.interval)
    assert all(f"{name}.untrained" in finding.null for name in (*by_source, *by_step))
    for cut in (by_source, by_step):
        assert sum(finding.measured[name] for name in cut) == pytest.approx(1, abs=1e-5)
        assert sum(finding.null[f"{name}.untrained"] for name in cut) == pytest.approx(1, abs=1e-5)
    assert finding.measured["cancellation"] >= 1
    assert finding.checks[0].name == "largest_error"
    assert finding.checks[0].passed
    assert finding.arrays["share"].sum() == pytest.approx(
        finding.measured["share_own_token"] + finding.measured["share_earlier_tokens"], abs=1e-5
    )
    assert [f.name for f in finding.figures] == ["decomposition_by_token", "decomposition_by_step"]

    # Occlusion by hand: the token's vector in place of another's.
    model, row = subject.model, finding.arrays["rows"][0]
    path, after = row[:-1], row[-1]
    vectors = np.asarray(model.token_vectors)
    log_p = lambda x: jw.path_log_prob(model, row, given=len(path), vectors=jnp.asarray([*x, vectors[after]]))
    fell = []
    for j in range(len(path)):
        x = vectors[path]
        x[j] = vectors.mean(0)
        fell.append(float(log_p(vectors[path]) - log_p(x)))
    np.testing.assert_allclose(finding.arrays["occluded"][0], fell, atol=1e-5)


def test_without_mixing_a_context_comes_from_its_own_token_alone():
    subject = subject_of(aggregate="identity", positions="none", norm="rms_norm")
    finding = decomposition.analyse(subject, **SMALL)
    assert finding.measured["share_earlier_tokens"] == 0
    assert finding.measured["share_positions"] == 0
    np.testing.assert_array_equal(finding.arrays["occluded"][:, :-1], 0)
    only = subject_of(aggregate="identity", positions="none", norm="rms_norm", filter=None, untrained=False)
    finding = decomposition.analyse(only, **SMALL)
    assert finding.measured["share_filters"] == 0
    assert finding.measured["share_own_token"] + finding.measured["share_biases"] == pytest.approx(1, abs=1e-6)
    assert not any(name.endswith("untrained") for name in finding.null)


def test_equal_mixing_without_positions_gives_equal_tokens_equal_parts():
    subject = subject_of(aggregate="causal_mean", positions="none", depth=1, untrained=False)
    finding = decomposition.analyse(subject, **SMALL)
    for row, held in zip(finding.arrays["rows"], finding.arrays["held"], strict=True):
        for token in set(row[:-2].tolist()):  # the last one is the context's own, which the stream has too
            same = held[:-1][row[:-2] == token]
            np.testing.assert_allclose(same, same[0], atol=1e-6)


def test_parts_decide_by_the_better_guess():
    # In one layer of a fixed mean without filter the parts say what a token does; a trained model's need not.
    subject = subject_of(aggregate="causal_mean", positions="none", depth=1, norm="rms_norm", filter=None)
    finding = decomposition.analyse(subject, paths=64, length=6)
    (contrast,) = finding.primary
    assert contrast.reference == max(finding.null["gradient_times_input"], finding.null["recency"])
    assert contrast.units == 64
    assert finding.decision != "not testable here"


@pytest.mark.slow
def test_untrained_models_support_nothing():
    assert supported_when_untrained(decomposition.analyse, MESS3, paths=64) <= 0.05


def test_what_it_makes_no_sense_for():
    with pytest.raises(NotApplicable, match="no layers"):
        decomposition.analyse(subject_of(depth=0))
    with pytest.raises(NotApplicable, match="two tokens"):
        decomposition.analyse(subject_of(max_length=1))
    with pytest.raises(NotApplicable, match="it needs the data"):
        decomposition.analyse(dataclasses.replace(subject_of(), world=None))
    broken = dataclasses.replace(subject_of(untrained=False), model=model_of(np.nan, vocab_size=3, max_length=8))
    with pytest.raises(NotApplicable, match="NaN"):
        decomposition.analyse(broken, **SMALL)
