"""The examples run, at tiny size, and what they compute is what they say."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.config import MLPConfig
from tests.conftest import model_of

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def association_ladder():
    return runpy.run_path(str(EXAMPLES / "association_ladder.py"))


def made_up(attention, fixed_mixing, causal_mean, identity, noise=0.0, seeds=3, paths=40):
    """Losses [S, n] around the given means: each seed and each path has a part of its own, the same on all rungs."""
    rng = np.random.default_rng(0)
    means = {
        "attention": attention,
        "fixed_mixing": fixed_mixing,
        "causal_mean": causal_mean,
        "identity": identity,
    }
    shared = rng.normal(0, 0.3, (seeds, 1)) + rng.normal(0, 1, paths)
    return {name: mean + shared + noise * rng.normal(size=(seeds, paths)) for name, mean in means.items()}


REFERENCES = {"ideal_observer": 0.9, "unigram": 3.0, "uniform": 3.5}


def test_the_bias_is_the_ratio_of_costs_and_what_all_rungs_share_cancels(association_ladder):
    losses = made_up(1.0, 1.5, 1.8, 3.0)
    found = association_ladder["finding_of"](losses, losses, REFERENCES, {})
    assert found.measured["association_bias"] == pytest.approx(0.25)
    assert found.measured["fixed_share"] == pytest.approx(0.75)
    # Costs are the same on every path and every seed, so every resample has the same ratio; losses do vary.
    assert found.interval["association_bias"] == pytest.approx((0.25, 0.25))
    assert found.interval["fixed_share"] == pytest.approx((0.75, 0.75))
    assert found.measured["cost_causal_mean"] == pytest.approx(0.8)
    low, high = found.interval["loss_attention"]
    assert low < found.measured["loss_attention"] < high
    assert found.null["cost_identity.unigram"] == pytest.approx(3.0 - found.measured["loss_attention"])
    assert found.null["loss_identity.ideal_observer"] == 0.9
    assert "0.250 [0.250, 0.250]" in found.verdict
    assert "fixed_mixing" in found.conventions["association_bias"]


def test_the_interval_is_that_of_both_seeds_and_paths(association_ladder):
    """Exact for two seeds and no paths: a quarter of the resamples have one seed twice, half have both."""
    n = 16
    by_seed = lambda first, second: np.stack([np.full(n, first), np.full(n, second)])
    losses = {
        "attention": by_seed(1.0, 1.0),
        "fixed_mixing": by_seed(1.2, 1.6),
        "causal_mean": by_seed(2.0, 2.0),
        "identity": by_seed(2.0, 3.0),
    }
    found = association_ladder["finding_of"](losses, losses, REFERENCES, {})
    assert found.measured["association_bias"] == pytest.approx(0.8 / 3)  # of means, not the mean of ratios, 0.25
    assert found.interval["association_bias"] == pytest.approx((0.2, 0.3))
    # Paths: the interval of a mean of n numbers is about 4 standard errors wide.
    losses = made_up(1.0, 1.5, 1.8, 3.0, seeds=1, paths=400)
    low, high = association_ladder["finding_of"](losses, losses, REFERENCES, {}).interval["loss_attention"]
    assert high - low == pytest.approx(3.92 * losses["attention"].std() / 20, rel=0.1)


def test_the_fixed_pattern_is_chosen_on_other_paths_and_nothing_is_clipped(association_ladder):
    losses = made_up(1.0, 0.8, 0.9, 3.0)
    others = made_up(1.0, 1.8, 1.5, 3.0, paths=24)
    found = association_ladder["finding_of"](losses, others, REFERENCES, {})
    assert found.measured["association_bias"] == pytest.approx(-0.05)
    assert found.measured["fixed_share"] == pytest.approx(1.05)
    assert "causal_mean" in found.conventions["association_bias"]
    assert "24 other held-out paths" in found.conventions["fixed_A"]


def test_the_bias_is_undefined_where_mixing_may_be_worth_nothing(association_ladder):
    losses = made_up(1.0, 1.0, 1.0, 1.001, noise=0.2)
    found = association_ladder["finding_of"](losses, losses, REFERENCES, {})
    assert not {"association_bias", "fixed_share"} & set(found.measured)
    low, high = found.interval["cost_identity"]
    assert low < 0 < high
    assert "undefined" in found.conventions["association_bias"]
    assert "undefined" in found.verdict


@pytest.mark.parametrize("name", ["mess3", "rrxor", "associative_recall", "pydoc"])
def test_rungs_differ_in_how_they_mix_and_in_nothing_else(association_ladder, name):
    rungs = association_ladder["rungs_of"](association_ladder["config_of"](name))
    assert len(rungs) == 4
    parameters = {rung: jw.sweep.count_parameters(config.model) for rung, config in rungs.items()}
    assert all(abs(count / parameters["attention"] - 1) < 0.01 for count in parameters.values())
    alike = [
        dataclasses.replace(config, model=dataclasses.replace(config.model, aggregate="identity", filter=None))
        for config in rungs.values()
    ]
    assert all(config == alike[0] for config in alike)


@pytest.mark.slow
def test_the_ladder_runs(association_ladder, tmp_path, capsys):
    options = ["--steps", "10", "--seeds", "2", "--width", "16", "--depth", "1", "--paths", "16"]
    assert association_ladder["main"](["mess3", *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "association_from_scratch" in printed
    found, inside = json.loads((tmp_path / "mess3" / "findings.json").read_text("utf-8"))
    assert (found["name"], inside["name"]) == ("association_from_scratch", "association")
    # Ten steps teach little: nothing beats the observer that knows the world, by more than 16 paths can tell.
    assert found["null"]["loss_attention.ideal_observer"] < found["measured"]["loss_attention"]
    assert "equal within" in found["conventions"]["flops"]


def test_a_pretrained_model_is_continued_and_taken_apart(tmp_path, capsys):
    model = model_of(vocab_size=257, max_length=32, filter=MLPConfig(24, "gelu_tanh"), tied=True)
    vocabulary = jw.text.ByteVocabulary()
    jw.export(model, tmp_path / "model", vocabulary)
    main = runpy.run_path(str(EXAMPLES / "pretrained_walk.py"))["main"]
    main([str(tmp_path / "model"), "--prompt", "the", "--steps", "2"])
    printed = capsys.readouterr().out
    tokens = [vocabulary.begin, *vocabulary.encode("the")]
    law = jw.next_log_probs(model, np.array(tokens))[-1]
    assert f"= {law.max():.3f} nats, by token" in printed
    parts = [float(line.split()[0]) for line in printed.split("occluded\n")[1].splitlines()]
    assert len(parts) == len(tokens) + 2  # the rest, and the sum
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.05)
    assert parts[-1] == pytest.approx(float(law.max()), abs=0.01)


def test_every_example_is_described_with_its_command():
    text = (EXAMPLES / "README.md").read_text("utf-8")
    files = sorted(EXAMPLES.glob("*.py"))
    assert files
    for file in files:
        assert f"python examples/{file.name}" in text
        assert f"python examples/{file.name}" in file.read_text("utf-8")
