"""C6: the encoding walk of many paths as one linear flow, with noise that grows exponentially.

The model of the walk is that of Sarfati et al., arXiv 2410.01545 ("Lines of Thought"), x(t+tau) = U(t+tau) L U(t)' x(t)
+ w, where U(t) are the singular vectors of all paths' points at t, uncentred, L = diag(sigma_i(t+tau) / sigma_i(t)),
and w is Gaussian noise of variance alpha exp(lambda (t+tau)) in every coordinate. Their Langevin equation, which their
simulation integrates, accumulates noise from t on instead: alpha (exp(lambda (t+tau)) - exp(lambda t)), where the drift
leaves noise alone. Both forms are fitted here.

Measures: the share of the variance that the flow explains on paths it was not fitted to, and how Gaussian what it
leaves is. The noise is what the best linear map leaves, corrected for the degrees of freedom that the map takes: the
flow's own residuals are larger than the noise, by the error of its fitted singular values and vectors. Everything is
fitted and scored anew in each of several independent parts of the data, so that intervals include the errors of both.

A share is no proof of a flow, as a stream that carries most of what it had explains itself. Staying put, the best
linear map and the untrained model are compared with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxwalk.analyses._flow import (
    EXACT,
    Pairs,
    Ridge,
    States,
    bases,
    extrapolate,
    fit_exponential,
    fit_increment,
    kept,
    moments,
    noise_variance,
    over,
)
from jaxwalk.analyses.cloud import check_position, vectors_of_path
from jaxwalk.evidence import engine
from jaxwalk.evidence.decision import Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.subject import Draw, Subject
from jaxwalk.model import Transformer

WORK = 4e13
"""About the most floating-point operations that the walks of one model take, with at least 320 paths."""
MOST = 13
"""The most stations that are paired."""
FEWEST_STATIONS = 5
"""The fewest that a law of growth with two parameters is fitted to, and that decide."""
INITIALISATIONS = 3
"""Untrained models, of which the one whose flow explains most is the null: they differ much."""
LEAST = 8
"""The fewest different paths that are scored in a block, none of which was fitted to."""
BLOCKS = 10
"""Independent parts of the data, in each of which everything is fitted and scored anew."""
SMALLEST_SHARE = 0.1
"""The smallest difference of shares of the variance that matters, which is visible in a picture of the walks."""
BETTER = "one linear flow explains later stations better than staying put and than the flow of an untrained model"
AS_GOOD = "one linear flow explains later stations about as well as the best linear map"
PREDICTORS = ("extrapolated", "stay", "least_squares")
FEW_STATIONS = f"fewer than {FEWEST_STATIONS} stations, and two parameters are fitted"


def analyse(
    subject: Subject,
    *,
    paths: int = 1280,
    position: int = -1,
    stations: Literal["blocks", "steps"] = "blocks",
    embedding: bool = False,
    rank: int | None = None,
    threshold: float = 1e-2,
) -> Finding:
    """How well one linear flow extrapolates the walks of held-out paths, and how its noise grows.

    Args:
        subject: the model and its data.
        paths: the number of paths that are scored, fewer if a model is large. Flows are fitted on as many others.
        position: the position whose walk it is, one a path; never 0.
        stations: the outputs of layers, or those of every step.
        embedding: whether the walk begins before the first layer, and not, as in the paper, after it.
        rank: the most singular directions that are carried.
        threshold: directions whose singular value is below this share of the largest, at either end, are dropped.

    Raises:
        ValueError: if an option does not exist.
        NotApplicable: if there are fewer than three stations, or too few different paths.
    """
    model = subject.model
    at, every = _checked(subject, position, stations, embedding, rank, threshold)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    paths = min(paths, max(320, int(WORK / (4.0 * weights * (at + 1)))))
    to_fit, draw = (subject.draw(paths, at + 1, to_fit=fit) for fit in (True, False))
    parts = blocks(to_fit, draw)
    time = every / 2  # in layers
    pairs = [(a, b) for a in range(len(every)) for b in range(a + 1, len(every))]

    def scored(m: Transformer) -> tuple[list[Scores], list[np.ndarray]]:
        fitted, held = (states_of(m, d.tokens, every) for d in (to_fit, draw))
        by_block = [(fitted[:, rows], held[:, others]) for rows, others in parts]
        return (
            [score(*block, pairs, rank, threshold) for block in by_block],
            [noise_variance(np.concatenate(block, axis=1), pairs) for block in by_block],
        )

    results = {"": scored(model)}
    if untrained := [scored(m) for m in subject.untrained_models(INITIALISATIONS)]:
        results["untrained"] = max(untrained, key=lambda result: _explained(result[0]))
    scores = {who: scores for who, (scores, _) in results.items()}
    noises = {who: noises for who, (_, noises) in results.items()}
    if not all(np.isfinite(of.explained["extrapolated"]).all() for of in scores[""]):
        raise NotApplicable("all paths are at one point at some station: there is nothing to explain")
    quantities = _quantities(scores, noises, time, pairs)
    arrays, figures = _pictures(scores, noises[""], time, pairs)
    return Finding(
        name="extrapolation",
        claim="C6: contexts walk along common lines, which one linear flow extrapolates up to noise.",
        **numbers(quantities),
        conventions=_conventions(stations, every, embedding, at, parts, scores[""][0].rank, threshold),
        arrays=arrays,
        figures=figures,
        primary=_contrasts(quantities[0], len(every)),
    )


def _explained(scores: Sequence["Scores"]) -> float:
    """The share of the variance that the flow explains, in all; -inf if it is undefined."""
    share = np.mean([of.explained["extrapolated"].mean() for of in scores])
    return float(share) if np.isfinite(share) else -np.inf


def _checked(
    subject: Subject, position: int, stations: str, embedding: bool, rank: int | None, threshold: float
) -> tuple[int, Int[np.ndarray, " K"]]:
    """The position and the stations, of options that are checked."""
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
    every = np.arange(model.stations)[:: 1 if stations == "steps" else 2][0 if embedding else 1 :]
    if len(every) < 3:
        raise NotApplicable(
            f"it needs 3 stations, so that some are further apart than others, and a model of {model.depth} layers has "
            f"{len(every)} with stations={stations!r}, embedding={embedding}"
        )
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths, a world or a store of text: {subject.no_data}")
    return at, every[np.unique(np.linspace(0, len(every) - 1, min(len(every), MOST)).round().astype(int))]


def states_of(model: Transformer, tokens: Int[np.ndarray, "n T"], every: Int[np.ndarray, " K"]) -> States:
    """The stations `every` of the last position of each path."""
    return engine.measure(vectors_of_path, model, tokens, shared=(every,))[:, :-1].swapaxes(0, 1)


def blocks(to_fit: Draw, draw: Draw) -> list[tuple[np.ndarray, np.ndarray]]:
    """The paths to fit on, and those to score, of each of at most BLOCKS parts that share no document.

    Paths that are equal to one that is fitted on are not scored.

    Raises:
        NotApplicable: if too few paths remain.
    """
    units = [np.unique(d.documents, return_inverse=True)[1] for d in (to_fit, draw)]
    count = min(BLOCKS, *(int(np.max(unit)) + 1 for unit in units))
    parts = []
    for number in range(count):
        fitted, held = (np.flatnonzero(unit % count == number) for unit in units)
        known = {row.tobytes() for row in to_fit.tokens[fitted]}
        held = np.array([i for i in held if draw.tokens[i].tobytes() not in known], int)
        if (different := len(np.unique(draw.tokens[held], axis=0))) < LEAST:
            raise NotApplicable(
                f"expected at least {LEAST} different paths, in each of {count} parts, that were not fitted to, got "
                f"{different}"
            )
        parts.append((fitted, held))
    return parts


def _quantities(
    scores: Mapping[str, Sequence["Scores"]],
    noises: Mapping[str, Sequence[Float[np.ndarray, " P"]]],
    time: Float[np.ndarray, " K"],
    pairs: Pairs,
) -> list[Quantity]:
    """What is reported, a value for each block. Numbers that are not finite are left out."""
    main, quantities = scores[""], []
    neighbours = np.array([b == a + 1 for a, b in pairs])
    for suffix, chosen in (("", slice(None)), ("_one_step", neighbours)):
        shares = {name: np.array([of.explained[name][chosen].mean() for of in main]) for name in PREDICTORS}
        if "untrained" in scores:
            untrained = [of.explained["extrapolated"][chosen].mean() for of in scores["untrained"]]
            shares["untrained"] = np.array(untrained)
        explained = shares.pop("extrapolated")
        quantities.append(Quantity(f"explained{suffix}", explained, shares | {"mean": 0.0}, "share of the variance"))
    fits = {who: [growth(v, time, pairs) for v in variances] for who, variances in noises.items()}
    values = {who: {name: np.array([fit[name] for fit in of]) for name in FITS} for who, of in fits.items()}
    for who, of in scores.items():
        values[who] |= {name: np.array([block.moment(name) for block in of]) for name in MOMENTS}
    for name, numbers_of_blocks in values[""].items():
        nulls: dict[str, Any] = {who: of[name] for who, of in values.items() if who and np.isfinite(of[name]).all()}
        nulls |= {"gaussian": 0.0} if name in MOMENTS else {"constant": 0.0} if name.startswith("lambda") else {}
        if np.isfinite(numbers_of_blocks).all():
            quantities.append(Quantity(name, numbers_of_blocks, nulls, UNITS.get(name, "")))
    return quantities


def _contrasts(explained: Quantity, stations: int) -> tuple[Contrast, Contrast]:
    """The flow against the stronger of staying put and the flow of the untrained model, and against any linear map.

    Untrained models differ much in how well a flow explains them, so that one may beat another by far. What none of
    them has is a flow that explains nearly all that a linear map can: the claim needs both.
    """
    if stations < FEWEST_STATIONS:
        few = f"fewer than {FEWEST_STATIONS} stations are too few for a flow"
        return untestable("C6", BETTER, "explained", few), untestable("C6", AS_GOOD, "explained", few)
    as_good = explained.contrast(
        "least_squares", "C6", AS_GOOD, at_least=-SMALLEST_SHARE, label="best linear map of each pair"
    )
    if "untrained" not in explained.nulls:
        return untestable("C6", BETTER, "explained", "there is no untrained model"), as_good
    null = max(("stay", "untrained"), key=lambda name: explained.references[name])
    label = {"stay": "staying put", "untrained": f"strongest of {INITIALISATIONS} untrained models"}[null]
    return explained.contrast(null, "C6", BETTER, at_least=SMALLEST_SHARE, label=label), as_good


# Scores.

MOMENTS = ("kurtosis", "skewness", "drift")


class Scores(NamedTuple):
    """Of each pair of stations, [P], on paths that the flow was not fitted to.

    Attributes:
        explained: predictor -> share of the variance around the mean of the paths that were fitted to.
        moments: name -> of the flow's residuals, as in `moments`; NaN where there are none but rounding.
        rank: how many directions the flow carries.
    """

    explained: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    rank: np.ndarray

    def moment(self, name: str) -> float:
        """The mean over pairs with residuals; NaN if there are none."""
        values = self.moments[name][np.isfinite(self.moments[name])]
        return float(values.mean()) if len(values) else np.nan


def score(
    fitted: States, held: Float[np.ndarray, "K m D"], pairs: Pairs, rank: int | None = None, threshold: float = 1e-2
) -> Scores:
    """Scores of predictors of the second station of each pair from the first, fitted to some paths, on others."""
    basis, ridges = bases(fitted), [Ridge(x) for x in fitted]
    explained: dict[str, list[float]] = {name: [] for name in PREDICTORS}
    rows, ranks = [], []
    for a, b in pairs:
        ranks.append(kept(basis[a], basis[b], rank, threshold))
        predicted = {
            "extrapolated": extrapolate(held[a], basis[a], basis[b], ranks[-1]),
            "stay": held[a],
            "least_squares": ridges[a].predict(fitted[b], held[a]),
        }
        total = ((held[b] - fitted[b].mean(axis=0)) ** 2).sum()
        for name, guess in predicted.items():
            explained[name].append(1 - float(over(((held[b] - guess) ** 2).sum(), total)))
        residual = held[b] - predicted["extrapolated"]
        exact = (residual**2).sum() <= EXACT * (held[b] ** 2).sum()
        rows.append(dict.fromkeys(MOMENTS, np.nan) if exact else moments(residual))
    by_pair = {name: np.array([row[name] for row in rows]) for name in MOMENTS}
    return Scores({name: np.array(values) for name, values in explained.items()}, by_pair, np.array(ranks))


FITS = ("lambda", "alpha", "r2", "lambda_increment", "diffusion_increment", "r2_increment")
UNITS = {"lambda": "per layer", "lambda_increment": "per layer", "r2": "share of the variance"}


def growth(variance: Float[np.ndarray, " P"], time: Float[np.ndarray, " K"], pairs: Pairs) -> dict[str, float]:
    """Both laws of growth, fitted to the noise of each pair; NaN with too few stations or too little noise."""
    start, end = (time[list(side)] for side in zip(*pairs, strict=True))
    noisy = np.isfinite(variance)
    if len(time) < FEWEST_STATIONS or noisy.sum() < 3 or len(np.unique(end[noisy])) < 3:
        return dict.fromkeys(FITS, np.nan)
    log_variance = np.log(variance[noisy])
    fits = fit_exponential(end[noisy], log_variance), fit_increment(start[noisy], end[noisy], log_variance)
    values = [float(v) for fit in fits for v in (fit.rate, np.exp(fit.log_scale), fit.r2)]
    return dict(zip(FITS, values, strict=True))


# What is shown.

LABELS = {"extrapolated": "linear flow", "stay": "staying put", "least_squares": "best linear map"}


def _pictures(
    scores: Mapping[str, Sequence[Scores]],
    noises: Sequence[Float[np.ndarray, " P"]],
    time: Float[np.ndarray, " K"],
    pairs: Pairs,
) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    K = len(time)
    start, end = (time[list(side)] for side in zip(*pairs, strict=True))
    arrays: dict[str, np.ndarray] = {"start": start, "end": end, "rank": scores[""][0].rank}
    arrays["from"], arrays["to"] = (np.array([f"{t:g}" for t in some]) for some in (time[:-1], time[1:]))
    mean = lambda who, name: np.mean([of.explained[name] for of in scores[who]], axis=0)
    shown = {name: (LABELS[name], mean("", name)) for name in PREDICTORS}
    if "untrained" in scores:
        shown["untrained"] = ("linear flow, untrained", mean("untrained", "extrapolated"))
    gaps = np.array([b - a for a, b in pairs])
    arrays["gap"] = np.unique(gaps) * (time[-1] - time[0]) / (K - 1)
    maps, lines = [], []
    for name, (label, shares) in shown.items():
        grid = np.full((K - 1, K - 1), np.nan)
        for (a, b), value in zip(pairs, shares, strict=True):
            grid[a, b - 1] = value
        arrays[f"explained_{name}"] = grid
        arrays[f"explained_{name}_by_gap"] = np.array([shares[gaps == gap].mean() for gap in np.unique(gaps)])
        maps.append(Series(label, f"explained_{name}", "to", style="heatmap", rows="from"))
        lines.append(Series(label, f"explained_{name}_by_gap", "gap", dashed=name != "extrapolated"))
    title = "How much of a later station the flow explains on held-out paths"
    figures = [Figure("explained", title, "to t + τ", "from t", tuple(maps))]
    title = "How far ahead the flow extrapolates held-out paths"
    y_label = "share of the variance"
    figures.append(
        Figure("explained_by_gap", title, "layers ahead, τ", y_label, tuple(lines), references={"the mean": 0.0})
    )
    variance = np.mean(noises, axis=0)
    fit = growth(variance, time, pairs)
    if np.isfinite(fit["lambda"]):
        arrays["variance"] = variance
        arrays["time"] = time[1:]
        arrays["variance_fitted"] = fit["alpha"] * np.exp(fit["lambda"] * time[1:])
        series = (
            Series("noise, by t", "variance", "end", style="points", colour="start"),
            Series("α exp(λ (t+τ))", "variance_fitted", "time"),
        )
        title = "Variance per coordinate that no linear map explains, and the exponential fitted to it"
        figures.append(Figure("residual_variance", title, "t + τ, layers", "variance", series, log_y=True))
    return arrays, tuple(figures)


def _conventions(
    stations: str,
    every: Int[np.ndarray, " K"],
    embedding: bool,
    at: int,
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    ranks: Int[np.ndarray, " P"],
    threshold: float,
) -> dict[str, Any]:
    fitted, scored = (sum(len(part[i]) for part in parts) for i in (0, 1))
    few = len(every) < FEWEST_STATIONS
    return {
        "stations": f"{stations}: numbers {', '.join(map(str, every))}, before the final norm, as they are; t counts "
        f"layers, and the embedding is {'t = 0' if embedding else 'left out'}",
        "points": f"one a path: the vector at position {at}, never 0, and the paths end there; flows fitted on "
        f"{fitted}, scored on {scored} others that differ from them, in {len(parts)} parts",
        "flow": "singular vectors and values, uncentred, in falling order; signs so that coordinates of the same paths "
        f"agree from station to station; directions with at least {threshold:g} of the largest singular value at both "
        f"ends: {int(ranks.min())} to {int(ranks.max())}",
        "explained": "1 - squared error / squared distance from the mean of x(t+tau) over the paths that were fitted "
        "to; mean over all pairs (t, t+tau), one_step: over neighbouring stations",
        "least_squares": "the best affine map from x(t) to x(t+tau), with a ridge chosen on the paths fitted to by "
        "leaving one out",
        "noise": "what an affine map leaves of all paths, over its degrees of freedom and coordinates"
        + (f"; not fitted: {FEW_STATIONS}" if few else ""),
        "lambda": "per layer; of alpha exp(lambda (t+tau)), by least squares in the logarithm of the noise's variance, "
        "all pairs alike; r2: of that logarithm over the pairs",
        "increment": "the same for alpha (exp(lambda (t+tau)) - exp(lambda t)); diffusion: alpha lambda, the variance "
        "per layer that it adds at t = 0, which stays finite where lambda is 0",
        "kurtosis": "of the flow's residuals: excess kurtosis along each coordinate over held-out paths, mean over "
        "coordinates and pairs; skewness: root mean square over them; drift: root mean square of the mean residual, "
        "over its standard deviation",
        "intervals": "95%, t, over the parts, in each of which everything is fitted and scored anew",
    }
