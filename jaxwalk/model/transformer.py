"""Transformers: layers between an embedding and an unembedding, and the encoding walk of each position through them.

A model is a pytree, and everything computed with it is a pure function of (model, tokens). Intermediate results are
returned as a `Walk`, and interventions are arguments.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxwalk.aggregates._contract import Documents, documents_of
from jaxwalk.filters import Embed, LearnedPositions, Norm, SinusoidalPositions, Unembed, indices, module
from jaxwalk.model.inputs import Segments, Tokens, check_segments, check_shape, prepare
from jaxwalk.model.layer import Interventions, Layer, each_position
from jaxwalk.model.mixing import Functions, Matrices, Mixer, Mixing, plan, recorded_order
from jaxwalk.model.stack import Layers, Place

Patch = tuple[Bool[Array, "S T"] | Bool[np.ndarray, "S T"], Float[Array, "S T D"]]
"""Where stations are replaced, and their replacements."""


class Walk(NamedTuple):
    """The encoding walk of every position of a path.

    Attributes:
        stations: [S, T, D], the residual stream after the embedding, and after each aggregate step and filter step, so
            that S = 2L+1. `stations[0::2]` are the embedding and the outputs of the layers, before the final norm.
        context: [T, D], the context vectors: the final norm of the last station.
        mixing: {layer index: A [G, T, T]}, the requested mixing matrices.
        moves: [S-1, T, D], what each step adds to the station before it (post-norm: before the norm of the sum).
    """

    stations: Float[Array, "S T D"]
    context: Float[Array, "T D"]
    mixing: Any
    moves: Float[Array, "S-1 T D"]


class LayersOutput(NamedTuple):
    """The outputs of all layers.

    Attributes:
        x: [T, D], the last station.
        collected: (stations, moves), each `collect` of the two stations or moves of a layer, with leaves [L, ...]; None
            without `collect` or layers.
        buffers: the recorded matrices.
    """

    x: Float[Array, "T D"]
    collected: Any
    buffers: Any


@module
class Transformer(nnx.Module):
    """A model: token and position vectors, layers, final norm, logits. Written for one path; batch with `jax.vmap`."""

    embed: Embed = nnx.data()
    positions: LearnedPositions | SinusoidalPositions | None = nnx.data()
    if TYPE_CHECKING:
        layers: Layers = nnx.data()
    else:
        layers: Layers | tuple[Layer, ...] = nnx.data()
    """A sequence of `Layer`s, stored stacked. A tuple of layers is converted."""
    norm: Norm | None = nnx.data()
    unembed: Unembed = nnx.data()
    max_length: int
    remat: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Layers):
            object.__setattr__(self, "layers", Layers.of(self.layers))

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary, V."""
        return self.embed.table.shape[-2]

    @property
    def width(self) -> int:
        """The width of the residual stream, D."""
        return self.embed.table.shape[-1]

    @property
    def depth(self) -> int:
        """The number of layers, L."""
        return len(self.layers)

    @property
    def position_rows(self) -> int | None:
        """The number of positions that the learned position table covers; None without a table."""
        return self.positions.max_length if isinstance(self.positions, LearnedPositions) else None

    @property
    def stations(self) -> int:
        """The number of stations of a walk, S = 2L+1."""
        return 2 * self.depth + 1

    @property
    def token_vectors(self) -> Float[Array, "V D"]:
        """The token vectors e_v: the rows of the embedding matrix, scaled and normalised if the model does so."""
        if self.embed.scale == 1 and self.embed.norm is None:
            return self.embed.table
        return _token_vectors(self.embed)

    @property
    def output_vectors(self) -> Float[Array, "V D"]:
        """The output vectors u_v, one row per token; if tied, the embedding matrix, neither scaled nor normalised."""
        return self.embed.table if self.unembed.weight is None else self.unembed.weight

    def context(self, station: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        """The context vector of the last station: its final norm. A logit lens applies it to other stations."""
        return station if self.norm is None else self.norm(station, hold=hold)

    def logits(self, context: Float[Array, " D"]) -> Float[Array, " V"]:
        """The logits c . u_v + b_v, soft-capped if the model caps its logits."""
        return self.unembed(context, self.embed.table)

    def with_layer(self, number: int, **fields: Any) -> "Transformer":
        """A copy of the model with a modified layer.

        Args:
            number: the index of the layer.
            **fields: the fields to replace, such as `aggregate`, `filter`, a norm or `placement`.

        Raises:
            ValueError: if there is no such layer.
            TypeError: if layers have no such field.
        """
        if not 0 <= number < self.depth:
            raise ValueError(f"layer: expected one from 0 to {self.depth - 1}, got {number}.")
        layers = list(self.layers)
        layers[number] = dataclasses.replace(layers[number], **fields)
        return dataclasses.replace(self, layers=Layers.of(layers))

    def walk(
        self,
        tokens: Tokens,
        *,
        segments: Segments | None = None,
        nudge: Float[Array, "S T D"] | None = None,
        patch: Patch | None = None,
        vectors: Float[Array, "T D"] | None = None,
        mixing: Mapping[int, Mixing] | None = None,
        record_mixing: Sequence[int] = (),
        hold: bool = False,
    ) -> Walk:
        """The encoding walk of a path, as a compiled program that can be vmapped, differentiated and jitted.

        Args:
            tokens: [T], the path. A traced id that is out of range makes the walk NaN from its position to the end of
                its document.
            segments: [T], the document of each position, or 0 for padding. Positions restart at each border, and no
                information crosses it.
            nudge: [S, T, D], vectors to add at each station, such as steering vectors. The gradient with respect to a
                nudge of zero is the gradient with respect to all stations.
            patch: (where [S, T], by [S, T, D]), the stations to replace and their replacements, such as stations of the
                walk of another path. The nudge is added after the patch.
            vectors: [T, D], token vectors to use in place of those of the model.
            mixing: {layer index: A}, mixing matrices [G, T, T] to use in place of those of the layers, or functions
                that compute them from those. Functions are static: pass the same object to reuse the compiled program.
            record_mixing: the indices of the layers whose mixing matrices are returned.
            hold: whether to hold all data-dependent coefficients (of mixing, norms and gates), which makes the walk
                affine in the token vectors.

        Returns:
            The stations [S, T, D], contexts [T, D], recorded matrices {layer index: [G, T, T]} and moves [S-1, T, D].

        Raises:
            ValueError: if `tokens` is not a path of the model, a layer does not exist, or a shape is wrong.
        """
        mixing = dict(mixing or {})
        exact = any(callable(A) for A in mixing.values())  # a function of a matrix must see its true size
        path = prepare(self, tokens, segments, nudge, patch, vectors, mixing, exact=exact)
        edits = checked_interventions(self, path.length, nudge, patch)
        check_shape("vectors", vectors, (path.length, self.width))
        check_mixing(self, path.length, mixing, record_mixing)
        padded = {n: A if callable(A) else path.pad(path.pad(A, 1), 2) for n, A in mixing.items()}
        matrices, functions = plan(self.layers, padded, record_mixing)
        walk = _walk(
            self,
            path.tokens,
            path.segments,
            jax.tree.map(lambda a: path.pad(a, 1), edits),
            path.pad(vectors),
            matrices,
            functions=functions,
            hold=hold,
        )
        recorded = dict(zip(recorded_order(self.layers, record_mixing), walk.mixing, strict=True))
        return Walk(
            path.cut(walk.stations, 1),
            path.cut(walk.context),
            {layer: path.cut(path.cut(recorded[layer], 1), 2) for layer in sorted(recorded)},
            path.cut(walk.moves, 1),
        )

    def position_vectors(self, length: int, segments: Segments | None = None) -> Float[Array, "T D"]:
        """The position vectors that are added to the token vectors of a path; zeros if the model has none.

        Args:
            length: T, the length of the path.
            segments: [T], the document of each position.

        Raises:
            ValueError: if `segments` is not a vector of `length` non-negative integers.
        """
        return self.positions_of(documents_of(check_segments(segments, length), length))

    def state_size(self, length: int) -> int:
        """The number of scalars that decoding carries from token to token after `length` tokens, in all layers."""
        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: self.layers.init_memory(length))))

    # The parts of a walk, without checks, for use inside compiled programs.

    def positions_of(self, documents: Documents) -> Float[Array, "T D"]:
        """`position_vectors` without checks.

        Beyond a table they are its last row rather than NaN: `missing` positions become NaN only at the end of a walk.
        """
        if self.positions is None:
            return jnp.zeros_like(self.embed.table, shape=(len(documents.position), self.width))
        position, rows = documents.position, self.position_rows
        vectors = jax.vmap(self.positions)(position if rows is None else jnp.minimum(position, rows - 1))
        return vectors.astype(self.embed.table.dtype)

    def out_of_range(self, tokens: Int[Array, " T"], positions: Int[Array, " T"]) -> Bool[Array, " T"]:
        """[T], whether each token is outside the vocabulary or at a position beyond the position table."""
        unknown = (tokens < 0) | (tokens >= self.vocab_size)
        return unknown if self.position_rows is None else unknown | (positions >= self.position_rows)

    def missing(self, tokens: Int[Array, " T"], documents: Documents) -> Bool[Array, " T"]:
        """[T], where a walk is NaN: from a token that is out of range to the end of its document."""
        so_far = jnp.cumsum(self.out_of_range(tokens, documents.position), dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros(1, so_far.dtype), so_far])[indices(len(tokens)) - documents.position]
        return so_far > before

    def embedded(
        self, tokens: Int[Array, " T"], documents: Documents, vectors: Float[Array, "T D"] | None = None
    ) -> Float[Array, "T D"]:
        """The first station, for tokens or for token vectors in place of theirs.

        Ids that are out of range are embedded like id 0. As NaN, they would make earlier positions NaN too, since the
        zeros of a mixing matrix times NaN are NaN.
        """
        known = (tokens >= 0) & (tokens < self.vocab_size)
        x = jax.vmap(self.embed)(jnp.where(known, tokens, 0)) if vectors is None else vectors
        return x if self.positions is None else x + self.positions_of(documents).astype(x.dtype)

    def run_layers(
        self,
        x: Float[Array, "T D"],
        mixer: Mixer,
        edits: Interventions | None = None,
        collect: Callable[[Float[Array, "2 T D"]], Any] | None = None,
    ) -> LayersOutput:
        """Apply all layers to the first station.

        Args:
            x: [T, D], the first station.
            mixer: how positions are combined.
            edits: interventions at stations 1 to S-1, with leaves [L, 2, ...].
            collect: what to return of the stations, and of the moves, of each layer; None for nothing.
        """
        layers = self.layers

        def body(layer: Layer, place: Place, carry: Any, args: Any) -> tuple[Any, Any]:
            x, buffers = carry
            layer_index, interventions = args
            output = layer(
                x,
                lambda aggregate, h: mixer.combine(aggregate, h, place, layer_index, buffers),
                Interventions() if interventions is None else interventions,
                hold=mixer.hold,
            )
            collected = None if collect is None else (collect(output.stations), collect(output.moves))
            return (output.stations[1], output.extra), collected

        per_layer = layers.split((np.arange(self.depth, dtype=np.int32), edits))
        (x, buffers), collected = layers.scan(body, (x, mixer.buffers(x)), per_layer, remat=self.remat)
        return LayersOutput(x, None if collect is None or not self.depth else layers.join(collected), buffers)

    def contexts(self, tokens: Int[Array, " T"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        """The context vectors of a path, without the rest of its walk."""
        documents = documents_of(segments, len(tokens))
        x = self.run_layers(self.embedded(tokens, documents), Mixer(self.layers, documents)).x
        context = each_position(self.context)(x)
        return jnp.where(self.missing(tokens, documents)[:, None], jnp.nan, context)

    def walked(
        self,
        tokens: Int[Array, " T"],
        segments: Int[Array, " T"] | None = None,
        edits: Interventions | None = None,
        vectors: Float[Array, "T D"] | None = None,
        matrices: Matrices | None = None,
        *,
        functions: Functions | None = None,
        every: Callable[[Any, Array], Array] | None = None,
        hold: bool = False,
    ) -> Walk:
        """`walk` without checks.

        Args:
            tokens: [T], the path.
            segments: [T], the document of each position.
            edits: interventions at all stations.
            vectors: [T, D], token vectors to use in place of those of the model.
            matrices: the matrices to replace and to record.
            functions: the functions to apply to matrices.
            every: (layer index, matrix) -> the matrix to use, applied in every layer.
            hold: whether to hold all data-dependent coefficients.

        Returns:
            The walk, with the recorded matrices as a tuple, in the order of `recorded_order`.
        """
        documents = documents_of(segments, len(tokens))
        mixer = Mixer(self.layers, documents, hold=hold, matrices=matrices, functions=functions, every=every)
        edits = edits or Interventions()
        x = edits.apply(self.embedded(tokens, documents, vectors), 0)
        by_layer = jax.tree.map(lambda a: a[1:].reshape(self.depth, 2, *a.shape[1:]), edits)
        output = self.run_layers(x, mixer, by_layer, collect=lambda pair: pair)
        empty = jnp.zeros((0, *x.shape), x.dtype)
        later, moves = (empty, empty) if output.collected is None else output.collected
        stations = jnp.concatenate([x[None], later.reshape(-1, *x.shape)])
        context = each_position(self.context, hold)(output.x)
        missing = self.missing(tokens, documents)[:, None]
        stations, context, moves = (
            jnp.where(missing, jnp.nan, a) for a in (stations, context, moves.reshape(-1, *x.shape))
        )
        return Walk(stations, context, mixer.recorded(output.buffers), moves)


@functools.partial(jax.jit, static_argnames=("functions", "hold"))
def _walk(
    model: Transformer,
    tokens: Array,
    segments: Array | None,
    edits: Interventions,
    vectors: Array | None,
    matrices: Matrices,
    *,
    functions: Functions,
    hold: bool,
) -> Walk:
    return model.walked(tokens, segments, edits, vectors, matrices, functions=functions, hold=hold)


@jax.jit
def _token_vectors(embed: Embed) -> Array:
    return jax.vmap(embed.vector)(embed.table)


def checked_interventions(
    model: Transformer, length: int, nudge: Any = None, patch: Patch | None = None
) -> Interventions:
    """`nudge` and `patch` of a path of this length as interventions.

    Raises:
        ValueError: if a shape is wrong.
    """
    S = model.stations
    where, by = (None, None) if patch is None else patch
    check_shape("nudge", nudge, (S, length, model.width))
    check_shape("patch[0]", where, (S, length))
    check_shape("patch[1]", by, (S, length, model.width))
    return Interventions(nudge, where, by)


def check_mixing(model: Transformer, length: int, mixing: Mapping[int, Mixing], record: Sequence[int]) -> None:
    """Check the arguments `mixing` and `record_mixing` of a walk of this length.

    Raises:
        ValueError: if a layer does not exist, or a matrix has the wrong shape.
    """
    for name, layers in (("mixing", mixing), ("record_mixing", record)):
        if any(not 0 <= layer_index < model.depth for layer_index in layers):
            raise ValueError(f"{name}: expected layers from 0 to {model.depth - 1}, got {sorted(layers)}.")
    for layer_index, A in mixing.items():
        if not callable(A):
            x = jax.ShapeDtypeStruct((length, model.width), model.embed.table.dtype)
            expected = jax.eval_shape(model.layers[layer_index].aggregate.mixing, x)
            check_shape(f"mixing[{layer_index}]", A, expected.shape)


def encoding_walk(
    model: Transformer,
    tokens: Tokens,
    *,
    segments: Segments | None = None,
    nudge: Float[Array, "S T D"] | None = None,
    patch: Patch | None = None,
    vectors: Float[Array, "T D"] | None = None,
    mixing: Mapping[int, Mixing] | None = None,
    record_mixing: Sequence[int] = (),
    hold: bool = False,
) -> Walk:
    """The encoding walk of a path. See `Transformer.walk` for details of the arguments.

    Args:
        model: the model.
        tokens: [T], the path.
        segments: [T], the document of each position.
        nudge: [S, T, D], vectors to add at each station.
        patch: (where [S, T], by [S, T, D]), the stations to replace and their replacements.
        vectors: [T, D], token vectors to use in place of those of the model.
        mixing: {layer index: matrix [G, T, T] or function}, the mixing matrices to replace.
        record_mixing: the indices of the layers whose mixing matrices are returned.
        hold: whether to hold all data-dependent coefficients.

    Returns:
        The stations [S, T, D], contexts [T, D], recorded matrices {layer index: [G, T, T]} and moves [S-1, T, D].

    Raises:
        ValueError: if `tokens` is not a path of the model, a layer does not exist, or a shape is wrong.
    """
    return model.walk(
        tokens,
        segments=segments,
        nudge=nudge,
        patch=patch,
        vectors=vectors,
        mixing=mixing,
        record_mixing=record_mixing,
        hold=hold,
    )


def context_vector(model: Transformer, tokens: Tokens, *, segments: Segments | None = None) -> Float[Array, " D"]:
    """The context vector c_T of a path: that of its last position, which encodes the whole path.

    Args:
        model: the model.
        tokens: [T], the path. A traced id that is out of range makes the result NaN if it is in the last document.
        segments: [T], the document of each position: see `Transformer.walk`.

    Returns:
        [D].

    Raises:
        ValueError: if `tokens` is not a path of the model.
    """
    path = prepare(model, tokens, segments)
    return _context_vector(model, path.tokens, path.segments, path.count)


@jax.jit
def _context_vector(model: Transformer, tokens: Array, segments: Array | None, count: Array) -> Array:
    return model.contexts(tokens, segments)[count - 1]
