"""Sampled paths: random walks over token vectors, using the recurrent form of the model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.filters import Key
from jaxwalk.model.decoding import State, prefilled, stepped
from jaxwalk.model.inputs import Path, Tokens, is_traced, padded_length, prepare
from jaxwalk.model.transformer import Transformer


class Paths(NamedTuple):
    """Continuations of one prompt.

    Attributes:
        tokens: [n, steps].
        log_probs: [n], log-probabilities given the prompt under the model's own law, in nats.
        unexplored_mass: [], 1 minus the total probability of the distinct paths.
        bound: [], the largest log-probability of any prefix that the search left unexpanded. Paths at or above it are
            the most probable ones, exactly (up to rounding). NaN for sampled paths, which certify nothing.
    """

    tokens: Int[Array, "n steps"]
    log_probs: Float[Array, " n"]
    unexplored_mass: Float[Array, ""]
    bound: Float[Array, ""]


Proposal = Callable[[Float[Array, " V"]], Float[Array, " V"]]
"""Maps the model's logits to the logits to sample from. It must not exclude a token that the model can produce."""


@dataclasses.dataclass(frozen=True)
class Tilt:
    """A proposal that favours some tokens, so that visits to them become common.

    Attributes:
        ids: the favoured token ids.
        nats: the amount added to their logits.
    """

    ids: tuple[int, ...]
    nats: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in np.atleast_1d(np.asarray(self.ids))))

    def __call__(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        """The tilted logits. Raises ValueError for ids outside the vocabulary."""
        check_ids("Tilt", self.ids, len(logits))
        return logits.at[np.array(self.ids)].add(self.nats)


def check_ids(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise ValueError, naming the argument, unless `ids` is non-empty and within the vocabulary."""
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong or not ids:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}, got {', '.join(map(str, wrong)) or 'none'}."
        )


def check_prompt(model: Transformer, prompt: Tokens, steps: int) -> Path:
    """The checked and padded prompt. Raises ValueError unless `steps` more tokens fit after it."""
    path = prepare(model, prompt)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    if path.length + steps > model.max_length + 1:
        raise ValueError(
            f"steps: expected prompt and steps within max_length + 1 = {model.max_length + 1} tokens, "
            f"got {path.length} + {steps}."
        )
    return path


def room_for(model: Transformer, prompt: Path, steps: int) -> int:
    """The number of positions to allocate memory for; the last of the `steps` tokens is not walked."""
    walked = prompt.length + steps - 1
    return walked if is_traced(model, prompt.tokens) else padded_length(walked, model.max_length)


def sample_paths(
    model: Transformer,
    prompt: Tokens,
    key: Key,
    steps: int,
    n: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Paths:
    """n independent continuations of `prompt`, sampled exactly from the model's law.

    Args:
        model: the model.
        prompt: [P], at least one token.
        key: a `jax.random` key.
        steps: the length of the continuations.
        n: the number of continuations.
        temperature, top_k, top_p: off by default, since each *changes the law* that is sampled: temperature first, then
            the k most probable tokens, then the smallest set of most probable tokens with total probability of at
            least p. The returned log-probabilities are under the model's own law in any case.

    Returns:
        Paths with tokens [n, steps] and log_probs [n] in nats.

    Raises:
        ValueError: if the prompt is empty or leaves no room for `steps` tokens, or an option is out of range.
    """
    path = check_prompt(model, prompt, steps)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}. top_k=1 is the greedy choice.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability above 0, got {top_p}.")
    if n < 1:
        raise ValueError(f"n: expected at least 1 path, got {n}.")
    room = room_for(model, path, steps)
    return _sample(model, path.tokens, path.count, key, temperature, top_p, room=room, steps=steps, n=n, top_k=top_k)[0]


def sampled(
    model: Transformer,
    prompt: Int[Array, " P"],
    count: Any,
    key: Key,
    temperature: Any = None,
    top_p: Any = None,
    *,
    room: int,
    steps: int,
    n: int,
    top_k: int | None = None,
    proposal: Proposal | None = None,
) -> tuple[Paths, Float[Array, " n"]]:
    """`sample_paths` without checks, for use inside a compiled program.

    Args:
        prompt: [P], of which the first `count` tokens are real.
        room: the number of positions to allocate memory for.
        proposal: the law to sample from in place of the model's own.

    Returns:
        The paths, and their log-probabilities [n] under the law they were sampled from.
    """
    state, logits = prefilled(model, prompt, count, count + steps - 1, room)
    alter = functools.partial(altered_law, temperature=temperature, top_k=top_k, top_p=top_p)

    def draw(logits: Array, key: Key) -> tuple[Array, Array, Array]:
        proposed = alter(logits if proposal is None else proposal(logits))
        token = jax.random.categorical(key, proposed)
        return token, jax.nn.log_softmax(logits)[token], jax.nn.log_softmax(proposed)[token]

    def sample_path(key: Key) -> tuple[Array, Array, Array]:
        def body(carry: tuple[State, Array], key: Key) -> tuple[tuple[State, Array], tuple[Array, Array, Array]]:
            state, logits = carry
            drawn = draw(logits, key)
            return stepped(model, state, drawn[0]), drawn

        keys = jax.random.split(key, steps)
        (_, last_logits), (tokens, log_probs, log_proposed) = lax.scan(body, (state, logits), keys[:-1])
        token, log_prob, last_proposed = draw(last_logits, keys[-1])  # the last token needs no step of the model
        return jnp.append(tokens, token), log_probs.sum() + log_prob, log_proposed.sum() + last_proposed

    tokens, log_probs, log_proposed = jax.vmap(sample_path)(jax.random.split(key, n))
    mass = jnp.where(_first_occurrence(tokens), jnp.exp(log_probs), 0).sum()
    return Paths(tokens, log_probs, 1 - mass, jnp.full((), jnp.nan)), log_proposed


_sample = jax.jit(sampled, static_argnames=("room", "steps", "n", "top_k", "proposal"))


def altered_law(logits: Float[Array, " V"], temperature: Any, top_k: int | None, top_p: Any) -> Float[Array, " V"]:
    """Logits after applying the sampling options; -inf for excluded tokens."""
    if temperature is not None:
        logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        included = jnp.zeros(len(logits), bool).at[lax.top_k(logits, top_k)[1]].set(True)
        logits = jnp.where(included, logits, -jnp.inf)
    if top_p is not None:
        order = jnp.argsort(-logits)
        probs = jax.nn.softmax(logits)[order]
        included = jnp.zeros(len(logits), bool).at[order].set(jnp.cumsum(probs) - probs < top_p)
        logits = jnp.where(included, logits, -jnp.inf)
    return logits


def _first_occurrence(rows: Int[Array, "n m"]) -> Bool[Array, " n"]:
    """Which rows do not repeat an earlier row."""
    order = jnp.lexsort(rows.T)
    ordered = rows[order]
    new = jnp.concatenate([jnp.ones(1, bool), jnp.any(ordered[1:] != ordered[:-1], axis=1)])
    return jnp.zeros(len(rows), bool).at[order].set(new)
