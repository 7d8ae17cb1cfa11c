"""Mamba and Mamba-2 against the slow paths of `transformers`, on weights that are all random. Skipped without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.aggregates._convolution import ShortConvolution
from jaxwalk.filters import Linear

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

B, T, D = 3, 37, 16


def randomised(mixer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer.eval()


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def linear(module):
    return Linear(array(module.weight).T, None if module.bias is None else array(module.bias))


def split(module, *at):
    """The parts of a Linear by its outputs."""
    whole = linear(module)
    biases = [None] * (len(at) + 1) if whole.bias is None else jnp.split(whole.bias, at)
    return [Linear(w, b) for w, b in zip(jnp.split(whole.weight, at, axis=1), biases, strict=True)]


def short(module):
    return ShortConvolution(array(module.weight)[:, 0, ::-1].T, None if module.bias is None else array(module.bias))


def same(aggregate, mixer):
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    with torch.no_grad():
        expected = mixer(torch.from_numpy(x))
    for form in (lambda x: aggregate(x), lambda x: aggregate.apply_mixing(x, aggregate.mixing(x))):
        y = jax.jit(jax.vmap(form))(x)
        assert float(np.abs(y - expected.numpy()).max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize(("bias", "conv_bias"), [(True, True), (False, False)])
def test_mamba(bias, conv_bias):
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    config = MambaConfig(
        hidden_size=D, state_size=5, expand=2, conv_kernel=3, time_step_rank=2, use_bias=bias, use_conv_bias=conv_bias
    )
    mixer = randomised(MambaMixer(config, 0))
    value, gate = split(mixer.in_proj, 2 * D)
    aggregate = jw.aggregates.mamba.Mamba(
        value=value,
        gate=gate,
        conv=short(mixer.conv1d),
        select=linear(mixer.x_proj),
        dt=linear(mixer.dt_proj),
        A_log=array(mixer.A_log).T,
        skip=array(mixer.D),
        out=linear(mixer.out_proj),
    )
    same(aggregate, mixer)


@pytest.mark.parametrize(("groups", "bias", "conv_bias"), [(1, True, True), (2, False, False), (2, True, True)])
def test_mamba2(groups, bias, conv_bias):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=D,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=groups,
        layer_norm_epsilon=1e-3,
        conv_kernel=4,
        chunk_size=16,
        use_bias=bias,
        use_conv_bias=conv_bias,
    )
    mixer = randomised(Mamba2Mixer(config, 0))
    gate, mixed, dt = split(mixer.in_proj, 2 * D, 2 * D + mixer.conv_dim)
    aggregate = jw.aggregates.mamba2.Mamba2(
        mixed=mixed,
        gate=gate,
        dt=dt,
        dt_bias=array(mixer.dt_bias),
        conv=short(mixer.conv1d),
        A_log=array(mixer.A_log),
        skip=array(mixer.D),
        scale=array(mixer.norm.weight),
        out=linear(mixer.out_proj),
        groups=groups,
        norm_eps=1e-3,
        chunk=8,
    )
    same(aggregate, mixer)
