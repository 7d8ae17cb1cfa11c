"""RRXOR: two random bits, then their exclusive or."""

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def matrices(p1: float, p2: float) -> np.ndarray:
    """T^(v) [2,5,5] over the states start, saw 0, saw 1, xor is 0, xor is 1."""
    require(0 < p1 < 1 and 0 < p2 < 1, "0 < p1 < 1 and 0 < p2 < 1", p1=p1, p2=p2)
    start, saw, xor = 0, (1, 2), (3, 4)
    t = np.zeros((2, 5, 5))
    for first, p in enumerate((p1, 1 - p1)):
        t[first, start, saw[first]] = p
        for second, q in enumerate((p2, 1 - p2)):
            t[second, saw[first], xor[first ^ second]] = q
    for bit in (0, 1):
        t[bit, xor[bit], start] = 1
    return t


def rrxor(p1: float = 0.5, p2: float = 0.5) -> HiddenMarkov:
    """Tokens R1, R2, R1 xor R2, and again; the bits are 0 with probabilities `p1`, `p2`, both in (0, 1).

    What is hidden is the phase. Entropy rate (H(p1) + H(p2))/3. Shai et al. 2024 (2405.15943).
    """
    return HiddenMarkov(matrices(p1, p2), name="rrxor", params={"p1": p1, "p2": p2})
