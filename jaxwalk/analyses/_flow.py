"""The linear flow between the stations of walks, and the noise that it leaves. In float64 numpy."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Relative to the whole variance, for the least-squares map: the one that predicts each path best from the others."""
EXACT = 1e-10
"""A residual variance below this share of the whole is rounding, and no noise to be fitted."""

States = Float[np.ndarray, "K n D"]
Pairs = list[tuple[int, int]]


class Basis(NamedTuple):
    """Singular vectors [D, r], in columns, and values [r], falling, of the points at one station."""

    vectors: np.ndarray
    values: np.ndarray


def bases(states: Float[np.ndarray, "K n D"]) -> list[Basis]:
    """The uncentred singular bases of the points at each station, their signs aligned from station to station.

    A singular vector is known up to its sign, and a sign too many would turn the flow around: each is the one for
    which the coordinates of the same points, here and at the station before, agree.
    """
    found: list[Basis] = []
    before = None
    for x in states:
        coordinates, values, vectors = np.linalg.svd(x, full_matrices=False)
        if before is not None:
            signs = np.where((coordinates * before).sum(axis=0) < 0, -1.0, 1.0)
            coordinates, vectors = coordinates * signs, vectors * signs[:, None]
        before = coordinates
        found.append(Basis(vectors.T, values))
    return found


def kept(start: Basis, end: Basis, rank: int | None = None, threshold: float = 1e-2) -> int:
    """How many directions are carried: those whose singular value is at least `threshold` of the largest at both."""
    large = [int((basis.values >= threshold * basis.values[0]).sum()) for basis in (start, end)]
    return min([*large, *([] if rank is None else [rank])])


def extrapolate(x: Float[np.ndarray, "n D"], start: Basis, end: Basis, rank: int) -> Float[np.ndarray, "n D"]:
    """U(end) diag(sigma(end) / sigma(start)) U(start)' x of each row x, in the first `rank` directions."""
    stretch = end.values[:rank] / start.values[:rank]
    return (x @ start.vectors[:, :rank] * stretch) @ end.vectors[:, :rank].T


class Ridge:
    """Affine least squares from x [n, D], with the ridge that predicts each row best from the others."""

    def __init__(self, x: Float[np.ndarray, "n D"]) -> None:
        self.mean = x.mean(axis=0)
        self.left, self.values, self.right = np.linalg.svd(x - self.mean, full_matrices=False)

    def predict(self, y: Float[np.ndarray, "n E"], x: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "m E"]:
        """What the map fitted to the targets `y` says of other rows `x`."""
        squares = self.values**2
        if not squares.sum() > 0:
            return np.broadcast_to(y.mean(axis=0), (len(x), y.shape[1]))
        around = y - y.mean(axis=0)
        seen = self.left.T @ around

        def loss(ridge: float) -> float:
            kept = squares / (squares + ridge)
            leverage = (self.left**2) @ kept + 1 / len(y)
            return float((((around - (self.left * kept) @ seen) / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).sum())

        ridge = min((r * squares.sum() for r in RIDGES), key=loss)
        slopes = self.right.T @ ((self.values / (squares + ridge))[:, None] * seen)
        return y.mean(axis=0) + (x - self.mean) @ slopes


def moments(x: Float[np.ndarray, "n D"]) -> dict[str, float]:
    """Moments of the rows of x along each coordinate; coordinates that do not vary have neither of the first two.

    kurtosis: excess kurtosis, mean over coordinates. skewness: root mean square over them. drift: root mean square of
    the mean, over that of the standard deviation.
    """
    around = x - x.mean(axis=0)
    variance = (around**2).mean(axis=0)
    varies = variance > 1e-12 * np.max(variance)
    standard = around[:, varies] / np.sqrt(variance[varies])
    return {
        "kurtosis": float(((standard**4).mean(axis=0) - 3).mean()),
        "skewness": float(np.sqrt(((standard**3).mean(axis=0) ** 2).mean())),
        "drift": float(np.sqrt((x.mean(axis=0) ** 2).mean() / variance.mean())),
    }


def noise_variance(states: States, pairs: Pairs) -> Float[np.ndarray, " P"]:
    """The variance per coordinate that the best affine map from the first to the second station of each pair leaves.

    Unbiased, by the degrees of freedom that the map takes. NaN if it takes more than half of them, or leaves rounding.
    """
    n, D = states.shape[1:]
    around = states - states.mean(axis=1, keepdims=True)
    directions: dict[int, np.ndarray] = {}
    found = []
    for a, b in pairs:
        if a not in directions:
            left, values, _ = np.linalg.svd(around[a], full_matrices=False)
            directions[a] = left[:, values > 1e-5 * values[0]]
        U, y = directions[a], around[b]
        left_over = ((y - U @ (U.T @ y)) ** 2).sum()
        free = n - 1 - U.shape[1]
        measurable = free >= n / 2 and left_over > EXACT * (states[b] ** 2).sum()
        found.append(left_over / (free * D) if measurable else np.nan)
    return np.array(found)


def over(a: Any, b: Any) -> Any:
    """a / b; NaN where b is 0."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


class Growth(NamedTuple):
    """A fitted law of the residuals' variance, [...]: rate lambda, log of its scale, R^2 of the log variance."""

    rate: np.ndarray
    log_scale: np.ndarray
    r2: np.ndarray


def fit_exponential(end: Float[np.ndarray, " P"], log_variance: Float[np.ndarray, "... P"]) -> Growth:
    """Least squares of log variance = log alpha + lambda end (Sarfati et al.'s form); the scale is alpha."""
    return _growth(np.ones(log_variance.shape[:-1]), lambda rate: (rate[..., None] * end, end), log_variance)


def fit_increment(
    start: Float[np.ndarray, " P"], end: Float[np.ndarray, " P"], log_variance: Float[np.ndarray, "... P"]
) -> Growth:
    """Least squares of log variance = log(alpha (exp(lambda end) - exp(lambda start))), noise that adds up on the way.

    The scale is alpha lambda, so that it goes through lambda = 0, where variance is in proportion to end - start.
    """
    gap = end - start

    def law(rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # log((exp(z) - 1) / rate) for z = rate * gap, and its derivative; z = 0 by the series.
        rate = rate[..., None]
        z = rate * gap
        small = np.abs(z) < 1e-4
        safe = np.where(small, 1.0, z)
        grown = np.where(small, np.log(gap) + z / 2, np.log(gap) + np.log(np.expm1(safe) / safe))
        slope = np.where(small, gap / 2, gap * (1 / -np.expm1(-safe) - 1 / safe))
        return rate * start + grown, start + slope

    return _growth(fit_exponential(end, log_variance).rate, law, log_variance)


def _growth(rate: np.ndarray, law: Any, log_variance: np.ndarray) -> Growth:
    """Gauss-Newton steps in the rate; the log scale is what is left, as it enters linearly."""
    for _ in range(50):
        shape, slope = law(rate)
        left = log_variance - shape
        left = left - left.mean(axis=-1, keepdims=True)
        slope = np.broadcast_to(slope, left.shape)
        slope = slope - slope.mean(axis=-1, keepdims=True)
        rate = np.asarray(rate + np.clip((slope * left).sum(axis=-1) / (slope**2).sum(axis=-1), -1, 1))
    left = log_variance - law(rate)[0]
    log_scale = left.mean(axis=-1, keepdims=True)
    around = log_variance - log_variance.mean(axis=-1, keepdims=True)
    unexplained = over(((left - log_scale) ** 2).sum(axis=-1, keepdims=True), (around**2).sum(axis=-1, keepdims=True))
    return Growth(rate, log_scale[..., 0], 1 - unexplained[..., 0])
