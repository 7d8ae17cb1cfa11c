"""Mixtures of hidden Markov worlds: each path is of one task, which its reader has to infer from the path."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxwalk.worlds._hidden_markov import HiddenMarkov
from jaxwalk.worlds._parameters import require

TASKS = tuple(("random_hmm", {"vocab_size": 3, "num_states": 2, "seed": seed}) for seed in range(4))
"""Four sources of three tokens and two hidden states: after 16 tokens the right one has probability 0.8."""


class Mixture(HiddenMarkov):
    """A hidden Markov world whose states are divided into tasks, between which nothing moves.

    Attributes:
        components: the K worlds, one for each task.
        weights: [K], the probability of each task before the first token.
        tasks: [N], the task of each hidden state.
    """

    components: tuple[HiddenMarkov, ...]
    weights: np.ndarray
    tasks: np.ndarray

    def __init__(
        self, components: Sequence[HiddenMarkov], weights: Any = None, params: Mapping[str, Any] | None = None
    ) -> None:
        """The mixture of `components` with these `weights`, by default equal ones.

        Raises:
            ValueError: if there are no components, their tokens differ, or the weights are not probabilities.
        """
        components = tuple(components)
        require(bool(components), "at least one task", tasks=components)
        symbols = [component.symbols for component in components]
        require(len(set(symbols)) == 1, "tasks over the same tokens", symbols=symbols)
        K, V = len(components), components[0].vocab_size
        weights = np.full(K, 1 / K) if weights is None else np.asarray(weights, np.float64)
        probabilities = weights.shape == (K,) and (weights > 0).all() and abs(weights.sum() - 1) < 1e-8
        require(bool(probabilities), f"{K} positive weights that sum to 1", weights=weights.tolist())
        tasks = np.repeat(np.arange(K), [component.num_states for component in components])
        transitions = np.zeros((V, len(tasks), len(tasks)))
        for task, component in enumerate(components):
            transitions[:, *np.ix_(tasks == task, tasks == task)] = component.transitions
        generalised = any(component.generalised for component in components)
        super().__init__(
            transitions,
            initial=np.concatenate([w * c.initial for w, c in zip(weights, components, strict=True)]),
            functional=np.concatenate([c.functional for c in components]) if generalised else None,
            symbols=symbols[0],
            name="mixture",
            params=params,
        )
        self.components, self.weights, self.tasks = components, weights, tasks

    def task_posterior(self, tokens: Int[ArrayLike, " T"]) -> Float[Array, "T+1 K"]:
        """P(task | first t tokens), of the observer who knows the world; row 0 is `weights`.

        From where the path became impossible on, rows are NaN. Token ids out of range: as in `path_log_prob`.
        """
        shares = self.functional[:, None] * (self.tasks[:, None] == np.arange(len(self.weights)))
        return jnp.matmul(self.beliefs(tokens), jnp.asarray(shares, float), precision="highest")

    def task_log_probs(self, tokens: Int[ArrayLike, " T"]) -> Float[Array, "K T+1 V"]:
        """log p(. | first t tokens, task) in nats, of the observer who is told the task.

        From where the path became impossible in a task on, its rows are NaN.
        """
        return jnp.stack([component.next_log_probs(tokens) for component in self.components])

    def windowed_log_probs(self, tokens: Int[ArrayLike, " T"], k: int) -> Float[Array, "T+1 V"]:
        """log p(. | the k tokens up to the t-th) in nats, of an observer who knows the world but no earlier token.

        Rows up to k equal those of `next_log_probs`. `tokens` must be a possible path.
        """
        tokens = self._tokens(tokens)
        T = len(tokens)
        M, matrices = self.transitions.sum(0), jnp.asarray(self.transitions, float)
        before = [self.initial]  # the law of the hidden state without any token
        for _ in range(max(T - k, 0)):
            before.append(before[-1] @ M)
        starts = np.maximum(np.arange(T + 1) - k, 0)
        belief = jnp.asarray(np.stack(before)[starts], float)
        emission = jnp.asarray(self.transitions @ self.functional, float)
        for i in range(min(k, T)):
            at = starts + i
            token = tokens[np.minimum(at, T - 1)]
            after = jnp.einsum("tn,tnm->tm", belief, matrices[token], precision="highest")
            after /= jnp.einsum("tn,tn->t", belief, emission[token], precision="highest")[:, None]
            belief = jnp.where(jnp.asarray(at < np.arange(T + 1))[:, None], after, belief)
        return jnp.log(jnp.maximum(jnp.einsum("tn,vn->tv", belief, emission, precision="highest"), 0))


def mixture(tasks: Any = TASKS, weights: Any = None) -> Mixture:
    """A task is drawn for each path, and the path from the world of that task.

    tasks: pairs of the name of a hidden Markov world and its parameters, over the same tokens.
    weights: the probability of each task; by default they are equally probable.

    The belief of an observer who knows the world is the exact posterior over tasks and their states. Such mixtures are
    what in-context learning is studied on: Xie et al. 2022 (2111.02080).
    """
    from jaxwalk.worlds import make

    tasks = [(name, dict(params)) for name, params in tasks]
    components = []
    for component in (make(name, **params) for name, params in tasks):
        if not isinstance(component, HiddenMarkov):
            raise ValueError(f"tasks: expected hidden Markov worlds, got {component.name!r}. Choose another.")
        components.append(component)
    if weights is None and components:
        weights = [1 / len(components)] * len(components)
    weights = [float(weight) for weight in weights or ()]
    params = {"tasks": [[c.name, dict(c.params)] for c in components], "weights": weights}
    return Mixture(components, weights, params)
