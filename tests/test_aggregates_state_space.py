"""State space models and short convolutions against their papers, position by position, and through whole models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwalk as jw
from jaxwalk.aggregates import _diagonal
from jaxwalk.config import ConfigError
from tests.conftest import float64, model_of, normal, perturbed, quick, to64

pytestmark = pytest.mark.usefixtures("strict_numerics")

D, T = 16, 12
X = normal(0, T, D)
CHOICES = {
    "causal_conv": {},
    "mamba": {"state": 5, "dt_rank": 2},
    "mamba2": {"state": 5, "groups": 2, "chunk": 5},
    "s4d": {"state": 6},
    "lru": {"state": 5},
    "s5": {"state": 6},
    "delta_net": {"conv": 4, "bias": True, "chunk": 5},
    "gated_delta_net": {"conv": 3, "heads": 2, "key_width": 3, "value_width": 5, "chunk": 5},
}
each = pytest.mark.parametrize("name", CHOICES)


def made(name, **choices):
    config = jw.aggregates.config(name, **{**CHOICES[name], **choices})
    init = functools.partial(config.init, width=D, max_length=T, layer=0, depth=2)
    return perturbed(jax.eval_shape(lambda: init(key=jax.random.key(0))), 0.3)


def linear(module, x):
    return x @ module.weight + (0 if module.bias is None else module.bias)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def silu(a):
    return a * sigmoid(a)


def softplus(a):
    return np.log1p(np.exp(a))


def gelu(a):
    return np.array(jax.nn.gelu(jnp.asarray(a), approximate=False))


def convolved(conv, x):
    """By its taps, at each position."""
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for n in range(min(len(conv.weight), t + 1)):
            y[t] += conv.weight[n] * x[t - n]
    return y if conv.bias is None else y + conv.bias


def mamba(a, x):
    u, z = silu(convolved(a.conv, linear(a.value, x))), linear(a.gate, x)
    (R, E), N = a.dt.weight.shape, len(a.A_log)
    y = np.zeros((len(x), E))
    for e in range(E):
        h = np.zeros(N)
        for t in range(len(x)):
            low, B, C = np.split(linear(a.select, u[t]), [R, R + N])
            dt = softplus(linear(a.dt, low))[e]
            h = np.exp(-np.exp(a.A_log[:, e]) * dt) * h + dt * B * u[t, e]
            y[t, e] = C @ h + a.skip[e] * u[t, e]
    return linear(a.out, y * silu(z))


def mamba2(a, x):
    E, H, G = len(a.scale), len(a.A_log), a.groups
    u, B, C = np.split(silu(convolved(a.conv, linear(a.mixed, x))), [E, (E + a.mixed.weight.shape[1]) // 2], axis=1)
    u, B, C = u.reshape(len(x), H, -1), B.reshape(len(x), G, -1), C.reshape(len(x), G, -1)
    dt, y = softplus(linear(a.dt, x) + np.asarray(a.dt_bias)), np.zeros(u.shape)
    for h in range(H):
        S, g = np.zeros((B.shape[-1], E // H)), h // (H // G)
        for t in range(len(x)):
            S = np.exp(-np.exp(a.A_log[h]) * dt[t, h]) * S + dt[t, h] * np.outer(B[t, g], u[t, h])
            y[t, h] = C[t, g] @ S + a.skip[h] * u[t, h]
    y = (y.reshape(len(x), -1) * silu(linear(a.gate, x))).reshape(len(x), G, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    return linear(a.out, y.reshape(len(x), -1) * a.scale)


def diagonal(decay, B, C, x):
    """2 Re(C h), over all conjugate pairs written out: half of them are the conjugates of what is kept. x: [T, D]."""
    decay, B, C = (np.concatenate([p, p.conj()], axis) for p, axis in ((decay, 0), (B, 1), (C, 0)))
    h, y = np.zeros(len(decay), complex), []
    for u in x:
        h = decay * h + u @ B
        y.append(h @ C)
    assert np.abs(np.imag(y)).max() < 1e-12
    return np.real(y)


def held_steps(a):
    """The discrete decays and the factors on what enters, of a zero-order hold."""
    poles = -np.exp(a.log_neg_re) + 1j * a.im
    decay = np.exp(poles * np.exp(a.log_dt))
    return decay, (decay - 1) / poles


def s4d(a, x):
    decay, factor = held_steps(a)
    C = a.C_re + 1j * a.C_im
    y = [diagonal(decay[:, d], factor[None, :, d], C[:, d, None], x[:, d, None])[:, 0] for d in range(x.shape[1])]
    g = gelu(np.stack(y, 1) + a.skip * x)
    return linear(a.output.value, g) * sigmoid(linear(a.output.gate, g))


def s5(a, x):
    decay, factor = held_steps(a)
    g = gelu(diagonal(decay, (a.B_re + 1j * a.B_im) * factor, a.C_re + 1j * a.C_im, x) + a.skip * x)
    return g * sigmoid(linear(a.output.gate, g))


def lru(a, x):
    decay = np.exp(-np.exp(a.nu_log) + 1j * np.exp(a.theta_log))
    B, C = (a.B_re + 1j * a.B_im) * np.exp(a.gamma_log), a.C_re + 1j * a.C_im
    g = gelu(diagonal(decay, B, C / 2, x) + a.skip * x)
    return linear(a.output.value, g) * sigmoid(linear(a.output.gate, g))


def causal_conv(a, x):
    return linear(a.out, convolved(a.conv, linear(a.value, x)))


def delta_net(a, x):
    H, decay = a.heads, np.ones((len(x), a.heads))
    E = a.out.weight.shape[0]
    qkv = silu(convolved(a.conv, linear(a.qkv, x)))
    q, k, v = (m.reshape(len(x), H, -1) for m in np.split(qkv, [(qkv.shape[1] - E) // 2, qkv.shape[1] - E], axis=1))
    q, k = (m / np.sqrt((m**2).sum(-1, keepdims=True) + 1e-6) for m in (q, k))
    beta, y = sigmoid(linear(a.beta, x)), np.zeros(v.shape)
    if hasattr(a, "decay"):
        decay = np.exp(-np.exp(a.log_rate) * softplus(linear(a.decay, x)))
    for h in range(H):
        S = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(x)):
            S = decay[t, h] * (S - beta[t, h] * np.outer(k[t, h], k[t, h] @ S)) + beta[t, h] * np.outer(
                k[t, h], v[t, h]
            )
            y[t, h] = q[t, h] @ S
    y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)).reshape(len(x), -1)
    return linear(a.out, y * (silu(linear(a.gate, x)) if hasattr(a, "gate") else 1))


gated_delta_net = delta_net


@each
def test_against_the_paper_position_by_position(name, x64):
    aggregate = to64(made(name))
    expected = globals()[name](jax.tree.map(np.array, aggregate), np.array(X, float))
    np.testing.assert_allclose(jax.jit(lambda a, x: a(x))(aggregate, to64(X)), expected, atol=1e-11, rtol=1e-11)


TOKENS, SEGMENTS = np.array([1, 4, 0, 2, 2, 3, 1]), np.array([1, 1, 1, 2, 2, 2, 2])


@pytest.mark.parametrize("name", quick({"mamba"}, CHOICES))
def test_decompositions_of_whole_models(name):
    model = model_of(aggregate=(jw.aggregates.config(name, **CHOICES[name]), "attention"), scale=0.3)
    walk = jax.jit(jw.encoding_walk)
    for segments in (None, SEGMENTS):
        whole = walk(model, TOKENS, segments=segments).context[-1]
        parts = jw.decompose(model, TOKENS, segments=segments)  # which raises where its error is beyond 1e-5
        np.testing.assert_allclose(parts.whole, whole, atol=1e-5, rtol=1e-5)
        assert (np.abs(parts.by_token).max(1) > 0).tolist() == (
            [True] * 7 if segments is None else [False] * 3 + [True] * 4
        )
        heads = jw.decompose_heads(model, TOKENS, 0, segments=segments)
        assert heads.error < 1e-5
    with float64():
        assert jw.decompose(to64(model), TOKENS).error < 1e-12
        assert jw.decompose_heads(to64(model), TOKENS, 0).error < 1e-12


@pytest.mark.parametrize("name", quick({"mamba", "s5"}, CHOICES))
def test_it_starts_as_the_paper_says(name):
    aggregate = jw.aggregates.config(name).init(width=64, max_length=8, layer=0, depth=2, key=jax.random.key(0))
    if name == "mamba":
        np.testing.assert_allclose(aggregate._rates()[:, 5], -np.arange(1, 17), rtol=1e-6)
        assert aggregate.dt.weight.shape == (4, 128)
    if name == "mamba2":
        assert 1 <= np.exp(aggregate.A_log).min() <= np.exp(aggregate.A_log).max() <= 16
    if name in ("mamba", "mamba2"):
        steps = softplus(np.array(aggregate.dt.bias if name == "mamba" else aggregate.dt_bias))
        assert 0.00099 < steps.min() < steps.max() < 0.1001
        assert (aggregate.skip == 1).all()
    if name == "s4d":
        poles = -np.exp(aggregate.log_neg_re) + 1j * np.array(aggregate.im)
        np.testing.assert_allclose(poles[:, 3], -0.5 + 1j * np.pi * np.arange(32), rtol=1e-6)
    if name == "lru":
        decays = np.exp(np.array(aggregate.discrete()[0]))
        np.testing.assert_allclose(np.exp(aggregate.gamma_log), np.sqrt(1 - np.abs(decays) ** 2), atol=1e-4)
        ring = jw.aggregates.config("lru", r_min=0.9, r_max=0.99, max_phase=0.3)
        decays = ring.init(width=64, max_length=8, layer=0, depth=2, key=jax.random.key(1)).discrete()[0]
        assert 0.9 <= np.exp(decays.real).min() < np.exp(decays.real).max() <= 0.99
        assert 0 < decays.imag.min() < decays.imag.max() < 0.3
    y = aggregate(normal(1, 8, 64))
    assert np.isfinite(y).all()
    assert float(np.std(y)) < 5


def test_s5_starts_from_the_hippo_matrix(x64):
    """Its normal part is V diag(poles) V*, and real: with all pairs, B and C are those of the undiagonalised model."""
    P = 8
    poles, V = jw.aggregates.s5.hippo(P)
    n = np.arange(P)
    legs = -np.where(n[:, None] > n, np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), np.diag(n + 1.0))
    low_rank = np.sqrt(n + 0.5)
    normal_part = legs + np.outer(low_rank, low_rank)
    np.testing.assert_allclose(2 * (V @ np.diag(poles) @ V.conj().T).real, normal_part, atol=1e-12)
    config = jw.aggregates.config("s5", state=P)
    a = jax.tree.map(np.array, config.init(width=D, max_length=T, layer=0, depth=2, key=jax.random.key(0)))
    # B V* V = B: what the state is, turned back, is real.
    back = (a.B_re + 1j * a.B_im) @ V.T
    assert np.abs(2 * back.real).std() < 2 / np.sqrt(D)
    np.testing.assert_allclose(2 * ((a.B_re + 1j * a.B_im) @ V.T).real @ V.conj(), a.B_re + 1j * a.B_im, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_what_accelerators_run_is_what_cpus_run(dtype, monkeypatch):
    """The associative forms, which no CPU takes of its own."""
    decay, entering, reads = (normal(i, 9, 3, 4).astype(dtype) / 2 for i in range(3))
    start = normal(3, 3, 4).astype(dtype)

    def forms():
        h = _diagonal.recur(decay, entering, start)
        y, last = _diagonal.recur_and_read(lambda at: at, (decay, entering, reads), start)
        return h, y, last

    cpu = forms()
    np.testing.assert_allclose(jnp.sum(reads * cpu[0], axis=1), cpu[1], atol=1e-6)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, cpu, default: default(*given))
    for a, b in zip(forms(), cpu, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_are_those_of_the_recurrence():
    decay, writes, reads = (normal(i, 9, 3, 4) / 2 for i in range(3))
    rows = jnp.array([7, 0, 3])
    A = _diagonal.summed_recurrence_rows(rows, lambda at: at, (decay, writes), reads[rows])
    entering = normal(5, 9, 4)
    h = _diagonal.recur(decay, writes * entering[:, None], jnp.zeros((3, 4)))
    np.testing.assert_allclose(jnp.sum(A * entering[:, None], axis=0), jnp.sum(reads * h, axis=1)[rows], atol=1e-6)


def test_impossible_choices_say_so():
    for name, choices, message in (
        ("causal_conv", {"taps": 0}, "taps: expected at least 1, got 0"),
        ("mamba", {"state": 0}, "state: expected at least 1, got 0"),
        ("mamba", {"dt_rank": 0}, "dt_rank: expected at least 1, got 0"),
        ("mamba2", {"heads": 0}, "heads: expected at least 1, got 0"),
        ("mamba2", {"norm_eps": 0.0}, "norm_eps: expected more than 0, got 0"),
        ("mamba2", {"groups": 3}, "groups: expected a divisor of heads = 4, got 3"),
        ("s4d", {"state": 5}, "state: expected an even number of at least 2, got 5"),
        ("s4d", {"dt_min": 0.2}, "dt_max: expected 0 < dt_min <= dt_max, got dt_min = 0.2, dt_max = 0.1"),
        ("s5", {"state": 0}, "state: expected an even number of at least 2, got 0"),
        ("lru", {"state": 0}, "state: expected at least 1, got 0"),
        ("lru", {"r_min": 1.0}, "r_max: expected 0 <= r_min < r_max <= 1, got r_min = 1.0, r_max = 1.0"),
        ("delta_net", {"conv": 0}, "conv: expected at least 1, got 0"),
        ("lru", {"max_phase": 0.0}, "max_phase: expected more than 0, got 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            jw.aggregates.config(name, **choices)
    with pytest.raises(ConfigError, match=r"heads: expected a divisor of expand \* width = 32, got 3"):
        jw.aggregates.config("mamba2", heads=3).init(width=16, max_length=4, layer=0, depth=1, key=jax.random.key(0))
