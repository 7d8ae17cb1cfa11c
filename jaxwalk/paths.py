"""Paths through embedding space: their probabilities, sampling, exact enumeration, entropies, events.

Everything takes one path and is batched with `jax.vmap`. All logarithms are natural: probabilities in nats.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.filters import Key
from jaxwalk.transformer import (
    Mixing,
    Patch,
    Segments,
    State,
    Tokens,
    Transformer,
    check_shape,
    check_tokens,
    prefill,
    step,
)

ENUMERABLE = 1 << 16
"""How many continuations are enumerated, where exactness is possible, before estimates take over."""
STATES = 1 << 30
"""How many bytes the states of a search's expanded prefixes may take."""


class Paths(NamedTuple):
    """Continuations of one prompt.

    tokens: [n, steps]. log_probs: [n], given the prompt, under the model's own law.
    unexplored_mass: [], 1 - the summed probability of the distinct paths here: how much else there is.
    bound: [], the largest log-probability of any prefix that the search left unexpanded: paths at or above it
        are exactly the most probable ones. NaN for sampled paths, which certify nothing.
    """

    tokens: Int[Array, "n steps"]
    log_probs: Float[Array, " n"]
    unexplored_mass: Float[Array, ""]
    bound: Float[Array, ""]


class Estimate(NamedTuple):
    """A number, its standard error, and how many samples it is worth; exact numbers have error 0 and inf samples.

    effective_samples: (sum of weights)^2 / sum of their squares, fewer than were drawn where these are of another law.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    effective_samples: Float[Array, ""]


Proposal = Callable[[Float[Array, " V"]], Float[Array, " V"]]
"""What makes the logits that are sampled from of the model's own. It must not exclude what the model may do."""


@dataclasses.dataclass(frozen=True)
class Tilt:
    """A proposal that walks towards some tokens: `nats` are added to the logits of `ids`, so that visits are common."""

    ids: tuple[int, ...]
    nats: float

    def __call__(self, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        """The tilted logits."""
        return logits.at[jnp.array(self.ids)].add(self.nats)


def next_log_probs(model: Transformer, tokens: Tokens, segments: Segments | None = None) -> Float[Array, "T V"]:
    """log p(v | v_1..v_t) at every position t of one path, in nats.

    `segments` [T] says which document each position is in: see `Transformer.walk`. Raises ValueError for tokens that
    are no path of the model (`check_tokens`).
    """
    walk = model.walk(tokens, segments=segments)
    return jax.nn.log_softmax(jax.vmap(model.logits)(walk.context))


def path_log_prob(
    model: Transformer,
    tokens: Tokens,
    given: int = 1,
    nudge: Float[Array, "S T D"] | None = None,
    segments: Segments | None = None,
    **options: Any,
) -> Float[Array, ""]:
    """log P(v_1..v_T | the first `given` tokens) in nats: the sum of the log-probabilities of the steps after them.

    given: at least 1, as a model has no law for the first token (a begin-of-path token is a given one).
    nudge: [S, T, D], added at each station of the walk.
    segments: [T], the document each position is in. Steps into padding (0), or across a border, are not scored.
    Further options are the interventions of `Transformer.walk`: patch, vectors, mixing, all over T positions.

    The last token is scored but not walked, so a path may have max_length + 1 tokens. Raises ValueError for tokens
    that are no path of the model, a `given` that is not from 1 to T, and wrong shapes.
    """
    return step_log_probs(model, tokens, given, nudge, segments, **options).sum()


def step_log_probs(
    model: Transformer,
    tokens: Tokens,
    given: int = 1,
    nudge: Float[Array, "S T D"] | None = None,
    segments: Segments | None = None,
    *,
    patch: Patch | None = None,
    vectors: Float[Array, "T D"] | None = None,
    mixing: Mapping[int, Mixing] | None = None,
) -> Float[Array, " N"]:
    """The N = T - 1 summands of `path_log_prob`: entry t is log p(v_{t+2} | v_1..v_{t+1}), 0 where it is not scored."""
    tokens = check_tokens(model, tokens, model.max_length + 1)
    segments = None if segments is None else jnp.asarray(segments)
    if not 1 <= given <= len(tokens):
        raise ValueError(f"given: expected from 1 to {len(tokens)} (the path's length), got {given}.")
    if len(tokens) == 1:
        return jnp.zeros(0)
    T = len(tokens)
    S, D = 2 * model.depth + 1, model.width
    check_shape("segments", segments, (T,))
    check_shape("nudge", nudge, (S, T, D))
    check_shape("vectors", vectors, (T, D))
    where, by = (None, None) if patch is None else (jnp.asarray(patch[0]), jnp.asarray(patch[1]))
    check_shape("patch[0]", where, (S, T))
    check_shape("patch[1]", by, (S, T, D))
    for number, A in (mixing or {}).items():
        if not callable(A):
            check_shape(f"mixing[{number}]", A, (None, T, T))
    before, after = tokens[:-1], tokens[1:]
    walk = model.walk(
        before,
        segments=None if segments is None else segments[:-1],
        nudge=None if nudge is None else nudge[:, :-1],
        patch=None if where is None or by is None else (where[:, :-1], by[:, :-1]),
        vectors=None if vectors is None else vectors[:-1],
        mixing={n: A if callable(A) else A[:, :-1, :-1] for n, A in (mixing or {}).items()},
    )
    # Not log_softmax and a gather: the row of log-probabilities is never written out.
    logits = jax.vmap(model.logits)(walk.context)
    index = jnp.arange(len(after))
    chosen = logits.at[index, after].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    steps = chosen - jax.nn.logsumexp(logits, axis=-1)
    scored = scored_steps(len(tokens), given, segments)
    return jnp.where(scored, steps, 0)


def scored_steps(length: int, given: int = 1, segments: Segments | None = None) -> Bool[Array, " N"]:
    """Which of the N = length - 1 steps of a path count: those after the `given` tokens, inside a document."""
    scored = jnp.arange(1, length) >= given
    if segments is not None:
        scored &= (segments[1:] == segments[:-1]) & (segments[1:] != 0)
    return scored


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
    """n independent continuations of `prompt` [P], exact samples of the model's law, by its recurrent form.

    temperature, top_k, top_p: off by default, as each *changes the law* that is sampled (temperature first, then
    the k most probable tokens, then the fewest whose probability reaches p). The log-probabilities returned
    are under the model's own law in any case. Raises ValueError for an empty prompt, one that leaves no room for
    `steps` tokens, and options out of range.
    """
    prompt = _check_prompt(model, prompt, steps)
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}. top_k=1 is the greedy choice.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability above 0, got {top_p}.")
    if n < 1:
        raise ValueError(f"n: expected at least 1 path, got {n}.")
    return _sample(model, prompt, key, temperature, top_p, steps=steps, n=n, top_k=top_k)[0]


# What is traced is compiled once for a model's structure and these choices, wherever it is called from.
@functools.partial(jax.jit, static_argnames=("steps", "n", "top_k", "proposal"))
def _sample(
    model: Transformer,
    prompt: Array,
    key: Key,
    temperature: Array | float | None,
    top_p: Array | float | None,
    *,
    steps: int,
    n: int,
    top_k: int | None,
    proposal: Proposal | None = None,
) -> tuple[Paths, Float[Array, " n"]]:
    """Sampled paths, and their log-probabilities under the law that they were sampled from."""
    state, logits = prefill(model, prompt, len(prompt) + steps - 1)
    law = functools.partial(altered_law, temperature=temperature, top_k=top_k, top_p=top_p)

    def draw(logits: Array, key: Key) -> tuple[Array, Array, Array]:
        sampled = law(logits if proposal is None else proposal(logits))
        token = jax.random.categorical(key, sampled)
        return token, jax.nn.log_softmax(logits)[token], jax.nn.log_softmax(sampled)[token]

    def one(key: Key) -> tuple[Array, Array, Array]:
        def body(carry: tuple[State, Array], key: Key) -> tuple[tuple[State, Array], tuple[Array, Array, Array]]:
            state, logits = carry
            drawn = draw(logits, key)
            return step(model, state, drawn[0]), drawn

        keys = jax.random.split(key, steps)
        (_, final), (tokens, log_probs, log_sampled) = lax.scan(body, (state, logits), keys[:-1])
        token, log_prob, last_sampled = draw(final, keys[-1])  # the last token is drawn, but not walked
        return jnp.append(tokens, token), log_probs.sum() + log_prob, log_sampled.sum() + last_sampled

    tokens, log_probs, log_sampled = jax.vmap(one)(jax.random.split(key, n))
    mass = jnp.where(_first_occurrence(tokens), jnp.exp(log_probs), 0).sum()
    return Paths(tokens, log_probs, 1 - mass, jnp.full((), jnp.nan)), log_sampled


def altered_law(
    logits: Float[Array, " V"], temperature: Array | float | None, top_k: int | None, top_p: Array | float | None
) -> Float[Array, " V"]:
    """The logits of the law that sampling options leave, -inf where a token is excluded."""
    if temperature is not None:
        logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        kept = jnp.zeros(len(logits), bool).at[lax.top_k(logits, top_k)[1]].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    if top_p is not None:
        order = jnp.argsort(-logits)
        probs = jax.nn.softmax(logits)[order]
        kept = jnp.zeros(len(logits), bool).at[order].set(jnp.cumsum(probs) - probs < top_p)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


def _first_occurrence(rows: Int[Array, "n m"]) -> Bool[Array, " n"]:
    """Which rows are not a repetition of an earlier one."""
    order = jnp.lexsort(rows.T)
    ordered = rows[order]
    new = jnp.concatenate([jnp.ones(1, bool), jnp.any(ordered[1:] != ordered[:-1], axis=1)])
    return jnp.zeros(len(rows), bool).at[order].set(new)


def _check_prompt(model: Transformer, prompt: Tokens, steps: int) -> Int[Array, " P"]:
    prompt = check_tokens(model, prompt)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    if len(prompt) + steps > model.max_length + 1:
        raise ValueError(
            f"steps: expected prompt and steps within max_length + 1 = {model.max_length + 1} tokens, "
            f"got {len(prompt)} + {steps}."
        )
    return prompt


class _Search(NamedTuple):
    """A best-first search: prefixes to expand (-inf: an empty slot), the best complete paths, what was let go.

    parents: of each prefix, the slot of `states` that holds the state after all its tokens but the last.
    """

    tokens: Int[Array, "C steps"]
    lengths: Int[Array, " C"]
    parents: Int[Array, " C"]
    log_probs: Float[Array, " C"]
    done_tokens: Int[Array, "k steps"]
    done_log_probs: Float[Array, " k"]
    dropped: Float[Array, ""]
    expanded: Int[Array, ""]
    states: State


def top_paths(
    model: Transformer,
    prompt: Tokens,
    steps: int,
    k: int,
    *,
    budget: int | None = None,
    width: int = 16,
    branch: int = 256,
    capacity: int | None = None,
) -> Paths:
    """The k most probable continuations of `prompt` [P] by `steps` tokens, in order, by best-first search.

    Log-probabilities never increase along a path, so a path at or above every unexpanded prefix is exact: compare
    `log_probs` with `bound`. On a flat law the frontier explodes: the search then stops at its `budget` and says
    through `bound` and `unexplored_mass` what it left.

    budget: the most prefixes that are expanded. Their states are kept for their continuations, if all fit into `STATES`
    bytes; else each is retraced from the prompt's, which takes as many steps as it has tokens. By default as many as
    fit, from 64 to 1024. width: how many are expanded together. branch: how many continuations of a prefix by one token
    are kept, the most probable ones. capacity: how many prefixes are kept for later. What is not kept counts in
    `bound`: the answer is exact in any case as far as the certificate says. Slots that no path fills have
    log-probability -inf and tokens -1. Raises ValueError for an empty prompt, one that leaves no room for `steps`
    tokens, and sizes below 1.
    """
    prompt = _check_prompt(model, prompt, steps)
    if k < 1:
        raise ValueError(f"k: expected at least 1 path, got {k}.")
    for what, number in {"budget": budget, "width": width, "branch": branch, "capacity": capacity}.items():
        if number is not None and number < 1:
            raise ValueError(f"{what}: expected at least 1, got {number}.")
    state = jax.eval_shape(functools.partial(prefill, length=len(prompt) + steps - 1), model, prompt)[0]
    fit = STATES // sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    budget = max(64, min(1024, fit)) if budget is None else budget
    kept = budget <= fit
    width, branch = min(width, budget), min(branch, model.vocab_size)
    capacity = max(4 * budget if capacity is None else capacity, width)
    return _search(
        model, prompt, steps=steps, k=k, budget=budget, width=width, branch=branch, capacity=capacity, kept=kept
    )


@functools.partial(jax.jit, static_argnames=("steps", "k", "budget", "width", "branch", "capacity", "kept"))
def _search(
    model: Transformer,
    prompt: Array,
    *,
    steps: int,
    k: int,
    budget: int,
    width: int,
    branch: int,
    capacity: int,
    kept: bool,
) -> Paths:
    state, logits = prefill(model, prompt, len(prompt) + steps - 1)
    start = jax.nn.log_softmax(logits)

    def take(state: State, token: Array) -> tuple[State, Array]:
        state, logits = step(model, state, token)
        return state, jax.nn.log_softmax(logits)

    def retraced(tokens: Array, length: Array) -> tuple[State, Array]:
        def body(carry: tuple[State, Array], item: tuple[Array, Array]) -> tuple[tuple[State, Array], None]:
            token, i = item
            return lax.cond(i < length, lambda carry: take(carry[0], token), lambda carry: carry, carry), None

        tokens = jnp.maximum(tokens[: steps - 1], 0)
        return lax.scan(body, (state, start), (tokens, jnp.arange(steps - 1)))[0]

    def unfinished(search: _Search) -> Array:
        best = search.log_probs.max()
        return (best > -jnp.inf) & (best > search.done_log_probs[-1]) & (search.expanded < budget)

    def expand(search: _Search) -> _Search:
        best, slots = lax.top_k(search.log_probs, width)
        # Within the budget, and never a prefix that cannot matter any more.
        chosen = (best > search.done_log_probs[-1]) & (search.expanded + jnp.arange(width) < budget)
        tokens, lengths, parents = search.tokens[slots], search.lengths[slots], search.parents[slots]
        if kept:
            before = jax.tree.map(lambda a: a[parents], search.states)
            after, laws = jax.vmap(take)(before, tokens[jnp.arange(width), lengths - 1])
            # What is expanded is counted on from `expanded`, and so are the slots; a slot beyond the last is no slot.
            new = jnp.where(chosen, search.expanded + jnp.arange(width), budget)
            states = jax.tree.map(lambda a, b: a.at[new].set(b, mode="drop"), search.states, after)
        else:
            new, states = parents, search.states
            laws = jax.vmap(retraced)(tokens, lengths)[1]
        search = search._replace(
            states=states,
            log_probs=search.log_probs.at[slots].set(jnp.where(chosen, -jnp.inf, best)),
            expanded=search.expanded + chosen.sum(),
        )
        children = jnp.where(chosen[:, None], best[:, None] + laws, -jnp.inf)
        return extended(search, children, tokens, lengths, new)

    def extended(search: _Search, children: Array, tokens: Array, lengths: Array, parents: Array) -> _Search:
        """The search with the `children` [n, V] of prefixes, by one token each."""
        # Behind the barrier, as XLA on CPU sorts all of what is sliced right after.
        log_probs, ids = lax.optimization_barrier(lax.top_k(children, min(branch + 1, children.shape[1])))
        if branch < children.shape[1]:  # the first of those that are not kept
            search = search._replace(dropped=jnp.maximum(search.dropped, log_probs[:, -1].max()))
            log_probs, ids = log_probs[:, :branch], ids[:, :branch]
        n, B = log_probs.shape
        row = jnp.repeat(jnp.arange(n), B)
        tokens = tokens[row].at[jnp.arange(n * B), lengths[row]].set(ids.ravel())
        complete = (lengths + 1 == steps)[:, None]

        finished = jnp.where(complete, log_probs, -jnp.inf).ravel()
        done_log_probs, order = lax.top_k(jnp.concatenate([search.done_log_probs, finished]), k)
        done_tokens = jnp.concatenate([search.done_tokens, tokens])[order]

        pool = jnp.concatenate([search.log_probs, jnp.where(complete, -jnp.inf, log_probs).ravel()])
        best, order = lax.top_k(pool, capacity)
        lost = jnp.where(jnp.full(len(pool), True).at[order].set(False), pool, -jnp.inf).max(initial=-jnp.inf)
        join = lambda old, new: jnp.concatenate([old, new])[order]
        return search._replace(
            tokens=join(search.tokens, tokens),
            lengths=join(search.lengths, lengths[row] + 1),
            parents=join(search.parents, parents[row]),
            log_probs=best,
            done_tokens=jnp.where(jnp.isneginf(done_log_probs)[:, None], -1, done_tokens),
            done_log_probs=done_log_probs,
            dropped=jnp.maximum(search.dropped, lost),
        )

    minus = functools.partial(jnp.full, fill_value=-jnp.inf, dtype=start.dtype)
    slots = budget if kept else 1
    search = _Search(
        tokens=jnp.zeros((capacity, steps), int),
        lengths=jnp.zeros(capacity, int),
        parents=jnp.zeros(capacity, int),
        log_probs=minus(capacity),
        done_tokens=jnp.full((k, steps), -1),
        done_log_probs=minus(k),
        dropped=minus(()),
        expanded=jnp.array(1),  # the empty prefix, whose state is in the first slot
        states=jax.tree.map(lambda a: jnp.zeros((slots, *jnp.shape(a)), jnp.result_type(a)).at[0].set(a), state),
    )
    root = jnp.zeros((1, steps), int), jnp.zeros(1, int), jnp.zeros(1, int)
    search = lax.while_loop(unfinished, expand, extended(search, start[None], *root))
    bound = jnp.maximum(search.dropped, search.log_probs.max())
    return Paths(search.done_tokens, search.done_log_probs, 1 - jnp.exp(search.done_log_probs).sum(), bound)


class PrefixTree(NamedTuple):
    """The distinct prefixes of some paths, each after the one it continues; the first is the empty one.

    parent: [N], the prefix without its last token (-1 of the empty one). token: [N], the last token (-1). depth: [N],
    how many tokens. mass: [N], the summed probability of the paths that begin so.
    """

    parent: Int[np.ndarray, " N"]
    token: Int[np.ndarray, " N"]
    depth: Int[np.ndarray, " N"]
    mass: Float[np.ndarray, " N"]


def prefix_tree(paths: Paths) -> PrefixTree:
    """The tree of the distinct paths in `paths`, as data; slots that no path fills are left out."""
    there = np.isfinite(np.asarray(paths.log_probs))
    rows, index = np.unique(np.asarray(paths.tokens)[there], axis=0, return_index=True)
    probs = np.exp(np.asarray(paths.log_probs, np.float64)[there][index])
    parent, token, depth, mass = [-1], [-1], [0], [float(probs.sum())]
    above = np.zeros(len(rows), int)  # of each path, the number of its prefix so far
    for column in range(rows.shape[1]):
        # Rows are in lexicographic order: the rows of one prefix stand together.
        new = np.any(rows[1:, : column + 1] != rows[:-1, : column + 1], axis=1)
        group = np.concatenate([[0], np.cumsum(new)]) if len(rows) else above
        first = np.unique(group, return_index=True)[1]
        start = len(parent)
        parent += above[first].tolist()
        token += rows[first, column].tolist()
        depth += [column + 1] * len(first)
        mass += np.bincount(group, probs).tolist()
        above = start + group
    return PrefixTree(np.array(parent), np.array(token), np.array(depth), np.array(mass))


def continuations(vocab_size: int, steps: int) -> Int[np.ndarray, "N steps"]:
    """All V^steps token sequences, in lexicographic order."""
    return np.array(list(itertools.product(range(vocab_size), repeat=steps)), np.int32).reshape(-1, steps)


def _enumerable(model: Transformer, steps: int) -> bool:
    return steps * math.log(model.vocab_size) <= math.log(ENUMERABLE) + 1e-9


def enumerated_log_probs(
    model: Transformer, prompt: Tokens, steps: int, *, batch: int = 256
) -> tuple[Int[Array, "N steps"], Float[Array, " N"]]:
    """Every continuation of `prompt` [P] by `steps` tokens and its exact log-probability. N = V^steps.

    Raises ValueError if there are more than `ENUMERABLE`.
    """
    prompt = _check_prompt(model, prompt, steps)
    if not _enumerable(model, steps):
        raise ValueError(
            f"steps: expected V^steps <= {ENUMERABLE}, got {model.vocab_size}^{steps}. "
            "Sample (sample_paths), or search (top_paths)."
        )
    after = jnp.asarray(continuations(model.vocab_size, steps))
    return after, _score(model, prompt, after, batch=min(batch, len(after)))


@functools.partial(jax.jit, static_argnames="batch")
def _score(model: Transformer, prompt: Array, after: Array, *, batch: int) -> Array:
    def score(row: Array) -> Array:
        return path_log_prob(model, jnp.concatenate([prompt, row]), given=len(prompt))

    return lax.map(score, after, batch_size=batch)


def path_entropy(
    model: Transformer,
    prompt: Tokens,
    steps: int,
    *,
    key: Key | None = None,
    samples: int = 1024,
    proposal: Proposal | None = None,
) -> Estimate:
    """Entropy, in nats, of the law of the next `steps` tokens after `prompt` [P]; its exp is the effective path count.

    Exact, by enumeration, when V^steps <= `ENUMERABLE`; else a Monte Carlo estimate with its standard error over
    `samples` paths, which needs a `key`: the mean over sampled paths of the summed entropies of their steps, whose
    expectation is the entropy by the chain rule and which varies less than -log P. proposal: as in `event_probability`.
    """
    prompt = _check_prompt(model, prompt, steps)
    if _enumerable(model, steps):
        log_probs = enumerated_log_probs(model, prompt, steps)[1]
        return _exact(-jnp.sum(jnp.exp(log_probs) * log_probs))
    sampled, weights = _weighted(model, prompt, key, steps, samples, proposal)
    values = weights * _summed_entropies(model, prompt, sampled)
    return Estimate(values.mean(), values.std(ddof=1) / math.sqrt(samples), _effective(weights))


@jax.jit
def _summed_entropies(model: Transformer, prompt: Array, after: Array) -> Array:
    def entropies(row: Array) -> Array:
        laws = next_log_probs(model, jnp.concatenate([prompt, row])[:-1])[len(prompt) - 1 :]
        return -jnp.sum(jnp.exp(laws) * laws)

    return lax.map(entropies, after, batch_size=min(64, len(after)))


def event_probability(
    model: Transformer,
    prompt: Tokens,
    steps: int,
    event: Callable[[Int[Array, " steps"]], Bool[Array, ""]],
    *,
    key: Key | None = None,
    samples: int = 1024,
    proposal: Proposal | None = None,
) -> Estimate:
    """Probability that the next `steps` tokens after `prompt` [P] are such that `event(tokens [steps])` is true.

    `event` is traced, as in `visits(ids)`. Exact, by enumeration, when V^steps <= `ENUMERABLE`; else the share of
    `samples` sampled paths, which need a `key`, with its standard error (where no path or every path is one, and the
    usual error would be 0, that of one more on the other side).

    proposal: for rare events, samples another law, such as `Tilt(ids, nats)`, and weighs each path by what it is
    likelier under the model (importance sampling). Look at `effective_samples`: a proposal that seldom goes where the
    model does has few.
    """
    prompt = _check_prompt(model, prompt, steps)
    if _enumerable(model, steps):
        after, log_probs = enumerated_log_probs(model, prompt, steps)
        return _exact(jnp.where(jax.vmap(event)(after), jnp.exp(log_probs), 0).sum())
    sampled, weights = _weighted(model, prompt, key, steps, samples, proposal)
    happened = jax.vmap(event)(sampled)
    value = jnp.where(happened, weights, 0).mean()
    if proposal is None:
        smoothed = jnp.clip(value, 1 / (samples + 1), samples / (samples + 1))
        return Estimate(value, jnp.sqrt(smoothed * (1 - smoothed) / samples), _effective(weights))
    one_more = jnp.where(happened.any(), 0, weights.max() ** 2)
    squares = jnp.sum((jnp.where(happened, weights, 0) - value) ** 2) + one_more
    return Estimate(value, jnp.sqrt(squares) / samples, _effective(weights))


def _weighted(
    model: Transformer, prompt: Array, key: Key | None, steps: int, samples: int, proposal: Proposal | None
) -> tuple[Int[Array, "n steps"], Float[Array, " n"]]:
    """Sampled paths and their weights, P / Q."""
    if key is None:
        raise ValueError(
            f"key: expected a jax.random key, got None. {model.vocab_size}^{steps} paths are too many to enumerate, "
            "so this is estimated from samples."
        )
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}.")
    paths, log_sampled = _sample(model, prompt, key, None, None, steps=steps, n=samples, top_k=None, proposal=proposal)
    return paths.tokens, jnp.exp(paths.log_probs - log_sampled)


def _effective(weights: Float[Array, " n"]) -> Float[Array, ""]:
    return weights.sum() ** 2 / (weights**2).sum()


def _exact(value: Float[Array, ""]) -> Estimate:
    return Estimate(value, jnp.zeros_like(value), jnp.full_like(value, jnp.inf))


def visits(ids: Sequence[int] | int) -> Callable[[Int[Array, " steps"]], Bool[Array, ""]]:
    """The event that a walk visits one of the token `ids`."""
    wanted = jnp.atleast_1d(jnp.asarray(ids))
    return lambda tokens: jnp.isin(tokens, wanted).any()
