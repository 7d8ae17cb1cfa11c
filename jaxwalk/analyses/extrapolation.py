"""C6: the encoding walk of many paths as one linear flow, with noise that grows exponentially.

Claim: Singh, arXiv 2308.10874, that contexts walk; the model of the walk is that of Sarfati et al., arXiv 2410.01545
("Lines of Thought"): x(t+tau) = U(t+tau) L U(t)' x(t) + w, where U(t) are the singular vectors of all paths' points at
t, uncentred, L = diag(sigma_i(t+tau) / sigma_i(t)), and w is Gaussian noise of variance alpha exp(lambda (t+tau)) in
every coordinate. Their Langevin equation, which their simulation integrates, accumulates noise from t on instead:
alpha (exp(lambda (t+tau)) - exp(lambda t)), where the drift leaves noise alone. Both forms are fitted here.

Measures: the share of the variance that the flow explains of paths it was not fitted to, the fits of both forms, and
how Gaussian the residuals are. What a share is *not*: proof of a flow, as a stream that carries most of what it had
explains itself. Staying put, the mean, the best linear map and the untrained model stand beside it.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.analyses.cloud import check_position
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import batches, resampled_means
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer

FLOATS = 1 << 22
"""How many numbers of stations a batch may hold."""
MOST = 13
"""The most stations that are paired."""
LEAST = 32
"""The fewest distinct paths."""
RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Of the whole variance, for the least-squares map: the one that predicts each path from the others."""
EXACT = 1e-10
"""A residual variance below this share of the whole is rounding, and no noise to be fitted."""
PREDICTORS = ("extrapolated", "stay", "mean", "least_squares")


def analyse(
    subject: Subject,
    *,
    paths: int = 512,
    position: int = -1,
    stations: Literal["blocks", "steps"] = "blocks",
    embedding: bool = False,
    rank: int | None = None,
    threshold: float = 1e-2,
) -> Finding:
    """How well one linear flow extrapolates the walks of held-out paths, and how its residuals grow.

    position: the position whose walk it is, one a path; never 0. stations: the outputs of layers, or those of every
    step. embedding: whether the walk begins before the first layer, and not, as in the paper, after it. rank: the
    most singular directions that are carried. threshold: directions whose singular value is below this share of the
    largest, at either end, are dropped. Raises ValueError for what does not exist; NotApplicable for fewer than three
    stations, which are all as far apart.
    """
    model = subject.model
    if stations not in ("blocks", "steps"):
        raise ValueError(f"stations: expected 'blocks' or 'steps', got {stations!r}.")
    if rank is not None and not 1 <= rank <= model.width:
        raise ValueError(f"rank: expected from 1 to {model.width} (the width), or None for all, got {rank}.")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a share between 0 and 1, got {threshold}.")
    if subject.length < 2:
        raise NotApplicable("paths have one token, and position 0 is no evidence")
    at = check_position(position, subject.length)
    every = np.arange(2 * model.depth + 1)[:: 1 if stations == "steps" else 2][0 if embedding else 1 :]
    if len(every) < 3:
        raise NotApplicable(
            f"it needs 3 stations, so that some are further apart than others, and a model of {model.depth} layers has "
            f"{len(every)} with stations={stations!r}, embedding={embedding}"
        )
    every = every[np.unique(np.linspace(0, len(every) - 1, min(len(every), MOST)).round().astype(int))]
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")

    tokens = subject.paths(paths, at + 1)  # what comes after the position does not reach it
    n = len(tokens)
    half, count = deal(tokens, subject.seed)
    if count < LEAST:
        raise NotApplicable(f"expected at least {LEAST} different paths, to fit and to hold out, got {count} of {n}")
    weights = resampled_means(np.eye(n), subject.seed)  # of the paths in each resample
    time = every / 2  # in layers
    pairs = [(a, b) for a in range(len(every)) for b in range(a + 1, len(every))]

    def scored(model: Transformer, weights: np.ndarray) -> Scores:
        states = walked(model, tokens, every)
        if not np.isfinite(states).all():
            raise NotApplicable("stations: expected finite numbers, got NaN. Analyse an earlier step.")
        return score(states, half, pairs, weights, rank, threshold)

    whole = np.full((1, n), 1 / n)
    found = scored(model, np.concatenate([whole, weights]))
    numbers = {"": _numbers(found, time, pairs)}  # whose -> number -> [1 + resamples]
    if not np.isfinite(numbers[""]["explained"]).all():
        raise NotApplicable("all paths are at one point at some station: there is nothing to explain")
    noise = np.random.default_rng(subject.seed).normal(size=(n, model.width))
    gaussian = moments(noise, whole)
    null_found = None if subject.untrained is None else scored(subject.untrained, whole)
    if null_found is not None:
        numbers["untrained"] = _numbers(null_found, time, pairs)

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {"explained.mean": 0.0, "explained_one_step.mean": 0.0}
    for name, draws in numbers[""].items():
        if not np.isfinite(draws).all():
            continue
        # Around the estimate, as resamples repeat paths: they are biased for kurtosis, and for R^2, which has a top.
        reach = 1.96 * float(draws[1:].std())
        value = float(draws[0])
        low, high = value - reach, value + reach
        if name in LOGARITHMS:
            value, low, high = (float(np.exp(v)) for v in (value, low, high))
        measured[name], interval[name] = value, (low, min(high, 1.0) if name in SHARES else high)
        if null_found is not None and np.isfinite(numbers["untrained"][name][0]):
            other = float(numbers["untrained"][name][0])
            null[f"{name}.untrained"] = float(np.exp(other)) if name in LOGARITHMS else other
    one_step = [b == a + 1 for a, b in pairs]
    for name in ("stay", "least_squares"):
        shares = found.explained[name][0]
        null[f"explained.{name}"], null[f"explained_one_step.{name}"] = map(
            float, (shares.mean(), shares[one_step].mean())
        )
    for name in ("kurtosis", "skewness", "drift"):
        null[f"{name}.gaussian"] = float(gaussian[name][0])

    arrays, figures = _pictures(found, null_found, numbers, time, pairs)
    conventions: dict[str, Any] = {
        "stations": f"{stations}: numbers {', '.join(map(str, every))} of 0 to {2 * model.depth}, before the final "
        f"norm, as they are; t counts layers, and the embedding is {'t = 0' if embedding else 'left out'}",
        "points": f"one a path, of {n} paths: the vector at position {at}, and the paths end there",
        "position_0": "never: it has seen one token only, and is an attention sink",
        "flow": "singular vectors and values of the points of half of the paths, uncentred, in falling order",
        "signs": "of singular vectors: from station to station so that the coordinates of the same paths agree",
        "rank": f"directions with at least {threshold:g} of the largest singular value at both ends"
        + (f", at most {rank}" if rank is not None else "")
        + f": {int(found.rank.min())} to {int(found.rank.max())} of {model.width}",
        "held_out": "two halves of the paths, equal ones in the same, each extrapolated by the flow of the other",
        "explained": "1 - squared error / squared distance from the mean of x(t+tau) over the paths that were fitted "
        f"to; mean over {len(pairs)} pairs (t, t+tau), one_step: over neighbouring stations",
        "stay": "x(t) itself",
        "mean": "the mean of x(t+tau) over the paths that were fitted to: 0 exactly, by the centring of the share",
        "least_squares": "the best affine map from x(t) to x(t+tau), with a ridge chosen on the paths fitted to by "
        "leaving one out: what any linear flow could explain, up to what so few paths can teach",
        "variance": "of the residual around its mean over paths, mean over coordinates, in squared units of the stream",
        "lambda": "per layer; of alpha exp(lambda (t+tau)), by least squares in the logarithm of the variance, all "
        "pairs alike, as all have as many paths; r2: of that logarithm over the pairs",
        "increment": "the same for alpha (exp(lambda (t+tau)) - exp(lambda t)), by Gauss-Newton steps; diffusion: "
        "alpha lambda, the variance per layer that it adds at t = 0, which stays finite where lambda is 0",
        "kurtosis": "excess kurtosis of the residual along each coordinate over held-out paths, mean over coordinates "
        "and pairs; skewness: root mean square over them; drift: root mean square over coordinates of the mean "
        "residual, over its standard deviation, mean over pairs",
        "gaussian": "of as many independent Gaussian numbers",
        "nulls": "of the measured number before the dot",
        "intervals": "95%: value +- 1.96 standard errors, bootstrap over paths with the flows as fitted",
    }
    if subject.untrained is None:
        conventions["untrained"] = "not available: this model has no step 0"
    if "lambda" not in measured:
        conventions["left_out"] = "fits of the noise: too few pairs have residuals above rounding"
    return Finding(
        name="extrapolation",
        claim="C6: contexts walk along common lines, which one linear flow extrapolates up to noise.",
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=figures,
        verdict=_verdict(measured, interval, null),
    )


SHARES = ("explained", "explained_one_step", "r2", "r2_increment")
LOGARITHMS = ("alpha", "diffusion_increment")
"""Numbers that are resampled, and have their intervals, as logarithms."""


def deal(tokens: Int[np.ndarray, "n T"], seed: int) -> tuple[Bool[np.ndarray, " n"], int]:
    """Which half each path is in, equal paths in the same one; and how many different paths there are."""
    different, which = np.unique(tokens, axis=0, return_inverse=True)
    which, count = which.reshape(-1), len(different)
    return np.random.default_rng(seed).permutation(count)[which] % 2 == 1, count


def walked(
    model: Transformer, tokens: Int[np.ndarray, "n T"], every: Int[np.ndarray, " K"]
) -> Float[np.ndarray, "K n D"]:
    """The stations `every` of the last position of each path."""
    n, T = tokens.shape
    size = max(1, min(128, n, FLOATS // ((2 * model.depth + 1) * T * model.width)))
    parts = [
        np.asarray(_walked(model, batch, every=tuple(every.tolist())), float)[:count]
        for batch, count in batches(tokens, size)
    ]
    return np.concatenate(parts).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="every")
def _walked(model: Transformer, tokens: Int[Array, "B T"], *, every: tuple[int, ...]) -> Float[Array, "B K D"]:
    return jax.vmap(lambda path: model.walk(path).stations[np.array(every), -1])(tokens)


# The flow.


class Basis(NamedTuple):
    """Singular vectors [D, r], in columns, and values [r], falling, of the points at one station."""

    vectors: np.ndarray
    values: np.ndarray


def bases(states: Float[np.ndarray, "K n D"]) -> list[Basis]:
    """The uncentred singular bases of the points at each station, their signs aligned from station to station.

    A singular vector is known up to its sign, and a sign too many would turn the flow around: each is the one for
    which the coordinates of the same points, here and at the station before, agree.
    """
    found: list[Basis] = []
    before = None
    for x in states:
        coordinates, values, vectors = np.linalg.svd(x, full_matrices=False)
        if before is not None:
            signs = np.where((coordinates * before).sum(axis=0) < 0, -1.0, 1.0)
            coordinates, vectors = coordinates * signs, vectors * signs[:, None]
        before = coordinates
        found.append(Basis(vectors.T, values))
    return found


def kept(start: Basis, end: Basis, rank: int | None = None, threshold: float = 1e-2) -> int:
    """How many directions are carried: those whose singular value is at least `threshold` of the largest at both."""
    large = [int((basis.values >= threshold * basis.values[0]).sum()) for basis in (start, end)]
    return min([*large, *([] if rank is None else [rank])])


def extrapolate(x: Float[np.ndarray, "n D"], start: Basis, end: Basis, rank: int) -> Float[np.ndarray, "n D"]:
    """U(end) diag(sigma(end) / sigma(start)) U(start)' x of each row x, in the first `rank` directions."""
    stretch = end.values[:rank] / start.values[:rank]
    return (x @ start.vectors[:, :rank] * stretch) @ end.vectors[:, :rank].T


class Ridge:
    """Affine least squares from x [n, D], with the ridge that predicts each row best from the others."""

    def __init__(self, x: Float[np.ndarray, "n D"]) -> None:
        self.mean = x.mean(axis=0)
        self.left, self.values, self.right = np.linalg.svd(x - self.mean, full_matrices=False)

    def predict(self, y: Float[np.ndarray, "n E"], x: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "m E"]:
        """What the map fitted to the targets `y` says of other rows `x`."""
        squares = self.values**2
        if not squares.sum() > 0:
            return np.broadcast_to(y.mean(axis=0), (len(x), y.shape[1]))
        around = y - y.mean(axis=0)
        seen = self.left.T @ around

        def loss(ridge: float) -> float:
            kept = squares / (squares + ridge)
            leverage = (self.left**2) @ kept + 1 / len(y)
            return float((((around - (self.left * kept) @ seen) / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).sum())

        ridge = min((r * squares.sum() for r in RIDGES), key=loss)
        slopes = self.right.T @ ((self.values / (squares + ridge))[:, None] * seen)
        return y.mean(axis=0) + (x - self.mean) @ slopes


# Scores.


class Scores(NamedTuple):
    """Of each resample of the paths and each pair of stations, [R, pairs].

    explained: predictor -> share of the variance. variance, kurtosis, skewness, drift: of the flow's residuals.
    exact: [pairs], whether there is none but rounding. rank: [pairs], directions that the second half's flow carries.
    """

    explained: dict[str, np.ndarray]
    variance: np.ndarray
    kurtosis: np.ndarray
    skewness: np.ndarray
    drift: np.ndarray
    exact: np.ndarray
    rank: np.ndarray


def score(
    states: Float[np.ndarray, "K n D"],
    half: Bool[np.ndarray, " n"],
    pairs: list[tuple[int, int]],
    weights: Float[np.ndarray, "R n"],
    rank: int | None = None,
    threshold: float = 1e-2,
) -> Scores:
    """Scores of the flow from the first to the second station of each pair, on the paths of the other half.

    weights: of the paths in each resample, rows of sum 1.
    """
    sides = (half, ~half)
    fitted = [(bases(states[:, side]), [Ridge(x[side]) for x in states]) for side in sides]
    rows: list[dict[str, np.ndarray]] = []
    ranks, exact = [], []
    for a, b in pairs:
        x, y = states[a], states[b]
        error = {name: np.empty(len(half)) for name in PREDICTORS}
        residual = np.empty_like(y)
        for side, (basis, ridges) in zip(sides, fitted, strict=True):
            r = kept(basis[a], basis[b], rank, threshold)
            predicted = {
                "extrapolated": extrapolate(x[~side], basis[a], basis[b], r),
                "stay": x[~side],
                "mean": y[side].mean(axis=0),
                "least_squares": ridges[a].predict(y[side], x[~side]),
            }
            for name, guess in predicted.items():
                error[name][~side] = ((y[~side] - guess) ** 2).sum(axis=1)
            residual[~side] = y[~side] - predicted["extrapolated"]
        ranks.append(r)
        total = weights @ error["mean"]
        shares = {name: 1 - _over(weights @ e, total) for name, e in error.items()}
        rows.append(shares | moments(residual, weights))
        exact.append(bool(rows[-1]["variance"][0] * y.shape[1] <= EXACT * (y**2).sum(axis=1).mean()))
    by_pair = {name: np.stack([row[name] for row in rows], axis=-1) for name in rows[0]}
    return Scores(
        {name: by_pair[name] for name in PREDICTORS},
        by_pair["variance"],
        by_pair["kurtosis"],
        by_pair["skewness"],
        by_pair["drift"],
        np.array(exact),
        np.array(ranks),
    )


def moments(x: Float[np.ndarray, "n D"], weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, " R"]]:
    """Moments of the rows of x along each coordinate, for each weighting of them.

    variance: around the mean, unbiased, mean over coordinates. kurtosis: excess kurtosis, mean over coordinates.
    skewness: root mean square over them. drift: root mean square of the mean, over that of the standard deviation.
    Coordinates that do not vary have neither skewness nor kurtosis.
    """
    n, D = x.shape
    centre = x.mean(axis=0)
    around = x - centre
    m1, m2, m3, m4 = (
        (weights @ np.concatenate([around**p for p in (1, 2, 3, 4)], axis=1)).reshape(-1, 4, D).swapaxes(0, 1)
    )
    variance = np.maximum(m2 - m1**2, 0)
    third = m3 - 3 * m1 * m2 + 2 * m1**3
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    varies = variance > 1e-12 * variance.max(axis=1, keepdims=True)
    count = np.maximum(varies.sum(axis=1), 1)
    safe = np.where(varies, variance, 1)
    mean = variance.mean(axis=1)
    return {
        "variance": mean * n / (n - 1),
        "kurtosis": np.where(varies, fourth / safe**2 - 3, 0).sum(axis=1) / count,
        "skewness": np.sqrt(np.where(varies, third**2 / safe**3, 0).sum(axis=1) / count),
        "drift": np.sqrt(_over(((m1 + centre) ** 2).mean(axis=1), mean)),
    }


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where b is 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _numbers(scores: Scores, time: np.ndarray, pairs: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """name -> [R]: what is reported. NaN for fits of noise that is not there."""
    start, end = (time[list(side)] for side in zip(*pairs, strict=True))
    neighbours = [b == a + 1 for a, b in pairs]
    shares = scores.explained["extrapolated"]
    noisy = ~scores.exact
    found = {"explained": shares.mean(axis=1), "explained_one_step": shares[:, neighbours].mean(axis=1)}
    fits = ("lambda", "alpha", "r2", "lambda_increment", "diffusion_increment", "r2_increment")  # as in `Growth`
    if noisy.sum() > 2 and len(np.unique(end[noisy])) > 1:
        log_variance = np.log(scores.variance[:, noisy])
        plain = fit_exponential(end[noisy], log_variance)
        grown = fit_increment(start[noisy], end[noisy], log_variance)
        found |= dict(zip(fits, (*plain, *grown), strict=True))
    else:
        found |= dict.fromkeys(fits, np.full(len(shares), np.nan))
    for name in ("kurtosis", "skewness", "drift"):
        values = getattr(scores, name)[:, noisy]
        found[name] = values.mean(axis=1) if noisy.any() else np.full(len(shares), np.nan)
    return found


# Growth of the noise.


class Growth(NamedTuple):
    """A fitted law of the residuals' variance, [...]: rate lambda, log of its scale, R^2 of the log variance."""

    rate: np.ndarray
    log_scale: np.ndarray
    r2: np.ndarray


def fit_exponential(end: Float[np.ndarray, " P"], log_variance: Float[np.ndarray, "... P"]) -> Growth:
    """Least squares of log variance = log alpha + lambda end (Sarfati et al.'s form); the scale is alpha."""
    return _growth(np.ones(log_variance.shape[:-1]), lambda rate: (rate[..., None] * end, end), log_variance)


def fit_increment(
    start: Float[np.ndarray, " P"], end: Float[np.ndarray, " P"], log_variance: Float[np.ndarray, "... P"]
) -> Growth:
    """Least squares of log variance = log(alpha (exp(lambda end) - exp(lambda start))), noise that adds up on the way.

    The scale is alpha lambda, so that it goes through lambda = 0, where variance is in proportion to end - start.
    """
    gap = end - start

    def law(rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # log((exp(z) - 1) / rate) for z = rate * gap, and its derivative; z = 0 by the series.
        rate = rate[..., None]
        z = rate * gap
        small = np.abs(z) < 1e-4
        safe = np.where(small, 1.0, z)
        grown = np.where(small, np.log(gap) + z / 2, np.log(gap) + np.log(np.expm1(safe) / safe))
        slope = np.where(small, gap / 2, gap * (1 / -np.expm1(-safe) - 1 / safe))
        return rate * start + grown, start + slope

    return _growth(fit_exponential(end, log_variance).rate, law, log_variance)


def _growth(rate: np.ndarray, law: Any, log_variance: np.ndarray) -> Growth:
    """Gauss-Newton steps in the rate; the log scale is what is left, as it enters linearly."""
    for _ in range(50):
        shape, slope = law(rate)
        left = log_variance - shape
        left = left - left.mean(axis=-1, keepdims=True)
        slope = np.broadcast_to(slope, left.shape)
        slope = slope - slope.mean(axis=-1, keepdims=True)
        rate = np.asarray(rate + np.clip((slope * left).sum(axis=-1) / (slope**2).sum(axis=-1), -1, 1))
    left = log_variance - law(rate)[0]
    log_scale = left.mean(axis=-1, keepdims=True)
    around = log_variance - log_variance.mean(axis=-1, keepdims=True)
    unexplained = _over(((left - log_scale) ** 2).sum(axis=-1, keepdims=True), (around**2).sum(axis=-1, keepdims=True))
    return Growth(rate, log_scale[..., 0], 1 - unexplained[..., 0])


# What is shown.


def _pictures(
    found: Scores,
    null_found: Scores | None,
    numbers: Mapping[str, Mapping[str, np.ndarray]],
    time: np.ndarray,
    pairs: list[tuple[int, int]],
) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    K = len(time)
    start, end = (time[list(side)] for side in zip(*pairs, strict=True))
    arrays: dict[str, np.ndarray] = {"start": start, "end": end, "rank": found.rank}
    arrays["from"], arrays["to"] = (np.array([f"{t:g}" for t in some]) for some in (time[:-1], time[1:]))
    shown = {name: found.explained[name][0] for name in PREDICTORS if name != "mean"}
    if null_found is not None:
        shown["untrained"] = null_found.explained["extrapolated"][0]
    labels = {"extrapolated": "linear flow", "stay": "staying put", "least_squares": "best linear map"}
    labels["untrained"] = "linear flow, untrained"
    gaps = np.array([b - a for a, b in pairs])
    arrays["gap"] = np.unique(gaps) * (time[-1] - time[0]) / (K - 1)
    maps, lines = [], []
    for name, shares in shown.items():
        grid = np.full((K - 1, K - 1), np.nan)
        for (a, b), share in zip(pairs, shares, strict=True):
            grid[a, b - 1] = share
        arrays[f"explained_{name}"] = grid
        arrays[f"explained_{name}_by_gap"] = np.array([shares[gaps == gap].mean() for gap in np.unique(gaps)])
        maps.append(Series(labels[name], f"explained_{name}", "to", style="heatmap", rows="from"))
        lines.append(Series(labels[name], f"explained_{name}_by_gap", "gap", dashed=name != "extrapolated"))
    figures = [
        Figure(
            "explained",
            "How much of a later station the flow explains on held-out paths",
            "to t + τ",
            "from t",
            tuple(maps),
        ),
        Figure(
            "explained_by_gap",
            "How far ahead the flow extrapolates held-out paths",
            "layers ahead, τ",
            "share of the variance",
            tuple(lines),
            references={"the mean": 0.0},
        ),
    ]
    arrays |= {name: getattr(found, name)[0] for name in ("variance", "kurtosis", "skewness", "drift")}
    if null_found is not None:
        arrays["variance_untrained"] = null_found.variance[0]
        arrays["kurtosis_untrained"] = null_found.kurtosis[0]
    fit = {name: float(draws[0]) for name, draws in numbers[""].items()}
    if np.isfinite(fit["lambda"]):
        arrays["time"] = time[1:]
        arrays["variance_fitted"] = np.exp(fit["alpha"] + fit["lambda"] * time[1:])
        series = [
            Series("residuals, by t", "variance", "end", style="points", colour="start"),
            Series("α exp(λ (t+τ))", "variance_fitted", "time"),
        ]
        if null_found is not None:
            series.append(Series("untrained", "variance_untrained", "end", style="points", dashed=True))
        title = "Variance of the residuals per coordinate, and the exponential fitted to it"
        figures.append(Figure("residual_variance", title, "t + τ, layers", "variance", tuple(series), log_y=True))
    return arrays, tuple(figures)


def _verdict(
    measured: Mapping[str, float], interval: Mapping[str, tuple[float, float]], null: Mapping[str, float]
) -> str:
    def said(key: str, **against: str) -> str:
        low, high = interval[key]
        beside = ", ".join(
            f"{label} {null[f'{key}.{other}']:z.2f}" for other, label in against.items() if f"{key}.{other}" in null
        )
        return f"{measured[key]:z.2f} [{low:z.2f}, {high:z.2f}]{f' ({beside})' if beside else ''}"

    flow = said(
        "explained", stay="staying put", least_squares="best linear map", mean="the mean", untrained="untrained"
    )
    first = f"One linear flow explains {flow} of the variance of later stations on held-out paths"
    if measured["explained"] < null["explained.stay"]:
        first = f"{first}, less than staying put does"
    if "lambda" not in measured:
        return f"{first}, and leaves no residuals whose growth could be fitted."
    better = "better" if measured["r2"] > measured["r2_increment"] else "worse"
    return (
        f"{first}. The log variance of its residuals grows by {said('lambda', untrained='untrained')} per layer, a law "
        f"with R² {said('r2', untrained='untrained')}, {better} than that of noise which adds up on the way, "
        f"{measured['r2_increment']:z.2f}; their excess kurtosis is "
        f"{said('kurtosis', gaussian='Gaussian', untrained='untrained')}."
    )
