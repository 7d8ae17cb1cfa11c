"""The exact law of the beliefs of an observer who knows the world, in float64, outside jax.

After t tokens such an observer is in one of at most V^t beliefs. The *law* of the beliefs is a set of
distinct beliefs with their probabilities. It gives the ideal loss at every position, and the entropy rate
as the limit of that loss. Where the beliefs become too many, close ones are merged into their weighted
mean. Merging forgets which of them it was, so it can only raise the loss of a later token, by at most

    I(which belief; hidden state) = sum_i p_i KL(belief_i || their mean)    [nats]

(data-processing inequality: tokens depend on the past through the hidden state only). Summed over all
merges, this bounds the error of every number computed from the merged law. Only beliefs that are
distributions have this KL, so those of generalised models are merged only where they are equal.
"""

from dataclasses import dataclass

import numpy as np

_SAME = 1e-12  # beliefs closer than this are equal: float64 rounding, not a different past


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats along the last axis; entries at or below 0 (rounding) count as 0."""
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=-1)


def invariant(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bases of the left [K,N] and right [N,K] eigenvectors of `matrix` [N,N] at eigenvalue 1."""
    left, size, right = np.linalg.svd(np.eye(len(matrix)) - matrix)
    count = max(int(np.sum(size < 1e-10 * max(1.0, size[0]))), 1)
    return left[:, -count:].T, right[-count:].T


def long_run(start: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The limit of the mean of start @ matrix^t over t = 0..n-1 as n grows: start [N] -> [N]."""
    left, right = invariant(matrix)
    return (start @ right) @ np.linalg.solve(left @ right, left)


@dataclass(frozen=True)
class BeliefLaw:
    """Distinct beliefs [M,N] with probabilities [M]; `merged` bounds, in nats, what merging has cost so far."""

    probs: np.ndarray
    beliefs: np.ndarray
    merged: float = 0.0

    def loss(self, emission: np.ndarray) -> float:
        """E[-log p(next token | belief)] in nats; `emission` [V,N] maps a belief to the next token's law."""
        return float(self.probs @ entropy(self.beliefs @ emission.T))

    def after_token(self, transitions: np.ndarray, functional: np.ndarray) -> "BeliefLaw":
        """The law one token later; equal beliefs are united, which costs nothing."""
        parts = [self.beliefs @ t for t in transitions]
        beliefs = np.concatenate(parts)
        mass = beliefs @ functional
        scale = np.abs(beliefs) @ np.abs(functional)
        probs = np.tile(self.probs, len(transitions)) * mass
        # Beliefs too unlikely to move any number that is reported would only fill the budget, or underflow.
        possible = (mass > 1e-14 * scale) & (probs > 1e-30)
        beliefs = beliefs[possible] / mass[possible, None]
        return BeliefLaw(probs[possible], beliefs, self.merged)._united(np.round(beliefs / _SAME))

    def with_beliefs_of(self, other: "BeliefLaw") -> "BeliefLaw":
        """Both laws together, as parts of one."""
        beliefs = np.concatenate([self.beliefs, other.beliefs])
        probs = np.concatenate([self.probs, other.probs])
        return BeliefLaw(probs, beliefs, self.merged + other.merged)._united(np.round(beliefs / _SAME))

    def at_most(self, count: int) -> "BeliefLaw":
        """This law, or a coarser one of at most `count` beliefs. Beliefs must be distributions."""
        law, cell = self, 1e-5
        # Cells of equal size in the square root of the belief cost equal KL per unit of probability; unlikely
        # beliefs get larger cells, because what they cost is weighted by their probability.
        root = np.sqrt(np.maximum(self.beliefs, 0.0))
        rarity = np.floor(np.log2(self.probs.max() / self.probs) / 3.5)
        while len(law.probs) > count:
            law = self._united(np.column_stack([np.round(root / (cell * 2.0**rarity)[:, None]), rarity]), costly=True)
            cell *= 1.4
        return law

    def _united(self, cells: np.ndarray, costly: bool = False) -> "BeliefLaw":
        # Rows of integers are compared through one 64-bit hash each, an order of magnitude faster than
        # sorting rows. Two cells share a hash with probability below 1e-8 at a million beliefs.
        with np.errstate(over="ignore"):
            multipliers = np.random.default_rng(0).integers(1, 2**63, cells.shape[1], dtype=np.uint64) * 2 + 1
            keys = np.sum(cells.astype(np.int64).astype(np.uint64) * multipliers, axis=1, dtype=np.uint64)
        unique, group = np.unique(keys, return_inverse=True)
        probs = np.bincount(group, self.probs, len(unique))
        weighted = self.probs[:, None] * self.beliefs
        sums = np.column_stack([np.bincount(group, column, len(unique)) for column in weighted.T])
        beliefs = sums / probs[:, None]
        cost = 0.0
        if costly:
            own, mean = self.beliefs, beliefs[group]
            positive = own > 0
            ratio = np.where(positive, own, 1.0) / np.where(positive, mean, 1.0)
            cost = max(float(np.sum(weighted * np.where(positive, np.log(ratio), 0.0))), 0.0)
        return BeliefLaw(probs, beliefs, self.merged + cost)


def ideal_losses(
    transitions: np.ndarray, functional: np.ndarray, initial: np.ndarray, length: int, max_beliefs: int, mergeable: bool
) -> tuple[np.ndarray, float]:
    """Losses [t] in nats of the first `length` tokens, and a bound on their error (they are never too low).

    Fewer than `length` are computed where the beliefs outgrow `max_beliefs` and cannot be merged.
    """
    emission = transitions @ functional
    law = BeliefLaw(np.ones(1), initial[None])
    losses: list[float] = []
    for position in range(length):
        if position:
            law = law.after_token(transitions, functional)
            if len(law.probs) > max_beliefs:
                if not mergeable:
                    break
                law = law.at_most(max_beliefs)
        losses.append(law.loss(emission))
    return np.array(losses), law.merged


def closed_form(
    transitions: np.ndarray, functional: np.ndarray, starts: np.ndarray, weights: np.ndarray, max_beliefs: int = 1000
) -> float | None:
    """The entropy rate in nats where only finitely many beliefs follow the `starts` [M,N]; else None.

    The beliefs are then the states of a Markov chain, each with one successor per token, and the rate is the
    mean, under the chain's long-run law, of the entropy of the next token. Started from the hidden states this
    is the textbook formula for unifilar models, whose beliefs stay certain.
    """
    emission = transitions @ functional
    index: dict[bytes, int] = {}
    found: list[np.ndarray] = []
    edges: list[tuple[int, int, float]] = []

    def number(belief: np.ndarray) -> int:
        key = (np.round(belief, 11) + 0.0).tobytes()
        if key not in index:
            index[key] = len(found)
            found.append(belief)
        return index[key]

    origin = [number(belief) for belief in starts]
    at = 0
    while at < len(found):
        if len(found) > max_beliefs:
            return None
        probs = emission @ found[at]
        for token in np.flatnonzero(probs > 1e-13):
            edges.append((at, number(found[at] @ transitions[token] / probs[token]), probs[token]))
        at += 1
    chain = np.zeros((len(found), len(found)))
    for source, target, prob in edges:
        chain[source, target] += prob
    start = np.bincount(origin, weights, len(found))
    return float(long_run(start, chain) @ entropy(np.stack(found) @ emission.T))


def entropy_rate_bounds(
    transitions: np.ndarray, functional: np.ndarray, initial: np.ndarray, tol: float, max_beliefs: int, mergeable: bool
) -> tuple[float, float]:
    """Numbers low <= h <= high in nats, equal where there is a closed form, else at most `tol` apart if possible.

    Ordinary models: H(X_n+1 | X_1..n, S_0) <= h <= H(X_n+1 | X_1..n) in the long-run law. Generalised ones have no
    hidden state S_0, but may have tokens after which the belief is one and the same (T^(v) of rank 1): a path
    with such a token has the belief of its infinite past, and the share of these paths in the loss is a lower
    bound. n grows until the gap is below `tol`, or merging has cost that much, or the work is too much.
    """
    start = long_run(initial, transitions.sum(0))
    states = np.eye(len(start))
    rate = closed_form(transitions, functional, start[None], np.ones(1))
    if rate is None and mergeable:
        rate = closed_form(transitions, functional, states[start > 0], start[start > 0])
    if rate is not None:
        return rate, rate
    emission = transitions @ functional
    resets = np.array([np.linalg.matrix_rank(t) == 1 for t in transitions])
    above = BeliefLaw(np.ones(1), start[None])
    if mergeable:
        below = BeliefLaw(start[start > 0], states[start > 0])
    else:
        below, unsure = BeliefLaw(np.ones(0), states[:0]), above
    low, high, work = 0.0, float(np.log(len(transitions))), 0
    while high - low >= tol and below.merged <= tol and work < 60 * max_beliefs:
        above, below = above.after_token(transitions, functional), below.after_token(transitions, functional)
        if mergeable:
            above, below = above.at_most(max_beliefs), below.at_most(max_beliefs)
        elif len(above.probs) > max_beliefs:
            break
        elif resets.any():
            below = below.with_beliefs_of(unsure.after_token(transitions[resets], functional))
            unsure = unsure.after_token(transitions[~resets], functional)
        high = min(high, above.loss(emission))
        low = max(low, below.loss(emission) - below.merged)
        work += len(above.probs) + len(below.probs) + 5000
    return low, high
