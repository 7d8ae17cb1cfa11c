"""Filters: their definitions, every derivative of each, and what `hold` holds."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.special import erf

from jaxwalk import filters as f
from jaxwalk._products import FEW_ROWS, times, times_columns
from tests.conftest import float64, normal, perturbed, quick, to64

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
    "layer_norm-plain": f.LayerNorm.init(D, bias=False, scale=False),
    "rms_norm": f.RMSNorm.init(D),
    "rms_norm-unit_offset": f.RMSNorm.init(D, unit_offset=True),
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
        y = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * (1 if module.scale is None else np.array(module.scale))
        return y if module.bias is None else y + np.array(module.bias)
    if kind == "rms_norm":
        return x / np.sqrt((x**2).mean() + 1e-5) * (np.array(module.scale) + (choice == "unit_offset"))
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


def test_a_scaled_embedding_and_positions_from_an_offset():
    embed = f.Embed(normal(0, 5, D), 3.3)
    np.testing.assert_allclose(embed(jnp.array(2)), 3.3 * embed.table[2], rtol=1e-6)
    narrow = f.Embed(embed.table.astype(jnp.bfloat16), 3.3)(jnp.array(2))
    rounded = narrow.astype(jnp.float32) / embed.table[2].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(rounded, float(jnp.bfloat16(3.3)), rtol=2**-8)
    assert narrow.dtype == jnp.bfloat16
    positions = f.LearnedPositions.init(5, D, offset=2, key=KEYS[0])
    assert positions.max_length == 5
    assert positions.table.shape == (7, D)
    rows = np.array(jax.jit(jax.vmap(positions))(jnp.array([0, 4, 5, -1, -2, 2**31 - 1])))
    np.testing.assert_array_equal(rows[:2], positions.table[np.array([2, 6])])
    assert np.isnan(rows[2:]).all()


def test_a_normed_embedding():
    """The scale comes before the norm, which then sees it in its epsilon alone."""
    scale, bias = normal(1, D), normal(2, D)
    embed = f.Embed(normal(0, 5, D), 3.0, f.LayerNorm(scale, bias, eps=2.0))
    row = 3 * np.array(embed.table[4], float)
    expected = (row - row.mean()) / np.sqrt(row.var() + 2) * np.array(scale) + np.array(bias)
    np.testing.assert_allclose(embed(jnp.array(4)), expected, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(embed.vector)(embed.table)[4], expected, atol=1e-5)
    assert np.isnan(embed(jnp.array(5))).all()


def test_the_gate_of_a_soft_cap_is_the_quotient_and_its_limit(x64):
    a = jnp.concatenate([jnp.linspace(-40, 40, 101), 10.0 ** -jnp.arange(0.0, 12), jnp.zeros(1)])
    gate = jax.jit(f.softcap_gate, static_argnums=1)(a, 3.0)
    np.testing.assert_allclose(gate * a, f.softcapped(a, 3.0), rtol=1e-14, atol=1e-300)
    np.testing.assert_allclose(f.softcapped(a, 3.0), 3 * np.tanh(np.array(a) / 3), rtol=1e-14)
    assert gate[-1] == 1
    slopes = jax.vmap(jax.grad(lambda a: f.softcap_gate(a, 3.0)))(a)
    assert np.isfinite(slopes).all()
    capped = f.Unembed.init(5, D, tied=False, bias=True, softcap=0.5, key=KEYS[1])
    table, context = normal(0, 5, D), 30 * normal(1, D)
    free = f.Unembed(capped.weight, capped.bias)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(capped(context, table), 0.5 * np.tanh(free(context, table) / 0.5), rtol=1e-6)


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


def plain(x, w):
    return x @ w


# What is mapped over, one entry for each vmap, outermost first; axis 1 of w is E and of x is the next batch dimension.
MAPPED = {
    "vector": ((), ()),
    "positions": ((0,), (None,)),
    "paths": ((0, 0), (None, None)),
    "paths-last": ((0, 1), (None, None)),
    "models": ((None,), (0,)),
    "models-positions": ((0, 0), (0, None)),
    "positions-models": ((0, 0), (None, 0)),
    "models-paths-positions": ((0, 0, 0), (0, None, None)),
    "one-path-many-models": ((None, 0), (0, None)),
}


@pytest.mark.parametrize("product", [times, times_columns])
@pytest.mark.parametrize(
    "mapped", quick({"vector", "paths-last", "models-paths-positions", "one-path-many-models"}, MAPPED)
)
def test_times_is_the_product_under_every_transformation(mapped, product, x64):
    """Batched by any nesting of vmaps: values, both derivatives of each order, and a derivative inside the batch."""
    x_axes, w_axes = MAPPED[mapped]
    rng = np.random.default_rng(0)
    x_shape, w_shape = (D,), (D, E) if product is times else (E, D)
    reference = plain if product is times else lambda x, w: plain(x, w.T)
    for size, x_axis, w_axis in zip((2, 3, 4), x_axes[::-1], w_axes[::-1], strict=False):
        x_shape = x_shape if x_axis is None else (*x_shape[:x_axis], size, *x_shape[x_axis:])
        w_shape = w_shape if w_axis is None else (*w_shape[:w_axis], size, *w_shape[w_axis:])
    operands = jnp.asarray(rng.normal(size=x_shape)), jnp.asarray(rng.normal(size=w_shape))
    tangents = jnp.asarray(rng.normal(size=x_shape)), jnp.asarray(rng.normal(size=w_shape))

    def batched(function):
        for x_axis, w_axis in zip(x_axes[::-1], w_axes[::-1], strict=True):
            function = jax.vmap(function, (x_axis, w_axis))
        return function

    def results(product):
        scalar = lambda x, w: jnp.sin(batched(product)(x, w)).sum()
        inside = lambda x, w: jnp.sin(product(x, w)).sum()
        gradient = jax.grad(scalar, (0, 1))
        return {
            "value": batched(product)(*operands),
            "gradient": gradient(*operands),
            "jvp": jax.jvp(scalar, operands, tangents)[1],
            "jvp of gradient": jax.jvp(gradient, operands, tangents)[1],
            "gradient of jvp": jax.grad(lambda x, w: jax.jvp(scalar, (x, w), tangents)[1], (0, 1))(*operands),
            "linearize": jax.linearize(scalar, *operands)[1](*tangents),
            "gradient inside": batched(jax.grad(inside, (0, 1)))(*operands),
            "Jacobian inside": batched(jax.jacfwd(product, (0, 1)))(*operands),
            "jit": jax.jit(gradient)(*operands),
            "checkpoint": jax.grad(jax.checkpoint(scalar), (0, 1))(*operands),
        }

    for ours, theirs in zip(results(product).items(), results(reference).items(), strict=True):
        jax.tree.map(
            lambda a, b, name=ours[0]: np.testing.assert_allclose(a, b, 1e-12, 1e-12, err_msg=name), ours[1], theirs[1]
        )


@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS])
def test_few_rows_and_many_are_multiplied_alike(rows, x64):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(rows, D))), jnp.asarray(rng.normal(size=(E, D)))
    scalar = lambda product: lambda x, w: jnp.sin(jax.vmap(product, (0, None))(x, w)).sum()
    ours, theirs = (jax.jit(jax.value_and_grad(scalar(p), (0, 1))) for p in (times_columns, lambda x, w: x @ w.T))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-12), ours(x, w), theirs(x, w))


def test_times_under_scan(x64):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(D, D))) / D
    walk = lambda product: lambda w: jax.lax.scan(lambda x, _: (product(x, w), None), jnp.ones(D), None, 5)[0].sum()
    np.testing.assert_allclose(jax.grad(walk(times))(w), jax.grad(walk(plain))(w), 1e-12)


@pytest.mark.parametrize(("x", "w"), [((D,), (E, D)), ((2, D), (D, E)), ((D,), (D,))])
def test_times_refuses_what_is_not_a_vector_times_a_matrix(x, w):
    with pytest.raises((TypeError, jaxtyping.TypeCheckError)):
        times(jnp.ones(x), jnp.ones(w))


def test_times_refuses_two_dtypes():
    with pytest.raises(TypeError, match="one dtype, got bfloat16 and float32"):
        times(jnp.ones(D, jnp.bfloat16), jnp.ones((D, E)))
