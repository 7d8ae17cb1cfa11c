"""The Fanizza process: finite memory as a generalised model, but no finite classical or quantum one."""

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def fanizza(alpha: float = 2000.0, lamb: float = 0.49) -> HiddenMarkov:
    """Runs of b ended by an a; a run has n >= 1 of them with probability lamb^n (1 - cos(n alpha))/2, else none.

    alpha: angle in radians. Where alpha/pi is irrational, no hidden Markov model and no quantum one of finite
        dimension has this law.
    lamb: 0 < lamb <= 1/2, which keeps the probability of no b at all from being negative.

    A renewal process, since every a resets the memory: with those probabilities nonnegative, so is that of
    every path, at any length. Four dimensions with w = 1: one for the reset, one that decays, two that decay
    and rotate. Fanizza, Lumbreras & Winter 2024 (2209.11225); with transformers, Riechers et al. 2507.07432.
    """
    require(0 < lamb <= 0.5, "0 < lamb <= 1/2", lamb=lamb)
    cos, sin = np.cos(alpha), np.sin(alpha)
    b = lamb * np.array([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, cos, -sin], [0, 0, sin, cos]])
    w = np.ones(4)
    # A run of n ends with probability reset b^n stop, with stop = (I - b) w for the rows to sum to w.
    stop = w - b @ w
    decay = 1 / (2 * (1 - lamb))
    turn = -np.linalg.solve(np.eye(2) - b[2:, 2:].T, [1.0, 1.0]) / 4
    reset = np.array([1 - decay - turn.sum(), decay, *turn])
    a = np.outer(stop, reset)
    return HiddenMarkov([a, b], functional=w, symbols=("a", "b"), name="fanizza", params={"alpha": alpha, "lamb": lamb})
