"""GRU, LSTM and RWKV-4 beside the implementations of PyTorch and transformers, where these are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from tests.conftest import normal, perturbed

torch = pytest.importorskip("torch")

D, H, T = 16, 24, 40


def made(name, **choices):
    config = jw.aggregates.config(name, **choices)
    return perturbed(
        jax.eval_shape(lambda: config.init(width=D, max_length=T, layer=0, depth=2, key=jax.random.key(0))), 0.3
    )


def compare(aggregate, theirs):
    """Outputs to 1e-4, and gradients of a random projection for the input to 1e-3 of the largest."""
    x, weights = np.asarray(normal(0, T, D)), np.asarray(normal(1, T, D))
    y, grad = jax.jit(
        lambda a, x: (a(x), jax.grad(lambda x: jnp.sum(a(x) * weights))(x)),
    )(aggregate, x)
    x = torch.tensor(x, requires_grad=True)
    expected = theirs(x)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(y, expected.detach().numpy(), atol=1e-4)
    expected = x.grad.numpy()
    np.testing.assert_allclose(grad, expected, atol=1e-3 * np.abs(expected).max())


def load(parameter, value):
    with torch.no_grad():
        parameter.copy_(torch.tensor(np.asarray(value)).reshape(parameter.shape))


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_pytorch(name):
    aggregate = made(name, hidden=H)
    network = getattr(torch.nn, name.upper())(D, H, batch_first=True)
    load(network.weight_ih_l0, aggregate.input.weight.T)
    load(network.weight_hh_l0, aggregate.recurrent.weight.T)
    load(network.bias_ih_l0, aggregate.input.bias)
    bias = aggregate.recurrent.bias
    load(network.bias_hh_l0, jnp.zeros(4 * H) if bias is None else bias)
    out = torch.tensor(np.asarray(aggregate.out.weight))
    out_bias = torch.tensor(np.asarray(aggregate.out.bias))
    compare(aggregate, lambda x: network(x[None])[0][0] @ out + out_bias)


def test_transformers_rwkv():
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    configuration = pytest.importorskip("transformers.models.rwkv.configuration_rwkv")
    aggregate = made("rwkv4")
    attention = modeling.RwkvSelfAttention(configuration.RwkvConfig(hidden_size=D, num_hidden_layers=2), 0)
    load(attention.time_decay, aggregate.log_rate)
    load(attention.time_first, aggregate.bonus)
    for ours, parameter in zip(
        aggregate.shares,
        (attention.time_mix_receptance, attention.time_mix_key, attention.time_mix_value),
        strict=True,
    ):
        load(parameter, ours)
    for ours, module in (
        (aggregate.receptance, attention.receptance),
        (aggregate.key, attention.key),
        (aggregate.value, attention.value),
        (aggregate.out, attention.output),
    ):
        load(module.weight, ours.weight.T)

    def theirs(x):
        r, k, v, _ = attention.extract_key_value(x[None])
        wkv, _ = modeling.rwkv_linear_attention_cpu(attention.time_decay, attention.time_first, k, v)
        return attention.output(r * wkv)[0]

    compare(aggregate, theirs)
