"""Lenses: what each station of a walk would predict; and the metric that next-token laws induce on stations.

A lens reads a station as if it were the last one, after an affine map for each station: the identity (the logit lens,
nostalgebraist 2020), the mean derivative of the last station (a Jacobian lens), the least-squares map (Din et al.,
arXiv 2303.09435), or the map whose law is closest to the final one (the tuned lens, Belrose et al., arXiv 2303.08112).
The model's own final norm and output map follow. The last station has no map: every lens reads it as the model does.
Units are nats, and sqrt(nats) for lengths.
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
    """An affine map x -> weight[s] x + bias[s] from each station s but the last to the last station.

    Attributes:
        weight: [S-1, D, D]; None is the identity.
        bias: [S-1, D]; None is zero.
    """

    weight: Float[Array, "S-1 D D"] | None = None
    bias: Float[Array, "S-1 D"] | None = None


class Reading(NamedTuple):
    """What a lens reads at N places of each station.

    Attributes:
        entropy: [S, N], the entropy of the lens's law, in nats.
        kl: [S, N], KL(final law || lens's law), in nats.
        rank: [S, N], the rank in the lens's law of the final law's most probable token; 0 is the top.
    """

    entropy: Float[Array, "S N"]
    kl: Float[Array, "S N"]
    rank: Int[Array, "S N"]


LOGIT_LENS = Lens()
"""The identity at every station."""


def lens_log_probs(model: Transformer, lens: Lens, stations: Float[Array, "S N D"]) -> Float[Array, "S N V"]:
    """Log-probabilities log p(v) at N places under the law that a lens reads at each station, in nats.

    If V is large, `read` uses far less memory.

    Args:
        model: the model.
        lens: a lens of this model.
        stations: [S, N, D].

    Returns:
        [S, N, V].

    Raises:
        ValueError: if the shape is wrong.
    """
    _check_stations(model, stations)
    return _lens_log_probs(model, lens, stations)


@jax.jit
def _lens_log_probs(model: Transformer, lens: Lens, stations: Array) -> Array:
    mapped = jnp.concatenate([jax.vmap(_mapped)(stations[:-1], lens), stations[-1:]])
    return lax.map(lambda x: _law(model, x), mapped)


@jax.jit
def read(model: Transformer, lens: Lens, stations: Float[Array, "S N D"]) -> Reading:
    """What `lens` reads at N places. The KL at the last station is 0.

    Stations are read one at a time, since an array of laws is large.

    Args:
        model: the model.
        lens: a lens of this model.
        stations: [S, N, D].

    Returns:
        The reading, [S, N] each.
    """
    final = _law(model, stations[-1])
    top = final.argmax(-1, keepdims=True)

    def summary(log_p: Float[Array, "N V"]) -> Reading:
        return Reading(entropy(log_p), expectation(final, final - log_p), _rank(log_p, top))

    before = lax.map(lambda args: summary(_law(model, _mapped(*args))), (stations[:-1], lens))
    return Reading(*(jnp.concatenate([b, last[None]]) for b, last in zip(before, summary(final), strict=True)))


@jax.jit
def read_steps(
    model: Transformer, stations: Float[Array, "S N D"]
) -> tuple[Reading, Float[Array, "S-1 N"], Float[Array, "S-1 N"]]:
    """What the logit lens reads at N places, with `fisher_lengths` and `step_divergences`, computing each law once.

    If V is large, computing laws is nearly all the work, and three separate passes would compute that of each station
    five times.

    Args:
        model: the model.
        stations: [S, N, D].

    Returns:
        The reading, [S, N] each, the Fisher lengths [S-1, N] and the divergences [S-1, N].
    """
    final = _law(model, stations[-1])
    top = final.argmax(-1, keepdims=True)

    def summary(log_p: Float[Array, "N V"]) -> tuple[Array, Array, Array]:
        return entropy(log_p), expectation(final, final - log_p), _rank(log_p, top)

    def read_backwards(after: Array, pair: tuple[Array, Array]) -> tuple[Array, tuple[Array, ...]]:
        station, step = pair
        log_p, change = jax.jvp(lambda x: _law(model, x), (station,), (step,))
        return log_p, (*summary(log_p), _deviation(log_p, change), expectation(log_p, log_p - after))

    _, (*before, fisher, divergence) = lax.scan(
        read_backwards, final, (stations[:-1], jnp.diff(stations, axis=0)), reverse=True
    )
    reading = (jnp.concatenate([b, last[None]]) for b, last in zip(before, summary(final), strict=True))
    return Reading(*reading), fisher, divergence


def jacobian_lens(
    model: Transformer, paths: Int[Array, "n T"] | Int[np.ndarray, "n T"], at: Int[Array, " n"] | Int[np.ndarray, " n"]
) -> Lens:
    """The first-order lens: the mean derivative of the last station with respect to each station of the same position.

    The bias makes it exact at the mean of the stations. Takes D backward passes per path, each of which covers all
    stations.

    Args:
        model: the model.
        paths: [n, T], of at most max_length tokens each.
        at: [n], the position in each path.

    Returns:
        The lens.

    Raises:
        ValueError: if ids or positions are out of range, or shapes do not match.
    """
    paths, at = (a if is_traced(a) else np.asarray(a) for a in (paths, at))
    if paths.ndim != 2 or at.shape != paths.shape[:1] or not 0 < paths.shape[1] <= model.max_length or not len(paths):
        raise ValueError(
            f"paths, at: expected [n, T] with T up to {model.max_length} and [n], at least one path, got "
            f"{paths.shape} and {at.shape}."
        )
    for name, values, size in (("paths", paths, model.vocab_size), ("at", at, paths.shape[1])):
        if not is_traced(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise ValueError(f"{name}: expected from 0 to {size - 1}, got {values.min()} to {values.max()}.")
    return _jacobian_lens(model, paths, at)


@jax.jit
def _jacobian_lens(model: Transformer, paths: Array, at: Array) -> Lens:
    model = plain(model)
    D, S, dtype = model.width, model.stations, model.embed.table.dtype
    documents = documents_of(None, paths.shape[1])

    def add_path(total: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        path, t = item
        at_position = jnp.broadcast_to((indices(len(path)) == t)[None], (S, len(path)))

        def last_station(nudge: Array) -> tuple[Array, Array]:
            edits = Interventions(nudge=nudge[:, None], nudge_where=at_position)
            x = edits.apply(model.embedded(path, documents), 0)
            by_layer = jax.tree.map(lambda a: a[1:].reshape(model.depth, 2, *a.shape[1:]), edits)
            output = model.run_layers(x, Mixer(model.layers, documents), by_layer, collect=lambda pair: pair[:, t])
            later = jnp.zeros((0, D), dtype) if output.collected is None else output.collected[0].reshape(-1, D)
            stations = jnp.concatenate([x[t][None], later])
            return stations[-1], stations

        _, pull, stations = jax.vjp(last_station, jnp.zeros((S, D), dtype), has_aux=True)
        rows = map_in_batches(lambda e: pull(e)[0][:-1], jnp.eye(D, dtype=dtype), 16)
        add = lambda a, b: a + b.astype(a.dtype)
        return jax.tree.map(add, total, (rows.swapaxes(0, 1), stations)), None

    start = jnp.zeros((S - 1, D, D), wide(dtype)), jnp.zeros((S, D), wide(dtype))
    (weight, mean), _ = lax.scan(add_path, start, (paths, at))
    weight, mean = weight / len(paths), mean / len(paths)
    return Lens(weight, mean[-1] - jnp.einsum("sij,sj->si", weight, mean[:-1]))


@jax.jit
def least_squares_lens(stations: Float[Array, "S N D"], ridge: float | Array = 1e-4) -> Lens:
    """The affine maps that predict the last station with least squared error at N places, by ridge regression.

    Args:
        stations: [S, N, D].
        ridge: the strength of the regularisation, relative to the mean variance of a station's coordinates.

    Returns:
        The lens.
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
    """The affine maps whose laws are closest to the final law at N places: least mean KL(final || lens), by Adam.

    Args:
        model: the model.
        stations: [S, N, D].
        key: a `jax.random` key.
        steps: the number of optimisation steps. The maps start as the identity, which is the logit lens.
        batch: the number of places drawn at random in each step.
        learning_rate: the initial learning rate of a cosine decay to 0.

    Returns:
        The lens.

    Raises:
        ValueError: if the shape is wrong.
    """
    _check_stations(model, stations)
    return _tuned_lens(model, stations, key, learning_rate, steps=steps, batch=batch)


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def _tuned_lens(
    model: Transformer, stations: Array, key: Key, learning_rate: float | Array, *, steps: int, batch: int
) -> Lens:
    optimizer = optax.scale_by_adam()
    decay = optax.cosine_decay_schedule(1.0, steps)
    D, N = stations.shape[-1], stations.shape[1]

    def fit(args: tuple[Array, Array]) -> Lens:
        x, key = args

        def loss(lens: Lens, places: Array) -> Array:
            final = _law(model, stations[-1, places])
            return expectation(final, final - _law(model, _mapped(x[places], lens))).mean()

        def step(
            carry: tuple[Lens, optax.OptState], args: tuple[Array, Array]
        ) -> tuple[tuple[Lens, optax.OptState], None]:
            (lens, state), (i, key) = carry, args
            gradient = jax.grad(loss)(lens, jax.random.randint(key, (min(batch, N),), 0, N))
            updates, state = optimizer.update(gradient, state, lens)
            rate = learning_rate * decay(i)
            return (jax.tree.map(lambda a, u: a - (rate * u).astype(a.dtype), lens, updates), state), None

        identity = Lens(jnp.eye(D, dtype=x.dtype), jnp.zeros(D, x.dtype))
        items = indices(steps), jax.random.split(key, steps)
        return lax.scan(step, (identity, optimizer.init(identity)), items)[0][0]  # type: ignore[arg-type]

    return lax.map(fit, (stations[:-1], jax.random.split(key, len(stations) - 1)))


@jax.jit
def fisher_lengths(model: Transformer, stations: Float[Array, "S D"]) -> Float[Array, " S-1"]:
    """The length of each step of a walk in the Fisher metric of the laws read at its stations, in sqrt(nats).

    sqrt(delta' G delta) for a step delta, with G = J' (diag p - p p') J and J the derivative of the logits at the
    station where the step starts. This is the standard deviation, under that station's law, of the derivative of the
    logits along the step. Half its square is KL(law of the station || law of the next) to second order in the step; see
    `step_divergences`.

    Args:
        model: the model.
        stations: [S, D].

    Returns:
        [S-1].
    """

    def length(pair: tuple[Array, Array]) -> Array:
        station, step = pair
        return _deviation(*jax.jvp(lambda x: _law(model, x), (station,), (step,)))

    return lax.map(length, (stations[:-1], jnp.diff(stations, axis=0)))


@jax.jit
def step_divergences(model: Transformer, stations: Float[Array, "S D"]) -> Float[Array, " S-1"]:
    """KL(law of a station || law of the next) for each step of a walk, both read by the logit lens, in nats.

    Args:
        model: the model.
        stations: [S, D].

    Returns:
        [S-1].
    """
    log_p = _law(model, stations)
    return expectation(log_p[:-1], log_p[:-1] - log_p[1:])


def _check_stations(model: Transformer, stations: Array) -> None:
    check_shape("stations", stations, (None, None, model.width))


def _law(model: Transformer, stations: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    read = lambda x: jax.nn.log_softmax(model.logits(model.context(x)))
    for _ in range(stations.ndim - 1):
        read = jax.vmap(read)
    return read(stations)


def _mapped(x: Float[Array, "N D"], lens: Lens) -> Float[Array, "N D"]:
    """Stations mapped by a lens for a single station, weight [D, D] and bias [D]."""
    y = x if lens.weight is None else x @ lens.weight.astype(x.dtype).T
    return y if lens.bias is None else y + lens.bias.astype(x.dtype)


def _deviation(log_p: Float[Array, "*n V"], change: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """The standard deviation of `change` under the law p. Adding a constant to all tokens does not affect it."""
    p = jnp.exp(log_p.astype(wide(log_p.dtype)))
    return jnp.sqrt(jnp.sum(p * (change - jnp.sum(p * change, axis=-1, keepdims=True)) ** 2, axis=-1))


def _rank(log_p: Float[Array, "N V"], token: Int[Array, "N 1"]) -> Int[Array, " N"]:
    return (log_p > jnp.take_along_axis(log_p, token, axis=-1)).sum(-1)
