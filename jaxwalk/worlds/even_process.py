"""The even process: ones come in runs of even length."""

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def even_process(p: float = 0.5) -> HiddenMarkov:
    """Between zeros stand even numbers of ones: a pair of ones with probability `p`, a 0 otherwise, 0 < p < 1.

    Of infinite Markov order with two states: whether a run is even so far depends on where it began. Entropy
    rate H(p)/(1+p). Crutchfield & Feldman 2003 (cond-mat/0102181).
    """
    require(0 < p < 1, "0 < p < 1", p=p)
    return HiddenMarkov([[[1 - p, 0], [0, 0]], [[0, p], [1, 0]]], name="even_process", params={"p": p})
