"""Decoding: running a model one token at a time, with the memory of its aggregates in place of past inputs."""

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
    """The decoding state of a model.

    Attributes:
        memory: the memories of the aggregates, by block of the stack.
        position: the number of tokens processed so far.
        length: the maximum number of tokens. The capacity of the memory may be slightly larger.
        missing: whether a token was out of range, after which all logits are NaN.
    """

    memory: ByBlock
    position: Int[Array, ""]
    length: Int[Array, ""]
    missing: Array


def init_state(model: Transformer, length: int) -> State:
    """The decoding state before the first token.

    Args:
        model: the model.
        length: the maximum number of tokens, at most max_length.

    Raises:
        ValueError: if `length` is not between 1 and max_length.
    """
    _check_length(model, length)
    return _init_state(model, np.int32(length), _capacity(model, length))


@functools.partial(jax.jit, static_argnames="capacity")
def _init_state(model: Transformer, length: Array, capacity: int) -> State:
    return State(model.layers.init_memory(capacity), jnp.array(0, jnp.int32), length, jnp.array(False))


def prefill(model: Transformer, tokens: Tokens, length: int) -> tuple[State, Float[Array, " V"]]:
    """Process a prompt in parallel.

    Args:
        model: the model.
        tokens: [P], the prompt.
        length: the maximum number of tokens, including the prompt, that the state can process.

    Returns:
        The state after the prompt, and the logits [V] of the next token. Traced ids that are out of range make the
        logits NaN.

    Raises:
        ValueError: if the prompt is not a path of the model, or `length` is not between P and max_length.
    """
    path = prepare(model, tokens)
    _check_length(model, length, path.length)
    capacity = length if is_traced(model, path.tokens) else _capacity(model, length)
    return _prefill(model, path.tokens, path.count, np.int32(length), capacity)


@functools.partial(jax.jit, static_argnames="capacity")
def _prefill(model: Transformer, tokens: Array, count: Array, length: Array, capacity: int) -> tuple[State, Array]:
    return prefilled(model, tokens, count, length, capacity)


def prefilled(
    model: Transformer, tokens: Int[Array, " P"], count: Any, length: Any, capacity: int
) -> tuple[State, Float[Array, " V"]]:
    """`prefill` without checks, of the first `count` tokens, for use inside a compiled program."""
    documents = documents_of(None, len(tokens))
    padding = indices(len(tokens)) >= count
    tokens = jnp.where(padding, 0, tokens)

    def body(layer: Layer, place: Place, x: Array, _: Any) -> tuple[Array, Any]:
        def combine(aggregate: Any, h: Array) -> tuple[Array, Any]:
            y, memory = aggregate.parallel(h, documents, count=count)
            return y, aggregate.allocate(memory, capacity, count)

        output = layer(x, combine)
        return output.stations[1], output.extra

    x, memory = model.layers.scan(body, model.embedded(tokens, documents))
    missing = (model.missing(tokens, documents) & ~padding).any()
    logits = model.logits(model.context(x[count - 1]))
    state = State(memory, jnp.asarray(count, jnp.int32), jnp.asarray(length, jnp.int32), missing)
    return state, jnp.where(missing, jnp.nan, logits)


def step(model: Transformer, state: State, token: Index) -> tuple[State, Float[Array, " V"]]:
    """Process one token.

    Args:
        model: the model.
        state: the state before the token.
        token: the id of the token.

    Returns:
        The state after the token, and the logits [V] of the next token. If the token is traced and out of range, or the
        position is traced and beyond the state's length, these logits and all later ones are NaN.

    Raises:
        ValueError: if the state has reached its length, or the id is out of range.
    """
    if not is_traced(state.position, state.length) and int(state.position) >= int(state.length):
        raise ValueError(
            f"state: expected room for another token, got one that has taken all {int(state.length)} it was made for. "
            "Create it with a greater length, up to the model's max_length."
        )
    return _step(model, state, check_token(model, token))


@jax.jit
def _step(model: Transformer, state: State, token: Array) -> tuple[State, Array]:
    return stepped(model, state, token)


def stepped(model: Transformer, state: State, token: Int[Array, ""]) -> tuple[State, Float[Array, " V"]]:
    """`step` without checks, for use inside a compiled program."""
    position = state.position
    documents = Documents(None, position[None])
    missing = state.missing | (position >= state.length) | model.out_of_range(token[None], position[None])[0]

    def body(layer: Layer, place: Place, x: Array, memory: Any) -> tuple[Array, Any]:
        def combine(aggregate: Any, h: Array) -> tuple[Array, Any]:
            after, y = aggregate.advance(memory, h[0], position)
            return y[None], after

        output = layer(x, combine)
        return output.stations[1], output.extra

    x, memory = model.layers.scan(body, model.embedded(token[None], documents), state.memory)
    logits = model.logits(model.context(x[0]))
    return State(memory, position + 1, state.length, missing), jnp.where(missing, jnp.nan, logits)


def _check_length(model: Transformer, length: int, prompt: int = 0) -> None:
    if not max(prompt, 1) <= length <= model.max_length:
        raise ValueError(
            f"length: expected from {max(prompt, 1)} (the prompt) to max_length = {model.max_length}, got {length}."
        )


def _capacity(model: Transformer, length: int) -> int:
    """The number of positions that memory is allocated for: padded, like paths, so that programs are reused."""
    return padded_length(length, model.max_length)
