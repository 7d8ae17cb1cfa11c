"""Sweeps: each entry against its own intervention, and what must have no effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.probes import interventions
from tests.conftest import model_of, normal, to64
from tests.test_transformer import unchecked

TOKENS, OTHER = np.array([1, 4, 0, 2, 2]), np.array([3, 3, 0, 2, 1])
S, T, D = 5, 5, 16


def flat(A):
    return jnp.tril(jnp.ones_like(A)) / jnp.arange(1.0, A.shape[-1] + 1)[:, None]


def test_patches_one_by_one():
    model = model_of(unembed_bias=True)
    walk, log_prob = jax.jit(jw.encoding_walk), jax.jit(functools.partial(jw.path_log_prob, given=2))
    sweep = jax.jit(jw.patch_effects, static_argnames="given")
    stations = walk(model, OTHER).stations
    effects = sweep(model, TOKENS, stations, given=2)
    for s, t in ((0, 0), (2, 3), (4, 1)):
        where = jnp.zeros((S, T), bool).at[s, t].set(True)
        alone = log_prob(model, TOKENS, patch=(where, stations)) - log_prob(model, TOKENS)
        np.testing.assert_allclose(effects[s, t], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(effects[:, -1], 0, atol=1e-5)
    # The first station is the token itself: to replace it is to walk another path.
    read = TOKENS.copy()
    read[1] = OTHER[1]
    vectors = jax.vmap(model.embed)(read)
    other = log_prob(model, TOKENS, vectors=vectors) - log_prob(model, TOKENS)
    np.testing.assert_allclose(effects[0, 1], other, rtol=1e-4, atol=1e-5)
    own = sweep(model, TOKENS, walk(model, TOKENS).stations)
    np.testing.assert_array_equal(own, 0)  # not to rounding: the baseline is of the same program
    np.testing.assert_array_equal(jw.nudge_effects(model, TOKENS, 0 * stations), 0)
    # The last station of the first position is read by the step after it alone, which is given.
    np.testing.assert_allclose(effects[4, 0], 0, atol=1e-5)
    assert np.abs(effects[:4, :-1]).max() > 1e-2


def test_small_nudges_follow_the_gradient(x64):
    model = to64(model_of())
    way = jnp.asarray(np.random.default_rng(0).normal(size=(S, T, D)))
    expected = jnp.sum(jax.jit(jw.station_gradient)(model, TOKENS) * way, axis=-1)
    step = 1e-5
    sweep = jax.jit(jw.nudge_effects)
    slope = (sweep(model, TOKENS, step * way) - sweep(model, TOKENS, -step * way)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-9)


def test_heads_one_by_one():
    model = model_of(depth=3, aggregate=("attention", "causal_mean", "attention"))
    sweep, log_prob = jax.jit(jw.mixing_effects, static_argnums=2), jax.jit(jw.path_log_prob)
    effects = sweep(model, TOKENS, flat)
    assert effects.shape == (3, 4)
    np.testing.assert_array_equal(np.isnan(effects), [[0] * 4, [0, 1, 1, 1], [0] * 4])
    own = jax.jit(functools.partial(jw.encoding_walk, record_mixing=(0, 2)))(model, TOKENS).mixing
    for layer, head in ((0, 2), (2, 0)):
        A = own[layer].at[head].set(flat(own[layer])[head])
        alone = log_prob(model, TOKENS, mixing={layer: A}) - log_prob(model, TOKENS)
        np.testing.assert_allclose(effects[layer, head], alone, rtol=1e-4, atol=1e-5)
    assert effects[1, 0] == pytest.approx(0, abs=1e-5)  # a causal mean made a causal mean
    np.testing.assert_array_equal(sweep(model, TOKENS, lambda A: A)[jnp.array([0, 2])], 0)


def test_batched_as_alone():
    model = model_of()
    paths = np.stack([TOKENS, OTHER])
    alone = lambda path: jw.mixing_effects(model, path, flat)
    batched = jax.jit(jax.vmap(alone))(paths)
    for i in range(2):
        np.testing.assert_allclose(batched[i], jax.jit(alone)(paths[i]), rtol=1e-4, atol=1e-5)


def test_bad_input():
    model = model_of()
    sweep = unchecked(lambda stations: jw.patch_effects(model, TOKENS, stations))
    with pytest.raises(ValueError, match=r"stations: expected shape \(5, 5, 16\) for this path, got \(5, 4, 16\)"):
        sweep(normal(0, 5, 4, 16))
    with pytest.raises(ValueError, match=r"nudge: expected shape \(5, 5, 16\)"):
        unchecked(lambda nudge: jw.nudge_effects(model, TOKENS, nudge))(normal(0, 4, 5, 16))
    with pytest.raises(ValueError, match=r"replacement: expected shape \(4, 4, 4\)"):
        unchecked(lambda f: jw.mixing_effects(model, TOKENS, f))(lambda A: A[:, :-1])
    for sweep in (jw.patch_effects, jw.nudge_effects):
        with pytest.raises(ValueError, match=r"given: expected an integer from 1 to 5 .* got 0"):
            sweep(model, TOKENS, normal(0, 5, 5, 16), given=0)
    with pytest.raises(ValueError, match=r"given: expected an integer from 1 to 5 .* got 6"):
        jw.mixing_effects(model, TOKENS, flat, given=6)
    with pytest.raises(ValueError, match="expected ids from 0 to 4"):
        jw.patch_effects(model, np.array([1, 4, 0, 2, 7]), normal(0, 5, 5, 16))


def test_sweeps_take_the_memory_of_a_batch_of_walks_and_not_of_their_nudges():
    """A nudge or patch for each of 16 changed walks would be [16, S, T, D]."""
    config = jw.ModelConfig(vocab_size=5, max_length=128, width=32, depth=32)
    model = jax.eval_shape(lambda: jw.init(config, jax.random.key(0)))
    tokens, shift = jax.ShapeDtypeStruct((129,), np.int32), jax.ShapeDtypeStruct((65, 129, 32), np.float32)
    one = jax.ShapeDtypeStruct((), np.int32)
    for sweep in (interventions._nudge_effects, interventions._patch_effects):
        size = sweep.lower(model, tokens, one, one, shift).compile().memory_analysis().temp_size_in_bytes
        assert size < 16 * 65 * 129 * 32 * 4 / 2
