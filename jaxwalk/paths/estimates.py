"""Entropies of the law of paths, and probabilities of events: exact by enumeration where possible, else estimated."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxwalk._loops import map_in_batches
from jaxwalk.filters import Key, indices
from jaxwalk.model.inputs import Path, Tokens, is_traced, padded_length
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import entropy, laws, scores
from jaxwalk.paths.sampling import Proposal, Tilt, check_ids, check_prompt, room_for, sampled

ENUMERABLE = 1 << 16
"""How many continuations are enumerated, where exactness is possible, before estimates take over."""

Event = Callable[[Int[Array, " steps"]], Bool[Array, ""]]


class Estimate(NamedTuple):
    """A number, its standard error, and how many samples it is worth; an exact number has error 0 and inf samples.

    effective_samples: (sum of weights)^2 / sum of their squares: fewer than were drawn if these follow another law.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    effective_samples: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Visits:
    """The event that a walk visits one of the token `ids`."""

    ids: tuple[int, ...]

    def __call__(self, tokens: Int[Array, " steps"]) -> Bool[Array, ""]:
        """Whether one of `tokens` is among the ids."""
        return jnp.isin(tokens, np.array(self.ids, np.int32)).any()


def visits(ids: Sequence[int] | int) -> Visits:
    """The event that a walk visits one of the token `ids`, for `event_probability`, which checks them."""
    return Visits(tuple(int(i) for i in np.atleast_1d(np.asarray(ids))))


def continuations(vocab_size: int, steps: int) -> Int[np.ndarray, "N steps"]:
    """All V^steps token sequences, in lexicographic order."""
    return np.array(list(itertools.product(range(vocab_size), repeat=steps)), np.int32).reshape(-1, steps)


def enumerated_log_probs(
    model: Transformer, prompt: Tokens, steps: int, *, batch: int = 256
) -> tuple[Int[Array, "N steps"], Float[Array, " N"]]:
    """Every continuation of `prompt` by `steps` tokens, and its exact log-probability in nats. N = V^steps.

    Raises:
        ValueError: if there are more than `ENUMERABLE`, or the prompt leaves no room for them.
    """
    path = check_prompt(model, prompt, steps)
    if not _enumerable(model, steps):
        raise ValueError(
            f"steps: expected V^steps <= {ENUMERABLE}, got {model.vocab_size}^{steps}. "
            "Sample (sample_paths), or search (top_paths)."
        )
    after = jax.device_put(continuations(model.vocab_size, steps))
    return after, _enumerated(*_arguments(model, path, steps), after, batch=batch)


def path_entropy(
    model: Transformer,
    prompt: Tokens,
    steps: int,
    *,
    key: Key | None = None,
    samples: int = 1024,
    proposal: Proposal | None = None,
) -> Estimate:
    """Entropy of the law of the next `steps` tokens after `prompt`, in nats; its exp is the effective number of paths.

    Exact, by enumeration, when V^steps <= `ENUMERABLE`. Otherwise a Monte Carlo estimate with its standard error: the
    mean over sampled paths of the summed entropies of their steps, whose expectation is the entropy by the chain rule
    and which varies less than -log P.

    Args:
        model: the model.
        prompt: [P], at least one token.
        steps: the length of the continuations.
        key: a `jax.random` key, needed for an estimate.
        samples: how many paths are sampled for it.
        proposal: as in `event_probability`.

    Raises:
        ValueError: for a prompt that leaves no room for `steps` tokens, and a missing key.
    """
    path = check_prompt(model, prompt, steps)
    _check_proposal(model, proposal)
    if _enumerable(model, steps):
        after = continuations(model.vocab_size, steps)
        return _enumerated_entropy(*_arguments(model, path, steps), after)
    _check_samples(model, key, steps, samples)
    sampling = _Sampling(room_for(model, path, steps), steps, samples, proposal)
    return _sampled_entropy(*_arguments(model, path, steps), key, sampling=sampling)


def event_probability(
    model: Transformer,
    prompt: Tokens,
    steps: int,
    event: Event,
    *,
    key: Key | None = None,
    samples: int = 1024,
    proposal: Proposal | None = None,
) -> Estimate:
    """Probability that `event(tokens [steps])` is true of the next `steps` tokens after `prompt`.

    Exact, by enumeration, when V^steps <= `ENUMERABLE`. Otherwise the share of `samples` sampled paths, with its
    standard error (where no path or every path is in the event, and the usual error would be 0, that of one more path
    on the other side).

    Args:
        model: the model.
        prompt: [P], at least one token.
        steps: the length of the continuations.
        event: a traceable function, as in `visits(ids)`. It is part of the compiled program: pass the same object, or
            an equal one, to reuse it.
        key: a `jax.random` key, needed for an estimate.
        samples: how many paths are sampled for it.
        proposal: for rare events, samples another law, such as `Tilt(ids, nats)`, and weighs each path by how much
            likelier it is under the model (importance sampling). Look at `effective_samples`: a proposal that seldom
            goes where the model does has few.

    Raises:
        ValueError: for a prompt that leaves no room for `steps` tokens, a missing key, and ids out of range.
    """
    path = check_prompt(model, prompt, steps)
    if isinstance(event, Visits):
        check_ids("visits", event.ids, model.vocab_size)
    _check_proposal(model, proposal)
    if _enumerable(model, steps):
        after = continuations(model.vocab_size, steps)
        return _enumerated_event(*_arguments(model, path, steps), after, event=event)
    _check_samples(model, key, steps, samples)
    sampling = _Sampling(room_for(model, path, steps), steps, samples, proposal)
    return _sampled_event(*_arguments(model, path, steps), key, event=event, sampling=sampling)


class _Sampling(NamedTuple):
    """The static choices of an estimate: room for memory, length and number of paths, and the proposal."""

    room: int
    steps: int
    samples: int
    proposal: Proposal | None


def _enumerable(model: Transformer, steps: int) -> bool:
    return steps * math.log(model.vocab_size) <= math.log(ENUMERABLE) + 1e-9


def _check_proposal(model: Transformer, proposal: Proposal | None) -> None:
    if isinstance(proposal, Tilt):
        check_ids("Tilt", proposal.ids, model.vocab_size)


def _check_samples(model: Transformer, key: Key | None, steps: int, samples: int) -> None:
    if key is None:
        raise ValueError(
            f"key: expected a jax.random key, got None. {model.vocab_size}^{steps} paths are too many to enumerate, "
            "so this is estimated from samples."
        )
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}.")


def _arguments(model: Transformer, path: Path, steps: int) -> tuple[Transformer, Any, Any]:
    """The model, the prompt with room for `steps` tokens after it, and its length."""
    if is_traced(model, path.tokens):
        return model, jnp.concatenate([path.tokens, jnp.zeros(steps, jnp.int32)]), path.length
    longest = padded_length(path.length + steps, model.max_length + 1)
    return model, np.pad(path.tokens[: path.length], (0, longest - path.length)), path.count


def _joined(prompt: Array, count: Any, after: Array) -> Array:
    """The prompt's first `count` tokens and those after it, in the prompt's array."""
    return jax.lax.dynamic_update_slice(prompt, after.astype(prompt.dtype), (count,))


def _scores(model: Transformer, prompt: Array, count: Any, after: Array, batch: int) -> Array:
    """log P(row | prompt) for each row of `after`."""

    def score(row: Array) -> Array:
        return scores(model, _joined(prompt, count, row), count, count + len(row)).sum()

    return map_in_batches(score, after, batch)


@functools.partial(jax.jit, static_argnames="batch")
def _enumerated(model: Transformer, prompt: Array, count: Array, after: Array, *, batch: int) -> Array:
    return _scores(model, prompt, count, after, batch)


@jax.jit
def _enumerated_entropy(model: Transformer, prompt: Array, count: Array, after: Array) -> Estimate:
    return _exact(entropy(_scores(model, prompt, count, after, 256)))


@functools.partial(jax.jit, static_argnames="event")
def _enumerated_event(model: Transformer, prompt: Array, count: Array, after: Array, *, event: Event) -> Estimate:
    log_probs = _scores(model, prompt, count, after, 256)
    return _exact(jnp.where(jax.vmap(event)(after), jnp.exp(log_probs), 0).sum())


@functools.partial(jax.jit, static_argnames="sampling")
def _sampled_entropy(model: Transformer, prompt: Array, count: Array, key: Key, *, sampling: _Sampling) -> Estimate:
    after, weights = _weighted(model, prompt, count, key, sampling)

    def summed_entropies(row: Array) -> Array:
        path = _joined(prompt, count, row)[:-1]
        position = indices(len(path))
        counted = (position >= count - 1) & (position < count - 1 + len(row))
        return jnp.sum(jnp.where(counted, entropy(laws(model, path)), 0))

    values = weights * map_in_batches(summed_entropies, after, 64)
    return Estimate(values.mean(), values.std(ddof=1) / math.sqrt(sampling.samples), _effective(weights))


@functools.partial(jax.jit, static_argnames=("event", "sampling"))
def _sampled_event(
    model: Transformer, prompt: Array, count: Array, key: Key, *, event: Event, sampling: _Sampling
) -> Estimate:
    after, weights = _weighted(model, prompt, count, key, sampling)
    samples, happened = sampling.samples, jax.vmap(event)(after)
    value = jnp.where(happened, weights, 0).mean()
    if sampling.proposal is None:
        smoothed = jnp.clip(value, 1 / (samples + 1), samples / (samples + 1))
        return Estimate(value, jnp.sqrt(smoothed * (1 - smoothed) / samples), _effective(weights))
    one_more = jnp.where(happened.any(), 0, weights.max() ** 2)
    squares = jnp.sum((jnp.where(happened, weights, 0) - value) ** 2) + one_more
    return Estimate(value, jnp.sqrt(squares) / samples, _effective(weights))


def _weighted(
    model: Transformer, prompt: Array, count: Any, key: Key, sampling: _Sampling
) -> tuple[Int[Array, "n steps"], Float[Array, " n"]]:
    """Sampled paths and their weights, P / Q."""
    room, steps, samples, proposal = sampling
    paths, log_proposed = sampled(
        model, prompt[:room], count, key, room=room, steps=steps, n=samples, proposal=proposal
    )
    return paths.tokens, jnp.exp(paths.log_probs - log_proposed)


def _effective(weights: Float[Array, " n"]) -> Float[Array, ""]:
    return weights.sum() ** 2 / (weights**2).sum()


def _exact(value: Float[Array, ""]) -> Estimate:
    return Estimate(value, jnp.zeros_like(value), jnp.full_like(value, jnp.inf))
