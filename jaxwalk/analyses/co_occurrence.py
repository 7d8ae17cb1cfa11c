"""C5: the nearness of two token vectors gives the co-occurrence of the two tokens.

Claim: Singh, arXiv 2308.10874. Co-occurrence is the pointwise mutual information of a at one place and b at most
`window` places later (Church and Hanks 1990), counted in held-out text or fresh paths of a world. Measures: Spearman
and Pearson correlation, over the pairs that occur often enough, of PMI with the nearness of e_a and e_b (dot product,
cosine, cosine without the mean of all vectors, minus the distance) and of e_a with the output vector u_b.

Nearness of two token vectors knows no order, and so can tell only of the part of PMI that is the same both ways.

Nulls: vectors permuted over tokens (Mantel 1967: pairs share tokens and are not independent, so that tokens are
permuted and not pairs); permuted among tokens of like frequency; the log of the product of frequencies as the only
predictor, since pairs that occur at least so often have a PMI that falls with it; the untrained model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jaxwalk.config import ConfigError
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.statistics import permutation_p, permute_within, quantile_groups
from jaxwalk.evidence.subject import Subject

BLOCKS = 64
"""Of paths, each of which is left out once for the intervals."""
GROUPS = 10
"""Of tokens of like frequency."""
FEWEST_TOKENS, FEWEST_PAIRS = 5, 10
DRAWN = 600
"""Pairs that the figure shows."""
KINDS = ("spearman", "pearson")
LABELS = {
    "centred_cosine": "centred cosine",
    "cosine": "cosine",
    "dot": "dot product",
    "distance": "minus distance",
    "input_output": "token · output",
}
BARS = {
    "": "this model",
    "untrained": "untrained model",
    "permuted": "vectors permuted over tokens",
    "frequency_matched": "vectors permuted among tokens of like frequency",
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
    permutations: int = 199,
) -> Finding:
    """How well the nearness of token vectors orders pairs of tokens by how much they co-occur.

    window: the largest distance, in tokens, of a pair; pairs at distance 1 are measured apart, too. tokens: how many
    are counted at most. least: occurrences that make a pair. pairs, most: the most pairs, and the most tokens they
    are made of, that are measured, the most frequent ones. smoothing: added to the occurrences of a pair and to
    those expected, so that PMI of rare pairs is near 0. Raises ConfigError for options out of range.
    """
    V = subject.model.vocab_size
    for option, value in {"window": window, "least": least}.items():
        if value < 1:
            raise ConfigError(f"{option}: expected at least 1, got {value}.")
    if smoothing <= 0:
        raise ConfigError(
            f"smoothing: expected more than 0, got {smoothing}: pairs that occur in one path have no log."
        )
    if subject.world is None and subject.store is None:
        raise NotApplicable(f"it needs paths in which tokens co-occur: {subject.no_data}")
    T = subject.length
    if T < 2:
        raise NotApplicable("paths have one token, and no pairs")
    if V < FEWEST_TOKENS:
        raise NotApplicable(f"with {V} tokens there are too few ways of giving vectors to them to compare with")
    window = min(window, T - 1)
    rows, segments = _paths(subject, tokens, T)
    select = {"least": least, "pairs": pairs, "most": most}
    seen = {"": _correlate(subject, count_pairs(rows, segments, V, window=window, **select), smoothing, permutations)}
    if window > 1:
        try:
            adjacent = count_pairs(rows, segments, V, window=1, **select)
            seen["_adjacent"] = _correlate(subject, adjacent, smoothing, permutations)
        except NotApplicable:  # fewer occur so near to each other
            pass
    main = seen[""]
    names, K = main.names, len(main.pmi)

    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {"predictor": np.array([LABELS[name] for name in names])}
    for suffix, one in seen.items():
        for c, kind in enumerate(KINDS):
            for n, name in enumerate(names):
                key = f"{kind}_{name}{suffix}"
                measured[key] = float(one.table[""][n, c])
                interval[key] = (float(one.table["low"][n, c]), float(one.table["high"][n, c]))
                every = not suffix and c == 0
                for column in one.table:
                    if column not in ("", "low", "high") and (every or column in ("permuted_p", "untrained")):
                        null[f"{key}.{column}"] = float(one.table[column][n, c])
                null[f"{key}.frequency"] = float(one.frequency[c])
        arrays |= {f"correlation{suffix}{'_' if column else ''}{column}": v for column, v in one.table.items()}
        arrays |= {f"pairs{suffix}": one.counts.pairs, f"pmi{suffix}": one.pmi}
        arrays[f"times{suffix}"] = one.counts.joint.sum(0)

    few = np.random.default_rng(subject.seed).permutation(K)[:DRAWN]
    arrays["shown_near"], arrays["shown_pmi"] = main.near[few], main.pmi[few]
    arrays["shown_text"] = np.array([" ".join(subject.symbol(int(v)) for v in p) for p in main.counts.pairs[few]])
    series = []
    for column, label in BARS.items():
        if column in main.table:
            y = f"spearman{'_' if column else ''}{column}"
            arrays[y] = main.table[column][:, 0]
            series.append(Series(label, y, "predictor", style="bars", dashed=True))
    arrays["spearman_low"], arrays["spearman_high"] = main.table["low"][:, 0], main.table["high"][:, 0]
    series[0] = Series("this model", "spearman", "predictor", style="bars", low="spearman_low", high="spearman_high")
    key = f"spearman_{names[0]}"
    figures = (
        Figure(
            "correlation",
            f"How well the nearness of two token vectors orders pairs by their PMI within {window} tokens",
            "nearness",
            "Spearman correlation with PMI",
            tuple(series),
            references={"log frequency product": null[f"{key}.frequency"]},
        ),
        Figure(
            "pairs",
            f"Nearness of the vectors of two tokens against how much they co-occur, in {len(few)} pairs",
            LABELS[names[0]],
            "PMI, nats",
            (Series("pairs", "shown_pmi", "shown_near", style="points", text="shown_text"),),
        ),
    )
    conventions: dict[str, Any] = {
        "pmi": (
            f"log((n_ab + s) / (n_a n_b / N + s)) in nats, s = {smoothing:g}: of a at one place and b at most {window} "
            "tokens later, in one document"
        ),
        "adjacent": "names that end in _adjacent: b directly after a"
        if "_adjacent" in seen or window == 1
        else "not measured apart: too few pairs occur so near to each other",
        "pairs": (
            f"{K} ordered pairs of {len(np.unique(main.counts.pairs))} tokens: those that occur {least} times or more, "
            f"at most {pairs}, of the {min(most, V)} most frequent tokens; a token with itself is none. Which pairs "
            "occur often enough depends on their PMI, and the more so the rarer their tokens: hold the numbers against "
            "`frequency` and `frequency_matched`"
        ),
        "counted": f"{int((segments > 0).sum())} tokens in {len(rows)} "
        + ("paths of the world" if subject.world is not None else "windows of the validation split, in a row"),
        "centred_cosine": "of token vectors minus the mean of all of them",
        "distance": "minus the Euclidean distance of e_a and e_b",
        "input_output": "e_a . u_b, U centred over the vocabulary"
        if "input_output" in names
        else "not measured: the output vectors are the token vectors",
        "order": "nearness of token vectors is that of (b, a), too, and PMI is not; input_output knows the order",
        "permuted": f"vectors permuted over tokens (Mantel): mean of {permutations}, and one-sided p-value, add-one",
        "frequency_matched": f"the same within {main.groups} groups of tokens of like frequency in these paths",
        "frequency": "log f_a + log f_b as the only predictor",
        "untrained": "its own vectors, the same pairs"
        if subject.untrained is not None
        else "not available: this model has no step 0",
        "other_nulls": "the nulls of all but the first numbers that are not here are in the arrays correlation_*",
        "nulls": "of the measured number before the dot",
        "intervals": (
            f"95%, by leaving out each of {len(main.counts.joint)} blocks of paths once (jackknife): a bootstrap would "
            "add noise to the PMI of every pair, and so move every correlation to 0. Pairs and tokens are held as they "
            "are: it is the permutations that say what other vectors would do"
        ),
    }
    low, high = interval[key]
    beside = f", untrained {null[f'{key}.untrained']:.3f}" if f"{key}.untrained" in null else ""
    said = ""
    if null[f"{key}.permuted_p"] > 0.95:
        said = " Tokens whose vectors are near co-occur less than permuted ones do: the opposite of the claim."
    elif null[f"{key}.permuted_p"] > 0.05:
        said = " Permuted tokens do as well: this is no evidence."
    elif null[f"{key}.frequency_matched_p"] > 0.05:
        said = " Tokens of like frequency do as well: this is no evidence."
    return Finding(
        name="co_occurrence",
        claim="C5: proximity of token vectors to each other gives the co-occurrence of tokens.",
        measured=measured,
        interval=interval,
        null=null,
        conventions=conventions,
        arrays=arrays,
        figures=figures,
        verdict=(
            f"Over {K} pairs of tokens, {LABELS[names[0]]} has the rank correlation {measured[key]:.3f} [{low:.3f}, "
            f"{high:.3f}] with PMI within {window} tokens (permuted tokens {null[f'{key}.permuted']:.3f}, "
            f"p = {null[f'{key}.permuted_p']:.3g}; of like frequency {null[f'{key}.frequency_matched']:.3f}, "
            f"p = {null[f'{key}.frequency_matched_p']:.3g}; log-frequency alone {null[f'{key}.frequency']:.3f}"
            f"{beside}).{said}"
        ),
    )


def _paths(subject: Subject, tokens: int, T: int) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "n T"]]:
    """About as many tokens, in paths of T, and their segments: no token of a text is in two."""
    n = max(BLOCKS, tokens // T)
    if subject.world is not None:
        rows = np.asarray(subject.paths(n, T))
        return rows, np.ones_like(rows)
    rows, segments = (np.concatenate(a) for a in zip(*subject.store.windows("validation", T, limit=n), strict=True))
    real = (segments > 0).any(1)
    if real.sum() < 8:
        raise NotApplicable(f"expected at least 8 windows of {T} tokens in the validation split, found {real.sum()}")
    return rows[real], segments[real]


class Seen(NamedTuple):
    """What pairs within one window show.

    pmi, near: [K], of the pairs, near by the first of names. names: of the predictors. table: [predictors, KINDS] of
    correlations ("" the model's, "low", "high", and those of the nulls with their p-values). frequency: [KINDS], of
    the log of the product of frequencies. groups: how many groups of tokens are of like frequency.
    """

    counts: "Counts"
    pmi: Float[np.ndarray, " K"]
    near: Float[np.ndarray, " K"]
    names: list[str]
    table: dict[str, np.ndarray]
    frequency: Float[np.ndarray, " kinds"]
    groups: int


def _correlate(subject: Subject, counts: "Counts", smoothing: float, permutations: int) -> Seen:
    used, rng = np.unique(counts.pairs), np.random.default_rng(subject.seed)
    if len(used) < FEWEST_TOKENS or len(counts.pairs) < FEWEST_PAIRS:
        raise NotApplicable(
            f"expected {FEWEST_PAIRS} pairs of {FEWEST_TOKENS} different tokens that occur often enough, found "
            f"{len(counts.pairs)} of {len(used)}. Count more tokens, or lower `least`."
        )
    a, b = np.searchsorted(used, counts.pairs).T
    whole, without = counts.pmi(smoothing)
    goals = [Goal.of(values) for values in (whole, *without)]
    frequency = counts.frequency[used]
    groups = {"permuted": np.zeros(len(used), int)}
    groups["frequency_matched"] = quantile_groups(frequency, max(1, min(GROUPS, len(used) // 4)))
    orders = {name: [permute_within(g, rng) for _ in range(permutations)] for name, g in groups.items()}
    similarity = similarities(subject.model, used)
    untrained = None if subject.untrained is None else similarities(subject.untrained, used)
    names = [name for name in LABELS if name in similarity]
    found: dict[str, list[np.ndarray]] = {}
    nearest = similarity[names[0]]()[a, b]
    for name in names:
        near = similarity[name]()
        if not np.isfinite(near).all():
            raise NotApplicable("token vectors: expected finite numbers, got NaN. Analyse an earlier step.")
        values = correlations(near[a, b], goals)
        low, high = jackknife_interval(values[0], values[1:])
        columns = {"": values[0], "low": low.clip(-1), "high": high.clip(max=1)}
        if untrained is not None:
            columns["untrained"] = correlations(untrained[name]()[a, b], goals[:1])[0]
        for null, permuted in orders.items():
            draws = np.stack([correlations(near[order[a], order[b]], goals[:1])[0] for order in permuted])
            columns[null], columns[f"{null}_p"] = draws.mean(0), permutation_p(values[0], draws)
        for column, pair in columns.items():
            found.setdefault(column, []).append(pair)
    table = {column: np.stack(parts) for column, parts in found.items()}
    alone = correlations(np.log(frequency[a]) + np.log(frequency[b]), goals[:1])[0]
    return Seen(counts, whole, nearest, names, table, alone, int(groups["frequency_matched"].max()) + 1)


# Counts.


class Counts(NamedTuple):
    """Of K pairs of tokens, in G blocks of paths, how often each occurs: what PMI is made of.

    pairs: [K, 2], a and b. joint, first, second: [G, K], pairs (a, b), pairs (a, anything), pairs (anything, b).
    total: [G], all pairs. frequency: [V], tokens.
    """

    pairs: Int[np.ndarray, "K 2"]
    joint: Float[np.ndarray, "G K"]
    first: Float[np.ndarray, "G K"]
    second: Float[np.ndarray, "G K"]
    total: Float[np.ndarray, " G"]
    frequency: Int[np.ndarray, " V"]

    def pmi(self, smoothing: float) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "G K"]]:
        """PMI of every pair in nats, by all blocks, and by all but each one.

        log((n_ab + s) / (n_a n_b / N + s)): how much more often it occurs than if a and b were independent.
        """
        sums = [(a.sum(0), a.sum(0) - a) for a in (self.joint, self.first, self.second, self.total[:, None])]
        whole, without = (
            np.log((joint + smoothing) / (first * second / total + smoothing))
            for joint, first, second, total in zip(*sums, strict=True)
        )
        return whole, without


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

    Kept are those of two different tokens that occur `least` times, at most `pairs` of them, the most frequent. Only
    pairs that occur are ever held.
    """
    frequency = np.bincount(tokens[segments > 0], minlength=V)
    M = min(most, V)
    chosen = np.sort(np.argsort(-frequency, kind="stable")[:M])
    ids = np.full(V, M)  # M is all others
    ids[chosen] = np.arange(M)
    blocks = np.array_split(np.arange(len(tokens)), min(BLOCKS, len(tokens)))
    sides = np.zeros((2, len(blocks), M + 1))
    found = []
    for g, block in enumerate(blocks):
        a, b = _pairs_in(ids[tokens[block]], segments[block], window)
        for side, token in zip(sides, (a, b), strict=True):
            side[g] = np.bincount(token, minlength=M + 1)
        kept = (a < M) & (b < M) & (a != b)
        found.append(np.unique(a[kept].astype(np.int64) * M + b[kept], return_counts=True))
    codes, index = np.unique(np.concatenate([c for c, _ in found]), return_inverse=True)
    times = np.bincount(index, np.concatenate([n for _, n in found]), minlength=len(codes))
    order = np.argsort(-times, kind="stable")[: min(pairs, int((times >= least).sum()))]
    codes = np.sort(codes[order])
    joint = np.zeros((len(blocks), len(codes)))
    for g, (seen, n) in enumerate(found):
        place = np.searchsorted(codes, seen)
        there = place < len(codes)
        there[there] = codes[place[there]] == seen[there]
        joint[g, place[there]] = n[there]
    a, b = np.divmod(codes, M)
    return Counts(
        np.stack([chosen[a], chosen[b]], axis=1), joint, sides[0][:, a], sides[1][:, b], sides[0].sum(1), frequency
    )


def _pairs_in(
    tokens: Int[np.ndarray, "n T"], segments: Int[np.ndarray, "n T"], window: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    firsts, seconds = [], []
    for d in range(1, min(window, tokens.shape[1] - 1) + 1):
        inside = (segments[:, :-d] == segments[:, d:]) & (segments[:, d:] > 0)
        firsts.append(tokens[:, :-d][inside])
        seconds.append(tokens[:, d:][inside])
    return np.concatenate(firsts), np.concatenate(seconds)


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


class Goal(NamedTuple):
    """What nearness is correlated with, as ranks and as it is: [K] each, of mean 0 and length 1."""

    ranks: Float[np.ndarray, " K"]
    values: Float[np.ndarray, " K"]

    @classmethod
    def of(cls, values: Float[np.ndarray, " K"]) -> "Goal":
        """The goal with these values."""
        return cls(_unit(stats.rankdata(values)), _unit(values))


def correlations(x: Float[np.ndarray, " K"], goals: list[Goal]) -> Float[np.ndarray, "goals 2"]:
    """Spearman and Pearson correlation of x with each goal; 0 where one of the two is constant."""
    ranks, values = _unit(stats.rankdata(x)), _unit(x)
    return np.array([[ranks @ goal.ranks, values @ goal.values] for goal in goals])


def _unit(x: np.ndarray) -> Float[np.ndarray, " K"]:
    x = x.astype(np.float64) - x.mean(dtype=np.float64)
    norm = np.linalg.norm(x)
    return x / norm if norm > 0 else x


def jackknife_interval(whole: np.ndarray, without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of a smooth statistic from its values with each of G blocks left out, the first axis: low, high.

    whole -+ t sqrt((G - 1) / G sum (without - mean)^2), t of G - 1 degrees of freedom.
    """
    G = len(without)
    error = np.sqrt((G - 1) / G * ((without - without.mean(0)) ** 2).sum(0))
    t = stats.t.ppf(0.975, G - 1)
    return whole - t * error, whole + t * error
