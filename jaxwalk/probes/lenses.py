"""Lenses: what each station of a walk would predict; and the metric that laws induce on the space of stations.

A lens reads a station as if it were the last one, through an affine map for each station: the identity (the logit lens,
nostalgebraist 2020), the mean derivative of the last station (a Jacobian lens), the least-squares map (Din et al.,
arXiv 2303.09435), or the map whose law is nearest to the final one (the tuned lens, Belrose et al., arXiv 2303.08112).
The model's own final norm and output map follow. The last station has no map: there every lens is the model itself.
Units: nats, and sqrt(nats) for lengths.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk._loops import map_in_batches
from jaxwalk.aggregates._contract import documents_of
from jaxwalk.filters import Key, indices, wide
from jaxwalk.model.build import plain
from jaxwalk.model.inputs import check_shape, is_traced
from jaxwalk.model.layer import Interventions
from jaxwalk.model.mixing import Mixer
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import entropy, expectation


class Lens(NamedTuple):
    """Maps from each station s but the last to the last one, x -> weight[s] x + bias[s]; None is the identity.

    weight: [S-1, D, D]. bias: [S-1, D].
    """

    weight: Float[Array, "S-1 D D"] | None = None
    bias: Float[Array, "S-1 D"] | None = None


class Reading(NamedTuple):
    """What a lens reads at stations [S, N]: the entropy of its law, KL(final || lens) in nats, and the rank in it of
    the final law's most probable token."""

    entropy: Float[Array, "S N"]
    kl: Float[Array, "S N"]
    rank: Int[Array, "S N"]


LOGIT_LENS = Lens()


def lens_log_probs(model: Transformer, lens: Lens, stations: Float[Array, "S N D"]) -> Float[Array, "S N V"]:
    """log p(v) at each of N places by the law of each station, in nats. For large V, `read` keeps less.

    Args:
        model: the model.
        lens: of this model.
        stations: [S, N, D].
    """
    _check_stations(model, stations)
    return _lens_log_probs(model, lens, stations)


@jax.jit
def _lens_log_probs(model: Transformer, lens: Lens, stations: Array) -> Array:
    mapped = jnp.concatenate([jax.vmap(_translated)(stations[:-1], lens), stations[-1:]])
    return jax.lax.map(lambda x: _law(model, x), mapped)


@jax.jit
def read(model: Transformer, lens: Lens, stations: Float[Array, "S N D"]) -> Reading:
    """What `lens` reads at N places, one station at a time, as laws are large. At the last station the KL is 0."""
    final = _law(model, stations[-1])
    top = final.argmax(-1, keepdims=True)

    def of(log_p: Float[Array, "N V"]) -> Reading:
        return Reading(entropy(log_p), expectation(final, final - log_p), _rank(log_p, top))

    before = lax.map(lambda args: of(_law(model, _translated(*args))), (stations[:-1], lens))
    return Reading(*(jnp.concatenate([b, last[None]]) for b, last in zip(before, of(final), strict=True)))


@jax.jit
def read_steps(
    model: Transformer, stations: Float[Array, "S N D"]
) -> tuple[Reading, Float[Array, "S-1 N"], Float[Array, "S-1 N"]]:
    """What the logit lens reads at N places, and `fisher_lengths` and `step_divergences` there, computing each law
    once.

    For large V the laws are nearly all the work: three separate passes would compute those of each station five times.
    """
    final = _law(model, stations[-1])
    top = final.argmax(-1, keepdims=True)

    def of(log_p: Float[Array, "N V"]) -> tuple[Array, Array, Array]:
        return entropy(log_p), expectation(final, final - log_p), _rank(log_p, top)

    def back(after: Array, pair: tuple[Array, Array]) -> tuple[Array, tuple[Array, ...]]:
        station, step = pair
        log_p, change = jax.jvp(lambda x: _law(model, x), (station,), (step,))
        return log_p, (*of(log_p), _deviation(log_p, change), expectation(log_p, log_p - after))

    _, (*before, fisher, divergence) = lax.scan(back, final, (stations[:-1], jnp.diff(stations, axis=0)), reverse=True)
    reading = (jnp.concatenate([b, last[None]]) for b, last in zip(before, of(final), strict=True))
    return Reading(*reading), fisher, divergence


def jacobian_lens(
    model: Transformer, paths: Int[Array, "n T"] | Int[np.ndarray, "n T"], at: Int[Array, " n"] | Int[np.ndarray, " n"]
) -> Lens:
    """The first-order lens: the mean derivative of the last station with respect to each station of the same position.

    The bias makes it exact at the mean of the stations. It takes D backward passes a path, all stations in each.

    Args:
        model: the model.
        paths: [n, T], none longer than max_length.
        at: [n], the position of each path.

    Raises:
        ValueError: for ids or positions out of range, and shapes that do not match.
    """
    paths, at = (a if is_traced(a) else np.asarray(a) for a in (paths, at))
    if paths.ndim != 2 or at.shape != paths.shape[:1] or not 0 < paths.shape[1] <= model.max_length or not len(paths):
        raise ValueError(
            f"paths, at: expected [n, T] with T up to {model.max_length} and [n], at least one path, got "
            f"{paths.shape} and {at.shape}."
        )
    for what, values, size in (("paths", paths, model.vocab_size), ("at", at, paths.shape[1])):
        if not is_traced(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise ValueError(f"{what}: expected from 0 to {size - 1}, got {values.min()} to {values.max()}.")
    return _jacobian_lens(model, paths, at)


@jax.jit
def _jacobian_lens(model: Transformer, paths: Array, at: Array) -> Lens:
    model = plain(model)
    D, S, dtype = model.width, model.stations, model.embed.table.dtype
    documents = documents_of(None, paths.shape[1])

    def one(total: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        path, t = item
        here = jnp.broadcast_to((indices(len(path)) == t)[None], (S, len(path)))

        def last(nudge: Array) -> tuple[Array, Array]:
            edits = Interventions(nudge=nudge[:, None], nudge_where=here)
            x = edits.apply(model.embedded(path, documents), 0)
            by_layer = jax.tree.map(lambda a: a[1:].reshape(model.depth, 2, *a.shape[1:]), edits)
            passed = model.passed(x, Mixer(model.layers, documents), by_layer, keep=lambda pair: pair[:, t])
            later = jnp.zeros((0, D), dtype) if passed.kept is None else passed.kept[0].reshape(-1, D)
            stations = jnp.concatenate([x[t][None], later])
            return stations[-1], stations

        _, pull, stations = jax.vjp(last, jnp.zeros((S, D), dtype), has_aux=True)
        rows = map_in_batches(lambda e: pull(e)[0][:-1], jnp.eye(D, dtype=dtype), 16)
        add = lambda a, b: a + b.astype(a.dtype)
        return jax.tree.map(add, total, (rows.swapaxes(0, 1), stations)), None

    start = jnp.zeros((S - 1, D, D), wide(dtype)), jnp.zeros((S, D), wide(dtype))
    (weight, mean), _ = lax.scan(one, start, (paths, at))
    weight, mean = weight / len(paths), mean / len(paths)
    return Lens(weight, mean[-1] - jnp.einsum("sij,sj->si", weight, mean[:-1]))


@jax.jit
def least_squares_lens(stations: Float[Array, "S N D"], ridge: float | Array = 1e-4) -> Lens:
    """The affine maps that predict the last station with the least squared error at N places, by ridge regression.

    Args:
        stations: [S, N, D].
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

    stations = stations.astype(wide(stations.dtype))
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

    Args:
        model: the model.
        stations: [S, N, D].
        key: a `jax.random` key.
        steps, batch: of places drawn at random. The maps start as the identity, which is the logit lens.
        learning_rate: at the start of a cosine decay to 0.
    """
    _check_stations(model, stations)
    return _tuned_lens(model, stations, key, learning_rate, steps=steps, batch=batch)


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def _tuned_lens(
    model: Transformer, stations: Array, key: Key, learning_rate: float | Array, *, steps: int, batch: int
) -> Lens:
    optimiser = optax.scale_by_adam()
    decay = optax.cosine_decay_schedule(1.0, steps)
    D, N = stations.shape[-1], stations.shape[1]

    def fit(args: tuple[Array, Array]) -> Lens:
        x, key = args

        def loss(lens: Lens, chosen: Array) -> Array:
            final = _law(model, stations[-1, chosen])
            return expectation(final, final - _law(model, _translated(x[chosen], lens))).mean()

        def step(
            carry: tuple[Lens, optax.OptState], args: tuple[Array, Array]
        ) -> tuple[tuple[Lens, optax.OptState], None]:
            (lens, state), (number, key) = carry, args
            gradient = jax.grad(loss)(lens, jax.random.randint(key, (min(batch, N),), 0, N))
            updates, state = optimiser.update(gradient, state, lens)
            rate = learning_rate * decay(number)
            return (jax.tree.map(lambda a, u: a - (rate * u).astype(a.dtype), lens, updates), state), None

        identity = Lens(jnp.eye(D, dtype=x.dtype), jnp.zeros(D, x.dtype))
        numbered = indices(steps), jax.random.split(key, steps)
        return lax.scan(step, (identity, optimiser.init(identity)), numbered)[0][0]  # type: ignore[arg-type]

    return lax.map(fit, (stations[:-1], jax.random.split(key, len(stations) - 1)))


@jax.jit
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


@jax.jit
def step_divergences(model: Transformer, stations: Float[Array, "S D"]) -> Float[Array, " S-1"]:
    """KL(law of a station || law of the next) for each step of a walk, both read by the logit lens, in nats."""
    log_p = _law(model, stations)
    return expectation(log_p[:-1], log_p[:-1] - log_p[1:])


def _check_stations(model: Transformer, stations: Array) -> None:
    check_shape("stations", stations, (None, None, model.width))


def _law(model: Transformer, stations: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    read = lambda x: jax.nn.log_softmax(model.logits(model.context(x)))
    for _ in range(stations.ndim - 1):
        read = jax.vmap(read)
    return read(stations)


def _translated(x: Float[Array, "N D"], lens: Lens) -> Float[Array, "N D"]:
    """Stations through the map of one station."""
    y = x if lens.weight is None else x @ lens.weight.astype(x.dtype).T
    return y if lens.bias is None else y + lens.bias.astype(x.dtype)


def _deviation(log_p: Float[Array, "*n V"], change: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """The standard deviation of `change` under the law p; what all tokens have in common does not count."""
    p = jnp.exp(log_p.astype(wide(log_p.dtype)))
    return jnp.sqrt(jnp.sum(p * (change - jnp.sum(p * change, axis=-1, keepdims=True)) ** 2, axis=-1))


def _rank(log_p: Float[Array, "N V"], token: Int[Array, "N 1"]) -> Int[Array, " N"]:
    return (log_p > jnp.take_along_axis(log_p, token, axis=-1)).sum(-1)
