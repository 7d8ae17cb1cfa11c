"""Statistics, once: bootstrap intervals over paths, and variance explained. In float64 numpy, with fixed seeds.

Positions of one path are not independent, so paths are what is resampled.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def bootstrap(
    statistic: Callable[..., float | np.ndarray],
    *per_path: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    """Percentile interval of `statistic(*per_path)` when paths, the first axis of each array, are resampled.

    Raises ValueError with fewer than 8 paths, whose interval would mean nothing.
    """
    n = len(per_path[0])
    if n < 8:
        raise ValueError(f"bootstrap: expected at least 8 paths for an interval, got {n}. Analyse more paths.")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        chosen = rng.integers(0, n, n)
        draws.append(statistic(*(np.asarray(a)[chosen] for a in per_path)))
    low, high = np.quantile(np.asarray(draws, float), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def mean_interval(per_path: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95% bootstrap interval of the mean over paths, elementwise over the other axes: low and high."""
    per_path = np.asarray(per_path, float)
    n = len(per_path)
    if n < 8:
        raise ValueError(f"bootstrap: expected at least 8 paths for an interval, got {n}. Analyse more paths.")
    # Means of resamples are weighted means: one matrix product instead of a thousand gathers.
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    means = np.tensordot(weights, per_path, axes=1)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return low, high


def r_squared(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Share of the variance of `actual` [n, k] (or [n]), around its mean, that `predicted` explains. At most 1."""
    residual = np.sum((actual - predicted) ** 2)
    total = np.sum((actual - actual.mean(axis=0)) ** 2)
    return float(1 - residual / total)
