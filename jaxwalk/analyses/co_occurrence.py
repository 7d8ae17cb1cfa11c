"""C5: the nearness of two token vectors gives the co-occurrence of the two tokens.

Claim: Singh, arXiv 2308.10874. Co-occurrence is the pointwise mutual information of a at one place and b at most
`window` places later (Church and Hanks 1990), counted in held-out text or fresh paths of a world. Measures: Spearman
and Pearson correlation, over the pairs that occur often enough, of PMI with the nearness of e_a and e_b (dot product,
cosine, cosine without the mean of all vectors, minus the distance) and of e_a with the output vector u_b.

Nearness of two token vectors knows no order, and so can tell only of the part of PMI that is the same both ways.

Nulls: vectors permuted over tokens (Mantel 1967: pairs share tokens and are not independent, so that tokens are
permuted and not pairs); permuted among tokens of like frequency; the log of the product of frequencies as the only
predictor, since pairs that occur at least so often have a PMI that falls with it; the untrained model. For the same
reason tokens are the units of resampling: intervals are of the jackknife that leaves out one token and all its pairs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jaxwalk.config import ConfigError
from jaxwalk.evidence.decision import Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import permute_within, quantile_groups
from jaxwalk.evidence.subject import Subject

FEWEST_PATHS = 64
GROUPS = 10
"""The most groups of tokens of like frequency."""
FEWEST_TOKENS, FEWEST_PAIRS = 5, 10
FEWEST_TO_DECIDE = 16
"""Tokens: with fewer, the correlation of a random arrangement is often as large as that of a trained one."""
SMALLEST_CORRELATION = 0.1
"""A smaller rank correlation explains less than 1% of the variance of ranks."""
SHOWN = 600
"""The number of pairs that the figure shows."""
KINDS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"spearman": stats.rankdata, "pearson": np.asarray}
LABELS = {
    "centred_cosine": "centred cosine",
    "cosine": "cosine",
    "dot": "dot product",
    "distance": "minus distance",
    "input_output": "token · output",
}
NULLS = {
    "untrained": "untrained model",
    "permuted": "vectors permuted over tokens",
    "frequency_matched": "vectors permuted among tokens of like frequency",
    "frequency": "log frequency product",
}


def analyse(
    subject: Subject,
    *,
    window: int = 4,
    tokens: int = 1 << 19,
    least: int = 10,
    pairs: int = 1 << 13,
    most: int = 1 << 12,
    smoothing: float = 1.0,
    permutations: int = 99,
) -> Finding:
    """How well the nearness of token vectors orders pairs of tokens by how much they co-occur.

    Args:
        subject: the model and its data.
        window: the largest distance, in tokens, of a pair. Pairs at distance 1 are measured apart, too.
        tokens: how many are counted at most.
        least: the fewest occurrences of a pair.
        pairs: the most pairs, the most frequent ones.
        most: the most tokens that they are made of, the most frequent ones.
        smoothing: added to the occurrences of a pair and to those expected, so that PMI of rare pairs is near 0.
        permutations: the number of each kind, whose correlations are averaged.

    Raises:
        ConfigError: for options out of range.
    """
    _check(subject, {"window": window, "least": least, "permutations": permutations}, smoothing)
    T, V = subject.length, subject.model.vocab_size
    window = min(window, T - 1)
    rows, segments = _paths(subject, tokens, T)
    select = {"least": least, "pairs": pairs, "most": most}
    main = _correlate(subject, count_pairs(rows, segments, V, window=window, **select), smoothing, permutations)
    runs = {"": main}
    if window > 1:
        try:
            adjacent = count_pairs(rows, segments, V, window=1, **select)
            runs["_adjacent"] = _correlate(subject, adjacent, smoothing, permutations, "_adjacent")
        except NotApplicable:  # fewer occur so near to each other
            pass
    arrays, figures = _figures(subject, main, window)
    for suffix, run in runs.items():
        arrays |= {f"pairs{suffix}": run.counts.pairs, f"pmi{suffix}": run.pmi, f"times{suffix}": run.counts.joint}
    conventions = _conventions(subject, main, smoothing, window, least)
    source = "paths of the world" if subject.world is not None else "windows of the validation split, in a row"
    return Finding(
        name="co_occurrence",
        claim="C5: proximity of token vectors to each other gives the co-occurrence of tokens.",
        **numbers([quantity for run in runs.values() for quantity in run.quantities.values()]),
        conventions=conventions | {"counted": f"{int((segments > 0).sum())} tokens in {len(rows)} {source}"},
        arrays=arrays,
        figures=figures,
        primary=_primary(main),
    )


def _check(subject: Subject, counts: Mapping[str, int], smoothing: float) -> None:
    """Raises ConfigError for options out of range, and NotApplicable where there are no pairs."""
    for option, value in counts.items():
        if value < 1:
            raise ConfigError(f"{option}: expected at least 1, got {value}.")
    if smoothing <= 0:
        raise ConfigError(f"smoothing: expected more than 0, got {smoothing}: pairs that never occur have no log.")
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths in which tokens co-occur: {subject.no_data}")
    if subject.length < 2:
        raise NotApplicable("paths have one token, and no pairs")
    if subject.model.vocab_size < FEWEST_TOKENS:
        raise NotApplicable(
            f"with {subject.model.vocab_size} tokens there are too few ways of giving vectors to them to compare with"
        )


def _primary(main: "Correlations") -> tuple[Contrast, ...]:
    """Nearness against arrangements that mean nothing, and against the untrained one."""
    quantity = main.quantities["spearman_centred_cosine"]
    statement = "tokens whose vectors are near co-occur more"
    m = len(np.unique(main.counts.pairs))
    if m < FEWEST_TO_DECIDE:
        reason = (
            f"{m} tokens occur in pairs, and {FEWEST_TO_DECIDE} are needed to tell an arrangement from a random one"
        )
        return (untestable("C5", statement, quantity.name, reason),)
    permuted = max(("permuted", "frequency_matched"), key=quantity.references.__getitem__)
    return tuple(
        quantity.contrast(null, "C5", statement, at_least=SMALLEST_CORRELATION, label=NULLS[null])
        for null in (permuted, "untrained")
        if null in quantity.nulls
    )


def _figures(subject: Subject, main: "Correlations", window: int) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    names, few = main.names, np.random.default_rng(subject.seed).permutation(len(main.pmi))[:SHOWN]
    bars = [main.quantities[f"spearman_{name}"] for name in names]
    ends = np.array([bar.interval or (bar.value, bar.value) for bar in bars])
    arrays = {
        "predictor": np.array([LABELS[name] for name in names]),
        "spearman": np.array([bar.value for bar in bars]),
        "spearman_low": ends[:, 0],
        "spearman_high": ends[:, 1],
        "draws": main.draws,
        "shown_near": main.near[few],
        "shown_pmi": main.pmi[few],
        "shown_text": np.array([" ".join(subject.symbol(int(v)) for v in p) for p in main.counts.pairs[few]]),
    }
    series = [Series("this model", "spearman", "predictor", "bars", "spearman_low", "spearman_high")]
    for null in [null for null in NULLS if null in bars[0].nulls]:
        arrays[f"spearman_{null}"] = np.array([bar.references[null] for bar in bars])
        series.append(Series(NULLS[null], f"spearman_{null}", "predictor", "bars", dashed=True))
    title = f"How well the nearness of two token vectors orders pairs by their PMI within {window} tokens"
    correlation = Figure("correlation", title, "nearness", "Spearman correlation with PMI", tuple(series))
    title = f"Nearness of the vectors of two tokens against how much they co-occur, in {len(few)} pairs"
    points = Series("pairs", "shown_pmi", "shown_near", style="points", text="shown_text")
    return arrays, (correlation, Figure("pairs", title, LABELS[names[0]], "PMI, nats", (points,)))


def _conventions(subject: Subject, main: "Correlations", smoothing: float, window: int, least: int) -> dict[str, Any]:
    (low, low_matched), (high, high_matched) = np.quantile(main.draws, [0.025, 0.975], axis=1)
    return {
        "pmi": (
            f"log((n_ab + s) / (n_a n_b / N + s)) in nats, s = {smoothing:g}: of a at one place and b at most {window} "
            "tokens later, in one document; names that end in _adjacent: b directly after a, if enough pairs are"
        ),
        "pairs": (
            f"{len(main.pmi)} ordered pairs of {len(np.unique(main.counts.pairs))} different tokens: the most frequent "
            f"ones that occur {least} times or more. Which do depends on PMI, and more so for rare tokens"
        ),
        "input_output": "e_a . u_b, U centred over the vocabulary"
        if "input_output" in main.names
        else "not measured: the output vectors are the token vectors",
        "permuted, frequency_matched": (
            f"means of {main.draws.shape[1]} permutations; 95% of them give centred cosine {low:.3f} to {high:.3f}, "
            f"and within {main.groups} groups of like frequency {low_matched:.3f} to {high_matched:.3f}"
        ),
        "frequency": "log f_a + log f_b as the only predictor",
        "untrained": "its own vectors, the same pairs"
        if subject.untrained is not None
        else "not available: this model has no step 0",
        "intervals": "95%, jackknife over tokens: each is left out with all its pairs, ranks held",
    }


def _paths(subject: Subject, tokens: int, T: int) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "n T"]]:
    """About as many tokens, in paths of T, and their segments: no token of a text is in two."""
    n = max(FEWEST_PATHS, tokens // T)
    if subject.world is not None:
        rows = np.asarray(subject.paths(n, T))
        return rows, np.ones_like(rows)
    rows, segments = (np.concatenate(a) for a in zip(*subject.store.windows("validation", T, limit=n), strict=True))
    real = (segments > 0).any(1)
    if real.sum() < 8:
        raise NotApplicable(f"expected at least 8 windows of {T} tokens in the validation split, found {real.sum()}")
    return rows[real], segments[real]


class Correlations(NamedTuple):
    """The correlations over the pairs within one window.

    Attributes:
        counts: the pairs.
        pmi: [K].
        near: [K], the first kind of nearness.
        quantities: by name, such as "spearman_dot"; tokens are their units.
        draws: [2, permutations], the Spearman correlations of the first kind with vectors permuted over tokens, and
            over those of like frequency.
        groups: the number of groups of tokens of like frequency.
    """

    counts: "Counts"
    pmi: Float[np.ndarray, " K"]
    near: Float[np.ndarray, " K"]
    quantities: dict[str, Quantity]
    draws: Float[np.ndarray, "2 permutations"]
    groups: int

    @property
    def names(self) -> list[str]:
        """The kinds of nearness, of pairs in the whole window."""
        return [name for name in LABELS if f"spearman_{name}" in self.quantities]


def _correlate(
    subject: Subject, counts: "Counts", smoothing: float, permutations: int, suffix: str = ""
) -> Correlations:
    """The correlations. Vectors are permuted where there is no suffix, for Spearman's."""
    used, rng = np.unique(counts.pairs), np.random.default_rng(subject.seed)
    if len(used) < FEWEST_TOKENS or len(counts.pairs) < FEWEST_PAIRS:
        raise NotApplicable(
            f"expected {FEWEST_PAIRS} pairs of {FEWEST_TOKENS} different tokens that occur often enough, found "
            f"{len(counts.pairs)} of {len(used)}. Count more tokens, or lower `least`."
        )
    a, b = np.searchsorted(used, counts.pairs).T
    pmi, frequency = counts.pmi(smoothing), counts.frequency[used]
    groups = quantile_groups(frequency, max(1, min(GROUPS, len(used) // 4)))
    orders = [[permute_within(g, rng) for _ in range(permutations)] for g in (np.zeros(len(used), int), groups)]
    near = similarities(subject.model, used)
    untrained = None if subject.untrained is None else similarities(subject.untrained, used)
    quantities, draws, first = {}, [], np.zeros(0)
    for name, similarity in near.items():
        matrix = similarity()
        if not np.isfinite(matrix).all():
            raise NotApplicable("token vectors: expected finite numbers, got NaN. Analyse an earlier step.")
        first = first if len(first) else matrix[a, b]
        predictors = {"": matrix[a, b]} | ({} if untrained is None else {"untrained": untrained[name]()[a, b]})
        predictors["frequency"] = np.log(frequency[a]) + np.log(frequency[b])
        for kind, scale in KINDS.items():
            goal, key = scale(pmi), f"{kind}_{name}{suffix}"
            nulls: dict[str, Any] = {null: token_values(scale(x), goal, a, b) for null, x in predictors.items()}
            values = nulls.pop("")
            if kind == "spearman" and not suffix:
                drawn = [[correlation(scale(matrix[o[a], o[b]]), goal) for o in each] for each in orders]
                nulls |= dict(zip(("permuted", "frequency_matched"), np.mean(drawn, axis=1), strict=True))
                draws.append(drawn)
            quantities[key] = Quantity(key, values, nulls, "correlation")
    drawn_first = np.array(draws[0] if draws else np.zeros((2, 0)))
    return Correlations(counts, pmi, first, quantities, drawn_first, int(groups.max()) + 1)


# Counts.


class Counts(NamedTuple):
    """How often K pairs of tokens occur, which PMI is made of.

    Attributes:
        pairs: [K, 2], a and b.
        joint: [K], pairs (a, b).
        first: [K], pairs (a, anything).
        second: [K], pairs (anything, b).
        total: all pairs.
        frequency: [V], tokens.
    """

    pairs: Int[np.ndarray, "K 2"]
    joint: Float[np.ndarray, " K"]
    first: Float[np.ndarray, " K"]
    second: Float[np.ndarray, " K"]
    total: float
    frequency: Int[np.ndarray, " V"]

    def pmi(self, smoothing: float) -> Float[np.ndarray, " K"]:
        """log((n_ab + s) / (n_a n_b / N + s)), in nats: how much more often a pair occurs than if independent."""
        return np.log((self.joint + smoothing) / (self.first * self.second / self.total + smoothing))


def count_pairs(
    tokens: Int[np.ndarray, "n T"],
    segments: Int[np.ndarray, "n T"],
    V: int,
    *,
    window: int,
    least: int,
    pairs: int,
    most: int,
) -> Counts:
    """Pairs (a, b), b at most `window` tokens after a in the same segment, of the `most` most frequent tokens.

    Of those of two different tokens that occur `least` times, the `pairs` most frequent are returned.
    """
    frequency = np.bincount(tokens[segments > 0], minlength=V)
    M = min(most, V)
    chosen = np.sort(np.argsort(-frequency, kind="stable")[:M])
    ids = np.full(V, M)  # M is all others
    ids[chosen] = np.arange(M)
    sides, found = np.zeros((2, M + 1)), []
    for d in range(1, min(window, tokens.shape[1] - 1) + 1):
        inside = (segments[:, :-d] == segments[:, d:]) & (segments[:, d:] > 0)
        a, b = ids[tokens[:, :-d][inside]], ids[tokens[:, d:][inside]]
        sides += [np.bincount(a, minlength=M + 1), np.bincount(b, minlength=M + 1)]
        both = (a < M) & (b < M) & (a != b)
        found.append(np.unique(a[both].astype(np.int64) * M + b[both], return_counts=True))
    codes, index = np.unique(np.concatenate([c for c, _ in found]), return_inverse=True)
    times = np.bincount(index, np.concatenate([n for _, n in found]), minlength=len(codes))
    kept = np.sort(np.argsort(-times, kind="stable")[: min(pairs, int((times >= least).sum()))])
    a, b = np.divmod(codes[kept], M)
    ends = np.stack([chosen[a], chosen[b]], axis=1)
    return Counts(ends, times[kept], sides[0][a], sides[1][b], float(sides[0].sum()), frequency)


# Nearness of tokens, and its correlation with PMI.


def similarities(model: Any, tokens: Int[np.ndarray, " m"]) -> dict[str, Callable[[], Float[np.ndarray, "m m"]]]:
    """By name, what gives the nearness of the vectors of all pairs of `tokens`: larger is nearer, one at a time."""
    table = np.asarray(model.token_vectors, np.float32)
    E = table[tokens]
    around = E - table.mean(0)

    def cosine(rows: np.ndarray) -> np.ndarray:
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        unit = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
        return unit @ unit.T

    def distance() -> np.ndarray:
        squares = (around**2).sum(1)  # centred, as large common parts would be lost to rounding
        return -np.sqrt(np.maximum(squares[:, None] + squares - 2 * around @ around.T, 0))

    found = {
        "centred_cosine": lambda: cosine(around),
        "cosine": lambda: cosine(E),
        "dot": lambda: E @ E.T,
        "distance": distance,
    }
    if model.unembed.weight is not None:
        U = np.asarray(model.output_vectors, np.float32)
        found["input_output"] = lambda: E @ (U[tokens] - U.mean(0)).T
    return found


def correlation(x: Float[np.ndarray, " K"], y: Float[np.ndarray, " K"]) -> float:
    """Pearson's correlation; 0 where one of the two is constant."""
    return float(_correlation(np.array([len(x), *_sums(x, y).sum(axis=1)])))


def token_values(
    x: Float[np.ndarray, " K"], y: Float[np.ndarray, " K"], a: Int[np.ndarray, " K"], b: Int[np.ndarray, " K"]
) -> Float[np.ndarray, " m"]:
    """A value for each token, whose mean is the correlation of x and y over pairs (a, b), and whose spread its error.

    They are the jackknife's pseudo-values for leaving out one token with all its pairs, moved so that their mean is the
    correlation.
    """
    m = int(max(a.max(), b.max())) + 1
    sums = np.stack([np.ones(len(x)), *_sums(x, y)])
    of_token = np.stack([np.bincount(a, s, m) + np.bincount(b, s, m) for s in sums])
    whole = _correlation(sums.sum(axis=1))
    pseudo = m * whole - (m - 1) * _correlation(sums.sum(axis=1)[:, None] - of_token)
    return pseudo - pseudo.mean() + whole


def _sums(x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "5 K"]:
    """x, y, x^2, y^2 and xy, of x and y without their means."""
    x, y = (z.astype(np.float64) - z.mean(dtype=np.float64) for z in (x, y))
    return np.stack([x, y, x * x, y * y, x * y])


def _correlation(sums: Float[np.ndarray, "6 ..."]) -> Float[np.ndarray, "..."]:
    """The correlation, from the number of pairs and the five sums."""
    n, x, y, xx, yy, xy = sums
    n = np.maximum(n, 1)
    scale = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
    return np.divide(xy - x * y / n, scale, out=np.zeros_like(scale), where=scale > 1e-12 * n)
