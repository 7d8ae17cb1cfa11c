"""Sampled paths: random walks over token vectors, by the recurrent form of the model."""

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

    tokens: [n, steps]. log_probs: [n], given the prompt, under the model's own law.
    unexplored_mass: [], 1 minus the summed probability of the distinct paths here.
    bound: [], the largest log-probability of any prefix that the search left unexpanded: paths at or above it are the
        most probable ones, exactly (up to rounding). NaN for sampled paths, which certify nothing.
    """

    tokens: Int[Array, "n steps"]
    log_probs: Float[Array, " n"]
    unexplored_mass: Float[Array, ""]
    bound: Float[Array, ""]


Proposal = Callable[[Float[Array, " V"]], Float[Array, " V"]]
"""From the model's logits to those that are sampled from. It must not exclude what the model may do."""


@dataclasses.dataclass(frozen=True)
class Tilt:
    """A proposal that favours some tokens: `nats` are added to the logits of `ids`, so that visits are common."""

    ids: tuple[int, ...]
    nats: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in np.atleast_1d(np.asarray(self.ids))))

    def __call__(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        """The tilted logits. Raises ValueError for ids that are none of the vocabulary."""
        check_ids("Tilt", self.ids, len(logits))
        return logits.at[np.array(self.ids)].add(self.nats)


def check_ids(what: str, ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises ValueError unless all ids are of the vocabulary."""
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong or not ids:
        raise ValueError(
            f"{what}: expected token ids from 0 to {vocab_size - 1}, got {', '.join(map(str, wrong)) or 'none'}."
        )


def check_prompt(model: Transformer, prompt: Tokens, steps: int) -> Path:
    """The checked and padded prompt. Raises ValueError unless `steps` tokens fit after it."""
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
    """The positions that a memory needs for a prompt and `steps` tokens, of which the last is not walked."""
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
    """n independent continuations of `prompt`: exact samples of the model's law.

    Args:
        model: the model.
        prompt: [P], at least one token.
        key: a `jax.random` key.
        steps: the length of the continuations.
        n: how many there are.
        temperature, top_k, top_p: off by default, as each *changes the law* that is sampled (temperature first, then
            the k most probable tokens, then the fewest whose probability reaches p). The returned log-probabilities
            are under the model's own law in any case.

    Returns:
        Paths with tokens [n, steps] and log_probs [n] in nats.

    Raises:
        ValueError: for an empty prompt, one that leaves no room for `steps` tokens, and options out of range.
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


@functools.partial(jax.jit, static_argnames=("room", "steps", "n", "top_k", "proposal"))
def _sample(*args: Any, **options: Any) -> tuple[Paths, Array]:
    return sampled(*args, **options)


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
    """Sampled paths, and their log-probabilities under the law that they were sampled from; part of a program."""
    state, logits = prefilled(model, prompt, count, count + steps - 1, room)
    law = functools.partial(altered_law, temperature=temperature, top_k=top_k, top_p=top_p)

    def draw(logits: Array, key: Key) -> tuple[Array, Array, Array]:
        proposed = law(logits if proposal is None else proposal(logits))
        token = jax.random.categorical(key, proposed)
        return token, jax.nn.log_softmax(logits)[token], jax.nn.log_softmax(proposed)[token]

    def one(key: Key) -> tuple[Array, Array, Array]:
        def body(carry: tuple[State, Array], key: Key) -> tuple[tuple[State, Array], tuple[Array, Array, Array]]:
            state, logits = carry
            drawn = draw(logits, key)
            return stepped(model, state, drawn[0]), drawn

        keys = jax.random.split(key, steps)
        (_, final), (tokens, log_probs, log_proposed) = lax.scan(body, (state, logits), keys[:-1])
        token, log_prob, last_proposed = draw(final, keys[-1])  # the last token is drawn, but not walked
        return jnp.append(tokens, token), log_probs.sum() + log_prob, log_proposed.sum() + last_proposed

    tokens, log_probs, log_proposed = jax.vmap(one)(jax.random.split(key, n))
    mass = jnp.where(_first_occurrence(tokens), jnp.exp(log_probs), 0).sum()
    return Paths(tokens, log_probs, 1 - mass, jnp.full((), jnp.nan)), log_proposed


def altered_law(logits: Float[Array, " V"], temperature: Any, top_k: int | None, top_p: Any) -> Float[Array, " V"]:
    """The logits of the law that sampling options leave; -inf where a token is excluded."""
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
    """Which rows do not repeat an earlier one."""
    order = jnp.lexsort(rows.T)
    ordered = rows[order]
    new = jnp.concatenate([jnp.ones(1, bool), jnp.any(ordered[1:] != ordered[:-1], axis=1)])
    return jnp.zeros(len(rows), bool).at[order].set(new)
