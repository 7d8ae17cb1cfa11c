"""Cross-fitted least squares: affine maps from features to targets, scored on prefixes that they were not fitted to.

Rows are the prefixes of paths. Equal prefixes are in one fold, as equal rows on both sides would be no test.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt

from jaxwalk.evidence.finding import NotApplicable

FOLDS = 4
RIDGES = (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Of the features' whole variance, added to the variance in each direction: redundant features get no weight."""


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


class Fit(NamedTuple):
    """A cross-fitted regression.

    Attributes:
        maps: for each fold, the map fitted to the other folds.
        sums: [n, 3 + N], of each path: the squared error of its rows under the map of their fold, their number times N,
            their squared targets, and their targets. `r_squared` of their means is the held-out R^2.
    """

    maps: list[Affine]
    sums: Float[np.ndarray, "n sums"]


def cross_fit(x: Float[np.ndarray, "n T F"], y: Float[np.ndarray, "n T N"], folds: Int[np.ndarray, "n T"]) -> Fit:
    """The affine map from x to y, and its errors on the folds that it was not fitted to.

    Args:
        x: [n, T, F], the features.
        y: [n, T, N], the targets.
        folds: [n, T], the fold of each row, from 0 to FOLDS - 1.

    Raises:
        NotApplicable: if all rows are in one fold.
    """
    held = {fold: Moments.of(x[folds == fold], y[folds == fold]) for fold in np.unique(folds).tolist()}
    maps = _maps_without_each(held)
    error = (predict(maps, x, folds) - y) ** 2
    counts = np.full(len(y), y.shape[1], float)
    return Fit(maps, np.stack([error.sum((1, 2)), counts, (y**2).sum((1, 2)), *y.sum(1).T], axis=1))


def _maps_without_each(known: Mapping[int, Moments]) -> list[Affine]:
    """For each fold, the map fitted to the others, with the ridge that predicts each of these best from the rest."""

    @functools.cache
    def fit(left_out: frozenset[int], ridge: float) -> Affine:
        rest = [moments for fold, moments in known.items() if fold not in left_out]
        if not rest:
            raise NotApplicable("the world has too few distinct paths to hold any out")
        return functools.reduce(Moments.__add__, rest).fit(ridge)

    maps = []
    for fold in range(FOLDS):
        others = known.keys() - {fold}
        if len(others) < 2:
            maps.append(fit(frozenset([fold]), RIDGES[0]))
            continue

        def error(ridge: float, fold: int = fold, others: Collection[int] = others) -> float:
            return sum(known[other].error(fit(frozenset([fold, other]), ridge)) for other in others)

        maps.append(fit(frozenset([fold]), min(RIDGES, key=error)))
    return maps


def predict(
    maps: list[Affine], x: Float[np.ndarray, "n T F"], folds: Int[np.ndarray, "n T"]
) -> Float[np.ndarray, "n T N"]:
    """Each row of x through the map of its fold."""
    every = np.stack([x @ weight + offset for weight, offset in maps], axis=2)
    return np.take_along_axis(every, folds[:, :, None, None], axis=2)[:, :, 0]


def patterns(maps: list[Affine], covariance: Float[np.ndarray, "F F"]) -> list[Affine]:
    """For each map, the linear change of x that changes the prediction by a given amount.

    Of all such changes it is the least in the metric of the covariance of x, and so the likeliest (the pattern that
    belongs to a filter, Haufe et al. 2014). Directions of y in which predictions hardly vary are left as they are.
    """
    changes = []
    for weight, _ in maps:
        along = weight.T @ covariance
        inverse = np.linalg.pinv(along @ weight, rcond=1e-2, hermitian=True)
        changes.append(Affine(inverse @ along, np.zeros(len(covariance))))
    return changes


def r_squared(sums: Float[np.ndarray, "... sums"]) -> Float[np.ndarray, "..."]:
    """The held-out R^2, from the means of `Fit.sums`: 1 - squared error / variance, summed over the coordinates of y.

    The variance is that of all rows around their common mean.
    """
    error, count, square, total = sums[..., 0], sums[..., 1], sums[..., 2], sums[..., 3:]
    return np.asarray(1 - error / (square - (total**2).sum(-1) / count))


def partial_r_squared(sums: Float[np.ndarray, "... sums"]) -> Float[np.ndarray, "..."]:
    """The share of what a smaller regression leaves unexplained that a larger one explains; NaN if it leaves nothing.

    Args:
        sums: the means of `Fit.sums` of the larger regression, followed by those of the smaller one.
    """
    larger, smaller = (r_squared(half) for half in np.split(np.asarray(sums), 2, axis=-1))
    rest = 1 - smaller
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rest > 1e-9, (larger - smaller) / rest, np.nan)
