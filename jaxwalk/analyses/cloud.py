"""C6, C8: the cloud that the contexts of many paths form at each station of the walk, and how the walk deforms it.

One point a path: its vector at one position. Measures at each station: TwoNN intrinsic dimension (Facco et al. 2017,
Scientific Reports 7:12140), anisotropy (mean cosine of pairs, and the share of the first principal component), hubness
(Radovanovic et al. 2010, JMLR 11:2487), participation ratio of the covariance's spectrum, convergence (the share of
the variance that lies between groups of paths with the same label), and expansion: how much a small nudge at that
station has grown at the last.

What decides is whether contexts that mean the same gather: whether the world's most probable next token, which is no
function of the points, explains what the last token leaves of the variance, on paths that nothing was fitted on. Random
layers gather contexts too, by what they have in common, so the same of the untrained model is the null.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.analyses._shapes import LEAST, NEIGHBOURS, SAME, SAMPLES, Cloud, Shapes, centred, deviation, shapes_of
from jaxwalk.evidence import engine
from jaxwalk.evidence.decision import Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import mean_interval, permute_within
from jaxwalk.evidence.subject import Draw, Subject
from jaxwalk.model import Transformer, plain

WORK = 1 << 35
"""About the most multiplications that the nudges of one model take: fewer paths are nudged in a larger model."""
STATIONS = 25
"""The most stations that are measured by default."""
FEWEST = 16
"""The fewest paths."""
SMALLEST_SHARE = 0.1
"""The smallest difference of shares of the variance that matters: those of untrained models differ by half of it."""
STATEMENT = "the walk gathers contexts that the same token is most likely to follow, more than an untrained model"
GATHERED = "next_given_last"


class Points(NamedTuple):
    """The vectors of many paths at each place, [places, n, D]: the measured stations, and after the final norm.

    Attributes:
        measured: of the paths that are scored.
        to_fit: of those that group means are fitted on.
        rates: [walks, stations], the growth of a random nudge at each station, in nats.
    """

    measured: Float[np.ndarray, "places n D"]
    to_fit: Float[np.ndarray, "places m D"]
    rates: Float[np.ndarray, "walks stations"]


def analyse(
    subject: Subject, *, paths: int = 256, position: int = -1, stations: Sequence[int] | None = None
) -> Finding:
    """The shape of the cloud of contexts along the encoding walk.

    Args:
        subject: the model and its data.
        paths: the number of points.
        position: the position whose vectors are the points, one a path; never 0.
        stations: the stations that are measured, beside the context vectors; by default all, or 25 evenly spaced ones
            of a deeper model.

    Raises:
        ValueError: if the position or a station does not exist.
        NotApplicable: if there are too few paths, no walk, or no cloud.
    """
    model = subject.model
    if model.depth == 0:
        raise NotApplicable("the model has no layers, and so no walk that could move a cloud")
    if subject.length < 2:
        raise NotApplicable("paths have one token, and position 0 is no evidence")
    at = check_position(position, subject.length)
    every = check_stations(stations, 2 * model.depth)
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")
    draw, to_fit = (subject.draw(paths, at + 1, to_fit=fit) for fit in (False, True))
    if len(draw.tokens) < FEWEST:
        raise NotApplicable(f"expected at least {FEWEST} paths, got {len(draw.tokens)}. Analyse more paths.")
    models = {"": model} | ({} if subject.untrained is None else {"untrained": subject.untrained})
    points = {who: points_of(m, draw.tokens, to_fit.tokens, every, subject.seed) for who, m in models.items()}
    if not any(centred(x).any() for x in points[""].measured):
        raise NotApplicable("all paths are at one point at every station: there is no cloud")

    labels = {"last_token": draw.tokens[:, -1]}
    quantities = [] if (expansion := _expansion(points)) is None else [expansion]
    primary = untestable("C8", STATEMENT, GATHERED, "only of a world is the most probable next token known")
    if subject.world is not None:
        next_of = [engine.measure(most_probable_next, subject.world, d.tokens).astype(int) for d in (draw, to_fit)]
        labels["next_token"] = next_of[0]
        gathering = _gathering(points, (draw, to_fit), next_of, len(every) - 1, subject.seed)
        primary = _contrast(gathering, next_of)
        quantities.insert(0, gathering)
    shapes = shapes_of({who: p.measured for who, p in points.items()}, labels, draw.documents, subject.seed)
    shape_numbers, left_out = _reported(shapes, len(every) - 1)
    measured, interval, null = ({**a, **b} for a, b in zip(numbers(quantities).values(), shape_numbers, strict=True))
    arrays = _arrays(shapes, points, every)
    return Finding(
        name="cloud",
        claim="C6, C8: the walk composes contexts: what means the same gathers, what does not parts.",
        measured=measured,
        interval=interval,
        null=null,
        conventions=_conventions(len(draw.tokens), at, every, left_out),
        arrays=arrays,
        figures=_figures(arrays),
        primary=(primary,),
    )


def check_position(position: int, length: int) -> int:
    """`position` as one from 1, negative ones counted from the end of paths of `length` tokens.

    Raises:
        ValueError: if there is none, or it is 0.
    """
    if not -length < position < length or position == 0:
        raise ValueError(
            f"position: expected one from 1 to {length - 1}, or from -{length - 1} to -1, got {position}. Position 0 "
            "is left out: it has seen one token only, and is an attention sink."
        )
    return int(position) % length


def check_stations(stations: Sequence[int] | None, last: int) -> tuple[int, ...]:
    """The stations, rising, of 0 to `last`; for None all, or 25 evenly spaced ones if there are more.

    Raises:
        ValueError: if there are none, or one does not exist.
    """
    if stations is None:
        return tuple(np.unique(np.linspace(0, last, min(last + 1, STATIONS)).round().astype(int)).tolist())
    chosen = sorted(set(map(int, stations)))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] <= last:
        raise ValueError(f"stations: expected some of 0 to {last}, of this model's walk, got {list(stations)}.")
    return tuple(chosen)


# What is measured of one path.


def vectors_of_path(model: Transformer, path: Int[Array, " T"], every: Int[Array, " K"]) -> Float[Array, "K+1 D"]:
    """The vectors of the last position at the stations `every`, and its context vector."""
    walk = model.walk(path)
    return jnp.concatenate([walk.stations[every, -1], walk.context[-1:]])


def most_probable_next(world: Any, path: Int[Array, " T"]) -> Int[Array, ""]:
    """The world's most probable token after a path."""
    return world.next_log_probs(path)[-1].argmax()


def expansion_rates(
    model: Transformer,
    tokens: Int[Array, " T"],
    directions: Float[Array, "K D"],
    stations: Int[Array, " K"] | Int[np.ndarray, " K"],
) -> Float[Array, " K"]:
    """Finite-time expansion of the walk: log(|change at the last station| / |nudge|) of infinitesimal nudges, in nats.

    Nudge k is along directions[k], at stations[k], of the last position, where the change is measured too. It is the
    finite-time Lyapunov exponent in that direction, times the number of steps: 0 in a stream that only carries,
    positive where walks that start near each other part, -inf for a nudge that vanishes.
    """
    model = plain(model)
    still = jnp.zeros((model.stations, len(tokens), model.width), directions.dtype)
    push = jax.linearize(lambda nudge: model.walk(tokens, nudge=nudge).stations[-1, -1], still)[1]

    def one(nudged: tuple[Array, Array]) -> Array:
        station, along = nudged
        return jnp.log(jnp.linalg.norm(push(still.at[station, -1].set(along))) / jnp.linalg.norm(along))

    return lax.map(one, (jnp.asarray(stations), directions))


def points_of(
    model: Transformer,
    tokens: Int[np.ndarray, "n T"],
    to_fit: Int[np.ndarray, "m T"],
    every: tuple[int, ...],
    seed: int,
) -> Points:
    """The points of one model, and how nudges grow in it."""
    stations, K, D = np.array(every), len(every), model.width
    points = [
        engine.measure(vectors_of_path, model, paths, shared=(stations,)).swapaxes(0, 1) for paths in (tokens, to_fit)
    ]
    cost = (K + 2) * tokens.shape[1] * sum(a.size for a in jax.tree.leaves(model.layers))
    walks = tokens[: max(min(len(tokens), FEWEST), min(len(tokens), WORK // max(cost, 1)))]
    directions = np.random.default_rng(seed).normal(size=(len(walks), K, D)).astype(model.embed.table.dtype)
    held = 4 * model.stations  # numbers that a walk and its derivative hold, in vectors of each position
    rates = engine.measure(
        expansion_rates, model, walks, directions, shared=(stations,), elements=4 * engine.ELEMENTS // held
    )
    return Points(points[0], points[1], rates)


# What decides.


def _gathering(
    points: Mapping[str, Points], draws: tuple[Draw, Draw], next_of: Sequence[np.ndarray], last: int, seed: int
) -> Quantity:
    """The share of the variance around the mean of each last token that means of each next token explain."""
    draw, to_fit = draws
    tokens, fitted_tokens = draw.tokens[:, -1], to_fit.tokens[:, -1]

    def errors(of: Points, fitted_next: np.ndarray) -> Float[np.ndarray, "n 2"]:
        x, fitted = of.measured[last], of.to_fit[last]
        centre = fitted.mean(axis=0)
        rest, fitted_rest = (
            a - centre - group_means(fitted - centre, fitted_tokens, label)
            for a, label in ((x, tokens), (fitted, fitted_tokens))
        )
        left = rest - group_means(fitted_rest, fitted_next, next_of[0])
        return np.stack([(left**2).sum(axis=1), (rest**2).sum(axis=1)], axis=1)

    rng = np.random.default_rng(seed)
    groups = np.unique(fitted_tokens, return_inverse=True)[1]
    permuted = [errors(points[""], next_of[1][permute_within(groups, rng)]) for _ in range(10)]
    nulls: dict[str, Any] = {"permuted": max(permuted, key=lambda e: share(e.mean(axis=0)))}
    nulls |= {who: errors(of, next_of[1]) for who, of in points.items() if who}
    return Quantity(GATHERED, errors(points[""], next_of[1]), nulls, "share of the variance", share, draw.documents)


def share(means: Float[np.ndarray, "... 2"]) -> Any:
    """1 - unexplained variance / variance, of the means of both; 0 of none."""
    left, total = means[..., 0], means[..., 1]
    return 1 - np.where(total > 0, left, 1) / np.where(total > 0, total, 1)


def group_means(
    x: Float[np.ndarray, "m D"], groups: Int[np.ndarray, " m"], wanted: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n D"]:
    """The mean of the group of each wanted entry, shrunk as by one more point at 0; 0 for a group without points."""
    names, group = np.unique(groups, return_inverse=True)
    sums, counts = np.zeros((len(names) + 1, x.shape[1])), np.bincount(group, minlength=len(names) + 1)
    np.add.at(sums, group, x)
    slot = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    slot = np.where(names[slot] == wanted, slot, len(names))
    return (sums / (counts + 1)[:, None])[slot]


def _contrast(gathering: Quantity, next_of: Sequence[np.ndarray]) -> Contrast:
    reason = ""
    if min(len(np.unique(labels)) for labels in next_of) < 2:
        reason = "one token is the most probable after all contexts"
    elif "untrained" not in gathering.nulls:
        reason = "there is no untrained model"
    elif not np.mean(gathering.values, axis=0)[1] > 0:
        reason = "at the last station, the last token is all that there is"
    if reason:
        return untestable("C8", STATEMENT, GATHERED, reason)
    return gathering.contrast("untrained", "C8", STATEMENT, at_least=SMALLEST_SHARE, label="untrained")


def _expansion(points: Mapping[str, Points]) -> Quantity | None:
    """The growth of nudges at the first station; None if some vanish."""
    rates = {who: of.rates[:, 0] for who, of in points.items() if np.isfinite(of.rates).all()}
    if "" not in rates:
        return None
    return Quantity("expansion", rates.pop(""), {"carried": 0.0, **rates})


def _reported(shapes: Shapes, final: int) -> tuple[tuple[dict[str, Any], dict[str, Any], dict[str, Any]], list[str]]:
    """What is measured, its intervals and its nulls at the last station and of the contexts; and what is left out."""
    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    left_out = []

    def add(key: str, value: float, draws: np.ndarray, nulls: Mapping[str, float]) -> None:
        if not np.isfinite(value):
            left_out.append(key)
            return
        reach = shapes.scale * float(deviation(draws))
        measured[key] = float(value)
        if np.isfinite(reach):
            interval[key] = (measured[key] - reach, measured[key] + reach)
        null.update({f"{key}.{other}": float(v) for other, v in nulls.items() if np.isfinite(v)})

    for name, values in shapes.values.items():
        for where, suffix in ((final, ""), (final + 1, "_context")):
            nulls = {other: v[where] for other, v in shapes.nulls[name].items()}
            add(name + suffix, values[where], shapes.draws[name][where], nulls)
        if name.startswith("convergence") and final > 0:
            untrained = shapes.nulls[name].get("untrained")
            nulls = {"carried": 0.0} | ({} if untrained is None else {"untrained": untrained[final] - untrained[0]})
            draws = shapes.draws[name]
            add(f"{name}_change", values[final] - values[0], draws[final] - draws[0], nulls)
    return (measured, interval, null), left_out


def _arrays(shapes: Shapes, points: Mapping[str, Points], every: tuple[int, ...]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {"place": np.array([*map(str, every), "context"]), "station": np.array(every)}
    arrays["distinct_points"] = np.array([Cloud.of(x).new.sum() for x in points[""].measured])
    for name, values in shapes.values.items():
        reach = shapes.scale * deviation(shapes.draws[name])
        arrays |= {name: values, f"{name}_low": values - reach, f"{name}_high": values + reach}
        arrays |= {f"{name}_{null}": by_place for null, by_place in shapes.nulls[name].items()}
    for who, of in points.items():
        if np.isfinite(of.rates).all():
            name = f"expansion_{who}" if who else "expansion"
            arrays[name] = of.rates.mean(axis=0)
            arrays[f"{name}_low"], arrays[f"{name}_high"] = mean_interval(of.rates)
    return arrays


def _figures(arrays: Mapping[str, np.ndarray]) -> tuple[Figure, ...]:
    place = "station of the encoding walk, then the context vectors"

    def figure(name: str, title: str, y_label: str, lines: Mapping[str, str], **options: Any) -> Figure:
        x, x_label = ("station", "station that is nudged") if name.startswith("expansion") else ("place", place)
        series = []
        for y, label in lines.items():
            if y in arrays:
                null = y.endswith(("_untrained", "_gaussian"))
                low, high = (None, None) if null else (f"{y}_low", f"{y}_high")
                series.append(Series(label, y, x, low=low, high=high, dashed=null))
        return Figure(name, title, x_label, y_label, tuple(series), **options)

    dimension = {
        "dimension": "TwoNN",
        "participation": "participation ratio",
        "dimension_untrained": "TwoNN, untrained",
        "dimension_gaussian": "TwoNN, Gaussian of the same covariance",
        "participation_untrained": "participation ratio, untrained",
    }
    convergence = {
        f"convergence_{label}_token{null}": f"same {label} token{null.replace('_', ', ')}"
        for null in ("", "_untrained")
        for label in ("last", "next")
    }
    expansion = {"expansion": "trained", "expansion_untrained": "untrained"}
    figures = (
        figure(
            "dimension_by_station",
            "How many dimensions the cloud of contexts has at each station",
            "dimensions",
            dimension,
            log_y=True,
        ),
        figure(
            "convergence_by_station",
            "How much of the cloud is which token came last, and which is the most probable next",
            "share of the variance between groups",
            convergence,
            references={"permuted labels": 0.0},
        ),
        figure(
            "expansion_by_station",
            "How much a small nudge at each station has grown at the last",
            "log growth, nats",
            expansion,
            references={"only carried": 0.0},
        ),
    )
    return tuple(f for f in figures if f.series)


def _conventions(n: int, at: int, every: tuple[int, ...], left_out: Sequence[str]) -> dict[str, Any]:
    return {
        "points": f"one a path, of {n} paths: the vector at position {at}, and the paths end there",
        "position_0": "never: it has seen one token only, and is an attention sink",
        "stations": f"{', '.join(map(str, every))}, before the final norm, as they are; the numbers without suffix are "
        "of the last of them, those with _context of the vectors after the final norm",
        "duplicates": f"points nearer than {SAME:g} of their root mean square length are one for dimension and "
        f"hubness, of at least {LEAST} distinct points, and all count in the rest",
        "anisotropy": "mean cosine of pairs of different paths, uncentred",
        "hubness": f"skewness of how often a point is among the {NEIGHBOURS} nearest of others",
        "convergence": "share of the variance that lies between groups, adjusted: 1 - (1 - R^2) (n-1) / (n-g) for n "
        "paths in g groups; groups of one path are left out",
        "groups": "last_token: paths with the same token at the position; next_token: with the same most probable next "
        "token of the world",
        "change": "index at the last station minus that at the first: positive where the groups converge",
        GATHERED: "of the variance around the mean of each last token, the share that means of each next token "
        "explain, at the last station; means fitted on other paths",
        "expansion": "log(|change at the last station| / |nudge|) of one infinitesimal nudge in a random direction at "
        "the first station, at the same position; nats",
        "intervals": "of shapes: 1.96 standard errors by the delete-half jackknife over documents (Shao & Wu 1989), as "
        "a bootstrap repeats points, and a repeated point is its own nearest neighbour",
        "gaussian": f"mean of {SAMPLES} Gaussian clouds with the mean and covariance of the distinct points, as many",
        "permuted": f"the mean over all permutations of the labels, exactly; of {GATHERED}: permuted within each "
        "last token, the strongest of 10",
        **({"left_out": f"too few distinct points or groups for {', '.join(left_out)}"} if left_out else {}),
    }
