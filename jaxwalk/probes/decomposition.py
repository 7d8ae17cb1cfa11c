"""Exact decompositions of a context vector, or of any station, into parts whose sum is checked against the whole.

Every nonlinearity here is a data-dependent coefficient times a linear map: mixing weights times values, 1/std times a
centred vector, a gate times its argument. With the coefficients held at their values, the walk is affine in the token
vectors, and each term of the affine map is a part ("detached Jacobian": Golden, arXiv 2505.24293). The part due to
biases is computed as a derivative of its own, never as the remainder, so the sum is a real check. Each result carries
its error relative to the sum of |parts|; an error beyond rounding raises. The check cannot detect a coefficient that is
not held in a map that is homogeneous of degree one, such as x |x| / |x|: the derivative along x is then the map itself.
The tests of `jaxwalk/filters.py` and of the aggregates check that each held module is affine.

The decomposition by token is total: it attributes to a token everything that comes from it through all steps. The
decompositions by step, head and neuron are direct: the output of that component, carried to the target by the residual
stream and the held norms alone. All functions take a single path; batch with `jax.vmap`. Under vmap, as under jit,
nothing raises: check `error`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxwalk._products import exact
from jaxwalk.filters import MLP, GatedMLP, row, softcap_gate
from jaxwalk.model.build import plain
from jaxwalk.model.inputs import Index, Path, Segments, Tokens, check_index, is_traced, prepare
from jaxwalk.model.stack import Place
from jaxwalk.model.transformer import Transformer
from jaxwalk.paths.law import entropy
from jaxwalk.probes import _cuts
from jaxwalk.probes._cuts import Target

TOLERANCE = {jnp.dtype("float32"): 1e-5, jnp.dtype("float64"): 1e-12}
"""The largest error of a decomposition, relative to the sum of |parts|, that counts as rounding."""


class DecompositionError(ArithmeticError):
    """The parts do not sum to the whole: a coefficient is not held, or an additive part is missing."""


class Decomposition(NamedTuple):
    """A target vector split by source token: by_token.sum(0) + by_position.sum(0) + bias = whole.

    Along n directions, the shapes have n in place of D, and the error is the largest over directions.

    Attributes:
        by_token: [T, D], due to each token vector, through all steps.
        by_position: [T, D], likewise due to each position vector; zeros in a model without position vectors.
        bias: [D], due to all biases, computed as a derivative of its own.
        whole: [D], the target itself.
        error: [], |sum of parts - whole| / sum of |parts|.
    """

    by_token: Float[Array, "T D"]
    by_position: Float[Array, "T D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class StepDecomposition(NamedTuple):
    """A target vector split by step: token + position + by_step.sum(0) + by_step_bias.sum(0) + bias = whole.

    Attributes:
        token, position: [D], the token and position vectors of the target's own position, carried directly.
        by_step: [2L, D], what each step (2l the aggregate, 2l+1 the filter of layer l) computes from the stream.
        by_step_bias: [2L, D], what each step adds through its own biases.
        bias: [D], due to the biases of norms outside the steps: post-norms and the final norm.
        whole: [D], the target itself.
        error: [], |sum of parts - whole| / sum of |parts|.
    """

    token: Float[Array, " D"]
    position: Float[Array, " D"]
    by_step: Float[Array, "2L D"]
    by_step_bias: Float[Array, "2L D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class StepTokenDecomposition(NamedTuple):
    """A target vector split by step and, within each step, by the source token of its input.

    Summed over steps, it is the decomposition by token; summed over tokens, positions and biases, the decomposition by
    step.

    Attributes:
        token, position, bias: [D], carried directly, as in `StepDecomposition`.
        by_token, by_position: [2L, T, D], what each step computes from each token and position vector, through all
            steps before it.
        by_step_bias: [2L, D], due to all biases up to and within the step.
        whole: [D], the target itself.
        error: [], |sum of parts - whole| / sum of |parts|.
    """

    token: Float[Array, " D"]
    position: Float[Array, " D"]
    by_token: Float[Array, "2L T D"]
    by_position: Float[Array, "2L T D"]
    by_step_bias: Float[Array, "2L D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class HeadDecomposition(NamedTuple):
    """What one layer's aggregate adds, split by head (or channel) and source position.

    by_head.sum((0, 1)) + bias = whole.

    Attributes:
        by_head: [G, T, D], A_tj times the value at j, read out and carried to the target. It includes the bias of the
            values.
        bias: [D], due to the biases of the readout and of a norm of its output.
        whole: [D], the move of the aggregate step, carried to the target.
        error: [], |sum of parts - whole| / sum of |parts|.
    """

    by_head: Float[Array, "G T D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class NeuronDecomposition(NamedTuple):
    """What one layer's filter adds, split by neuron: by_neuron.sum(0) + bias = whole.

    Attributes:
        by_neuron: [E, D], each neuron's activation times its row of `down`, carried to the target.
        bias: [D], due to the biases of `down` and of a norm of its output.
        whole: [D], the move of the filter step, carried to the target.
        error: [], |sum of parts - whole| / sum of |parts|.
    """

    by_neuron: Float[Array, "E D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class Readout(NamedTuple):
    """A scalar that is affine in the context vector c: direction . c + constant.

    The parts of a decomposition of the context, dotted with `direction`, sum with `constant` to the scalar.

    Attributes:
        direction: [D].
        constant: [], belongs to no part of the context.
    """

    direction: Float[Array, " D"]
    constant: Float[Array, ""]


def decompose(
    model: Transformer,
    tokens: Tokens,
    at: Index = -1,
    *,
    station: Index | None = None,
    segments: Segments | None = None,
    along: Float[Array, "n D"] | None = None,
) -> Decomposition:
    """The context vector of position `at`, or a station of it, split exactly by source token.

    Args:
        model: the model, in float32 or float64.
        tokens: [T], the path.
        at: the position.
        station: 0 to S-1 (0 the embedding, 2l+1 after aggregate l, 2l+2 after filter l); the context vector by default.
        segments: [T], the document of each position.
        along: [n, D], directions to project the parts on; by default the parts are vectors.

    Returns:
        The parts, [T, D] or, along directions, [T, n]. Takes T forward passes or D (n) backward passes, whichever is
        fewer, in bounded memory.

    Raises:
        ValueError: if `tokens` is not a path of the model, a position or station does not exist, a shape is wrong, or
            the dtype is narrower than float32.
        DecompositionError: if the parts do not sum to the whole.
    """
    if along is not None and (jnp.ndim(along) != 2 or along.shape[-1] != model.width):
        raise ValueError(f"along: expected directions [n, {model.width}], got shape {jnp.shape(along)}.")
    result, path = _run(by_token, model, tokens, at, station, segments, along)
    return result._replace(by_token=path.cut(result.by_token), by_position=path.cut(result.by_position))


def decompose_steps(
    model: Transformer,
    tokens: Tokens,
    at: Index = -1,
    *,
    station: Index | None = None,
    segments: Segments | None = None,
) -> StepDecomposition:
    """The context vector of position `at`, or a station of it, split exactly by the steps that added to it.

    Steps after `station` have zero parts. Takes the arguments of `decompose` and raises the same errors.
    """
    return _run(_by_step, model, tokens, at, station, segments)[0]


def decompose_steps_by_token(
    model: Transformer,
    tokens: Tokens,
    at: Index = -1,
    *,
    station: Index | None = None,
    segments: Segments | None = None,
) -> StepTokenDecomposition:
    """The context vector of position `at`, or a station of it, split exactly by step and source token.

    Costs T forward passes. Takes the arguments of `decompose` and raises the same errors.
    """
    result, path = _run(_by_step_and_token, model, tokens, at, station, segments)
    return result._replace(by_token=path.cut(result.by_token, 1), by_position=path.cut(result.by_position, 1))


def decompose_heads(
    model: Transformer,
    tokens: Tokens,
    layer: Index,
    at: Index = -1,
    *,
    station: Index | None = None,
    segments: Segments | None = None,
) -> HeadDecomposition:
    """What the aggregate of `layer` adds to the target, split exactly by head and source position.

    Args:
        layer: 0 to L-1. It can be traced only if all layers have the same structure.
        model, tokens, at, station, segments: as in `decompose`.

    Raises:
        ValueError: if the layer does not exist or comes after `station`, and as in `decompose`.
        DecompositionError: if the parts do not sum to the whole.
    """
    slot, repetition, layer_index = _locate(model, layer, station, lambda index: 2 * index + 1)
    result, path = _run(_by_head, model, tokens, at, station, segments, repetition, layer_index, slot=slot)
    return result._replace(by_head=path.cut(result.by_head, 1))


def decompose_neurons(
    model: Transformer,
    tokens: Tokens,
    layer: Index,
    at: Index = -1,
    *,
    station: Index | None = None,
    segments: Segments | None = None,
) -> NeuronDecomposition:
    """What the filter of `layer` adds to the target, split exactly by neuron.

    Takes the arguments of `decompose_heads`.

    Raises:
        ValueError: if the layer does not exist, has no MLP or comes after `station`, and as in `decompose`.
        DecompositionError: if the parts do not sum to the whole.
    """
    slot, repetition, layer_index = _locate(model, layer, station, lambda index: 2 * index + 2)
    if not isinstance(model.layers.blocks[slot[0]].period[slot[1]].filter, MLP | GatedMLP):
        with_neurons = [i for i, other in enumerate(model.layers) if isinstance(other.filter, MLP | GatedMLP)]
        raise ValueError(f"layer: expected one whose filter has neurons, of {with_neurons}, got {layer}.")
    return _run(_by_neuron, model, tokens, at, station, segments, repetition, layer_index, slot=slot)[0]


def logit_readout(model: Transformer, token: Index, context: Float[Array, " D"] | None = None) -> Readout:
    """The logit of `token` as an affine function of the context c: u . c + b.

    If the model soft-caps its logits, it is g (u . c + b) with the gate g = tanh(a / cap) / (a / cap), a the logit
    before the cap.

    Args:
        model: the model.
        token: a token id.
        context: [D], where the gate is held. Required if the model soft-caps its logits.

    Returns:
        The direction and the constant.

    Raises:
        ValueError: if the id is out of range, or the context is missing although the model soft-caps its logits.
    """
    token = check_index("token", token, model.vocab_size, from_end=False)
    if model.unembed.softcap is not None and context is None:
        raise ValueError(
            f"context: expected a context vector, as this model soft-caps its logits at {model.unembed.softcap:g}, and "
            "by how much depends on it; got None."
        )
    return _logit_readout(model, token, context)


def log_prob_readout(model: Transformer, context: Float[Array, " D"], token: Index) -> Readout:
    """log p(token) after a context c, in nats, as (u - E_p u) . c + (b - E_p b) - H(p), with the law p held.

    The constant contains the entropy -H(p), without which the parts would only sum to the centred logit. If the model
    soft-caps its logits, each u and b is multiplied by its gate, as in `logit_readout`.

    Args:
        model: the model.
        context: [D], where p is held.
        token: a token id.

    Returns:
        The direction and the constant.

    Raises:
        ValueError: if the id is out of range.
    """
    return _log_prob_readout(model, context, check_index("token", token, model.vocab_size, from_end=False))


@jax.jit
@exact
def _logit_readout(model: Transformer, token: Array, context: Array | None) -> Readout:
    U, bias = model.output_vectors, model.unembed.bias
    direction = row(U, token)
    constant = jnp.zeros((), U.dtype) if bias is None else row(bias[:, None], token)[0]
    if model.unembed.softcap is None or context is None:
        return Readout(direction, constant)
    gate = softcap_gate(direction @ context + constant, model.unembed.softcap)
    return Readout(gate * direction, gate * constant)


@jax.jit
@exact
def _log_prob_readout(model: Transformer, context: Array, token: Array) -> Readout:
    direction, constant = _logit_readout(model, token, context)
    logits = model.logits(context)
    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    weights = p
    if model.unembed.softcap is not None:
        weights = p * softcap_gate(model.unembed.uncapped(context, model.embed.table), model.unembed.softcap)
    mean_bias = 0 if model.unembed.bias is None else weights @ model.unembed.bias
    return Readout(direction - weights @ model.output_vectors, constant - mean_bias - entropy(log_p))


def _locate(model: Transformer, layer: Index, station: Index | None, station_after: Callable[[Any], Any]) -> Any:
    """The slot of a layer, and its repetition and index as arguments of a program."""
    if is_traced(layer):
        if len(model.layers.blocks) != 1 or len(model.layers.blocks[0].period) != 1:
            raise ValueError("layer: expected an integer, as the layers of this model differ; got a traced one.")
        return (0, 0), layer, layer
    layer_index = int(layer)
    if not 0 <= layer_index < model.depth:
        raise ValueError(f"layer: expected one from 0 to {model.depth - 1}, got {layer}.")
    first = station_after(layer_index)
    if station is not None and not is_traced(station) and int(station) < first:
        raise ValueError(
            f"station: expected one from {first} on, where layer {layer} has added its part, got {station}."
        )
    place = model.layers.place(layer_index)
    return (place.block, place.member), np.int32(place.repetition), np.int32(layer_index)


def _run(
    program: Callable[..., Any],
    model: Transformer,
    tokens: Tokens,
    at: Index,
    station: Index | None,
    segments: Segments | None,
    *extra: Any,
    slot: tuple[int, int] | None = None,
) -> tuple[Any, Path]:
    """Run the program of a decomposition and check its error; also return the padded path."""
    check_dtype(model)
    path = prepare(model, tokens, segments, at, station, extra)
    at = check_index("at", at, path.length)
    S = model.stations
    if station is not None and not is_traced(station) and not 0 <= int(station) < S:
        raise ValueError(
            f"station: expected one from 0 to {S - 1} (0 the embedding, 2l+1 after aggregate l, 2l+2 after filter l), "
            f"got {station}."
        )
    target = np.int32(S) if station is None else station if is_traced(station) else np.int32(station)
    static = {} if slot is None else {"slot": slot}
    result = program(model, path.tokens, path.segments, at, target, *extra, **static)
    check_error(result.error, model)
    return result, path


def check_dtype(model: Transformer) -> None:
    """Raise ValueError if the model's dtype is too narrow to tell rounding from a missing part."""
    dtype = model.embed.table.dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"model: expected float32 or float64, got {dtype}. Use jw.astype(model, jnp.float32).")


def check_error(error: Array, model: Transformer) -> None:
    """Raise DecompositionError if a concrete error is beyond rounding."""
    tolerance = TOLERANCE[model.embed.table.dtype]
    if not is_traced(error) and not float(error) <= tolerance:
        raise DecompositionError(
            f"the parts do not sum to the whole: expected an error of at most {tolerance:g} of the sum of |parts|, got "
            f"{float(error):.2g}. A NaN is in the walk itself; otherwise a module of the model has a coefficient that "
            f"`hold` does not hold, or an additive parameter that is not called {', '.join(_cuts.ADDITIVE)}."
        )


def _target(model: Transformer, tokens: Array, segments: Array | None, at: Array, station: Array) -> Target:
    """The target at a position and station; NaN where either is out of range or the position is missing."""
    return Target.of(plain(model), tokens, segments, at, station)


@jax.jit
@exact
def by_token(
    model: Transformer, tokens: Array, segments: Array | None, at: Array, station: Array, along: Array | None
) -> Decomposition:
    """The program of `decompose`, without checks; `station` is S for the context vector."""
    target = _target(model, tokens, segments, at, station)
    read = (lambda whole: whole) if along is None else (lambda whole: along @ whole)
    f = lambda x: read(target.select(target.held(x)))
    token_parts, position_parts = target.split_by_source(f)
    bias = target.due_to_biases(lambda model: read(target.select(target.held(target.x, model))))
    whole, parts = read(target.whole), jnp.concatenate([token_parts, position_parts, bias[None]])
    if along is None:
        error = _cuts.relative_error(whole, parts)
    else:
        # The rounding error of a dot product scales with the norms of both factors.
        scale = jnp.abs(parts).sum(0) + jnp.linalg.norm(target.whole) * jnp.linalg.norm(along, axis=-1)
        error = jnp.max(_cuts.ratio(jnp.abs(parts.sum(0) - whole), scale))
    return Decomposition(token_parts, position_parts, bias, whole, error)


@jax.jit
@exact
def _by_step(model: Transformer, tokens: Array, segments: Array | None, at: Array, station: Array) -> StepDecomposition:
    target = _target(model, tokens, segments, at, station)
    token, position, bias = target.direct()
    by_step, by_step_bias = (target.carry_moves(moves) for moves in target.step_parts())
    parts = jnp.concatenate([jnp.stack([token, position, bias]), by_step, by_step_bias])
    return StepDecomposition(
        token, position, by_step, by_step_bias, bias, target.whole, _cuts.relative_error(target.whole, parts)
    )


@jax.jit
@exact
def _by_step_and_token(
    model: Transformer, tokens: Array, segments: Array | None, at: Array, station: Array
) -> StepTokenDecomposition:
    target = _target(model, tokens, segments, at, station)
    T, D = target.x.shape
    f = lambda x, model=target.model: target.carry_moves(target.held(x, model).moves)
    by_token, by_position = (
        part.reshape(T, -1, D).swapaxes(0, 1) for part in target.split_by_source(lambda x: f(x).reshape(-1))
    )
    by_step_bias = target.due_to_biases(lambda model: f(target.x, model))
    token, position, bias = target.direct()
    parts = [by_token.reshape(-1, D), by_position.reshape(-1, D), by_step_bias, jnp.stack([token, position, bias])]
    error = _cuts.relative_error(target.whole, jnp.concatenate(parts))
    return StepTokenDecomposition(token, position, by_token, by_position, by_step_bias, bias, target.whole, error)


@functools.partial(jax.jit, static_argnames="slot")
@exact
def _by_head(
    model: Transformer,
    tokens: Array,
    segments: Array | None,
    at: Array,
    station: Array,
    repetition: Array,
    layer_index: Array,
    *,
    slot: tuple[int, int],
) -> HeadDecomposition:
    target = _target(model, tokens, segments, at, station)
    by_head, bias = target.head_parts(model.layers.at(Place(*slot, repetition)), layer_index)
    step = 2 * layer_index
    by_head, bias, whole = (target.carry(part, step) for part in (by_head, bias, target.walk.moves[step, target.at]))
    parts = jnp.concatenate([by_head.reshape(-1, model.width), bias[None]])
    return HeadDecomposition(by_head, bias, whole, _cuts.relative_error(whole, parts))


@functools.partial(jax.jit, static_argnames="slot")
@exact
def _by_neuron(
    model: Transformer,
    tokens: Array,
    segments: Array | None,
    at: Array,
    station: Array,
    repetition: Array,
    layer_index: Array,
    *,
    slot: tuple[int, int],
) -> NeuronDecomposition:
    target = _target(model, tokens, segments, at, station)
    by_neuron, bias = target.neuron_parts(model.layers.at(Place(*slot, repetition)), layer_index)
    step = 2 * layer_index + 1
    by_neuron, bias, whole = (
        target.carry(part, step) for part in (by_neuron, bias, target.walk.moves[step, target.at])
    )
    parts = jnp.concatenate([by_neuron, bias[None]])
    return NeuronDecomposition(by_neuron, bias, whole, _cuts.relative_error(whole, parts))
