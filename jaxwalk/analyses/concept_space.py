"""C8: embeddings are concepts: token vectors of one category lie together, and directions are features.

Claim: Singh, arXiv 2308.10874. Categories are the world's own, where it has any; else English words, or characters
where tokens are bytes, of the file `concepts.json` beside this one, or of a file of its format:

    {"categories": {"animals": ["dog", "cat", "cow", ...], "colours": ["red", ...], ...},
     "analogies": {"plural": [["dog", "dogs", "cat", "cats"], ...], ...}}

Measures, of words by the cosine of their vectors: the share of the k nearest that are of the same category, the AUC
of pairs of one category against pairs of two, silhouette (Rousseeuw 1987), the held-out AUC of a concept's
direction (difference of means), and analogies by 3CosAdd (Levy and Goldberg 2014), whose inputs are no answers.

Each for four arrangements of the vectors: raw; mean-centred; without the mean and the top principal components (Mu
and Viswanath, 1702.01417); and whitened by the causal inner product (Park et al., 2311.03658).

Nulls: permuted labels; labels permuted among words of like frequency, since frequency alone arranges vectors; the
untrained model; random vectors; and for analogies the nearest token to c, without any offset (Linzen, 1606.07736).
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from jaxwalk.analyses._concepts import Known, known_concepts
from jaxwalk.config import ConfigError
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import (
    RESAMPLES,
    percentiles,
    permutation_p,
    permute_within,
    quantile_groups,
)
from jaxwalk.evidence.subject import Subject

FOLDS = 5
GROUPS = 10
"""Of words of like frequency."""
COUNTED = 1 << 18
"""Tokens of the data in which frequencies are counted."""
CHUNK = 1 << 13
"""Token vectors that are looked at together."""
DRAWN = 6
"""Categories on the map: as many as colours are told apart."""
ARRANGEMENTS = ("centred", "raw", "minus_top", "whitened")
LABELS = {"centred": "mean-centred", "raw": "raw", "minus_top": "minus top", "whitened": "whitened"}
BARS = {
    "": "this model",
    "_untrained": "untrained model",
    "_random": "random vectors",
    "_permuted": "permuted labels",
    "_frequency_matched": "labels permuted among words of like frequency",
}
MEASURES = ("precision", "auc", "silhouette", "direction_auc")


def analyse(
    subject: Subject,
    *,
    concepts: str | os.PathLike[str] | None = None,
    k: int = 10,
    components: int = 1,
    ridge: float = 1e-3,
    words: int = 600,
    permutations: int = 199,
) -> Finding:
    """Whether vectors of one category lie together, and whether differences of means are features.

    concepts: a JSON file of categories and analogies to use instead of the world's or the shipped ones. k: of the
    nearest words, at most the smallest category less one. components: principal components that `minus_top` takes
    away. ridge: of the whitening, relative to the mean variance of a direction. words: the most that are measured.
    Raises ConfigError for a file that is not of the format, and for k below 1.
    """
    if k < 1:
        raise ConfigError(f"k: expected at least 1, got {k}.")
    model, rng = subject.model, np.random.default_rng(subject.seed)
    known = known_concepts(subject, concepts, words, rng)
    W, sizes = len(known.tokens), np.bincount(known.labels)
    k = min(k, int(np.min(sizes)) - 1)
    tied = model.unembed.weight is None
    counts = _frequencies(subject)
    groups = {"permuted": np.zeros(W, int)}
    if counts is not None:
        groups["frequency_matched"] = quantile_groups(counts[known.tokens], max(1, min(GROUPS, W // 8)))
    orders = {
        name: [permute_within(group, rng) for _ in range(permutations)] for name, group in groups.items()
    }  # the same ones for every arrangement

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {
        "arrangement": np.array([LABELS[a] for a in ARRANGEMENTS]),
        "measure": np.array(MEASURES),
        "category": np.array(known.names),
        "tokens": known.tokens,
        "labels": known.labels,
    }

    def tables(model: Any, output: bool) -> tuple[np.ndarray, np.ndarray]:
        U = np.asarray(model.output_vectors, np.float32)
        return (U if output else np.asarray(model.token_vectors, np.float32)), U

    def side(output: bool) -> dict[str, Seen]:
        suffix = "_output" if output else ""
        X, U = tables(model, output)
        if not (np.isfinite(X).all() and np.isfinite(U).all()):
            raise NotApplicable("token vectors: expected finite numbers, got NaN. Analyse an earlier step.")
        seen = {"": _see(X, U, known, k, components, ridge)}
        if subject.untrained is not None:
            seen["untrained"] = _see(*tables(subject.untrained, output), known, k, components, ridge)
        random = rng.standard_normal(X.shape, np.float32)
        seen["random"] = _see(random, random, known._replace(analogies=known.analogies[:0]), k, components, ridge)

        there = [a for a in ARRANGEMENTS if a in seen[""]]
        table = np.full((len(ARRANGEMENTS), len(MEASURES)), np.nan)
        every = {name: table.copy() for name in ("", "low", "high", "untrained", "random")}
        every |= {f"{name}{end}": table.copy() for name in groups for end in ("", "_p")}
        for a, arrangement in enumerate(there):
            mine = seen[""][arrangement]
            every[""][a] = mine.words.mean(0)
            every["low"][a], every["high"][a] = percentiles(stratified_means(mine.words, known.labels, subject.seed))
            for other in ("untrained", "random"):
                if other in seen:
                    every[other][a] = seen[other][arrangement].words.mean(0)
            for name, permuted in orders.items():
                draws = np.stack([word_scores(mine.near, known.labels[order]).mean(0) for order in permuted])
                every[name][a], every[f"{name}_p"][a] = draws.mean(0), permutation_p(every[""][a], draws)
            for m, measure in enumerate(MEASURES):
                key = f"{measure}_{arrangement}{suffix}"
                measured[key] = float(every[""][a, m])
                interval[key] = (float(every["low"][a, m]), float(every["high"][a, m]))
                for name, values in every.items():
                    shown = name not in ("", "low", "high") and np.isfinite(values[a, m])
                    if shown and (a == 0 or name in ("permuted_p", "untrained")):
                        null[f"{key}.{name}"] = float(values[a, m])
            if len(known.analogies):
                key = f"analogy_{arrangement}{suffix}"
                measured[key] = float(mine.analogies[:, 0].mean())
                low, high = percentiles(stratified_means(mine.analogies[:, :1], known.relation, subject.seed))
                interval[key] = (float(low[0]), float(high[0]))
                null[f"{key}.offset_left_out"] = float(mine.analogies[:, 1].mean())
                null[f"{key}.chance"] = 1 / (model.vocab_size - 3)
                if "untrained" in seen:
                    null[f"{key}.untrained"] = float(seen["untrained"][arrangement].analogies[:, 0].mean())
        for name, values in every.items():
            arrays[f"scores{suffix}{'_' if name else ''}{name}"] = values
        return seen[""]

    seen = side(False)
    if not tied:
        side(True)

    near = seen["centred"].near
    means = np.eye(len(sizes))[known.labels] / sizes
    own = np.diag(means.T @ near.cosine @ means)
    pairs = means.T @ near.cosine @ means
    # A word's cosine with itself is 1 and says nothing: it is taken out of the mean of its category.
    np.fill_diagonal(pairs, (own * sizes**2 - sizes) / (sizes * (sizes - 1)))
    arrays["category_cosine"] = pairs
    arrays["category_precision"] = np.bincount(known.labels, seen["centred"].words[:, 0]) / sizes
    x, y = principal_coordinates(near.cosine, 2).T
    drawn = []
    for number, c in enumerate(np.argsort(-arrays["category_precision"], kind="stable")[:DRAWN]):
        of, at = known.labels == c, f"map_{number}"
        arrays[f"{at}_x"], arrays[f"{at}_y"] = x[of], y[of]
        arrays[f"{at}_words"] = np.array([subject.symbol(int(v)) for v in known.tokens[of]])
        drawn.append(Series(known.names[c], f"{at}_y", f"{at}_x", style="points", text=f"{at}_words"))

    series = []
    for name, label in BARS.items():
        values = arrays.get(f"scores{name}", np.full((1, 1), np.nan))[:, 0]
        if np.isfinite(values).any():
            arrays[f"precision{name}"] = values
            series.append(Series(label, f"precision{name}", "arrangement", style="bars", dashed=True))
    arrays["precision_low"], arrays["precision_high"] = arrays["scores_low"][:, 0], arrays["scores_high"][:, 0]
    series[0] = Series(BARS[""], "precision", "arrangement", style="bars", low="precision_low", high="precision_high")
    figures = (
        Figure(
            "concept_precision",
            f"How many of the {k} nearest words are of the word's own category, by arrangement of the vectors",
            "arrangement of the token vectors",
            f"precision at {k}",
            tuple(series),
        ),
        Figure(
            "category_cosine",
            "Mean cosine between the words of two categories, mean-centred (on the diagonal: of two words of one)",
            "category",
            "category",
            (Series("cosine", "category_cosine", "category", style="heatmap", rows="category"),),
        ),
        Figure(
            "concept_map",
            f"Mean-centred vectors of words in the plane that shows most of all {W}"
            + ("" if len(sizes) <= DRAWN else f"; the {DRAWN} categories with the highest precision"),
            "",
            "",
            tuple(drawn),
            equal_aspect=True,
        ),
    )

    conventions: dict[str, Any] = {
        **known.conventions,
        "k": f"{k}: at most the smallest category less one; neighbours among the {W} words, not the whole vocabulary",
        "cosine": "every measure is of vectors arranged over the whole vocabulary, then scaled to length 1",
        "auc": "probability that a word of the same category is nearer than one of another; mean over words",
        "silhouette": "by cosine distance, 1 - cosine; mean over words, from -1 to 1",
        "direction_auc": (
            "a concept's direction is the mean of its words minus the mean of all others; "
            f"{min(FOLDS, int(np.min(sizes)))}-fold cross-validation, and each held-out word is compared with the "
            "held-out words of other categories; 0.5 is chance"
        ),
        "centred": "minus the mean of all token vectors",
        "minus_top": f"centred, and without the top {components} principal component(s) of all token vectors",
        "whitened": (
            "centred, times the inverse square root of the covariance of the output vectors (uniform over tokens), "
            f"plus {ridge:g} of its mean eigenvalue"
            if "whitened" in seen
            else f"not measured: {model.vocab_size} output vectors are fewer than two for each of {model.width} "
            "dimensions, and whitening would put them all about equally far apart"
        ),
        "sides": "token vectors only, which are the output vectors too: tied"
        if tied
        else "token vectors; names that end in _output are of the output vectors",
        "permuted": f"labels permuted over words: mean of {permutations} permutations, and one-sided p-value, add-one",
        "frequency_matched": (
            f"labels permuted within {int(groups['frequency_matched'].max()) + 1} groups of words of like frequency in "
            f"{int(counts.sum())} tokens of the data, in which {int((counts[known.tokens] > 0).sum())} of the {W} occur"
            if counts is not None
            else f"not available: {subject.no_data}"
        ),
        "random": "as many Gaussian vectors, arranged by their own mean and covariance",
        "untrained": "its own vectors, arranged by their own mean and covariance"
        if subject.untrained is not None
        else "not available: this model has no step 0",
        "other_nulls": "the nulls of the arrangements but the first that are not here are in the arrays scores_*",
        "nulls": "of the measured number before the dot",
        "intervals": (
            "95%, bootstrap over words within categories (analogies: over quadruples within relations), the words that "
            "each is compared with held as they are: words are the units here, not paths"
        ),
    }
    return Finding(
        name="concept_space",
        claim="C8: embeddings are concepts: nearness of token vectors is relatedness, and directions are features.",
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=figures,
        verdict=_verdict(measured, interval, null, k, W, len(sizes)),
    )


def _verdict(
    measured: Mapping[str, float],
    interval: Mapping[str, tuple[float, float]],
    null: Mapping[str, float],
    k: int,
    words: int,
    categories: int,
) -> str:
    key = "precision_centred"
    low, high = interval[key]
    held = [f"permuted labels {null[f'{key}.permuted']:.3f}, p = {null[f'{key}.permuted_p']:.3g}"]
    matched = null.get(f"{key}.frequency_matched_p")
    if matched is not None:
        held.append(f"words of like frequency {null[f'{key}.frequency_matched']:.3f}, p = {matched:.3g}")
    if f"{key}.untrained" in null:
        held.append(f"untrained {null[f'{key}.untrained']:.3f}")
    rest = {LABELS[a]: f"precision_{a}" for a in ARRANGEMENTS[1:]} | {"output vectors, mean-centred,": f"{key}_output"}
    others = ", ".join(f"{label} {measured[name]:.3f}" for label, name in rest.items() if name in measured)
    analogies = ""
    if "analogy_centred" in measured:
        analogies = (
            f" Analogies are solved in {measured['analogy_centred']:.1%} of cases, "
            f"{null['analogy_centred.offset_left_out']:.1%} without the offset."
        )
    said = ""
    if max(null[f"{key}.permuted_p"], matched or 0) > 0.05:
        said = (
            " Labels that mean nothing are grouped as well: this is no evidence of concepts."
            if null[f"{key}.permuted_p"] > 0.05
            else " Words of like frequency are grouped as well: this is no evidence of concepts."
        )
    return (
        f"Of the {k} nearest of {words} words in {categories} categories, {measured[key]:.3f} [{low:.3f}, {high:.3f}] "
        f"are of the word's own, mean-centred ({'; '.join(held)}); {others}. A concept's direction tells held-out "
        f"words from others with AUC {measured['direction_auc_centred']:.3f}.{analogies}{said}"
    )


def _frequencies(subject: Subject) -> Int[np.ndarray, " V"] | None:
    """How often each token occurs in the data that the model is trained on; None where there is no data."""
    T, V = subject.length, subject.model.vocab_size
    if subject.world is not None:
        key = jax.random.fold_in(jax.random.key(subject.seed), 0xF4E9)
        tokens = np.asarray(subject.world.sample(key, max(64, COUNTED // 4 // T), T)).ravel()
    elif subject.store is not None:
        tokens, segments = subject.store.batch(subject.seed, 0, max(64, COUNTED // T), T, split="train")
        tokens = tokens[segments > 0]
    else:
        return None
    return np.bincount(tokens, minlength=V)


# Arrangements.


class Arrangement(NamedTuple):
    """An affine map of vectors, (x - mean) matrix, after which they are scaled to length 1."""

    mean: Float[np.ndarray, " D"]
    matrix: Float[np.ndarray, "D D"] | None

    def __call__(self, rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """The rows arranged; a row at the mean stays 0."""
        rows = rows - self.mean.astype(rows.dtype)
        rows = rows if self.matrix is None else rows @ self.matrix.astype(rows.dtype)
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def arrangements(
    X: Float[np.ndarray, "V D"], U: Float[np.ndarray, "V D"], components: int = 1, ridge: float = 1e-3
) -> dict[str, Arrangement]:
    """The arrangements of X, by ARRANGEMENTS: whitened by the covariance of the output vectors U, the others by X.

    No whitening with fewer than two output vectors a dimension: it would only put them all equally far apart.
    """
    mean, covariance = moments(X)
    D = X.shape[1]
    top = np.linalg.eigh(covariance)[1][:, ::-1][:, :components]
    found = {
        "centred": Arrangement(mean, None),
        "raw": Arrangement(np.zeros(D), None),
        "minus_top": Arrangement(mean, np.eye(D) - top @ top.T),
    }
    if len(U) >= 2 * D:
        found["whitened"] = Arrangement(mean, whitening(covariance if U is X else moments(U)[1], ridge))
    return found


def moments(rows: Float[np.ndarray, "V D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean and covariance over the rows, in float64 and a part of the rows at a time."""
    mean = rows.mean(0, dtype=np.float64)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(rows), CHUNK):
        x = rows[start : start + CHUNK] - mean
        total += x.T @ x
    return mean, total / len(rows)


def whitening(covariance: Float[np.ndarray, "D D"], ridge: float) -> Float[np.ndarray, "D D"]:
    """(covariance + ridge * its mean eigenvalue * I)^(-1/2), the symmetric root: Park et al.'s causal inner product.

    Of vectors with this covariance it makes ones whose covariance is the identity, where ridge is 0.
    """
    values, basis = np.linalg.eigh(covariance)
    values = values.clip(0) + ridge * values.mean()
    return (basis / np.sqrt(np.maximum(values, np.finfo(float).tiny))) @ basis.T


# Measures.


class Nearness(NamedTuple):
    """Of W words: cosines [W, W]; each one's k nearest others [W, k]; its cosines' ranks, its own 0 and the least."""

    cosine: Float[np.ndarray, "W W"]
    neighbours: Int[np.ndarray, "W k"]
    ranks: Float[np.ndarray, "W W"]

    @classmethod
    def of(cls, unit: Float[np.ndarray, "W D"], k: int) -> "Nearness":
        """The nearness of vectors of length 1."""
        cosine = unit @ unit.T
        others = cosine.copy()
        np.fill_diagonal(others, -np.inf)
        nearest = np.argsort(-others, axis=1, kind="stable")[:, :k]
        return cls(cosine, nearest, stats.rankdata(others, axis=1) - 1)


def word_scores(near: Nearness, labels: Int[np.ndarray, " W"]) -> Float[np.ndarray, "W 4"]:
    """MEASURES of every word, whose means over words are the numbers; each category needs two words or more."""
    return np.stack([measure(near, labels) for measure in (precision, pair_auc, silhouette, direction_auc)], axis=1)


def precision(near: Nearness, labels: Int[np.ndarray, " W"]) -> Float[np.ndarray, " W"]:
    """The share of a word's k nearest words that are of its category."""
    return (labels[near.neighbours] == labels[:, None]).mean(1)


def pair_auc(near: Nearness, labels: Int[np.ndarray, " W"]) -> Float[np.ndarray, " W"]:
    """The probability that a word of the same category is nearer to a word than one of another; ties count half."""
    sizes = np.bincount(labels)
    same, W = sizes[labels] - 1, len(labels)
    ranks = (near.ranks @ np.eye(len(sizes))[labels])[np.arange(W), labels]  # a word's own rank is 0
    return (ranks - same * (same + 1) / 2) / (same * (W - 1 - same))


def silhouette(near: Nearness, labels: Int[np.ndarray, " W"]) -> Float[np.ndarray, " W"]:
    """(b - a) / max(a, b): a, b are the mean cosine distance to the own category and to the nearest other."""
    sizes, at = np.bincount(labels), np.arange(len(labels))
    distance = 1 - near.cosine
    distance[at, at] = 0
    sums = distance @ np.eye(len(sizes))[labels]
    a = sums[at, labels] / (sizes[labels] - 1)
    means = sums / sizes
    means[at, labels] = np.inf
    b = means.min(1)
    larger = np.maximum(a, b)
    return np.divide(b - a, larger, out=np.zeros_like(a), where=larger > 0)


def direction_auc(near: Nearness, labels: Int[np.ndarray, " W"]) -> Float[np.ndarray, " W"]:
    """Of each word, how often it lies further along its concept's direction than a word of another category does.

    Both are held out: the direction, the mean of the category's vectors minus the mean of all others, is of the
    words in other folds. Folds are dealt within categories.
    """
    sizes, W = np.bincount(labels), len(labels)
    place = np.empty(W, int)
    place[np.argsort(labels, kind="stable")] = np.arange(W)
    fold = (place - (np.cumsum(sizes) - sizes)[labels]) % min(FOLDS, int(np.min(sizes)))
    along = np.empty((W, len(sizes)))  # of each word, along the direction of each category
    for f in range(fold.max() + 1):
        held, fit = fold == f, np.flatnonzero(fold != f)
        one = np.eye(len(sizes))[labels[fit]]
        n = one.sum(0)
        along[held] = near.cosine[held][:, fit] @ (one / n - (1 - one) / (len(fit) - n))
    mine, theirs = along[np.arange(W), labels][:, None], along[:, labels].T
    against = (fold[:, None] == fold) & (labels[:, None] != labels)
    return ((theirs < mine) + 0.5 * (theirs == mine)).sum(1, where=against) / against.sum(1)


def solve(
    analogies: Int[np.ndarray, "Q 4"], table: Float[np.ndarray, "V D"], arrangement: Arrangement
) -> Bool[np.ndarray, "Q 2"]:
    """Whether d is the token nearest to b - a + c, and to c, of all tokens but a, b and c; by the cosine."""
    Q = len(analogies)
    a, b, c = (arrangement(table[tokens]) for tokens in analogies[:, :3].T)
    queries = np.concatenate([b - a + c, c])
    excluded = np.concatenate([analogies[:, :3]] * 2)
    best, answer = np.full(2 * Q, -np.inf), np.full(2 * Q, -1)
    for start in range(0, len(table), CHUNK):
        scores = queries @ arrangement(table[start : start + CHUNK]).T
        rows, columns = np.nonzero((excluded >= start) & (excluded < start + CHUNK))
        scores[rows, excluded[rows, columns] - start] = -np.inf
        top = scores.argmax(1)
        value = scores[np.arange(2 * Q), top]
        answer = np.where(value > best, top + start, answer)
        best = np.maximum(best, value)
    return analogies[:, 3:] == answer.reshape(2, Q).T


class Seen(NamedTuple):
    """What one arrangement of one table shows: nearness of words, their scores [W, 4], analogies solved [Q, 2]."""

    near: Nearness
    words: Float[np.ndarray, "W 4"]
    analogies: Bool[np.ndarray, "Q 2"]


def _see(X: np.ndarray, U: np.ndarray, known: Known, k: int, components: int, ridge: float) -> dict[str, Seen]:
    seen = {}
    for name, arrangement in arrangements(X, U, components, ridge).items():
        near = Nearness.of(arrangement(X[known.tokens].astype(np.float64)), k)
        solved = solve(known.analogies, X, arrangement) if len(known.analogies) else np.zeros((0, 2), bool)
        seen[name] = Seen(near, word_scores(near, known.labels), solved)
    return seen


def stratified_means(
    values: Float[np.ndarray, "N M"] | Bool[np.ndarray, "N M"], strata: Int[np.ndarray, " N"], seed: int = 0
) -> Float[np.ndarray, "R M"]:
    """Means over rows of RESAMPLES bootstrap samples, in which every stratum is resampled within itself."""
    rng = np.random.default_rng(seed)
    total = np.zeros((RESAMPLES, values.shape[1]))
    for stratum in np.unique(strata):
        rows = values[strata == stratum]
        total += rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES) @ rows
    return total / len(values)


def principal_coordinates(cosine: Float[np.ndarray, "W W"], dimensions: int) -> Float[np.ndarray, "W dimensions"]:
    """The coordinates of unit vectors with these cosines along their first principal components."""
    centred = cosine - cosine.mean(0)
    values, basis = np.linalg.eigh(centred - centred.mean(1, keepdims=True))
    return (basis * np.sqrt(values.clip(0)))[:, ::-1][:, :dimensions]
