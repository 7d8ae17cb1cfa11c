"""Mixtures of hidden Markov worlds: the posterior over tasks by Bayes' rule, and observers who know less."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxwalk import worlds
from jaxwalk.config import ConfigError
from jaxwalk.worlds.mixture import Mixture

CASES = {
    "default": {},
    "unequal": {
        "tasks": [["mess3", {}], ["mess3", {"x": 0.2, "a": 0.6}], ["mess3", {"x": 0.4, "a": 0.9}]],
        "weights": [0.5, 0.3, 0.2],
    },
    "forbidding": {"tasks": [["golden_mean", {}], ["even_process", {}]]},
    "generalised": {"tasks": [["tom_quantum", {}], ["random_hmm", {"vocab_size": 4}]]},
}


@functools.cache
def world_of(case):
    return worlds.make("mixture", **CASES[case])


@functools.cache
def paths_of(case):
    return np.asarray(world_of(case).sample(jax.random.key(3), 12, 10))


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return request.param


def test_the_law_of_a_path_is_the_weighted_sum_of_those_of_its_tasks(case):
    world = world_of(case)
    log_p = jax.vmap(world.path_log_prob)(paths_of(case))
    parts = [np.exp(jax.vmap(component.path_log_prob)(paths_of(case))) for component in world.components]
    np.testing.assert_allclose(np.exp(log_p), world.weights @ parts, rtol=1e-4)


def test_the_posterior_over_tasks_is_that_of_bayes_rule(case):
    world, paths = world_of(case), paths_of(case)
    posterior = np.asarray(jax.vmap(world.task_posterior)(paths))
    np.testing.assert_allclose(posterior[:, 0], np.tile(world.weights, (len(paths), 1)), rtol=1e-6)
    np.testing.assert_allclose(posterior.sum(-1), 1, rtol=1e-5)
    for t in (1, 4, 10):
        likelihood = [np.exp(jax.vmap(component.path_log_prob)(paths[:, :t])) for component in world.components]
        joint = world.weights[:, None] * np.array(likelihood)
        np.testing.assert_allclose(posterior[:, t], (joint / joint.sum(0)).T, rtol=1e-3, atol=1e-5)


def test_the_next_token_is_predicted_by_the_posterior_mean_of_the_tasks_laws(case):
    world, paths = world_of(case), paths_of(case)
    laws = np.exp(jax.vmap(world.task_log_probs)(paths))  # [n, K, T+1, V]
    posterior = np.asarray(jax.vmap(world.task_posterior)(paths))
    mean = np.einsum("ntk,nktv->ntv", posterior, np.nan_to_num(laws))
    np.testing.assert_allclose(mean, np.exp(jax.vmap(world.next_log_probs)(paths)), rtol=1e-4, atol=1e-6)


def test_an_observer_of_the_last_tokens_knows_the_tokens_of_a_window_only(case):
    world, paths = world_of(case), paths_of(case)
    exact = np.asarray(jax.vmap(world.next_log_probs)(paths))
    windowed = lambda k: np.exp(jax.vmap(functools.partial(world.windowed_log_probs, k=k))(paths))
    np.testing.assert_allclose(windowed(10), np.exp(exact), rtol=1e-4, atol=1e-6)
    two = windowed(2)
    np.testing.assert_allclose(two[:, :3], np.exp(exact[:, :3]), rtol=1e-4, atol=1e-6)
    # By the law of the whole process: P(v_8 | v_6 v_7), summed over all that may have come before.
    start = world.initial @ np.linalg.matrix_power(world.transitions.sum(0), 5)
    for path, law in zip(paths, two[:, 7], strict=True):
        belief = start @ world.transitions[path[5]] @ world.transitions[path[6]]
        expected = world.transitions @ world.functional @ belief / (belief @ world.functional)
        np.testing.assert_allclose(law, expected, rtol=1e-4, atol=1e-6)


def test_a_path_stays_in_its_task():
    world = world_of("unequal")
    np.testing.assert_array_equal(world.tasks, np.repeat([0, 1, 2], 3))
    across = world.tasks[:, None] != world.tasks
    assert not world.transitions[:, across].any()
    long = np.asarray(world.sample(jax.random.key(0), 64, 400))
    posterior = np.asarray(jax.vmap(world.task_posterior)(long))[:, -1]
    assert (posterior.max(1) > 0.9).mean() > 0.9
    assert abs((posterior.argmax(1) == 0).mean() - 0.5) < 0.25


def test_it_is_rebuilt_from_json():
    world = world_of("unequal")
    again = worlds.make(world.name, **json.loads(json.dumps(dict(world.params))))
    assert isinstance(again, Mixture)
    np.testing.assert_array_equal(again.initial, world.initial)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": [["mess3", {}], ["z1r", {}]]}, "same tokens"),
        ({"tasks": [["mess3", {}]], "weights": [0.5]}, "1 positive weights that sum to 1"),
        ({"tasks": [["mess3", {}]], "weights": [0.5, 0.5]}, "1 positive weights"),
        ({"tasks": [["grammar", {}]]}, "expected hidden Markov worlds, got 'grammar'"),
        ({"tasks": [["mess4", {}]]}, "Did you mean 'mess3'"),
    ],
)
def test_what_is_no_mixture(params, message):
    with pytest.raises(ConfigError, match=message):
        worlds.make("mixture", **params)
