"""Z1R: the cycle zero, one, random."""

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def z1r(p: float = 0.5) -> HiddenMarkov:
    """Tokens 0, 1, R, 0, 1, R, ... where R is 1 with probability `p`, 0 < p < 1. What is hidden is the phase.

    Entropy rate H(p)/3. Shai et al. 2024 (2405.15943), with p = 1/2.
    """
    require(0 < p < 1, "0 < p < 1", p=p)
    zero = [[0, 1, 0], [0, 0, 0], [1 - p, 0, 0]]
    one = [[0, 0, 0], [0, 0, 1], [p, 0, 0]]
    return HiddenMarkov([zero, one], name="z1r", params={"p": p})
