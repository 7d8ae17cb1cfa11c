"""Decisions: intervals that cover, p-values that are uniform, and words that follow from them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxwalk import checkpoint, worlds
from jaxwalk.analyses import Finding, NotApplicable, Subject
from jaxwalk.config import ConfigError
from jaxwalk.evidence import engine, seeds
from jaxwalk.evidence.decision import Check, Quantity, Units, adjust, combined, holm, numbers, untestable
from jaxwalk.evidence.finding import CLAIMS, decide, scoreboard
from jaxwalk.text import ByteVocabulary, SymbolVocabulary
from jaxwalk.text.store import Split, TokenStore
from tests.conftest import model_of
from tests.test_training import small


def normal(rng, n):
    return rng.normal(size=n), 0.0


def skewed(rng, n):  # an excess loss is like this: positive, with a tail
    return rng.exponential(size=n), 1.0


@pytest.mark.parametrize(("draw", "n"), [(normal, 64), (skewed, 64), (skewed, 256)])
def test_intervals_cover_the_mean_in_95_of_100_samples(draw, n):
    rng = np.random.default_rng(n)
    covered, rejected = [], []
    for _ in range(2500):
        values, mean = draw(rng, n)
        units = Units(values)
        low, high = units.interval()
        covered.append([mean > low, mean < high])
        rejected.append(units.p_value(mean) < 0.05)
    assert 0.93 <= np.all(covered, axis=1).mean() <= 0.97
    assert (np.mean(covered, axis=0) > 0.96).all()  # neither side takes all of the errors
    assert np.mean(rejected) == pytest.approx(1 - np.all(covered, axis=1).mean(), abs=0.003)  # the same statistic
    shared = rng.normal(size=n)
    contrast = Quantity("x", shared + values, {"null": shared}).contrast("null", "C2", "it is", at_least=mean)
    assert contrast.interval == pytest.approx(units.interval())  # of the paired difference
    assert contrast.p_value == pytest.approx(units.p_value(mean))


def test_intervals_of_ratios_and_of_clustered_paths_cover_them():
    """Documents of unequal sizes whose paths are alike, under a ratio of means."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        documents = np.repeat(np.arange(40), rng.integers(1, 12, 40))
        own = rng.normal(size=(40, 2))[documents] * 0.5
        values = own + rng.normal(size=(len(documents), 2)) * 0.1 + [2.0, 4.0]
        ratio = Quantity(
            "ratio", values, {}, statistic=lambda means: means[..., 0] / means[..., 1], documents=documents
        )
        low, high = ratio.interval
        covered.append(low < 0.5 < high)
        assert low < ratio.value < high
    assert 0.91 <= np.mean(covered) <= 0.99
    alone = dataclasses.replace(ratio, documents=None).interval
    assert alone[1] - alone[0] < 0.7 * (high - low)  # what ignoring documents would claim


def test_pseudo_values_of_a_mean_are_the_values():
    x = np.random.default_rng(0).normal(size=50)
    mean = Quantity("x", x).interval
    assert Quantity("x", x[:, None], statistic=lambda means: means[..., 0]).interval == pytest.approx(mean)
    assert Quantity("x", x, documents=np.arange(50)).interval == pytest.approx(mean)


@pytest.mark.parametrize(
    ("shift", "prediction", "decision"),
    [
        (1.0, {"at_least": 0.5}, "supported"),
        (0.0, {"at_least": 0.5}, "contradicted"),
        (0.5, {"at_least": 0.5}, "undecided"),
        (0.0, {"at_most": 0.5}, "supported"),
        (1.0, {"at_most": 0.5}, "contradicted"),
        (-9.0, {"at_most": -0.5}, "supported"),
    ],
)
def test_a_decision_follows_from_the_difference_and_the_prediction(shift, prediction, decision):
    rng = np.random.default_rng(0)
    null = rng.normal(size=100)
    noise = rng.normal(size=100)
    quantity = Quantity("x", null + shift + 0.3 * (noise - noise.mean()), {"null": null}, unit="nats per token")
    contrast = quantity.contrast("null", "C2", "the sky is blue", **prediction)
    assert contrast.decision == decision
    assert contrast.sentence.startswith(f"{decision.capitalize()}: the sky is blue; ")
    assert contrast.sentence.endswith("(null), nats per token.")
    assert contrast.interval[0] < contrast.difference < contrast.interval[1]


def test_exact_numbers_decide_and_too_few_units_do_not():
    exact = Quantity("x", 2.0, {"null": 1.0}).contrast("null", "C2", "it is", at_least=0.5)
    assert (exact.decision, exact.interval) == ("supported", None)
    few = Quantity("x", np.ones(7), {"null": 0.0}).contrast("null", "C2", "it is", at_least=0.5)
    assert few.decision == "undecided"
    assert "7 independent units are too few" in few.sentence
    one_document = Quantity("x", np.arange(99.0), {"null": 0.0}, documents=np.zeros(99, int))
    assert one_document.interval is None
    assert one_document.contrast("null", "C2", "it is", at_least=0.5).decision == "undecided"
    alike = Quantity("x", np.ones(99), {"null": np.ones(99)}).contrast("null", "C2", "it is", at_least=0.5)
    assert alike.decision == "contradicted"  # the null itself
    nan = Quantity("x", np.full(99, np.nan), {"null": 0.0}).contrast("null", "C2", "it is", at_least=0.5)
    assert nan.decision == "not testable here"
    with pytest.raises(ValueError, match="either at_least or at_most"):
        Quantity("x", 2.0, {"null": 1.0}).contrast("null", "C2", "it is")


def test_holm_adjusts_as_published_and_keeps_the_error_of_a_whole_report():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        reports = [
            Quantity("x", rng.exponential(size=64), {"null": 1.0}).contrast("null", "C2", "it is", at_least=0.0)
            for _ in range(12)
        ]
        wrong += any(c.decision in ("supported", "contradicted") for c in adjust(reports))
    assert wrong / 300 < 0.08
    kept = adjust([untestable("C4", "it is", "x", "there is none"), *reports])
    assert kept[0].decision == "not testable here"
    assert kept[0].adjusted is None


def test_a_claim_needs_all_of_its_contrasts():
    assert combined([]) == combined(["not testable here"]) == "not testable here"
    assert combined(["supported", "not testable here"]) == "supported"
    assert combined(["supported", "undecided"]) == "undecided"
    assert combined(["supported", "contradicted", "undecided"]) == "contradicted"


def finding(name, *contrasts):
    return Finding(name, "C2: x.", {"x": 1.0}, {}, {"null": 0.0}, {}, primary=contrasts)


def test_the_scoreboard_has_a_line_for_each_claim_and_the_contrast_that_decides_it():
    rng = np.random.default_rng(0)

    def contrast(shift, claim):
        values = shift + rng.normal(size=400)
        return Quantity("x", values, {"null": 0.0}).contrast("null", claim, "it is", at_least=0.5)

    findings = decide([finding("a", contrast(2, "C2"), contrast(0.9, "C2"), contrast(0.5, "C3")),
                       finding("b", contrast(-1, "C5"), contrast(3, "C5"))])  # fmt: skip
    lines = {line.claim: line for line in scoreboard(findings)}
    assert list(lines) == list(CLAIMS)
    assert [lines[c].decision for c in ("C2", "C3", "C5")] == ["supported", "undecided", "contradicted"]
    assert lines["C2"].contrast == findings[0].primary[1]
    assert lines["C2"].finding == "a"
    assert lines["C5"].contrast == findings[1].primary[0]
    assert (lines["C4"].decision, lines["C4"].contrast) == ("not testable here", None)
    assert findings[0].decision == "undecided"
    assert findings[0].claims == ("C2", "C3")
    assert findings[0].primary[0].adjusted >= findings[0].primary[0].p_value
    data = findings[0].to_dict()
    assert (data["decision"], data["claims"], data["primary"][0]["decision"]) == (
        "undecided",
        ["C2", "C3"],
        "supported",
    )
    with pytest.raises(ValueError, match="at most 3 primary contrasts"):
        finding("c", *[contrast(0, "C2")] * 4)


def test_numbers_of_quantities_are_those_of_a_finding():
    first = Quantity("r2", np.arange(9.0), {"untrained": np.zeros(9)})
    assert numbers([first, Quantity("mass", 1.0, {"exact": 1.0})]) == {
        "measured": {"r2": 4.0, "mass": 1.0},
        "interval": {"r2": first.interval},
        "null": {"untrained": 0.0, "mass.exact": 1.0},
    }
    assert first.interval == pytest.approx(Units(np.arange(9.0)).interval())
    assert not Check("x", float("nan"), 1.0, "it is").passed


# Several seeds


def analysed(folder, seed, value, reason="", **changes):
    """The folder of a run that was analysed, without the training."""
    config = dataclasses.replace(small(**changes), seed=seed, name=folder.name)
    definition = checkpoint.definition_of(config, SymbolVocabulary(("0", "1")))
    checkpoint.prepare_workdir(folder, definition, resume=False, overwrite=False)
    quantity = Quantity("excess_loss", np.full(20, value), {"ngram": np.full(20, 0.5)})
    contrast = quantity.contrast("ngram", "C2", "it is", at_most=-0.1, label="n-gram")
    contrast = dataclasses.replace(contrast, reason=reason)
    (folder / "analysis").mkdir()
    (folder / "analysis" / "findings.json").write_text(json.dumps([finding("path_law", contrast).to_dict()]))
    return folder


def test_seeds_of_one_experiment_are_decided_together(tmp_path):
    values = [0.1, 0.12, 0.08, 0.11]
    folders = [analysed(tmp_path / str(i), i, value) for i, value in enumerate(values)]
    (joined,) = seeds.across_seeds(folders)
    contrast = joined.primary[0]
    assert (contrast.decision, contrast.units) == ("supported", 4)
    assert contrast.difference == pytest.approx(np.mean(values) - 0.5)
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert contrast.interval == pytest.approx((contrast.difference - half, contrast.difference + half))
    other = analysed(tmp_path / "other", 9, 0.1, steps=10)
    untested = [analysed(tmp_path / f"no{i}", 20 + i, 0.1, "there is no world") for i in range(3)]
    assert seeds.across_seeds(untested)[0].primary[0].reason.startswith("0 of 3 runs test it")
    for wrong, message in (
        (folders[:2], "expected 3 or more different runs"),
        ([*folders, other], "other and 0 differ in more"),
        ([folders[0], folders[1], analysed(tmp_path / "again", 0, 0.1)], "runs of different seeds"),
    ):
        with pytest.raises(ConfigError, match=message):
            seeds.across_seeds(wrong)
    (folders[0] / "analysis" / "findings.json").unlink()
    with pytest.raises(ConfigError, match=f"has not been analysed: python analyze.py {folders[0]}"):
        seeds.across_seeds(folders)


# What is drawn


def store_of(*sizes):
    tokens = np.arange(sum(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Split(tokens, starts, len(tokens))


def test_windows_of_a_text_are_disjoint_and_in_one_document():
    validation, train = store_of(5, 40, 7, 100, 23), store_of(90, 30)
    store = TokenStore(None, "", ByteVocabulary(), train, validation)
    subject = Subject(model_of(max_length=8), store=store)
    tokens, documents = subject.draw(100, 8)
    assert len(tokens) == 5 + 12 + 2  # all there are
    assert len(np.unique(tokens)) == tokens.size
    np.testing.assert_array_equal(np.diff(tokens, axis=1), 1)
    np.testing.assert_array_equal(np.searchsorted(validation.starts, tokens[:, 0], side="right") - 1, documents)
    np.testing.assert_array_equal(np.searchsorted(validation.starts, tokens[:, -1], side="right") - 1, documents)
    np.testing.assert_array_equal(subject.paths(9, 8), subject.draw(9, 8).tokens)
    assert len(subject.draw(100, 8, to_fit=True).tokens) == 11 + 3
    with pytest.raises(NotApplicable, match="expected 8 windows of 50 tokens that lie in one document, found 2"):
        subject.draw(100, 50)


def test_paths_of_a_world_to_fit_on_are_others_than_those_to_score():
    subject = Subject(model_of(vocab_size=3, max_length=20), world=worlds.mess3())
    score, fit = (subject.draw(50, 20, to_fit=to_fit) for to_fit in (False, True))
    assert not {*map(tuple, score.tokens)} & {*map(tuple, fit.tokens)}
    np.testing.assert_array_equal(score.documents, np.arange(50))


# How it is measured


def context_and_shift(model, path, number, shift):
    return {"context": model.walk(path).context[-1], "shifted": number + shift}


def test_measures_are_those_of_each_path_alone_in_any_batch_and_on_any_devices(monkeypatch):
    model, other = model_of(), model_of(seed=3)
    paths = np.random.default_rng(0).integers(0, 5, (21, 6))
    numbers = np.arange(21.0)
    done = []
    with engine.reporting(lambda *counts: done.append(counts)):
        measured = engine.measure(context_and_shift, model, paths, numbers, shared=(2.0,), elements=700)
    assert done[-1] == (21, 21)
    assert len(done) > 2
    assert measured["context"].dtype == np.float64
    np.testing.assert_array_equal(measured["shifted"], numbers + 2)
    np.testing.assert_allclose(measured["context"][20], model.walk(jnp.asarray(paths[20])).context[-1], rtol=2e-5)
    programs = engine._mapped._cache_size()
    again = engine.measure(context_and_shift, other, paths, numbers, shared=(2.0,), elements=700)
    assert engine._mapped._cache_size() == programs  # other parameters, the same program
    assert np.abs(again["context"] - measured["context"]).max() > 0.1
    monkeypatch.setattr(engine, "_devices", jax.local_devices)
    spread = engine.measure(context_and_shift, model, paths, numbers, shared=(2.0,))
    np.testing.assert_allclose(spread["context"], measured["context"], rtol=2e-5, atol=1e-6)
    with pytest.raises(NotApplicable, match="context_and_shift: expected numbers, got NaN"):
        engine.measure(context_and_shift, model, paths, np.full(21, np.nan), shared=(2.0,))
