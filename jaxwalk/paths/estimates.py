"""Entropy of the law of paths and probabilities of events: exact by enumeration where feasible, otherwise estimated."""

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
"""The largest number of continuations that is enumerated. Beyond it, quantities are estimated from samples."""

Event = Callable[[Int[Array, " steps"]], Bool[Array, ""]]
"""A traceable function of the tokens of a continuation."""


class Estimate(NamedTuple):
    """A value with its standard error and effective sample size.

    Attributes:
        value: [].
        standard_error: [], 0 for an exact value.
        effective_samples: [], the effective sample size (sum of weights)^2 / (sum of squared weights); infinite for an
            exact value. It is smaller than the number of samples if a proposal was used.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    effective_samples: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Visits:
    """The event that a walk visits one of several tokens.

    Attributes:
        ids: the token ids.
    """

    ids: tuple[int, ...]

    def __call__(self, tokens: Int[Array, " steps"]) -> Bool[Array, ""]:
        """Whether any of `tokens` is among the ids."""
        return jnp.isin(tokens, np.array(self.ids, np.int32)).any()


def visits(ids: Sequence[int] | int) -> Visits:
    """The event that a walk visits one of the token `ids`. `event_probability` checks them against the vocabulary."""
    return Visits(tuple(int(i) for i in np.atleast_1d(np.asarray(ids))))


def continuations(vocab_size: int, steps: int) -> Int[np.ndarray, "N steps"]:
    """All V^steps token sequences in lexicographic order."""
    return np.array(list(itertools.product(range(vocab_size), repeat=steps)), np.int32).reshape(-1, steps)


def enumerated_log_probs(
    model: Transformer, prompt: Tokens, steps: int, *, batch: int = 256
) -> tuple[Int[Array, "N steps"], Float[Array, " N"]]:
    """Every continuation of `prompt` by `steps` tokens with its exact log-probability.

    Args:
        model: the model.
        prompt: [P], at least one token.
        steps: the length of the continuations.
        batch: the number of continuations that are scored at a time.

    Returns:
        The continuations [N, steps] in lexicographic order and their log-probabilities [N] in nats, N = V^steps.

    Raises:
        ValueError: if V^steps exceeds `ENUMERABLE`, or the prompt leaves no room for `steps` tokens.
    """
    path = check_prompt(model, prompt, steps)
    if not _enumerable(model, steps):
        raise ValueError(
            f"steps: expected V^steps <= {ENUMERABLE}, got {model.vocab_size}^{steps}. "
            "Sample (sample_paths), or search (top_paths)."
        )
    rows = jax.device_put(continuations(model.vocab_size, steps))
    return rows, _enumerated(*_arguments(model, path, steps), rows, batch=batch)


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

    Exact, by enumeration, when V^steps <= `ENUMERABLE`. Otherwise a Monte Carlo estimate: the mean over sampled paths
    of the sum of their next-token entropies. By the chain rule its expectation is the entropy of paths, and it varies
    less than -log P.

    Args:
        model: the model.
        prompt: [P], at least one token.
        steps: the length of the continuations.
        key: a `jax.random` key, required for an estimate.
        samples: the number of paths to sample for an estimate.
        proposal: the law to sample from, as in `event_probability`.

    Returns:
        The entropy with its standard error. If all samples are the same path, the error is instead the most that the
        probability of all other paths allows the entropy to differ by.

    Raises:
        ValueError: if the prompt leaves no room for `steps` tokens, the key is missing, or the ids of a `Tilt` are out
            of range.
    """
    path = check_prompt(model, prompt, steps)
    _check_proposal(model, proposal)
    if _enumerable(model, steps):
        rows = continuations(model.vocab_size, steps)
        return _enumerated_entropy(*_arguments(model, path, steps), rows)
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

    Exact, by enumeration, when V^steps <= `ENUMERABLE`. Otherwise the fraction of sampled paths in the event. If none
    or all of them are, for which the usual standard error would be 0, the error is that of one more path on the other
    side.

    Args:
        model: the model.
        prompt: [P], at least one token.
        steps: the length of the continuations.
        event: a traceable function such as `visits(ids)`. It is static in the compiled program: pass the same object,
            or an equal one, to avoid recompilation.
        key: a `jax.random` key, required for an estimate.
        samples: the number of paths to sample for an estimate.
        proposal: another law to sample from when the event is rare, such as `Tilt(ids, nats)`. Each path is weighted by
            its probability under the model relative to the proposal (importance sampling). Check `effective_samples`:
            it is small if the proposal rarely goes where the model does.

    Returns:
        The probability with its standard error.

    Raises:
        ValueError: if the prompt leaves no room for `steps` tokens, the key is missing, or token ids are out of range.
    """
    path = check_prompt(model, prompt, steps)
    if isinstance(event, Visits):
        check_ids("visits", event.ids, model.vocab_size)
    _check_proposal(model, proposal)
    if _enumerable(model, steps):
        rows = continuations(model.vocab_size, steps)
        return _enumerated_event(*_arguments(model, path, steps), rows, event=event)
    _check_samples(model, key, steps, samples)
    sampling = _Sampling(room_for(model, path, steps), steps, samples, proposal)
    return _sampled_event(*_arguments(model, path, steps), key, event=event, sampling=sampling)


class _Sampling(NamedTuple):
    """The static arguments of an estimate; `room` is the number of positions to allocate memory for."""

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
    """The model, the prompt padded to hold `steps` more tokens, and the length of the prompt."""
    if is_traced(model, path.tokens):
        return model, jnp.concatenate([path.tokens, jnp.zeros(steps, jnp.int32)]), path.length
    size = padded_length(path.length + steps, model.max_length + 1)
    return model, np.pad(path.tokens[: path.length], (0, size - path.length)), path.count


def _appended(prompt: Array, count: Any, continuation: Array) -> Array:
    """The first `count` tokens of `prompt` followed by `continuation`, in an array of the same size."""
    return jax.lax.dynamic_update_slice(prompt, continuation.astype(prompt.dtype), (count,))


def _log_probs(model: Transformer, prompt: Array, count: Any, rows: Array, batch: int) -> Array:
    """log P(row | prompt) for each row of `rows`, in nats."""

    def score(row: Array) -> Array:
        return scores(model, _appended(prompt, count, row), count, count + len(row)).sum()

    return map_in_batches(score, rows, batch)


@functools.partial(jax.jit, static_argnames="batch")
def _enumerated(model: Transformer, prompt: Array, count: Array, rows: Array, *, batch: int) -> Array:
    return _log_probs(model, prompt, count, rows, batch)


@jax.jit
def _enumerated_entropy(model: Transformer, prompt: Array, count: Array, rows: Array) -> Estimate:
    return _exact_estimate(entropy(_log_probs(model, prompt, count, rows, 256)))


@functools.partial(jax.jit, static_argnames="event")
def _enumerated_event(model: Transformer, prompt: Array, count: Array, rows: Array, *, event: Event) -> Estimate:
    log_probs = _log_probs(model, prompt, count, rows, 256)
    return _exact_estimate(jnp.where(jax.vmap(event)(rows), jnp.exp(log_probs), 0).sum())


@functools.partial(jax.jit, static_argnames="sampling")
def _sampled_entropy(model: Transformer, prompt: Array, count: Array, key: Key, *, sampling: _Sampling) -> Estimate:
    rows, weights, log_probs = _sample_weighted(model, prompt, count, key, sampling)

    def summed_entropies(row: Array) -> Array:
        path = _appended(prompt, count, row)[:-1]
        position = indices(len(path))
        counted = (position >= count - 1) & (position < count - 1 + len(row))
        return jnp.sum(jnp.where(counted, entropy(laws(model, path)), 0))

    entropies = map_in_batches(summed_entropies, rows, 64)
    values = weights * entropies
    # If all samples are one path, of probability P, the others have 1 - P, and entropies from 0 to that of the uniform
    # law: this bounds how far off the value is, which its spread, 0, does not.
    P, rest = jnp.exp(log_probs[0]), -jnp.expm1(log_probs[0])
    least = P * entropies[0]
    most = least + rest * sampling.steps * math.log(model.vocab_size)
    bound = jnp.maximum(jnp.abs(values[0] - least), jnp.abs(most - values[0]))
    error = jnp.where((rows == rows[:1]).all(), bound, values.std(ddof=1) / math.sqrt(sampling.samples))
    return Estimate(values.mean(), error, _effective_samples(weights))


@functools.partial(jax.jit, static_argnames=("event", "sampling"))
def _sampled_event(
    model: Transformer, prompt: Array, count: Array, key: Key, *, event: Event, sampling: _Sampling
) -> Estimate:
    rows, weights, _ = _sample_weighted(model, prompt, count, key, sampling)
    samples, in_event = sampling.samples, jax.vmap(event)(rows)
    value = jnp.where(in_event, weights, 0).mean()
    if sampling.proposal is None:
        smoothed = jnp.clip(value, 1 / (samples + 1), samples / (samples + 1))
        return Estimate(value, jnp.sqrt(smoothed * (1 - smoothed) / samples), _effective_samples(weights))
    # With no path in the event, count one of the largest weight, so that the error is not 0.
    one_more = jnp.where(in_event.any(), 0, weights.max() ** 2)
    squares = jnp.sum((jnp.where(in_event, weights, 0) - value) ** 2) + one_more
    return Estimate(value, jnp.sqrt(squares) / samples, _effective_samples(weights))


def _sample_weighted(
    model: Transformer, prompt: Array, count: Any, key: Key, sampling: _Sampling
) -> tuple[Int[Array, "n steps"], Float[Array, " n"], Float[Array, " n"]]:
    """Sampled continuations, their importance weights P / Q, and log P."""
    room, steps, samples, proposal = sampling
    paths, log_proposed = sampled(
        model, prompt[:room], count, key, room=room, steps=steps, n=samples, proposal=proposal
    )
    return paths.tokens, jnp.exp(paths.log_probs - log_proposed), paths.log_probs


def _effective_samples(weights: Float[Array, " n"]) -> Float[Array, ""]:
    return weights.sum() ** 2 / (weights**2).sum()


def _exact_estimate(value: Float[Array, ""]) -> Estimate:
    return Estimate(value, jnp.zeros_like(value), jnp.full_like(value, jnp.inf))
