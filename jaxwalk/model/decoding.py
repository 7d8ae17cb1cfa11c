"""Decoding: the same model one token at a time, with a memory in place of all inputs so far."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Documents, documents_of
from jaxwalk.filters import indices
from jaxwalk.model.inputs import Index, Tokens, check_token, is_traced, padded_length, prepare
from jaxwalk.model.layer import Layer
from jaxwalk.model.stack import ByBlock, Place
from jaxwalk.model.transformer import Transformer


class State(NamedTuple):
    """What decoding carries from token to token.

    memory: that of each layer, by block of the stack. position: how many tokens were taken. length: the most that may
    be; the memory may have room for a few more. missing: whether a token was out of range, after which all is NaN.
    """

    memory: ByBlock
    position: Int[Array, ""]
    length: Int[Array, ""]
    missing: Array


def init_state(model: Transformer, length: int) -> State:
    """The state before the first of at most `length` tokens. Raises ValueError for a length beyond max_length."""
    _check_length(model, length)
    return _init_state(model, np.int32(length), _room(model, length))


@functools.partial(jax.jit, static_argnames="room")
def _init_state(model: Transformer, length: Array, room: int) -> State:
    return State(model.layers.init_memory(room), jnp.array(0, jnp.int32), length, jnp.array(False))


def prefill(model: Transformer, tokens: Tokens, length: int) -> tuple[State, Float[Array, " V"]]:
    """The state after a prompt [P], computed in parallel, and the logits [V] of the next token.

    Args:
        tokens: [P], the prompt.
        length: the most tokens, prompt included, that the state will see.

    Raises:
        ValueError: for a prompt that is no path of the model, and a length that is not from P to max_length.
    """
    path = prepare(model, tokens)
    _check_length(model, length, path.length)
    room = length if is_traced(model, path.tokens) else _room(model, length)
    return _prefill(model, path.tokens, path.count, np.int32(length), room)


@functools.partial(jax.jit, static_argnames="room")
def _prefill(model: Transformer, tokens: Array, count: Array, length: Array, room: int) -> tuple[State, Array]:
    return prefilled(model, tokens, count, length, room)


def prefilled(
    model: Transformer, tokens: Int[Array, " P"], count: Any, length: Any, room: int
) -> tuple[State, Float[Array, " V"]]:
    """`prefill` of a checked prompt whose first `count` tokens are real, as part of another program."""
    documents = documents_of(None, len(tokens))
    padding = indices(len(tokens)) >= count
    tokens = jnp.where(padding, 0, tokens)

    def body(layer: Layer, place: Place, x: Array, _: Any) -> tuple[Array, Any]:
        def combine(aggregate: Any, h: Array) -> tuple[Array, Any]:
            y, memory = aggregate.parallel(h, documents, count=count)
            return y, aggregate.allocate(memory, room, count)

        passed = layer(x, combine)
        return passed.stations[1], passed.extra

    x, memory = model.layers.scan(body, model.embedded(tokens, documents))
    missing = (model.missing(tokens, documents) & ~padding).any()
    logits = model.logits(model.context(x[count - 1]))
    state = State(memory, jnp.asarray(count, jnp.int32), jnp.asarray(length, jnp.int32), missing)
    return state, jnp.where(missing, jnp.nan, logits)


def step(model: Transformer, state: State, token: Index) -> tuple[State, Float[Array, " V"]]:
    """Take one token: the new state, and the logits [V] of the next token.

    Raises:
        ValueError: beyond the state's length, and for an id out of range. Traced ones give NaN, from there on.
    """
    if not is_traced(state.position, state.length) and int(state.position) >= int(state.length):
        raise ValueError(
            f"state: expected room for another token, got one that has taken all {int(state.length)} it was made for. "
            "Make it with a greater length, up to the model's max_length."
        )
    return _step(model, state, check_token(model, token))


@jax.jit
def _step(model: Transformer, state: State, token: Array) -> tuple[State, Array]:
    return stepped(model, state, token)


def stepped(model: Transformer, state: State, token: Int[Array, ""]) -> tuple[State, Float[Array, " V"]]:
    """`step` of a checked token, as part of another program."""
    position = state.position
    here = Documents(None, position[None])
    missing = state.missing | (position >= state.length) | model.out_of_range(token[None], position[None])[0]

    def body(layer: Layer, place: Place, x: Array, memory: Any) -> tuple[Array, Any]:
        def combine(aggregate: Any, h: Array) -> tuple[Array, Any]:
            after, y = aggregate.advance(memory, h[0], position)
            return y[None], after

        passed = layer(x, combine)
        return passed.stations[1], passed.extra

    x, memory = model.layers.scan(body, model.embedded(token[None], here), state.memory)
    logits = model.logits(model.context(x[0]))
    return State(memory, position + 1, state.length, missing), jnp.where(missing, jnp.nan, logits)


def _check_length(model: Transformer, length: int, prompt: int = 0) -> None:
    if not max(prompt, 1) <= length <= model.max_length:
        raise ValueError(
            f"length: expected from {max(prompt, 1)} (the prompt) to max_length = {model.max_length}, got {length}."
        )


def _room(model: Transformer, length: int) -> int:
    """The positions that memory is allocated for: the same for all lengths that paths are padded to one length."""
    return padded_length(length, model.max_length)
