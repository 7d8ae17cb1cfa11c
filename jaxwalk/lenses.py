"""Lenses: what each station of a walk would predict; and the metric that laws induce on the space of stations.

A lens reads a station as if it were the last one, through an affine map of its own: the identity (the logit lens,
nostalgebraist 2020), the mean derivative of the last station (a Jacobian lens), the least-squares map (Din et al.,
arXiv 2303.09435), or the map whose law is nearest to the final one (the tuned lens, Belrose et al., arXiv 2303.08112).
After the map come the model's own final norm and output map, and the last station has no map: there every lens is
the model exactly. Units: nats, and sqrt(nats) for lengths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.filters import Key, wide
from jaxwalk.transformer import Transformer, plain


class Lens(NamedTuple):
    """Maps from each station s but the last to the last one, x -> weight[s] x + bias[s]; None is the identity.

    weight: [S-1, D, D]. bias: [S-1, D].
    """

    weight: Float[Array, "S-1 D D"] | None = None
    bias: Float[Array, "S-1 D"] | None = None


class Reading(NamedTuple):
    """What a lens reads at stations [S, N]: entropies, KL(final || lens), ranks in it of the final law's top token."""

    entropy: Float[Array, "S N"]
    kl: Float[Array, "S N"]
    rank: Int[Array, "S N"]


LOGIT_LENS = Lens()


def lens_log_probs(model: Transformer, lens: Lens, stations: Float[Array, "S N D"]) -> Float[Array, "S N V"]:
    """log p(v) at each of N places by each station's law. For large V, `read` keeps less."""
    return jnp.stack([_law(model, x) for x in _mapped(lens, stations)])


def read(model: Transformer, lens: Lens, stations: Float[Array, "S N D"]) -> Reading:
    """What `lens` reads at N places, one station at a time, as laws are large. At the last station the KL is 0."""
    final = _law(model, stations[-1])
    top = final.argmax(-1, keepdims=True)

    def of(log_p: Float[Array, "N V"]) -> Reading:
        entropy = -_expectation(log_p, log_p)
        return Reading(entropy, _expectation(final, final - log_p), _rank(log_p, top))

    before = lax.map(lambda args: of(_law(model, _translated(*args))), (stations[:-1], lens))
    return Reading(*(jnp.concatenate([b, last[None]]) for b, last in zip(before, of(final), strict=True)))


def read_steps(
    model: Transformer, stations: Float[Array, "S N D"]
) -> tuple[Reading, Float[Array, "S-1 N"], Float[Array, "S-1 N"]]:
    """What the logit lens reads at N places, and `fisher_lengths` and `step_divergences` there, with a law made once.

    For large V the laws are nearly all the work: three separate passes make every station's five times.
    """
    final = _law(model, stations[-1])
    top = final.argmax(-1, keepdims=True)

    def of(log_p: Float[Array, "N V"]) -> tuple[Array, Array, Array]:
        return -_expectation(log_p, log_p), _expectation(final, final - log_p), _rank(log_p, top)

    def back(after: Array, pair: tuple[Array, Array]) -> tuple[Array, tuple[Array, ...]]:
        station, step = pair
        log_p, change = jax.jvp(lambda x: _law(model, x), (station,), (step,))
        return log_p, (*of(log_p), _deviation(log_p, change), _expectation(log_p, log_p - after))

    _, (*before, fisher, divergence) = lax.scan(back, final, (stations[:-1], jnp.diff(stations, axis=0)), reverse=True)
    reading = (jnp.concatenate([b, last[None]]) for b, last in zip(before, of(final), strict=True))
    return Reading(*reading), fisher, divergence


def jacobian_lens(
    model: Transformer, paths: Int[Array, "n T"] | Int[np.ndarray, "n T"], at: Int[Array, " n"] | Int[np.ndarray, " n"]
) -> Lens:
    """The first-order lens: the derivative of the last station with respect to each, of one position of each path.

    The derivative is that of the same position's last station, averaged over the paths; the bias makes it exact at
    the mean of the stations. `at`: the position of each path. D backward passes a path, all stations in each.
    """
    model = plain(model)
    D, S = model.width, 2 * model.depth + 1

    def one(total: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        path, t = item

        def last(nudge: Array) -> tuple[Array, Array]:
            everywhere = jnp.zeros((S, len(path), D), nudge.dtype).at[:, t].set(nudge)
            stations = model.walk(path, nudge=everywhere).stations[:, t]
            return stations[-1], stations

        _, pull, stations = jax.vjp(last, jnp.zeros((S, D), model.embed.table.dtype), has_aux=True)
        rows = lax.map(lambda e: pull(e)[0][:-1], jnp.eye(D, dtype=stations.dtype), batch_size=min(D, 16))
        return jax.tree.map(jnp.add, total, (rows.swapaxes(0, 1), stations)), None

    dtype = model.embed.table.dtype
    start = jnp.zeros((S - 1, D, D), dtype), jnp.zeros((S, D), dtype)
    (weight, mean), _ = lax.scan(one, start, (jnp.asarray(paths), jnp.asarray(at)))
    weight, mean = weight / len(paths), mean / len(paths)
    return Lens(weight, mean[-1] - jnp.einsum("sij,sj->si", weight, mean[:-1]))


def least_squares_lens(stations: Float[Array, "S N D"], ridge: float = 1e-4) -> Lens:
    """The affine maps that predict the last station with the least squared error at N places, by ridge regression.

    ridge: in units of the mean variance of a station's coordinates.
    """

    def fit(x: Float[Array, "N D"]) -> tuple[Array, Array]:
        y = stations[-1]
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        gram = x.T @ x
        gram = gram + ridge * jnp.trace(gram) / len(gram) * jnp.eye(len(gram), dtype=x.dtype)
        weight = jnp.linalg.solve(gram, x.T @ y).T
        return weight, mean_y - weight @ mean_x

    return Lens(*lax.map(fit, stations[:-1]))


def tuned_lens(
    model: Transformer,
    stations: Float[Array, "S N D"],
    *,
    key: Key,
    steps: int = 400,
    batch: int = 256,
    learning_rate: float = 3e-3,
) -> Lens:
    """The maps whose laws are nearest to the final law at N places: least mean KL(final || lens), by Adam.

    They start as the identity, and so as the logit lens. steps, batch: of places drawn at random; learning_rate: at
    the start of a cosine decay to 0.
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    D, N = stations.shape[-1], stations.shape[1]

    def fit(args: tuple[Array, Array]) -> Lens:
        x, key = args

        def loss(lens: Lens, chosen: Array) -> Array:
            final = _law(model, stations[-1, chosen])
            return _expectation(final, final - _law(model, _translated(x[chosen], lens))).mean()

        def step(carry: tuple[Lens, optax.OptState], key: Array) -> tuple[tuple[Lens, optax.OptState], None]:
            lens, state = carry
            gradient = jax.grad(loss)(lens, jax.random.randint(key, (min(batch, N),), 0, N))
            updates, state = optimiser.update(gradient, state, lens)
            return (optax.apply_updates(lens, updates), state), None  # type: ignore[arg-type]

        identity = Lens(jnp.eye(D, dtype=x.dtype), jnp.zeros(D, x.dtype))
        return lax.scan(step, (identity, optimiser.init(identity)), jax.random.split(key, steps))[0][0]  # type: ignore[arg-type]

    return lax.map(fit, (stations[:-1], jax.random.split(key, len(stations) - 1)))


def fisher_lengths(model: Transformer, stations: Float[Array, "S D"]) -> Float[Array, " S-1"]:
    """The length of each step of a walk in the metric of the laws that its stations would give, in sqrt(nats).

    sqrt(delta' G delta) with G = J' (diag p - p p') J and J the derivative of the logits at the station that the step
    leaves: the standard deviation, under its law, of how fast the logits change. Half its square is KL(law of the
    station || law of the next) to second order in the step; see `step_divergences`.
    """

    def one(pair: tuple[Array, Array]) -> Array:
        station, step = pair
        return _deviation(*jax.jvp(lambda x: _law(model, x), (station,), (step,)))

    return lax.map(one, (stations[:-1], jnp.diff(stations, axis=0)))


def step_divergences(model: Transformer, stations: Float[Array, "S D"]) -> Float[Array, " S-1"]:
    """KL(law of a station || law of the next) for each step of a walk, both read by the logit lens, in nats."""

    def one(pair: Float[Array, "2 D"]) -> Array:
        before, after = _law(model, pair)
        return _expectation(before, before - after)

    return lax.map(one, jnp.stack([stations[:-1], stations[1:]], axis=1))


def _law(model: Transformer, stations: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    read = lambda x: jax.nn.log_softmax(model.logits(model.context(x)))
    for _ in range(stations.ndim - 1):
        read = jax.vmap(read)
    return read(stations)


def _mapped(lens: Lens, stations: Float[Array, "S N D"]) -> Float[Array, "S N D"]:
    return jnp.concatenate([jax.vmap(_translated)(stations[:-1], lens), stations[-1:]])


def _translated(x: Float[Array, "N D"], lens: Lens) -> Float[Array, "N D"]:
    """By the map of one station."""
    x = x if lens.weight is None else x @ lens.weight.T
    return x if lens.bias is None else x + lens.bias


def _expectation(log_p: Float[Array, "*n V"], values: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """E_p values, where p = 0 contributes nothing."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * values, 0), axis=-1)


def _deviation(log_p: Float[Array, "*n V"], change: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """The standard deviation of `change` under the law p; what is common to all tokens does not count."""
    p = jnp.exp(log_p.astype(wide(log_p.dtype)))
    return jnp.sqrt(jnp.sum(p * (change - jnp.sum(p * change, axis=-1, keepdims=True)) ** 2, axis=-1))


def _rank(log_p: Float[Array, "N V"], token: Int[Array, "N 1"]) -> Int[Array, " N"]:
    return (log_p > jnp.take_along_axis(log_p, token, axis=-1)).sum(-1)
