"""C8: the context vector is the composed concept. In a world, the concept is the observer's belief state.

Claim: Singh, arXiv 2308.10874. Measure: an affine map from context vectors to the world's belief states, fitted by
least squares and scored by R^2 on held-out prefixes (Shai et al., arXiv 2405.15943; their picture opens the report).

What an R^2 is *not*: proof of training. Random features of a short context already hold most of its belief, so the
untrained model's R^2 stands beside every number and `excess` is the share of what it misses that training gained.
Nor does it show more than the next-step law where the belief is a linear function of that law (on Mess3 it is):
`world_law` is the R^2 of that law, and `model_law` that of the model's own.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import batches, percentiles, resampled_means
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Transformer
from jaxwalk.worlds import HiddenMarkov

FIRST = True
FOLDS = 4
RIDGES = (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Of the features' whole variance, added to the variance in each direction: redundant features get no weight."""
FLOATS = 1 << 22
"""How many numbers of stations a batch may hold."""
WIDEST = 1024
"""The most features that are regressed on at once: the fit needs the square of it in memory."""

Views = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""name -> features [B, T, F] and what they must predict [B, T, N]."""


CLAIM = "C8: a context vector is the composed concept: an affine image of it is the world's belief state."


def analyse(subject: Subject, *, paths: int = 1024, points: int = 6561, light: bool = False) -> Finding:
    """How much of the world's belief state is an affine function of the context vectors, and of each station.

    paths: sampled paths that the maps are fitted to and scored on. points: the most points in the picture. light:
    only the number that `training_walk` follows, the context vectors' own, held against the last token.
    """
    world = subject.world
    if world is None:
        raise NotApplicable("the data has no world, so no belief states are known")
    if not isinstance(world, HiddenMarkov):
        raise NotApplicable("the world has no belief states: only hidden Markov worlds do")
    models = {"": subject.model}
    if subject.untrained is not None and not light:
        models["untrained_"] = subject.untrained
    S, T, D = 2 * subject.model.depth + 1, subject.length, subject.model.width
    together = S * D <= WIDEST

    tokens = subject.paths(paths)
    beliefs = np.asarray(jax.vmap(world.beliefs)(tokens), float)[:, 1:]
    if np.ptp(beliefs.reshape(-1, beliefs.shape[-1]), axis=0).max() < 1e-6:
        raise NotApplicable("the observer of this world has the same belief after every path")
    laws = np.exp(np.asarray(jax.vmap(world.next_log_probs)(tokens), float)[:, 1:])
    permuted = np.random.default_rng(subject.seed).permutation(beliefs)
    deal = Deal.of(tokens)
    size = max(1, min(256, len(tokens), FLOATS // (S * T * D)))

    def stream() -> Iterator[tuple[np.ndarray, Views]]:
        done = 0
        for batch, count in batches(tokens, size):
            rows = slice(done, done + count)
            done += count
            truth = beliefs[rows]
            views = {
                "world_law": (laws[rows], truth),
                "last_token": (np.eye(world.vocab_size)[tokens[rows]], truth),
            }
            for prefix, model in models.items():
                stations, context, law = (np.asarray(a[:count], float) for a in _walks(model, batch))
                if not np.isfinite(context).all():
                    raise NotApplicable("context vectors: expected finite numbers, got NaN. Analyse an earlier step.")
                if light:
                    views = {"context": (context, truth), "last_token": views["last_token"]}
                    break
                views |= {f"{prefix}station_{s}": (stations[:, :, s], truth) for s in range(S)}
                views |= {f"{prefix}context": (context, truth), f"{prefix}law": (law, truth)}
                if together:
                    views[f"{prefix}all_stations"] = (stations.reshape(*stations.shape[:2], S * D), truth)
                if not prefix:
                    views["permuted"] = (context, permuted[rows])
            yield deal.folds(tokens[rows]), views

    fits, sums = cross_fit(stream)
    conventions = {
        "r2": "1 - squared error / variance, both summed over the belief's coordinates; at most 1, unbounded below",
        "held_out": (
            f"{FOLDS} folds of prefixes: each prefix is predicted by the map fitted to the other folds. Distinct "
            f"prefixes are dealt to the folds in hashed order, from length {deal.fork} on together with their first "
            f"{deal.fork} tokens, so that no prefix, and no path beyond its first tokens, is on both sides"
        ),
        "weighting": "a prefix counts as often as it was sampled, all positions alike",
        "fit": (
            f"least squares with intercept, from sums in float64, with a ridge of {RIDGES[0]:g} to {RIDGES[-1]:g} of "
            "the whole variance, chosen within the folds that are fitted to: the one that predicts each from the others"
        ),
        "interval": "95%, bootstrap over paths with the maps as fitted",
        "paths": len(tokens),
        "length": T,
        "belief": "after the tokens up to and including the position",
        "context": "after the final norm; stations before it",
    }
    r2 = {name: float(r_squared(s.mean(axis=0))) for name, s in sums.items()}
    resampled = r_squared(resampled_means(np.stack(list(sums.values()), axis=1), subject.seed))  # once: it is slow
    draws = dict(zip(sums, resampled.T, strict=True))
    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    for name, drawn in draws.items():
        low[name], high[name] = percentiles(drawn)

    if light:
        return Finding(
            name="belief_geometry",
            claim=CLAIM,
            measured={"r2": r2["context"]},
            interval={"r2": (float(low["context"]), float(high["context"]))},
            null={"last_token": r2["last_token"]},
            conventions=conventions,
            verdict=f"Context vectors hold the belief state linearly with R² {r2['context']:.4f}.",
        )

    best = max((f"station_{s}" for s in range(S)), key=r2.__getitem__)
    measured = {"r2": r2["context"], "r2_best_station": r2[best]}
    interval = {"r2": (float(low["context"]), float(high["context"]))}
    interval["r2_best_station"] = (float(low[best]), float(high[best]))
    null = {}
    if together:
        measured["r2_all_stations"] = r2["all_stations"]
        interval["r2_all_stations"] = (float(low["all_stations"]), float(high["all_stations"]))
    if subject.untrained is not None:
        gained = np.asarray(excess(draws["context"], draws["untrained_context"]))
        if np.isfinite(gained).all():
            measured["excess"] = float(excess(r2["context"], r2["untrained_context"]))
            ends = percentiles(gained)
            interval["excess"] = (float(ends[0]), float(ends[1]))
        null["untrained"] = r2["untrained_context"]
        null["untrained_best_station"] = max(r2[f"untrained_station_{s}"] for s in range(S))
        if together:
            null["untrained_all_stations"] = r2["untrained_all_stations"]
    null |= {"model_law": r2["law"], "world_law": r2["world_law"]}
    null |= {"last_token": r2["last_token"], "permuted": r2["permuted"]}

    arrays: dict[str, np.ndarray] = {"station": np.arange(S)}
    series = []
    for prefix, label in zip(models, ("trained", "untrained"), strict=False):
        sources: dict[str, Mapping[str, Any]] = {"unexplained": r2, "low": high, "high": low}
        for what, source in sources.items():
            values = [1 - source[f"{prefix}station_{s}"] for s in range(S)]
            arrays[f"{prefix}{what}_by_station"] = np.maximum(values, 1e-12)
        names = [f"{prefix}{what}_by_station" for what in ("unexplained", "low", "high")]
        series.append(Series(label, names[0], "station", low=names[1], high=names[2], dashed=bool(prefix)))
        arrays[f"{prefix}r2_by_station"] = np.array([r2[f"{prefix}station_{s}"] for s in range(S)])
    panels, picture, view = _picture(subject, models, fits, deal, beliefs, r2, points)
    arrays |= picture

    figures = (
        Figure(
            name="beliefs",
            title="The context vectors, through one affine map, beside the beliefs of an observer who knows the world",
            x_label=view[0],
            y_label=view[1],
            series=panels,
            equal_aspect=True,
            panels=True,
        ),
        Figure(
            name="belief_r2_by_station",
            title="Share of the belief that an affine map of one station leaves unexplained (1 - R², held-out)",
            x_label="station of the encoding walk (0: after the embedding)",
            y_label="1 - R²",
            series=tuple(series),
            references={
                "context vector": max(1 - r2["context"], 1e-12),
                "last token alone": max(1 - r2["last_token"], 1e-12),
            },
            log_y=True,
        ),
    )
    conventions |= {
        "excess": "(r2 - untrained) / (1 - untrained); left out where the untrained model leaves nothing to gain",
        "best_station": f"{best.replace('_', ' ')}, chosen by the R² that is reported; its null is chosen likewise",
        "world_law": "R² of the world's exact next-step law as predictor: 1 where the belief is linear in it",
        "model_law": "R² of the model's own next-step probabilities as predictor",
        "permuted": "contexts of one path against beliefs of another",
        "picture": view[2],
    }
    if not together:
        conventions["all_stations"] = f"not fitted: {S * D} features are more than {WIDEST}"
    if subject.untrained is None:
        conventions["untrained"] = "not available: this model has no step 0"
    beside = "" if subject.untrained is None else f", {null['untrained']:.4f} untrained"
    gain = f"; training closed {measured['excess']:.1%} of the gap to 1" if "excess" in measured else ""
    return Finding(
        name="belief_geometry",
        claim=CLAIM,
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=figures,
        verdict=(
            f"Context vectors hold the belief state linearly with R² {measured['r2']:.4f} "
            f"[{interval['r2'][0]:.4f}, {interval['r2'][1]:.4f}] on held-out prefixes ({null['last_token']:.4f} from "
            f"the last token, {null['world_law']:.4f} from the exact next-step law{beside}){gain}."
        ),
    )


def excess(r2: float | np.ndarray, untrained: float | np.ndarray) -> float | np.ndarray:
    """The share of what the untrained model leaves unexplained that is explained; NaN where it leaves nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.asarray(1 - untrained, float)
        return np.where(left > 1e-9, (r2 - untrained) / left, np.nan)[()]


@jax.jit
def _walks(model: Transformer, tokens: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
    """Stations [B, T, S, D], context vectors [B, T, D] and next-step probabilities [B, T, V]."""

    def one(path: Array) -> tuple[Array, Array, Array]:
        walk = model.walk(path)
        return walk.stations.swapaxes(0, 1), walk.context, jax.nn.softmax(jax.vmap(model.logits)(walk.context))

    return jax.vmap(one)(tokens)


# Folds of prefixes.


def _mixed(x: UInt[np.ndarray, "..."]) -> UInt[np.ndarray, "..."]:
    """A bijection of 64-bit integers that looks random (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def prefix_hashes(tokens: Int[np.ndarray, "n T"]) -> UInt[np.ndarray, "n T"]:
    """A 64-bit hash of every prefix, equal for equal prefixes."""
    hashes = np.zeros(tokens.shape, np.uint64)
    state = np.zeros(len(tokens), np.uint64)
    with np.errstate(over="ignore"):
        for t in range(tokens.shape[1]):
            state = _mixed(state + tokens[:, t].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
            hashes[:, t] = state
    return hashes


@dataclass(frozen=True)
class Deal:
    """Which fold each prefix is in: prefixes of one length are dealt to the folds in the order of their hashes.

    From length `fork` on, a prefix is where its first `fork` tokens are, so that the folds hold whole paths.
    """

    fork: int
    hashes: tuple[UInt[np.ndarray, " _"], ...]
    """For each length up to `fork`, the sorted hashes of the distinct prefixes."""

    @classmethod
    def of(cls, tokens: Int[np.ndarray, "n T"]) -> "Deal":
        """A deal of all prefixes of these paths, forked where there are 16 distinct prefixes to each fold."""
        hashes = [np.unique(h) for h in prefix_hashes(tokens).T]
        fork = next((t for t, h in enumerate(hashes, 1) if len(h) >= 16 * FOLDS), len(hashes))
        return cls(fork, tuple(hashes[:fork]))

    def folds(self, tokens: Int[np.ndarray, "n T"]) -> Int[np.ndarray, "n T"]:
        """The fold of every prefix; prefixes that were not dealt are in some fold as well."""
        hashes = prefix_hashes(tokens)[:, : self.fork]
        dealt = [np.searchsorted(h, column) % FOLDS for h, column in zip(self.hashes, hashes.T, strict=False)]
        return np.stack([dealt[min(t, len(dealt) - 1)] for t in range(tokens.shape[1])], axis=1)


# Least squares, from sums.


class Affine(NamedTuple):
    """x -> x weight + offset."""

    weight: Float[np.ndarray, "F N"]
    offset: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class Moments:
    """Sums over rows that determine a least-squares fit of y [N] on x [F] with intercept. They add up."""

    count: float
    x: Float[np.ndarray, " F"]
    y: Float[np.ndarray, " N"]
    xx: Float[np.ndarray, "F F"]
    xy: Float[np.ndarray, "F N"]
    yy: float

    @classmethod
    def of(cls, x: Float[np.ndarray, "n F"], y: Float[np.ndarray, "n N"]) -> "Moments":
        """The sums over these rows."""
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, float((y * y).sum()))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def fit(self, ridge: float) -> Affine:
        """The map of least squared error, with the weights' squared norm penalised by `ridge` of the whole variance.

        With the least of `RIDGES`, where features are redundant, practically the one of least norm.
        """
        x, y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - np.outer(x, x)
        # Not by eigh: under OpenBLAS on busy cores that takes a thousand times longer than this.
        # Where all rows are alike the covariance is rounding of the second moments, and could be exactly singular.
        floor = 1e-14 * np.trace(self.xx / self.count) + np.finfo(float).tiny
        penalty = max(ridge * np.trace(covariance), floor) * np.eye(len(x))
        weight = np.linalg.solve(covariance + penalty, self.xy / self.count - np.outer(x, y))
        return Affine(weight, y - x @ weight)

    def error(self, map: Affine) -> float:
        """The summed squared error of `map` on these rows."""
        W, b = map
        fitted = np.sum(W * (self.xx @ W)) + 2 * (self.x @ W) @ b + self.count * (b @ b)
        return float(self.yy - 2 * np.sum(W * self.xy) - 2 * self.y @ b + fitted)


def cross_fit(
    stream: Callable[[], Iterator[tuple[Int[np.ndarray, "B T"], Views]]],
) -> tuple[dict[str, list[Affine]], dict[str, Float[np.ndarray, "n sums"]]]:
    """For each view, a map per fold, fitted to the *other* folds, and the sums over each path that give its R^2.

    `stream` is called twice, to fit and to score, and yields folds [B, T] and views, batch by batch.
    The sums of a path: squared error, number of positions, squared targets, targets [N].
    """
    moments: dict[str, list[Moments | None]] = {}
    for folds, views in stream():
        for name, (x, y) in views.items():
            held = moments.setdefault(name, [None] * FOLDS)
            for fold in range(FOLDS):
                chosen = folds == fold
                if chosen.any():
                    new, old = Moments.of(x[chosen], y[chosen]), held[fold]
                    held[fold] = new if old is None else old + new
    fits = {name: _fits_without_each(held) for name, held in moments.items()}
    sums: dict[str, list[np.ndarray]] = {name: [] for name in fits}
    for folds, views in stream():
        for name, (x, y) in views.items():
            error = (predict(fits[name], x, folds) - y) ** 2
            counts = np.full(len(y), y.shape[1], float)
            columns = (error.sum((1, 2)), counts, (y**2).sum((1, 2)), *y.sum(1).T)
            sums[name].append(np.stack(columns, axis=1))
    return fits, {name: np.concatenate(s) for name, s in sums.items()}


def _fits_without_each(held: list[Moments | None]) -> list[Affine]:
    """For each fold, the map fitted to the others, with the ridge that predicts each of these best from the rest."""
    known = {fold: moments for fold, moments in enumerate(held) if moments is not None}

    @functools.cache
    def fit(left_out: frozenset[int], ridge: float) -> Affine:
        kept = [moments for fold, moments in known.items() if fold not in left_out]
        if not kept:
            raise NotApplicable("the world has too few distinct paths to hold any out")
        return functools.reduce(Moments.__add__, kept).fit(ridge)

    fits = []
    for fold in range(FOLDS):
        others = known.keys() - {fold}
        if len(others) < 2:
            fits.append(fit(frozenset([fold]), RIDGES[0]))
            continue

        def error(ridge: float, fold: int = fold, others: Collection[int] = others) -> float:
            return sum(known[other].error(fit(frozenset([fold, other]), ridge)) for other in others)

        fits.append(fit(frozenset([fold]), min(RIDGES, key=error)))
    return fits


def predict(fits: list[Affine], x: Float[np.ndarray, "B T F"], folds: Int[np.ndarray, "B T"]) -> np.ndarray:
    """Each row of x through the map of its fold, [B, T, N]."""
    every = np.stack([x @ fit.weight + fit.offset for fit in fits], axis=2)
    return np.take_along_axis(every, folds[:, :, None, None], axis=2)[:, :, 0]


def r_squared(sums: Float[np.ndarray, "... sums"]) -> Float[np.ndarray, "..."]:
    """R^2 from sums, or means, of the columns that `cross_fit` gives."""
    error, count, square, total = sums[..., 0], sums[..., 1], sums[..., 2], sums[..., 3:]
    return np.asarray(1 - error / (square - (total**2).sum(-1) / count))


# The picture.


def _picture(
    subject: Subject,
    models: Mapping[str, Transformer],
    fits: Mapping[str, list[Affine]],
    deal: Deal,
    beliefs: Float[np.ndarray, "n T N"],
    r2: Mapping[str, float],
    points: int,
) -> tuple[tuple[Series, ...], dict[str, np.ndarray], tuple[str, str, str]]:
    """Panels, their arrays, and (label of x, label of y, convention): one point a word, coloured by its belief."""
    world, T = subject.world, subject.length
    V = world.vocab_size
    depth = max(d for d in range(1, T + 1) if d == 1 or V**d <= points)
    words = np.stack(np.unravel_index(np.arange(V**depth), (V,) * depth), axis=1)
    true = np.asarray(jax.vmap(world.beliefs)(words), float)[:, -1]
    possible = np.isfinite(true).all(axis=1)
    words, true = words[possible], true[possible]
    project, colour, view = _projection(beliefs.reshape(-1, beliefs.shape[-1]))
    arrays = {"words": words, "true_beliefs": true, "colour": colour(true)}

    def panel(name: str, label: str, predicted: np.ndarray) -> Series:
        xy = project(true, predicted)
        arrays[f"{name}_x"], arrays[f"{name}_y"] = xy.T
        return Series(label, f"{name}_y", f"{name}_x", style="points", colour="colour")

    panels = [panel("true", "The world's beliefs", true)]
    size = min(256, len(words))
    folds = deal.folds(words)[:, -1:]
    for prefix, label in zip(models, ("Trained model", "Untrained model"), strict=False):
        contexts = [np.asarray(_walks(models[prefix], batch)[1][:count, -1]) for batch, count in batches(words, size)]
        context = np.concatenate(contexts).astype(float)[:, None]
        predicted = predict(fits[f"{prefix}context"], context, folds)[:, 0]
        arrays[f"{prefix}beliefs"] = predicted
        panels.append(panel(prefix or "trained_", f"{label}, R² {r2[f'{prefix}context']:.4f}", predicted))
    what = f"one point for each possible word of {depth} tokens, coloured by its true belief, by maps not fitted to it"
    return tuple(panels), arrays, (view[0], view[1], f"{view[2]}; {what}")


def _projection(
    beliefs: Float[np.ndarray, "n N"],
) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray], tuple[str, str, str]]:
    """How beliefs are drawn: (true, shown) -> [n, 2]; true -> colours [n, 3]; and what the axes are."""
    if beliefs.shape[1] == 3 and beliefs.min() > -1e-6 and np.allclose(beliefs.sum(1), 1, atol=1e-5):
        corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
        return (
            lambda true, shown: shown @ corners,
            lambda true: np.clip(true, 0, 1),
            ("belief state, drawn in the triangle of the three hidden states", "", "triangle of the three states"),
        )
    mean = beliefs.mean(0)
    _, lengths, axes = np.linalg.svd(beliefs - mean, full_matrices=False)
    axes = axes[: max(1, min(3, int((lengths > 1e-6 * lengths[0]).sum())))]
    scores = (beliefs - mean) @ axes.T
    low, span = scores.min(0), np.ptp(scores, axis=0)

    def colour(true: np.ndarray) -> np.ndarray:
        scaled = np.clip(((true - mean) @ axes.T - low) / span, 0, 1)
        return np.pad(scaled, ((0, 0), (0, 3 - scaled.shape[1])), constant_values=0.5)

    if len(axes) == 1:
        return (
            lambda true, shown: np.column_stack([(true - mean) @ axes[0], (shown - mean) @ axes[0]]),
            colour,
            ("true belief, its one component", "belief shown", "the beliefs lie on a line: shown against true"),
        )
    return (
        lambda true, shown: (shown - mean) @ axes[:2].T,
        colour,
        (
            "belief state, first principal component",
            "second principal component",
            "principal components of the beliefs",
        ),
    )
