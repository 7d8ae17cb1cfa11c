"""The golden mean process: no two ones in a row."""

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def golden_mean(p: float = 0.5) -> HiddenMarkov:
    """After a 0 the next token is 1 with probability `p`, 0 < p < 1; after a 1 it is 0 for certain.

    Entropy rate H(p)/(1+p); its number of possible paths grows with the golden mean, whence the name.
    Crutchfield & Feldman 2003 (cond-mat/0102181).
    """
    require(0 < p < 1, "0 < p < 1", p=p)
    return HiddenMarkov([[[1 - p, 0], [1, 0]], [[0, p], [0, 0]]], name="golden_mean", params={"p": p})
