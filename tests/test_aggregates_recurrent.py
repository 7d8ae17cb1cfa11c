"""GRU, LSTM, minGRU, RWKV-4 and RWKV-7 against the equations of their papers, and through a whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.aggregates._recurrent import tanh_gate
from jaxwalk.config import ConfigError
from tests.conftest import model_of, normal, perturbed, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

D, T = 16, 12
NAMES = ("gru", "lstm", "min_gru", "rwkv4", "rwkv4_channel_mix", "rwkv7")
CHOICES = {
    "gru": [{}, {"hidden": 5, "bias": False}],
    "lstm": [{}, {"hidden": 5, "bias": False}],
    "min_gru": [{}, {"hidden": 5, "positive": True}],
    "rwkv4": [{}],
    "rwkv4_channel_mix": [{}, {"hidden": 5}],
    "rwkv7": [{}, {"heads": 2, "rank": 3, "gate_rank": 5, "chunk": 5}],
}
CASES = [pytest.param(name, choices, id=f"{name}-{i}") for name in NAMES for i, choices in enumerate(CHOICES[name])]
TOKENS = np.array([1, 4, 0, 2, 2, 3, 1])
SEGMENTS = np.array([1, 1, 1, 2, 2, 2, 2])


def made(name, **choices):
    """One with random parameters, in float64."""
    config = jw.aggregates.config(name, **choices)
    init = lambda: config.init(width=D, max_length=T, layer=0, depth=2, key=jax.random.key(0))
    return to64(perturbed(jax.eval_shape(init), 0.5))


# The papers' equations, position by position. x: [T, D]; fresh[t] is 0 where a document starts, which forgets all
# before it, and 1 elsewhere.


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def linear(module, x):
    return x @ np.asarray(module.weight) + (0 if module.bias is None else np.asarray(module.bias))


def gru(a, x, fresh):
    h = np.zeros(len(a.recurrent.weight))
    for t in range(len(x)):
        h = fresh[t] * h
        W, U = np.split(linear(a.input, x[t]), 3), np.split(linear(a.recurrent, h), 3)
        r, z = sigmoid(W[0] + U[0]), sigmoid(W[1] + U[1])
        h = z * h + (1 - z) * np.tanh(W[2] + r * U[2])
        yield linear(a.out, h)


def lstm(a, x, fresh):
    h = c = np.zeros(len(a.recurrent.weight))
    for t in range(len(x)):
        h, c = fresh[t] * h, fresh[t] * c
        i, f, g, o = np.split(linear(a.input, x[t]) + linear(a.recurrent, h), 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield linear(a.out, h)


def min_gru(a, x, fresh):
    h = 0
    for t in range(len(x)):
        z, v = sigmoid(linear(a.gate, x[t])), linear(a.value, x[t])
        if a.bias is not None:  # g, with its 1/2 learned
            v = np.where(v >= 0, v, sigmoid(v) - 0.5) + np.asarray(a.bias)
        h = (1 - z) * fresh[t] * h + z * v
        yield linear(a.out, h)


def rwkv4(a, x, fresh):
    rate, bonus = np.exp(np.asarray(a.log_rate)), np.asarray(a.bonus)
    up = down = 0
    for t in range(len(x)):
        before = fresh[t] * x[t - 1]
        r, k, v = (s * x[t] + (1 - s) * before for s in np.asarray(a.shares))
        r, k, v = linear(a.receptance, r), linear(a.key, k), linear(a.value, v)
        up, down = fresh[t] * up, fresh[t] * down
        wkv = (up + np.exp(bonus + k) * v) / (down + np.exp(bonus + k))
        up, down = np.exp(-rate) * up + np.exp(k) * v, np.exp(-rate) * down + np.exp(k)
        yield linear(a.out, sigmoid(r) * wkv)


def rwkv4_channel_mix(a, x, fresh):
    for t in range(len(x)):
        before = fresh[t] * x[t - 1]
        r, k = (s * x[t] + (1 - s) * before for s in np.asarray(a.shares))
        yield sigmoid(linear(a.receptance, r)) * linear(a.down, np.maximum(linear(a.up, k), 0) ** 2)


def rwkv7(a, x, fresh):
    H, K = a.heads, D // a.heads
    S = np.zeros((H, K, K))
    for t in range(len(x)):
        before = fresh[t] * x[t - 1]
        xr, xw, xk, xv, xa, xg = (x[t] + s * (before - x[t]) for s in np.asarray(a.shares))
        r, k, v = linear(a.receptance, xr), linear(a.key, xk), linear(a.value, xv)
        w = np.exp(-np.exp(-0.5) * sigmoid(linear(a.decay_up, np.tanh(linear(a.decay, xw)))))
        rate = sigmoid(linear(a.rate_up, linear(a.rate, xa)))
        g = linear(a.gate_up, sigmoid(linear(a.gate, xg)))
        removal = k * np.asarray(a.removal)
        k = k * (1 + (rate - 1) * np.asarray(a.replacement))
        heads = np.zeros((H, K))
        S = fresh[t] * S
        for h in range(H):
            at = slice(h * K, (h + 1) * K)
            c = removal[at] / np.sqrt((removal[at] ** 2).sum() + 1e-6)
            # The paper's state is [V, K]: S (diag(w) - c^T (a * c)) + v^T k.
            S[h] = S[h] @ (np.diag(w[at]) - np.outer(c, rate[at] * c)) + np.outer(v[at], k[at])
            y = S[h] @ r[at]
            y = (y - y.mean()) / np.sqrt(y.var() + K * 1e-5)
            y = y * np.asarray(a.norm.scale)[at] + np.asarray(a.norm.bias)[at]
            heads[h] = y + (r[at] * np.asarray(a.bonus)[at] * k[at]).sum() * v[at]
        yield linear(a.out, g * heads.reshape(-1))


REFERENCES = {
    "gru": gru,
    "lstm": lstm,
    "min_gru": min_gru,
    "rwkv4": rwkv4,
    "rwkv4_channel_mix": rwkv4_channel_mix,
    "rwkv7": rwkv7,
}


@pytest.mark.parametrize(("name", "choices"), CASES)
def test_it_is_what_its_paper_says(name, choices, x64):
    aggregate, x = made(name, **choices), to64(normal(0, T, D))
    segments = np.repeat([1, 2], [7, 5])
    for ids, starts in ((None, (0,)), (segments, (0, 7))):
        expected = np.array(list(REFERENCES[name](aggregate, np.asarray(x), ~np.isin(np.arange(T), starts))))
        y = jax.jit(lambda a, x, ids: a(x, ids))(aggregate, x, None if ids is None else jnp.asarray(ids))
        np.testing.assert_allclose(y, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", quick({"gru", "rwkv4"}, NAMES))
def test_whole_models_are_decomposed_exactly(name, x64):
    each = tuple(jw.aggregates.config(name, **choices) for choices in CHOICES[name])
    model = to64(model_of(aggregate=each, filter=None))
    tokens = jw.decompose(model, TOKENS, segments=SEGMENTS)
    assert tokens.error <= 1e-13
    assert not np.asarray(tokens.by_token)[:3].any()
    heads = jw.decompose_heads(model, TOKENS, 1, segments=SEGMENTS)
    assert heads.error <= 1e-13
    assert not np.asarray(heads.by_head)[:, :3].any()


@pytest.mark.parametrize("name", quick({"rwkv7"}, NAMES))
def test_whole_models_in_float32(name):
    model = model_of(aggregate=name, norm="rms_norm", filter=None)
    assert jw.decompose(model, TOKENS, 5).error <= 2e-6
    assert jw.decompose_heads(model, TOKENS, 1).error <= 2e-6


def test_tanh_gate_is_smooth_at_0(x64):
    a = jnp.array([0.0, 1e-300, 1e-9, 1e-3, 0.01 - 1e-9, 0.01, 0.3, 40.0, 1e200])
    value, slope = jax.vmap(jax.value_and_grad(lambda a: tanh_gate(a)))(jnp.concatenate([-a, a]))
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(value[len(a) :] * a, np.tanh(a), rtol=1e-15)
    np.testing.assert_array_equal(value[: len(a)], value[len(a) :])
    few = np.asarray(a[3:7])
    np.testing.assert_allclose(slope[len(a) :][3:7], (1 / np.cosh(few) ** 2 - np.tanh(few) / few) / few, atol=1e-13)
    assert slope[len(a)] == 0
    assert value[len(a)] == 1


def test_associative_and_one_by_one_sums_of_rwkv4(x64):
    from jaxwalk.aggregates import rwkv4

    rng = np.random.default_rng(0)
    k, v = jnp.asarray(30 * rng.normal(size=(11, 3))), jnp.asarray(rng.normal(size=(11, 3)))
    log_decay = jnp.asarray(-rng.exponential(size=(11, 3))).at[4].set(-jnp.inf).at[6].set(0.0)

    def average(log_decay, k, v, platform):
        with pytest.MonkeyPatch.context() as patch:
            other = lambda *given, cpu, default: (cpu if platform == "cpu" else default)(*given)
            patch.setattr(rwkv4.lax, "platform_dependent", other)
            sums = rwkv4.cumulative_sums(log_decay, rwkv4.Sums(k, v, jnp.ones_like(k)))
        return sums.numerator / sums.denominator

    def run(platform):
        y = jax.jit(lambda *given: average(*given, platform))(log_decay, k, v)
        slopes = jax.jit(jax.grad(lambda *given: jnp.sum(jnp.sin(average(*given, platform))), (0, 1, 2)))
        return y, slopes(log_decay, k, v)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), run("cpu"), run("default"))


@pytest.mark.parametrize("name", ["rwkv4", "rwkv7"])
def test_the_first_layers_start_as_their_paper_says(name):
    """By values alone, at the ends: the first and the last channel of the first and the last layer."""
    config = jw.aggregates.config(name)
    first, last = (config.init(width=64, max_length=4, layer=layer, depth=3, key=jax.random.key(0)) for layer in (0, 2))
    if name == "rwkv4":
        for one in (first, last):
            np.testing.assert_allclose(one.log_rate[jnp.array([0, 63])], [-5, 3], rtol=1e-6)
            np.testing.assert_allclose(one.bonus[:3], np.log(0.3) + np.array([0, 0.5, -0.5]), rtol=1e-6)
            np.testing.assert_array_equal(one.shares[:2, 0], 0)
        np.testing.assert_allclose(first.shares[:, 32], [0.5**0.5, 0.5, 0.5], rtol=1e-6)
        np.testing.assert_allclose(last.shares[2, 0], 0.3, rtol=1e-6)
    else:
        np.testing.assert_array_equal(first.shares[:, 0], 1)
        np.testing.assert_allclose(first.shares[:, 32], 1 - 0.5 ** np.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]), rtol=1e-6)
        np.testing.assert_allclose(first.decay_up.bias[jnp.array([0, 63])], [-6 + 0.5 - 2.5, 0.5 + 2.5], rtol=1e-6)
        np.testing.assert_allclose(last.norm.scale, 1)
        assert first.decay.weight.shape == (64, 32)
        assert first.norm.eps == pytest.approx(16e-5)
        assert not np.asarray(first.gate.weight).any()


def test_gates_at_the_start():
    lstm = jw.aggregates.config("lstm").init(width=8, max_length=4, layer=0, depth=1, key=jax.random.key(0))
    np.testing.assert_array_equal(lstm.input.bias.reshape(4, 8), np.array([0, 1, 0, 0])[:, None] * np.ones(8))
    gru = jw.aggregates.config("gru").init(width=8, max_length=4, layer=0, depth=1, key=jax.random.key(0))
    for U in jnp.split(gru.recurrent.weight, 3, axis=1):
        np.testing.assert_allclose(U @ U.T, np.eye(8), atol=1e-5)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_a_memory_that_is_kept_for_ever_or_not_at_all(name):
    aggregate = jw.aggregates.config(name).init(width=D, max_length=T, layer=0, depth=1, key=jax.random.key(0))
    gate = {"gru": slice(D, 2 * D), "lstm": slice(D, 2 * D)}[name]  # z, or f
    for sign in (-1e6, 1e6):
        input = dataclasses.replace(aggregate.input, bias=aggregate.input.bias.at[gate].set(sign))
        far = dataclasses.replace(aggregate, input=input)
        A, grads = jax.jit(lambda a, x: (a.mixing(x), jax.grad(lambda a, x: a(x).sum(), (0, 1))(a, x)))(
            far, normal(0, T, D)
        )
        assert bool(np.tril(np.asarray(A), -1).any()) == (name == "lstm" and sign > 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_impossible_choices_say_so():
    for name in ("gru", "lstm", "min_gru", "rwkv4_channel_mix"):
        with pytest.raises(ConfigError, match="hidden: expected at least 1, got 0"):
            jw.aggregates.config(name, hidden=0)
    for what in ("heads", "rank", "gate_rank", "chunk"):
        with pytest.raises(ConfigError, match=f"{what}: expected at least 1, got 0"):
            jw.aggregates.config("rwkv7", **{what: 0})
    with pytest.raises(ConfigError, match="heads: expected a divisor of width = 16, got 3"):
        jw.aggregates.config("rwkv7", heads=3).init(width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0))
