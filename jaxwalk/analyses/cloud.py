"""C6, C8: the cloud that the contexts of many paths form at each station of the walk, and how the walk deforms it.

Claim: Singh, arXiv 2308.10874. One point a path: its vector at one position. Measures at each station: TwoNN intrinsic
dimension (Facco et al. 2017, Scientific Reports 7:12140), anisotropy (mean cosine of pairs, and the share of the first
principal component), hubness (Radovanovic et al. 2010, JMLR 11:2487), participation ratio of the covariance's spectrum,
convergence (the share of the variance that lies between groups of paths with the same label), and expansion: how much
a small nudge at that station has grown at the last.

What they are *not*: properties of training by themselves. Random layers bend clouds too, so the untrained model stands
beside every number; a Gaussian cloud of the same mean and covariance says how much of a dimension, a hubness or an
anisotropy is curvature, and how much only the spectrum and the mean.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import batches, mean_interval
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer, plain

FLOATS = 1 << 22
"""How many numbers of stations a batch may hold."""
WORK = 1 << 35
"""How many multiplications the nudges of one model may take, about: fewer paths are nudged in a larger model."""
STATIONS = 25
"""The most stations that are measured by default."""
LEAST = 32
"""The fewest distinct points that neighbours are sought among."""
FEWEST = 16
"""The fewest paths."""
SAME = 1e-5
"""Points nearer than this, in units of their root mean square length, are one point: rounding moves them as far."""
NEIGHBOURS = 10
"""k of the k-occurrences."""
HALVES = 50
"""Of the paths, that the jackknife draws."""
PERMUTATIONS = 100
SAMPLES = 4
"""Gaussian clouds whose numbers are averaged."""


def analyse(
    subject: Subject, *, paths: int = 256, position: int = -1, stations: Sequence[int] | None = None
) -> Finding:
    """The shape of the cloud of contexts along the encoding walk.

    position: the position whose vectors are the points, one a path; never 0. stations: the numbers of those that are
    measured, beside the context vectors; by default all, or 25 evenly spaced ones of a deeper model. Raises ValueError
    for a position or stations that do not exist, NotApplicable where there are no paths or no walk.
    """
    model = subject.model
    last = 2 * model.depth
    if model.depth == 0:
        raise NotApplicable("the model has no layers, and so no walk that could move a cloud")
    if subject.length < 2:
        raise NotApplicable("paths have one token, and position 0 is no evidence")
    at = check_position(position, subject.length)
    every = check_stations(stations, last)
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")

    tokens = subject.paths(paths, at + 1)  # what comes after the position does not reach it
    n = len(tokens)
    if n < FEWEST:
        raise NotApplicable(f"it needs a cloud: expected at least {FEWEST} paths, got {n}. Analyse more paths.")
    seen = Seen.of(model, tokens, every, subject.seed)
    if not np.isfinite(seen.points).all():
        raise NotApplicable("stations: expected finite numbers, got NaN. Analyse an earlier step.")
    if not any(centred(x).any() for x in seen.points):
        raise NotApplicable("all paths are at one point at every station: there is no cloud")
    places = [*map(str, every), "context"]
    seen_by = {"": seen}
    if subject.untrained is not None:
        seen_by["untrained"] = Seen.of(subject.untrained, tokens, every, subject.seed)

    rng = np.random.default_rng(subject.seed)
    halves = [rng.permutation(n)[: n // 2] for _ in range(HALVES)]
    clouds = [Cloud.of(x) for x in seen.points]
    values = {"": _each(clouds, seen.labels, LEAST)}  # whose -> number -> [places]
    if "untrained" in seen_by:
        null_seen = seen_by["untrained"]
        values["untrained"] = _each((Cloud.of(x) for x in null_seen.points), null_seen.labels, LEAST)
    drawn = [
        _each((cloud.part(half) for cloud in clouds), {k: label[half] for k, label in seen.labels.items()}, LEAST // 4)
        for half in halves
    ]
    draws = {name: np.stack([d[name] for d in drawn], axis=1) for name in values[""]}  # [places, HALVES]
    # A half's variance around the mean of halves is that of the whole; of other shares it is scaled (Shao & Wu 1989).
    scale = 1.96 * np.sqrt((n // 2) / (n - n // 2))

    nulls: dict[str, dict[str, np.ndarray]] = {name: {} for name in values[""]}  # number -> null -> [places]
    if "untrained" in values:
        for name, by_place in values["untrained"].items():
            nulls[name]["untrained"] = by_place
    for where, cloud in enumerate(clouds):
        samples = [Cloud.of(gaussian_like(cloud.points[cloud.new], rng)) for _ in range(SAMPLES)]
        found = _each(samples, {}, LEAST)
        for name in ("dimension", "hubness", "anisotropy"):
            nulls[name].setdefault("gaussian", np.full(len(places), np.nan))[where] = found[name].mean()
    isotropic = spectrum(rng.normal(size=(n, model.width)))
    nulls["first_component"]["isotropic"] = np.full(len(places), first_share(isotropic))
    nulls["participation"]["isotropic"] = np.full(len(places), participation_ratio(isotropic))
    nulls["anisotropy"]["isotropic"] = np.zeros(len(places))
    orders = [rng.permutation(n) for _ in range(PERMUTATIONS)]
    for name, label in seen.labels.items():
        permuted = np.array([[convergence_index(x, label[order]) for order in orders] for x in seen.points])
        nulls[f"convergence_{name}"]["permuted"] = permuted.mean(axis=1)
        nulls[f"convergence_{name}"]["permuted_high"] = np.quantile(permuted, 0.975, axis=1)

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    left_out: dict[str, str] = {}

    def add(key: str, value: float, drawn: np.ndarray, against: Mapping[str, float]) -> None:
        measured[key] = float(value)
        reach = float(scale * deviation(drawn))
        interval[key] = (measured[key] - reach, measured[key] + reach)
        null.update({f"{key}.{other}": float(v) for other, v in against.items() if np.isfinite(v)})

    final = len(every) - 1
    for where, suffix in ((final, ""), (final + 1, "_context")):
        for name, by_place in values[""].items():
            if np.isfinite(by_place[where]):
                against = {other: v[where] for other, v in nulls[name].items()}
                add(name + suffix, by_place[where], draws[name][where], against)
            else:
                left_out[name + suffix] = _why(name, int(clouds[where].new.sum()))
    for name in seen.labels:
        name = f"convergence_{name}"
        change = {who: found[name][final] - found[name][0] for who, found in values.items()}
        if final > 0 and np.isfinite(change[""]):
            against = {"carried": 0.0} | {who: v for who, v in change.items() if who}
            add(f"{name}_change", change[""], draws[name][final] - draws[name][0], against)
    if np.isfinite(seen.rates).all():
        measured["expansion"] = float(seen.rates[:, 0].mean())
        low, high = mean_interval(seen.rates, subject.seed)
        interval["expansion"] = (float(low[0]), float(high[0]))
        null["expansion.carried"] = 0.0
    else:
        left_out["expansion"] = "some nudges vanish on the way"

    arrays: dict[str, np.ndarray] = {"place": np.array(places), "station": np.array(every)}
    arrays["distinct_points"] = np.array([cloud.new.sum() for cloud in clouds])
    for name, by_place in values[""].items():
        reach = scale * deviation(draws[name])
        arrays |= {name: by_place, f"{name}_low": by_place - reach, f"{name}_high": by_place + reach}
        arrays |= {f"{name}_{other}": found for other, found in nulls[name].items()}
    for who, of in seen_by.items():
        if "expansion" in measured and np.isfinite(of.rates).all():
            name = f"expansion_{who}" if who else "expansion"
            arrays[name] = of.rates.mean(axis=0)
            if who:
                null["expansion.untrained"] = float(arrays[name][0])
            else:
                arrays["expansion_low"], arrays["expansion_high"] = mean_interval(of.rates, subject.seed)

    return Finding(
        name="cloud",
        claim="C6, C8: the walk composes contexts: what means the same gathers, what does not parts.",
        measured=measured,
        interval=interval,
        null=null,
        conventions={
            "points": f"one a path, of {n} paths: the vector at position {at}, and the paths end there",
            "position_0": "never: it has seen one token only, and is an attention sink",
            "stations": f"numbers {', '.join(places[:-1])} of 0 to {last}, before the final norm, as they are; the "
            "numbers without suffix are of the last of them, those with _context of the vectors after the final norm",
            "duplicates": f"points nearer than {SAME:g} of their root mean square length are one for dimension and "
            f"hubness, and all count in the rest; distinct at the last station: {int(clouds[final].new.sum())}",
            "dimension": f"TwoNN, (N-1) / sum log(r2/r1) over the N distinct points, at least {LEAST} of them",
            "anisotropy": "mean cosine of pairs of paths, (|sum of unit vectors|^2 - n) / (n (n - 1)): no path is "
            "paired with itself; uncentred",
            "first_component": "share of the variance along the first principal component",
            "hubness": f"skewness of how often a point is among the {NEIGHBOURS} nearest of others (of fewer than "
            f"{4 * NEIGHBOURS} points: a quarter of them)",
            "participation": "(sum of the covariance's eigenvalues)^2 / sum of their squares, at most the width and "
            "the number of paths less one",
            "convergence": "share of the variance that lies between groups, adjusted: 1 - (1 - R^2) (n-1) / (n-g) for "
            "n paths in g groups, whose mean over all permutations of the labels is exactly 0; R^2 from the traces of "
            "the scatter matrices; groups of one path are left out",
            "groups": "last_token: paths with the same token at the position; next_token: with the same most probable "
            "next token, of the model whose vectors they are",
            "change": "index at the last station minus that at the first: positive where the groups converge",
            "expansion": f"log(|change at the last station| / |nudge|) of one infinitesimal nudge in a random "
            f"direction at the first station, at the same position, by forward mode; {len(seen.rates)} paths; nats",
            "intervals": f"95%: value +- 1.96 standard errors by the delete-half jackknife, {HALVES} random halves of "
            "the paths without replacement (Shao & Wu 1989, Annals of Statistics 17:1176; on average not too small, "
            "Efron & Stein 1981): a bootstrap repeats points, and a repeated point is its own nearest neighbour. Of "
            "expansion, a mean over paths: bootstrap",
            "gaussian": f"mean of {SAMPLES} Gaussian clouds with the mean and covariance of the distinct points, "
            "as many",
            "isotropic": "an isotropic Gaussian cloud of as many paths and this width, sampled; of anisotropy, exact",
            "permuted": f"labels permuted, mean and 97.5% quantile of {PERMUTATIONS}",
            "carried": "a stream that only carries what it has, exact",
            "nulls": "of the measured number before the dot",
            **({"left_out": left_out} if left_out else {}),
            **({"untrained": "not available: this model has no step 0"} if subject.untrained is None else {}),
        },
        arrays=arrays,
        figures=_figures(arrays),
        verdict=_verdict(measured, interval, null, values[""]),
    )


class Cloud(NamedTuple):
    """Points [n, D], the squared distances [n, n] of their pairs, and which of them repeat no earlier one [n]."""

    points: np.ndarray
    distances: np.ndarray
    new: np.ndarray

    @classmethod
    def of(cls, x: Float[np.ndarray, "n D"]) -> "Cloud":
        """The cloud of these points."""
        return cls(x, distances(x), distinct(x))

    def part(self, rows: Int[np.ndarray, " m"]) -> "Cloud":
        """The points in these rows, with what is known of them."""
        return Cloud(self.points[rows], self.distances[np.ix_(rows, rows)], self.new[rows])


def _each(clouds: Iterable[Cloud], labels: Mapping[str, np.ndarray], least: int) -> dict[str, np.ndarray]:
    """name -> [clouds]: every number of every cloud; NaN where it is too small for one."""
    found = []
    for x, near, new in clouds:
        near = near[np.ix_(new, new)] if new.sum() >= least else np.empty((0, 0))
        shares = spectrum(x)
        found.append(
            {
                "dimension": _two_nn(near),
                "anisotropy": mean_cosine(x),
                "first_component": first_share(shares),
                "hubness": _hubness(near),
                "participation": participation_ratio(shares),
                **{f"convergence_{name}": convergence_index(x, label) for name, label in labels.items()},
            }
        )
    return {name: np.array([f[name] for f in found]) for name in found[0]}


def _why(name: str, distinct_points: int) -> str:
    """Why a number is left out."""
    if name in ("dimension", "hubness"):
        return f"{distinct_points} distinct points, of at least {LEAST}"
    if name.startswith("convergence"):
        return "fewer than two groups of two paths, or no variance"
    return "no variance, or a vector of length zero"


def _figures(arrays: Mapping[str, np.ndarray]) -> tuple[Figure, ...]:
    def line(label: str, y: str, x: str = "place", *, null: bool = False) -> tuple[Series, ...]:
        if y not in arrays:
            return ()
        low, high = (None, None) if null else (f"{y}_low", f"{y}_high")
        return (Series(label, y, x, low=low, high=high, dashed=null),)

    station = "station of the encoding walk, then the context vectors"
    figures = [
        Figure(
            "dimension_by_station",
            "How many dimensions the cloud of contexts has at each station",
            station,
            "dimensions",
            (
                *line("TwoNN", "dimension"),
                *line("participation ratio", "participation"),
                *line("TwoNN, untrained", "dimension_untrained", null=True),
                *line("TwoNN, Gaussian of the same covariance", "dimension_gaussian", null=True),
                *line("participation ratio, untrained", "participation_untrained", null=True),
            ),
            log_y=True,
        ),
        Figure(
            "convergence_by_station",
            "How much of the cloud is which token came last, and which is the most probable next",
            station,
            "share of the variance between groups",
            (
                *line("same last token", "convergence_last_token"),
                *line("same next token", "convergence_next_token"),
                *line("same last token, untrained", "convergence_last_token_untrained", null=True),
                *line("same next token, untrained", "convergence_next_token_untrained", null=True),
            ),
            references={"permuted labels": 0.0},
        ),
    ]
    if "expansion" in arrays:
        figures.append(
            Figure(
                "expansion_by_station",
                "How much a small nudge at each station has grown at the last",
                "station of the encoding walk that is nudged",
                "log growth, nats",
                (
                    *line("trained", "expansion", "station"),
                    *line("untrained", "expansion_untrained", "station", null=True),
                ),
                references={"only carried": 0.0},
            )
        )
    return tuple(figures)


def _verdict(
    measured: Mapping[str, float],
    interval: Mapping[str, tuple[float, float]],
    null: Mapping[str, float],
    values: Mapping[str, np.ndarray],
) -> str:
    def said(key: str, *against: str, digits: int = 2) -> str:
        low, high = interval[key]
        beside = "".join(
            f", {other.replace('_', ' ')} {null[f'{key}.{other}']:z.{digits}f}"
            for other in ("untrained", *against)
            if f"{key}.{other}" in null
        )
        return f"{measured[key]:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]{beside}"

    parts = []
    if "dimension" in measured:
        parts.append(f"a TwoNN dimension of {said('dimension', 'gaussian', digits=1)}")
    if "anisotropy" in measured:
        parts.append(f"a mean cosine of {said('anisotropy', 'gaussian')}")
    for name, what in (("last_token", "last token"), ("next_token", "most probable next token")):
        key = f"convergence_{name}"
        if key in measured:
            first = f", at the first station {values[key][0]:z.2f}" if np.isfinite(values[key][0]) else ""
            parts.append(f"a share of its variance between groups of one {what} of {said(key, 'permuted')}{first}")
    sentences = [f"The cloud of contexts has, at the last station: {'; '.join(parts)}."] if parts else []
    if "expansion" in measured:
        sentences.append(
            f"A nudge at the first station has there grown by {said('expansion')} nats (only carried: 0, exactly)."
        )
    return " ".join(sentences) or "The cloud is too small for any number."


def check_position(position: int, length: int) -> int:
    """`position` as one from 1, negative ones counted from the end of paths of `length` tokens.

    Raises ValueError where there is none, and for position 0.
    """
    if not -length < position < length or position == 0:
        raise ValueError(
            f"position: expected one from 1 to {length - 1}, or from -{length - 1} to -1, got {position}. Position 0 "
            "is left out: it has seen one token only, and is an attention sink."
        )
    return int(position) % length


def check_stations(stations: Sequence[int] | None, last: int) -> tuple[int, ...]:
    """The numbers of the stations, rising, of 0 to `last`; for None all, or 25 evenly spaced ones where there are more.

    Raises ValueError for none, and for one that does not exist.
    """
    if stations is None:
        return tuple(np.unique(np.linspace(0, last, min(last + 1, STATIONS)).round().astype(int)).tolist())
    chosen = sorted(set(map(int, stations)))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] <= last:
        raise ValueError(f"stations: expected some of 0 to {last}, of this model's walk, got {list(stations)}.")
    return tuple(chosen)


class Seen(NamedTuple):
    """What is kept of the paths of one model.

    points: [places, n, D], at each station and after the final norm. labels: name -> [n], of the groups that may
    converge. rates: [walks, stations], growth of a random nudge at each station, in nats.
    """

    points: np.ndarray
    labels: Mapping[str, np.ndarray]
    rates: np.ndarray

    @classmethod
    def of(cls, model: Transformer, tokens: Int[np.ndarray, "n T"], every: tuple[int, ...], seed: int) -> "Seen":
        """What `model` does with these paths, at their last position."""
        n, T = tokens.shape
        D, S = model.width, 2 * model.depth + 1
        size = max(1, min(128, n, FLOATS // max(S * T * D, model.vocab_size)))
        points = np.empty((len(every) + 1, n, D))
        following = np.empty(n, int)
        done = 0
        for batch, count in batches(tokens, size):
            rows = slice(done, done + count)
            found, top = _observe(model, batch, every=every)
            points[:, rows], following[rows] = np.asarray(found, float)[:count].swapaxes(0, 1), np.asarray(top)[:count]
            done += count

        cost = (len(every) + 2) * T * sum(a.size for a in jax.tree.leaves(model.layers))
        walks = tokens[: max(min(n, FEWEST), min(n, WORK // max(cost, 1)))]
        size = max(1, min(128, len(walks), FLOATS // (4 * S * T * D)))
        rates = []
        for number, (batch, count) in enumerate(batches(walks, size)):
            directions = jax.random.normal(
                jax.random.fold_in(jax.random.key(seed), number), (size, len(every), D), model.embed.table.dtype
            )
            rates.append(np.asarray(_rates(model, batch, np.array(every), directions), float)[:count])
        return cls(points, {"last_token": tokens[:, -1], "next_token": following}, np.concatenate(rates))


@functools.partial(jax.jit, static_argnames="every")
def _observe(model: Transformer, tokens: Int[Array, "B T"], *, every: tuple[int, ...]) -> tuple[Array, Array]:
    """The vectors at the last position, [B, places, D], and the most probable next token [B]."""

    def one(path: Array) -> tuple[Array, Array]:
        walk = model.walk(path)
        context = walk.context[-1]
        points = jnp.concatenate([walk.stations[np.array(every), -1], context[None]])
        return points, model.logits(context).argmax()

    return jax.vmap(one)(tokens)


@jax.jit
def _rates(
    model: Transformer, tokens: Int[Array, "B T"], stations: Int[Array, " K"], directions: Float[Array, "B K D"]
) -> Float[Array, "B K"]:
    return jax.vmap(lambda path, along: expansion_rates(model, path, stations, along))(tokens, directions)


def expansion_rates(
    model: Transformer,
    tokens: Int[Array, " T"],
    stations: Int[Array, " K"] | Int[np.ndarray, " K"],
    directions: Float[Array, "K D"],
) -> Float[Array, " K"]:
    """Finite-time expansion of the walk: log(|change at the last station| / |nudge|) of infinitesimal nudges, in nats.

    Nudge k is along directions[k], at stations[k], of the last position, where the change is measured too. It is the
    finite-time Lyapunov exponent in that direction, times the number of steps: 0 in a stream that only carries,
    positive where walks that start near each other part, -inf for a nudge that vanishes.
    """
    model = plain(model)
    still = jnp.zeros((2 * model.depth + 1, len(tokens), model.width), directions.dtype)
    push = jax.linearize(lambda nudge: model.walk(tokens, nudge=nudge).stations[-1, -1], still)[1]

    def one(nudged: tuple[Array, Array]) -> Array:
        station, along = nudged
        return jnp.log(jnp.linalg.norm(push(still.at[station, -1].set(along))) / jnp.linalg.norm(along))

    return lax.map(one, (jnp.asarray(stations), directions))


# The shape of one cloud.


def distances(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n n"]:
    """Squared distances of all pairs; infinite on the diagonal, as nothing is its own neighbour."""
    x = x - x.mean(axis=0)
    squares = (x**2).sum(axis=1)
    found = np.maximum(squares[:, None] + squares - 2 * (x @ x.T), 0)
    np.fill_diagonal(found, np.inf)
    return found


def distinct(x: Float[np.ndarray, "n D"]) -> Bool[np.ndarray, " n"]:
    """Which points are at no earlier point's place, to rounding (`SAME`)."""
    near = distances(x) <= SAME**2 * (x**2).sum(axis=1).mean()
    return ~np.tril(near).any(axis=1)


def two_nn(x: Float[np.ndarray, "n D"]) -> float:
    """TwoNN dimension (n - 1) / sum log(r2 / r1) of distinct points (Facco et al. 2017); NaN for fewer than three.

    r1 and r2 are the distances of a point's two nearest. It is the dimension at the scale of those distances: noise
    that is larger counts, and near the border of a cloud of many dimensions it is too low.
    """
    return _two_nn(distances(x))


def _two_nn(near: Float[np.ndarray, "n n"]) -> float:
    if len(near) < 3:
        return np.nan
    nearest = np.partition(near, 1, axis=1)[:, :2]
    total = 0.5 * np.log(nearest[:, 1] / nearest[:, 0]).sum()
    return float((len(near) - 1) / total) if total > 0 else np.nan


def hubness(x: Float[np.ndarray, "n D"], k: int | None = None) -> float:
    """Skewness of the k-occurrences: how often each of the distinct points is among the k nearest of the others.

    0 where all are so equally often; positive where a few are hubs. k: by default 10, or a quarter of the points where
    that is less. NaN for fewer than three points.
    """
    return _hubness(distances(x), k)


def _hubness(near: Float[np.ndarray, "n n"], k: int | None = None) -> float:
    n = len(near)
    if n < 3:
        return np.nan
    k = max(1, min(NEIGHBOURS, n // 4)) if k is None else k
    nearest = np.argpartition(near, k - 1, axis=1)[:, :k]
    around = np.bincount(nearest.ravel(), minlength=n) - float(k)
    variance = (around**2).mean()
    return float((around**3).mean() / variance**1.5) if variance > 0 else 0.0


def mean_cosine(x: Float[np.ndarray, "n D"]) -> float:
    """Mean cosine over all pairs of different rows, exactly, from the sum of the unit vectors; NaN beside a zero."""
    n, size = len(x), np.linalg.norm(x, axis=1, keepdims=True)
    if n < 2 or not size.all():
        return np.nan
    return float((np.sum((x / size).sum(axis=0) ** 2) - n) / (n * (n - 1)))


def spectrum(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " k"]:
    """Eigenvalues of the covariance, falling: the min(n, D) that may differ from 0. Rounding is no variance."""
    x = centred(x)
    square = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return np.maximum(np.linalg.eigvalsh(square)[::-1], 0) / max(len(x) - 1, 1)


def centred(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """x around its mean; exactly 0 where all points are one, to rounding (`SAME`)."""
    around = x - x.mean(axis=0)
    return around if (around**2).sum() > SAME**2 * (x**2).sum() else np.zeros_like(around)


def first_share(eigenvalues: Float[np.ndarray, " k"]) -> float:
    """Share of the variance along the first principal component; NaN without variance."""
    total = eigenvalues.sum()
    return float(eigenvalues[0] / total) if total > 0 else np.nan


def participation_ratio(eigenvalues: Float[np.ndarray, " k"]) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: m for m equal ones; NaN without variance."""
    squares = (eigenvalues**2).sum()
    return float(eigenvalues.sum() ** 2 / squares) if squares > 0 else np.nan


def convergence_index(x: Float[np.ndarray, "n D"], labels: Int[np.ndarray, " n"]) -> float:
    """Share of the variance that lies between groups of points of one label, adjusted for their number.

    1 - (1 - R^2) (n - 1) / (n - g), where R^2 = 1 - (scatter within groups) / (scatter in all), both as traces, of n
    points in g groups (the epsilon^2 of the analysis of variance). Over all permutations of the labels its mean is 0
    exactly, so it may be below 0; 1 where the points of a group coincide. Groups of one point are left out. NaN for
    fewer than two groups, and where all points coincide.
    """
    _, group, size = np.unique(labels, return_inverse=True, return_counts=True)
    kept = size[group] > 1
    _, group, size = np.unique(labels[kept], return_inverse=True, return_counts=True)
    x, n, g = x[kept], int(kept.sum()), len(size)
    if g < 2:
        return np.nan
    x = centred(x)
    means = (np.arange(g)[:, None] == group) @ x / size[:, None]
    total, within = (x**2).sum(), ((x - means[group]) ** 2).sum()
    return float(1 - within / total * (n - 1) / (n - g)) if total > 0 else np.nan


def gaussian_like(x: Float[np.ndarray, "n D"], rng: np.random.Generator) -> Float[np.ndarray, "n D"]:
    """As many points of the Gaussian with the mean and covariance of x."""
    mean, n = x.mean(axis=0), len(x)
    return mean + rng.normal(size=(n, n)) @ (x - mean) / np.sqrt(max(n - 1, 1))


def deviation(draws: Float[np.ndarray, "... draws"]) -> Float[np.ndarray, "..."]:
    """Standard deviation over the last axis of those that are defined; NaN where fewer than two are."""
    defined = np.isfinite(draws)
    count = np.maximum(defined.sum(axis=-1), 1)
    mean = np.where(defined, draws, 0).sum(axis=-1) / count
    squares = np.where(defined, (draws - mean[..., None]) ** 2, 0).sum(axis=-1) / count
    return np.where(defined.sum(axis=-1) > 1, np.sqrt(squares), np.nan)
