"""Parity: after every block of random bits, whether the ones among them are odd in number."""

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def parity(block: int = 4, p: float = 0.5) -> HiddenMarkov:
    """`block` random bits, 0 with probability `p`, then their sum modulo 2; and over again. 0 < p < 1, block >= 1.

    With `block = 2` it is `rrxor` with p1 = p2 = p. As there, what is hidden is the phase: a path may start anywhere in
    a block. Once the phase is known, a parity is certain for whoever has counted all bits of its block, and, if
    p = 1/2, a coin for whoever has missed any one of them. There are 2 block + 1 states, a place in the block and the
    parity so far. Entropy rate block H(p) / (block + 1).

    Minsky & Papert 1969: no perceptron of less than full order computes it. Hahn 2020 (1906.06755): what it asks of
    attention. Shai et al. 2024 (2405.15943): RRXOR.
    """
    require(block >= 1 and 0 < p < 1, "block >= 1 and 0 < p < 1", block=block, p=p)

    def state(seen: int, odd: int) -> int:
        """After `seen` bits of a block: one state for none, two (even, odd) for each number from 1 to `block`."""
        return 2 * seen - 1 + odd if seen else 0

    t = np.zeros((2, 2 * block + 1, 2 * block + 1))
    for seen in range(block):
        for odd in (0, 1) if seen else (0,):
            for bit, prob in enumerate((p, 1 - p)):
                t[bit, state(seen, odd), state(seen + 1, odd ^ bit)] = prob
    for odd in (0, 1):
        t[odd, state(block, odd), state(0, 0)] = 1
    return HiddenMarkov(t, name="parity", params={"block": block, "p": p})
