"""Laws of the composition: one model, many ways to walk through it, and what may be asked and changed on the way."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.config import LinearScaling
from jaxwalk.model import plain, unrolled
from jaxwalk.model.inputs import check_tokens
from jaxwalk.model.layout import apart
from jaxwalk.model.stack import repetitions
from tests.conftest import float64, model_of, normal, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

attention = jw.aggregates.config
CHOICES = {
    "pre": {},
    "post-rms-sinusoidal-tied-gated": {
        "placement": "post",
        "norm": "rms_norm",
        "positions": "sinusoidal",
        "tied": True,
        "aggregate": attention("attention", kv_heads=2, qk_norm=True),
        "filter": jw.MLPConfig(gated=True, activation="silu", hidden=12),
    },
    "parallel-rope-nobias": {
        "placement": "parallel",
        "norm_bias": False,
        "positions": "none",
        "aggregate": attention("attention", positions="rope", bias=False),
        "unembed_bias": True,
        "filter": jw.MLPConfig(bias=False, activation="gelu_tanh"),
    },
    "pre-alternating": {
        "depth": 4,
        "norm": "rms_norm",
        "aggregate": (attention("attention", positions="alibi", window=3), "fixed_mixing"),
        "filter": (jw.MLPConfig(activation="relu"), None),
    },
    # As Gemma 3 chooses, and as OLMo 2 does.
    "sandwich-capped-scaled-tied": {
        "depth": 4,
        "placement": "sandwich",
        "norm": "rms_norm",
        "norm_unit_offset": True,
        "positions": "none",
        "embed_scale": 3.0,
        "tied": True,
        "logit_softcap": 2.0,
        "aggregate": tuple(
            attention(
                "attention",
                kv_heads=2,
                head_width=6,
                positions="rope",
                rope_theta=theta,
                rope_scaling=scaling,
                scale=0.4,
                softcap=1.5,
                window=window,
                qk_norm=True,
                qk_norm_unit_offset=True,
                bias=False,
            )
            for theta, scaling, window in ((100.0, None, 3), (1000.0, LinearScaling(4.0), None))
        ),
        "filter": jw.MLPConfig(gated=True, activation="gelu_tanh", hidden=12, bias=False),
    },
    "res_post-offset": {
        "placement": "res_post",
        "embed_norm": True,
        "position_offset": 2,
        "unembed_bias": True,
        "logit_softcap": 3.0,
        "aggregate": attention("attention", positions="rope", rope_width=2, qk_norm=True, qk_norm_over="width"),
        "filter": jw.MLPConfig(gated=True, activation="silu"),
    },
    "parallel-means-tied": {"placement": "parallel", "aggregate": ("causal_mean", "identity"), "tied": True},
}
each = pytest.mark.parametrize("name", CHOICES)


def on(*names):
    """Each of CHOICES, those not named only with `-m slow`."""
    return pytest.mark.parametrize("name", quick(names, CHOICES))


TOKENS = np.array([1, 4, 0, 2, 2, 3, 1, 0])
T = len(TOKENS)


def model(name):
    return model_of(**CHOICES[name])


@jax.jit
def many_ways(model, tokens):
    """The same walk, taken in every way there is."""
    walk = model.walk(tokens, record_mixing=tuple(range(model.depth)))
    held = model.walk(tokens, hold=True)
    state, first = jw.prefill(model, tokens[:3], T)

    def steps(state, tokens):
        return jax.lax.scan(lambda state, token: jw.step(model, state, token), state, tokens)[1]

    def logits_of(walk):
        return jax.vmap(model.logits)(walk.context)

    logits = {
        "parallel": logits_of(model.walk(tokens)),
        "steps": steps(jw.init_state(model, T), tokens),
        "prefill": jnp.concatenate([logits_of(walk)[:2], first[None], steps(state, tokens[3:])]),
        "batch": jax.vmap(lambda tokens: logits_of(model.walk(tokens)))(jnp.stack([tokens[::-1], tokens]))[1],
        "prefix": logits_of(jw.encoding_walk(model, tokens[:5])),
    }
    arguments = {
        "mixing": walk.mixing,
        "vectors": model.token_vectors[tokens],
        "nudge": jnp.zeros_like(walk.stations),
    }
    stations = {
        "walk": model.walk(tokens).stations,
        "recorded": walk.stations,
        "held": held.stations,
        "all arguments, none of which changes anything": model.walk(tokens, **arguments).stations,
        "unrolled": unrolled(model).walk(tokens).stations,
        "unrolled, held": unrolled(model).walk(tokens, hold=True).stations,
    }
    return logits, stations, walk.mixing, held.context


NEW = ("sandwich-capped-scaled-tied", "res_post-offset")


@on("post-rms-sinusoidal-tied-gated", "pre-alternating", "sandwich-capped-scaled-tied")
def test_all_ways_to_walk_agree(name):
    logits, stations, mixing, context = many_ways(model(name), TOKENS)
    depth = model(name).depth
    assert stations["walk"].shape == (2 * depth + 1, T, 16)
    assert list(mixing) == list(range(depth))
    for way, value in (logits | stations).items():
        expected = logits["parallel"] if way in logits else stations["walk"]
        np.testing.assert_allclose(value, expected[: len(value)], atol=1e-5, rtol=1e-5, err_msg=way)
    np.testing.assert_allclose(jax.vmap(model(name).logits)(context), logits["parallel"], atol=1e-5, rtol=1e-5)


@on("pre-alternating")
def test_all_ways_to_walk_agree_in_float64(name):
    with float64():
        logits, stations, _, _ = many_ways(to64(model(name)), TOKENS)
        for way, value in (logits | stations).items():
            expected = logits["parallel"] if way in logits else stations["walk"]
            assert value.dtype == np.float64
            np.testing.assert_allclose(value, expected[: len(value)], atol=1e-10, rtol=0, err_msg=way)


def test_jit_is_eager():
    walk = model("pre").walk(TOKENS)
    jitted = jax.jit(lambda m, t: m.walk(t))(model("pre"), TOKENS)
    np.testing.assert_allclose(walk.stations, jitted.stations, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(walk.context, jitted.context, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(jw.context_vector(model("pre"), TOKENS), walk.context[-1])
    assert walk.mixing == jitted.mixing == {}


@on("pre-alternating")
def test_unrolling_and_remat_have_the_same_gradients(name):
    @jax.jit
    def gradients(model, tokens):
        def grad(form=lambda m: m, remat=False):
            score = lambda m: jw.path_log_prob(dataclasses.replace(form(m), remat=remat), tokens)
            return jax.value_and_grad(score)(model)

        return grad(), grad(unrolled), grad(remat=True), grad(unrolled, remat=True)

    plain, *others = map(jax.tree.leaves, gradients(model(name), TOKENS))
    assert all(np.isfinite(g).all() for g in plain)
    for leaves in others:
        for a, b in zip(leaves, plain, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@on("sandwich-capped-scaled-tied")
def test_layers_and_models_have_every_derivative(name):
    m = plain(model(name))

    @jax.jit
    def derivatives(model, x, t):
        layer = model.layers[0]
        functions = {
            "layer": (lambda x: layer(x).stations[-1], x),
            "model": (lambda x: model.walk(TOKENS, vectors=x).context, x),
        }
        out = {}
        for what, (f, x) in functions.items():
            back = jax.vjp(f, x)[1]
            out[what] = (
                jax.jvp(f, (x,), (t,))[1],
                jax.linearize(f, x)[1](t),
                jnp.vdot(back(t)[0], t),
                jnp.vdot(t, jax.jvp(f, (x,), (t,))[1]),
                jax.jacrev(f)(x),
            )
        # And with respect to the model itself, forward and back.
        tangent = jax.tree.map(jnp.ones_like, model)
        loss = lambda m: jw.path_log_prob(m, TOKENS)
        out["parameters"] = (
            jax.jvp(loss, (model,), (tangent,))[1],
            jax.linearize(loss, model)[1](tangent),
            sum(g.sum() for g in jax.tree.leaves(jax.grad(loss)(model))),
        )
        return out

    x = m.token_vectors[TOKENS]
    for what, (push, linear, *rest) in derivatives(m, x, normal(3, T, 16)).items():
        np.testing.assert_allclose(push, linear, atol=1e-4, rtol=1e-4, err_msg=what)
        if what == "parameters":
            np.testing.assert_allclose(rest[0], push, rtol=1e-4)
        else:
            np.testing.assert_allclose(rest[0], rest[1], rtol=1e-4, err_msg=what)
            future = np.arange(T)[None, :] > np.arange(T)[:, None]
            assert not np.array(rest[2]).transpose(0, 2, 1, 3)[future].any()


def additive(model):
    """A tangent: every additive parameter and position table at its value, all else zero."""

    def keep(path, leaf):
        names = [getattr(k, "name", "") for k in path]
        return leaf if names[-1] == "bias" or "positions" in names[:1] else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(keep, model)


@on("pre-alternating", "parallel-rope-nobias", "sandwich-capped-scaled-tied")
def test_held_walks_are_affine_and_their_constant_is_the_additive_parameters(name):
    with float64():
        m = to64(model(name))

        @jax.jit
        def parts(model, vectors):
            zero = jnp.zeros((2 * model.depth + 1, T, 16))
            table = zero
            if not jax.tree.leaves(model.positions) and model.positions is not None:  # computed, not a parameter
                table = zero.at[0].set(jax.vmap(model.positions)(jnp.arange(T)))

            def held(model, vectors, nudge):
                return model.walk(TOKENS, vectors=vectors, nudge=nudge, hold=True).context

            of_vectors = lambda v: held(model, v, zero)
            context, linear = jax.linearize(of_vectors, vectors)
            constant = jax.jvp(held, (model, vectors, zero), (additive(model), jnp.zeros_like(vectors), table))[1]
            other = jnp.cos(jnp.arange(vectors.size, dtype=vectors.dtype)).reshape(vectors.shape)
            push = lambda v: jax.jvp(of_vectors, (v,), (other,))[1]
            return context, linear(vectors), constant, jax.jvp(push, (vectors,), (other,))[1]

        context, linear, constant, curvature = parts(m, m.token_vectors[TOKENS])
        unheld = jax.jit(lambda m: m.walk(TOKENS).context)(m)
    np.testing.assert_allclose(context, unheld, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(linear + constant, context, rtol=1e-12, atol=1e-12)
    assert not np.array(curvature).any()
    if name not in ("parallel-rope-nobias", "sandwich-capped-scaled-tied"):
        assert np.abs(constant).max() > 1e-2


@on("post-rms-sinusoidal-tied-gated")
def test_the_gradient_of_a_nudge_agrees_with_finite_differences(name):
    with float64():
        m = to64(model(name))
        shape = (2 * m.depth + 1, T, 16)
        direction = np.random.default_rng(0).normal(size=shape)

        @jax.jit
        def f(scale):
            return jw.path_log_prob(m, TOKENS, nudge=scale * direction)

        step = 1e-5
        slope = (f(step) - f(-step)) / (2 * step)
        gradient = jax.jit(jax.grad(lambda n: jw.path_log_prob(m, TOKENS, nudge=n)))(jnp.zeros(shape))
        np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-5)


def test_a_nudge_is_added_at_its_station():
    m, where = model("pre"), (2, 3)
    nudge = jnp.zeros((5, T, 16)).at[where].set(1.0)
    walk = jax.jit(lambda m, n: m.walk(TOKENS, nudge=n).stations)
    moved = np.array(walk(m, nudge) - walk(m, jnp.zeros_like(nudge)))
    assert not moved[:2].any()
    np.testing.assert_allclose(moved[where], 1, atol=1e-5)
    assert not moved[2, [0, 1, 2, 4, 5, 6, 7]].any()
    assert not moved[:, :3].any()


@on("pre-alternating", "res_post-offset")
def test_packed_and_padded_paths_are_walked_as_if_alone(name, x64):
    m = to64(model(name))
    walk = jax.jit(lambda m, t, s: m.walk(t, segments=s).stations)
    alone = jax.jit(lambda m, t: m.walk(t).stations)
    docs = [alone(m, TOKENS[:4]), alone(m, TOKENS[4:])]
    for ids in ((1, 2), (0, 1), (1, 0)):
        stations = walk(m, TOKENS, jnp.repeat(jnp.array(ids), 4))
        for i, doc in enumerate(docs):
            if ids[i]:
                np.testing.assert_allclose(stations[:, 4 * i : 4 * i + 4], doc, atol=1e-12, rtol=1e-12)


def test_overriding_and_recording_the_mixing():
    m = model("pre")
    walk = m.walk(TOKENS, record_mixing=(1,))
    assert list(walk.mixing) == [1]
    assert walk.mixing[1].shape == (4, T, T)
    fixed = jnp.broadcast_to(jnp.eye(T), (4, T, T))
    alone = m.walk(TOKENS, mixing={0: fixed, 1: fixed}, record_mixing=(0,))
    np.testing.assert_array_equal(alone.mixing[0], fixed)
    other = m.walk(TOKENS[::-1].copy(), mixing={0: fixed, 1: fixed})  # nothing mixes: only token and position count
    same = TOKENS[::-1] == TOKENS
    np.testing.assert_allclose(alone.context[same], other.context[same], atol=1e-6)
    assert np.abs(alone.context - walk.context).max() > 1e-2


@pytest.mark.parametrize("placement", quick({"post", "sandwich"}, ["pre", "post", "parallel", "sandwich", "res_post"]))
def test_stations_are_as_described(placement):
    before = placement not in ("post", "res_post")

    @jax.jit
    def by_hand(m):
        x = jax.vmap(m.embed.norm)(3 * m.embed.table[TOKENS]) + m.positions.table[2 : T + 2]
        stations, moves = [x], []
        for layer in m.layers:

            def step(norm, out_norm, f, x, to):
                norm = jax.vmap(norm)
                y = f(norm(x) if before else x)
                y = norm(y) if placement == "res_post" else jax.vmap(out_norm)(y) if placement == "sandwich" else y
                moves.append(y)
                return norm(to + y) if placement == "post" else to + y

            mixed = step(layer.aggregate_norm, layer.aggregate_out_norm, layer.aggregate, x, x)
            filter = jax.vmap(layer.filter)
            source = x if placement == "parallel" else mixed
            x = step(layer.filter_norm, layer.filter_out_norm, filter, source, mixed)
            stations += [mixed, x]
        context = x if placement == "post" else jax.vmap(m.norm)(x)
        free = context @ m.unembed.weight.T + m.unembed.bias[None]
        return jnp.stack(stations), jnp.stack(moves), context, 2 * jnp.tanh(free / 2)

    m = model_of(
        placement=placement,
        embed_scale=3.0,
        embed_norm=True,
        position_offset=2,
        logit_softcap=2.0,
        unembed_bias=True,
    )
    assert (m.layers[0].aggregate_out_norm is None) == (placement != "sandwich")
    expected = by_hand(m)
    walk, logits = jax.jit(lambda m: (w := m.walk(TOKENS), jax.vmap(m.logits)(w.context)))(m)
    for ours, theirs in zip((walk.stations, walk.moves, walk.context, logits), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(logits).max() < 2


@on("parallel-rope-nobias", "sandwich-capped-scaled-tied")
def test_bfloat16_is_near(name):
    m = jw.astype(model(name), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(m)} == {jnp.dtype(jnp.bfloat16)}
    law, exact = jax.jit(jw.next_log_probs)(m, TOKENS), jax.jit(jw.next_log_probs)(model(name), TOKENS)
    assert law.dtype == jnp.float32
    nudge = jnp.zeros((m.stations, T, m.width))  # float32, taken in bfloat16
    where = jnp.zeros((m.stations, T), bool)
    nothing = jw.path_log_prob(m, TOKENS, nudge=nudge, patch=(where, nudge))
    assert nothing == jw.path_log_prob(m, TOKENS, nudge=nudge.astype(jnp.bfloat16))
    assert m.walk(TOKENS).stations.dtype == jnp.bfloat16
    assert np.abs(law - exact).mean() < 0.15
    assert jw.astype(m, jnp.float32).token_vectors.dtype == jnp.float32


@on("pre", "post-rms-sinusoidal-tied-gated", *NEW)
def test_a_model_is_a_pytree_of_floats_made_by_a_pure_function(name):
    config = jw.ModelConfig(**{"vocab_size": 5, "max_length": 12, "width": 16, "depth": 2, **CHOICES[name]})
    make = lambda key: jw.init(config, key)
    shapes = jax.eval_shape(lambda key: jw.init(config, key), jax.random.key(0))
    one, same, other = make(jax.random.key(0)), make(jax.random.key(0)), make(jax.random.key(1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(one))
    assert jax.tree.structure(shapes) == jax.tree.structure(one) == jax.tree.structure(model(name))
    assert [a.shape for a in jax.tree.leaves(shapes)] == [a.shape for a in jax.tree.leaves(one)]
    equal = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True)]
    assert all(equal)
    assert not np.array_equal(one.token_vectors, other.token_vectors)
    matrices = [leaf for leaf in jax.tree.leaves(jax.jit(apart)(one)) if leaf.ndim >= 2]
    assert len({float(leaf.ravel()[0]) for leaf in matrices}) == len(matrices)  # no two share a random stream
    assert 0.5 < float(jnp.abs(jw.next_log_probs(one, TOKENS)).mean() / np.log(5)) < 1.5


@pytest.mark.parametrize("aggregate", jw.aggregates.names())
def test_fresh_parameters_are_float32_under_x64_too(aggregate):
    config = jw.ModelConfig(vocab_size=5, max_length=4, width=16, depth=1, aggregate=aggregate, unembed_bias=True)
    with float64():
        shapes = jax.eval_shape(lambda: jw.init(config, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_walks_are_batched_with_vmap():
    batch = np.stack([TOKENS, TOKENS[::-1]])
    m = model("pre")
    walks = jax.jit(jax.vmap(lambda t: m.walk(t, record_mixing=(1,))))(batch)
    assert walks.stations.shape == (2, 5, T, 16)
    assert walks.mixing[1].shape == (2, 4, T, T)
    np.testing.assert_allclose(walks.context[0], jax.jit(jw.encoding_walk)(m, TOKENS).context, atol=1e-5)


def test_tied_weights_are_one_leaf():
    tied, untied = model("parallel-means-tied"), model("pre")
    vocabulary = [leaf for leaf in jax.tree.leaves(tied) if leaf.shape == (5, 16)]
    assert len(vocabulary) == 1
    assert tied.output_vectors is tied.token_vectors
    assert untied.output_vectors is not untied.token_vectors
    gradient = jax.jit(jax.grad(lambda m: jw.path_log_prob(m, TOKENS)))(tied)
    assert np.abs(gradient.embed.table).sum(-1).all()
    scaled = model("sandwich-capped-scaled-tied")
    np.testing.assert_allclose(scaled.token_vectors, 3 * scaled.output_vectors, rtol=1e-6)
    np.testing.assert_array_equal(scaled.walk(TOKENS).stations[0], scaled.token_vectors[TOKENS])


def test_surgery_is_replace_along_a_path():
    m, donor = model("pre"), model_of(seed=5, aggregate="causal_mean")
    layer = dataclasses.replace(m.layers[1], aggregate=donor.layers[1].aggregate)
    changed = dataclasses.replace(m, layers=(m.layers[0], layer))
    walk = jax.jit(lambda m: m.walk(TOKENS).stations)
    ours, theirs = np.array(walk(m)), np.array(walk(changed))
    np.testing.assert_allclose(ours[:3], theirs[:3], atol=1e-6)
    assert np.abs(ours[3:] - theirs[3:]).max() > 1e-2
    assert m.layers[1].aggregate is not changed.layers[1].aggregate


def test_layers_are_stacked_over_their_shortest_periods():
    assert repetitions("aaaa") == [(1, 4)]
    assert repetitions("ababab") == [(2, 3)]
    assert repetitions("aaabaaabaa") == [(4, 2), (1, 2)]  # a remainder
    assert repetitions("abc") == [(1, 1)] * 3
    assert repetitions("aabb") == [(1, 2), (1, 2)]
    kinds = lambda m: [(len(block.period), block.repeats) for block in m.layers.blocks]
    assert kinds(model("pre")) == [(1, 2)]
    assert kinds(model("pre-alternating")) == [(2, 2)]
    # What differs in values only is data: window, rotary base and its scaling.
    assert kinds(model("sandwich-capped-scaled-tied")) == [(1, 4)]
    assert kinds(unrolled(model("pre-alternating"))) == [(1, 1)] * 4
    assert jw.encoding_walk(model_of(depth=0), [1, 2]).stations.shape == (1, 2, 16)


def test_layers_are_a_sequence():
    m = model("sandwich-capped-scaled-tied")
    assert len(m.layers) == m.depth == 4
    assert [layer.aggregate.window for layer in m.layers] == [3, None, 3, None]
    assert m.layers[-1].aggregate.rope_theta == 1000.0
    assert [layer.aggregate.window for layer in m.layers[1:3]] == [None, 3]
    with pytest.raises(IndexError, match="expected one from 0 to 3, got 4"):
        m.layers[4]
    again = dataclasses.replace(m, layers=tuple(m.layers))
    assert jax.tree.structure(again) == jax.tree.structure(m)
    jax.tree.map(np.testing.assert_array_equal, again, m)
    shorter = dataclasses.replace(m, layers=m.layers.all_but_last())
    assert [layer.aggregate.window for layer in shorter.layers] == [3, None, 3]
    np.testing.assert_allclose(shorter.walk(TOKENS).stations, m.walk(TOKENS).stations[:7], atol=1e-6)


BAD = [
    ([0, 5], r"expected ids from 0 to 4, got 5\. Encode"),
    ([0, -1], r"expected ids from 0 to 4, got -1"),
    ([9, 8, 7, 6, 5, 9, 9], r"got 9, 8, 7, 6, 5, \.\.\."),
    ([1] * 14, r"expected at most 1[23] tokens \(max_length = 12\), got 14"),
    ([], r"expected one path.*shape \(0,\).*empty prompt"),
    ([0.0, 1.0], r"expected integer ids, got float"),
    ([[0, 1], [1, 0]], r"expected one path.*shape \(2, 2\).*jax.vmap"),
    (3, r"expected one path.*shape \(\)"),
]


@pytest.mark.parametrize(("tokens", "message"), BAD)
@pytest.mark.parametrize("kind", [np.array, jnp.array])
def test_bad_paths_raise_wherever_they_enter(tokens, message, kind):
    m = model("pre")
    entrances = [
        lambda t: m.walk(t),
        lambda t: jw.next_log_probs(m, t),
        lambda t: jw.path_log_prob(m, t),
        lambda t: jw.prefill(m, t, 12),
        lambda t: jw.sample_paths(m, t, jax.random.key(0), 1, 1),
        lambda t: jw.top_paths(m, t, 1, 1),
        lambda t: jw.path_entropy(m, t, 1),
        lambda t: jw.event_probability(m, t, 1, jw.visits(1)),
        lambda t: jw.path_gradient(m, t),
        lambda t: jw.station_gradient(m, t),
        lambda t: jw.context_sensitivity(m, t),
    ]
    tokens = kind(tokens)
    for enter in entrances:
        # Functions annotated with the shape of a path are stopped earlier under the tests' type checker.
        with pytest.raises((ValueError, TypeError)) as caught:
            unchecked(enter)(tokens)
        assert re.search(message, str(caught.value)), str(caught.value)


def unchecked(function):
    """`function` as users run it: without the tests' type checker, which would speak first."""

    def call(*args):
        from jaxtyping import config

        config.update("jaxtyping_disable", True)
        try:
            return function(*args)
        finally:
            config.update("jaxtyping_disable", False)

    return call


def test_bad_options_raise():
    m = model("pre")
    for options, message in (
        ({"record_mixing": (2,)}, r"record_mixing: expected layers from 0 to 1, got \[2\]"),
        ({"mixing": {-1: jnp.ones((1, T, T))}}, r"mixing: expected layers from 0 to 1, got \[-1\]"),
        ({"mixing": {0: jnp.ones((4, T, T + 1))}}, r"mixing\[0\]: expected shape \(4, 8, 8\) for this path"),
        ({"mixing": {0: jnp.ones((1, T, T))}}, r"mixing\[0\]: expected shape \(4, 8, 8\) .* got \(1, 8, 8\)"),
        ({"nudge": jnp.ones((4, T, 16))}, r"nudge: expected shape \(5, 8, 16\) for this path, got \(4, 8, 16\)"),
        ({"nudge": jnp.ones((5, 1, 16))}, r"nudge: expected shape \(5, 8, 16\)"),
        ({"patch": (jnp.ones((5, 1), bool), jnp.ones((5, T, 16)))}, r"patch\[0\]: expected shape \(5, 8\)"),
        ({"patch": (jnp.ones((5, T), bool), jnp.ones((5, T, 15)))}, r"patch\[1\]: expected shape \(5, 8, 16\)"),
        ({"mixing": {0: lambda A: A[0]}}, r"mixing\[0\] as a function: expected shape \(4, 8, 8\)"),
        ({"vectors": jnp.ones((T, 15))}, r"vectors: expected shape \(8, 16\)"),
        ({"segments": jnp.ones(T + 1, int)}, r"segments: expected shape \(8,\)"),
        ({"segments": np.full(T, np.nan)}, r"segments: expected integers, .* got float64"),
        ({"segments": np.full(T, -1)}, r"segments: expected documents counted from 1, and 0 for padding, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            unchecked(lambda o: m.walk(TOKENS, **o))(options)


def test_bad_lengths_raise():
    m = model("pre")
    for length in (0, -1, 13):
        with pytest.raises(ValueError, match=rf"length: expected from 1 .* to max_length = 12, got {length}"):
            jw.init_state(m, length)
    with pytest.raises(ValueError, match=r"length: expected from 8 \(the prompt\)"):
        jw.prefill(m, TOKENS, 7)
    with pytest.raises(ValueError, match="expected ids from 0 to 4, got 5"):
        jw.step(m, jw.init_state(m, 2), 5)


@on("post-rms-sinusoidal-tied-gated")
def test_traced_ids_out_of_range_are_nan(name):
    law = np.array(jax.jit(jw.next_log_probs)(model(name), jnp.array([1, 2, 5, -1])))
    assert np.isnan(law[2:]).all()
    np.testing.assert_array_equal(law[:2], jax.jit(jw.next_log_probs)(model(name), jnp.array([1, 2, 0, 0]))[:2])
    score = jax.jit(jw.path_log_prob)
    assert np.isnan(score(model(name), jnp.array([1, 2, 5])))  # scored, not walked
    assert np.isnan(score(model(name), jnp.array([1, 2, -1])))
    assert np.isnan(score(model(name), jnp.array([-1, 2, 1])))
    # Unsigned ids cannot be -1, which stands for an id out of range.
    np.testing.assert_array_equal(jax.jit(jw.next_log_probs)(model(name), jnp.array([1, 2, 255, 255], np.uint8)), law)
    with float64():  # nor can an id of 64 bits become another one in 32
        wrapped = jax.jit(lambda t: check_tokens(model(name), t))(jnp.array([1, 2**32 + 1, 1 - 2**32]))
    assert wrapped.dtype == np.int32
    assert (wrapped[0], wrapped[1] > 5, wrapped[2] < 0) == (1, True, True)
    gradient = jax.jit(jw.path_gradient)
    assert np.isnan(gradient(model(name), TOKENS, jnp.array(0))).any()
    assert np.isfinite(gradient(model(name), TOKENS, jnp.array(1))).all()


def test_steps_beyond_the_length_are_nan():
    m = model("pre")
    run = jax.jit(lambda m, t: jax.lax.scan(lambda s, x: jw.step(m, s, x), jw.init_state(m, 3), t)[1])
    logits = np.array(run(m, jnp.array([0, 1, 2, 3])))
    assert np.isfinite(logits[:3]).all()
    assert np.isnan(logits[3]).all()


def test_a_step_too_many_and_a_path_beyond_the_table_are_refused():
    model = model_of()
    state, _ = jw.step(model, jw.init_state(model, 1), 3)
    with pytest.raises(ValueError, match="has taken all 1 it was made for"):
        jw.step(model, state, 3)
    longer = dataclasses.replace(model, max_length=20)
    with pytest.raises(ValueError, match="expected at most 12 tokens, the rows of the table, got 13"):
        jw.next_log_probs(longer, [1] * 13)
    assert np.isfinite(jw.next_log_probs(longer, [1] * 12)).all()


# Interventions.


def test_patching_everything_is_the_other_walk_and_patching_nothing_is_this_one():
    model = model_of(unembed_bias=True)
    tokens, others = jnp.array([0, 3, 1, 4, 2]), jnp.array([2, 2, 0, 1, 3])
    mine, other = model.walk(tokens), model.walk(others)
    everywhere = jnp.ones((5, 5), bool)
    patched = model.walk(tokens, patch=(everywhere, other.stations))
    np.testing.assert_array_equal(patched.stations, other.stations)
    np.testing.assert_allclose(patched.context, other.context, rtol=1e-6)
    np.testing.assert_array_equal(model.walk(tokens, patch=(~everywhere, other.stations)).stations, mine.stations)
    # One station of all positions is enough: what comes after it depends on nothing else.
    for station in range(5):
        patched = model.walk(tokens, patch=(everywhere & (jnp.arange(5) == station)[:, None], other.stations))
        np.testing.assert_allclose(patched.stations[station:], other.stations[station:], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(patched.stations[:station], mine.stations[:station])


@pytest.mark.parametrize("placement", quick({"sandwich"}, ["pre", "post", "parallel", "sandwich"]))
def test_a_patch_at_one_place_is_the_nudge_that_leads_there(placement):
    model = model_of(depth=3, placement=placement)
    tokens = jnp.array([0, 3, 1, 4, 2])
    other = model.walk(tokens[::-1]).stations
    where = jnp.zeros((7, 5), bool).at[3, 2].set(True)
    nudge = jnp.where(where[..., None], other - model.walk(tokens).stations, 0)
    patched, nudged = model.walk(tokens, patch=(where, other)), model.walk(tokens, nudge=nudge)
    np.testing.assert_allclose(patched.stations, nudged.stations, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(patched.stations[3, 2], other[3, 2])
    np.testing.assert_array_equal(patched.stations[:, :2], model.walk(tokens).stations[:, :2])


def test_a_function_of_the_mixing_is_as_the_matrix_it_makes():
    model = model_of(depth=3)
    tokens = jnp.array([0, 3, 1, 4, 2])
    mine = model.walk(tokens, record_mixing=(0, 1, 2))
    same = model.walk(tokens, mixing={n: lambda A: A for n in range(3)})
    np.testing.assert_allclose(same.stations, mine.stations, rtol=1e-4, atol=1e-5)
    flat = lambda A: jnp.tril(jnp.ones_like(A)) / jnp.arange(1.0, A.shape[-1] + 1)[None, :, None]
    by_function = model.walk(tokens, mixing={1: flat}, record_mixing=(1, 2))
    by_matrix = model.walk(tokens, mixing={1: flat(mine.mixing[1])}, record_mixing=(1, 2))
    np.testing.assert_allclose(by_function.stations, by_matrix.stations, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_function.mixing[1], flat(mine.mixing[1]), rtol=1e-6)
    assert np.abs(by_function.mixing[2] - mine.mixing[2]).max() > 1e-3  # what comes after it associates anew


def test_interventions_on_a_path_are_over_all_its_positions():
    model = model_of()
    tokens = jnp.array([0, 3, 1, 4, 2])
    walk = model.walk(tokens, record_mixing=(0, 1))
    as_is = jw.path_log_prob(model, tokens)
    vectors = jax.vmap(model.embed)(tokens)
    same = {"mixing": walk.mixing, "vectors": vectors, "patch": (jnp.ones((5, 5), bool), walk.stations)}
    for name, value in same.items():
        np.testing.assert_allclose(jw.path_log_prob(model, tokens, **{name: value}), as_is, rtol=1e-5, err_msg=name)
    changed = walk.stations.at[3, 1, 0].add(1.0)
    where = jnp.zeros((5, 5), bool).at[3, 1].set(True)
    assert abs(jw.path_log_prob(model, tokens, patch=(where, changed)) - as_is) > 1e-3
    for name, value in (("vectors", vectors[:-1]), ("patch", (where[:, :-1], changed)), ("mixing", {0: jnp.eye(4)})):
        with pytest.raises(ValueError, match=rf"{name}.*: expected shape"):
            unchecked(lambda o: jw.path_log_prob(model, tokens, **o))({name: value})


def test_a_layer_is_changed_in_one_expression():
    model = model_of(depth=3)
    other = model_of(seed=3, depth=3, aggregate="causal_mean").layers[1].aggregate
    swapped = model.with_layer(1, aggregate=other)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(swapped.layers[1].aggregate, other)
    same(swapped.layers[1].filter, model.layers[1].filter)
    same(swapped.layers[0], model.layers[0])
    assert np.isfinite(jw.path_log_prob(swapped, jnp.array([0, 3, 1]))).all()
    with pytest.raises(ValueError, match="layer: expected one from 0 to 2, got 3"):
        model.with_layer(3, aggregate=other)
    with pytest.raises(TypeError):
        model.with_layer(0, agregate=other)
