"""Leaky RRXOR: the RRXOR process in which every step may jump anywhere."""

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require
from jaxwalk.worlds.rrxor import matrices


def leaky_rrxor(p1: float = 0.5, p2: float = 0.5, epsilon: float = 0.05) -> HiddenMarkov:
    """RRXOR with probability 1 - `epsilon`; else a uniform token and a uniform next state, 0 <= epsilon < 1.

    No path is impossible when epsilon > 0, and the observer never becomes certain of the phase. The process
    is the one of that name in Astera-org/simplexity.
    """
    require(0 <= epsilon < 1, "0 <= epsilon < 1", epsilon=epsilon)
    t = (1 - epsilon) * matrices(p1, p2) + epsilon / 10
    return HiddenMarkov(t, name="leaky_rrxor", params={"p1": p1, "p2": p2, "epsilon": epsilon})
