"""The simple nonunifilar source: two states, of which the token 0 does not tell the next one."""

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def sns(p: float = 0.5, q: float = 0.5) -> HiddenMarkov:
    """State A emits 0, moving to B with probability `p`; B emits 0 and stays, or 1 and moves to A (`q`); in (0, 1).

    A renewal process: what an observer believes depends on the number of zeros since the last 1, and takes
    infinitely many values. Marzen & Crutchfield 2017 (1702.08565, figure 2).
    """
    require(0 < p < 1 and 0 < q < 1, "0 < p < 1 and 0 < q < 1", p=p, q=q)
    return HiddenMarkov([[[1 - p, p], [0, 1 - q]], [[0, 0], [q, 0]]], name="sns", params={"p": p, "q": q})
