"""Layers composed between an embedding and an unembedding, and the walk of every position through them.

Only this room composes. A model is a pytree, and everything about it is a pure function of (model, tokens): what
happens inside is returned as a `Walk`, and what is changed inside is an argument.
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
"""Where stations are replaced, and by what."""


class Walk(NamedTuple):
    """What one path does inside a model: the encoding walk of every position, in parallel.

    stations: [S, T, D], after the embedding, then after each aggregate step and each filter step; S = 2L+1.
        `stations[0::2]` are the embedding and the outputs of the layers. All are before the final norm.
    context: [T, D], the context vectors: the final norm of the last station.
    mixing: {layer: A [G, T, T]} for the layers that were asked for.
    moves: [S-1, T, D], what each step adds to the station before it (post-norm: before the norm of the sum).
    """

    stations: Float[Array, "S T D"]
    context: Float[Array, "T D"]
    mixing: Any
    moves: Float[Array, "S-1 T D"]


class Passed(NamedTuple):
    """The outcome of passing vectors through the layers.

    x: [T, D], the last station. kept: `keep` of the stations [2, T, D] and moves [2, T, D] of each layer, leaves
    [L, ...]; None if nothing was to be kept. buffers: the recorded matrices.
    """

    x: Float[Array, "T D"]
    kept: Any
    buffers: Any


@module
class Transformer(nnx.Module):
    """Token vectors (and positions) -> layers -> final norm -> logits. Written for one path; batch it with vmap."""

    embed: Embed = nnx.data()
    positions: LearnedPositions | SinusoidalPositions | None = nnx.data()
    if TYPE_CHECKING:
        layers: Layers = nnx.data()
    else:
        layers: Layers | tuple[Layer, ...] = nnx.data()
    """A sequence of `Layer`s, stored stacked. A tuple of layers given for it is stacked."""
    norm: Norm | None = nnx.data()
    unembed: Unembed = nnx.data()
    max_length: int
    remat: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Layers):
            object.__setattr__(self, "layers", Layers.of(self.layers))

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embed.table.shape[-2]

    @property
    def width(self) -> int:
        """D."""
        return self.embed.table.shape[-1]

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def position_rows(self) -> int | None:
        """The number of positions that a learned table has rows for; None without a table."""
        return self.positions.max_length if isinstance(self.positions, LearnedPositions) else None

    @property
    def stations(self) -> int:
        """S = 2L+1, the number of stations of a walk."""
        return 2 * self.depth + 1

    @property
    def token_vectors(self) -> Float[Array, "V D"]:
        """e_v, one row per token: the rows of the embedding matrix, scaled and normalised as the model does."""
        if self.embed.scale == 1 and self.embed.norm is None:
            return self.embed.table
        return _token_vectors(self.embed)

    @property
    def output_vectors(self) -> Float[Array, "V D"]:
        """U, one row per token; if tied, the embedding matrix, neither scaled nor normalised."""
        return self.embed.table if self.unembed.weight is None else self.unembed.weight

    def context(self, station: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        """The final norm: from the last station to the context vector (a logit lens applies it to other stations)."""
        return station if self.norm is None else self.norm(station, hold=hold)

    def logits(self, context: Float[Array, " D"]) -> Float[Array, " V"]:
        """c . u_v + b_v for each v, soft-capped where the model caps its logits."""
        return self.unembed(context, self.embed.table)

    def with_layer(self, number: int, **fields: Any) -> "Transformer":
        """This model with other `fields` (aggregate, filter, a norm, placement) in layer `number`.

        Raises:
            ValueError: for a layer that does not exist.
            TypeError: for a field that a layer does not have.
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
        """The encoding walk of a path: one compiled program, which may be vmapped, differentiated and jitted.

        Args:
            tokens: [T]. From a traced id that is out of range on, all is NaN.
            segments: [T], the document of each position; 0 is padding, positions restart at each border, and nothing
                crosses one.
            nudge: [S, T, D], added at each station. Its gradient at zero is that of every station at once; a steering
                vector is a nudge.
            patch: (where [S, T], by [S, T, D]), stations to replace and their replacements, such as those of the walk
                of another path. A nudge is added after it.
            vectors: [T, D], token vectors to use in place of the model's own.
            mixing: {layer: A}, mixing matrices [G, T, T] to use in place of the layers' own, or functions that compute
                them from these. A function is part of the compiled program, so pass the same object again to reuse it.
            record_mixing: the layers whose mixing matrices are returned.
            hold: hold all data-dependent coefficients (mixing, norms, gates) at their values, which makes the walk
                affine in the token vectors.

        Returns:
            The stations [S, T, D], contexts [T, D], recorded matrices and moves.

        Raises:
            ValueError: for tokens that are no path of the model, layers that do not exist, and wrong shapes.
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
        """What is added to the token vectors of a path of `length` tokens; zeros without position vectors."""
        return self.positions_of(documents_of(check_segments(segments, length), length))

    def state_size(self, length: int) -> int:
        """How many numbers decoding carries from token to token after `length` tokens, in all layers."""
        return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: self.layers.init_memory(length))))

    # The parts of a walk, for the functions of this library: they check nothing.

    def positions_of(self, documents: Documents) -> Float[Array, "T D"]:
        """What is added to the token vector at each position; zeros without position vectors. Beyond a table, its last
        row: what is missing becomes NaN at the end of the walk only."""
        if self.positions is None:
            return jnp.zeros_like(self.embed.table, shape=(len(documents.position), self.width))
        position, rows = documents.position, self.position_rows
        vectors = jax.vmap(self.positions)(position if rows is None else jnp.minimum(position, rows - 1))
        return vectors.astype(self.embed.table.dtype)

    def out_of_range(self, tokens: Int[Array, " T"], positions: Int[Array, " T"]) -> Bool[Array, " T"]:
        """Which tokens are none of the vocabulary, or at a position beyond the table."""
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        return wrong if self.position_rows is None else wrong | (positions >= self.position_rows)

    def missing(self, tokens: Int[Array, " T"], documents: Documents) -> Bool[Array, " T"]:
        """Where a walk is NaN: from a token that is out of range to the end of its document."""
        so_far = jnp.cumsum(self.out_of_range(tokens, documents.position), dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros(1, so_far.dtype), so_far])[indices(len(tokens)) - documents.position]
        return so_far > before

    def embedded(
        self, tokens: Int[Array, " T"], documents: Documents, vectors: Float[Array, "T D"] | None = None
    ) -> Float[Array, "T D"]:
        """The first station. What is missing is embedded as zeros, as 0 x NaN would reach into the past."""
        known = (tokens >= 0) & (tokens < self.vocab_size)
        x = jax.vmap(self.embed)(jnp.where(known, tokens, 0)) if vectors is None else vectors
        return x if self.positions is None else x + self.positions_of(documents).astype(x.dtype)

    def passed(
        self,
        x: Float[Array, "T D"],
        mixer: Mixer,
        edits: Interventions | None = None,
        keep: Callable[[Float[Array, "2 T D"]], Any] | None = None,
    ) -> Passed:
        """The first station x passed through all layers.

        Args:
            mixer: how positions are combined.
            edits: interventions at stations 1 to S-1, leaves [L, 2, ...].
            keep: what is kept of the stations and of the moves of each layer; None keeps nothing.
        """
        layers = self.layers

        def body(layer: Layer, place: Place, carry: Any, args: Any) -> tuple[Any, Any]:
            x, buffers = carry
            number, interventions = args
            passed = layer(
                x,
                lambda aggregate, h: mixer.combine(aggregate, h, place, number, buffers),
                Interventions() if interventions is None else interventions,
                hold=mixer.hold,
            )
            kept = None if keep is None else (keep(passed.stations), keep(passed.moves))
            return (passed.stations[1], passed.extra), kept

        per_layer = layers.split((np.arange(self.depth, dtype=np.int32), edits))
        (x, buffers), kept = layers.scan(body, (x, mixer.buffers(x)), per_layer, remat=self.remat)
        return Passed(x, None if keep is None or not self.depth else layers.join(kept), buffers)

    def contexts(self, tokens: Int[Array, " T"], segments: Int[Array, " T"] | None = None) -> Float[Array, "T D"]:
        """The context vectors of a path, and nothing else of its walk."""
        documents = documents_of(segments, len(tokens))
        x = self.passed(self.embedded(tokens, documents), Mixer(self.layers, documents)).x
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
        """`walk` of checked arguments, as part of another program; the recorded matrices are in a tuple."""
        documents = documents_of(segments, len(tokens))
        mixer = Mixer(self.layers, documents, hold=hold, matrices=matrices, functions=functions, every=every)
        edits = edits or Interventions()
        x = edits.apply(self.embedded(tokens, documents, vectors), 0)
        by_layer = jax.tree.map(lambda a: a[1:].reshape(self.depth, 2, *a.shape[1:]), edits)
        passed = self.passed(x, mixer, by_layer, keep=lambda pair: pair)
        nothing = jnp.zeros((0, *x.shape), x.dtype)
        later, moves = (nothing, nothing) if passed.kept is None else passed.kept
        stations = jnp.concatenate([x[None], later.reshape(-1, *x.shape)])
        context = each_position(self.context, hold)(passed.x)
        missing = self.missing(tokens, documents)[:, None]
        stations, context, moves = (
            jnp.where(missing, jnp.nan, a) for a in (stations, context, moves.reshape(-1, *x.shape))
        )
        return Walk(stations, context, mixer.recorded(passed.buffers), moves)


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
    """`nudge` and `patch` as interventions. Raises ValueError for wrong shapes."""
    S = model.stations
    where, by = (None, None) if patch is None else patch
    check_shape("nudge", nudge, (S, length, model.width))
    check_shape("patch[0]", where, (S, length))
    check_shape("patch[1]", by, (S, length, model.width))
    return Interventions(nudge, where, by)


def check_mixing(model: Transformer, length: int, mixing: Mapping[int, Mixing], record: Sequence[int]) -> None:
    """Raises ValueError for layers that do not exist, and for matrices of another size."""
    for what, layers in (("mixing", mixing), ("record_mixing", record)):
        if any(not 0 <= layer < model.depth for layer in layers):
            raise ValueError(f"{what}: expected layers from 0 to {model.depth - 1}, got {sorted(layers)}.")
    for number, A in mixing.items():
        if not callable(A):
            x = jax.ShapeDtypeStruct((length, model.width), model.embed.table.dtype)
            expected = jax.eval_shape(model.layers[number].aggregate.mixing, x)
            check_shape(f"mixing[{number}]", A, expected.shape)


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
    """The encoding walk of a path: stations [S, T, D] and contexts [T, D]. Arguments are those of
    `Transformer.walk`."""
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
    """The context vector c_T [D] that the whole path is folded into: that of the last position.

    Raises ValueError for tokens that are no path of the model.
    """
    path = prepare(model, tokens, segments)
    return _context_vector(model, path.tokens, path.segments, path.count)


@jax.jit
def _context_vector(model: Transformer, tokens: Array, segments: Array | None, count: Array) -> Array:
    return model.contexts(tokens, segments)[count - 1]
