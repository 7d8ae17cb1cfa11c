"""Probabilistic context-free grammars as worlds: the law of a stream of sentences, token by token.

The law of the next token needs the probability of a prefix, summed over all derivations and all that may follow
(Jelinek & Lafferty 1991). It is computed from left to right, as by Stolcke (1995, cmp-lg/9411029), on the grammar
in Chomsky normal form (A -> B C, A -> word), with three numbers, all relative to the probability of the prefix:

    expected[i, A]   how often a derivation of the prefix of i tokens is about to expand A there, in expectation
    done[i, A]       of these, how often A has made exactly the tokens from i up to now
    share[i, k, r]   of the C expected at k, the share that rule r: A -> B C expects, with A begun at i and B over i..k

None is a product of more than one word's probability, so float32 stays finite on sentences of any length.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Int32

from jaxwalk.config import unknown
from jaxwalk.worlds._world import World

Rules = dict[str, list[tuple[float, tuple[str, ...]]]]

_TOLERANCE = 1e-8  # how far a sum of probabilities may be from 1: rounding, or a typed decimal
_dot = functools.partial(jnp.einsum, precision="highest")  # accelerators would multiply float32 coarsely


class Grammar(World):
    """A world whose paths are sentences of a grammar, independent of each other, each ended by `stop`.

    A path begins where a sentence begins, and ends anywhere. Attributes beside those of every world: `stop`, the id
    of the token that ends a sentence, and `categories`, from the name of each nonterminal that only rewrites to
    single words to the ids of these, in the grammar's order: the ground truth of what words have in common. A word
    may belong to several.
    """

    stop: int
    categories: Mapping[str, tuple[int, ...]]

    def __init__(self, rules: Mapping[str, Any], start: str, stop: str, name: str | None = None) -> None:
        """A world from its rules, or ValueError with the reason why they are no grammar; see `worlds.grammar`."""
        parsed = _parse(rules, start, stop)
        words = list(dict.fromkeys(s for options in parsed.values() for _, side in options for s in side))
        words = [word for word in words if word not in parsed]
        plain = {head: [[p, " ".join(side)] for p, side in options] for head, options in parsed.items()}
        super().__init__(len(words) + 1, (*words, stop), name, {"rules": plain, "start": start, "stop": stop})
        self.stop = len(words)
        ids = {word: v for v, word in enumerate(words)}
        self.categories = MappingProxyType(
            {
                head: tuple(dict.fromkeys(ids[side[0]] for _, side in options))
                for head, options in parsed.items()
                if all(len(side) == 1 and side[0] in ids for _, side in options)
            }
        )
        _check_consistent(parsed)
        self._form = _normal_form(parsed, start, ids)

    def string_log_prob(self, tokens: Int[ArrayLike, " T"]) -> Float[Array, ""]:
        """log P(a sentence is exactly `tokens`) in nats, over all its derivations; `tokens` without the `stop`.

        -inf where `tokens` is no sentence. Token ids out of range: as in `path_log_prob`.
        """
        tokens = self._tokens(tokens)
        path = jnp.concatenate([tokens, jnp.full(1, self.stop, jnp.int32)])
        # With another stop among them they would be several sentences.
        return jnp.where((tokens == self.stop).any(), -jnp.inf, 0) + self.path_log_prob(path)

    def _laws(self, tokens: Int32[Array, " T"]) -> Float[Array, "T+1 V"]:
        return _laws(jax.tree.map(_in_default_type, self._form), tokens)

    def _sample(self, key: Array, n: int, length: int) -> Int32[Array, "n length"]:
        return _sample(self._outcomes, key, n, length)

    @functools.cached_property
    def _outcomes(self) -> "_Outcomes":
        form = self._form
        heads = range(len(form.expected))
        options: list[list[tuple[float, int, int, int]]] = [[] for _ in heads]
        for p, head, left, right in zip(form.prob, form.head, form.left, form.right, strict=True):
            options[head].append((p, -1, left, right))
        for head in heads:
            options[head] += [(form.word[head, v], int(v), 0, 0) for v in np.flatnonzero(form.word[head])]
        width = max(map(len, options))
        table = np.zeros((len(options), width, 4))
        for head, rows in enumerate(options):
            table[head, : len(rows)] = rows
        cumulative = np.cumsum(table[..., 0], axis=1)
        # Ends at exactly 1, so that no uniform number below 1 falls beyond the last possible outcome.
        cumulative[cumulative >= cumulative[:, -1:]] = 1.0
        word, left, right = np.moveaxis(table[..., 1:], 2, 0).astype(np.int32)
        return _Outcomes(cumulative, word, left, right, self.stop)


# What rules must satisfy.


def _parse(rules: Mapping[str, Any], start: str, stop: str) -> Rules:
    """The rules as tuples, or ValueError for all that is wrong with them one by one."""
    if not isinstance(rules, Mapping) or not rules:
        raise ValueError(f"rules: expected a mapping from nonterminals to their expansions, got {rules!r}.")
    parsed: Rules = {}
    for head, options in rules.items():
        if not isinstance(head, str) or len(head.split()) != 1 or not head[0].isupper():
            raise ValueError(
                f"rules: expected names of nonterminals that begin with a capital letter, got {head!r}. Rename it; "
                "words begin otherwise."
            )
        parsed[head] = [_option(head, option) for option in _as_list(head, options)]
        total = math.fsum(p for p, _ in parsed[head])
        if abs(total - 1) > _TOLERANCE:
            raise ValueError(
                f"rules[{head!r}]: expected probabilities that sum to 1, got {total:.9g}. Divide each by {total:.9g}."
            )
    for head, options in parsed.items():
        for symbol in (s for _, side in options for s in side):
            if symbol[0].isupper() and symbol not in parsed:
                raise ValueError(f"rules[{head!r}]: {unknown('nonterminal', symbol, parsed)} Words begin otherwise.")
            if symbol == stop:
                raise ValueError(f"stop: expected a token that is no word, got {stop!r}. Choose another.")
    if start not in parsed:
        raise ValueError(f"start: {unknown('nonterminal', start, parsed)}")
    if not isinstance(stop, str) or stop.split() != [stop]:
        raise ValueError(f"stop: expected a token without whitespace, got {stop!r}. Choose another.")
    found = _reachable(start, {h: [s for _, side in options for s in side] for h, options in parsed.items()})
    if lost := sorted(parsed.keys() - found):
        raise ValueError(
            f"rules: expected nonterminals that come up in sentences, got {', '.join(lost)}, which cannot be reached "
            f"from {start!r}. Use them in a rule, or remove them."
        )
    return parsed


def _as_list(head: str, options: Any) -> list[Any]:
    if not isinstance(options, list | tuple) or not options:
        raise ValueError(
            f"rules[{head!r}]: expected a list of pairs (probability, 'right-hand side'), got {options!r}. "
            "Write one pair for each expansion."
        )
    return list(options)


def _option(head: str, option: Any) -> tuple[float, tuple[str, ...]]:
    try:
        p, side = option
        p, side = float(p), tuple(side.split())
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"rules[{head!r}]: expected a pair (probability, 'right-hand side'), got {option!r}. Separate the symbols "
            "of the right-hand side by spaces."
        ) from error
    if not 0 < p <= 1:
        raise ValueError(
            f"rules[{head!r}]: expected probabilities above 0, up to 1, got {p:g}. Leave out what is never."
        )
    if not side:
        raise ValueError(
            f"rules[{head!r}]: expected at least one symbol on the right-hand side, got none. Instead of an empty "
            "production, write out the rules that use this nonterminal with it and without it."
        )
    return p, side


def _reachable(start: Any, children: Mapping[Any, Any]) -> set[Any]:
    found, waiting = {start}, [start]
    while waiting:
        new = {s for s in children[waiting.pop()] if s in children} - found
        found |= new
        waiting += new
    return found


def _check_consistent(rules: Rules) -> None:
    """ValueError unless derivations end, and sentences have a finite length in expectation.

    That is so if the spectral radius of the matrix of expected offspring is below 1 (Booth & Thompson 1973).
    """
    heads = {head: i for i, head in enumerate(rules)}
    offspring = np.zeros((len(heads), len(heads)))
    for head, options in rules.items():
        for p, side in options:
            for symbol in side:
                if symbol in heads:
                    offspring[heads[head], heads[symbol]] += p
    values, vectors = np.linalg.eig(offspring)
    radius = np.abs(values).max()
    if radius > 1 - 1e-9:
        cause = np.argmax(np.abs(vectors[:, np.argmax(np.abs(values))]))
        raise ValueError(
            f"rules: expected derivations that end with probability 1 after finitely many steps in the mean, got an "
            f"expected number of nonterminals that grows by {radius:.6g} a generation (must be below 1), most of all "
            f"from {list(rules)[cause]!r}. Lower the probabilities of its recursive expansions."
        )


# Chomsky normal form.


class _NormalForm(NamedTuple):
    """R rules head -> left right with their probabilities, and words; N nonterminals, the first is the start.

    float64 and int arrays of numpy, on the way into a jitted function in jax's default types.
    """

    prob: Any  # [R]
    head: Any  # [R]
    left: Any  # [R]
    right: Any  # [R]
    word: Any  # [N,V], the stop's column is 0
    expected: Any  # [N,N], row A: how often each nonterminal is a left corner of A (itself once), in expectation


def _normal_form(rules: Rules, start: str, words: Mapping[str, int]) -> _NormalForm:
    """The same law of strings by rules A -> B C and A -> word only.

    A nonterminal of the normal form is a tuple of symbols that are expanded one after another. Its chains of unit
    rules, of any length and cyclic ones too, are summed in closed form: the geometric series of a matrix.
    """
    index: dict[tuple[str, ...], int] = {(head,): i for i, head in enumerate(rules)}
    waiting: list[tuple[tuple[str, ...], float, tuple[str, ...]]] = [
        ((head,), p, side) for head, options in rules.items() for p, side in options
    ]
    unit, word, binary = [], [], []
    while waiting:
        symbols, p, side = waiting.pop()
        if len(side) > 1:
            for part in (side[:1], side[1:]):
                if part not in index:
                    index[part] = len(index)
                    waiting.append((part, 1.0, part))
            binary.append((index[symbols], p, index[side[:1]], index[side[1:]]))
        elif side[0] in words:
            word.append((index[symbols], p, words[side[0]]))
        else:
            unit.append((index[symbols], p, index[side]))
    N = len(index)
    once, emission = np.zeros((N, N)), np.zeros((N, len(words) + 1))
    for a, p, b in unit:
        once[a, b] += p
    for a, p, v in word:
        emission[a, v] += p
    chains = _powers(once)

    children = {a: [c for b, _, *pair in binary if chains[a, b] for c in pair] for a in range(N)}
    first = index[(start,)]
    order = sorted(_reachable(first, children), key=lambda a: (a != first, a))
    place = {old: new for new, old in enumerate(order)}
    merged: dict[tuple[int, int, int], float] = {}
    for a in order:
        for b, p, left, right in binary:
            if chains[a, b]:
                rule = place[a], place[left], place[right]
                merged[rule] = merged.get(rule, 0.0) + chains[a, b] * p
    heads, lefts, rights = np.array(sorted(merged), np.int32).reshape(-1, 3).T
    prob = np.array([merged[rule] for rule in sorted(merged)])
    corner = np.zeros((len(order), len(order)))
    np.add.at(corner, (heads, lefts), prob)
    return _NormalForm(prob, heads, lefts, rights, (chains @ emission)[order], _powers(corner))


def _powers(matrix: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"]:
    """I + M + M^2 + ... of a nonnegative matrix of spectral radius below 1; exactly 0 where all powers are."""
    reach = np.eye(len(matrix), dtype=bool) | (matrix > 0)
    for _ in range(len(matrix).bit_length()):
        reach = reach @ reach
    return np.where(reach, np.linalg.inv(np.eye(len(matrix)) - matrix), 0)


def _in_default_type(x: Any) -> Array:
    return jnp.asarray(x, float if np.issubdtype(x.dtype, np.floating) else jnp.int32)


# The path law.


def _ratio(a: Array, b: Array) -> Array:
    """a / b, 0 where b is."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _laws(form: _NormalForm, tokens: Int32[Array, " T"]) -> Float[Array, "T+1 V"]:
    T, R, (N, V) = len(tokens), len(form.prob), form.word.shape
    START, STOP = 0, V - 1
    kind = form.word.dtype
    of_head, of_right = (jnp.asarray(x[:, None] == jnp.arange(N), kind) for x in (form.head, form.right))

    def law_of(expected: Array, whole: Array) -> Array:
        """The next token's law; whole: done[sentence's begin, START]."""
        law = _dot("a,av->v", expected, form.word)
        law = law.at[STOP].set(whole / form.expected[START, START])
        return _ratio(law, law.sum())  # the sum is 1 but for rounding

    def entering(expected: Array) -> Array:
        """[R], from done[i, B] to what A -> B C makes of it, for A and B expected here."""
        return _ratio(form.prob * expected[form.head], expected[form.left])

    def read(carry: Any, at: tuple[Array, Array]) -> tuple[Any, Array]:
        share, entry, expected, begin, law = carry
        t, token = at
        leaf = _ratio(expected * form.word[:, token], law[token])
        done = jnp.zeros((T + 1, N), kind).at[t].set(leaf)
        # Spans that end here, from short ones to long ones: i..k is in `share`, k.. is done.
        rest = jnp.zeros((T + 1, R), kind).at[t].set(leaf[form.right])

        def longer(shorter: Array, spans: tuple[Array, Array]) -> tuple[Array, Array]:
            done, rest = spans
            i = t - 1 - shorter
            span = _dot("r,ra->a", jnp.sum(share[i] * rest, axis=0), of_head)
            return done.at[i].set(span), rest.at[i].set(span[form.right])

        done, rest = jax.lax.fori_loop(0, t, longer, (done, rest))
        half = entry * done[:, form.left]
        awaited = _dot("r,ra->a", half.sum(axis=0), of_right)
        ended = token == STOP
        expected = _dot("a,ab->b", jnp.where(ended, jnp.arange(N) == START, awaited), form.expected)
        begin = jnp.where(ended, t + 1, begin)
        share = share.at[:, t + 1].set(_ratio(half, expected[form.right]))
        entry = entry.at[t + 1].set(entering(expected))
        law = law_of(expected, done[begin, START])
        return (share, entry, expected, begin, law), law

    expected = form.expected[START]
    first = law_of(expected, jnp.zeros((), kind))
    entry = jnp.zeros((T + 1, R), kind).at[0].set(entering(expected))
    carry = (jnp.zeros((T + 1, T + 1, R), kind), entry, expected, jnp.zeros((), jnp.int32), first)
    _, laws = jax.lax.scan(read, carry, (jnp.arange(T, dtype=jnp.int32), tokens))
    return jnp.log(jnp.concatenate([first[None], laws]))


# Samples.


class _Outcomes(NamedTuple):
    """The expansions of each nonterminal of the normal form, as a table to invert the cumulative law."""

    cumulative: Any  # [N,K]
    word: Any  # [N,K], -1 for left right
    left: Any  # [N,K]
    right: Any  # [N,K]
    stop: Any


class _Derivations(NamedTuple):
    turn: Array  # []
    stack: Array  # [n,length]
    depth: Array  # [n], of the stack
    tokens: Array  # [n,length]
    made: Array  # [n], how many tokens there are


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sample(outcomes: _Outcomes, key: Array, n: int, length: int) -> Array:
    cumulative = jnp.asarray(outcomes.cumulative, float)
    word, left, right = (jnp.asarray(x) for x in (outcomes.word, outcomes.left, outcomes.right))
    rows, size = jnp.arange(n), max(length, 1)

    # A leftmost derivation of each path, one expansion a turn. What is still to be expanded is a stack, in a ring of
    # `length`: each entry makes a token at least, so one that many below the top is not needed, and is overwritten.
    def expand(state: _Derivations) -> _Derivations:
        turn, stack, depth, tokens, made = state
        top = stack[rows, (depth - 1) % size]
        u = jax.random.uniform(jax.random.fold_in(key, turn), (n,), cumulative.dtype)
        k = jnp.sum(cumulative[top] <= u[:, None], axis=1)
        ended = depth == 0
        token = jnp.where(ended, outcomes.stop, word[top, k])
        tokens = tokens.at[rows, jnp.where(token >= 0, made, length)].set(token, mode="drop")
        made = jnp.minimum(made + (token >= 0), length)
        under = jnp.where(token >= 0, stack[rows, (depth - 1) % size], right[top, k])
        stack = stack.at[rows, (depth - 1) % size].set(under)
        above = jnp.where(ended, 0, jnp.where(token >= 0, stack[rows, depth % size], left[top, k]))
        stack = stack.at[rows, depth % size].set(above)
        return _Derivations(turn + 1, stack, depth + jnp.where(ended | (token < 0), 1, -1), tokens, made)

    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    state = _Derivations(zeros(()), zeros((n, size)), jnp.ones(n, jnp.int32), zeros((n, length)), zeros(n))
    return jax.lax.while_loop(lambda state: (state.made < length).any(), expand, state).tokens
