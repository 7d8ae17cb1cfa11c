"""Filters: their definitions, every derivative of each, and what `hold` holds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxwalk import filters as f
from tests.conftest import float64, normal, perturbed, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")
D, E = 8, 12
KEYS = jax.random.split(jax.random.key(0), 4)


def mlp(activation, gated):
    up, gate = (f.Linear.init(D, E, bias=True, key=k) for k in KEYS[:2])
    down = f.Linear.init(E, D, bias=True, key=KEYS[2])
    return f.GatedMLP(gate, up, down, activation) if gated else f.MLP(up, down, activation)


FILTERS = {
    "linear": f.Linear.init(D, D, bias=True, key=KEYS[0]),
    "layer_norm": f.LayerNorm.init(D),
    "layer_norm-nobias": f.LayerNorm.init(D, bias=False),
    "rms_norm": f.RMSNorm.init(D),
    **{f"{'gated' if g else 'mlp'}-{a}": mlp(a, g) for a in f.GATES for g in (False, True)},
}
FILTERS = {name: perturbed(module) for name, module in FILTERS.items()}
each = pytest.mark.parametrize("name", FILTERS)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


PHI = {
    "gelu": lambda a: a * 0.5 * (1 + erf(a / math.sqrt(2))),
    "gelu_tanh": lambda a: a * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "relu": lambda a: np.maximum(a, 0),
    "silu": lambda a: a * sigmoid(a),
}


def reference(name, module, x):
    linear = lambda m, x: x @ np.array(m.weight) + np.array(m.bias)
    kind, _, choice = name.partition("-")
    if kind == "linear":
        return linear(module, x)
    if kind == "layer_norm":
        y = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * np.array(module.scale)
        return y if module.bias is None else y + np.array(module.bias)
    if kind == "rms_norm":
        return x / np.sqrt((x**2).mean() + 1e-5) * np.array(module.scale)
    hidden = linear(module.up, x)
    hidden = PHI[choice](linear(module.gate, x)) * hidden if kind == "gated" else PHI[choice](hidden)
    return linear(module.down, hidden)


@jax.jit
def measured(module, x, t):
    """The value, held and not; J t by jvp, by linearize and by vjp; and the curvature of the held function."""
    held = lambda x: module(x, hold=True)
    y, linear = jax.linearize(module, x)
    return {
        "value": y,
        "held": held(x),
        "jvp": jax.jvp(module, (x,), (t,))[1],
        "linearize": linear(t),
        "vjp": jax.jacrev(module)(x) @ t,
        "held_jvp": jax.linearize(held, x)[1](t),
        "held_curvature": jax.jvp(lambda x: jax.jvp(held, (x,), (t,))[1], (x,), (t,))[1],
    }


@each
def test_definition_derivatives_and_hold(name):
    module = FILTERS[name]
    got = measured(module, normal(1, D), normal(2, D))
    with float64():
        module, x, t = to64((module, normal(1, D), normal(2, D)))
        exact = measured(module, x, t)
        expected = reference(name, module, np.array(x))
        step = 1e-6
        slope = (reference(name, module, np.array(x + step * t)) - reference(name, module, np.array(x - step * t))) / (
            2 * step
        )
    np.testing.assert_allclose(exact["value"], expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got["value"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(exact["held"], exact["value"])
    for mode in ("jvp", "linearize", "vjp"):
        np.testing.assert_allclose(exact[mode], slope, rtol=1e-5, atol=1e-8, err_msg=mode)
        np.testing.assert_allclose(got[mode], exact[mode], rtol=1e-4, atol=1e-4, err_msg=mode)
    assert not np.array(exact["held_curvature"]).any()


@each
def test_extreme_inputs_and_zero(name):
    @jax.jit
    def grads(module, x):
        return jax.value_and_grad(lambda m, x: m(x).sum(), argnums=(0, 1))(module, x)

    for x in (jnp.zeros(D), 1e4 * normal(1, D), jnp.full(D, 1e4)):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads(FILTERS[name], x)))


def test_a_held_norm_is_a_fixed_linear_map():
    # Not the derivative: a norm's own derivative removes the radial part, the held one keeps it.
    norm, x = FILTERS["rms_norm"], normal(1, D)
    held = measured(norm, x, x)["held_jvp"]
    np.testing.assert_allclose(held, norm(x), rtol=1e-6)
    assert np.abs(measured(norm, x, x)["jvp"]).max() < 1e-4


def test_rows_out_of_range_are_nan_and_never_another_row():
    embed = f.Embed.init(5, D, key=KEYS[0])
    positions = f.LearnedPositions.init(5, D, key=KEYS[0])
    for table in (embed, positions):
        rows = np.array(jax.jit(jax.vmap(table))(jnp.array([0, 4, 5, -1, 2**31 - 1])))
        np.testing.assert_array_equal(rows[:2], table.table[np.array([0, 4])])
        assert np.isnan(rows[2:]).all()


def test_tied_unembedding_uses_the_token_vectors():
    table, context = normal(0, 5, D), normal(1, D)
    tied = f.Unembed.init(5, D, tied=True, bias=True, key=KEYS[0])
    untied = f.Unembed.init(5, D, tied=False, bias=False, key=KEYS[0])
    assert tied.weight is None
    assert untied.bias is None
    np.testing.assert_allclose(perturbed(tied)(context, table), table @ context + perturbed(tied).bias, rtol=1e-5)
    np.testing.assert_allclose(untied(context, table), untied.weight @ context, rtol=1e-5, atol=1e-6)
    assert tied(context.astype(jnp.bfloat16), table.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoidal_positions(width):
    positions = f.SinusoidalPositions(width)
    assert jax.tree.leaves(positions) == []  # a fixed table must not be a leaf: optimisers would decay it
    rows = jax.jit(jax.vmap(positions))(jnp.arange(6))
    half = (width + 1) // 2
    angles = np.arange(6)[:, None] * 10000.0 ** (-np.arange(half) / half)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1)[:, :width] * positions.scale * math.sqrt(2)
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_reductions_are_wide():
    x = (normal(1, D) * 1e-3 + 300).astype(jnp.bfloat16)  # squares and sums of these are lost in bfloat16
    norm = jax.tree.map(lambda a: a.astype(jnp.bfloat16), f.RMSNorm.init(D))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(jnp.float32), 1, rtol=1e-2)
    assert f.wide(jnp.bfloat16) == jnp.float32
    assert f.wide(jnp.float16) == jnp.float32
    assert f.wide(jnp.float64) == jnp.float64
