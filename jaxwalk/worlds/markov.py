"""Markov chains of any order, whose state is seen: the last tokens."""

from typing import Any

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require

_MOST_ENTRIES = 1 << 26


def markov(
    order: int = 1,
    vocab_size: int = 3,
    seed: int = 0,
    concentration: float = 1.0,
    table: Any = None,
    initial: Any = None,
) -> HiddenMarkov:
    """The chain whose next token depends on the last `order` tokens; order 0 is independent tokens.

    table: [V] * (order+1), table[v_1]..[v_order][v] = P(v | v_1..v_order), oldest token first; nested sequences
        or an array. By default each law is drawn from a symmetric Dirichlet distribution with parameter
        `concentration`, by `seed`. `vocab_size` is not used with a table, nor are the last two.
    initial: [V^order], the law of the `order` tokens before the first, in the table's order. By default the
        stationary law, so that paths start as if they had always run.
    """
    require(order >= 0 and vocab_size >= 1, "order >= 0 and vocab_size >= 1", order=order, vocab_size=vocab_size)
    require(concentration > 0, "concentration > 0", concentration=concentration)
    params: dict[str, Any] = {"order": order}
    if table is None:
        laws = np.random.default_rng(seed).dirichlet(np.full(vocab_size, concentration), vocab_size**order)
        params |= {"vocab_size": vocab_size, "seed": seed, "concentration": concentration}
    else:
        laws = np.asarray(table, dtype=np.float64)
        if laws.ndim != order + 1 or len(set(laws.shape)) != 1:
            raise ValueError(
                f"table: expected {order + 1} axes of one size (order {order}: the last {order} tokens, then the "
                f"next), got shape {list(laws.shape)}. Reshape it, or correct `order`."
            )
        vocab_size = laws.shape[-1]
        params["table"] = laws.tolist()
        laws = laws.reshape(-1, vocab_size)
    if initial is not None:
        params["initial"] = np.asarray(initial, dtype=np.float64).tolist()
    states = vocab_size**order
    if vocab_size * states**2 > _MOST_ENTRIES:
        raise ValueError(
            f"order, vocab_size: expected vocab_size^(2 order + 1) <= {_MOST_ENTRIES} matrix entries, got order "
            f"{order} and {vocab_size} tokens. Choose a lower order or fewer tokens."
        )
    t = np.zeros((vocab_size, states, states))
    context = np.arange(states)
    for v in range(vocab_size):
        t[v, context, (context * vocab_size + v) % states] = laws[:, v]
    return HiddenMarkov(t, initial=initial, name="markov", params=params)
