"""A quantum world: a qubit measured again and again, whose beliefs move on a disk of the Bloch sphere."""

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def tom_quantum(alpha: float = 1.0, beta: float = 51.0**0.5) -> HiddenMarkov:
    """Four outcomes of one real qubit measurement, as maps of the Bloch vector (1, x, z), with w = (1, 0, 0).

    alpha, beta: weights of the measurement, > 0; only their ratio matters. Equal weights project the qubit, so
        that the last token tells everything; the further from equal, the weaker the measurement. In general
        the beliefs are infinitely many points of the unit disk.

    Each outcome is a completely positive map, so no path probability is negative, at any length. The process is
    `tom_quantum` in Astera-org/simplexity; with transformers, Riechers, Elliott & Shai 2025 (2507.07432).
    """
    require(alpha > 0 and beta > 0, "alpha > 0 and beta > 0", alpha=alpha, beta=beta)
    norm = 4 * (alpha**2 + beta**2)
    keep, turn = (alpha**2 - beta**2) / norm, 2 * alpha * beta / norm
    t = np.zeros((4, 3, 3))
    for v, (axis, other, sign) in enumerate(((2, 1, 1), (2, 1, -1), (1, 2, 1), (1, 2, -1))):
        t[v, [0, axis], [0, axis]] = 1 / 4
        t[v, [0, axis], [axis, 0]] = sign * turn
        t[v, other, other] = keep
    params = {"alpha": alpha, "beta": beta}
    return HiddenMarkov(t, functional=(1, 0, 0), name="tom_quantum", params=params)
