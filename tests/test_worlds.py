"""Laws of the worlds. Every world that the folder holds is held to them; hidden Markov ones also to their matrices."""

import functools
import inspect
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxwalk import text, worlds
from jaxwalk.worlds import HiddenMarkov, World
from tests.conftest import quick

# A world's defaults, and where one parameter leads somewhere else, that too.
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "markov order 2": ("markov", {"order": 2, "vocab_size": 3, "seed": 1}),
    "markov order 0": ("markov", {"order": 0, "vocab_size": 3}),
    "tom_quantum projective": ("tom_quantum", {"alpha": 1.0, "beta": 1.0}),
    "golden_mean p=0.1": ("golden_mean", {"p": 0.1}),
    "associative_recall small": ("associative_recall", {"keys": 2, "values": 2}),
    "induction small": ("induction", {"vocab_size": 3, "noise": 0.3}),
    "induction without noise": ("induction", {"vocab_size": 3, "noise": 0}),
    "copy_after_delay small": ("copy_after_delay", {"letters": 2, "string": 1, "delay": 1}),
    "grammar small": ("grammar", {"rules": {"S": [[0.3, "S S"], [0.2, "a S b"], [0.5, "a"]]}}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in worlds.names()} | EXTRA


@functools.cache
def world_of(case: str) -> Any:
    name, params = CASES[case]
    return worlds.make(name, **params)


# Hidden Markov worlds whose paths start in a state of their own, not as if they had always run.
STARTS_SOMEWHERE = {"dyck"}
HIDDEN = [case for case in CASES if isinstance(world_of(case), HiddenMarkov)]
# For what depends on the code alone: ordinary, with impossible paths, generalised.
each_kind = pytest.mark.parametrize(
    "world",
    ["mess3", "golden_mean", "fanizza", "associative_recall small", "induction small", "grammar small"],
    indirect=True,
)


@functools.lru_cache(maxsize=1)
def samples_of(world: World) -> np.ndarray:
    """Four long paths of a world, drawn once: compiling is most of what sampling takes."""
    return np.asarray(world.sample(jax.random.key(2), 4, 1000))


# Each way in which a world is written; the slow tests hold all of them to the laws.
QUICK = {
    "associative_recall small",
    "copy_after_delay small",
    "dyck",
    "fanizza",
    "golden_mean",
    "grammar small",
    "induction small",
    "markov order 2",
    "mess3",
    "parity",
    "rrxor",
    "tom_quantum projective",
}


@pytest.fixture(params=quick(QUICK, CASES), scope="module")
def world(request):
    return world_of(request.param)


@pytest.fixture(params=quick(QUICK, HIDDEN), scope="module")
def hidden(request):
    return world_of(request.param)


@functools.lru_cache(maxsize=1)
def enumerated(world: World) -> tuple[np.ndarray, np.ndarray]:
    """All paths of a length, and their log-probabilities in float64."""
    paths = all_paths(world.vocab_size, longest(world.vocab_size))
    with jax.enable_x64(True):
        return paths, np.asarray(jax.vmap(world.path_log_prob)(paths))


def all_paths(vocab_size: int, length: int) -> np.ndarray:
    return np.array(list(itertools.product(range(vocab_size), repeat=length)), int).reshape(-1, length)


def longest(vocab_size: int, paths: int = 1500) -> int:
    return int(np.log(paths) / np.log(vocab_size))


def product_prob(world: HiddenMarkov, path) -> float:
    """pi T^(v_1) .. T^(v_T) w, by its definition, in float64."""
    return functools.reduce(lambda b, v: b @ world.transitions[v], path, world.initial) @ world.functional


def hidden_path_prob(world: HiddenMarkov, path) -> float:
    """The same as an explicit sum over all paths of hidden states."""
    total = 0.0
    for states in itertools.product(range(world.num_states), repeat=len(path) + 1):
        prob = world.initial[states[0]]
        for v, i, j in zip(path, states, states[1:], strict=False):
            prob *= world.transitions[v, i, j]
        total += prob * world.functional[states[-1]]
    return total


def is_stationary(world: HiddenMarkov) -> bool:
    return np.allclose(world.initial @ world.transitions.sum(0), world.initial, rtol=0, atol=1e-9)


def exact_prob(world: World, path) -> float:
    """Of a short path: by the matrices where there are any."""
    if isinstance(world, HiddenMarkov):
        return product_prob(world, path)
    with jax.enable_x64(True):
        return float(jnp.exp(world.path_log_prob(np.asarray(path))))


def laws_of(world: World) -> list[Any]:
    """The methods that take the tokens of a path."""
    return [world.path_log_prob, world.next_log_probs, *([world.beliefs] if isinstance(world, HiddenMarkov) else [])]


def exact_log_prob(world: HiddenMarkov, path) -> float:
    """log P of a long path, in float64, rescaled by the largest entry: not the way the library does it."""
    vector, log_scale = world.initial.copy(), 0.0
    for v in path:
        vector = vector @ world.transitions[v]
        size = np.abs(vector).max()
        vector, log_scale = vector / size, log_scale + np.log(size)
    return log_scale + np.log(vector @ world.functional)


def binary_entropy(p: float) -> float:
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


# The path law.


def test_path_law_is_a_law(world):
    paths, log_probs = enumerated(world)
    assert log_probs.dtype == np.float64
    assert not np.isnan(log_probs).any()
    assert abs(np.exp(log_probs).sum() - 1) < 1e-9
    single = np.asarray(jax.vmap(world.path_log_prob)(paths))
    assert single.dtype == np.float32
    assert abs(np.exp(single).sum() - 1) < 1e-5
    np.testing.assert_array_equal(np.isneginf(single), np.isneginf(log_probs))


def test_next_step_laws_are_those_of_the_paths(world):
    """Sums over all that may follow, so that a law of one step is held to the law of whole paths."""
    paths, log_probs = enumerated(world)
    V, T = world.vocab_size, paths.shape[1]
    probs = np.exp(log_probs).reshape((V,) * T)
    prefixes = [probs.sum(tuple(range(t, T))) for t in range(T + 1)]
    path = paths[np.argmax(log_probs)]
    with jax.enable_x64(True):
        steps = np.exp(np.asarray(world.next_log_probs(path)))
    for t in range(T):
        before = tuple(path[:t])
        np.testing.assert_allclose(steps[t], prefixes[t + 1][before] / prefixes[t][before], atol=1e-9)
    np.testing.assert_allclose(steps.sum(1), 1, atol=1e-9)


def test_path_law_is_that_of_the_matrices(hidden):
    paths, log_probs = enumerated(hidden)
    expected = np.array([product_prob(hidden, path) for path in paths])
    np.testing.assert_allclose(np.exp(log_probs), expected, atol=1e-13)
    possible = expected > 1e-9
    np.testing.assert_allclose(log_probs[possible], np.log(expected[possible]), atol=1e-9)


def test_path_law_is_a_sum_over_hidden_paths(hidden):
    path = samples_of(hidden)[0, :3]
    assert np.log(product_prob(hidden, path)) == pytest.approx(np.log(hidden_path_prob(hidden, path)), abs=1e-9)


def test_long_paths_stay_finite_and_accurate_in_float32(hidden):
    # Worlds that lose more than 1.02 nats a token end where float32 itself is spaced by more than 1e-4.
    paths = samples_of(hidden)
    expected = np.array([exact_log_prob(hidden, path) for path in paths])
    assert np.isfinite(expected).all(), "an impossible path was sampled"
    got = np.asarray(jax.vmap(hidden.path_log_prob)(paths))
    assert got.dtype == np.float32
    assert (np.abs(got - expected) < np.maximum(1e-4, np.spacing(np.abs(got)))).all()
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.vmap(hidden.path_log_prob)(paths), expected, atol=1e-9)


@pytest.mark.parametrize("world", quick(QUICK, [case for case in CASES if case not in HIDDEN]), indirect=True)
def test_float32_agrees_with_float64(world):
    paths = samples_of(world)[:, :32]
    got = np.asarray(jax.vmap(world.path_log_prob)(paths))
    assert got.dtype == np.float32
    with jax.enable_x64(True):
        expected = np.asarray(jax.vmap(world.path_log_prob)(paths))
    assert np.isfinite(expected).all(), "an impossible path was sampled"
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_constant_paths_stay_accurate_in_float32():
    # The belief comes to rest, so rounding repeats instead of averaging out.
    for case, token in {"mess3": 0, "sns": 0, "even_process": 1, "random_hmm": 0, "leaky_rrxor": 1}.items():
        path = np.full(1000, token)
        assert float(world_of(case).path_log_prob(path)) == pytest.approx(
            exact_log_prob(world_of(case), path), abs=1e-4, rel=1e-7
        )


@each_kind
def test_chain_rule(world):
    path = samples_of(world)[1, :12]
    with jax.enable_x64(True):
        whole = world.path_log_prob(path)
        steps = np.asarray(world.next_log_probs(path))
        for given in (0, 3, 12):
            rest = world.path_log_prob(path, given=given)
            assert float(world.path_log_prob(path[:given]) + rest) == pytest.approx(float(whole), abs=1e-9)
            assert float(rest) == pytest.approx(steps[np.arange(given, 12), path[given:]].sum(), abs=1e-9)
        np.testing.assert_allclose(np.exp(steps).sum(1), 1, atol=1e-9)


def test_beliefs(hidden):
    path = samples_of(hidden)[2, :12]
    with jax.enable_x64(True):
        beliefs = np.asarray(hidden.beliefs(path))
        steps = np.asarray(hidden.next_log_probs(path))
    assert beliefs.shape == (13, hidden.num_states)
    np.testing.assert_allclose(beliefs @ hidden.functional, 1, atol=1e-9)
    np.testing.assert_allclose(beliefs[0], hidden.initial, atol=1e-12)
    assert is_stationary(hidden) == (hidden.name not in STARTS_SOMEWHERE)
    np.testing.assert_allclose(
        np.exp(steps), np.einsum("ti,vij,j->tv", beliefs, hidden.transitions, hidden.functional), atol=1e-12
    )


@pytest.mark.parametrize(
    ("case", "path"),
    [
        ("golden_mean", [0, 1, 1, 0]),
        ("rrxor", [0, 0, 0, 1, 1, 1, 1, 1]),
        ("z1r", [0, 0, 0]),
        ("associative_recall small", [0, 2, 1, 2, 0, 3, 1, 2]),  # another value
        ("associative_recall small", [0, 2, 1, 0, 1, 2]),  # a key where a value is due
        ("associative_recall small", [0, 2, 3, 2, 1, 2]),  # a value where a key is due
        ("induction without noise", [0, 1, 2, 0, 2, 1]),
        ("grammar small", [0, 0, 2, 1, 0, 2]),  # a sentence that begins with b
    ],
)
def test_impossible_paths(case, path):
    world = world_of(case)
    first = next(t for t in range(1, len(path) + 1) if exact_prob(world, path[:t]) < 1e-12)
    path = np.array(path)
    assert float(world.path_log_prob(path)) == -np.inf
    assert float(world.path_log_prob(path, given=len(path) - 1)) == -np.inf
    steps = np.asarray(world.next_log_probs(path))
    assert not np.isnan(steps[:first]).any()
    assert np.isnan(steps[first:]).all()
    assert steps[first - 1, path[first - 1]] == -np.inf
    if isinstance(world, HiddenMarkov):
        beliefs = np.asarray(world.beliefs(path))
        assert np.isfinite(beliefs[:first]).all()
        assert np.isnan(beliefs[first:]).all()


def test_impossible_next_tokens_of_a_generalised_world_are_impossible_in_float32():
    world = world_of("tom_quantum projective")
    for path in all_paths(4, 3):
        assert np.isneginf(world.path_log_prob(path)) == (product_prob(world, path) < 1e-12)


def test_supports():
    ones = [path for path in all_paths(2, 6) if product_prob(world_of("golden_mean"), path) > 0]
    assert len(ones) == 21  # a Fibonacci number
    assert not any((path[1:] & path[:-1]).any() for path in ones)
    start = worlds.rrxor().transitions
    rrxor = HiddenMarkov(start, initial=[1, 0, 0, 0, 0])
    for path in all_paths(2, 3):
        assert product_prob(rrxor, path) == (0.25 if path[2] == path[0] ^ path[1] else 0)


def test_markov_is_its_table():
    table = np.random.default_rng(5).dirichlet(np.ones(3), (3, 3))
    world = worlds.markov(order=2, table=table)
    path = np.array([2, 0, 1, 1, 2, 0, 0])
    expected = sum(np.log(table[path[t - 2], path[t - 1], path[t]]) for t in range(2, 7))
    assert float(world.path_log_prob(path, given=2)) == pytest.approx(expected, abs=1e-5)
    beliefs = np.asarray(world.beliefs(path))
    np.testing.assert_allclose(beliefs[2:].argmax(1), 3 * path[:-1] + path[1:])
    np.testing.assert_allclose(beliefs[2:].max(1), 1, atol=1e-6)
    started = worlds.markov(order=1, table=[[0, 1], [1, 0]], initial=[1, 0])
    assert float(started.path_log_prob(np.array([1, 0, 1]))) == 0


@pytest.mark.parametrize(("vocab_size", "noise"), [(2, 0.3), (3, 0.1), (3, 0), (2, 1)])
def test_induction_is_a_mean_over_all_maps(vocab_size, noise):
    maps = all_paths(vocab_size, vocab_size)
    step = (1 - noise) * (maps[:, :, None] == np.arange(vocab_size)) + noise / vocab_size  # [maps, from, to]
    paths = all_paths(vocab_size, 6 if vocab_size == 2 else 5)
    given_map = np.prod(step[:, paths[:, :-1], paths[:, 1:]], axis=2)
    expected = given_map.mean(0) / vocab_size
    with jax.enable_x64(True):
        got = np.exp(np.asarray(jax.vmap(worlds.induction(vocab_size, noise).path_log_prob)(paths)))
    np.testing.assert_allclose(got, expected, atol=1e-14)


def test_associative_recall_is_a_mean_over_all_maps():
    K, W = 2, 3
    paths = all_paths(K + W, 5)
    maps = all_paths(W, K)
    expected = np.zeros(len(paths))
    for values in maps:
        prob = np.ones(len(paths))
        for t in range(5):
            key = paths[:, t] < K
            right = paths[:, t] == K + values[np.minimum(paths[:, t - 1], K - 1)]
            prob *= (key / K) if t % 2 == 0 else (~key & right)
        expected += prob / len(maps)
    with jax.enable_x64(True):
        got = np.exp(np.asarray(jax.vmap(worlds.associative_recall(K, W).path_log_prob)(paths)))
    np.testing.assert_allclose(got, expected, atol=1e-14)
    assert worlds.associative_recall(1, 2).symbols == ("k0", "v0", "v1")


# Transformations.


@each_kind
def test_batch_is_loop_is_jit(world):
    paths = world.sample(jax.random.key(6), 5, 9)
    for law in laws_of(world):
        batched = np.asarray(jax.vmap(law)(paths))
        np.testing.assert_allclose(batched, np.stack([law(path) for path in paths]), atol=1e-5)
        np.testing.assert_allclose(batched, jax.jit(jax.vmap(law))(paths), atol=1e-5)


@pytest.mark.parametrize("world", ["mess3", "grammar small"], indirect=True)
def test_world_is_an_argument_or_a_constant_under_jit(world):
    path = jnp.array([0, 2, 1])
    as_argument = jax.jit(lambda w, t: w.path_log_prob(t))(world, path)
    assert float(as_argument) == pytest.approx(float(world.path_log_prob(path)))
    assert jax.tree.leaves(world) == []
    keys = jax.random.split(jax.random.key(0), 2)
    batches = jax.jit(jax.vmap(lambda key: world.sample(key, 3, 4)))(keys)
    np.testing.assert_array_equal(batches[1], world.sample(keys[1], 3, 4))


@each_kind
def test_empty_path(world):
    nothing = np.zeros(0, int)
    assert float(world.path_log_prob(nothing)) == 0
    if isinstance(world, HiddenMarkov):
        assert world.beliefs(nothing).shape == (1, world.num_states)
    assert world.next_log_probs(nothing).shape == (1, world.vocab_size)
    assert world.sample(jax.random.key(0), 2, 0).shape == (2, 0)


# Samples.


def test_sample_frequencies(world):
    n, length = 20_000, min(longest(world.vocab_size, 100), 5)
    samples = world.sample(jax.random.key(7), n, length)
    assert samples.dtype == jnp.int32
    assert samples.shape == (n, length)
    paths = all_paths(world.vocab_size, length)
    probs = np.array([exact_prob(world, path) for path in paths])
    counts = np.bincount(
        np.ravel_multi_index(tuple(np.asarray(samples).T), (world.vocab_size,) * length), minlength=len(paths)
    )
    assert counts[probs < 1e-12].sum() == 0
    likely = n * probs >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(n * probs[likely], n * probs[~likely].sum())
    observed, expected = observed[expected > 1e-6], expected[expected > 1e-6]
    assert stats.power_divergence(observed, expected * n / expected.sum(), lambda_="log-likelihood").pvalue > 1e-3


# What an observer loses.


@pytest.mark.parametrize(
    ("case", "rate"),
    [
        ("golden_mean", 2 / 3 * np.log(2)),
        ("golden_mean p=0.1", binary_entropy(0.1) / 1.1),
        ("even_process", 2 / 3 * np.log(2)),
        ("rrxor", 2 / 3 * np.log(2)),
        ("z1r", np.log(2) / 3),
        ("mess3", 0.793457),
    ],
)
def test_known_entropy_rates(case, rate):
    assert float(world_of(case).entropy_rate()) == pytest.approx(rate, abs=1e-6)


def test_entropy_rate_of_independent_tokens_is_their_entropy():
    world = worlds.markov(order=0, table=[0.2, 0.3, 0.5])
    assert float(world.entropy_rate()) == pytest.approx(stats.entropy([0.2, 0.3, 0.5]), abs=1e-6)
    np.testing.assert_allclose(world.ideal_loss(3), stats.entropy([0.2, 0.3, 0.5]), atol=1e-6)


def test_entropy_rates_of_renewal_processes():
    """Their rate is the entropy of a run's length over the mean of it, with the token that ends it."""
    runs = np.array([0.49**n * (1 - np.cos(n * 2000.0)) / 2 for n in range(200)])
    runs[0] = 1 - runs[1:].sum()
    expected = stats.entropy(runs) / (runs @ np.arange(1, 201))
    assert float(world_of("fanizza").entropy_rate()) == pytest.approx(expected, abs=1e-6)
    runs = np.array([n * 0.5 ** (n + 1) for n in range(200)])  # of zeros: two waits, the last ends in the 1
    expected = stats.entropy(runs) / (runs @ np.arange(1, 201))
    assert float(world_of("sns").entropy_rate()) == pytest.approx(expected, abs=1e-6)


def test_entropy_rate_of_a_chain_that_does_not_mix():
    """Two coins, one picked for ever: the rate is the mean of theirs under `initial`."""
    coins = np.zeros((2, 2, 2))
    coins[1] = np.diag([0.5, 0.1])
    coins[0] = np.diag([0.5, 0.9])
    world = HiddenMarkov(coins, initial=[0.25, 0.75])
    expected = 0.25 * np.log(2) + 0.75 * binary_entropy(0.1)
    assert float(world.entropy_rate()) == pytest.approx(expected, abs=1e-6)


def test_ideal_loss_is_that_of_all_paths(hidden):
    length = longest(hidden.vocab_size)
    expected = []
    for t in range(length):
        joint = np.array([product_prob(hidden, path) for path in all_paths(hidden.vocab_size, t + 1)])
        joint = np.maximum(joint.reshape(-1, hidden.vocab_size), 0)
        expected.append(stats.entropy(joint.ravel()) - stats.entropy(joint.sum(1)))
    losses = np.asarray(hidden.ideal_loss(length))
    np.testing.assert_allclose(losses, expected, atol=2e-6)
    assert (np.diff(losses) < 1e-5).all() >= is_stationary(hidden)  # where the past never hurts


def test_merging_beliefs_costs_no_more_than_it_says():
    world = world_of("mess3")
    exact = np.asarray(world.ideal_loss(9, max_beliefs=10_000))
    merged = np.asarray(world.ideal_loss(9, tol=1e-3, max_beliefs=500))
    assert (merged - exact > -1e-6).all()
    assert (merged - exact < 1e-3).all()
    assert float(merged[-1]) >= world.entropy_rate_bounds(1e-4).low
    with pytest.raises(ValueError, match="estimate_ideal_loss"):
        world.ideal_loss(9, tol=1e-6, max_beliefs=500)


def test_ideal_loss_tends_to_the_entropy_rate():
    for case in ("mess3", "sns", "days_of_week", "markov order 2"):
        world = world_of(case)
        last = float(world.ideal_loss(11)[-1])
        assert last == pytest.approx(float(world.entropy_rate()), abs=3e-4)


def test_estimates_agree_with_the_exact_values():
    exact = np.asarray(world_of("mess3").ideal_loss(8))
    value, error = world_of("mess3").estimate_ideal_loss(jax.random.key(9), 8, n=2000)
    assert value.shape == error.shape == (8,)
    assert (np.abs(value - exact) < 4.5 * error + 1e-6).all()
    value, error = world_of("sns").estimate_entropy_rate(jax.random.key(10), n=64, length=300, burn_in=50)
    assert 0 < float(error) < 0.01
    assert abs(float(value) - float(world_of("sns").entropy_rate())) < 4.5 * float(error)
    # Where no bounds are to be had, the message names the estimate, and the estimate is below the upper bound.
    quantum = world_of("tom_quantum")
    with pytest.raises(ValueError, match="estimate_entropy_rate"):
        quantum.entropy_rate()
    value, error = quantum.estimate_entropy_rate(jax.random.key(11), n=64, length=100, burn_in=50)
    assert float(value) < quantum.entropy_rate_bounds().high + 4.5 * float(error)


# Refusals.


@each_kind
def test_token_ids_out_of_range(world):
    for bad in ([0, world.vocab_size], [-1, 0]):
        for law in laws_of(world):
            with pytest.raises(ValueError, match=rf"expected ids 0 to {world.vocab_size - 1}, got"):
                law(np.array(bad))
        traced = jnp.array(bad)
        first = bad.index(next(v for v in bad if not 0 <= v < world.vocab_size))
        assert np.isnan(jax.jit(world.path_log_prob)(traced))
        rows = np.asarray(jax.jit(world.next_log_probs)(traced))
        assert np.isnan(rows[first + 1 :]).all()
        assert not np.isnan(rows[: first + 1]).any()
        if isinstance(world, HiddenMarkov):
            assert np.isnan(jax.jit(world.beliefs)(traced)[first + 1 :]).all()
            assert np.isfinite(jax.jit(world.beliefs)(traced)[: first + 1]).all()


@pytest.mark.parametrize(("case", "path"), [("golden_mean", [1, 1, 7]), ("associative_recall small", [0, 0, 7])])
def test_an_impossible_path_does_not_hide_an_id_out_of_range(case, path):
    assert np.isnan(jax.jit(world_of(case).path_log_prob)(jnp.array(path)))


COIN = [[[0.5]], [[0.5]]]
FLIP = [[[0.5, 0.0], [0.0, 0.5]], [[0.0, 0.5], [0.5, 0.0]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transitions": [[0.5, 0.5]]}, r"expected shape \[vocab_size, states, states\], got \[1, 2\]"),
        ({"transitions": np.zeros((2, 2, 3))}, r"got \[2, 2, 3\]"),
        ({"transitions": np.zeros((0, 2, 2))}, r"got \[0, 2, 2\]"),
        ({"transitions": "mess3"}, "expected an array of real numbers"),
        ({"transitions": [[[0.5]], [[np.nan]]]}, r"finite numbers, got nan at \[1, 0, 0\]"),
        ({"transitions": [[[1.5]], [[-0.5]]]}, r"no negative entry, got -0.5 at \[1,0,0\].*functional"),
        ({"transitions": [[[0.5]], [[0.49]]]}, "sum to 1, got 0.99 for state 0.*Divide"),
        ({"transitions": COIN, "functional": [1, 1]}, r"functional: expected shape \[1\]"),
        ({"transitions": FLIP, "functional": [1, 2]}, r"\(sum over tokens of T\) w = w"),
        ({"transitions": FLIP, "initial": [0.5, 0.4]}, "probabilities that sum to 1, got 0.9"),
        ({"transitions": FLIP, "initial": [1.5, -0.5]}, "expected probabilities, got -0.5 for state 1"),
        ({"transitions": FLIP, "initial": [1, 0, 0]}, r"initial: expected shape \[2\]"),
        ({"transitions": FLIP, "functional": [2, 2], "initial": [0.5, 0.5]}, "initial . functional = 1, got 2"),
        ({"transitions": [np.eye(2) / 2, np.eye(2) / 2]}, "reducible .state 1 cannot be reached from state 0"),
        ({"transitions": [np.eye(2) / 2] * 2, "functional": [1, 1]}, "no unique stationary belief"),
        ({"transitions": [[[0.5, 0.5], [0, 1]]]}, r"reducible.*stationary law.* is \[0.0, 1.0\]"),
        (
            {"transitions": [[[1.5]], [[-0.5]]], "functional": [1]},
            r"negative path probability, got -0.5 for the path \[1\]",
        ),
        ({"transitions": COIN, "symbols": ("a",)}, "expected 2 different ones"),
        ({"transitions": COIN, "symbols": ("a", "a")}, "expected 2 different ones"),
    ],
)
def test_matrices_that_are_no_process_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiddenMarkov(**arguments)


def test_negative_path_probabilities_are_found_up_to_the_stated_length():
    # n turns by 0.5 have probability 0.9^n (1 + 1.2 cos(n/2)) / 2.2, which is negative for n = 6 first.
    cos, sin = np.cos(0.5), np.sin(0.5)
    turn = 0.9 * np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    w = np.array([1.0, 1.0, 0.0])
    stop = np.zeros((3, 3))
    stop[:, 0] = w - turn @ w
    world = functools.partial(HiddenMarkov, [turn, stop], initial=np.array([1, 1.2, 0]) / 2.2, functional=w)
    assert world(check_length=5).checked_length == 5
    for check_length in (6, 7):
        with pytest.raises(ValueError, match=r"negative path probability, got -0.0454119 for the path \[0(, 0){5}\]"):
            world(check_length=check_length)


def test_checked_length_is_stated():
    assert world_of("mess3").checked_length is None
    assert world_of("fanizza").checked_length == 16
    t, w = world_of("fanizza").transitions, world_of("fanizza").functional
    assert HiddenMarkov(t, functional=w, check_length=5).checked_length == 5
    with pytest.raises(ValueError, match="check_length: expected at least 1, got 0"):
        HiddenMarkov(t, functional=w, check_length=0)


def test_bad_arguments_are_refused():
    world = world_of("mess3")
    with pytest.raises(ValueError, match="given: expected 0 to 2"):
        world.path_log_prob(np.array([0, 1]), given=3)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        world._tokens(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="integer token ids, got float"):
        world._tokens(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="n: expected at least 0, got -1"):
        world.sample(jax.random.key(0), -1, 3)


# The room.


def test_worlds_are_functions_and_remember_how_to_be_rebuilt(world):
    assert callable(getattr(worlds, world.name))
    again = worlds.make(world.name, **json.loads(json.dumps(dict(world.params))))
    if isinstance(world, HiddenMarkov):
        np.testing.assert_array_equal(again.transitions, world.transitions)
    else:
        path = samples_of(world)[0, :8]
        np.testing.assert_array_equal(again.next_log_probs(path), world.next_log_probs(path))
    assert dict(again.params) == dict(world.params)
    vocabulary, everything = text.SymbolVocabulary(world.symbols), np.arange(world.vocab_size)
    np.testing.assert_array_equal(vocabulary.encode(vocabulary.decode(everything)), everything)
    assert world.name in repr(world)


def test_params_hold_every_default():
    assert dict(worlds.mess3(a=0.6).params) == {"x": 0.05, "a": 0.6}
    for name in worlds.names():
        given = set(worlds.make(name).params)
        assert given == set(inspect.signature(getattr(worlds, name)).parameters) - {"table", "initial"}
    # An array goes in as plain data, and what a table replaces is left out.
    world = worlds.markov(order=1, table=np.eye(2)[::-1], initial=(1, 0))
    assert dict(world.params) == {"order": 1, "table": [[0, 1], [1, 0]], "initial": [1, 0]}


def test_the_worlds_that_others_compare_with_are_there():
    expected = (
        "mess3 z1r rrxor golden_mean even_process sns days_of_week leaky_rrxor random_hmm markov fanizza tom_quantum "
        "associative_recall induction grammar copy_after_delay parity dyck"
    )
    assert set(expected.split()) <= set(worlds.names())


def test_make_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"unknown world 'mes3'\. Did you mean 'mess3'\?"):
        worlds.make("mes3")
    with pytest.raises(ValueError, match=r"unknown parameter of world 'rrxor' 'p3'\. Choices: p1, p2"):
        worlds.make("rrxor", p3=0.5)
    with pytest.raises(ValueError, match="expected no parameters, got 'x'"):
        worlds.make("days_of_week", x=1)
    with pytest.raises(ValueError, match=r"world 'mess3': expected 0 < x <= 1/2.*got x=0.7"):
        worlds.make("mess3", x=0.7)
    with pytest.raises(ValueError, match="world 'z1r'"):
        worlds.make("z1r", p="half")
    with pytest.raises(ValueError, match=r"world 'induction': expected vocab_size >= 2 and 0 <= noise <= 1, got.*1.5"):
        worlds.make("induction", noise=1.5)
    with pytest.raises(ValueError, match="world 'associative_recall': expected at least 1 of each, got keys=0"):
        worlds.make("associative_recall", keys=0)
    with pytest.raises(AttributeError, match="Did you mean 'mess3'"):
        _ = worlds.mess4
