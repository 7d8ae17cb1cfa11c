"""Narrowing: of models whose law is known, by brute force, and of observers of mixtures who narrow less."""

import functools
import json
import math

import jax
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import NotApplicable, Subject, analyse, narrowing
from jaxwalk.evidence.finding import decide
from jaxwalk.text import open_store
from jaxwalk.text.store import Split
from tests.conftest import model_of
from tests.test_analyses_law import FORBIDS, PERSISTS, attentive, chain, exact_subject, markov_model


@functools.cache
def found(name="forbids"):
    return analyse("narrowing", exact_subject(name))


class Store:
    """Text that a chain wrote, in documents of 40 tokens."""

    def __init__(self, name="persists"):
        self.train, self.validation = (self.split(name, seed) for seed in range(2))

    @staticmethod
    def split(name, seed, documents=200, length=40):
        tokens = np.asarray(chain(name).sample(jax.random.key(seed), documents, length))
        return Split(tokens.ravel(), np.arange(documents) * length, tokens.size)


def test_an_exact_model_narrows_as_the_world_does():
    finding = found()
    assert finding.measured["entropy_error"] < 1e-5
    assert finding.measured["narrowing"] == pytest.approx(finding.null["world"], abs=1e-5)
    assert finding.measured["excess_at_end"] < 1e-6
    assert [check.name for check in finding.checks if check.value < 1e-5] == ["chain_rule_error"]
    assert finding.decision == "not testable here"  # the last token says all
    np.testing.assert_allclose(finding.arrays["loss_model"], finding.arrays["loss_ideal"], atol=1e-5)
    assert finding.null["path_entropy.untrained"] == pytest.approx(finding.null["path_entropy.uniform"], rel=1e-5)
    assert finding.measured["effective_paths"] == pytest.approx(math.exp(finding.measured["path_entropy"]))


def test_path_entropies_are_those_of_the_library_at_every_context_length():
    subject = Subject(attentive(), world=chain("forbids"))
    finding = analyse("narrowing", subject, {"contexts": 8, "paths": 8, "steps": 2})
    paths = subject.paths(8, 8)
    path_entropy = jax.jit(jw.path_entropy, static_argnames="steps")
    assert finding.conventions["context_lengths"] == [1, 2, 4, 6]
    for i, length in ((1, 2), (3, 6)):
        for row in range(3):
            entropy = path_entropy(subject.model, paths[row, :length], steps=2).value
            assert finding.arrays["entropy_per_path"][row, i] == pytest.approx(float(entropy), rel=1e-4)
    assert finding.checks[0].value < 1e-5


def test_path_entropy_of_one_step_is_the_entropy_of_the_next_law():
    subject = Subject(attentive(), world=chain("forbids"))
    finding = analyse("narrowing", subject, {"contexts": 8, "paths": 8})  # the model is too short for more steps
    assert finding.conventions["steps"] == 1
    law = np.exp(np.asarray(jax.jit(jax.vmap(jw.next_log_probs, (None, 0)))(subject.model, subject.paths(8, 7)), float))
    entropy = -np.sum(law * np.log(law), axis=-1)
    at = np.array(finding.conventions["context_lengths"]) - 1
    np.testing.assert_allclose(finding.arrays["entropy_per_path"], entropy[:, at], rtol=1e-4)


def test_sampled_path_entropies_agree_with_enumerated_ones():
    subject = Subject(attentive(), world=chain("forbids"))
    exact = analyse("narrowing", subject, {"contexts": 400, "paths": 400, "steps": 3})
    sampled = analyse("narrowing", subject, {"contexts": 400, "paths": 400, "steps": 3, "enumerated": 2})
    assert "enumeration" in exact.conventions["narrowing"]
    assert "sampled" in sampled.conventions["narrowing"]
    gap = np.abs(sampled.arrays["entropy_model"] - exact.arrays["entropy_model"])
    width = sampled.arrays["entropy_model_high"] - sampled.arrays["entropy_model_low"]
    assert (gap < 1.5 * width + 1e-4).all()
    assert "world" not in sampled.null
    assert "entropy_error" not in sampled.measured


def test_shuffling_costs_a_process_that_needs_order_and_not_a_model_that_is_blind_to_it():
    finding = found("persists")
    assert finding.interval["shuffle_cost"][0] > 0.05
    assert abs(finding.null["shuffle_cost.untrained"]) < 1e-6
    on_text = analyse("narrowing", Subject(markov_model(PERSISTS, 12), store=Store()), {"contexts": 128})
    assert on_text.interval["shuffle_cost"][0] > 0.05
    assert on_text.conventions["context_lengths"][0] == 2
    assert "excess_at_end" not in on_text.measured


def test_more_context_narrows_where_the_state_is_hidden():
    world = jw.worlds.make("z1r")
    finding = analyse("narrowing", Subject(markov_model(np.full((2, 2), 0.5), 12), world=world), {"light": True})
    assert finding.null["world"] > 0.1
    assert finding.null["loss_gain.ideal"] > 0.1
    assert finding.measured["entropy_error"] > 0.1  # this model does not


# Mixtures


class Planned:
    """What is measured on a mixture, of a small model that has not learned it."""

    def __init__(self, world, paths=64, max_length=16):
        self.world = world
        self.subject = Subject(model_of(vocab_size=world.vocab_size, max_length=max_length), world=world)
        self.plan = narrowing._planned(self.subject, paths, paths, 2, 16, False)
        self.kl = narrowing._restricted_observers(self.subject, world, self.plan.rows)

    def decisions(self, kl):
        return [c.decision for c in narrowing._against_observers(self.world, self.kl | {"model": kl}, self.plan)]


@functools.cache
def planned(weights=None):
    """A mixture of two chains, one in which tokens repeat and one in which they do not."""
    tasks = [["markov", {"table": table.tolist()}] for table in (PERSISTS, FORBIDS, np.full((3, 3), 1 / 3))]
    return Planned(jw.worlds.make("mixture", tasks=tasks, weights=weights))


def by_hand(world, row, weights_of):
    """KL(exact posterior predictive || tasks' laws with other weights) after each token, by matrix products."""
    laws, log_likelihood = [c.transitions.sum(2).T for c in world.components], np.zeros(len(world.components))
    found = []
    for t, token in enumerate(row[:-1]):
        p = np.array([law[row[t - 1]] if t else c.initial for law, c in zip(laws, world.components, strict=True)])
        log_likelihood = log_likelihood + np.log(np.maximum(p[:, token], 1e-300))
        posterior = world.weights * np.exp(log_likelihood - log_likelihood.max())
        posterior /= posterior.sum()
        after = np.array([law[token] for law in laws])
        exact, other = posterior @ after, weights_of(posterior) @ after
        some = exact > 0
        found.append(np.sum(exact[some] * np.log(exact[some] / other[some])))
    return np.array(found)


def test_what_restricted_observers_lose_is_that_of_bayes_rule_with_other_weights():
    setup = planned()
    row = setup.plan.rows[3]
    possible = lambda posterior: (posterior > 0) * setup.world.weights / ((posterior > 0) * setup.world.weights).sum()
    np.testing.assert_allclose(setup.kl["prior"][3], by_hand(setup.world, row, possible), rtol=1e-3, atol=1e-5)
    single = [by_hand(setup.world, row, lambda _, k=k: np.eye(3)[k]) for k in (0, 2)]
    assert min(np.abs(setup.kl["best_task"][3] - each).max() for each in single) < 1e-4
    np.testing.assert_allclose(setup.kl["window"][:, : narrowing._window(16)], 0, atol=1e-5)
    assert setup.kl["window"][:, -4:].mean() > narrowing.EXCESS


def test_the_posterior_is_told_from_observers_who_narrow_less():
    setup = planned()
    noise = np.abs(np.random.default_rng(0).normal(0, 1e-3, setup.kl["prior"].shape))
    assert setup.decisions(noise) == ["supported", "supported"]
    for name in setup.kl:
        assert setup.decisions(setup.kl[name]) == ["contradicted", "contradicted"]
    assert setup.decisions(0.9 * setup.kl["window"])[0] == "contradicted"
    better = narrowing._against_observers(setup.world, setup.kl | {"model": noise}, setup.plan)[1]
    assert better.null == "window"  # the strongest


def test_the_true_context_must_narrow_as_it_does_for_the_observer_who_knows_the_world():
    setup = Planned(jw.worlds.make("mixture"), paths=256)
    models = {"model": setup.subject.model}
    entropy = narrowing._path_entropies(models, setup.world, setup.plan, 0)
    shuffled = np.concatenate(list(setup.plan.shuffled.values()))
    steps = [{"model": narrowing.observe(models["model"], setup.world, rows)} for rows in (setup.plan.rows, shuffled)]
    as_found = narrowing._against_shuffled(setup.subject, setup.plan, entropy, *steps)
    ideal = entropy | {"model": entropy["world"], "shuffled": entropy["shuffled_world"]}
    narrows = narrowing._against_shuffled(setup.subject, setup.plan, ideal, *steps)
    blind = narrowing._against_shuffled(setup.subject, setup.plan, entropy | {"shuffled": entropy["model"]}, *steps)
    assert as_found.decision != "supported"
    assert (narrows.decision, blind.decision) == ("supported", "contradicted")
    assert narrows.value == pytest.approx(2 * narrows.reference)


def test_a_mixture_of_one_task_or_of_equal_ones_tests_nothing():
    for tasks in ([["mess3", {}]], [["mess3", {}], ["mess3", {}]]):
        world = jw.worlds.make("mixture", tasks=tasks)
        finding = analyse("narrowing", Subject(attentive(), world=world), {"paths": 32, "contexts": 16})
        assert [c.decision for c in finding.primary[:2]] == ["not testable here"] * 2
        assert finding.decision != "supported"


def test_a_model_of_the_last_token_does_not_narrow():
    setup = planned()
    transitions = setup.world.transitions
    pairs = np.einsum("n,unm,vmk->uv", setup.world.initial, transitions, transitions)
    law = pairs / pairs.sum(axis=1, keepdims=True)
    finding = analyse("narrowing", Subject(markov_model(law, 16), world=setup.world), {"paths": 64, "contexts": 16})
    assert [c.decision for c in finding.primary[:2]] == ["contradicted", "contradicted"]
    assert finding.figures[0].name == "excess_by_position"
    assert {f"late_excess.{name}" for name in narrowing.RESTRICTED} <= set(finding.null) | {"late_excess.best_task"}
    json.dumps(finding.to_dict(), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("data", [{"world": jw.worlds.make("mixture")}, {"store": Store()}], ids=["mixture", "text"])
def test_untrained_models_support_nothing(data):
    decisions = []
    for seed in range(20):
        model, untrained = (model_of(0.4, seed=100 * k + seed, vocab_size=3, max_length=16) for k in (1, 2))
        subject = Subject(model, untrained=untrained, seed=seed, **data)
        finding = decide([analyse("narrowing", subject, {"paths": 32, "contexts": 32})])[0]
        decisions += [contrast.decision for contrast in finding.primary]
    tested = [decision for decision in decisions if decision != "not testable here"]
    assert len(tested) >= 20
    assert tested.count("supported") <= 0.05 * len(tested)


# Text, and what it needs


@pytest.fixture(scope="module")
def pydoc(tmp_path_factory):
    """Real text, and a model that knows nothing of it."""
    store = open_store(jw.TextData(max_tokens=200_000, store=str(tmp_path_factory.mktemp("stores"))))
    model, untrained = (model_of(scale=0.1, seed=s, vocab_size=257, max_length=16, width=8, depth=1) for s in (0, 1))
    return Subject(model, store.vocabulary, untrained=untrained, store=store)


def test_real_text_narrows_and_keeps_the_chain_rule(pydoc):
    finding = analyse("narrowing", pydoc, {"paths": 32, "contexts": 16})
    assert "sampled" in finding.conventions["narrowing"]
    assert finding.checks[0].passed
    assert finding.checks[0].value < 1e-4
    assert 0 < finding.measured["path_entropy"] <= finding.null["path_entropy.uniform"] + 1e-4
    assert finding.decision != "supported"
    json.dumps(finding.to_dict(), allow_nan=False)


def test_the_finding_is_strict_json_with_intervals_around_its_numbers():
    data = json.loads(json.dumps(found().to_dict(), allow_nan=False))
    assert all(value is not None for value in [*data["measured"].values(), *data["null"].values()])
    for key, (low, high) in data["interval"].items():
        assert low - 1e-9 <= data["measured"][key] <= high + 1e-9, key
    assert data["conventions"]["units"]
    assert found().figures


def test_data_is_needed_and_must_fit_the_model():
    with pytest.raises(NotApplicable, match="a world or a text: a model without data"):
        analyse("narrowing", Subject(model_of()))
    with pytest.raises(NotApplicable, match="3 tokens and the model 5"):
        analyse("narrowing", Subject(model_of(), world=chain("forbids")))
