"""Random hidden Markov models."""

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require


def random_hmm(vocab_size: int = 4, num_states: int = 3, seed: int = 0, concentration: float = 0.5) -> HiddenMarkov:
    """From each state, the law over (token, next state) is drawn from a symmetric Dirichlet distribution.

    concentration: its parameter, > 0. Small: few outcomes per state, paths easy to predict. Large: near uniform.
    The same arguments give the same world.
    """
    require(vocab_size >= 1 and num_states >= 1, "at least 1 of each", vocab_size=vocab_size, num_states=num_states)
    require(concentration > 0, "concentration > 0", concentration=concentration)
    rows = np.random.default_rng(seed).dirichlet(np.full(vocab_size * num_states, concentration), num_states)
    t = rows.reshape(num_states, vocab_size, num_states).transpose(1, 0, 2)
    params = {"vocab_size": vocab_size, "num_states": num_states, "seed": seed, "concentration": concentration}
    return HiddenMarkov(t, name="random_hmm", params=params)
