"""The parts of a target vector: those due to sources through the held walk, and those carried to it directly.

The decompositions of `jaxwalk.probes.decomposition` are assembled from these.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk._loops import map_in_batches
from jaxwalk.aggregates._contract import Documents, documents_of
from jaxwalk.filters import indices, wide
from jaxwalk.model.layer import Layer
from jaxwalk.model.mixing import Mixer
from jaxwalk.model.stack import Place
from jaxwalk.model.transformer import Transformer, Walk

ADDITIVE = frozenset({"bias"})
"""Names of the parameters that are added to the stream or to an input of a map; all others multiply."""
BATCH_ELEMENTS = 1 << 20
"""The largest total size of the tangents or cotangents of passes that are batched together."""


class HeldWalk(NamedTuple):
    """The stations [S, D], context vector [D] and moves [2L, D] of a held walk at one position."""

    stations: Float[Array, "S D"]
    context: Float[Array, " D"]
    moves: Float[Array, "N D"]


@dataclasses.dataclass(frozen=True)
class Target:
    """The vector to decompose: a station of one position, or its context vector, with the walk that leads to it.

    Attributes:
        model: the model, with plain kernels.
        documents: the documents of the path.
        at: the position.
        station: the station, or S for the context vector.
        token_vectors: [T, D].
        position_vectors: [T, D].
        x: [T, D], the first station, the sum of both.
        walk: the walk of the path.
        whole: [D], the target vector itself.
    """

    model: Transformer
    documents: Documents
    at: Int[Array, ""]
    station: Int[Array, ""]
    token_vectors: Float[Array, "T D"]
    position_vectors: Float[Array, "T D"]
    x: Float[Array, "T D"]
    walk: Walk
    whole: Float[Array, " D"]

    @staticmethod
    def of(
        model: Transformer, tokens: Array, segments: Array | None, at: Int[Array, ""], station: Int[Array, ""]
    ) -> "Target":
        """The target at position `at` and `station` of a checked path."""
        documents = documents_of(segments, len(tokens))
        tokens = jnp.where(at < 0, -1, tokens)  # an index out of range makes everything NaN
        walk = model.walked(tokens, segments)
        x = model.embedded(tokens, documents)
        token_vectors = jax.vmap(model.embed)(jnp.where((tokens >= 0) & (tokens < model.vocab_size), tokens, 0))
        position_vectors = model.positions_of(documents).astype(x.dtype)
        target = Target(model, documents, at, station, token_vectors, position_vectors, x, walk, x[0])
        stations, context = walk.stations[:, at], walk.context[at]
        whole = target.select(HeldWalk(stations, context, walk.moves[:, at]))
        valid = (station >= 0) & (station <= model.stations)
        return dataclasses.replace(target, whole=jnp.where(valid, whole, jnp.nan))

    def select(self, walk: HeldWalk) -> Float[Array, " D"]:
        """The target vector in a walk of its position."""
        S = self.model.stations
        return jnp.where(self.station == S, walk.context, walk.stations[jnp.minimum(self.station, S - 1)])

    def held(self, x: Float[Array, "T D"], model: Transformer | None = None) -> HeldWalk:
        """The held walk from the first station x, at the target's position."""
        model = self.model if model is None else model
        mixer = Mixer(model.layers, self.documents, hold=True)
        output = model.run_layers(x, mixer, collect=lambda pair: pair[:, self.at])
        D, last = x.shape[1], output.x[self.at]
        empty = jnp.zeros((0, D), x.dtype)
        stations, moves = (empty, empty) if output.collected is None else output.collected
        stations = jnp.concatenate([x[self.at][None], stations.reshape(-1, D)])
        return HeldWalk(stations, model.context(last, hold=True), moves.reshape(-1, D))

    # Total parts: due to a source, through every step.

    def split_by_source(self, f: Callable[[Array], Float[Array, " m"]]) -> tuple[Array, Array]:
        """The parts of f(x), which is affine in x, due to each token vector and to each position vector: [T, m] each.

        Uses one forward pass per source or one backward pass per output, whichever is fewer.
        """
        T, sources = len(self.x), 1 if self.model.positions is None else 2
        m = jax.eval_shape(f, self.x).size
        if not m:
            return (jnp.zeros((T, 0), self.x.dtype),) * 2
        batch = max(1, BATCH_ELEMENTS // self.x.size)
        if m < sources * T:
            out, pull = jax.vjp(f, self.x)

            def pull_back(index: Array) -> tuple[Array, Array]:
                (slope,) = pull(jnp.zeros_like(out).at[index].set(1))
                return jnp.sum(slope * self.token_vectors, axis=-1), jnp.sum(slope * self.position_vectors, axis=-1)

            by_token, by_position = map_in_batches(pull_back, indices(m), min(16, batch))
            return by_token.T, by_position.T
        push = jax.linearize(f, self.x)[1]

        def push_forward(source: tuple[Array, Array]) -> Array:
            index, vector = source
            return push(jnp.zeros_like(self.x).at[index].set(vector))

        index = indices(T)
        by_token = map_in_batches(push_forward, (index, self.token_vectors), batch)
        if self.model.positions is None:
            return by_token, jnp.zeros_like(by_token)
        return by_token, map_in_batches(push_forward, (index, self.position_vectors), batch)

    def due_to_biases(self, f: Callable[[Transformer], Array]) -> Array:
        """The part of f(model) due to the additive parameters of the model."""
        return along_biases(f, self.model)

    # Direct parts: carried to the target by the residual stream and the held norms alone.

    def carry(self, parts: Float[Array, "*n D"], step: Array | int) -> Float[Array, "*n D"]:
        """Parts added to the stream by `step`, carried to the target; 0 if the target precedes the step.

        They enter before the norm of a post-norm step.
        """
        flat = parts.reshape(-1, parts.shape[-1])
        return self.carry_each(flat, jnp.broadcast_to(jnp.asarray(step), (len(flat),))).reshape(parts.shape)

    def carry_moves(self, moves: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """The move of each step, carried to the target."""
        return self.carry_each(moves, indices(len(moves)))

    def carry_each(self, parts: Float[Array, "P D"], steps: Int[Array, " P"]) -> Float[Array, "P D"]:
        """Each part carried to the target, where part p is added to the stream by step steps[p]."""
        model, S = self.model, self.model.stations
        reached = self.station > steps
        if any(layer.placement == "post" for block in model.layers.blocks for layer in block.period):

            def body(layer: Layer, place: Place, parts: Array, args: Any) -> tuple[Array, None]:
                layer_index, points = args
                for i, norm in enumerate((layer.aggregate_norm, layer.filter_norm)):
                    if layer.placement == "post" and norm is not None:
                        affected = (steps <= 2 * layer_index + i) & (2 * layer_index + i < self.station)
                        normed = jax.vmap(functools.partial(_held_derivative, norm, points[i]))(parts)
                        parts = jnp.where(affected[:, None], normed, parts)
                return parts, None

            points = (self.walk.stations[:-1, self.at] + self.walk.moves[:, self.at]).reshape(model.depth, 2, -1)
            per_layer = model.layers.split((np.arange(model.depth, dtype=np.int32), points))
            parts, _ = model.layers.scan(body, parts, per_layer)
        if model.norm is not None:
            normed = jax.vmap(functools.partial(_held_derivative, model.norm, self.walk.stations[-1, self.at]))(parts)
            parts = jnp.where(self.station == S, normed, parts)
        return jnp.where(reached[:, None], parts, 0)

    def direct(self) -> tuple[Array, Array, Array]:
        """The position's own token and position vectors and the biases of norms, each [D], carried to the target."""
        sources = jnp.stack([self.token_vectors[self.at], self.position_vectors[self.at]])
        # Both are in the stream before step 0. If the target is the first station, no step precedes it.
        token, position = jnp.where(self.station == 0, sources, self.carry_each(sources, jnp.zeros(2, jnp.int32)))
        return token, position, self._norm_biases()

    def _norm_biases(self) -> Float[Array, " D"]:
        model, S = self.model, self.model.stations
        total = jnp.zeros_like(self.whole)
        if any(layer.placement == "post" for block in model.layers.blocks for layer in block.period):

            def body(layer: Layer, place: Place, carry: None, points: Array) -> tuple[None, Array]:
                norms = (layer.aggregate_norm, layer.filter_norm)
                biases = [
                    jnp.zeros_like(point) if norm is None else along_biases(functools.partial(_held_at, point), norm)
                    for norm, point in zip(norms, points, strict=True)
                ]
                return None, jnp.stack(biases)

            points = (self.walk.stations[:-1, self.at] + self.walk.moves[:, self.at]).reshape(model.depth, 2, -1)
            by_layer = model.layers.join(model.layers.scan(body, None, model.layers.split(points))[1])
            # A norm's bias is added after the norm of its own step, so only the norms of later steps act on it.
            steps = indices(2 * model.depth)
            carried = self.carry_each(by_layer.reshape(-1, len(total)), steps + 1)
            at_target = by_layer.reshape(-1, len(total))
            total = jnp.where((self.station == steps + 1)[:, None], at_target, carried).sum(0)
        if model.norm is not None:
            last = self.walk.stations[-1, self.at]
            bias = along_biases(lambda norm: norm(last, hold=True), model.norm)
            total = total + jnp.where(self.station == S, bias, 0)
        return total

    def step_parts(self) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
        """What each step adds at the position, split in two: [2L, D] due to its input and [2L, D] due to its biases."""
        layers, stations = self.model.layers, self.walk.stations

        def body(layer: Layer, place: Place, carry: None, args: Any) -> tuple[None, Any]:
            before, after_aggregate = args

            def aggregate_step(layer: Layer, x: Array) -> Array:
                h = layer.step_input(x, layer.aggregate_norm, hold=True)
                y = layer.aggregate.at(h, self.at, self.documents, hold=True)
                return layer.aggregated(y[None], hold=True)[0]

            def filter_step(layer: Layer, x: Array) -> Array:
                return layer.filtered(x[self.at][None], hold=True)[0]

            steps = (aggregate_step, before), (filter_step, layer.filter_source(before, after_aggregate))
            stream = [jax.jvp(functools.partial(step, layer), (x,), (x,))[1] for step, x in steps]
            biases = [along_biases(functools.partial(_with_input, step, x), layer) for step, x in steps]
            return None, (jnp.stack(stream), jnp.stack(biases))

        if not len(layers):
            return (jnp.zeros((0, len(self.whole)), self.whole.dtype),) * 2
        per_layer = layers.split((stations[:-1:2], stations[1::2]))
        stream, biases = layers.join(layers.scan(body, None, per_layer)[1])
        return stream.reshape(-1, len(self.whole)), biases.reshape(-1, len(self.whole))

    # The pieces of one step.

    def head_parts(self, layer: Layer, layer_index: Array) -> tuple[Float[Array, "G T D"], Float[Array, " D"]]:
        """What the aggregate of a layer adds by head and source position, and by the biases of its readout."""
        h = layer.step_input(self.walk.stations[2 * layer_index], layer.aggregate_norm, hold=True)
        values = layer.aggregate.values(h, self.documents, hold=True)
        parts = layer.aggregate.mixing(h, self.at[None], self.documents)[:, 0, :, None].astype(values.dtype) * values
        y = parts.sum(1)

        def readout(layer: Layer, y: Array) -> Array:
            out = layer.aggregate.readout(y[:, None], h[self.at][None], hold=True)
            return layer.aggregated(out, hold=True)[0]

        def parts_of_head(g: Array) -> Array:
            def along(part: Array) -> Array:
                tangent = jnp.zeros_like(y).at[g].set(part)
                return jax.jvp(functools.partial(readout, layer), (y,), (tangent,))[1]

            return jax.vmap(along)(parts[g])

        by_head = jax.lax.map(parts_of_head, indices(len(parts)))
        return by_head, along_biases(lambda layer: readout(layer, y), layer)

    def neuron_parts(self, layer: Layer, layer_index: Array) -> tuple[Float[Array, "E D"], Float[Array, " D"]]:
        """What the filter of a layer adds by neuron, and by the biases of its output."""
        filter: Any = layer.filter
        before, after_aggregate = self.walk.stations[2 * layer_index], self.walk.stations[2 * layer_index + 1]
        source = layer.filter_source(before, after_aggregate)[self.at]
        active = filter.hidden(layer.step_input(source[None], layer.filter_norm)[0])  # type: ignore[arg-type]

        def output(layer: Layer, y: Array) -> Array:
            return layer.step_output(y[None], layer.filter_norm, layer.filter_out_norm, hold=True)[0]

        y = filter.down(active)
        parts = active[:, None] * filter.down.weight
        along = lambda part: jax.jvp(functools.partial(output, layer), (y,), (part,))[1]
        biases = along_biases(lambda layer: output(layer, layer.filter.down(active)), layer)  # type: ignore[union-attr]
        return jax.vmap(along)(parts), biases


def _held_derivative(norm: Any, point: Array, part: Array) -> Array:
    """Derivative of a held norm at `point` in the direction `part`."""
    return jax.jvp(functools.partial(norm, hold=True), (point,), (part,))[1]


def _held_at(point: Array, norm: Any) -> Array:
    return norm(point, hold=True)


def _with_input(step: Callable[[Layer, Array], Array], x: Array, layer: Layer) -> Array:
    return step(layer, x)


def along_biases(f: Callable[[Any], Array], tree: Any) -> Array:
    """The part of f(tree) due to the additive parameters of `tree`: the derivative of f along them."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    additive = [getattr(path[-1], "name", None) in ADDITIVE for path, _ in leaves]
    biases = [leaf for (_, leaf), bias in zip(leaves, additive, strict=True) if bias]
    if not biases:
        return jnp.zeros_like(f(tree))

    def with_biases(biases: list[Array]) -> Array:
        remaining = iter(biases)
        joined = [next(remaining) if bias else leaf for (_, leaf), bias in zip(leaves, additive, strict=True)]
        return f(jax.tree.unflatten(structure, joined))

    return jax.jvp(with_biases, (biases,), (biases,))[1]


def relative_error(whole: Float[Array, " D"], parts: Float[Array, "P D"]) -> Float[Array, ""]:
    """|sum of parts - whole| / sum of |parts|. Not relative to |whole|, which is small if the parts cancel."""
    dtype = wide(whole.dtype)
    difference = jnp.linalg.norm((parts.sum(0) - whole).astype(dtype))
    return ratio(difference, jnp.linalg.norm(parts.astype(dtype), axis=-1).sum())


def ratio(a: Float[Array, "*n"], b: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """a / b, with 0 / 0 = 0."""
    return a / jnp.maximum(b, jnp.finfo(b.dtype).tiny)
