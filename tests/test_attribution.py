"""Attributions: what each should sum to, its own definition by another way, and agreement where all must agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from tests.conftest import float64, model_of, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

TOKENS = np.array([1, 4, 0, 2, 2, 3, 1])
SEGMENTS = np.array([1, 1, 1, 2, 2, 2, 2])
MODELS = {
    "pre": {"unembed_bias": True},
    "post": {"placement": "post", "norm": "rms_norm", "filter": jw.MLPConfig(gated=True, activation="silu")},
    "sandwich": {"placement": "sandwich", "logit_softcap": 2.0, "embed_scale": 3.0, "unembed_bias": True},
}
AGAINST_BASELINE = (jw.gradient_attribution, jw.integrated_gradients, jw.occlusion)


@functools.cache
def model64(name):
    with float64():
        return to64(model_of(**MODELS[name]))


def score(model, vectors, token, at, segments=None):
    context = model.walk(TOKENS, vectors=vectors, segments=segments).context[at]
    return jax.nn.log_softmax(model.logits(context))[token]


@pytest.mark.parametrize("name", quick({"sandwich"}, MODELS))
def test_integrated_gradients_are_complete_and_the_held_parts_exact(name, x64):
    model = model64(name)
    vectors = model.token_vectors[TOKENS]
    mean = jnp.broadcast_to(model.token_vectors.mean(0), vectors.shape)
    for token, at in ((0, -1), (3, 4)):
        full, none = (score(model, v, token, at % len(TOKENS)) for v in (vectors, mean))
        integrated = jw.integrated_gradients(model, TOKENS, token, at)
        np.testing.assert_allclose(integrated.whole, full - none, 1e-12)
        assert abs(integrated.gap) < 1e-5 * abs(full - none)
        held = jw.held_attribution(model, TOKENS, token, at)
        np.testing.assert_allclose(held.whole, full, 1e-12)
        assert abs(held.gap) < 1e-12


def test_integrated_gradients_in_float32():
    """To 1e-3 of the change, from the mean token vector."""
    model = model_of()
    for token in range(5):
        result = jw.integrated_gradients(model, TOKENS, token)
        assert abs(result.gap) < 1e-3 * max(abs(float(result.whole)), 0.1)


@pytest.mark.parametrize("method", quick({jw.integrated_gradients}, AGAINST_BASELINE))
def test_in_bfloat16_near_what_it_is_in_float32(method):
    model = model_of()
    near, exact = method(jw.astype(model, jnp.bfloat16), TOKENS, 1), method(model, TOKENS, 1)
    np.testing.assert_allclose(near.by_token, exact.by_token, atol=0.05 * np.abs(exact.by_token).max() + 0.02)


@pytest.mark.parametrize("name", quick({"sandwich"}, MODELS))
def test_occlusion_and_gradient_are_what_they_are_called(name, x64):
    model = model64(name)
    vectors = model.token_vectors[TOKENS]
    baseline = model.embed.table[4] * 0.5
    value = jax.jit(lambda vectors: score(model, vectors, 2, 5))
    full = value(vectors)
    occluded = jw.occlusion(model, TOKENS, 2, 5, baseline=baseline)
    gradient = jw.gradient_attribution(model, TOKENS, 2, 5, baseline=baseline)
    step = 1e-5
    for j in range(len(TOKENS)):
        without = value(vectors.at[j].set(baseline))
        np.testing.assert_allclose(occluded.by_token[j], full - without, rtol=0, atol=1e-12)
        way = step * (vectors[j] - baseline)
        slope = value(vectors.at[j].add(way)) - value(vectors.at[j].add(-way))
        np.testing.assert_allclose(gradient.by_token[j], slope / (2 * step), 1e-6, 1e-9)
    np.testing.assert_allclose(gradient.gap, gradient.by_token.sum() - gradient.whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method", quick({jw.held_attribution, jw.gradient_attribution}, [jw.held_attribution, *AGAINST_BASELINE])
)
def test_tokens_that_cannot_matter_get_nothing(method):
    result = method(model_of(), TOKENS, 2, 5, segments=SEGMENTS)
    np.testing.assert_array_equal(result.by_token[jnp.array([0, 1, 2, 6])], 0)
    assert np.abs(result.by_token[3:6]).min() > 0


@pytest.mark.parametrize("method", quick({jw.integrated_gradients}, AGAINST_BASELINE))
def test_a_path_at_its_baseline_has_nothing_to_attribute(method):
    model = model_of()
    path = np.full(4, 3)
    result = method(model, path, 1, baseline=model.embed.table[3])
    np.testing.assert_array_equal(result.by_token, 0)
    assert result.gap == result.whole == 0


@pytest.mark.parametrize("method", quick({jw.integrated_gradients}, AGAINST_BASELINE))
def test_batched_as_alone(method):
    model = model_of()
    paths = np.array([TOKENS, TOKENS[::-1]])
    batched = jax.vmap(lambda path: method(model, path, 1, 3))(paths)
    for i in range(2):
        np.testing.assert_allclose(batched.by_token[i], method(model, paths[i], 1, 3).by_token, 1e-4, 1e-5)


def test_what_does_not_exist_is_named():
    model = model_of()
    with pytest.raises(ValueError, match="token: expected one from 0 to 4, got 5"):
        jw.occlusion(model, TOKENS, 5)
    with pytest.raises(ValueError, match="at: expected one from -7 to 6, got 7"):
        jw.integrated_gradients(model, TOKENS, 0, 7)
    with pytest.raises(ValueError, match=r"baseline: expected a vector \[16\], got shape \(5,\)"):
        jw.gradient_attribution(model, TOKENS, 0, baseline=jnp.ones(5))
