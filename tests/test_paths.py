"""Laws of paths: probabilities that sum to one, samples of the law, exact search, estimates that say their error."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxwalk as jw
from jaxwalk import paths as paths_module
from jaxwalk.paths import Paths, altered_law, continuations, enumerated_log_probs, step_log_probs
from tests.conftest import float64, model_of, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

V, M = 3, 6
PROMPT = np.array([1, 0])


def model(seed=0, **choices):
    return model_of(**{"seed": seed, "scale": 0.3, "vocab_size": V, "max_length": M, "unembed_bias": True, **choices})


@functools.cache
def exact(steps, seed=0, vocab_size=V):
    """Every continuation of PROMPT and its log-probability, from the next-step laws of whole paths: brute force."""
    rows = np.array(list(itertools.product(range(vocab_size), repeat=steps)))
    full = np.concatenate([np.broadcast_to(PROMPT, (len(rows), 2)), rows], 1)
    laws = np.array(jax.jit(jax.vmap(jw.next_log_probs, (None, 0)))(model(seed, vocab_size=vocab_size), full[:, :-1]))
    picked = np.take_along_axis(laws, full[:, 1:, None], 2)[..., 0]
    return rows, picked[:, 1:].sum(1)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        pytest.param({"aggregate": "causal_mean", "tied": True}, marks=pytest.mark.slow),
        pytest.param({"placement": "parallel"}, marks=pytest.mark.slow),
    ],
)
def test_probabilities_of_all_paths_sum_to_one(choices):
    total = jax.jit(lambda m: jnp.exp(enumerated_log_probs(m, PROMPT, 5)[1]).sum())  # 7 = max_length + 1 tokens
    np.testing.assert_allclose(total(model(**choices)), 1, atol=1e-5)
    with float64():
        np.testing.assert_allclose(total(to64(model(**choices))), 1, atol=1e-6)


def test_a_path_is_the_product_of_its_steps():
    tokens = np.array([1, 0, 2, 2, 1, 0, 1])  # max_length + 1: the last is scored, not walked
    m = model()
    laws = jax.jit(jw.next_log_probs)(m, tokens[:-1])
    steps = np.array(laws)[np.arange(6), tokens[1:]]
    np.testing.assert_allclose(jax.jit(step_log_probs)(m, tokens), steps, atol=1e-5)
    for given in (1, 3, 7):
        score = jax.jit(functools.partial(jw.path_log_prob, given=given))(m, tokens)
        np.testing.assert_allclose(score, steps[given - 1 :].sum(), atol=1e-5)
    batch = jax.jit(jax.vmap(jw.path_log_prob, (None, 0)))(m, np.stack([tokens, tokens[::-1]]))
    np.testing.assert_allclose(batch[0], steps.sum(), atol=1e-5)
    each_given = jax.vmap(jw.path_log_prob, (None, None, 0))(m, tokens, np.array([1, 3, 7, 8]))
    np.testing.assert_allclose(each_given, [steps.sum(), steps[2:].sum(), 0, np.nan], atol=1e-5)
    np.testing.assert_allclose(jw.path_log_prob(m, tokens.tolist()), steps.sum(), atol=1e-5)  # eager, from a list
    assert jw.path_log_prob(m, tokens[:1]) == 0
    for given in (0, 8, -1):
        with pytest.raises(ValueError, match=rf"given: expected an integer from 1 to 7 \(.*\), got {given}"):
            jw.path_log_prob(m, tokens, given=given)


def test_a_nudge_changes_the_path_it_is_added_to():
    tokens = np.array([1, 0, 2, 2])
    score = jax.jit(lambda m, nudge: step_log_probs(m, tokens, nudge=nudge))
    zero = jnp.zeros((5, 4, 16))
    plain = score(model(), zero)
    nudged = score(model(), zero.at[2, 1].set(jnp.linspace(-1, 1, 16)))  # a constant would be lost on LayerNorm
    assert plain[0] == nudged[0]
    assert np.abs(plain - nudged)[1:].min() > 1e-4
    np.testing.assert_array_equal(score(model(), zero.at[:, -1].set(9.0)), plain)  # the last token is not walked


def test_borders_and_padding_are_not_scored():
    tokens = np.array([0, 1, 0, 2, 2, 1, 0])
    steps = jax.jit(lambda m, segments: step_log_probs(m, tokens, segments=segments))
    alone = jax.jit(step_log_probs)
    packed = steps(model(), jnp.array([1, 1, 1, 2, 2, 2, 2]))
    np.testing.assert_allclose(packed[:2], alone(model(), tokens[:3]), atol=1e-6)
    assert packed[2] == 0
    np.testing.assert_allclose(packed[3:], alone(model(), tokens[3:]), atol=1e-6)
    padded = steps(model(), jnp.array([0, 0, 0, 1, 1, 1, 1]))
    np.testing.assert_allclose(padded, np.r_[0, 0, 0, packed[3:]], atol=1e-6)
    padded = steps(model(), jnp.array([1, 1, 1, 0, 0, 0, 0]))
    np.testing.assert_allclose(padded, np.r_[packed[:2], 0, 0, 0, 0], atol=1e-6)
    assert paths_module.scored_steps(4, 2, jnp.array([1, 1, 1, 0])).tolist() == [False, True, False]


@functools.cache
def sampler(steps, n, **options):
    return jax.jit(lambda m, key: jw.sample_paths(m, PROMPT, key, steps, n, **options))


def test_samples_are_of_the_law():
    rows, log_probs = exact(3)
    drawn = sampler(3, 4000)(model(), jax.random.key(7))
    assert drawn.tokens.shape == (4000, 3)
    index = np.array(drawn.tokens) @ V ** np.arange(3)[::-1]
    np.testing.assert_allclose(drawn.log_probs, log_probs[index], atol=2e-5)
    counts, expected = np.bincount(index, minlength=len(rows)), 4000 * np.exp(log_probs.astype(float))
    rare = expected < 5
    if rare.any():  # as one cell
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    g, p = stats.power_divergence(counts, expected * (4000 / expected.sum()), lambda_="log-likelihood")
    assert len(counts) > 5
    assert p > 1e-3, (g, p)
    seen = np.unique(index)
    np.testing.assert_allclose(drawn.unexplored_mass, 1 - np.exp(log_probs[seen]).sum(), atol=1e-5)
    assert np.isnan(drawn.bound)
    again = sampler(3, 4000)(model(), jax.random.key(7))
    np.testing.assert_array_equal(again.tokens, drawn.tokens)


def test_samples_may_be_as_long_as_scored_paths():
    drawn = sampler(5, 3)(model(), jax.random.key(0))  # 2 + 5 = max_length + 1
    full = np.concatenate([np.broadcast_to(PROMPT, (3, 2)), drawn.tokens], 1)
    score = jax.jit(jax.vmap(lambda m, t: jw.path_log_prob(m, t, given=2), (None, 0)))
    np.testing.assert_allclose(drawn.log_probs, score(model(), full), atol=2e-5)


def test_greedy_and_altered_laws():
    greedy = sampler(3, 4, top_k=1)(model(), jax.random.key(0))
    path = list(PROMPT)
    law = jax.jit(lambda m, t: jw.next_log_probs(m, t))
    for token in np.array(greedy.tokens[0]):
        last = np.array(law(model(), np.array(path)))[-1]
        assert token == last.argmax()
        path.append(int(token))
    assert (np.array(greedy.tokens) == np.array(path[2:])).all()
    # Log-probabilities stay those of the model's own law.
    rows, log_probs = exact(3)
    np.testing.assert_allclose(greedy.log_probs, log_probs[(rows == np.array(path[2:])).all(1)][0], atol=2e-5)
    np.testing.assert_allclose(1 - greedy.unexplored_mass, np.exp(greedy.log_probs[0]), atol=1e-5)


def test_what_sampling_options_leave():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))

    def law(temperature=None, top_k=None, top_p=None):
        return np.array(jax.nn.softmax(altered_law(logits, temperature, top_k, top_p)))

    np.testing.assert_allclose(law(), [0.1, 0.4, 0.3, 0.2], atol=1e-6)
    squares = np.array([0.01, 0.16, 0.09, 0.04])
    np.testing.assert_allclose(law(temperature=0.5), squares / squares.sum(), atol=1e-6)
    np.testing.assert_allclose(law(top_k=2), [0, 4 / 7, 3 / 7, 0], atol=1e-6)
    np.testing.assert_allclose(law(top_k=9), law(), atol=1e-6)
    np.testing.assert_allclose(law(top_p=0.7), [0, 4 / 7, 3 / 7, 0], atol=1e-6)
    np.testing.assert_allclose(law(top_p=0.71), [0, 4 / 9, 3 / 9, 2 / 9], atol=1e-6)
    np.testing.assert_allclose(law(top_p=1e-9), [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(law(top_p=1.0), law(), atol=1e-6)
    np.testing.assert_allclose(law(top_k=3, top_p=0.5), [0, 4 / 7, 3 / 7, 0], atol=1e-6)
    flat = np.array(altered_law(jnp.zeros(4), None, 2, None))
    assert np.isfinite(flat).sum() == 2  # ties do not widen the law


@functools.cache
def search(steps, k, vocab_size=V, **options):
    return jax.jit(lambda m: jw.top_paths(m, PROMPT, steps, k, **options))


@pytest.mark.parametrize(
    ("vocab_size", "steps", "k"),
    quick({(3, 4, 7), (3, 2, 20)}, [(3, 4, 7), (3, 2, 20), (7, 2, 10), (5, 1, 3), (3, 5, 1), (2, 5, 32)]),
)
def test_top_paths_are_brute_force(vocab_size, steps, k):
    rows, log_probs = exact(steps, 0, vocab_size)
    order = np.argsort(-log_probs, kind="stable")[:k]
    found = search(steps, k, vocab_size, budget=512, width=4)(model(vocab_size=vocab_size))
    n = len(order)
    np.testing.assert_allclose(found.log_probs[:n], log_probs[order], atol=2e-5)
    np.testing.assert_array_equal(found.tokens[:n], rows[order])
    assert np.isneginf(found.log_probs[n:]).all()
    assert (np.array(found.tokens[n:]) == -1).all()
    np.testing.assert_allclose(found.unexplored_mass, 1 - np.exp(log_probs[order]).sum(), atol=1e-5)
    assert found.bound <= found.log_probs[n - 1]  # so all of them are certified
    if k >= vocab_size**steps:
        assert np.isneginf(found.bound)


@pytest.mark.parametrize(
    "aggregate", quick({"attention"}, ["attention", "causal_mean", jw.aggregates.config("attention", window=2)])
)
def test_states_that_are_kept_and_states_that_are_retraced_lead_to_the_same_paths(aggregate, monkeypatch):
    m = model(aggregate=aggregate)
    run = lambda: jax.jit(lambda m: jw.top_paths(m, PROMPT, 4, 6, budget=64, width=3))(m)
    kept = run()
    monkeypatch.setattr("jaxwalk.paths.search.STATE_BYTES", 0)
    retraced = run()
    np.testing.assert_array_equal(kept.tokens, retraced.tokens)
    np.testing.assert_allclose(kept.log_probs, retraced.log_probs, atol=2e-5)
    np.testing.assert_allclose(kept.bound, retraced.bound, atol=2e-5)
    whole = [jw.path_log_prob(m, np.concatenate([PROMPT, row]), given=len(PROMPT)) for row in np.array(kept.tokens)]
    np.testing.assert_allclose(kept.log_probs, whole, atol=2e-5)


@pytest.mark.parametrize(
    ("budget", "width", "capacity", "branch"),
    [
        (3, 1, None, 256),
        (64, 2, 3, 256),
        (64, 2, None, 1),
        pytest.param(64, 4, None, 2, marks=pytest.mark.slow),
        pytest.param(6, 4, 5, 256, marks=pytest.mark.slow),
        pytest.param(40, 8, 8, 256, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_certificate_holds_when_the_search_is_cut_short(budget, width, capacity, branch, seed):
    rows, log_probs = exact(4, seed)
    found = search(4, 9, budget=budget, width=width, capacity=capacity, branch=branch)(model(seed))
    bound, given = float(found.bound), np.array(found.log_probs)
    returned = {tuple(t): p for t, p in zip(np.array(found.tokens).tolist(), given.tolist(), strict=True) if t[0] >= 0}
    for row, log_prob in zip(rows.tolist(), log_probs, strict=True):
        if tuple(row) in returned:
            np.testing.assert_allclose(returned[tuple(row)], log_prob, atol=2e-5)
        elif len(returned) < 9 or log_prob > given[-1] + 1e-5:
            assert log_prob <= bound + 1e-5  # nothing that was missed is above the bound
    certified = given[given >= bound]
    np.testing.assert_allclose(certified, np.sort(log_probs)[::-1][: len(certified)], atol=2e-5)
    assert (np.diff(given[np.isfinite(given)]) <= 0).all()
    assert len(returned) == len(set(returned))
    assert bound <= 0


def test_the_prefix_tree_of_paths():
    tokens = jnp.array([[1, 0, 2], [1, 0, 0], [0, 2, 2], [1, 0, 2], [-1, -1, -1]])
    log_probs = jnp.log(jnp.array([0.3, 0.2, 0.1, 0.3, 0.0]))  # the fourth repeats the first; the last is no path
    tree = jw.prefix_tree(Paths(tokens, log_probs, jnp.array(0.4), jnp.array(-1.0)))
    names = [()]
    for parent, token in zip(tree.parent[1:], tree.token[1:], strict=True):
        names.append((*names[parent], int(token)))
    masses = dict(zip(names, tree.mass, strict=True))
    expected = {(): 0.6, (0,): 0.1, (1,): 0.5, (0, 2): 0.1, (1, 0): 0.5, (0, 2, 2): 0.1, (1, 0, 0): 0.2, (1, 0, 2): 0.3}
    assert masses.keys() == expected.keys()
    np.testing.assert_allclose([masses[n] for n in expected], list(expected.values()), rtol=1e-6)
    np.testing.assert_array_equal(tree.depth, [len(n) for n in names])
    nothing = jw.prefix_tree(Paths(tokens[4:], log_probs[4:], jnp.array(1.0), jnp.array(0.0)))
    assert [list(a) for a in nothing] == [[-1], [-1], [0], [0.0]]
    # Of all continuations, a node's mass is its probability.
    rows, log_probs = exact(3)
    whole = jw.prefix_tree(Paths(jnp.asarray(rows), jnp.asarray(log_probs), jnp.array(0.0), jnp.array(0.0)))
    first = np.exp(jw.next_log_probs(model(), PROMPT)[-1])
    np.testing.assert_allclose(whole.mass[whole.depth == 1], first, rtol=1e-4)


def test_continuations():
    np.testing.assert_array_equal(continuations(2, 2), [[0, 0], [0, 1], [1, 0], [1, 1]])
    assert len(continuations(3, 4)) == 81
    rows, log_probs = jax.jit(lambda m: enumerated_log_probs(m, PROMPT, 3, batch=8))(model())
    np.testing.assert_array_equal(rows, exact(3)[0])
    np.testing.assert_allclose(log_probs, exact(3)[1], atol=2e-5)


def test_entropy_and_events_are_exact_when_enumerable():
    rows, log_probs = exact(3)
    entropy, error, worth = jax.jit(lambda m: jw.path_entropy(m, PROMPT, 3))(model())
    np.testing.assert_allclose(entropy, -(np.exp(log_probs) * log_probs).sum(), rtol=1e-5)
    assert (error, worth) == (0, np.inf)
    share, error, worth = jax.jit(lambda m: jw.event_probability(m, PROMPT, 3, jw.visits(2)))(model())
    np.testing.assert_allclose(share, np.exp(log_probs[(rows == 2).any(1)]).sum(), rtol=1e-5)
    assert (error, worth) == (0, np.inf)


def test_entropy_and_events_are_estimated_with_their_error(monkeypatch):
    rows, log_probs = exact(3)
    truth = -(np.exp(log_probs) * log_probs).sum(), np.exp(log_probs[(rows == 0).any(1)]).sum()
    monkeypatch.setattr("jaxwalk.paths.estimates.ENUMERABLE", 1)
    keys = jax.random.split(jax.random.key(0), 40)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))  # vmap and jit of the estimates
    def estimates(m, key):
        entropy = jw.path_entropy(m, PROMPT, 3, key=key, samples=100)
        return entropy, jw.event_probability(m, PROMPT, 3, jw.visits(0), key=key, samples=100)

    for (value, error, worth), exactly in zip(estimates(model(), keys), truth, strict=True):
        np.testing.assert_allclose(worth, 100, rtol=1e-5)
        z = np.array((value - exactly) / error)
        assert np.abs(z).max() < 4
        assert 0.6 < z.std() < 1.5  # the standard error is neither too small nor too large
        assert abs(z.mean()) < 4 / np.sqrt(len(keys))
    always, error, _ = jw.event_probability(model(), PROMPT, 1, lambda t: t[0] >= 0, key=keys[0], samples=99)
    assert always == 1
    np.testing.assert_allclose(error, np.sqrt(0.01 * 0.99 / 99), rtol=1e-5)
    with pytest.raises(ValueError, match=r"key: expected a jax.random key, got None. 3\^3 paths are too many"):
        jw.path_entropy(model(), PROMPT, 3)
    with pytest.raises(ValueError, match="samples: expected at least 2, got 1"):
        jw.path_entropy(model(), PROMPT, 3, key=keys[0], samples=1)
    with pytest.raises(ValueError, match="key: expected"):
        jw.event_probability(model(), PROMPT, 3, jw.visits(1))
    with pytest.raises(ValueError, match=r"steps: expected V\^steps <= 1, got 3\^3"):
        enumerated_log_probs(model(), PROMPT, 3)


@pytest.mark.parametrize("proposal", [None, jw.Tilt((2,), 1.5)], ids=["own law", "tilted"])
def test_estimates_are_within_three_standard_errors_of_enumeration(proposal, monkeypatch):
    """In 200 random cases, of random models, prompts and events, rare and frequent ones."""
    rng = np.random.default_rng(0)
    models = jax.tree.map(lambda *a: jnp.stack(a), *(model(seed) for seed in range(10)))
    prompts, ids, least = rng.integers(0, V, (10, 20, 2)), rng.integers(0, V, (10, 20)), rng.integers(1, 4, (10, 20))
    keys = jax.random.split(jax.random.key(0), (10, 20))

    def each(**options):
        def one(m, prompt, wanted, least, key):
            event = lambda tokens: (tokens == wanted).sum() >= least
            return jw.event_probability(m, prompt, 3, event, **options, **({"key": key} if options else {}))

        over_cases = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
        return jax.jit(jax.vmap(over_cases))(models, prompts, ids, least, keys)

    exactly = each().value
    monkeypatch.setattr("jaxwalk.paths.estimates.ENUMERABLE", 1)
    value, error, worth = each(samples=256, proposal=proposal)
    assert (np.abs(value - exactly) <= 3 * error).mean() >= 0.95
    assert (worth <= 256 * (1 + 1e-5)).all()
    assert error.max() < 0.2
    assert np.abs(value - exactly).max() > 0  # these are estimates


def test_a_tilted_law_sees_rare_events(monkeypatch):
    m = model(3)
    rare = lambda tokens: (tokens == 2).all()
    truth = float(jw.event_probability(m, PROMPT, 4, rare).value)
    monkeypatch.setattr("jaxwalk.paths.estimates.ENUMERABLE", 1)
    keys = jax.random.split(jax.random.key(0), 20)
    run = lambda proposal: jax.vmap(
        lambda k: jw.event_probability(m, PROMPT, 4, rare, key=k, samples=200, proposal=proposal)
    )(keys)
    plain, tilted = run(None), run(jw.Tilt((2,), 4.0))
    assert np.abs((tilted.value - truth) / tilted.standard_error).max() < 4
    assert tilted.value.std() < 0.5 * plain.value.std()
    assert (tilted.effective_samples < 199).all()
    entropy = lambda k: jw.path_entropy(m, PROMPT, 4, key=k, samples=400, proposal=jw.Tilt((2,), 0.5))
    estimates = jax.vmap(entropy)(keys)
    monkeypatch.undo()
    z = (estimates.value - jw.path_entropy(m, PROMPT, 4).value) / estimates.standard_error
    assert np.abs(z).max() < 4


def test_an_entropy_of_which_all_samples_are_one_path_is_not_certain(monkeypatch):
    m = model(3)
    m = dataclasses.replace(m, unembed=dataclasses.replace(m.unembed, weight=4 * m.unembed.weight))
    truth = jw.path_entropy(m, PROMPT, 4).value
    monkeypatch.setattr("jaxwalk.paths.estimates.ENUMERABLE", 1)
    coincided = []
    for proposal in (None, jw.Tilt((2,), 0.1)):
        estimate = jax.vmap(lambda key, p=proposal: jw.path_entropy(m, PROMPT, 4, key=key, samples=2, proposal=p))
        value, error, _ = estimate(jax.random.split(jax.random.key(0), 64))
        assert (error > 1e-3).all()
        coincided.append(np.array((jnp.abs(value - truth) / error) <= 1).mean())
    assert min(coincided) > 0.5
    certain = dataclasses.replace(m, unembed=dataclasses.replace(m.unembed, weight=1e4 * m.unembed.weight))
    value, error, _ = jw.path_entropy(certain, PROMPT, 4, key=jax.random.key(0), samples=2)
    assert (value, error) == (0, 0)  # there is no other path


def test_tokens_that_cannot_come_have_no_entropy(monkeypatch):
    m = model()
    bias = jnp.array([-jnp.inf, *[0.0] * (V - 1)])
    m = dataclasses.replace(m, unembed=dataclasses.replace(m.unembed, bias=bias))
    rows = np.array(list(itertools.product(range(1, V), repeat=3)))
    full = np.concatenate([np.broadcast_to(PROMPT, (len(rows), 2)), rows], 1)
    log_probs = jax.jit(jax.vmap(functools.partial(jw.path_log_prob, m, given=2)))(full)
    expected = -(np.exp(log_probs) * log_probs).sum()
    np.testing.assert_allclose(jw.path_entropy(m, PROMPT, 3).value, expected, rtol=1e-5)
    monkeypatch.setattr("jaxwalk.paths.estimates.ENUMERABLE", 1)
    sampled = jw.path_entropy(m, PROMPT, 3, key=jax.random.key(0), samples=512)
    assert abs(sampled.value - expected) < 4 * sampled.standard_error


def test_prompts_are_batched_with_vmap():
    prompts = np.array([[1, 0], [2, 2]])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def everything(m, prompt, key):
        return (
            jw.sample_paths(m, prompt, key, 2, 3),
            jw.top_paths(m, prompt, 2, 3, budget=16, width=2),
            jw.path_entropy(m, prompt, 2),
            jw.event_probability(m, prompt, 2, jw.visits(0)),
        )

    keys = jax.random.split(jax.random.key(0), 2)
    samples, top, entropy, event = everything(model(), prompts, keys)
    np.testing.assert_array_equal(samples.tokens[0], sampler(2, 3)(model(), keys[0]).tokens)
    assert samples.tokens.shape == top.tokens.shape == (2, 3, 2)
    rows, log_probs = exact(2)
    best = np.argsort(-log_probs)[:3]
    np.testing.assert_array_equal(top.tokens[0], rows[best])
    np.testing.assert_allclose(top.log_probs[0], log_probs[best], atol=2e-5)
    np.testing.assert_allclose(entropy.value[0], -(np.exp(log_probs) * log_probs).sum(), rtol=1e-5)
    np.testing.assert_allclose(event.value[0], np.exp(log_probs[(rows == 0).any(1)]).sum(), rtol=1e-5)


def test_bad_requests_raise():
    m, key = model(), jax.random.key(0)
    for call, message in (
        (lambda: jw.sample_paths(m, PROMPT, key, 0, 1), "steps: expected at least 1, got 0"),
        (lambda: jw.sample_paths(m, PROMPT, key, 6, 1), r"within max_length \+ 1 = 7 tokens, got 2 \+ 6"),
        (lambda: jw.sample_paths(m, PROMPT, key, 1, 0), "n: expected at least 1 path, got 0"),
        (lambda: jw.sample_paths(m, PROMPT, key, 1, 1, temperature=0.0), "temperature: expected a positive number"),
        (lambda: jw.sample_paths(m, PROMPT, key, 1, 1, top_k=0), "top_k: expected at least 1, got 0"),
        (lambda: jw.sample_paths(m, PROMPT, key, 1, 1, top_p=1.5), "top_p: expected a probability above 0"),
        (lambda: jw.top_paths(m, PROMPT, 0, 1), "steps: expected at least 1, got 0"),
        (lambda: jw.top_paths(m, PROMPT, 1, 0), "k: expected at least 1 path, got 0"),
        (lambda: jw.path_entropy(m, PROMPT, 6), r"within max_length \+ 1"),
        (lambda: jw.event_probability(m, PROMPT, 2, jw.visits(99)), "visits: expected token ids from 0 to 2, got 99"),
        (lambda: jw.path_entropy(m, PROMPT, 2, proposal=jw.Tilt((99,), 1.0)), "Tilt: expected token ids .* got 99"),
        (lambda: jw.path_log_prob(m, PROMPT, given=3), "given: expected an integer from 1 to 2 .* got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("what", ["budget", "width", "branch", "capacity"])
def test_a_search_of_no_size_is_refused(what):
    with pytest.raises(ValueError, match=f"{what}: expected at least 1, got 0"):
        jw.top_paths(model_of(), [1, 2], 3, 2, **{what: 0})
