"""Exact functions compute every product at the highest precision, inside a caller's `jax.jit` too."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jaxwalk as jw

FAMILIES = ("attention", "gated_delta_net", "hyena", "lru", "rwkv7")
DIRECTION = jnp.ones((1, 16))
EXACT = {
    "decompose": lambda m, t: jw.decompose(m, t).whole,
    "decompose, pulled": lambda m, t: jw.decompose(m, t, along=DIRECTION).whole,
    "decompose_steps": lambda m, t: jw.decompose_steps(m, t).whole,
    "decompose_steps_by_token": lambda m, t: jw.decompose_steps_by_token(m, t).whole,
    "decompose_heads": lambda m, t: jw.decompose_heads(m, t, 0).whole,
    "decompose_neurons": lambda m, t: jw.decompose_neurons(m, t, 1).whole,
    "held_attribution": lambda m, t: jw.held_attribution(m, t, 1).by_token,
    "logit_readout": lambda m, t: jw.logit_readout(m, t[0]),
    "log_prob_readout": lambda m, t: jw.log_prob_readout(m, jnp.ones(16), t[0]),
}


@pytest.mark.parametrize("name", EXACT)
def test_no_product_of_an_exact_function_is_lowered_at_default_precision(name):
    precisions = products(jax.jit(EXACT[name]), *shapes())
    assert set(precisions) <= {"HIGHEST"}, precisions
    assert len(precisions) > 20 or "readout" in name


def test_a_product_at_default_precision_is_seen():
    assert "DEFAULT" in products(jax.jit(jw.next_log_probs), *shapes())


@functools.cache
def shapes():
    """The shapes of a model and of a path."""
    config = jw.ModelConfig(
        vocab_size=5, max_length=8, width=16, depth=len(FAMILIES), aggregate=tuple(map(jw.aggregates.config, FAMILIES))
    )
    model = jax.eval_shape(lambda: jw.init(config, jax.random.key(0)))
    return model, jax.ShapeDtypeStruct((8,), jnp.int32)


def products(function, *args):
    """The precision of every product and convolution of the lowered program."""
    text = function.lower(*args).as_text()
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot|convolution)", line)]
    return [match for line in lines for match in re.findall(r"HIGHEST|DEFAULT|HIGH", line) or ["DEFAULT"]]
