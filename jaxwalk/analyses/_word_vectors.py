"""Arrangements of vectors, and measures of how words of one category lie in them, by the cosine of their vectors."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

ARRANGEMENTS = ("centred", "raw", "minus_top", "whitened")
MEASURES = ("precision", "auc", "silhouette", "direction_auc")
FOLDS = 5
CHUNK = 1 << 13
"""Vectors that are looked at together."""


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


def principal_coordinates(cosine: Float[np.ndarray, "W W"], dimensions: int) -> Float[np.ndarray, "W dimensions"]:
    """The coordinates of unit vectors with these cosines along their first principal components."""
    centred = cosine - cosine.mean(0)
    values, basis = np.linalg.eigh(centred - centred.mean(1, keepdims=True))
    return (basis * np.sqrt(values.clip(0)))[:, ::-1][:, :dimensions]
