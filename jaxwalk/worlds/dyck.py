"""Dyck: nested brackets of several kinds, where what may close is what was opened last."""

import itertools

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require

_MOST_ENTRIES = 1 << 26


def dyck(kinds: int = 2, depth: int = 4, p: float = 0.5) -> HiddenMarkov:
    """Opening brackets with probability `p`, of a uniform kind, else a bracket that closes the last one still open.

    kinds: k, at least 1; the 2k tokens are "(0", "(1", ... and "0)", "1)", ... depth: m, at least 1, how many brackets
        may be open at once. With none open the next one opens, with m open it closes. p: 0 < p < 1.

    Paths are the beginnings of words of Dyck-k with a depth of at most m: nothing is open at the start, and the stream
    never ends. The state is the stack of open brackets, one of 1 + k + .. + k^m, and who reads a path from its start
    knows it: beliefs are certain. For one kind a counter would do; for more, all of the stack is needed, since each
    bracket on it decides a later token.

    Every context-free language is an image of Dyck words that a finite automaton accepts (Chomsky & Schutzenberger
    1963). With a bounded depth: Hewitt et al. 2020 (2010.07515), who show that a recurrent network generates them with
    a memory of order m log k.
    """
    require(
        kinds >= 1 and depth >= 1 and 0 < p < 1,
        "kinds >= 1, depth >= 1 and 0 < p < 1",
        kinds=kinds,
        depth=depth,
        p=p,
    )
    states = sum(kinds**d for d in range(depth + 1))
    require(
        2 * kinds * states**2 <= _MOST_ENTRIES,
        f"at most {_MOST_ENTRIES} matrix entries, 2 kinds states^2, where states = 1 + kinds + .. + kinds^depth",
        kinds=kinds,
        depth=depth,
    )
    stacks = [stack for d in range(depth + 1) for stack in itertools.product(range(kinds), repeat=d)]
    number = {stack: i for i, stack in enumerate(stacks)}
    t = np.zeros((2 * kinds, states, states))
    for stack in stacks:
        opens = 1 if not stack else 0 if len(stack) == depth else p
        if opens:
            for kind in range(kinds):
                t[kind, number[stack], number[*stack, kind]] = opens / kinds
        if stack:
            t[kinds + stack[-1], number[stack], number[stack[:-1]]] = 1 - opens
    symbols = [*(f"({kind}" for kind in range(kinds)), *(f"{kind})" for kind in range(kinds))]
    initial = np.eye(states)[0]
    return HiddenMarkov(
        t, initial=initial, symbols=symbols, name="dyck", params={"kinds": kinds, "depth": depth, "p": p}
    )
