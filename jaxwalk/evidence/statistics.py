"""Statistics: bootstrap intervals over paths, variance explained, permutation tests. In float64 numpy with fixed seeds.

Positions of one path are not independent, so intervals resample paths.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxwalk.evidence.finding import NotApplicable

RESAMPLES = 1000


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


class GTest(NamedTuple):
    """A likelihood-ratio test.

    Attributes:
        statistic: G = 2 sum of count log(count / expected).
        p_value: uniform on [0, 1] if the counts come from the law.
    """

    statistic: float
    p_value: float


def g_test(counts: Int[np.ndarray, " K"], law: Float[np.ndarray, " K"], draws: int = 1999, seed: int = 0) -> GTest:
    """Likelihood-ratio test of counts against probabilities, by simulation: cells may expect any number of counts.

    Args:
        counts: [K].
        law: [K], the probabilities, up to normalisation.
        draws: the number of samples of the law that the counts are compared with. Ties count at random, so that p is
            uniform on 1, ..., draws + 1, over draws + 1.
        seed: of these samples.

    Raises:
        NotApplicable: if only one cell is possible.
    """
    counts, law = np.asarray(counts, np.int64), np.asarray(law, float) / np.sum(law)
    if np.count_nonzero(law) < 2:
        raise NotApplicable("g_test: expected two possible cells, got one: the law leaves no choice.")
    n, rng = int(counts.sum()), np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        log_expected = np.log(law) + math.log(max(n, 1))

    def statistic(cell: np.ndarray, count: np.ndarray) -> np.ndarray:
        return 2 * count * (np.log(count) - log_expected[cell])

    present = np.flatnonzero(counts)
    observed = float(statistic(present, counts[present]).sum())
    edges = np.cumsum(law)[:-1]
    simulated = np.zeros(draws)
    most = max(1, (1 << 22) // max(n, 1))
    for start in range(0, draws, most):
        rows = min(most, draws - start)
        cells = np.searchsorted(edges, rng.random((rows, n)), side="right") + len(law) * np.arange(rows)[:, None]
        cell, count = np.unique(cells, return_counts=True)
        terms = statistic(cell % len(law), count)
        simulated[start : start + rows] = np.bincount(cell // len(law), terms, minlength=rows)
    tie = np.isclose(simulated, observed, rtol=1e-9, atol=1e-9)
    larger = int((simulated[~tie] > observed).sum()) + int(rng.integers(0, int(tie.sum()) + 1))
    return GTest(observed, (1 + larger) / (1 + draws))
