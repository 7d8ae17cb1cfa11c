"""Every kind of aggregate is analysed as attention is: no analysis breaks on one, or leaves it out."""

import dataclasses
import io

import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk import training
from jaxwalk.config import WorldData
from tests.test_training import small

FAMILIES = ("mamba", "lru", "gru", "hyena", "rwkv7,attention")
ONLY = ("path_law", "encoding_walk", "association", "proximity", "prompt")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_asked_of_attention_is_asked_of_all(family, tmp_path):
    config = small()
    aggregates = tuple(jw.aggregates.config(name) for name in family.split(","))
    model = dataclasses.replace(config.model, vocab_size=3, aggregate=aggregates, depth=len(aggregates))
    config = dataclasses.replace(config, data=WorldData("mess3"), model=model)
    training.train(config, tmp_path / "run", out=io.StringIO())
    subject = jw.analyses.open_subject(tmp_path / "run", prompt="A B A")

    def failed(name: str, error: Exception) -> None:
        raise AssertionError(name) from error

    findings, skipped = jw.analyses.run(subject, ONLY, lambda name: None, failed, {})
    assert [finding.name for finding in findings] == list(ONLY)
    assert not skipped
    measured = {finding.name: finding.measured for finding in findings}
    assert all(np.isfinite(value) for value in measured["association"].values())
    # Whatever the family, the probabilities of all paths sum to one, and the parts of a context vector to the whole.
    assert measured["path_law"]["total_mass"] == pytest.approx(1, abs=1e-4)
    assert jw.decompose(subject.model, subject.prompt).error < 1e-5
