"""Derivatives: against finite differences in float64, and each influence map by two algorithms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.model import plain
from jaxwalk.probes import influence
from jaxwalk.probes.gradients import token_vectors
from tests.conftest import float64, model_of, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

TOKENS = np.array([1, 4, 0, 2, 2, 3])
SEGMENTS = np.array([1, 1, 1, 2, 2, 2])
T, D = 6, 16
MODELS = {
    "pre": {},
    "post-rope": {
        "placement": "post",
        "norm": "rms_norm",
        "positions": "none",
        "aggregate": jw.aggregates.config("attention", positions="rope", kernel="xla"),
        "filter": jw.MLPConfig(gated=True, activation="silu"),
        "tied": True,
    },
    "parallel-fixed": {"placement": "parallel", "aggregate": ("fixed_mixing", "causal_mean")},
    "sandwich-capped": {
        "placement": "sandwich",
        "embed_scale": 3.0,
        "logit_softcap": 2.0,
        "aggregate": jw.aggregates.config("attention", softcap=1.0, qk_norm=True, qk_norm_over="width"),
        "tied": True,
    },
}
each = pytest.mark.parametrize("name", quick({"post-rope", "sandwich-capped"}, MODELS))
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def model64(name):
    return to64(model_of(**MODELS[name]))


@functools.partial(jax.jit, static_argnames=("given", "packed"))
def central_differences(model, step, directions, given, packed):
    """Slopes of the path's log-probability along directions [n, T, D] in the token vectors, by values alone."""
    vectors = token_vectors(model, TOKENS)

    def score(vectors):
        walk = model.walk(TOKENS[:-1], vectors=vectors[:-1], segments=jnp.asarray(SEGMENTS[:-1]) if packed else None)
        steps = jax.nn.log_softmax(jax.vmap(model.logits)(walk.context))[np.arange(T - 1), TOKENS[1:]]
        scored = np.arange(1, T) >= given
        if packed:
            scored = scored & (SEGMENTS[1:] == SEGMENTS[:-1])
        return jnp.sum(steps[scored])

    moved = lambda sign: jax.vmap(lambda d: score(vectors + sign * step * d))(directions)
    return (moved(1) - moved(-1)) / (2 * step)


@pytest.mark.parametrize(
    ("name", "given", "packed"),
    [
        ("post-rope", 3, False),
        ("sandwich-capped", 1, True),
        slow("pre", 1, False),
        slow("parallel-fixed", 1, True),
        slow("sandwich-capped", 1, False),
        slow("pre", 3, True),
        slow("post-rope", 2, True),
        slow("parallel-fixed", 3, False),
    ],
)
def test_path_gradient_agrees_with_central_differences(name, given, packed):
    with float64():
        m = model64(name)
        segments = jnp.asarray(SEGMENTS) if packed else None
        gradient, stations = jax.jit(
            lambda m: (
                jw.path_gradient(m, TOKENS, given, segments),
                jw.station_gradient(m, TOKENS, given, segments),
            )
        )(m)
        directions = jnp.eye(T * D).reshape(-1, T, D)
        slopes = central_differences(m, 1e-5, directions, given, packed).reshape(T, D)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-5 * np.abs(slopes).max())
    assert not np.array(gradient)[-1].any()
    assert stations.shape == (2 * m.depth + 1, T, D)
    np.testing.assert_allclose(stations[0], gradient, rtol=1e-10, atol=1e-12)
    if packed:
        assert not np.array(stations)[:, 2].any()  # the step across the border is not scored


def test_gradients_of_the_longest_and_the_shortest_path():
    m = model_of()
    tokens = np.arange(13) % 5  # max_length + 1
    gradient = jax.jit(jw.path_gradient)(m, tokens)
    stations = jax.jit(jw.station_gradient)(m, tokens)
    np.testing.assert_allclose(stations[0], gradient, atol=1e-5)
    assert np.abs(gradient[:-1]).sum(-1).min() > 0
    for f, shape in ((jw.path_gradient, (1, D)), (jw.station_gradient, (5, 1, D))):
        one = f(m, tokens[:1])
        assert one.shape == shape
        assert not np.array(one).any()


def test_gradients_are_batched_with_vmap():
    m = model_of()
    batch = np.stack([TOKENS, TOKENS[::-1]])
    many = jax.jit(jax.vmap(jw.path_gradient, (None, 0)))(m, batch)
    one = jax.jit(jw.path_gradient)
    for tokens, gradient in zip(batch, many, strict=True):
        np.testing.assert_allclose(one(m, tokens), gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("post-rope", True),
        slow("pre", False),
        slow("parallel-fixed", True),
        slow("pre", True),
        slow("post-rope", False),
        slow("parallel-fixed", False),
    ],
)
def test_context_sensitivity_by_two_algorithms(name, packed):
    segments = jnp.asarray(SEGMENTS) if packed else None

    @jax.jit
    def both(m):
        vectors = token_vectors(m, TOKENS)
        walk = lambda v: m.walk(TOKENS, vectors=v, segments=segments).context
        return jw.context_sensitivity(m, TOKENS, segments), jax.jacfwd(walk)(vectors)

    with float64():
        rows, dense = both(model64(name))  # reverse mode row by row; forward mode, dense
        rows, dense = np.array(rows), np.array(dense)
    np.testing.assert_allclose(rows, np.sqrt((dense**2).sum((1, 3))), rtol=1e-10, atol=1e-12)
    assert not np.triu(rows, 1).any()  # the future: exactly zero
    if packed:
        assert not rows[3:, :3].any()
    assert np.diag(rows).min() > 0


BLOCKS = {
    "three directions of 16 together": ({}, {"BATCH_ELEMENTS": 3 * 4 * 17**2}),
    "one direction at a time": (
        {"filter": jw.MLPConfig(gated=True, activation="silu"), "positions": "none", "depth": 3},
        {"BATCH_ELEMENTS": 1},
    ),
    "filters without Jacobians": ({"placement": "post"}, {"JACOBIAN_ELEMENTS": 0}),
    "layers of two kinds": ({"remat": True, "aggregate": ("fixed_mixing", "causal_mean"), "depth": 5}, {}),
    "values that depend on values before them": ({"aggregate": "gru"}, {}),
    "one layer": ({"depth": 1}, {}),
    "no layer": ({"depth": 0}, {}),
}


@pytest.mark.parametrize("packed", [slow(False), True])
@pytest.mark.parametrize("case", [c if c[0] == "t" else slow(c) for c in BLOCKS])
def test_context_sensitivity_in_blocks_of_rows(case, packed, monkeypatch):
    """However the work is cut up: blocks of 5 rows, the last of 2."""
    choices, constants = BLOCKS[case]
    for name, value in ({"SPLIT_WORK": 0} | constants).items():
        monkeypatch.setattr(influence, name, value)
    tokens = np.arange(34, dtype=np.int32).reshape(2, 17) % 5
    segments = jnp.asarray(np.arange(17, dtype=np.int32) // 7 + 1) if packed else None
    sensitivity = influence._sensitivity.__wrapped__  # not what is compiled with other constants

    @jax.jit
    def both(m, tokens):
        walk = lambda v: m.walk(tokens, vectors=v, segments=segments).context
        return sensitivity(m, tokens, jnp.int32(17), segments), jax.jacfwd(walk)(token_vectors(m, tokens))

    with float64():
        model = to64(model_of(max_length=20, **choices))
        rows, dense = map(np.asarray, jax.vmap(both, (None, 0))(model, tokens))
    np.testing.assert_allclose(rows, np.sqrt((dense**2).sum((2, 4))), rtol=1e-10, atol=1e-12)
    assert not np.triu(rows, 1).any()
    assert np.abs(np.diagonal(rows, axis1=1, axis2=2)).min() > 0
    if packed:
        assert not rows[:, 7:, :7].any()


@pytest.mark.slow
def test_memory_of_context_sensitivity_is_bounded():
    """That of all directions of a row at once would be 2 GiB for each array of the neurons."""
    model = model_of(depth=2, width=512, max_length=512)
    tokens = jnp.arange(512, dtype=jnp.int32) % 5
    compiled = influence._sensitivity.lower(model, tokens, jnp.int32(512), None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 2**30


@each
def test_products_with_the_jacobian_are_adjoint_and_agree_with_central_differences(name):
    with float64():
        m, rng = model64(name), np.random.default_rng(0)
        t, c = jnp.array(rng.normal(size=(T, D))), jnp.array(rng.normal(size=(T, D)))

        @jax.jit
        def products(m, t, c):
            vectors = token_vectors(m, TOKENS)
            contexts = lambda s: m.walk(TOKENS, vectors=vectors + s * t).context
            slope = (contexts(1e-5) - contexts(-1e-5)) / 2e-5
            return jw.context_jvp(m, TOKENS, t), jw.context_vjp(m, TOKENS, c), slope

        push, pull, slope = products(m, t, c)
        np.testing.assert_allclose(jnp.vdot(push, c), jnp.vdot(t, pull), rtol=1e-10)
        np.testing.assert_allclose(push, slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max())


def test_products_respect_borders():
    m, segments = model_of(), jnp.asarray(SEGMENTS)
    first = jnp.zeros((T, D)).at[0].set(jnp.linspace(-1, 1, D))
    push = jax.jit(lambda m, t: jw.context_jvp(m, TOKENS, t, segments))(m, first)
    assert np.abs(push[:3]).max() > 0
    assert not np.array(push[3:]).any()
    last = jnp.zeros((T, D)).at[-1].set(jnp.linspace(-1, 1, D))
    pull = jax.jit(lambda m, c: jw.context_vjp(m, TOKENS, c, segments))(m, last)
    assert not np.array(pull[:3]).any()
    assert np.abs(pull[3:]).max() > 0


@pytest.mark.parametrize("steps", [16, 9])
@pytest.mark.parametrize(
    ("name", "source", "at"), [("post-rope", 2, 4), slow("pre", 5, -1), slow("parallel-fixed", 0, 5)]
)
def test_the_spectrum_is_that_of_the_dense_jacobian(name, source, at, steps, x64):
    model = model64(name)
    vectors = token_vectors(model, TOKENS)
    context = lambda v: plain(model).walk(TOKENS, vectors=vectors.at[source].set(v)).context[at]
    dense = np.asarray(jax.jit(jax.jacfwd(context))(vectors[source]))
    exact = np.linalg.svd(dense, compute_uv=False)
    values, left, right, residual = map(np.asarray, jw.context_spectrum(model, TOKENS, source, at, 3, steps=steps))
    if steps == 16:
        assert residual.max() < 1e-10
    # Each value is within its residual of one of J's; and the vectors carry J to within it.
    assert (np.abs(values[:, None] - exact[None]).min(axis=1) <= residual + 1e-12).all()
    np.testing.assert_allclose(values[0], exact[0], 1e-6)
    np.testing.assert_allclose(right @ dense.T, values[:, None] * left, rtol=0, atol=1e-11)
    assert (np.linalg.norm(left @ dense - values[:, None] * right, axis=1) <= residual + 1e-11).all()
    np.testing.assert_allclose(left @ left.T, np.eye(3), rtol=0, atol=1e-11)
    np.testing.assert_allclose(right @ right.T, np.eye(3), rtol=0, atol=1e-11)
    if steps == 16:
        np.testing.assert_allclose(values, exact[:3], 1e-10)


def test_the_spectrum_of_the_future_is_zero_and_what_does_not_exist_is_named():
    model = model_of()
    assert not np.asarray(jw.context_spectrum(model, TOKENS, 4, 2).values).any()
    for ask, message in (
        ({"source": 6}, "source: expected one from -6 to 5, got 6"),
        ({"source": 0, "at": -7}, "at: expected one from -6 to 5, got -7"),
        ({"source": 0, "k": 17}, "expected 1 <= k <= steps <= 16"),
        ({"source": 0, "k": 4, "steps": 3}, "expected 1 <= k <= steps <= 16"),
    ):
        with pytest.raises(ValueError, match=message):
            jw.context_spectrum(model, TOKENS, **ask)


@each
def test_the_gradient_of_any_scalar_at_every_station(name, x64):
    model = model64(name)
    rng = np.random.default_rng(0)
    direction, way = jnp.asarray(rng.normal(size=D)), jnp.asarray(rng.normal(size=(5, T, D)))
    of = lambda walk: jnp.sum(walk.context[-2] * direction) + jnp.sum(walk.stations[1, 0] ** 2)
    station_gradient = jax.jit(jw.station_gradient, static_argnames="of")
    gradient = station_gradient(model, TOKENS, of=of)
    value = jax.jit(lambda step: of(model.walk(TOKENS, nudge=step * way)))
    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    np.testing.assert_allclose(jnp.sum(gradient * way), slope, rtol=1e-7)
    np.testing.assert_array_equal(gradient[:, -1], 0)  # nothing that is asked for comes after it
    # The path's own scalar, asked for as any other.
    before, after = TOKENS[:-1], TOKENS[1:]
    log_prob = lambda walk: jax.nn.log_softmax(jax.vmap(model.logits)(walk.context))[np.arange(T - 1), after].sum()
    expected = station_gradient(model, TOKENS)[:, :-1]
    np.testing.assert_allclose(station_gradient(model, before, of=log_prob), expected, rtol=1e-9, atol=1e-12)
