"""The laws of the aggregate contract. Every file in `jaxwalk/aggregates/` is held to them, found by its name."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxwalk as jw
from jaxwalk.aggregates import _linear
from jaxwalk.aggregates._contract import causal_mask, documents_of
from jaxwalk.aggregates._rotary import frequencies, gain
from jaxwalk.config import ConfigError, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from tests.conftest import float64, normal, perturbed, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

D, M, T = 16, 12, 12
VARIANTS = {name: (name, {}) for name in jw.aggregates.names()} | {
    "attention-gqa-rope-qknorm": ("attention", {"kv_heads": 2, "positions": "rope", "qk_norm": True}),
    "attention-alibi-window": ("attention", {"heads": 3, "head_width": 4, "positions": "alibi", "window": 4}),
    "attention-mqa-window1-nobias": ("attention", {"kv_heads": 1, "window": 1, "bias": False}),
    "attention-xla": ("attention", {"kernel": "xla", "positions": "alibi", "kv_heads": 2, "scale": 0.9}),
    "attention-like-neox": ("attention", {"heads": 2, "positions": "rope", "rope_width": 4, "rope_theta": 50.0}),
    "attention-like-gpt-neo": ("attention", {"bias": False, "out_bias": True, "scale": 1.0, "window": 5}),
    "attention-like-qwen2": ("attention", {"kv_heads": 2, "positions": "rope", "out_bias": False}),
    "attention-like-olmo2": (
        "attention",
        {"kv_heads": 2, "positions": "rope", "bias": False, "qk_norm": True, "qk_norm_over": "width"},
    ),
    "attention-like-gemma": (
        "attention",
        {
            "heads": 4,
            "kv_heads": 2,
            "head_width": 6,
            "positions": "rope",
            "rope_theta": 100.0,
            "rope_scaling": LinearScaling(3.0),
            "scale": 0.4,
            "softcap": 1.5,
            "window": 4,
            "qk_norm": True,
            "qk_norm_eps": 1e-3,
            "qk_norm_unit_offset": True,
            "bias": False,
        },
    ),
    "attention-like-phi3": (
        "attention",
        {
            "kv_heads": 2,
            "head_width": 8,
            "positions": "rope",
            "rope_width": 6,
            "rope_scaling": LongRopeScaling((1.0, 1.5, 4.0), 1.2),
            "window": 7,
            "bias": False,
        },
    ),
    "attention-yarn": (
        "attention",
        {"heads": 2, "positions": "rope", "rope_theta": 20.0, "rope_scaling": YarnScaling(4.0, 60, beta_fast=8.0)},
    ),
    "linear_attention-relu-bias-chunk5": ("linear_attention", {"features": "relu", "bias": True, "chunk": 5}),
    "gated_linear_attention-chunk5": ("gated_linear_attention", {"key_width": 3, "chunk": 5}),
    "gated_delta_net-heads2-bias-chunk5": ("gated_delta_net", {"heads": 2, "bias": True, "chunk": 5}),
    "linear_mixer-heads2-nobias": ("linear_mixer", {"heads": 2, "bias": False}),
    "gmlp-hidden6-nobias": ("gmlp", {"hidden": 6, "bias": False}),
    "hyena-order3": ("hyena", {"order": 3, "taps": 2, "filter_width": 8, "bands": 2, "bias": False}),
    "gru-hidden5-nobias": ("gru", {"hidden": 5, "bias": False}),
    "lstm-hidden5-nobias": ("lstm", {"hidden": 5, "bias": False}),
    "min_gru-positive-hidden5": ("min_gru", {"positive": True, "hidden": 5}),
    "rwkv4_channel_mix-hidden5": ("rwkv4_channel_mix", {"hidden": 5}),
    "rwkv7-heads2-ranks": ("rwkv7", {"heads": 2, "rank": 3, "gate_rank": 5, "chunk": 5}),
    "causal_conv-taps20-nobias": ("causal_conv", {"taps": 20, "bias": False}),
    "mamba-bias-state3-rank2": ("mamba", {"bias": True, "conv_bias": False, "state": 3, "dt_rank": 2, "conv": 1}),
    "delta_net-conv": ("delta_net", {"conv": 4, "bias": True, "chunk": 5}),
    "gated_delta_net-conv": ("gated_delta_net", {"conv": 3, "key_width": 3, "value_width": 5, "heads": 2, "chunk": 5}),
    "lru-state5": ("lru", {"state": 5}),
    "s5-state6": ("s5", {"state": 6}),
    "s4d-state4": ("s4d", {"state": 4}),
    "mamba2-groups2-bias-chunk5": ("mamba2", {"bias": True, "groups": 2, "state": 6, "chunk": 5, "conv_bias": False}),
}
# The rows of their A sum to one. Not with relu: a query of zeros looks nowhere.
AVERAGES = {"attention", "causal_mean", "fixed_mixing", "identity", "linear_attention"}
# Their state has something of each position.
GROWS = {"attention", "fixed_mixing", "gmlp", "hyena", "linear_mixer"}
# Their parallel form is a product of Fourier transforms, and causal to rounding.
FOURIER = {"hyena", "s4d"}
# Their output is of the fifth degree in large inputs: its square at 1e4 is beyond float32.
STEEP = {"mamba"}
LINEAR = ("linear_attention", "retention", "gated_linear_attention", "delta_net", "gated_delta_net")
REPRESENTATIVE = {"attention", "gated_delta_net", "mamba", "lru", "gru", "hyena", "gmlp"}


def variants(names):
    return pytest.mark.parametrize("variant", quick(names, VARIANTS))


# Every family is held to every law in the slow tests. In the others each with its defaults is held to the first, that
# its forms agree and that its values are what its kind says, and one of a kind to all.
QUICK = {"attention-gqa-rope-qknorm", "attention-alibi-window", "attention-like-gemma"}
each = variants({*jw.aggregates.names(), *QUICK})
some = variants({*REPRESENTATIVE, "attention-like-gemma"})
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


@some
def test_all_forms_agree_in_float64(variant):
    parallel = all_forms(build(variant), X)["parallel"]
    with float64():
        forms64 = all_forms(to64(build(variant)), to64(X))
    assert forms64.pop("beyond").dtype == forms64["parallel"].dtype == np.float64
    for form, y in forms64.items():
        np.testing.assert_allclose(y, forms64["parallel"], atol=1e-10, rtol=0, err_msg=form)
    np.testing.assert_allclose(parallel, forms64["parallel"], atol=3e-5, rtol=1e-5)


@some
def test_mixing_is_causal_and_may_be_asked_for_rows(variant):
    aggregate, rows = build(variant), jnp.array([9, 0, 4])
    full, some = jax.jit(lambda a, x: (a.mixing(x), a.mixing(x, rows=rows)))(aggregate, X)
    assert full.shape[1:] == (T, T)
    np.testing.assert_allclose(some, full[:, np.array(rows)], atol=1e-6)
    assert not np.triu(np.array(full), 1).any()
    if VARIANTS[variant][0] in AVERAGES and "relu" not in variant:
        np.testing.assert_allclose(full.sum(-1), 1, atol=1e-6)


@some
def test_documents_do_not_mix(variant, x64):
    aggregate, x = to64(build(variant)), to64(X)  # rounding would hide a small leak
    packed = jax.jit(lambda a, x, s: (a(x, s), a.apply_mixing(x, a.mixing(x, segments=s), s), a.mixing(x, segments=s)))
    alone = jax.jit(lambda a, x: a(x))
    docs = [np.array(alone(aggregate, x[i : i + 4])) for i in (0, 4, 8)]
    for ids in ((1, 2, 3), (1, 2, 1), (0, 0, 1), (1, 0, 0), (0, 1, 2)):  # an id that comes back is a new document
        segments = jnp.repeat(jnp.array(ids), 4)
        for y in packed(aggregate, x, segments)[:2]:
            for i, doc in enumerate(docs):
                if ids[i] != 0:
                    np.testing.assert_allclose(y[4 * i : 4 * i + 4], doc, atol=1e-11, rtol=1e-11, err_msg=f"{ids} {i}")
    segments = jnp.repeat(jnp.array([1, 2, 1]), 4)
    y, _, A = packed(aggregate, x, segments)
    assert not np.where(np.kron(np.eye(3), np.ones((4, 4))), 0, np.array(A)).any()
    huge, _, _ = packed(aggregate, x.at[:4].multiply(1e4).at[8:].multiply(1e4), segments)
    np.testing.assert_array_equal(huge[4:8], y[4:8])


@some
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
    ahead = np.abs(back.transpose(0, 2, 1, 3)[future]).max()
    assert ahead <= (1e-6 * np.abs(back).max() if VARIANTS[variant][0] in FOURIER else 0)
    assert not packed.transpose(0, 2, 1, 3)[future].any()
    assert not packed[3:, :, :3].any()
    assert np.isfinite(huge).all()


@some
def test_reverse_mode_at_extreme_inputs_and_through_kernels(variant):
    aggregate = build(variant)
    grads = jax.jit(jax.grad(lambda a, x: jnp.sum(a(x) ** 2), argnums=(0, 1)))
    ours, plain = grads(aggregate, X), grads(aggregate.plain(), X)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    extreme = 1e3 if VARIANTS[variant][0] in STEEP else 1e4
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads(aggregate, extreme * X)))


@each
def test_held_it_is_affine_and_its_values_are_what_its_kind_says(variant):
    aggregate = build(variant)
    assert aggregate.granularity in ("head", "channel", "state")
    assert aggregate.kind in ("exact", "conditional")

    def biases(path, leaf):
        return leaf if path[-1].name == "bias" else jnp.zeros_like(leaf)

    @jax.jit
    def forms(aggregate, x):
        A = aggregate.mixing(x)
        slope = jax.tree_util.tree_map_with_path(biases, aggregate), x
        whole, parts = jax.jvp(lambda a, x: a.apply_mixing(x, A, hold=True), (aggregate, x), slope)
        held = jax.jvp(lambda a, x: a.held(x), (aggregate, x), slope)
        after = aggregate.values(x)[:, 3]
        return whole, parts, held, after, aggregate.values(x[3:4])[:, 0], aggregate.values(x[:4])[:, 3]

    whole, parts, held, values, alone, with_past = forms(aggregate, X)
    np.testing.assert_allclose(parts, whole, atol=2e-5, rtol=1e-5)
    for form in held:  # the held form: its value, and its derivative along its inputs and biases
        np.testing.assert_allclose(form, whole, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(with_past, values, atol=1e-6)
    assert np.allclose(alone, values, atol=1e-6) == (aggregate.kind == "exact")
    G, _, K = jax.eval_shape(aggregate.values, X).shape
    assert jax.eval_shape(aggregate.mixing, X).shape == (G, T, T)
    assert (K == 1) >= (aggregate.granularity == "channel")


@some
def test_a_row_of_the_mixing_takes_the_memory_of_a_row(variant):
    N = 128
    shapes = jax.eval_shape(lambda: made(jw.aggregates.config(VARIANTS[variant][0], **VARIANTS[variant][1]), N))
    x, rows = jax.ShapeDtypeStruct((N, D), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    G = jax.eval_shape(lambda a, x: a.mixing(x), shapes, x).shape[0]
    row = jax.jit(lambda a, x, rows: a.mixing(x, rows)).lower(shapes, x, rows).compile()
    assert row.memory_analysis().temp_size_in_bytes < 4 * N * N * max(G, 8) / 2


@each
def test_every_array_is_a_leaf(variant):
    """An array field that is not declared as data would be part of the tree's structure, and a tracer in it leaks."""
    arrays = [value for value in vars(build(variant)).values() if isinstance(value, jax.Array)]
    leaves = jax.tree.leaves(build(variant))
    assert all(any(array is leaf for leaf in leaves) for array in arrays)


@each
def test_a_state_is_what_is_carried(variant):
    aggregate = build(variant)
    carried = [a for a in jax.tree.leaves(aggregate.init_state(T)) if a.ndim]
    assert aggregate.state_size(T) == sum(a.size for a in carried)
    grows = aggregate.state_size(2 * T) - aggregate.state_size(T)
    assert grows == (0 if VARIANTS[variant][0] not in GROWS else grows) >= 0


@some
def test_eight_devices_compute_what_one_does(variant):
    aggregate, x = build(variant), normal(5, 8, T, D)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(lambda a, x: jax.vmap(a)(x))
    y = run(jax.device_put(aggregate, NamedSharding(mesh, PartitionSpec())), spread)
    assert len(y.sharding.device_set) == 8
    np.testing.assert_allclose(y, run(aggregate, x), atol=1e-5, rtol=1e-5)


@some
def test_bfloat16_is_near(variant):
    aggregate = build(variant)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, aggregate)
    form = jax.jit(lambda a, x: (a(x), steps(a, a.init_state(T), x)))
    exact = np.array(form(aggregate, X)[0])
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention promotes
        ys = form(narrow, X.astype(jnp.bfloat16))
    for y in ys:
        assert y.dtype == jnp.bfloat16
        assert np.abs(np.array(y, np.float32) - exact).max() < 0.06 * np.abs(exact).max()


@pytest.mark.parametrize("choices", [{}, {"positions": "alibi"}, {"window": 9}])
def test_attention_in_two_blocks_is_attention(choices):
    config = jw.aggregates.config("attention", **choices)
    aggregate = made(config, 70)
    x, segments = normal(3, 70, D), jnp.repeat(jnp.array([1, 2]), 35)
    both = jax.jit(lambda a, x, s: (a(x, s), a.apply_mixing(x, a.mixing(x, segments=s), s)))
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


@pytest.mark.parametrize(
    "variant", [v for v, (name, c) in VARIANTS.items() if name == "attention" and c.get("positions") != "alibi"]
)
def test_attention_against_its_definition(variant):
    aggregate, (_, choices) = build(variant), VARIANTS[variant]
    H = choices.get("heads", 4)
    N, K = choices.get("kv_heads", H), choices.get("head_width", D // H)
    x = np.array(X, float)

    def linear(module, x, bias):
        assert (module.bias is not None) == bias
        return x @ np.array(module.weight, float) + (np.array(module.bias, float) if bias else 0)

    def rms(z, norm):
        if not choices.get("qk_norm"):
            return z
        if choices.get("qk_norm_over") == "width":
            return rms_of(z.reshape(T, -1), norm).reshape(z.shape)
        return rms_of(z, norm)

    def rms_of(z, norm):
        assert norm.scale.shape == z.shape[-1:]
        multiplier = np.array(norm.scale, float) + choices.get("qk_norm_unit_offset", 0)
        return z / np.sqrt((z**2).mean(-1, keepdims=True) + choices.get("qk_norm_eps", 1e-5)) * multiplier

    def turned(z):  # as complex numbers, position by position
        if choices.get("positions") != "rope":
            return z
        width, scaling = choices.get("rope_width", K), choices.get("rope_scaling")
        pairs = z[..., : width // 2] + 1j * z[..., width // 2 : width]
        angle = np.arange(T)[:, None] * np.array(frequencies(width, choices.get("rope_theta", 1e4), scaling))
        pairs = gain(scaling) * pairs * np.exp(1j * angle)[:, None]
        return np.concatenate([pairs.real, pairs.imag, z[..., width:]], -1)

    bias = choices.get("bias", True)
    q, k, v = np.split(linear(aggregate.qkv, x, bias), [H * K, (H + N) * K], axis=1)
    q, k, v = q.reshape(T, H, K), k.reshape(T, N, K), v.reshape(T, N, K)
    q, k = turned(rms(q, aggregate.q_norm)), turned(rms(k, aggregate.k_norm))
    scale, cap = choices.get("scale", 1 / np.sqrt(K)), choices.get("softcap")
    y = np.zeros((T, H, K))
    for t in range(T):
        for h in range(H):
            seen, group = slice(max(0, t + 1 - choices.get("window", T)), t + 1), h // (H // N)
            score = k[seen, group] @ q[t, h] * scale
            weight = np.exp(score if cap is None else cap * np.tanh(score / cap))
            y[t, h] = weight @ v[seen, group] / weight.sum()
    expected = linear(aggregate.out, y.reshape(T, -1), choices.get("out_bias", bias))
    np.testing.assert_allclose(jax.jit(lambda a, x: a(x))(aggregate, X), expected, atol=1e-4, rtol=1e-4)


SCALINGS = {
    "none": None,
    "linear": LinearScaling(8.0),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, 128),
    "yarn": YarnScaling(4.0, 64, beta_fast=16.0, beta_slow=2.0),
    "yarn-untruncated": YarnScaling(4.0, 64, truncate=False, attention_factor=1.3),
    "longrope": LongRopeScaling(tuple(1 + 0.3 * k for k in range(8)), 1.2),
}


def wavelengths(name):
    """In positions, of the 8 pairs of 16 channels with theta 1000, one by one by the definition of each scaling."""
    ours = []
    for k in range(8):
        wavelength, scaling = 2 * np.pi * 1000 ** (k / 8), SCALINGS[name]
        if name == "linear":
            wavelength *= 8
        if name == "longrope":
            wavelength *= 1 + 0.3 * k
        if name == "llama3":
            short, long = 128 / 4, 128 / 1
            if wavelength > long:
                wavelength *= 8
            elif wavelength > short:
                smooth = (128 / wavelength - 1) / (4 - 1)
                wavelength = 1 / ((1 - smooth) / (8 * wavelength) + smooth / wavelength)
        if name.startswith("yarn"):
            ends = [
                8 * np.log(64 / (turns * 2 * np.pi)) / np.log(1000) for turns in (scaling.beta_fast, scaling.beta_slow)
            ]
            ends = [np.floor(ends[0]), np.ceil(ends[1])] if scaling.truncate else ends
            ends = [max(ends[0], 0), min(ends[1], 15)]
            ramp = np.clip((k - ends[0]) / (ends[1] - ends[0]), 0, 1)
            wavelength = 1 / (ramp / (4 * wavelength) + (1 - ramp) / wavelength)
        ours.append(wavelength)
    return np.array(ours)


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_scalings_against_their_definitions(name):
    turns = np.array(frequencies(16, 1000.0, SCALINGS[name]))
    np.testing.assert_allclose(2 * np.pi / turns, wavelengths(name), rtol=1e-12)
    if name in ("llama3", "yarn", "yarn-untruncated"):  # each has a part that is kept, one that is not, one between
        ratio = turns * 1000 ** (np.arange(8) / 8)
        least = 1 / SCALINGS[name].factor
        np.testing.assert_allclose(ratio[[0, -1]], [1, least], rtol=1e-12)
        assert ((least + 1e-3 < ratio) & (ratio < 1 - 1e-3)).any()
    expected = {"yarn": 0.1 * np.log(4) + 1, "yarn-untruncated": 1.3, "longrope": 1.2}
    assert gain(SCALINGS[name]) == pytest.approx(expected.get(name, 1.0))


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "none"])
def test_rotary_scalings_against_transformers(name):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.partition("-")[0]
    scaling = SCALINGS[name]
    fields = {f: getattr(scaling, f) for f in ("factor", "truncate", "attention_factor") if hasattr(scaling, f)}
    fields |= {f: getattr(scaling, f) for f in ("beta_fast", "beta_slow", "low_freq_factor") if hasattr(scaling, f)}
    if kind != "linear":
        fields["original_max_position_embeddings"] = getattr(scaling, "original_length", 64)
    if kind == "llama3":
        fields["high_freq_factor"] = scaling.high_freq_factor
    if kind == "longrope":
        fields |= {"short_factor": list(scaling.factors), "long_factor": list(scaling.factors), "factor": 4.0}
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": kind, "rope_theta": 1000.0, "partial_rotary_factor": 0.5, **fields},
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    np.testing.assert_allclose(frequencies(16, 1000.0, scaling), theirs.numpy(), rtol=1e-6)
    assert gain(scaling) == pytest.approx(factor)


# Linear recurrences.


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def recurrence(aggregate, name, x):
    """The papers' equations for a state, position by position, in numpy. x: [T, D]."""

    def linear(module, x):
        return x @ np.array(module.weight, float) + (0 if module.bias is None else np.array(module.bias, float))

    H = aggregate.heads
    V = aggregate.out.weight.shape[0] // H
    q, k, v = np.split(linear(aggregate.qkv, x), [(aggregate.qkv.weight.shape[1] - H * V) // 2, -H * V], axis=1)
    q, k, v = (a.reshape(len(x), H, -1) for a in (q, k, v))
    K, delta = k.shape[-1], name in ("delta_net", "gated_delta_net")
    decay, beta = np.ones((len(x), H, K)), np.ones((len(x), H))
    if name == "linear_attention":
        q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
    if name == "retention":
        turn = np.exp(1j * np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(K // 2) * 2 / K))[:, None]
        q, k = ((a[..., : K // 2] + 1j * a[..., K // 2 :]) * turn for a in (q, k))
        q, k = (np.concatenate([a.real, a.imag], -1) for a in (q / np.sqrt(K), k))
        decay = decay * (1 - 2.0 ** (-5 - np.arange(H)))[:, None]
    if name == "gated_linear_attention":
        decay = sigmoid(linear(aggregate.decay_up, linear(aggregate.decay, x))).reshape(decay.shape) ** (1 / 16)
    if delta:
        q, k = (a * sigmoid(a) for a in (q, k))
        q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
        beta = sigmoid(linear(aggregate.beta, x))
    if name == "gated_delta_net":
        step = np.log1p(np.exp(linear(aggregate.decay, x)))
        decay = decay * np.exp(-np.exp(np.array(aggregate.log_rate)) * step)[..., None]
    y = np.zeros((len(x), H, V))
    for h in range(H):
        S, z = np.zeros((K, V)), np.zeros(K)
        for t in range(len(x)):
            key = k[t, h]
            forget = np.eye(K) - beta[t, h] * np.outer(key, key) if delta else np.eye(K)
            S = forget @ np.diag(decay[t, h]) @ S + beta[t, h] * np.outer(key, v[t, h])
            z = z + key
            y[t, h] = q[t, h] @ S / (q[t, h] @ z if name == "linear_attention" else 1)
    if name != "linear_attention":
        y = y - y.mean(-1, keepdims=True) if name in ("retention", "gated_linear_attention") else y
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    y = y.reshape(len(x), -1)
    if hasattr(aggregate, "gate"):
        gate = linear(aggregate.gate, x)
        y = gate * sigmoid(gate) * y
    return linear(aggregate.out, y)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_recurrences_against_their_papers(name):
    aggregate = build(name)
    y = jax.jit(lambda a, x: a(x))(aggregate, X)
    np.testing.assert_allclose(y, recurrence(aggregate, name, np.array(X, float)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", quick(REPRESENTATIVE, jw.aggregates.names()))
def test_three_algorithms_agree_over_many_positions(name):
    N = 256
    choices = {"linear_attention": {"features": "softmax"}}.get(name, {})
    choices |= {"chunk": 24} if name in LINEAR else {}  # does not divide 256
    aggregate = made(jw.aggregates.config(name, **choices), N)

    @jax.jit
    def forms(aggregate, x):
        rows = jnp.array([255, 3, 130])
        parallel, after = aggregate.prefill(x, N)
        state, recurrent = jax.lax.scan(aggregate.step, aggregate.init_state(N), x)
        mixed = aggregate.apply_mixing(x, aggregate.mixing(x))
        A = aggregate.mixing(x, rows=rows)
        some = aggregate.readout(A.astype(x.dtype) @ aggregate.values(x), x[rows])
        same = zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True)
        return parallel, recurrent, mixed, (some, parallel[rows]), [pair for pair in same if pair[0].ndim]

    def errors(parallel, recurrent, mixed, some, states):
        assert float(jnp.abs(parallel).max()) < 100
        pairs = (recurrent, parallel), (mixed, parallel), some, *states
        return [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs]

    x = normal(4, N, D)
    assert max(errors(*forms(aggregate, x))) < 1e-4
    with float64():
        assert max(errors(*forms(to64(aggregate), to64(x)))) < 1e-10


@pytest.mark.parametrize("kind", ["head", "channel", "delta-channel"])
def test_the_chunk_is_no_matter_and_decays_may_be_0_and_1(kind, x64):
    N, K, V = 11, 3, 2
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.normal(size=(N, n))) for n in (K, K, V))
    beta = jnp.array(rng.uniform(size=(N, 1))) if "delta" in kind else None
    if beta is not None:
        k = _linear.direction(k)
    g = -rng.exponential(size=(N, K if "channel" in kind else 1))
    g[4], g[7], g[8], g[9, 0] = 0, -np.inf, -1e5, -np.inf
    g = jnp.array(g)

    def steps(c, v):
        S, y = jax.lax.scan(lambda S, at: _linear.forward(S, *at), jnp.zeros((K, V)), (c, v))
        return y, S

    def loss(c, v, form):
        y, S = form(c, v)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(S)), (y, S)

    def run(form):
        grad = jax.value_and_grad(functools.partial(loss, form=form), (0, 1), has_aux=True)
        (_, out), slopes = jax.jit(grad)(c, v)
        return out, slopes

    c = _linear.Coefficients(q, k, g, beta)
    reference = run(steps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(reference))
    for chunk in (1, 4, 64):
        got = run(functools.partial(_linear.chunked, chunk=chunk))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, reference)
    A = _linear.backward(jnp.arange(N), c)
    np.testing.assert_allclose(A @ v, reference[0][0], atol=1e-12)
    if "channel" not in kind:
        assert not np.array(A)[7:, :7].any()  # a decay of 0 forgets everything


@pytest.mark.parametrize("name", ["gated_linear_attention", "gated_delta_net"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_decays_that_reach_0_and_1_in_the_model(name, sign):
    aggregate = build(name)
    field = "decay_up" if name == "gated_linear_attention" else "decay"
    linear = getattr(aggregate, field)
    far = dataclasses.replace(linear, bias=jnp.full_like(linear.bias, sign * 1e5))
    aggregate = dataclasses.replace(aggregate, **{field: far})
    A, grads = jax.jit(lambda a, x: (a.mixing(x), jax.grad(lambda a, x: a(x).sum(), (0, 1))(a, x)))(aggregate, 30 * X)
    forgets = sign == (-1 if name == "gated_linear_attention" else 1)
    assert bool(np.tril(np.array(A), -1).any()) != forgets
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_alibi_slopes_of_the_paper():
    from jaxwalk.aggregates.attention import alibi

    def slopes(heads):
        return -np.array(alibi(heads, jnp.array([1]), jnp.array([0]), jnp.float32))[:, 0, 0]

    np.testing.assert_allclose(slopes(8), [2.0**-h for h in range(1, 9)])
    np.testing.assert_allclose(slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])


def test_documents():
    runs, positions = documents_of(jnp.array([0, 0, 1, 1, 2, 1, 1]), 7)
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
        (
            {"positions": "rope", "head_width": 8, "rope_width": 5},
            "rope_width: expected an even number from 2 to .* 8,",
        ),
        ({"positions": "rope", "head_width": 8, "rope_width": 10}, "rope_width: expected .* head width 8, got 10"),
        ({"rope_width": 4}, "rope_width: expected positions = 'rope', got 'none'"),
        ({"rope_scaling": LinearScaling(2.0)}, "rope_scaling: expected positions = 'rope'"),
        (
            {"positions": "rope", "head_width": 8, "rope_scaling": LongRopeScaling((1.0,))},
            "rope_scaling.factors: expected 4, half the width rotated, got 1",
        ),
        ({"softcap": 0.0}, "softcap: expected more than 0, got 0.0"),
        ({"softcap": 1.0, "kernel": "xla"}, "kernel: expected 'plain' with a soft cap"),
        ({"qk_norm_eps": -1.0}, "qk_norm_eps: expected at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            unchecked.Config(**choices)
    for name, choices in (("attention", {"heads": 3}), ("fixed_mixing", {"heads": 3})):
        with pytest.raises(ConfigError, match="heads: expected a divisor of width = 16"):
            jw.aggregates.config(name, **choices).init(width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0))
    for name in LINEAR:
        for what in ("chunk", "heads", "key_width"):
            with pytest.raises(ConfigError, match=f"{what}: expected at least 1, got 0"):
                jw.aggregates.config(name, **{what: 0})
        with pytest.raises(ConfigError, match=r"divisor of width = 16 \(or key_width and value_width given\), got 3"):
            jw.aggregates.config(name, heads=3).init(width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="key_width: expected an even number, as queries are rotated in pairs, got 1"):
        jw.aggregates.config("retention", heads=16).init(
            width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0)
        )
    with pytest.raises(ConfigError, match="decay_rank: expected at least 1, got 0"):
        jw.aggregates.config("gated_linear_attention", decay_rank=0)
    with pytest.raises(ConfigError, match="head width of width / heads = 1: head_width: expected an even number"):
        jw.aggregates.config("attention", heads=16, positions="rope").init(
            width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0)
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jw.aggregates.nothing  # noqa: B018
