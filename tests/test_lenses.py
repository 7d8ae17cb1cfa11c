"""Lenses: exact at the last station, recovered where they are planted; the metric of laws against their divergences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.probes import lenses
from jaxwalk.probes.lenses import LOGIT_LENS, Lens
from tests.conftest import model_of, normal, quick, to64

TOKENS = np.array([1, 4, 0, 2, 2, 3])
KINDS = {
    "pre": {"unembed_bias": True},
    "post": {"placement": "post", "norm": "rms_norm", "tied": True},
    "sandwich": {"placement": "sandwich", "logit_softcap": 2.0, "embed_scale": 3.0, "tied": True},
}


def lens_of(S, D, seed=5):
    return Lens(jnp.eye(D) + 0.3 * normal(seed, S - 1, D, D), normal(seed + 1, S - 1, D))


@pytest.mark.parametrize("kind", quick({"sandwich"}, KINDS))
def test_every_lens_is_the_model_at_the_last_station(kind):
    model = model_of(**KINDS[kind])
    stations = model.walk(TOKENS).stations
    law = jw.next_log_probs(model, TOKENS)
    paths = np.stack([TOKENS, TOKENS[::-1]])
    fitted = [
        LOGIT_LENS,
        lens_of(*stations.shape[::2]),
        lenses.jacobian_lens(model, paths, np.array([3, 5])),
        lenses.least_squares_lens(stations),
        lenses.tuned_lens(model, stations, key=jax.random.key(0), steps=2, batch=4),
    ]
    for lens in fitted:
        np.testing.assert_allclose(lenses.lens_log_probs(model, lens, stations)[-1], law, rtol=1e-5, atol=1e-6)
        reading = lenses.read(model, lens, stations)
        np.testing.assert_array_equal(reading.kl[-1], 0)
        np.testing.assert_array_equal(reading.rank[-1], 0)
        assert np.isfinite(reading.kl).all()


def test_what_is_read_is_what_the_laws_say():
    model = model_of(unembed_bias=True)
    stations = model.walk(TOKENS).stations
    for lens in (LOGIT_LENS, lens_of(5, 16)):
        log_p = np.asarray(lenses.lens_log_probs(model, lens, stations), float)
        reading = lenses.read(model, lens, stations)
        np.testing.assert_allclose(reading.entropy, -(np.exp(log_p) * log_p).sum(-1), 1e-4, 1e-6)
        np.testing.assert_allclose(reading.kl, (np.exp(log_p[-1]) * (log_p[-1] - log_p)).sum(-1), 1e-4, 1e-5)
        top = log_p[-1].argmax(-1)
        own = np.take_along_axis(log_p, np.broadcast_to(top, log_p.shape[:2])[..., None], -1)
        np.testing.assert_array_equal(reading.rank, (log_p > own).sum(-1))
        s = stations[1] if lens.weight is None else stations[1] @ lens.weight[1].T + lens.bias[1]
        np.testing.assert_allclose(
            log_p[1], jax.nn.log_softmax(jax.vmap(lambda x: model.logits(model.context(x)))(s)), 1e-5, 1e-5
        )


def test_the_jacobian_lens_is_the_mean_of_dense_jacobians(x64):
    model = to64(model_of(0.3, depth=2))
    paths, at = np.array([[1, 4, 0, 2], [3, 3, 0, 1], [2, 0, 1, 4]]), np.array([1, 3, 2])

    def stations(nudge, path, t):
        return model.walk(path, nudge=jnp.zeros((5, 4, 16)).at[:, t].set(nudge)).stations[:, t]

    last = jax.jit(jax.jacfwd(lambda *args: stations(*args)[-1]))
    dense = np.mean([last(jnp.zeros((5, 16)), p, t) for p, t in zip(paths, at, strict=True)], axis=0)
    lens = jax.jit(lenses.jacobian_lens)(model, paths, at)
    np.testing.assert_allclose(lens.weight, dense.swapaxes(0, 1)[:-1], rtol=1e-9, atol=1e-12)
    still = jax.jit(functools.partial(stations, jnp.zeros((5, 16))))
    means = np.mean([still(p, t) for p, t in zip(paths, at, strict=True)], axis=0)
    mapped = np.einsum("sij,sj->si", lens.weight, means[:-1]) + lens.bias
    np.testing.assert_allclose(mapped, np.broadcast_to(means[-1], (4, 16)), rtol=1e-9, atol=1e-12)


def test_the_jacobian_lens_of_a_walk_that_stands_still_is_the_identity():
    still = jax.tree.map(jnp.zeros_like, model_of())
    lens = lenses.jacobian_lens(still, np.array([[1, 2, 3]]), np.array([2]))
    np.testing.assert_array_equal(lens.weight, np.broadcast_to(np.eye(16), (4, 16, 16)))
    np.testing.assert_array_equal(lens.bias, 0)


def test_the_jacobian_lens_of_equal_paths_is_that_of_one_in_bfloat16_too():
    """Sums of many equal terms in bfloat16 stop growing."""
    model = jw.astype(model_of(0.3), jnp.bfloat16)
    one, many = (lenses.jacobian_lens(model, np.stack([TOKENS] * n), np.full(n, 3)) for n in (1, 600))
    np.testing.assert_allclose(many.weight, one.weight, rtol=1e-3, atol=1e-4)
    for at in (np.array([6]), np.array([-7])):
        with pytest.raises(ValueError, match="at: expected from"):
            lenses.jacobian_lens(model, TOKENS[None], at)


def test_least_squares_recovers_planted_maps(x64):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 6, 6)), rng.normal(size=(2, 6))
    last = rng.normal(size=(200, 6))
    before = [np.linalg.solve(w, (last - b).T).T for w, b in zip(weight, bias, strict=True)]
    lens = lenses.least_squares_lens(jnp.asarray(np.stack([*before, last])), ridge=0.0)
    np.testing.assert_allclose(lens.weight, weight, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(lens.bias, bias, rtol=1e-6, atol=1e-8)


def test_the_tuned_lens_learns_a_planted_map():
    """Stations that are an affine image of the last one away from it: the logit lens is wrong, the tuned one right."""
    model = model_of(1.0, vocab_size=5)
    last = normal(0, 512, 16)
    turn = jnp.linalg.qr(normal(1, 16, 16))[0]
    stations = jnp.stack([last @ turn + normal(2, 16), last])
    tuned = jax.jit(functools.partial(lenses.tuned_lens, steps=600, learning_rate=0.02))
    lens = tuned(model, stations, key=jax.random.key(0))
    fresh = normal(3, 256, 16)
    held_out = jnp.stack([fresh @ turn + normal(2, 16), fresh])
    before, after = (lenses.read(model, one, held_out).kl[0].mean() for one in (LOGIT_LENS, lens))
    assert before > 1.0
    assert after < 0.1 * before


@pytest.mark.parametrize("kind", quick({"sandwich"}, KINDS))
def test_half_the_squared_fisher_length_is_the_divergence_of_a_small_step(x64, kind):
    model = to64(model_of(**KINDS[kind]))
    rng = np.random.default_rng(0)
    station, way = rng.normal(size=(2, 16))
    errors = []
    for size in (1e-2, 1e-3, 1e-4):
        step = jnp.asarray(np.stack([station, station + size * way]))
        ratio = lenses.step_divergences(model, step) / (lenses.fisher_lengths(model, step) ** 2 / 2)
        errors.append(abs(float(ratio[0]) - 1))
    # To first order in the step.
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1] < 1e-2


def test_the_fisher_length_by_its_matrix(x64):
    model = to64(model_of(unembed_bias=True))
    stations = model.walk(TOKENS).stations[:, 3]
    lengths = lenses.fisher_lengths(model, stations)
    for s in range(4):
        J = jax.jacobian(lambda x: model.logits(model.context(x)))(stations[s])
        p = np.exp(jax.nn.log_softmax(model.logits(model.context(stations[s]))))
        G = J.T @ (np.diag(p) - np.outer(p, p)) @ J
        delta = stations[s + 1] - stations[s]
        np.testing.assert_allclose(lengths[s], np.sqrt(delta @ G @ delta), rtol=1e-9)


def test_one_pass_reads_what_three_do(x64):
    model = to64(model_of(vocab_size=7, norm="layer_norm"))
    paths = np.random.default_rng(0).integers(0, 7, (3, 6))
    walk, read = jax.jit(jw.encoding_walk), jax.jit(lenses.read)
    fisher_lengths, step_divergences = jax.jit(lenses.fisher_lengths), jax.jit(lenses.step_divergences)
    stations = jnp.concatenate([walk(model, path).stations for path in paths], axis=1)  # [S, N, D]
    reading, fisher, divergence = jax.jit(lenses.read_steps)(model, stations)
    for got, expected in zip(reading, read(model, lenses.LOGIT_LENS, stations), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    for n in range(stations.shape[1]):
        np.testing.assert_allclose(fisher[:, n], fisher_lengths(model, stations[:, n]), rtol=1e-12)
        np.testing.assert_allclose(divergence[:, n], step_divergences(model, stations[:, n]), rtol=1e-12)
