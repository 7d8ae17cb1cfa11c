"""Statistics, once: bootstrap intervals over paths, variance explained, permutations. In float64 numpy, fixed seeds.

Positions of one path are not independent, so paths are what is resampled.
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
    """Percentile interval of `statistic(*per_path)` when paths, the first axis of each array, are resampled.

    Raises NotApplicable with fewer than 8 paths, whose interval would mean nothing.
    """
    n = len(per_path[0])
    if n < 8:
        raise NotApplicable(f"bootstrap: expected at least 8 paths for an interval, got {n}. Analyse more paths.")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        chosen = rng.integers(0, n, n)
        draws.append(statistic(*(np.asarray(a)[chosen] for a in per_path)))
    low, high = np.quantile(np.asarray(draws, float), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def mean_interval(per_path: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95% bootstrap interval of the mean over paths, elementwise over the other axes: low and high."""
    return percentiles(resampled_means(per_path, seed))


def resampled_means(per_path: np.ndarray, seed: int = 0) -> np.ndarray:
    """[RESAMPLES, ...]: the means of resamples of the paths, for statistics that are functions of means.

    One seed gives the same resamples to arrays of equally many paths, so that differences are paired.
    """
    per_path = np.asarray(per_path, float)
    n = len(per_path)
    if n < 8:
        raise NotApplicable(f"bootstrap: expected at least 8 paths for an interval, got {n}. Analyse more paths.")
    # Means of resamples are weighted means: one matrix product instead of a thousand gathers.
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    return np.tensordot(weights, per_path, axes=1)


def crossed_means(losses: np.ndarray, seed: int = 0) -> np.ndarray:
    """[RESAMPLES]: means of [S, n] numbers, of every seed's model on every path, when both are resampled.

    Seeds and paths are crossed, not nested. One `seed` gives the same resamples to arrays of one shape, so that
    differences are paired.
    """
    S, n = losses.shape
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(S, np.full(S, 1 / S), RESAMPLES) / S
    paths = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    return np.einsum("rs,sn,rn->r", seeds, losses, paths, optimize=True)


def percentiles(draws: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The interval that holds the share `level` of the draws, the first axis: low and high."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low), np.asarray(high)


def batches(paths: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of exactly `size` paths, so that one compiled function takes them all, and how many of each count.

    The last one is filled up by repeating its last path.
    """
    for start in range(0, len(paths), size):
        batch = paths[start : start + size]
        yield np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)]), len(batch)


def r_squared(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Share of the variance of `actual` [n, k] (or [n]), around its mean, that `predicted` explains. At most 1."""
    residual = np.sum((actual - predicted) ** 2)
    total = np.sum((actual - actual.mean(axis=0)) ** 2)
    return float(1 - residual / total)


def permutation_p(observed: float | np.ndarray, null_draws: np.ndarray) -> np.ndarray:
    """(1 + number of draws >= observed) / (1 + draws), elementwise; draws are the first axis of `null_draws`.

    One-sided: small where the observed number is larger than permutations make it. What was observed is itself one
    of the permutations, which is what the ones are for (Phipson and Smyth 2010): the p-value is never 0.
    """
    null_draws = np.asarray(null_draws, float)
    return np.asarray((1 + (null_draws >= observed).sum(axis=0)) / (1 + len(null_draws)))


def quantile_groups(x: Float[np.ndarray, " n"] | Int[np.ndarray, " n"], groups: int) -> Int[np.ndarray, " n"]:
    """The group of each entry, from 0: `groups` groups of near equal size, of the smallest entries to the largest."""
    place = np.empty(len(x), int)
    place[np.argsort(x, kind="stable")] = np.arange(len(x))
    return place * groups // max(len(x), 1)


def permute_within(groups: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """A permutation, uniform among those that leave every entry in its group; of one group, among all."""
    permutation = np.empty(len(groups), int)
    permutation[np.argsort(groups, kind="stable")] = np.lexsort((rng.random(len(groups)), groups))
    return permutation


def g_test(counts: np.ndarray, law: np.ndarray, least: float = 5.0) -> tuple[float, int, float]:
    """Likelihood-ratio test of `counts` [n] against the probabilities `law` [n]: G, degrees of freedom, p-value.

    Cells are pooled, the rarest first, until each expects at least `least` counts, without which the chi-square
    law of G would not hold. Under the hypothesis the p-value is uniform between 0 and 1. Raises NotApplicable where
    fewer than two cells are left.
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
    if pooled < least and len(starts) > 1:  # what is left over goes with the cell before it
        starts.pop()
    counts, expected = np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)
    if len(counts) < 2:
        raise NotApplicable(f"g_test: expected two cells with {least:g} expected counts, got one. Sample more paths.")
    G, p = stats.power_divergence(counts, expected, lambda_="log-likelihood")
    return float(G), len(counts) - 1, float(p)
