"""Decompositions: the parts sum to the whole, the cuts agree with each other, and what is not exact raises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

import jaxwalk as jw
from jaxwalk.filters import module
from jaxwalk.probes import decomposition as d
from tests.conftest import float64, model_of, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

TOKENS = np.array([1, 4, 0, 2, 2, 3, 1])
SEGMENTS = np.array([1, 1, 1, 2, 2, 2, 2])
T, D = 7, 16
ATTENTION = functools.partial(jw.aggregates.config, "attention")
MODELS = {
    "pre": {},
    "pre-gated": {"filter": jw.MLPConfig(gated=True, activation="silu"), "unembed_bias": True},
    "pre-rms-nobias": {
        "norm": "rms_norm",
        "positions": "none",
        "aggregate": ATTENTION(positions="alibi", bias=False, qk_norm=True, window=3),
        "filter": jw.MLPConfig(activation="relu", bias=False),
        "tied": True,
    },
    "post": {"placement": "post", "aggregate": ATTENTION(positions="rope", heads=4, kv_heads=2)},
    "post-rms": {"placement": "post", "norm": "rms_norm", "filter": jw.MLPConfig(gated=True)},
    "parallel": {"placement": "parallel", "filter": jw.MLPConfig(activation="gelu_tanh")},
    "no-filter": {"filter": None, "aggregate": ("attention", "causal_mean")},
    "sinusoidal": {"positions": "sinusoidal", "aggregate": "fixed_mixing"},
    "recurrences": {"aggregate": ("retention", "gated_delta_net"), "filter": None},
    "rwkv": {
        "aggregate": ("rwkv4", "rwkv4_channel_mix"),
        "filter": None,
        "positions": "none",
        "embed_norm": True,
        "embed_scale": 2.0,
    },
    "recurrences-post": {
        "aggregate": ("gated_linear_attention", "delta_net", "linear_attention"),
        "depth": 3,
        "placement": "post",
    },
    "sandwich": {
        "placement": "sandwich",
        "norm": "rms_norm",
        "norm_unit_offset": True,
        "positions": "none",
        "embed_scale": 4.0,
        "tied": True,
        "logit_softcap": 2.0,
        "aggregate": ATTENTION(
            kv_heads=2, positions="rope", scale=0.4, softcap=1.5, qk_norm=True, qk_norm_unit_offset=True, bias=False
        ),
        "filter": jw.MLPConfig(gated=True, activation="gelu_tanh", bias=False),
    },
    "sandwich-layer-norm": {"placement": "sandwich", "filter": (jw.MLPConfig(), None), "embed_scale": 0.5},
    "res_post": {
        "placement": "res_post",
        "position_offset": 2,
        "unembed_bias": True,
        "logit_softcap": 3.0,
        "aggregate": ATTENTION(positions="rope", rope_width=2, qk_norm=True, qk_norm_over="width", out_bias=False),
    },
    "no-layers": {"depth": 0},
}
QUICK = {"pre-gated", "recurrences", "sandwich"}
each = pytest.mark.parametrize("name", quick(QUICK, MODELS))
CUTS = {
    "token": d.decompose,
    "steps": d.decompose_steps,
    "steps-token": d.decompose_steps_by_token,
    "heads": functools.partial(d.decompose_heads, layer=1),
    "neurons": functools.partial(d.decompose_neurons, layer=0),
}


@functools.cache
def model64(name):
    with float64():
        return to64(model_of(**MODELS[name]))


def total(parts):
    """The sum of all parts of a decomposition, by the names in its docstring."""
    sums = 0.0
    for field, value in parts._asdict().items():
        if field not in ("whole", "error"):
            sums = sums + np.asarray(value, float).reshape(-1, D).sum(0)
    return sums


def applies(cut, name):
    model = model_of(**MODELS[name])
    return (cut not in ("heads", "neurons") or model.depth) and (cut != "neurons" or model.layers[0].filter is not None)


@pytest.mark.parametrize("cut", CUTS)
@each
def test_the_parts_of_every_cut_sum_to_what_the_model_computes(name, cut, x64):
    if not applies(cut, name):
        pytest.skip("nothing to cut")
    model = model64(name)
    walk = model.walk(TOKENS)
    for at, station in ((-1, None), (2, None), (4, min(3, 2 * model.depth))):
        parts = CUTS[cut](model, TOKENS, at=at, station=station)
        if cut not in ("heads", "neurons"):  # whose whole is a part
            whole = walk.context[at] if station is None else walk.stations[station, at]
            np.testing.assert_allclose(parts.whole, whole, 1e-12, 1e-12)
        assert parts.error <= 1e-13
        np.testing.assert_allclose(total(parts), parts.whole, 1e-11, 1e-11)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", quick({"post-rms"}, ["pre-gated", "post-rms", "sandwich", "res_post"]))
def test_float32_is_exact_to_rounding(name, cut):
    if not applies(cut, name):
        pytest.skip("nothing to cut")
    assert CUTS[cut](model_of(**MODELS[name]), TOKENS).error <= 2e-6


@each
def test_the_cuts_agree(name, x64):
    model = model64(name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
    for at, station in ((-1, None), (3, None), (5, min(3, 2 * model.depth))):
        by_token = d.decompose(model, TOKENS, at, station=station)
        steps = d.decompose_steps(model, TOKENS, at, station=station)
        both = d.decompose_steps_by_token(model, TOKENS, at, station=station)
        own = (np.arange(T) == at % T)[:, None] * np.ones((1, D))
        close(both.by_token.sum(0) + own * np.asarray(both.token)[None], by_token.by_token)
        close(both.by_position.sum(0) + own * np.asarray(both.position)[None], by_token.by_position)
        close(both.by_step_bias.sum(0) + both.bias, by_token.bias)
        close(both.by_token.sum(1) + both.by_position.sum(1) + both.by_step_bias, steps.by_step + steps.by_step_bias)
        for layer in range(model.depth):
            if station is None or station > 2 * layer:
                heads = d.decompose_heads(model, TOKENS, layer, at, station=station)
                close(heads.whole, steps.by_step[2 * layer] + steps.by_step_bias[2 * layer])
            if model.layers[layer].filter is not None and (station is None or station > 2 * layer + 1):
                neurons = d.decompose_neurons(model, TOKENS, layer, at, station=station)
                close(neurons.whole, steps.by_step[2 * layer + 1] + steps.by_step_bias[2 * layer + 1])


@each
def test_parts_along_directions_are_the_parts_dotted_with_them(name, x64):
    model = model64(name)
    along = np.random.default_rng(0).normal(size=(2, D))
    for station in (None, min(3, 2 * model.depth)):
        parts = d.decompose(model, TOKENS, 5, station=station)
        read = d.decompose(model, TOKENS, 5, station=station, along=jnp.asarray(along))
        for field in ("by_token", "by_position", "bias", "whole"):
            expected = np.asarray(getattr(parts, field)) @ along.T
            np.testing.assert_allclose(getattr(read, field), expected, rtol=1e-10, atol=1e-12, err_msg=field)
        assert read.error <= 1e-12


@each
def test_the_parts_are_slopes_of_the_walk_with_its_coefficients_frozen(name, x64):
    """By values alone: the model written out in numpy, every coefficient a number of its own walk, and differences."""
    model = model64(name)
    walk = jax.tree.map(np.asarray, model.walk(TOKENS, record_mixing=tuple(range(model.depth))))
    vectors = np.asarray(model.token_vectors)[TOKENS]
    frozen = functools.partial(frozen_context, model, walk)
    parts = d.decompose(model, TOKENS)
    np.testing.assert_allclose(frozen(vectors), parts.whole, 1e-10, 1e-11)
    for j in range(T):
        moved = np.zeros((T, 1))
        moved[j] = 0.5
        change = frozen(vectors * (1 + moved)) - frozen(vectors * (1 - moved))
        np.testing.assert_allclose(change, parts.by_token[j], 1e-9, 1e-10)


def frozen_context(model, walk, vectors):
    """The last context vector of these token vectors, with all coefficients as they were in `walk`."""
    sums = np.concatenate([walk.stations[:-1] + walk.moves, walk.stations[-1:]])

    def norm(module, was, x):
        """`x` normalised as `was` is."""
        if hasattr(module, "bias"):
            was, x = (a - a.mean(-1, keepdims=True) for a in (was, x))
        multiplier = np.asarray(module.scale) + getattr(module, "unit_offset", 0)
        y = x / np.sqrt((was**2).mean(-1, keepdims=True) + module.eps) * multiplier
        return y if getattr(module, "bias", None) is None else y + np.asarray(module.bias)

    def linear(module, x):
        y = x @ np.asarray(module.weight)
        return y if module.bias is None else y + np.asarray(module.bias)

    def mlp(module, was, x):
        """`x` with the gates that `was` opened."""
        gate = linear(module.gate if hasattr(module, "gate") else module.up, was)
        opened = np.asarray(jw.filters.GATES[module.activation](jnp.asarray(gate)))
        return linear(module.down, opened * (gate if hasattr(module, "gate") else 1) * linear(module.up, x))

    def readout(aggregate, h_was, y_was, y):
        """Combined values `y` [G, T, K] read out with the gates of `h_was` and the norms per head of `y_was`."""
        name = type(aggregate).__name__
        if name in ("Retention", "GatedLinearAttention"):
            y, y_was = (a - a.mean(-1, keepdims=True) for a in (y, y_was))
        if name in ("Retention", "GatedLinearAttention", "DeltaNet", "GatedDeltaNet"):
            y = y / np.sqrt((y_was**2).mean(-1, keepdims=True) + 1e-5)
        y, y_was = (a.transpose(1, 0, 2).reshape(a.shape[1], -1) for a in (y, y_was))
        if name == "RWKV4":
            y = y[:, : len(y[0]) // 2] + y[:, len(y[0]) // 2 :]
        if name == "RWKV4ChannelMix":
            (receptance, hidden), (_, k) = np.split(y_was, 2, 1), np.split(y, 2, 1)
            receptance, hidden = linear(aggregate.receptance, receptance), linear(aggregate.up, hidden)
            return linear(aggregate.down, np.maximum(hidden, 0) * linear(aggregate.up, k)) / (1 + np.exp(-receptance))
        if hasattr(aggregate, "gate"):
            gate = linear(aggregate.gate, h_was)
            y = gate / (1 + np.exp(-gate)) * y
        return linear(aggregate.out, y)

    def added(placement, norms, was, y):
        """The move that `y` makes where `was` was made, by its step's two norms."""
        after = norms[0] if placement == "res_post" else norms[1]
        return y if after is None else norm(after, was, y)

    x = vectors + np.asarray(model.position_vectors(T))
    for number, layer in enumerate(model.layers):
        post, parallel = layer.placement == "post", layer.placement == "parallel"
        before = layer.placement in ("pre", "parallel", "sandwich")
        s = 2 * number
        h = norm(layer.aggregate_norm, walk.stations[s], x) if before else x
        h_was = norm(layer.aggregate_norm, walk.stations[s], walk.stations[s]) if before else walk.stations[s]
        y, y_was = (walk.mixing[number] @ np.asarray(layer.aggregate.values(jnp.asarray(a))) for a in (h, h_was))
        y, y_was = (readout(layer.aggregate, h_was, y_was, a) for a in (y, y_was))
        after = x + added(layer.placement, (layer.aggregate_norm, layer.aggregate_out_norm), y_was, y)
        after = norm(layer.aggregate_norm, sums[s], after) if post else after
        if layer.filter is not None:
            was, source = (walk.stations[s], x) if parallel else (walk.stations[s + 1], after)
            if before:
                was, source = norm(layer.filter_norm, was, was), norm(layer.filter_norm, was, source)
            y, y_was = mlp(layer.filter, was, source), mlp(layer.filter, was, was)
            after = after + added(layer.placement, (layer.filter_norm, layer.filter_out_norm), y_was, y)
            after = norm(layer.filter_norm, sums[s + 1], after) if post else after
        x = after
    return (x if model.norm is None else norm(model.norm, walk.stations[-1], x))[-1]


def test_tokens_of_another_document_and_of_the_future_have_no_part(x64):
    parts = d.decompose(model64("pre"), TOKENS, 5, segments=SEGMENTS)
    np.testing.assert_array_equal(parts.by_token[:3], 0)
    np.testing.assert_array_equal(parts.by_token[6], 0)
    assert np.abs(parts.by_token[3:6]).min() > 0
    heads = d.decompose_heads(model64("pre"), TOKENS, 1, 5, segments=SEGMENTS)
    np.testing.assert_array_equal(heads.by_head[:, :3], 0)
    alone = d.decompose(model64("pre"), TOKENS[3:], 2)
    np.testing.assert_allclose(parts.by_token[3:], alone.by_token, 1e-11, 1e-12)


@pytest.mark.parametrize("name", ["pre-gated", "post", "sandwich", "res_post"])
def test_attributions_with_the_entropy_part_sum_to_the_log_probability(name, x64):
    model = model64(name)
    parts, steps = d.decompose(model, TOKENS), d.decompose_steps(model, TOKENS)
    log_p = jw.next_log_probs(model, TOKENS)[-1]
    for token in range(model.vocab_size):
        direction, constant = d.log_prob_readout(model, parts.whole, token)
        by_token = parts.by_token @ direction
        rest = (parts.by_position.sum(0) + parts.bias) @ direction
        np.testing.assert_allclose(by_token.sum() + rest + constant, log_p[token], 1e-11, 1e-11)
        np.testing.assert_allclose(total(steps) @ direction + constant, log_p[token], 1e-11, 1e-11)
        direction, constant = d.logit_readout(model, token, parts.whole)
        np.testing.assert_allclose(total(parts) @ direction + constant, model.logits(parts.whole)[token], 1e-11, 1e-11)


def test_where_logits_are_capped_a_readout_is_held_at_a_context(x64):
    model = model64("res_post")
    with pytest.raises(
        ValueError, match="context: expected a context vector, as this model soft-caps its logits at 3,"
    ):
        d.logit_readout(model, 1)
    context = model.walk(TOKENS).context[-1]
    free = context @ model.unembed.weight.T + model.unembed.bias
    direction, constant = d.logit_readout(model, 1, context)
    np.testing.assert_allclose(direction, 3 * np.tanh(free[1] / 3) / free[1] * model.unembed.weight[1], rtol=1e-13)
    np.testing.assert_allclose(constant, 3 * np.tanh(free[1] / 3) / free[1] * model.unembed.bias[1], rtol=1e-13)
    zeros = dataclasses.replace(model, unembed=dataclasses.replace(model.unembed, bias=0 * model.unembed.bias))
    np.testing.assert_allclose(d.logit_readout(zeros, 1, 0 * context).direction, model.unembed.weight[1], rtol=1e-13)


def test_batched_and_jitted_as_alone():
    model = model_of()
    paths = np.array([TOKENS, TOKENS[::-1]])
    batched = jax.jit(jax.vmap(lambda t: d.decompose(model, t, 3)))(paths)
    for i, path in enumerate(paths):
        alone = d.decompose(model, path, 3)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, 1e-4, 1e-5), batched, alone)
    assert (batched.error < 1e-5).all()


@pytest.mark.slow
def test_a_long_path_is_decomposed_exactly_and_in_bounded_memory():
    heads = ATTENTION(heads=4)
    tokens = np.arange(1024) % 5
    model = model_of(scale=0.05, max_length=1024, width=128, depth=4, aggregate=heads)
    cuts = (d.decompose, d.decompose_steps, functools.partial(d.decompose_heads, layer=2))
    for cut in cuts:
        assert cut(model, tokens).error <= 2e-6
    # The mixing matrices of its 12 layers have 192 MiB, and are held once.
    model = model_of(scale=0.05, max_length=1024, width=256, depth=12, aggregate=heads)
    arguments = model, jnp.asarray(tokens, jnp.int32), None, jnp.int32(1023), jnp.int32(25)
    layer = jnp.int32(6)
    for lowered in (
        d.by_token.lower(*arguments, None),
        d._by_step.lower(*arguments),
        d._by_head.lower(*arguments, layer, layer, slot=(0, 0)),
    ):
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 450 * 2**20


def test_traced_positions_and_ids_out_of_range_are_nan():
    model = model_of()
    at = jax.jit(lambda at: d.decompose(model, TOKENS, at))
    assert np.isfinite(at(-1).by_token).all()
    assert np.isnan(at(7).whole).all()
    assert np.isnan(jax.jit(lambda token: jw.occlusion(model, TOKENS, token))(5).whole)
    assert np.isnan(jax.jit(lambda token: d.logit_readout(model, token))(-1).direction).all()


def test_a_move_whose_parts_cancel_is_exact():
    """The error of a sum is of the size of its parts, which the sum may be far below."""
    model = model_of()
    aggregate = model.layers[1].aggregate
    heads = aggregate.qkv.weight.shape[1] // 3 // aggregate.head_width
    same = jnp.tile(aggregate.qkv.weight.reshape(D, 3, heads, -1)[:, :, :1], (1, 1, heads, 1)).reshape(D, -1)
    signs = jnp.repeat(jnp.array([1.0, -1.0] * (heads // 2)), D // heads)[:, None]
    out = signs * jnp.tile(aggregate.out.weight[: D // heads], (heads, 1)) * (1 + 1e-6)
    cancelling = dataclasses.replace(
        aggregate,
        qkv=dataclasses.replace(aggregate.qkv, weight=same, bias=0 * aggregate.qkv.bias),
        out=dataclasses.replace(aggregate.out, weight=out, bias=0 * aggregate.out.bias),
    )
    model = model.with_layer(1, aggregate=cancelling)
    parts = d.decompose_heads(model, TOKENS, 1)
    size = np.linalg.norm(parts.by_head, axis=-1).sum()
    assert np.linalg.norm(parts.whole) < 1e-5 * size
    assert parts.error < 1e-6
    with pytest.raises(ValueError, match=r"along: expected directions \[n, 16\], got shape \(2, 15\)"):
        d.decompose(model, TOKENS, along=jnp.ones((2, D - 1)))


def test_what_is_not_affine_when_held_is_refused(monkeypatch):
    model = model_of()
    unknown = dataclasses.replace(model.layers[0], filter=_typed(model.layers[0].filter))
    with pytest.raises(d.DecompositionError, match="expected an error of at most 1e-05 of the sum of"):
        d.decompose(dataclasses.replace(model, layers=(unknown, model.layers[1])), TOKENS)


def _typed(filter):
    """An MLP whose gate is not held, whatever it is asked."""

    class Unheld(jw.filters.MLP):
        def hidden(self, x: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " E"]:
            return super().hidden(x, hold=False)

    return module(Unheld)(filter.up, filter.down, filter.activation)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: d.decompose(m, TOKENS, 7), "at: expected one from -7 to 6, got 7"),
        (lambda m: d.decompose(m, TOKENS, np.int64(9)), "at: expected one from -7 to 6, got 9"),
        (lambda m: d.logit_readout(m, 5), "token: expected one from 0 to 4, got 5"),
        (lambda m: d.log_prob_readout(m, jnp.zeros(16), -1), "token: expected one from 0 to 4, got -1"),
        (lambda m: d.decompose(m, TOKENS, station=5), "station: expected one from 0 to 4"),
        (lambda m: d.decompose_heads(m, TOKENS, 2), "layer: expected one from 0 to 1, got 2"),
        (lambda m: d.decompose_heads(m, TOKENS, 1, station=2), "station: expected one from 3 on"),
        (lambda m: d.decompose_neurons(m, TOKENS, 0, station=1), "station: expected one from 2 on"),
        (lambda m: d.decompose(jw.astype(m, jnp.bfloat16), TOKENS), "expected float32 or float64, got bfloat16"),
        (lambda m: d.decompose(m, TOKENS + 9), "expected ids from 0 to 4"),
    ],
)
def test_what_does_not_exist_is_named(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(model_of())


def test_a_layer_without_neurons():
    with pytest.raises(ValueError, match=r"whose filter has neurons, of \[\], got 0"):
        d.decompose_neurons(model_of(filter=None), TOKENS, 0)
