"""The analyses of the path law, held against models whose law is known, brute force, and planted faults."""

import dataclasses
import functools
import io
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxwalk as jw
from jaxwalk import training
from jaxwalk.analyses import NotApplicable, Subject, analyse, open_subject, path_law
from jaxwalk.config import ConfigError, WorldData
from jaxwalk.evidence import engine, laws, statistics
from jaxwalk.evidence.laws import NGram, Steps, began_training, fit_ngrams
from jaxwalk.text import open_store
from jaxwalk.text.store import Split
from tests.conftest import model_of
from tests.test_training import small

# A chain of order one that forbids 0 -> 2, and one in which every token mostly repeats.
FORBIDS = np.array([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])
PERSISTS = np.full((3, 3), 0.05) + 0.85 * np.eye(3)


@functools.cache
def chain(name):
    law = {"forbids": FORBIDS, "persists": PERSISTS}[name]
    return jw.worlds.HiddenMarkov(np.einsum("iv,jv->vij", law, np.eye(len(law))))


def markov_model(law, max_length, sharpness=1.0):
    """A model whose law is exactly that of the chain: one-hot token vectors, log transitions as output vectors."""
    V = len(law)
    config = jw.ModelConfig(V, max_length, width=V, depth=1, aggregate="identity", filter=None, positions="none")
    model = jw.init(config, jax.random.key(0))
    layer = model.layers[0]
    silent = jax.tree.map(jnp.zeros_like, layer.aggregate.out)
    log_law = np.where(law > 0, np.log(np.where(law > 0, law, 1)), -1e4)
    return dataclasses.replace(
        model,
        embed=dataclasses.replace(model.embed, table=jnp.eye(V)),
        unembed=dataclasses.replace(model.unembed, weight=jnp.asarray(sharpness * log_law.T, jnp.float32)),
        layers=(dataclasses.replace(layer, aggregate=dataclasses.replace(layer.aggregate, out=silent)),),
        norm=None,
    )


@functools.cache
def exact_subject(name="forbids", max_length=12):
    law = {"forbids": FORBIDS, "persists": PERSISTS}[name]
    return Subject(
        model=markov_model(law, max_length),
        untrained=markov_model(np.full((3, 3), 1 / 3), max_length),
        world=chain(name),
        prompt=np.array([0, 1, 2]),
    )


@functools.cache
def found(analysis, name="forbids"):
    return analyse(analysis, exact_subject(name))


@functools.cache
def found_prompt():
    """Of a model with attention, which stands in for its untrained self as well."""
    subject = Subject(attentive(), untrained=attentive(), world=chain("forbids"), prompt=np.array([1, 2, 0, 1]))
    return analyse("prompt", subject, {"steps": 4, "k": 5, "samples": 3})


class Store:
    """Text that a chain wrote, in documents of one length."""

    def __init__(self, law, document=400, documents=200):
        self.train, self.validation = (self.split(law, document, documents, seed) for seed in range(2))

    @staticmethod
    def split(law, document, documents, seed):
        rng = np.random.default_rng(seed)
        tokens = np.zeros((documents, document), np.int32)
        for t in range(1, document):
            cumulative = law[tokens[:, t - 1]].cumsum(axis=1)
            tokens[:, t] = (rng.random((documents, 1)) > cumulative).sum(axis=1).clip(max=len(law) - 1)
        return Split(tokens.ravel(), np.arange(documents) * document, tokens.size)

    def bytes_per_token(self, split="validation"):
        return 2.0


def world_probability(world, path):
    """By matrix products in float64, independent of the library's recursion."""
    belief = world.initial
    for v in path:
        belief = belief @ world.transitions[v]
    return float(belief.sum())


@functools.cache
def attentive():
    """A small model with attention, nothing special about its law."""
    return model_of(vocab_size=3, max_length=7, width=8, depth=1)


# path_law


def test_an_exact_model_has_no_excess_and_no_mass_off_the_support():
    finding = found("path_law")
    assert abs(finding.measured["excess_loss"]) < 1e-6
    assert abs(finding.measured["kl_total"]) < 1e-5
    assert finding.measured["mass_off_support"] == 0
    assert finding.measured["total_mass"] == pytest.approx(1, abs=1e-5)
    assert finding.measured["calibration_error"] < 1e-6
    assert finding.measured["top_calibration_error"] < 1e-6
    assert [check.name for check in finding.checks if check.passed] == ["total_mass", "sampler"]
    assert finding.null["mass_off_support.untrained"] > 0.1
    assert finding.null["untrained"] == pytest.approx(finding.null["uniform"], rel=1e-5)
    assert 0 < finding.null["ngram"] < 1e-3
    assert finding.conventions["ngram"].startswith("order 1")


def test_excess_mass_and_total_equal_brute_force_over_all_paths():
    world, model = chain("forbids"), attentive()
    finding = analyse("path_law", Subject(model, world=world), {"samples": 200})
    paths = np.array(list(itertools.product(range(3), repeat=8)))
    log_model = np.asarray(jax.jit(jax.vmap(jw.path_log_prob, (None, 0)))(model, paths), float)
    given = np.array([world_probability(world, p[:1]) for p in paths])
    joint = np.array([world_probability(world, p) for p in paths])
    allowed = joint > 0
    kl = np.sum(joint[allowed] * (np.log(joint[allowed] / given[allowed]) - log_model[allowed]))
    assert finding.measured["excess_loss"] == pytest.approx(kl / 7, rel=1e-5)
    assert "excess_loss" not in finding.interval  # nothing was sampled

    # Over paths of 7 tokens: sums over the last token.
    shorter = {tuple(p[:7]): 0.0 for p in paths}
    for path, mass in zip(paths, given * np.exp(log_model), strict=True):
        shorter[tuple(path[:7])] += mass
    off = sum(mass for path, mass in shorter.items() if world_probability(world, path) == 0)
    assert finding.measured["mass_off_support"] == pytest.approx(off, rel=1e-4)
    assert finding.measured["total_mass"] == pytest.approx(1, abs=1e-5)
    assert finding.measured["kl_total"] == pytest.approx(finding.arrays["kl_model"][:6].sum(), rel=1e-5)


def test_what_is_not_enumerated_is_sampled_without_bias():
    subject = Subject(attentive(), world=chain("forbids"))
    exact = analyse("path_law", subject, {"enumerated": 3**7, "samples": 200})
    partly = analyse("path_law", subject, {"enumerated": 3, "samples": 200, "paths": 1024})
    assert "kl_total" not in partly.measured  # of one token, which is given, it would be 0
    low, high = partly.interval["excess_loss"]
    assert low < partly.measured["excess_loss"] < high
    assert abs(partly.measured["excess_loss"] - exact.measured["excess_loss"]) < 1.5 * (high - low)
    assert (partly.arrays["kl_model"] >= 0).all()
    assert partly.arrays["kl_model"][0] == pytest.approx(exact.arrays["kl_model"][0], rel=1e-5)
    light = analyse("path_law", subject, {"light": True})
    assert set(light.null) >= {"uniform"}
    assert light.measured["excess_loss"] == pytest.approx(exact.measured["excess_loss"], rel=0.2)


def test_planted_overconfidence_is_found_on_a_world_and_on_text():
    for data in ({"world": chain("persists")}, {"store": Store(PERSISTS)}):
        honest = analyse("path_law", Subject(markov_model(PERSISTS, 12), **data), {"paths": 256, "light": True})
        sharp = analyse(
            "path_law", Subject(markov_model(PERSISTS, 12, sharpness=3.0), **data), {"paths": 256, "light": True}
        )
        for key in ("calibration_error", "top_calibration_error"):
            assert honest.measured[key] <= 3 * honest.null[f"{key}.calibrated"] + 1e-6
            assert sharp.measured[key] > 0.05
            assert sharp.interval[key][0] > 3 * sharp.null[f"{key}.calibrated"]


def test_the_expected_calibration_error_of_a_calibrated_model_is_what_one_scores():
    # Tokens of like probability exclude each other: taken for independent, they would let the first score be larger.
    law = np.full((12, 12), 1e-3) + (0.165 - 1e-3) * (np.arange(12) < 6)
    law /= law.sum(axis=1, keepdims=True)
    scores, expected = [], []
    for seed in range(12):
        subject = Subject(markov_model(law, 12), store=Store(law), seed=seed)
        finding = analyse("path_law", subject, {"light": True})
        for key in ("calibration_error", "top_calibration_error"):
            scores.append(finding.measured[key])
            expected.append(finding.null[f"{key}.calibrated"])
    ratio = np.reshape(scores, (12, 2)).mean(axis=0) / np.reshape(expected, (12, 2)).mean(axis=0)
    assert ((ratio > 0.6) & (ratio < 1.6)).all()


def test_text_is_measured_in_nats_and_bits_per_byte_against_ngrams():
    finding = analyse("path_law", Subject(markov_model(PERSISTS, 12), store=Store(PERSISTS)), {"paths": 512})
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.05))
    low, high = finding.interval["loss"]
    assert low < finding.measured["loss"] < high
    assert abs(finding.measured["loss"] - entropy) < 2 * (high - low)
    assert finding.measured["bits_per_byte"] == pytest.approx(finding.measured["loss"] / math.log(2) / 2)
    assert "excess_loss" not in finding.measured
    assert finding.null["ngram"] == pytest.approx(finding.measured["loss"], abs=0.01)
    assert finding.measured["loss"] + 0.4 < finding.null["unigram"] < math.log(3) + 0.05
    assert finding.null["bits_per_byte.unigram"] == pytest.approx(finding.null["unigram"] / math.log(2) / 2)


def test_an_exact_law_supports_both_claims_and_what_knows_no_context_neither():
    law = PERSISTS
    training = {
        "training_tokens": 6000,
        "training_paths": lambda step: chain("persists").sample(jax.random.key(3), 500, 13),
    }
    subject = Subject(markov_model(law, 12), world=chain("persists"), **training)
    finding = analyse("path_law", subject, {"paths": 256})
    assert [(c.claim, c.decision) for c in finding.primary] == [("C2", "supported")] * 2 + [("C1", "supported")]
    assert abs(finding.measured["visit_error"]) < 0.1 * finding.null["visit_error.base_rates"]
    # Independent tokens, and the same law of other tokens.
    for wrong in (np.full((3, 3), 1 / 3), law[[1, 2, 0]]):
        finding = analyse("path_law", dataclasses.replace(subject, model=markov_model(wrong, 12)), {"paths": 256})
        assert "supported" not in [c.decision for c in finding.primary]
        assert finding.primary[0].decision == finding.primary[2].decision == "contradicted"
    assert finding.primary[1].decision != "not testable here"


def test_where_counting_leaves_room_the_law_must_be_nearer_than_ngrams():
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.full(48, 0.5), size=48)
    world = jw.worlds.HiddenMarkov(np.einsum("iv,jv->vij", law, np.eye(48)))
    for model, decision in ((markov_model(law, 6), "supported"), (markov_model(law, 6, sharpness=0.8), "contradicted")):
        contrast = analyse("path_law", Subject(model, world=world), {"paths": 64, "samples": 400}).primary[0]
        assert (contrast.null, contrast.decision) == ("ngram", decision)
        assert contrast.reference > path_law.NGRAM_ROOM
    on_text = Subject(markov_model(PERSISTS, 12), store=Store(PERSISTS, documents=40), training_tokens=1)
    assert analyse("path_law", on_text).primary[0].decision != "supported"  # counts know this law as well


def fabricated(kl, paths, training, base=0.5):
    """What `path_law` finds of unseen contexts, of a model with this excess [n, T] over a law of this excess."""
    world = jw.worlds.mess3()
    law = np.asarray(jax.jit(jax.vmap(world.next_log_probs))(paths), float)[:, 1:-1]
    followed = np.take_along_axis(law, paths[:, 1:, None], axis=-1)[..., 0]
    steps = {
        name: Steps(None, None, each, followed, None, None, None)
        for name, each in (("model", kl), ("unigram", np.full_like(kl, base)))
    }
    subject = Subject(model_of(vocab_size=3), world=world, training_paths=lambda step: training, step=1)
    return path_law._on_unseen(subject, steps, paths)


@functools.cache
def trained_on(seed, n=3000):
    return np.asarray(jw.worlds.mess3().sample(jax.random.key(seed), n, 13))


def test_contexts_of_training_are_found_and_memory_of_them_is_told_from_a_law():
    paths, training = trained_on(0)[:512], trained_on(1)
    seen = began_training(paths, training)
    for i, t in ((0, 3), (5, 8), (17, 11), (40, 12)):
        assert seen[i, t] == any((row[: t + 1] == paths[i, : t + 1]).all() for row in training)
    assert seen[:, 0].all()
    assert 0.05 < seen[:, -1].mean() < 0.95
    rng = np.random.default_rng(0)
    noise = rng.exponential(0.01, (512, 12))
    (memory,) = fabricated(np.where(seen[:, :-1], 0, 0.3) + noise, paths, training).primary
    (law,) = fabricated(noise, paths, training).primary
    (nothing,) = fabricated(0.49 + noise, paths, training).primary
    assert [c.decision for c in (memory, law, nothing)] == ["contradicted", "supported", "undecided"]
    (few,) = fabricated(noise, paths, training[:100]).primary
    assert "trained on 100 paths, fewer than are held out" in few.reason
    (all_seen,) = fabricated(noise, paths, np.concatenate([paths] * 9)).primary
    assert "too few of the held-out contexts are unseen by chance" in all_seen.reason


def test_the_paths_of_training_are_those_that_a_run_has_trained_on(tmp_path):
    config = dataclasses.replace(small(), data=WorldData("mess3"), steps=3, steps_per_call=1, log_every=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=3))
    training.train(config, tmp_path / "run", out=io.StringIO())
    subject = open_subject(tmp_path / "run")
    paths = subject.training_paths(3)
    assert paths.shape == (3 * config.batch_size, config.model.max_length + 1)
    np.testing.assert_array_equal(subject.training_paths(1), paths[: config.batch_size])
    log_p = jax.jit(jax.vmap(jw.path_log_prob, (None, 0)))(subject.untrained, paths[: config.batch_size])
    first = next(row for row in subject.metrics() if row["step"] == 1)
    assert first["loss"] == pytest.approx(-float(log_p.mean()) / config.model.max_length, rel=1e-5)


def test_rare_contexts_that_are_hard_are_not_taken_for_unseen_ones():
    """The excess is larger the rarer the context is, whether or not it occurred."""
    differences, naive = [], []
    world = jw.worlds.mess3()
    for seed in range(12):
        paths, training = trained_on(2 * seed)[:512], trained_on(2 * seed + 1)
        law = np.asarray(jax.jit(jax.vmap(world.next_log_probs))(paths), float)
        log_p = np.take_along_axis(law[:, :-1], paths[..., None], axis=-1)[..., 0].cumsum(axis=1)[:, :-1]
        kl = -log_p / 50
        excess = fabricated(kl, paths, training).quantities[1]
        differences.append(excess.value - excess.references["seen"])
        seen = began_training(paths, training)[:, :-1]
        naive.append(kl[~seen].mean() - kl[seen].mean())
    assert np.mean(naive) > 0.1
    assert abs(np.mean(differences)) < 3 * np.std(differences) / math.sqrt(12) + 1e-3
    assert abs(np.mean(differences)) < 0.05 * np.mean(naive)


def test_visits_of_walks_are_those_of_the_world_by_brute_force():
    world, prompt = chain("forbids"), np.array([0, 1])
    rows = np.array(list(itertools.product(range(3), repeat=3)))
    p = np.array([world_probability(world, [*prompt, *row]) for row in rows]) / world_probability(world, prompt)
    expected = [[p[(rows[:, : s + 1] == v).any(axis=1)].sum() for v in range(3)] for s in range(3)]
    visits = jax.jit(path_law.world_visits)(world, prompt, rows)
    np.testing.assert_allclose(visits, expected, rtol=1e-5)
    # Without bias, though the walks are few.
    numbers = np.arange(4000, dtype=np.int32)
    each = np.broadcast_to(prompt.astype(np.int32), (4000, 2)), np.broadcast_to(visits, (4000, 3, 3)), numbers
    models = exact_subject().model, exact_subject().untrained
    errors, missed = (
        engine.measure(path_law.walk_error(3, 8), model, *each, shared=(np.int32(0),)) for model in models
    )
    assert abs(errors.mean()) < 4 * errors.std() / math.sqrt(4000)
    even = sum((1 - (2 / 3) ** (s + 1) - expected[s][v]) ** 2 for s in range(3) for v in range(3)) / 3
    assert abs(missed.mean() - even) < 4 * missed.std() / math.sqrt(4000)


def untrained_of(seed):
    return model_of(seed=seed, vocab_size=3, max_length=12, width=8, depth=1)


def independent_of(seed):
    """What training on independent tokens comes to: their frequencies, nearly."""
    frequencies = np.exp(np.random.default_rng(seed).normal(scale=0.01, size=3))
    return markov_model(np.tile(frequencies / frequencies.sum(), (3, 1)), 12)


@pytest.mark.slow
@pytest.mark.parametrize("null_model", [untrained_of, independent_of])
def test_what_has_learned_nothing_supports_nothing(null_model, monkeypatch):
    world = jw.worlds.mess3()
    ngram = laws.best_ngram(Subject(untrained_of(0), world=world), 13)
    monkeypatch.setattr(path_law, "best_ngram", lambda subject, length: ngram)
    decisions = []
    for seed in range(20):
        subject = Subject(
            null_model(seed),
            untrained=null_model(seed + 100),
            world=world,
            training_tokens=36_000,
            training_paths=lambda step, seed=seed: trained_on(seed),
            seed=seed,
        )
        finding = analyse("path_law", subject, {"paths": 128, "enumerated": 81, "samples": 200})
        decisions += [contrast.decision for contrast in finding.primary]
    assert decisions.count("supported") <= 0.05 * len(decisions)
    assert "not testable here" not in decisions


@pytest.fixture(scope="module")
def pydoc(tmp_path_factory):
    """Real text, and a model that knows nothing of it."""
    store = open_store(jw.TextData(max_tokens=200_000, store=str(tmp_path_factory.mktemp("stores"))))
    model, untrained = (model_of(scale=0.1, seed=s, vocab_size=257, max_length=16, width=8, depth=1) for s in (0, 1))
    load = {0: untrained, 5: model}.__getitem__
    return Subject(model, store.vocabulary, store=store, series=(0, 5), load_step=load)


def test_real_text_is_measured_against_the_uniform_law_and_ngrams(pydoc):
    finding = analyse("path_law", pydoc, {"paths": 64})
    loss, null = finding.measured["loss"], finding.null
    assert abs(loss - math.log(257)) < 0.5  # it knows nothing
    assert null["ngram"] < null["unigram"] < null["uniform"] == pytest.approx(math.log(257))
    assert finding.conventions["bytes_per_token"] == pytest.approx(1, abs=0.01)
    assert finding.measured["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=0.01)
    assert finding.conventions["documents"] < 8
    assert not finding.interval
    assert [(c.claim, c.decision) for c in finding.primary] == [
        ("C2", "undecided"),
        ("C2", "not testable here"),
        ("C1", "undecided"),
    ]
    assert all("independent units are too few" in c.sentence for c in finding.primary[::2])
    for key in ("calibration_error", "top_calibration_error"):
        assert null[f"{key}.calibrated"] >= 0
    rows = pydoc.paths(64, 17)
    log_p = jax.jit(jax.vmap(jw.path_log_prob, (None, 0)))(pydoc.model, rows)
    assert loss == pytest.approx(-float(log_p.mean()) / 16, rel=1e-5)


def test_real_text_is_followed_over_training(pydoc):
    walk = analyse("training_walk", pydoc)
    assert list(walk.measured) == ["path_law.loss.first", "path_law.loss.last"]
    law = analyse("path_law", pydoc, {"light": True})
    assert walk.measured["path_law.loss.last"] == pytest.approx(law.measured["loss"])
    json.dumps(walk.to_dict(), allow_nan=False)


def test_ngrams_count_inside_documents_and_fall_back_to_what_was_seen():
    tokens = np.array([[0, 1, 1, 0, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])  # steps 0-1, 1-1 and 0-0; the last token is padding
    ngram = fit_ngrams(tokens, segments, V=3, order=2, smoothing=2.0)
    unigram = (np.array([1, 2, 0]) + 2 / 3) / 5
    after_0 = (np.array([1, 1, 0]) + 2 * unigram) / 4
    after_1 = (np.array([0, 1, 0]) + 2 * unigram) / 3
    after_01 = (np.array([0, 1, 0]) + 2 * after_1) / 3
    laws = np.exp(ngram(jnp.array([2, 0, 1, 2, 1, 0, 0])))
    expected = [unigram, after_0, after_01, unigram, after_1, after_0, after_0]
    np.testing.assert_allclose(laws, expected, rtol=1e-5)


def test_ngram_laws_are_laws():
    tokens = np.random.default_rng(0).integers(0, 4, (50, 9))
    ngram = fit_ngrams(tokens, np.ones_like(tokens), V=4, order=3, smoothing=1.0)
    assert isinstance(ngram, NGram)
    for law in ngram.laws:
        np.testing.assert_allclose(np.exp(law).sum(axis=1), 1, rtol=1e-5)
    assert len(ngram.laws) == 4


def test_the_ngram_null_has_as_much_data_as_the_model_had():
    world = jw.worlds.mess3()
    few, many = (Subject(model_of(vocab_size=3), world=world, training_tokens=n) for n in (1, 600_000))
    paths = world.sample(jax.random.key(9), 4000, 8)
    losses = []
    for subject, size in ((few, laws.MIN_TOKENS), (many, 600_000)):
        ngram, description = laws.best_ngram(subject, 8)
        assert f"fitted on {size // 8 * 8} tokens" in description
        log_p = jax.vmap(ngram)(paths[:, :-1])
        losses.append(-np.take_along_axis(np.asarray(log_p), np.asarray(paths)[:, 1:, None], -1).mean())
    ideal = -np.asarray(jax.vmap(lambda path: world.path_log_prob(path, given=1))(paths)).mean() / 7
    assert ideal < losses[1] < losses[0] < ideal + 0.01


def test_the_ngram_null_of_a_text_is_chosen_on_documents_that_it_was_not_fitted_on(pydoc):
    split = pydoc.store.train
    (fit, fit_documents), (choice, other_documents) = laws._split_text(pydoc, 1 << 22)
    assert not {*fit_documents.ravel()} & {*other_documents.ravel()}
    np.testing.assert_array_equal(np.concatenate([fit[0], choice[0]]), split.tokens)
    np.testing.assert_array_equal(np.flatnonzero(np.diff(fit_documents[0])) + 1, split.starts[1 : fit_documents.max()])


# Statistics


def test_p_of_the_g_test_is_uniform_however_sparse_the_cells():
    rng = np.random.default_rng(0)
    for concentration, n in ((0.3, 200), (0.05, 60), (3.0, 20)):
        law = rng.dirichlet(np.full(60, concentration))
        ps = [statistics.g_test(rng.multinomial(n, law), law, draws=99, seed=i).p_value for i in range(300)]
        assert stats.kstest(ps, "uniform").pvalue > 0.01
        assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.08
    coin = [statistics.g_test(rng.multinomial(3, [0.5, 0.5]), np.ones(2), draws=99, seed=i)[1] for i in range(300)]
    assert stats.kstest(coin, "uniform").pvalue > 0.01  # ties count at random
    other = rng.dirichlet(np.full(60, 0.3))
    assert statistics.g_test(rng.multinomial(500, other), law).p_value == 1 / 2000
    assert statistics.g_test(np.array([9, 1, 0]), np.array([0.5, 0, 0.5])).statistic == np.inf
    with pytest.raises(ValueError, match="two possible cells, got one"):
        statistics.g_test(np.array([10, 0]), np.array([1.0, 0.0]))


# training_walk


def test_training_walk_follows_a_known_series_and_compiles_nothing_twice():
    sharpness = {0: 0.0, 10: 0.5, 100: 1.0}
    load = {step: markov_model(FORBIDS, 12, s) for step, s in sharpness.items()}
    subject = dataclasses.replace(exact_subject(), series=tuple(load), load_step=load.__getitem__)
    scalars = ("path_law.excess_loss", "narrowing.entropy_error")
    analyse("training_walk", subject, {"scalars": scalars})
    before = engine._mapped._cache_size()
    finding = analyse("training_walk", subject, {"scalars": scalars})
    assert engine._mapped._cache_size() == before
    values = finding.arrays["path_law.excess_loss"]
    expected = [analyse("path_law", subject.at_step(s), {"light": True}).measured["excess_loss"] for s in load]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-9)
    assert values[0] > values[1] > values[2]
    assert values[2] == pytest.approx(0, abs=1e-6)
    assert finding.measured["path_law.excess_loss.last"] == values[2]
    assert finding.null["path_law.excess_loss.last.untrained"] == values[0]
    assert finding.null["narrowing.entropy_error.last.untrained"] > 0.1
    assert list(finding.arrays["step"]) == [0, 10, 100]
    assert finding.arrays["step_shown"][0] == 5
    assert len(finding.figures) == 2


def test_training_walk_follows_law_and_beliefs_of_a_world_by_default():
    load = {0: markov_model(FORBIDS, 12, sharpness=0.5), 10: exact_subject().model}
    subject = dataclasses.replace(exact_subject(), series=(0, 10), load_step=load.__getitem__)
    finding = analyse("training_walk", subject)
    assert set(finding.null) == {"path_law.excess_loss.last.untrained", "belief_geometry.r2.last.untrained"}
    assert finding.conventions["left out"] == {}
    # The chain's belief is its last token, which the vectors of both models are.
    assert finding.measured["belief_geometry.r2.last"] > 0.999
    json.dumps(finding.to_dict(), allow_nan=False)


def test_an_analysis_that_fails_at_a_step_costs_training_walk_its_own_series_only(monkeypatch):
    def broken(subject):
        raise NotApplicable("context vectors: expected finite numbers, got NaN")

    monkeypatch.setattr("jaxwalk.analyses.belief_geometry.analyse", broken)
    load = {0: exact_subject().untrained, 5: exact_subject().model}
    finding = analyse("training_walk", dataclasses.replace(exact_subject(), series=(0, 5), load_step=load.__getitem__))
    assert set(finding.measured) == {"path_law.excess_loss.first", "path_law.excess_loss.last"}
    assert "got NaN" in finding.conventions["left out"]["belief_geometry"]


def test_training_walk_says_what_it_cannot_follow():
    subject = exact_subject()
    with pytest.raises(NotApplicable, match="at least 2 kept steps"):
        analyse("training_walk", subject)
    load = {0: subject.untrained, 5: subject.model}
    subject = dataclasses.replace(subject, series=(0, 5), load_step=load.__getitem__)
    for scalars, message in {
        ("path_law.exces_loss",): "excess_loss",
        ("pathlaw.excess_loss",): "path_law",
        ("training_walk.x",): "training_walk",
        ("path_law",): "analysis.number",
    }.items():
        with pytest.raises(ConfigError, match=message):
            analyse("training_walk", subject, {"scalars": scalars})
    on_text = dataclasses.replace(subject, world=None, store=Store(FORBIDS))
    finding = analyse("training_walk", on_text)
    assert list(finding.measured) == ["path_law.loss.first", "path_law.loss.last"]
    assert "belief_geometry" in finding.conventions["left out"]
    with pytest.raises(NotApplicable, match="no world"):
        analyse("training_walk", on_text, {"scalars": ("belief_geometry.r2",)})


# prompt


def test_prompt_finds_the_best_paths_and_the_exact_numbers():
    world, model, prompt, finding = chain("forbids"), attentive(), np.array([1, 2, 0, 1]), found_prompt()
    after = np.array(list(itertools.product(range(3), repeat=4)))
    rows = np.concatenate([np.tile(prompt, (81, 1)), after], axis=1)
    log_p = np.asarray(jax.jit(jax.vmap(functools.partial(jw.path_log_prob, given=4), (None, 0)))(model, rows), float)
    order = np.argsort(-log_p)[:5]
    np.testing.assert_array_equal(finding.arrays["top_tokens"], after[order])
    np.testing.assert_allclose(finding.arrays["top_log_probs"], log_p[order], atol=1e-5)
    assert finding.conventions["top_paths"].startswith("5 of 5")
    assert finding.measured["top_paths_mass"] == pytest.approx(np.exp(log_p[order]).sum(), rel=1e-4)
    assert finding.measured["path_entropy"] == pytest.approx(-np.sum(np.exp(log_p) * log_p), rel=1e-5)
    exact = np.array([world_probability(world, row) for row in rows]) / world_probability(world, prompt)
    exact = exact[exact > 0]
    assert finding.null["world"] == pytest.approx(-np.sum(exact * np.log(exact)), rel=1e-5)
    assert finding.null["untrained"] == pytest.approx(finding.measured["path_entropy"])
    given = world_probability(world, prompt[:1])
    truth = math.log(world_probability(world, prompt) / given)
    assert finding.null["prompt_log_prob.world"] == pytest.approx(truth, rel=1e-5)
    assert finding.measured["prompt_log_prob"] == pytest.approx(
        float(jax.jit(jw.path_log_prob)(model, prompt)), rel=1e-5
    )
    np.testing.assert_allclose(
        finding.arrays["sensitivity"], jw.context_sensitivity(model, prompt), rtol=1e-4, atol=1e-6
    )
    assert finding.arrays["sampled_tokens"].shape == (3, 4)


def test_a_search_that_finds_no_whole_path_says_so():
    finding = analyse(
        "prompt", Subject(attentive(), prompt=np.array([1, 2, 0, 1])), {"steps": 4, "k": 5, "samples": 3, "budget": 2}
    )
    assert "top_paths_mass" not in finding.measured
    assert finding.conventions["top_paths"].startswith("none")
    assert "too flat" in finding.verdict
    assert finding.arrays["top_tokens"].shape == (0, 4)
    assert len(finding.arrays["sampled_text"]) == 3
    json.dumps(finding.to_dict(), allow_nan=False)


def test_prompt_of_a_long_context_has_the_last_row_of_sensitivities_only(monkeypatch):
    monkeypatch.setattr("jaxwalk.analyses.prompt.SENSITIVITY_BUDGET", 0)
    model, prompt = attentive(), np.array([1, 2, 0, 1])
    finding = analyse("prompt", Subject(model, prompt=prompt), {"steps": 4, "k": 5, "samples": 3})
    expected = jax.jit(jw.context_sensitivity)(model, prompt)[-1:]
    np.testing.assert_allclose(finding.arrays["sensitivity"], expected, rtol=1e-4)
    assert "last context vector only" in finding.conventions["sensitivity"]
    assert list(finding.null) == [
        "uniform",
        "next_entropy.uniform",
        "prompt_log_prob.uniform",
        "top_paths_mass.uniform",
    ]


def test_prompt_steps_end_where_the_model_does_and_a_forbidden_prompt_is_said_to_be_one():
    subject = dataclasses.replace(exact_subject(), prompt=np.array([0, 2, *[1] * 10]))
    finding = analyse("prompt", subject)
    assert finding.conventions["steps"] == 1
    assert "forbids this prompt" in finding.conventions["world"]
    assert "world" not in finding.null


@pytest.mark.parametrize(
    ("prompt", "reason"), [(None, "no prompt"), ([0] * 13, "max_length"), ([5], "ids"), ([], "empty")]
)
def test_prompt_says_why_it_does_not_apply(prompt, reason):
    tokens = None if prompt is None else np.array(prompt, np.int32)
    with pytest.raises(NotApplicable, match=reason):
        analyse("prompt", dataclasses.replace(exact_subject(), prompt=tokens))


# All of them


@pytest.mark.parametrize("name", ["path_law", "prompt"])
def test_findings_are_strict_json_with_intervals_around_their_numbers(name):
    finding = found_prompt() if name == "prompt" else found(name)
    data = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
    assert all(value is not None for value in [*data["measured"].values(), *data["null"].values()])
    for key, (low, high) in data["interval"].items():
        assert low - 1e-9 <= data["measured"][key] <= high + 1e-9, key
    assert data["verdict"].endswith(".")
    assert data["conventions"]["units"]
    assert finding.figures


@pytest.mark.parametrize("name", ["path_law"])
def test_data_is_needed_and_must_fit_the_model(name):
    with pytest.raises(NotApplicable, match="a world or a text: a model without data"):
        analyse(name, Subject(model_of()))
    with pytest.raises(NotApplicable, match="3 tokens and the model 5"):
        analyse(name, Subject(model_of(), world=chain("forbids")))


def test_documents_shorter_than_the_model_are_analysed_at_their_length():
    subject = Subject(markov_model(PERSISTS, 12), store=Store(PERSISTS, document=8))
    finding = analyse("path_law", subject, {"light": True})
    assert finding.conventions["tokens_per_path"] == 7
