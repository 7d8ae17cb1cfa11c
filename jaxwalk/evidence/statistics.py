"""Statistics: bootstrap intervals over paths, variance explained, permutation tests. In float64 numpy with fixed seeds.

Positions of one path are not independent, so intervals resample paths.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jaxwalk.evidence.finding import NotApplicable

RESAMPLES = 1000


def bootstrap(
    statistic: Callable[..., float | np.ndarray],
    *per_path: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of `statistic(*per_path)`, resampling paths.

    Args:
        statistic: a function of the resampled arrays.
        *per_path: arrays whose first axis is paths.
        seed: of the resamples.
        resamples: the number of resamples.
        level: the coverage of the interval.

    Returns:
        The interval (low, high), with the shape of the statistic.

    Raises:
        NotApplicable: if there are fewer than 8 paths, too few for a meaningful interval.
    """
    n = len(per_path[0])
    if n < 8:
        raise NotApplicable(f"bootstrap: expected at least 8 paths for an interval, got {n}. Analyse more paths.")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows = rng.integers(0, n, n)
        draws.append(statistic(*(np.asarray(a)[rows] for a in per_path)))
    low, high = np.quantile(np.asarray(draws, float), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def mean_interval(per_path: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95% bootstrap interval of the mean over paths (the first axis), elementwise over the other axes: low and high."""
    return percentiles(resampled_means(per_path, seed))


def resampled_means(per_path: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of bootstrap resamples of the paths, [RESAMPLES, ...], for statistics that are functions of means.

    Arrays with the same number of paths get the same resamples from one seed, so that differences are paired. Raises
    NotApplicable if there are fewer than 8 paths.
    """
    per_path = np.asarray(per_path, float)
    n = len(per_path)
    if n < 8:
        raise NotApplicable(f"bootstrap: expected at least 8 paths for an interval, got {n}. Analyse more paths.")
    # Means of resamples are weighted means: one matrix product instead of a thousand gathers.
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    return np.tensordot(weights, per_path, axes=1)


def crossed_means(losses: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means [RESAMPLES] of numbers [S, n], one for each seed's model and path, resampling both.

    Seeds and paths are crossed, not nested. Arrays of one shape get the same resamples from one `seed`, so that
    differences are paired.
    """
    S, n = losses.shape
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(S, np.full(S, 1 / S), RESAMPLES) / S
    paths = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    return np.einsum("rs,sn,rn->r", seeds, losses, paths, optimize=True)


def percentiles(draws: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The central interval that contains a fraction `level` of the draws (the first axis): low and high."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low), np.asarray(high)


def batches(paths: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of exactly `size` paths, so that a function is compiled once, each with its number of distinct paths.

    The last batch is filled up by repeating the last path.
    """
    for start in range(0, len(paths), size):
        batch = paths[start : start + size]
        yield np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)]), len(batch)


def r_squared(predicted: np.ndarray, actual: np.ndarray) -> float:
    """The fraction of the variance of `actual`, [n, k] or [n], around its mean that `predicted` explains. At most 1."""
    residual = np.sum((actual - predicted) ** 2)
    total = np.sum((actual - actual.mean(axis=0)) ** 2)
    return float(1 - residual / total)


def permutation_p(observed: float | np.ndarray, null_draws: np.ndarray) -> np.ndarray:
    """Permutation p-values, elementwise: (1 + number of draws >= observed) / (1 + number of draws).

    One-sided: small if the observed number is larger than under permutation. The observed order counts as one of the
    permutations, so the p-value is never 0 (Phipson and Smyth 2010).

    Args:
        observed: the observed numbers.
        null_draws: the same numbers under permutations, along a new first axis.

    Returns:
        The p-values.
    """
    null_draws = np.asarray(null_draws, float)
    return np.asarray((1 + (null_draws >= observed).sum(axis=0)) / (1 + len(null_draws)))


def quantile_groups(x: Float[np.ndarray, " n"] | Int[np.ndarray, " n"], groups: int) -> Int[np.ndarray, " n"]:
    """The group of each entry, from 0 (the smallest entries) to `groups` - 1; groups have nearly equal sizes."""
    rank = np.empty(len(x), int)
    rank[np.argsort(x, kind="stable")] = np.arange(len(x))
    return rank * groups // max(len(x), 1)


def permute_within(groups: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """A uniformly random permutation that leaves every entry in its group."""
    permutation = np.empty(len(groups), int)
    permutation[np.argsort(groups, kind="stable")] = np.lexsort((rng.random(len(groups)), groups))
    return permutation


def g_test(counts: np.ndarray, law: np.ndarray, least: float = 5.0) -> tuple[float, int, float]:
    """Likelihood-ratio test of counts against probabilities.

    Cells are pooled, the rarest first, until each expects at least `least` counts, as the chi-square approximation
    requires. Under the hypothesis the p-value is uniform on [0, 1].

    Args:
        counts: [n].
        law: [n], the probabilities, up to normalisation.
        least: the smallest expected count of a cell.

    Returns:
        G, the degrees of freedom and the p-value.

    Raises:
        NotApplicable: if fewer than two cells remain.
    """
    counts, expected = np.asarray(counts, float), np.sum(counts) * np.asarray(law, float) / np.sum(law)
    order = np.argsort(expected, kind="stable")
    counts, expected = counts[order], expected[order]
    starts, pooled = [0], 0.0
    for cell, size in enumerate(expected):
        if pooled >= least:
            starts.append(cell)
            pooled = 0.0
        pooled += size
    if pooled < least and len(starts) > 1:  # the remainder joins the previous cell
        starts.pop()
    counts, expected = np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)
    if len(counts) < 2:
        raise NotApplicable(f"g_test: expected two cells with {least:g} expected counts, got one. Sample more paths.")
    G, p = stats.power_divergence(counts, expected, lambda_="log-likelihood")
    return float(G), len(counts) - 1, float(p)
