"""The shape of a cloud of points: dimension, anisotropy, hubness, spectrum, and how far groups of points gather."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

SAME = 1e-5
"""Points nearer than this, relative to their root mean square length, are one point: rounding moves them as far."""
NEIGHBOURS = 10
"""k of the k-occurrences."""
LEAST = 32
"""The fewest distinct points that neighbours are sought among."""
HALVES = 30
"""Of the paths, that the jackknife draws."""
SAMPLES = 4
"""Gaussian clouds whose numbers are averaged."""


class Cloud(NamedTuple):
    """Points [n, D], the squared distances [n, n] of their pairs, and which of them repeat no earlier one [n]."""

    points: np.ndarray
    distances: np.ndarray
    new: np.ndarray

    @classmethod
    def of(cls, x: Float[np.ndarray, "n D"]) -> "Cloud":
        """The cloud of these points."""
        return cls(x, distances(x), distinct(x))

    def part(self, rows: Int[np.ndarray, " m"]) -> "Cloud":
        """The points in these rows, with what is known of them."""
        return Cloud(self.points[rows], self.distances[np.ix_(rows, rows)], self.new[rows])


def shape(clouds: Iterable[Cloud], labels: Mapping[str, np.ndarray], least: int) -> dict[str, np.ndarray]:
    """name -> [clouds]: every number of every cloud; NaN where it is too small for one."""
    rows = []
    for x, near, new in clouds:
        near = near[np.ix_(new, new)] if new.sum() >= least else np.empty((0, 0))
        eigenvalues = spectrum(x)
        rows.append(
            {
                "dimension": _two_nn(near),
                "anisotropy": mean_cosine(x),
                "first_component": first_share(eigenvalues),
                "hubness": _hubness(near),
                "participation": participation_ratio(eigenvalues),
                **{f"convergence_{name}": convergence_index(x, label) for name, label in labels.items()},
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


class Shapes(NamedTuple):
    """Numbers of the cloud at each place.

    Attributes:
        values: name -> [places]; NaN where the cloud is too small.
        draws: name -> [places, HALVES], of random halves of the paths.
        nulls: name -> null -> [places].
        scale: what the standard deviation of `draws` is multiplied by for half a 95% interval.
    """

    values: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    nulls: dict[str, dict[str, np.ndarray]]
    scale: float


def shapes_of(
    points: Mapping[str, Float[np.ndarray, "places n D"]],
    labels: Mapping[str, np.ndarray],
    documents: Int[np.ndarray, " n"],
    seed: int,
) -> Shapes:
    """The numbers of the clouds of all models, with the nulls of the first, and those of random halves."""
    rng = np.random.default_rng(seed)
    n = len(documents)
    units = np.unique(documents, return_inverse=True)[1]
    halves = [np.flatnonzero(rng.permutation(np.max(units) + 1)[units] * 2 <= np.max(units)) for _ in range(HALVES)]
    clouds = [Cloud.of(x) for x in points[""]]
    values = {who: shape(map(Cloud.of, x), labels, LEAST) for who, x in points.items()}
    halved = [
        shape((cloud.part(half) for cloud in clouds), {k: label[half] for k, label in labels.items()}, LEAST // 4)
        for half in halves
    ]
    draws = {name: np.stack([d[name] for d in halved], axis=1) for name in values[""]}
    nulls: dict[str, dict[str, np.ndarray]] = {
        name: {who: of[name] for who, of in values.items() if who} for name in values[""]
    }
    for where, cloud in enumerate(clouds):
        samples = [Cloud.of(gaussian_like(cloud.points[cloud.new], rng)) for _ in range(SAMPLES)]
        for name, sampled in shape(samples, {}, LEAST).items():
            if name in ("dimension", "hubness", "anisotropy"):
                nulls[name].setdefault("gaussian", np.full(len(clouds), np.nan))[where] = sampled.mean()
    for name in labels:
        nulls[f"convergence_{name}"]["permuted"] = np.zeros(len(clouds))  # its mean over all permutations
    # A half's variance around the mean of halves is that of the whole; of other shares it is scaled (Shao & Wu 1989).
    size = float(np.mean([len(half) for half in halves]))
    return Shapes(values[""], draws, nulls, 1.96 * float(np.sqrt(size / (n - size))))


def distances(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n n"]:
    """Squared distances of all pairs; infinite on the diagonal, as nothing is its own neighbour."""
    x = x - x.mean(axis=0)
    squares = (x**2).sum(axis=1)
    found = np.maximum(squares[:, None] + squares - 2 * (x @ x.T), 0)
    np.fill_diagonal(found, np.inf)
    return found


def distinct(x: Float[np.ndarray, "n D"]) -> Bool[np.ndarray, " n"]:
    """Which points are at no earlier point's place, to rounding (`SAME`)."""
    near = distances(x) <= SAME**2 * (x**2).sum(axis=1).mean()
    return ~np.tril(near).any(axis=1)


def two_nn(x: Float[np.ndarray, "n D"]) -> float:
    """TwoNN dimension (n - 1) / sum log(r2 / r1) of distinct points (Facco et al. 2017); NaN for fewer than three.

    r1 and r2 are the distances of a point's two nearest. It is the dimension at the scale of those distances: noise
    that is larger counts, and near the border of a cloud of many dimensions it is too low.
    """
    return _two_nn(distances(x))


def _two_nn(near: Float[np.ndarray, "n n"]) -> float:
    if len(near) < 3:
        return np.nan
    nearest = np.partition(near, 1, axis=1)[:, :2]
    total = 0.5 * np.log(nearest[:, 1] / nearest[:, 0]).sum()
    return float((len(near) - 1) / total) if total > 0 else np.nan


def hubness(x: Float[np.ndarray, "n D"], k: int | None = None) -> float:
    """Skewness of the k-occurrences: how often each of the distinct points is among the k nearest of the others.

    0 where all are so equally often; positive where a few are hubs. k: by default 10, or a quarter of the points where
    that is less. NaN for fewer than three points.
    """
    return _hubness(distances(x), k)


def _hubness(near: Float[np.ndarray, "n n"], k: int | None = None) -> float:
    n = len(near)
    if n < 3:
        return np.nan
    k = max(1, min(NEIGHBOURS, n // 4)) if k is None else k
    nearest = np.argpartition(near, k - 1, axis=1)[:, :k]
    around = np.bincount(nearest.ravel(), minlength=n) - float(k)
    variance = (around**2).mean()
    return float((around**3).mean() / variance**1.5) if variance > 0 else 0.0


def mean_cosine(x: Float[np.ndarray, "n D"]) -> float:
    """Mean cosine over all pairs of different rows, exactly, from the sum of the unit vectors; NaN beside a zero."""
    n, size = len(x), np.linalg.norm(x, axis=1, keepdims=True)
    if n < 2 or not size.all():
        return np.nan
    return float((np.sum((x / size).sum(axis=0) ** 2) - n) / (n * (n - 1)))


def spectrum(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " k"]:
    """Eigenvalues of the covariance, falling: the min(n, D) that may differ from 0. Rounding is no variance."""
    x = centred(x)
    square = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return np.maximum(np.linalg.eigvalsh(square)[::-1], 0) / max(len(x) - 1, 1)


def centred(x: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """x around its mean; exactly 0 where all points are one, to rounding (`SAME`)."""
    around = x - x.mean(axis=0)
    return around if (around**2).sum() > SAME**2 * (x**2).sum() else np.zeros_like(around)


def first_share(eigenvalues: Float[np.ndarray, " k"]) -> float:
    """Share of the variance along the first principal component; NaN without variance."""
    total = eigenvalues.sum()
    return float(eigenvalues[0] / total) if total > 0 else np.nan


def participation_ratio(eigenvalues: Float[np.ndarray, " k"]) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: m for m equal ones; NaN without variance."""
    squares = (eigenvalues**2).sum()
    return float(eigenvalues.sum() ** 2 / squares) if squares > 0 else np.nan


def convergence_index(x: Float[np.ndarray, "n D"], labels: Int[np.ndarray, " n"]) -> float:
    """Share of the variance that lies between groups of points of one label, adjusted for their number.

    1 - (1 - R^2) (n - 1) / (n - g), where R^2 = 1 - (scatter within groups) / (scatter in all), both as traces, of n
    points in g groups (the epsilon^2 of the analysis of variance). Over all permutations of the labels its mean is 0
    exactly, so it may be below 0; 1 where the points of a group coincide. Groups of one point are left out. NaN for
    fewer than two groups, and where all points coincide.
    """
    _, group, size = np.unique(labels, return_inverse=True, return_counts=True)
    kept = size[group] > 1
    _, group, size = np.unique(labels[kept], return_inverse=True, return_counts=True)
    x, n, g = x[kept], int(kept.sum()), len(size)
    if g < 2:
        return np.nan
    x = centred(x)
    means = (np.arange(g)[:, None] == group) @ x / size[:, None]
    total, within = (x**2).sum(), ((x - means[group]) ** 2).sum()
    return float(1 - within / total * (n - 1) / (n - g)) if total > 0 else np.nan


def gaussian_like(x: Float[np.ndarray, "n D"], rng: np.random.Generator) -> Float[np.ndarray, "n D"]:
    """As many points of the Gaussian with the mean and covariance of x."""
    mean, n = x.mean(axis=0), len(x)
    return mean + rng.normal(size=(n, n)) @ (x - mean) / np.sqrt(max(n - 1, 1))


def deviation(draws: Float[np.ndarray, "... draws"]) -> Float[np.ndarray, "..."]:
    """Standard deviation over the last axis of those that are defined; NaN where fewer than two are."""
    defined = np.isfinite(draws)
    count = np.maximum(defined.sum(axis=-1), 1)
    mean = np.where(defined, draws, 0).sum(axis=-1) / count
    squares = np.where(defined, (draws - mean[..., None]) ** 2, 0).sum(axis=-1) / count
    return np.where(defined.sum(axis=-1) > 1, np.sqrt(squares), np.nan)
