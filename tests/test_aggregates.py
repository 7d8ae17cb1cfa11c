"""The laws of the aggregate contract. Every file in `jaxwalk/aggregates/` is held to them, found by its name."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.aggregates._contract import causal_mask, runs_and_positions
from jaxwalk.config import ConfigError
from tests.conftest import float64, normal, perturbed, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

D, M, T = 16, 12, 12
VARIANTS = {name: (name, {}) for name in jw.aggregates.names()} | {
    "attention-gqa-rope-qknorm": ("attention", {"kv_heads": 2, "positions": "rope", "qk_norm": True}),
    "attention-alibi-window": ("attention", {"heads": 3, "head_width": 4, "positions": "alibi", "window": 4}),
    "attention-mqa-window1-nobias": ("attention", {"kv_heads": 1, "window": 1, "bias": False}),
    "attention-xla": ("attention", {"kernel": "xla", "positions": "alibi", "kv_heads": 2}),
}
AVERAGES = {"attention", "causal_mean", "fixed_mixing", "identity"}  # the rows of their A sum to one
each = pytest.mark.parametrize("variant", VARIANTS)
X = normal(0, T, D)


@functools.cache
def build(variant):
    name, choices = VARIANTS[variant]
    config = jw.aggregates.config(name, **choices)
    return made(config, M)


def made(config, max_length):
    init = functools.partial(config.init, width=D, max_length=max_length, layer=0, depth=2)
    return perturbed(jax.eval_shape(lambda: init(key=jax.random.key(0))), 0.3)


def steps(aggregate, state, x):
    return jax.lax.scan(aggregate.step, state, x)[1]


@jax.jit
def all_forms(aggregate, x):
    after, state = aggregate.prefill(x[:5], T)
    return {
        "parallel": aggregate(x),
        "mixing": aggregate.apply_mixing(x, aggregate.mixing(x)),
        "steps": steps(aggregate, aggregate.init_state(T), x),
        "beyond": steps(aggregate, state, jnp.concatenate([x[5:], x])),
        "prefill": jnp.concatenate([after, steps(aggregate, state, x[5:])]),
        "vmap": jax.vmap(aggregate)(jnp.stack([x + 1, x]))[1],
        "prefix": jnp.concatenate([aggregate(x[:7]), aggregate(x)[7:]]),
    }


@each
def test_all_forms_agree(variant):
    forms = all_forms(build(variant), X)
    beyond = forms.pop("beyond")
    np.testing.assert_array_equal(beyond[: T - 5], forms["prefill"][5:])
    assert np.isnan(beyond[T - 5 :]).all()  # more steps than the state was made for
    for form, y in forms.items():
        np.testing.assert_allclose(y, forms["parallel"], atol=1e-5, rtol=1e-5, err_msg=form)
    with float64():
        forms64 = all_forms(to64(build(variant)), to64(X))
    assert forms64.pop("beyond").dtype == forms64["parallel"].dtype == np.float64
    for form, y in forms64.items():
        np.testing.assert_allclose(y, forms64["parallel"], atol=1e-10, rtol=0, err_msg=form)
    np.testing.assert_allclose(forms["parallel"], forms64["parallel"], atol=3e-5, rtol=1e-5)


@each
def test_mixing_is_causal_and_may_be_asked_for_rows(variant):
    aggregate, rows = build(variant), jnp.array([9, 0, 4])
    full, some = jax.jit(lambda a, x: (a.mixing(x), a.mixing(x, rows=rows)))(aggregate, X)
    assert full.shape[1:] == (T, T)
    np.testing.assert_allclose(some, full[:, np.array(rows)], atol=1e-6)
    assert not np.triu(np.array(full), 1).any()
    if VARIANTS[variant][0] in AVERAGES:
        np.testing.assert_allclose(full.sum(-1), 1, atol=1e-6)


@each
def test_documents_do_not_mix(variant):
    aggregate = build(variant)
    packed = jax.jit(lambda a, x, s: (a(x, s), a.apply_mixing(x, a.mixing(x, segments=s)), a.mixing(x, segments=s)))
    alone = jax.jit(lambda a, x: a(x))
    docs = [np.array(alone(aggregate, X[i : i + 4])) for i in (0, 4, 8)]
    for ids in ((1, 2, 3), (1, 2, 1), (0, 0, 1), (1, 0, 0), (0, 1, 2)):  # an id that comes back is a new document
        segments = jnp.repeat(jnp.array(ids), 4)
        for y in packed(aggregate, X, segments)[:2]:
            for i, doc in enumerate(docs):
                if ids[i] != 0:
                    np.testing.assert_allclose(y[4 * i : 4 * i + 4], doc, atol=1e-6, rtol=1e-6, err_msg=f"{ids} {i}")
    segments = jnp.repeat(jnp.array([1, 2, 1]), 4)
    y, _, A = packed(aggregate, X, segments)
    assert not np.where(np.kron(np.eye(3), np.ones((4, 4))), 0, np.array(A)).any()
    huge, _, _ = packed(aggregate, X.at[:4].multiply(1e4).at[8:].multiply(1e4), segments)
    np.testing.assert_array_equal(huge[4:8], y[4:8])


@each
def test_every_derivative_exists_and_respects_cause_and_borders(variant):
    aggregate, x = build(variant), X[:6]
    segments = jnp.array([1, 1, 1, 2, 2, 2])

    @jax.jit
    def jacobians(aggregate, x):
        _, tangent_map = jax.linearize(aggregate, x)
        basis = jnp.eye(x.size).reshape(-1, *x.shape)
        forward = jax.vmap(tangent_map)(basis)  # linearize alone would not call the rule: call it
        pushed = jax.vmap(lambda t: jax.jvp(aggregate, (x,), (t,))[1])(basis)
        back = jax.jacrev(aggregate)(x)
        packed = jax.jacrev(lambda x: aggregate(x, segments))(x)
        huge = jax.grad(lambda x: aggregate(x).sum())(1e4 * x)
        return forward, pushed, back, packed, huge

    forward, pushed, back, packed, huge = jax.tree.map(np.array, jacobians(aggregate.plain(), x))
    moved = np.moveaxis(forward.reshape(6, D, 6, D), (0, 1), (2, 3))
    np.testing.assert_allclose(moved, back, atol=1e-5)
    np.testing.assert_allclose(pushed, forward, atol=1e-5)
    future = np.arange(6)[None, :] > np.arange(6)[:, None]
    assert not back.transpose(0, 2, 1, 3)[future].any()
    assert not packed.transpose(0, 2, 1, 3)[future].any()
    assert not packed[3:, :, :3].any()
    assert np.isfinite(huge).all()


@each
def test_reverse_mode_at_extreme_inputs_and_through_kernels(variant):
    aggregate = build(variant)
    grads = jax.jit(jax.grad(lambda a, x: jnp.sum(a(x) ** 2), argnums=(0, 1)))
    ours, plain = grads(aggregate, X), grads(aggregate.plain(), X)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads(aggregate, 1e4 * X)))


@pytest.mark.parametrize("choices", [{}, {"positions": "alibi"}, {"window": 9}])
def test_attention_in_two_blocks_is_attention(choices):
    config = jw.aggregates.config("attention", **choices)
    aggregate = made(config, 70)
    x, segments = normal(3, 70, D), jnp.repeat(jnp.array([1, 2]), 35)
    both = jax.jit(lambda a, x, s: (a(x, s), a.apply_mixing(x, a.mixing(x, segments=s))))
    y, reference = both(aggregate, x, segments)
    np.testing.assert_allclose(y, reference, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cudnn needs a GPU")
@pytest.mark.parametrize("choices", [{}, {"kv_heads": 2, "window": 4}, {"positions": "alibi"}])
def test_cudnn_is_attention(choices):
    config = jw.aggregates.config("attention", kernel="cudnn", heads=2, **choices)
    fused = config.init(width=32, max_length=64, layer=0, depth=1, key=jax.random.key(0))
    fused = jax.tree.map(lambda a: a.astype(jnp.bfloat16), fused)
    x, segments = normal(3, 64, 32).astype(jnp.bfloat16), jnp.repeat(jnp.array([1, 2]), 32)
    y, reference = fused(x, segments), fused.plain()(x, segments)
    np.testing.assert_allclose(y.astype(jnp.float32), reference.astype(jnp.float32), atol=3e-2)


def test_attention_against_its_definition():
    aggregate = build("attention-gqa-rope-qknorm")
    x, H, N, K = np.array(X, np.float64), 4, 2, 4
    q, k, v = np.split(x @ np.array(aggregate.qkv.weight) + np.array(aggregate.qkv.bias), [H * K, (H + N) * K], axis=1)
    q, k, v = q.reshape(T, H, K), k.reshape(T, N, K), v.reshape(T, N, K)

    def rms(z, scale):
        return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * np.array(scale)

    def turned(z):  # as complex numbers, position by position
        pairs = z[..., : K // 2] + 1j * z[..., K // 2 :]
        angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(K // 2) * 2 / K)
        pairs = pairs * np.exp(1j * angle)[:, None]
        return np.concatenate([pairs.real, pairs.imag], -1)

    q, k = turned(rms(q, aggregate.q_norm.scale)), turned(rms(k, aggregate.k_norm.scale))
    y = np.zeros((T, H, K))
    for t in range(T):
        for h in range(H):
            score = np.exp(k[: t + 1, h // 2] @ q[t, h] / np.sqrt(K))
            y[t, h] = score @ v[: t + 1, h // 2] / score.sum()
    expected = y.reshape(T, -1) @ np.array(aggregate.out.weight) + np.array(aggregate.out.bias)
    np.testing.assert_allclose(jax.jit(lambda a, x: a(x))(aggregate, X), expected, atol=1e-4, rtol=1e-4)


def test_alibi_slopes_of_the_paper():
    from jaxwalk.aggregates.attention import alibi

    def slopes(heads):
        return -np.array(alibi(heads, jnp.array([1]), jnp.array([0]), jnp.float32))[:, 0, 0]

    np.testing.assert_allclose(slopes(8), [2.0**-h for h in range(1, 9)])
    np.testing.assert_allclose(slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])


def test_runs_and_positions():
    runs, positions = runs_and_positions(jnp.array([0, 0, 1, 1, 2, 1, 1]), 7)
    np.testing.assert_array_equal(runs, [0, 0, 1, 1, 2, 3, 3])
    np.testing.assert_array_equal(positions, [0, 1, 0, 1, 0, 0, 1])
    index = jnp.arange(3)
    np.testing.assert_array_equal(causal_mask(index, index, window=2), np.tri(3) - np.tri(3, k=-2))


def test_fixed_mixing_beyond_its_table_is_nan():
    y = jax.jit(lambda a, x: a(x))(build("fixed_mixing"), normal(0, M + 2, D))
    assert np.isfinite(y[:M]).all()
    assert np.isnan(y[M:]).all()


def test_unknown_names_and_impossible_choices_say_so():
    # As users load it, without the type checker of the tests, which would speak first.
    source = importlib.util.spec_from_file_location("unchecked", jw.aggregates.attention.__file__)
    unchecked = importlib.util.module_from_spec(source)
    source.loader.exec_module(unchecked)
    with pytest.raises(ConfigError, match=r"unknown aggregate 'atention'. Did you mean 'attention'\? Choices: "):
        jw.aggregates.config("atention")
    with pytest.raises(ConfigError, match=r"unknown field of attention 'head'. Did you mean 'heads'"):
        jw.aggregates.config("attention", head=3)
    for choices, message in (
        ({"heads": 0}, "heads: expected at least 1, got 0"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of heads = 4, got 3"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"positions": "rope", "head_width": 3}, "head_width: expected an even number with RoPE, got 3"),
        ({"positions": "Rope"}, "positions: expected Literal.*, got 'Rope'"),
        ({"heads": 2.0}, "heads: expected int, got 2.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            unchecked.Config(**choices)
    for name, choices in (("attention", {"heads": 3}), ("fixed_mixing", {"heads": 3})):
        with pytest.raises(ConfigError, match="heads: expected a divisor of width = 16"):
            jw.aggregates.config(name, **choices).init(width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="even head width"):
        jw.aggregates.config("attention", heads=16, positions="rope").init(
            width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0)
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jw.aggregates.nothing  # noqa: B018
