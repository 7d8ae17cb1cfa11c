"""Aggregates whose mixing is learned by position, as tables or as long filters: held to their papers' equations."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import jaxwalk as jw
from jaxwalk.config import ConfigError
from tests.conftest import float64, model_of, normal, perturbed, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

D, M, T = 16, 12, 10
CASES = {
    "linear_mixer": ("linear_mixer", {}),
    "gmlp": ("gmlp", {}),
    "hyena": ("hyena", {}),
    "hyena-order3": ("hyena", {"order": 3, "taps": 2, "filter_width": 8, "bands": 2, "bias": False}),
}
each = pytest.mark.parametrize("case", CASES)
parallel = jax.jit(lambda aggregate, x: aggregate(x))


def fresh(name, max_length=M, width=D, **choices):
    config = jw.aggregates.config(name, **choices)
    return config.init(width=width, max_length=max_length, layer=0, depth=2, key=jax.random.key(0))


@functools.cache
def build(case):
    name, choices = CASES[case]
    return perturbed(jax.eval_shape(lambda: fresh(name, **choices)), 0.3)


# The papers' equations, position by position, in numpy.


def f64(a):
    return np.array(a, float)


def linear(module, x):
    return x @ f64(module.weight) + (0 if module.bias is None else f64(module.bias))


def linear_mixer(aggregate, x):
    v = linear(aggregate.value, x).reshape(len(x), aggregate.heads, -1)
    y = np.zeros_like(v)
    for i in range(len(x)):
        for j in range(i + 1):
            y[i] += f64(aggregate.table)[:, i, j, None] * v[j]
    return linear(aggregate.out, y.reshape(len(x), -1))


def gmlp(aggregate, x):
    u, z = (a * special.ndtr(a) for a in (linear(aggregate.gate, x), linear(aggregate.value, x)))
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    z = z * f64(aggregate.norm.scale) + f64(aggregate.norm.bias)
    W, b = f64(aggregate.table), f64(aggregate.scale) * f64(aggregate.bias)
    s = np.stack([u[i] * (sum(W[i, j] * z[j] for j in range(i + 1)) + b[i]) for i in range(len(x))])
    return linear(aggregate.out, s)


def filters(module, channels, length):
    """h_n(lag), [N, length, E]."""
    h = np.zeros((module.order, length, channels))
    slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
    for lag in range(length):
        share, turn = lag / (module.max_length - 1), 2 * math.pi * lag / module.max_length
        waves = np.exp(-1j * turn * np.linspace(1e-4, module.bands - 1, module.bands))
        a = np.concatenate([[share], waves.real, waves.imag])
        for layer in module.layers[:-1]:
            a = np.sin(linear(layer, a))
        a = linear(module.layers[-1], a).reshape(module.order, channels)
        h[:, lag] = a * np.exp(-share * np.linspace(slow, fast, channels))
    return h


def hyena(aggregate, x):
    def short(module, x):
        w = f64(module.weight)
        return np.stack([sum(w[n] * x[i - n] for n in range(min(len(w), i + 1))) for i in range(len(x))])

    N, E = aggregate.direct.shape
    h, d = filters(aggregate.filters, E, len(x)), f64(aggregate.direct)
    z = short(aggregate.value_convolution, linear(aggregate.value, x))
    gates = short(aggregate.gate_convolution, linear(aggregate.gate, x)).reshape(len(x), N, E)
    for n in range(N):
        long = np.stack([sum(h[n, i - j] * z[j] for j in range(i + 1)) + d[n] * z[i] for i in range(len(x))])
        z = gates[:, n] * long
    return linear(aggregate.out, z)


PAPERS = {"linear_mixer": linear_mixer, "gmlp": gmlp, "hyena": hyena}


@each
def test_equations_of_the_papers(case):
    aggregate, x = build(case), normal(0, T, D)
    expected = PAPERS[CASES[case][0]](aggregate, f64(x))
    np.testing.assert_allclose(parallel(aggregate, x), expected, atol=2e-5, rtol=1e-5)
    with float64():
        np.testing.assert_allclose(parallel(to64(aggregate), to64(x)), expected, atol=1e-12, rtol=1e-12)


# Positions.


@each
def test_beyond_what_was_learned_it_is_nan_and_documents_start_anew(case):
    aggregate, x = build(case), normal(1, M + 3, D)
    y = np.array(parallel(aggregate, x))
    assert np.isfinite(y[:M]).all()
    assert np.isnan(y[M:]).all()
    segments = jnp.array([1] * 5 + [2] * (M - 2))
    packed, mixed, stepped = jax.jit(
        lambda a, x, s: (
            a(x, s),
            a.apply_mixing(x, a.mixing(x)),
            jax.lax.scan(a.step, a.init_state(len(x)), x)[1],
        )
    )(aggregate, x, segments)
    np.testing.assert_allclose(packed[5:], parallel(aggregate, x[5:]), atol=1e-5)
    for form in (mixed, stepped):
        np.testing.assert_allclose(form, y, atol=1e-5)


def test_hyena_needs_no_matrix_for_each_channel():
    """With documents there is a matrix of positions, for one channel at a time, in reverse mode too."""
    length, width = 128, 64
    aggregate = jax.eval_shape(lambda: fresh("hyena", length, width))
    x = jax.ShapeDtypeStruct((length, width), jnp.float32)
    segments = jax.ShapeDtypeStruct((length,), jnp.int32)
    slope = jax.jit(jax.grad(lambda a, x, s: a(x, s).sum(), (0, 1))).lower(aggregate, x, segments).compile()
    assert slope.memory_analysis().temp_size_in_bytes < 4 * width * length**2 / 2


# As they start.


def test_gmlp_starts_as_a_map_of_each_position():
    aggregate, x = fresh("gmlp", 64), normal(2, 64, D)
    u = jax.nn.gelu(jax.vmap(aggregate.gate)(x), approximate=False)
    np.testing.assert_allclose(parallel(aggregate, x), jax.vmap(aggregate.out)(u), atol=0.01)
    assert aggregate.gate.weight.shape == aggregate.value.weight.shape == (D, 3 * D)


def test_linear_mixer_starts_as_large_at_every_position():
    aggregate = fresh("linear_mixer", 64, heads=16)
    size = np.sqrt((np.array(aggregate.mixing(normal(2, 64, D))) ** 2).sum(-1))
    np.testing.assert_allclose(size.mean(0), 1, atol=0.4)


@pytest.mark.parametrize("max_length", [16, 512])
def test_hyena_filters_start_with_an_energy_of_one(max_length):
    """On average over channels, and over those whose window decays slowly, or fast, alone."""
    aggregate = fresh("hyena", max_length, 256)
    energy = (np.array(aggregate.filters(max_length)) ** 2).sum(1)
    for channels in (slice(None), slice(0, 64), slice(-64, None)):
        assert 0.6 < energy[:, channels].mean() < 1.5


# Through a whole model.


@pytest.mark.parametrize(
    ("names", "segments"),
    [
        (("hyena", "gmlp"), (1, 1, 1, 2, 2, 2, 2)),
        pytest.param(("linear_mixer", "hyena"), None, marks=pytest.mark.slow),
        pytest.param(("linear_mixer", "hyena"), (1, 1, 1, 2, 2, 2, 2), marks=pytest.mark.slow),
        pytest.param(("gmlp", "linear_mixer"), None, marks=pytest.mark.slow),
        pytest.param(("gmlp", "linear_mixer"), (1, 1, 1, 2, 2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_decompositions_are_exact(names, segments):
    model = model_of(aggregate=names, filter=None)
    tokens = np.array([1, 4, 0, 2, 2, 3, 1])
    segments = None if segments is None else np.array(segments)
    for analysed, tolerance in ((model, 5e-6), (None, 1e-13)):
        with float64() if analysed is None else jax.enable_x64(False):
            analysed = to64(model) if analysed is None else analysed
            parts = jw.decompose(analysed, tokens, segments=segments)
            assert parts.error <= tolerance
            np.testing.assert_allclose(
                parts.by_token.sum(0) + parts.by_position.sum(0) + parts.bias, parts.whole, atol=1e-4
            )
            if segments is not None:
                assert not np.array(parts.by_token[:3]).any()
            for layer in (0, 1):
                assert jw.decompose_heads(analysed, tokens, layer, segments=segments).error <= tolerance


def test_the_bias_by_position_is_the_bias_of_a_decomposition():
    """A gMLP whose table is zero looks at no token: all it adds is its bias, gated."""
    model = model_of(aggregate="gmlp", depth=1)
    aggregate = model.layers[0].aggregate
    aggregate = dataclasses.replace(aggregate, table=jnp.zeros_like(aggregate.table))
    model = dataclasses.replace(model, layers=(dataclasses.replace(model.layers[0], aggregate=aggregate),))
    heads = jw.decompose_heads(model, np.array([1, 4, 0, 2]), 0)
    assert not np.array(heads.by_head[0]).any()
    assert not np.array(heads.by_head[1, :3]).any()
    assert np.array(heads.by_head[1, 3]).all()


# Refusals.


def test_choices_that_cannot_be_say_so():
    for name, choices, message in (
        ("linear_mixer", {"heads": 0}, "heads: expected at least 1, got 0"),
        ("gmlp", {"hidden": 5}, "hidden: expected an even number of at least 2, as two branches share it, got 5"),
        ("gmlp", {"hidden": 0}, "hidden: expected an even number of at least 2"),
        ("hyena", {"order": 0, "taps": 0}, "order: expected at least 1, got 0; taps: expected at least 1, got 0"),
        ("hyena", {"frequency": -1.0}, "frequency: expected a positive number, got -1.0"),
        ("hyena", {"frequency": math.nan}, "frequency: expected a positive number, got nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            jw.aggregates.config(name, **choices)
    with pytest.raises(ConfigError, match="heads: expected a divisor of width = 16, got 3"):
        fresh("linear_mixer", heads=3)
