"""Influence maps: how far moving each token vector moves each context vector."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxwalk._loops import map_in_batches
from jaxwalk.aggregates._contract import Documents, documents_of
from jaxwalk.filters import indices
from jaxwalk.model.build import plain
from jaxwalk.model.inputs import Segments, Tokens, prepare
from jaxwalk.model.layer import Layer
from jaxwalk.model.mixing import Mixer
from jaxwalk.model.stack import Place
from jaxwalk.model.transformer import Transformer

ROW_BLOCKS, SPLIT_WORK = 8, 1 << 38
"""Rows are split into blocks, each differentiated only over the path up to its end: with 8, 9/16 of the work. Since
blocks are compiled separately, there is one if the total work is below `SPLIT_WORK` multiplications."""
BATCH_ELEMENTS = 1 << 21
"""The approximate total size of the arrays of backward passes that are batched together: what fits in caches."""
JACOBIAN_ELEMENTS = 1 << 28
"""The largest total size of the Jacobians of the filter steps; beyond it, filters are differentiated as they are."""


def context_sensitivity(model: Transformer, tokens: Tokens, segments: Segments | None = None) -> Float[Array, "T T"]:
    """Influence map: the Frobenius norm of d context_t / d token vector_j, row t, column j.

    Exact, by reverse mode: T x D backward passes, each over the path up to the end of its block of rows, several
    directions at a time, in memory bounded by `BATCH_ELEMENTS` and `JACOBIAN_ELEMENTS`. Exactly zero above the
    diagonal. It measures the size of a local derivative; the entries of a row are not shares of a total.

    Args:
        model: the model.
        tokens: [T], the path.
        segments: [T], the document of each position.

    Returns:
        [T, T].

    Raises:
        ValueError: if `tokens` is not a path of the model.
    """
    path = prepare(model, tokens, segments)
    return path.cut(path.cut(_sensitivity(model, path.tokens, path.count, path.segments), 1))


@jax.jit
def _sensitivity(model: Transformer, tokens: Array, count: Array, segments: Array | None) -> Array:
    T, model = len(tokens), plain(model)
    below = dataclasses.replace(model, layers=model.layers.all_but_last()) if model.depth else model
    filters = _linearised_filters(below, tokens, segments)
    work = T**2 * model.width * sum(leaf.size for leaf in jax.tree.leaves(model.layers))
    size = -(-T // max(1, min(ROW_BLOCKS, T // 4))) if work > SPLIT_WORK else T

    def block(start: int) -> Callable[[], Array]:
        end = min(start + size, T)
        documents = documents_of(None if segments is None else segments[:end], end)
        cut = jax.tree.map(lambda a: a[:, :end], filters)
        rows = jnp.minimum(start + indices(size), T - 1)
        return lambda: jnp.pad(_rows(model, below, tokens[:end], documents, cut, rows, count), ((0, 0), (0, T - end)))

    # A switch in a loop, so that the memory of one block is free for the next.
    blocks = [block(start) for start in range(0, T, size)]
    rows = lax.map(lambda n: lax.switch(n, blocks), indices(len(blocks))).reshape(-1, T)[:T]
    return jnp.where(model.missing(tokens, documents_of(segments, T))[:, None], jnp.nan, rows)


def _rows(
    model: Transformer,
    below: Transformer,
    tokens: Array,
    documents: Documents,
    filters: Any,
    rows: Array,
    count: Array,
) -> Array:
    """The requested rows of the map; zeros for those at or beyond `count`."""
    T, D, dtype = len(tokens), model.width, model.embed.table.dtype
    first = below.embedded(tokens, documents)
    x, pull_below = jax.vjp(lambda x: _through(below, x, documents, filters), first)
    elements = T * max(4 * T, D)  # of the largest array of one pass, with four heads assumed
    passes = -(-D // max(1, min(64, BATCH_ELEMENTS // elements)))
    batch = -(-D // passes)

    def row(t: Array) -> Array:
        pull_last = jax.vjp(lambda x: _context(model, x, t, documents), x)[1]

        def add(squares: Array, directions: Array) -> tuple[Array, None]:
            (pulled,) = jax.vmap(pull_last, out_axes=1)(jax.nn.one_hot(directions, D, dtype=dtype))
            (pulled,) = jax.vmap(pull_below, 1, 1)(pulled)
            return squares + jnp.sum(pulled**2, axis=(1, 2)), None

        directions = indices(passes * batch).reshape(passes, batch)
        return jnp.sqrt(lax.scan(add, jnp.zeros(T, dtype), directions)[0])

    return lax.map(lambda t: lax.cond(t < count, row, lambda t: jnp.zeros(T, dtype), t), rows)


def _through(model: Transformer, x: Array, documents: Documents, filters: Any) -> Array:
    """The stream after all layers. Derivatives of filter steps are taken from `filters` if they are given."""
    mixer = Mixer(model.layers, documents)

    def body(layer: Layer, place: Place, x: Array, linearised: Any) -> tuple[Array, None]:
        def filter_step(source: Array) -> Array:
            if linearised is None:
                return layer.filtered(source)
            value, jacobian = linearised
            return value + jnp.einsum("tij,tj->ti", jacobian, source - lax.stop_gradient(source))

        combine = lambda aggregate, h: mixer.combine(aggregate, h, place, None, {})
        return layer(x, combine, filter_step=filter_step).stations[1], None

    return model.layers.scan(body, x, None if filters is None else model.layers.split(filters))[0]


def _context(model: Transformer, x: Float[Array, "T D"], t: Array, documents: Documents) -> Float[Array, " D"]:
    """The context vector at t, from the stream before the last layer, of which a single row is computed."""
    if not model.depth:
        return model.context(x[t])
    layer = model.layers[-1]
    y = layer.aggregate.at(layer.step_input(x, layer.aggregate_norm), t, documents)
    return model.context(layer(x[t][None], lambda aggregate, h: (y[None], None)).stations[1, 0])


def _linearised_filters(model: Transformer, tokens: Array, segments: Array | None) -> Any:
    """The values [L, T, D] and Jacobians [L, T, D, D] of the filter steps on a path; None if they are too large.

    Without Jacobians, each of the T x D cotangents would pass through the weights of the filter, 8 D^2 in an MLP with 4
    D neurons, which is most of the work. Computing the Jacobians costs as much as the first D of them.
    """
    if not model.depth or model.depth * len(tokens) * model.width**2 > JACOBIAN_ELEMENTS:
        return None
    walk = model.walked(tokens, segments)

    def body(layer: Layer, place: Place, carry: None, args: Any) -> tuple[None, Any]:
        before, after_aggregate, value = args
        source = layer.filter_source(before, after_aggregate)
        return None, (value, map_in_batches(functools.partial(_filter_jacobian, layer), source, 16))

    per_layer = model.layers.split((walk.stations[:-1:2], walk.stations[1::2], walk.moves[1::2]))
    return model.layers.join(model.layers.scan(body, None, per_layer)[1])


def _filter_jacobian(layer: Layer, x: Float[Array, " D"]) -> Float[Array, "D D"]:
    pull = jax.vjp(lambda x: layer.filtered(x[None])[0], x)[1]
    return map_in_batches(lambda c: pull(c)[0], jnp.eye(len(x), dtype=x.dtype), 64)
