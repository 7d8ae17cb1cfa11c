"""Laws of sweeps: a member is what the ordinary loop makes, members do not see each other, parameters are matched."""

import dataclasses
import io
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk import sweep, training
from jaxwalk.config import ConfigError, MLPConfig, OptimConfig, TextData, TrainConfig
from tests.conftest import model_of, quick
from tests.test_training import parameters_after, small

# No member learns less because of one that diverges.
SEEDS, RATES = (3, 0), (1e-2, 3e-3, 1e30)


def config(**changes) -> TrainConfig:
    return small(**{"steps": 10, "eval_every": 5, "optim": OptimConfig(lr=1e-2, warmup=3), **changes})


@pytest.fixture(scope="module")
def swept() -> sweep.Sweep:
    return sweep.train(config(), SEEDS, RATES)


def assert_same(model, other, atol=2e-5):
    assert jax.tree.structure(model) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_a_member_is_what_the_ordinary_loop_makes(swept, tmp_path):
    chosen = config(seed=3, optim=OptimConfig(lr=3e-3, warmup=3))
    training.train(chosen, tmp_path / "run", out=io.StringIO())
    run = jw.checkpoint.Run(tmp_path / "run")
    assert (swept.seeds[1], swept.lrs[1]) == (3, 3e-3) != (swept.config.seed, swept.config.optim.lr)
    assert_same(swept.member(1), run.model("latest"))
    assert np.abs(swept.member(1).token_vectors - run.model(0).token_vectors).max() > 0.01


def test_members_of_text_are_what_the_ordinary_loop_makes(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat. " * 400)
    chosen = config(
        data=TextData(corpus=str(corpus), store=str(tmp_path / "stores")),
        model=jw.ModelConfig(vocab_size=257, max_length=8, width=16, depth=1, aggregate="causal_mean"),
        accumulate=2,
    )
    both = sweep.train(chosen, (0, 5))
    alone, _ = parameters_after(dataclasses.replace(chosen, seed=5))
    for a, b in zip(jax.tree.leaves(both.member(1)), alone, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_members_do_not_see_each_other(swept):
    alone = sweep.train(config(), SEEDS[1:], RATES[:1])
    assert_same(alone.member(0), swept.member(3))
    np.testing.assert_allclose(alone.losses[:, 0], swept.losses[:, 3], rtol=1e-5)


def test_the_order_of_members_and_what_is_recorded(swept):
    assert swept.seeds == (3, 3, 3, 0, 0, 0)
    assert swept.lrs == (1e-2, 3e-3, 1e30, 1e-2, 3e-3, 1e30)
    assert swept.steps.tolist() == [0, 5, 10]
    assert swept.losses.shape == (3, 6)
    # One seed starts from one model, whatever its rate; another seed from another.
    assert swept.losses[0, 0] == swept.losses[0, 2] != swept.losses[0, 3]
    diverged = np.array(swept.lrs) == 1e30
    assert np.isnan(swept.losses[-1, diverged]).all()
    assert (swept.losses[-1] < swept.losses[0])[~diverged].all()
    held_out = training.make_batches(swept.config).evaluation(swept.config.eval_batches)
    paths = np.concatenate([np.asarray(tokens) for tokens, _ in held_out])
    np.testing.assert_allclose(sweep.held_out_losses(swept.models, paths).mean(1), swept.losses[-1], rtol=1e-5)
    with pytest.raises(ValueError, match="member: expected one from 0 to 5, got 6"):
        swept.member(6)


@pytest.mark.parametrize(
    ("seeds", "lrs", "message"),
    [
        ((), None, "seeds: expected at least one, all different and none below 0, got []"),
        ((1, 1), None, "seeds: .* got [1, 1]"),
        ((-1,), None, "seeds: .* got [-1]"),
        ((0,), (), "lrs: .* got []"),
        ((0,), (float("nan"),), "lrs: .* got [nan]"),
    ],
)
def test_seeds_and_rates_that_cannot_be(seeds, lrs, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[").replace("]", r"\]")):
        sweep.train(config(), seeds, lrs)


def test_held_out_losses_are_minus_log_p_per_token_of_each_path():
    models = [model_of(seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *models)
    paths = np.random.default_rng(0).integers(0, 5, (7, 9))
    losses = sweep.held_out_losses(stacked, paths, batch_size=3)
    score = jax.jit(jax.vmap(jw.path_log_prob, (None, 0)))
    expected = [-score(model, paths) / 8 for model in models]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for wrong in (paths[0], paths[:0], paths[:, :1]):
        with pytest.raises(ValueError, match=r"paths: expected \[n, N\]"):
            sweep.held_out_losses(stacked, wrong)


def test_held_out_windows_of_text_overlap_nowhere(tmp_path):
    data = TextData("pydoc", store=str(tmp_path))
    data = sweep.held_out(config(data=data, model=jw.ModelConfig(257, 64, width=8, depth=1)), 4000)
    assert len(data.own) == len(data.choosing) > 100
    text = np.asarray(data.store.validation.tokens, np.int32)
    there = Counter(text[i : i + 65].tobytes() for i in range(0, len(text), 65))  # a text may repeat itself
    assert Counter(row.tobytes() for row in (*data.own, *data.choosing)) <= there
    borders = data.store.validation.starts
    assert not [row for row in data.own if (row[1:] == text[borders[0]]).any()], "a window lies in one document"


def test_held_out_paths_of_a_world_are_none_that_trained():
    chosen = config()
    data = sweep.held_out(chosen, 5)
    N = chosen.model.max_length + 1
    assert data.own.shape == data.choosing.shape == (5, N)
    assert not (data.own == data.choosing).all()
    assert data.store is None
    assert data.world.name == chosen.data.world


def test_flops_grow_with_the_model():
    config = jw.ModelConfig(5, 12, width=16, depth=1)
    once, twice = (sweep.flops(dataclasses.replace(config, depth=depth)) for depth in (1, 2))
    # A layer's matrices meet each of 12 positions, with a multiplication and an addition.
    assert 2 * 12 * 12 * 16**2 < twice - once < 4 * 12 * 12 * 16**2


FILTERS = [MLPConfig(), MLPConfig(gated=True, bias=False), (MLPConfig(hidden=7), None)]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("aggregate", quick({"attention", "mamba", "rwkv7", "gmlp", "lstm"}, jw.aggregates.names()))
def test_parameters_are_matched(aggregate, filter):
    target = sweep.count_parameters(jw.ModelConfig(5, 12, width=32, depth=2, filter=MLPConfig(hidden=512)))
    plain = jw.ModelConfig(5, 12, width=32, depth=2, aggregate=aggregate, filter=filter, tied=True)
    matched = sweep.match_parameters(plain, target)
    assert abs(sweep.count_parameters(matched) / target - 1) < 0.01
    # No other width is nearer, and nothing else is changed.
    filters = matched.filter if isinstance(matched.filter, tuple) else (matched.filter,)
    hidden = filters[0].hidden
    for near in (hidden - 1, hidden + 1):
        other = tuple(f and dataclasses.replace(f, hidden=near) for f in filters)
        other = dataclasses.replace(matched, filter=other)
        assert abs(sweep.count_parameters(other) - target) >= abs(sweep.count_parameters(matched) - target)
    assert dataclasses.replace(matched, filter=filter) == plain


def test_parameters_are_counted_and_a_match_that_cannot_be_is_refused():
    config = jw.ModelConfig(5, 12, width=4, depth=1, aggregate="identity")
    # Token and position vectors, three norms, two matrices with biases, an MLP, output vectors.
    assert sweep.count_parameters(config) == 20 + 48 + 3 * 8 + 2 * 20 + (4 * 16 + 16 + 16 * 4 + 4) + 20
    assert sweep.match_parameters(config, sweep.count_parameters(config)).filter.hidden == 16
    with pytest.raises(ConfigError, match=r"target: expected at least \d+, .* got 10"):
        sweep.match_parameters(config, 10)
    for none in (dataclasses.replace(config, filter=None), dataclasses.replace(config, depth=0)):
        with pytest.raises(ConfigError, match="filter: expected an MLP in some layer"):
            sweep.match_parameters(none, 1000)
