"""Best-first search for the most probable paths, with a certificate of optimality."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.filters import indices
from jaxwalk.model.decoding import State, prefilled, stepped
from jaxwalk.model.inputs import Tokens, is_traced
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.sampling import Paths, check_prompt, room_for

STATE_BYTES = 1 << 30
"""Memory limit for the decoding states of expanded prefixes, in bytes."""
FIRST_SLOTS = 64
"""The number of states allocated at first. A search that expands more prefixes repeatedly gets four times as many."""


class Search(NamedTuple):
    """The state of a best-first search: the frontier of C prefixes, the best complete paths, and what was dropped.

    Attributes:
        tokens: [C, steps], the prefixes.
        lengths: [C], their lengths.
        parents: [C], for each prefix, the slot in `states` of the state after all its tokens but the last.
        log_probs: [C], -inf for an empty entry.
        done_tokens: [k, steps], the best complete paths; -1 for an empty entry.
        done_log_probs: [k], in decreasing order.
        dropped: [], the largest log-probability of a prefix that was discarded.
        expanded: [], the number of prefixes expanded so far.
        states: the decoding states of expanded prefixes, stacked by slot.
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


class Sizes(NamedTuple):
    """The static sizes of a search.

    Attributes:
        steps: the length of the paths.
        k: the number of paths to find.
        width: the number of prefixes expanded together.
        branch: the number of continuations kept per prefix.
        capacity: the number of prefixes in the frontier.
        keep_states: whether states are stored; otherwise they are recomputed from the prompt.
    """

    steps: int
    k: int
    width: int
    branch: int
    capacity: int
    keep_states: bool


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
    """The k most probable continuations of `prompt` by `steps` tokens, by best-first search.

    Log-probabilities never increase along a path, so a path at or above every unexpanded prefix is among the most
    probable ones, exactly (up to rounding): compare `log_probs` with `bound`. If the law is nearly uniform, the
    frontier grows exponentially; the search then stops at its `budget`, and `bound` and `unexplored_mass` quantify what
    it left unexplored.

    Args:
        model: the model.
        prompt: [P], at least one token.
        steps: the length of the continuations.
        k: the number of continuations.
        budget: the largest number of prefixes to expand. By default the number whose states fit in memory, between 64
            and 1024. Beyond that, states are not stored: each prefix is recomputed from the prompt, one step per token.
        width: the number of prefixes expanded together.
        branch: the number of continuations of a prefix by one token that are kept, the most probable ones.
        capacity: the number of prefixes kept in the frontier. `bound` accounts for those dropped, so the certificate
            holds.

    Returns:
        Paths with tokens [k, steps] and log_probs [k] in nats, in decreasing order. Entries beyond the number of paths
        that exist or were found have log-probability -inf and tokens -1.

    Raises:
        ValueError: if the prompt is empty or leaves no room for `steps` tokens, or a size is below 1.
    """
    path = check_prompt(model, prompt, steps)
    if k < 1:
        raise ValueError(f"k: expected at least 1 path, got {k}.")
    for name, size in {"budget": budget, "width": width, "branch": branch, "capacity": capacity}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}.")
    room = room_for(model, path, steps)
    max_states = STATE_BYTES // _state_bytes(model, room)
    budget = max(64, min(1024, max_states)) if budget is None else budget
    prefixes = _count_prefixes(model.vocab_size, steps, budget)
    width = min(width, budget)
    sizes = Sizes(
        steps=steps,
        k=k,
        width=width,
        branch=min(branch, model.vocab_size),
        capacity=max(4 * budget if capacity is None else capacity, width),
        keep_states=budget <= max_states,
    )
    slots = min(budget, prefixes) if sizes.keep_states else 1
    stages = [slots]
    if not is_traced(model, path.tokens):  # growing between stages needs concrete values
        while stages[0] > FIRST_SLOTS:
            stages.insert(0, max(FIRST_SLOTS, stages[0] // 4))
    budget_now = np.int32(budget if len(stages) == 1 else stages[0])
    paths, search = _start(model, path.tokens, path.count, budget_now, room=room, slots=stages[0], sizes=sizes)
    for slots in stages[1:]:
        if int(search.expanded) < int(budget_now):
            break
        budget_now = np.int32(budget if slots == stages[-1] else slots)
        paths, search = _resume(model, path.tokens, path.count, search, budget_now, room=room, slots=slots, sizes=sizes)
    return paths


def _state_bytes(model: Transformer, room: int) -> int:
    memory = jax.eval_shape(lambda: model.layers.init_memory(room))
    return max(1, sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(memory)))


def _count_prefixes(vocab_size: int, steps: int, limit: int) -> int:
    """The number V^0 + .. + V^(steps-1) of prefixes that can be expanded, the empty one included, at most `limit`."""
    if vocab_size > 1 and (steps - 1) * math.log(vocab_size) > math.log(limit):
        return limit
    return min(limit, sum(vocab_size**i for i in range(steps)))


@functools.partial(jax.jit, static_argnames=("room", "slots", "sizes"))
def _start(
    model: Transformer, prompt: Array, count: Array, budget: Array, *, room: int, slots: int, sizes: Sizes
) -> tuple[Paths, Search]:
    search = _Searcher(model, prompt, count, room, sizes).start(slots)
    return _run(model, prompt, count, search, budget, room, sizes)


@functools.partial(jax.jit, static_argnames=("room", "slots", "sizes"))
def _resume(
    model: Transformer,
    prompt: Array,
    count: Array,
    search: Search,
    budget: Array,
    *,
    room: int,
    slots: int,
    sizes: Sizes,
) -> tuple[Paths, Search]:
    grow = lambda a: jnp.concatenate([a, jnp.zeros((slots - len(a), *a.shape[1:]), a.dtype)])
    search = search._replace(states=jax.tree.map(grow, search.states))
    return _run(model, prompt, count, search, budget, room, sizes)


def _run(
    model: Transformer, prompt: Array, count: Array, search: Search, budget: Array, room: int, sizes: Sizes
) -> tuple[Paths, Search]:
    searcher = _Searcher(model, prompt, count, room, sizes)
    search = lax.while_loop(lambda s: _unfinished(s, budget), lambda s: searcher.expand(s, budget), search)
    bound = jnp.maximum(search.dropped, search.log_probs.max())
    mass = 1 - jnp.exp(search.done_log_probs).sum()
    return Paths(search.done_tokens, search.done_log_probs, mass, bound), search


def _unfinished(search: Search, budget: Array) -> Array:
    best = search.log_probs.max()
    return (best > -jnp.inf) & (best > search.done_log_probs[-1]) & (search.expanded < budget)


class _Searcher:
    """The operations of a search for one model and prompt."""

    def __init__(self, model: Transformer, prompt: Array, count: Array, room: int, sizes: Sizes) -> None:
        self.model, self.sizes = model, sizes
        length = count + sizes.steps - 1
        self.state, logits = prefilled(model, prompt, count, length, room)
        self.law = jax.nn.log_softmax(logits)

    def start(self, slots: int) -> Search:
        """The search after expanding the empty prefix."""
        steps, k, capacity = self.sizes.steps, self.sizes.k, self.sizes.capacity
        empty = functools.partial(jnp.full, fill_value=-jnp.inf, dtype=self.law.dtype)
        search = Search(
            tokens=jnp.zeros((capacity, steps), jnp.int32),
            lengths=jnp.zeros(capacity, jnp.int32),
            parents=jnp.zeros(capacity, jnp.int32),
            log_probs=empty(capacity),
            done_tokens=jnp.full((k, steps), -1, jnp.int32),
            done_log_probs=empty(k),
            dropped=empty(()),
            expanded=jnp.array(1, jnp.int32),  # the empty prefix, whose state is in the first slot
            states=jax.tree.map(
                lambda a: jnp.zeros((slots, *jnp.shape(a)), jnp.result_type(a)).at[0].set(a), self.state
            ),
        )
        root = jnp.zeros((1, steps), jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
        return self.extend(search, self.law[None], *root)

    def advance(self, state: State, token: Array) -> tuple[State, Array]:
        """The state after `token` and the law of the next token."""
        state, logits = stepped(self.model, state, token)
        return state, jax.nn.log_softmax(logits)

    def recomputed_law(self, tokens: Array, length: Array) -> Array:
        """The law after a prefix, recomputed from the prompt."""

        def body(carry: tuple[State, Array], item: tuple[Array, Array]) -> tuple[tuple[State, Array], None]:
            token, i = item
            return lax.cond(i < length, lambda carry: self.advance(carry[0], token), lambda carry: carry, carry), None

        tokens = jnp.maximum(tokens[: self.sizes.steps - 1], 0)
        return lax.scan(body, (self.state, self.law), (tokens, indices(self.sizes.steps - 1)))[0][1]

    def expand(self, search: Search, budget: Array) -> Search:
        """The search after expanding its most probable prefixes."""
        width = self.sizes.width
        best, slots = lax.top_k(search.log_probs, width)
        # A prefix below the k-th complete path cannot lead to a better one.
        chosen = (best > search.done_log_probs[-1]) & (search.expanded + indices(width) < budget)
        tokens, lengths, parents = search.tokens[slots], search.lengths[slots], search.parents[slots]
        if self.sizes.keep_states:
            before = jax.tree.map(lambda a: a[parents], search.states)
            after, laws = jax.vmap(self.advance)(before, tokens[indices(width), lengths - 1])
            # The n-th expanded prefix stores its state in slot n; an index out of range stores nothing.
            new_slots = jnp.where(chosen, search.expanded + indices(width), len(jax.tree.leaves(search.states)[0]))
            states = jax.tree.map(lambda a, b: a.at[new_slots].set(b, mode="drop"), search.states, after)
        else:
            new_slots, states = parents, search.states
            laws = jax.vmap(self.recomputed_law)(tokens, lengths)
        search = search._replace(
            states=states,
            log_probs=search.log_probs.at[slots].set(jnp.where(chosen, -jnp.inf, best)),
            expanded=search.expanded + chosen.sum(dtype=jnp.int32),
        )
        children = jnp.where(chosen[:, None], best[:, None] + laws, -jnp.inf)
        return self.extend(search, children, tokens, lengths, new_slots.astype(jnp.int32))

    def extend(self, search: Search, children: Array, tokens: Array, lengths: Array, parents: Array) -> Search:
        """The search after adding n prefixes extended by one token, with log-probabilities `children` [n, V]."""
        steps, k, _, branch, capacity, _ = self.sizes
        # Without the barrier, XLA on CPU turns a sliced top_k into a full sort.
        log_probs, ids = lax.optimization_barrier(lax.top_k(children, min(branch + 1, children.shape[1])))
        if branch < children.shape[1]:
            search = search._replace(dropped=jnp.maximum(search.dropped, log_probs[:, -1].max()))
            log_probs, ids = log_probs[:, :branch], ids[:, :branch]
        n, B = log_probs.shape
        row = jnp.repeat(indices(n), B)
        tokens = tokens[row].at[indices(n * B), lengths[row]].set(ids.ravel().astype(jnp.int32))
        complete = (lengths + 1 == steps)[:, None]

        finished = jnp.where(complete, log_probs, -jnp.inf).ravel()
        done_log_probs, order = lax.top_k(jnp.concatenate([search.done_log_probs, finished]), k)
        done_tokens = jnp.concatenate([search.done_tokens, tokens])[order]

        pool = jnp.concatenate([search.log_probs, jnp.where(complete, -jnp.inf, log_probs).ravel()])
        best, order = lax.top_k(pool, capacity)
        evicted = jnp.where(jnp.full(len(pool), True).at[order].set(False), pool, -jnp.inf).max(initial=-jnp.inf)
        join = lambda old, new: jnp.concatenate([old, new])[order]
        return search._replace(
            tokens=join(search.tokens, tokens),
            lengths=join(search.lengths, lengths[row] + 1),
            parents=join(search.parents, parents[row]),
            log_probs=best,
            done_tokens=jnp.where(jnp.isneginf(done_log_probs)[:, None], -1, done_tokens),
            done_log_probs=done_log_probs,
            dropped=jnp.maximum(search.dropped, evicted),
        )
