"""Mess3: three hidden states that leave noisy traces; its belief states form a fractal in the triangle."""

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def mess3(x: float = 0.05, a: float = 0.85) -> HiddenMarkov:
    """T^(v)[i,j] = (a if j == v else b) * (y if i == j else x), with b = (1-a)/2 and y = 1-2x; A, B, C.

    x: probability of moving to each of the other two states, 0 < x <= 1/2.
    a: probability that a token names the state just entered, 0 <= a <= 1.

    Marzen & Crutchfield 2017 (1702.08565); with transformers, Shai et al. 2024 (2405.15943).
    """
    require(0 < x <= 0.5 and 0 <= a <= 1, "0 < x <= 1/2 and 0 <= a <= 1", x=x, a=a)
    move = np.full((3, 3), x) + (1 - 3 * x) * np.eye(3)
    emit = np.full((3, 3), (1 - a) / 2) + (a - (1 - a) / 2) * np.eye(3)
    return HiddenMarkov(emit[:, None, :] * move, symbols=("A", "B", "C"), name="mess3", params={"x": x, "a": a})
