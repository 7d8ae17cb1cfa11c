"""Where knowledge is: by hand, by models whose knowledge is planted in their vectors, and by models that have none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.analyses import NotApplicable, Subject, organisation
from jaxwalk.evidence.engine import measure
from jaxwalk.model import Layers, plain
from tests.conftest import model_of

VOCABULARY = 8
CONFIG = jw.ModelConfig(vocab_size=VOCABULARY, max_length=8, width=16, depth=2, tied=False, positions="none")
SHAPE = {field: getattr(CONFIG, field) for field in ("vocab_size", "max_length", "width", "depth", "tied", "positions")}
MARKOV = jw.worlds.make("markov", vocab_size=VOCABULARY, seed=0)


class Uniform:
    """Independent uniform tokens."""

    name, params, vocab_size = "uniform", {}, VOCABULARY

    def sample(self, key, n, length):
        return jax.random.randint(key, (n, length), 0, VOCABULARY)


def without_layers(model):
    """The model with layers that add nothing."""
    silent = lambda linear: jax.tree.map(jnp.zeros_like, linear)
    layers = []
    for layer in model.layers:
        aggregate = dataclasses.replace(layer.aggregate, out=silent(layer.aggregate.out))
        filter = dataclasses.replace(layer.filter, down=silent(layer.filter.down))
        layers.append(dataclasses.replace(layer, aggregate=aggregate, filter=filter))
    return dataclasses.replace(model, layers=Layers.of(layers))


def planted():
    """A model of a Markov chain, of which everything is in the token and output vectors."""
    model = without_layers(plain(jw.init(CONFIG, jax.random.key(0))))
    rows = np.asarray(MARKOV.sample(jax.random.key(1), 400, 40))
    counts = np.ones((VOCABULARY, VOCABULARY))
    np.add.at(counts, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
    log_law = np.log(counts / counts.sum(axis=1, keepdims=True))
    tokens = np.eye(VOCABULARY, CONFIG.width, dtype=np.float32)
    tokens = np.concatenate([tokens[:, :VOCABULARY], -tokens[:, :VOCABULARY]], axis=1)  # whose mean is 0
    context = np.asarray(jax.vmap(model.context)(jnp.asarray(tokens)))
    outputs = jnp.asarray(np.linalg.lstsq(context, log_law, rcond=None)[0].T, jnp.float32)
    return organisation.with_tables(model, jnp.asarray(tokens), outputs, model.unembed.bias)


def test_removals_by_hand():
    model = model_of(**SHAPE)
    paths = np.asarray(MARKOV.sample(jax.random.key(0), 8, 9))
    loss = lambda model: measure(organisation.losses, model, paths)
    gates = organisation._gates(model)
    places = np.array([[-1, 0, 0], [0, 1, 3], [1, 0, 2], [2, 1, 0]], np.int32)
    without = measure(organisation.removals, model, paths, shared=(places, gates))
    np.testing.assert_allclose(without[:, 0], loss(model), rtol=1e-6)

    down = model.layers[1].filter.down
    neuron = dataclasses.replace(down, weight=down.weight.at[3].set(0))
    model_without = model.with_layer(1, filter=dataclasses.replace(model.layers[1].filter, down=neuron))
    np.testing.assert_allclose(without[:, 1], loss(model_without), rtol=1e-5)
    heads = {0: lambda A: A.at[2].set(0)}
    by_hand = [-jw.path_log_prob(model, path, mixing=heads) / 8 for path in paths]
    np.testing.assert_allclose(without[:, 2], by_hand, rtol=1e-5)
    shallow = dataclasses.replace(model, layers=Layers.of([model.layers[0]]))
    np.testing.assert_allclose(without[:, 3], loss(shallow), rtol=1e-5)


def test_orders_move_every_token_within_its_frequency():
    rng = np.random.default_rng(0)
    tokens = rng.choice(64, p=np.arange(1, 65) / np.arange(1, 65).sum(), size=(200, 40))
    counts = np.bincount(tokens.ravel(), minlength=64)
    for order in organisation._orders(tokens, 64, 0):
        assert sorted(order) == list(range(64))
        assert (order != np.arange(64)).all()
        assert np.corrcoef(counts, counts[order])[0, 1] > 0.9


def test_knowledge_in_the_vectors_is_found_there():
    subject = Subject(model=planted(), untrained=model_of(0.2, seed=7, **SHAPE), world=MARKOV, config=CONFIG)
    finding = organisation.analyse(subject, paths=64)
    assert [contrast.decision for contrast in finding.primary] == ["supported"] * 3
    assert finding.measured["without_layer"] == pytest.approx(0, abs=1e-5)
    assert finding.measured["permuted"] > 0.1
    assert {"component", "random_damage", "untrained", "retrained_vectors.fresh"} <= set(finding.null)
    assert [figure.name for figure in finding.figures] == ["damage", "transplants"]


def test_a_model_without_knowledge_supports_nothing():
    model = without_layers(plain(jw.init(CONFIG, jax.random.key(0))))
    nothing = organisation.with_tables(model, model.embed.table, jnp.zeros_like(model.embed.table), None)
    finding = organisation.analyse(Subject(model=nothing, world=Uniform()), paths=32, steps=0)
    assert [c.decision for c in finding.primary] == ["contradicted", "contradicted", "not testable here"]


def test_a_tied_model_keeps_its_output_vectors():
    model = model_of(**{**SHAPE, "tied": True})
    moved = organisation.with_tables(model, model.embed.table[::-1], model.output_vectors, None)
    np.testing.assert_array_equal(moved.output_vectors, model.output_vectors)
    np.testing.assert_array_equal(moved.token_vectors, model.token_vectors[::-1])


@pytest.mark.parametrize("aggregate", ["gru", *(pytest.param(a, marks=pytest.mark.slow) for a in ("mamba", "rwkv7"))])
def test_other_families(aggregate):
    model = model_of(**{**SHAPE, "aggregate": aggregate, "depth": 1})
    finding = organisation.analyse(Subject(model=model, world=MARKOV), paths=8, steps=0)
    assert np.isfinite(list(finding.measured.values())).all()
    assert {"without_neuron", "without_head", "without_layer"} <= set(finding.measured)


def test_what_it_makes_no_sense_for():
    with pytest.raises(NotApplicable, match="layers"):
        organisation.analyse(Subject(model=model_of(**{**SHAPE, "depth": 0}), world=MARKOV))


@pytest.mark.slow
def test_models_without_training_seldom_support_it():
    decisions = []
    for seed in range(20):
        subject = Subject(model=model_of(seed=seed, **SHAPE), untrained=model_of(0.2, seed=99, **SHAPE), world=MARKOV)
        decisions += [c.decision for c in organisation.analyse(subject, paths=32, steps=0).primary[:2]]
        fresh = plain(jw.init(CONFIG, jax.random.key(seed)))
        subject = Subject(model=fresh, world=MARKOV, config=CONFIG, seed=seed)
        decisions += [c.decision for c in organisation.analyse(subject, paths=32).primary]
    assert decisions.count("supported") <= 0.05 * len(decisions)
