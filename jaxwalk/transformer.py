"""Layers composed between an embedding and an unembedding; the walk of every position through them.

This is the only place that composes. A model is a pytree and everything about it is a pure function of
(model, tokens): what happens inside is returned as a `Walk`, what is changed inside is an argument.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxwalk import aggregates
from jaxwalk.aggregates._contract import Aggregate, runs_and_positions
from jaxwalk.config import AggregateConfig, MLPConfig, ModelConfig, Placement
from jaxwalk.filters import (
    MLP,
    Embed,
    GatedMLP,
    Key,
    LayerNorm,
    LearnedPositions,
    Linear,
    Norm,
    RMSNorm,
    SinusoidalPositions,
    Unembed,
    module,
    stream,
)

Filter = MLP | GatedMLP
Segments = Int[Array, " T"] | Int[np.ndarray, " T"]
Index = int | Int[Array, ""] | Int[np.ndarray, ""] | np.integer
Tokens = Int[Array, " T"] | Int[np.ndarray, " T"] | Sequence[int]
Mixing = Float[Array, "G T T"] | Callable[[Float[Array, "G T T"]], Float[Array, "G T T"]]
"""A mixing matrix to use instead of a layer's own, or a function that makes one of it."""
Patch = tuple[Bool[Array, "S T"] | Bool[np.ndarray, "S T"], Float[Array, "S T D"]]
"""Where stations are replaced, and by what."""


class Walk(NamedTuple):
    """What one path does inside a model: the encoding walk of every position, in parallel.

    stations: [S, T, D], after the embedding, then after each aggregate step and each filter step; S = 2L+1.
        `stations[0::2]` are the embedding and the outputs of the layers. All before the final norm.
    context: [T, D], the context vectors: the final norm of the last station.
    mixing: {layer: A [G, T, T]} of the layers that were asked for.
    moves: [S-1, T, D], what each step adds to the station before it (post-norm: before the norm of the sum).
    """

    stations: Float[Array, "S T D"]
    context: Float[Array, "T D"]
    mixing: dict[int, Float[Array, "G T T"]]
    moves: Float[Array, "S-1 T D"]


class _Edits(NamedTuple):
    """What is done to stations on arrival, each with stations as its first axis: replaced where said, then nudged."""

    nudge: Array | None = None
    where: Array | None = None
    by: Array | None = None

    def apply(self, x: Float[Array, "T D"], station: int) -> Float[Array, "T D"]:
        if self.where is not None and self.by is not None:
            x = jnp.where(self.where[station][:, None], self.by[station], x)
        return x if self.nudge is None else x + self.nudge[station]


_UNEDITED = _Edits()


def _each(filter: Callable[..., Array], hold: bool) -> Callable[[Array], Array]:
    """A filter lifted to all positions, [T, D] -> [T, E]."""
    return jax.vmap(functools.partial(filter, hold=hold))


@module
class Layer(nnx.Module):
    """An aggregate step, then a filter step, each added to the residual stream.

    pre: x + aggregate(norm(x)), then x + filter(norm(x)); post: norm(x + aggregate(x)), then norm(x + filter(x))
    (the stations are after the norm); parallel: x + aggregate(norm(x)) + filter(norm(x)), both from the same x
    (the first station has the aggregate's part only); res_post: x + norm(aggregate(x)), then x + norm(filter(x)) (Liu
    et al., arXiv 2111.09883; OLMo 2); sandwich: x + out_norm(aggregate(norm(x))), then the filter likewise (Ding et
    al., arXiv 2105.13290; Gemma 2). Only a sandwich has the norms `_out_norm`. Without a filter the second station
    repeats the first.
    """

    aggregate_norm: Norm = nnx.data()
    aggregate: Aggregate = nnx.data()
    filter_norm: Norm | None = nnx.data()
    filter: Filter | None = nnx.data()
    placement: Placement = "pre"
    aggregate_out_norm: Norm | None = nnx.data(default=None)
    filter_out_norm: Norm | None = nnx.data(default=None)

    def __call__(
        self,
        x: Float[Array, "T D"],
        aggregate: Callable[[Array], Array],
        edits: _Edits = _UNEDITED,
        hold: bool = False,
    ) -> tuple[Float[Array, "2 T D"], Float[Array, "2 T D"]]:
        """Both stations of this layer, and both moves, what its steps add.

        `aggregate` is what combines the positions: `self.aggregate` or its stand-in.
        """
        first = self.added(aggregate(self.source(x, self.aggregate_norm, hold)), *self.aggregate_norms, hold)
        after_aggregate = edits.apply(self._arrive(x + first, self.aggregate_norm, hold), 0)
        second = self.filtered(self.read_by_filter(x, after_aggregate), hold)
        after_filter = after_aggregate
        if self.filter_norm is not None:
            after_filter = self._arrive(after_aggregate + second, self.filter_norm, hold)
        after_filter = edits.apply(after_filter, 1)
        return jnp.stack([after_aggregate, after_filter]), jnp.stack([first, second])

    def read_by_filter(self, x: Float[Array, "T D"], after_aggregate: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Of the stations before and after the aggregate step, the one that the filter step reads."""
        return x if self.placement == "parallel" else after_aggregate

    def filtered(self, x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        """What the filter step adds where the stream is x, position by position; zeros without a filter."""
        if self.filter is None or self.filter_norm is None:
            return jnp.zeros_like(x)
        y = _each(self.filter, hold)(self.source(x, self.filter_norm, hold))
        return self.added(y, *self.filter_norms, hold)

    def source(self, x: Float[Array, "T D"], norm: Norm, hold: bool = False) -> Float[Array, "T D"]:
        """What a step with this norm is given where the stream is x: its norm, unless the norm is placed after it."""
        return x if self.placement in ("post", "res_post") else _each(norm, hold)(x)

    def added(
        self, y: Float[Array, "T D"], norm: Norm | None, out_norm: Norm | None, hold: bool = False
    ) -> Float[Array, "T D"]:
        """What a step with these norms adds to the stream where it has made y: y, or y normed where a norm is there."""
        after = {"res_post": norm, "sandwich": out_norm}.get(self.placement)
        return y if after is None else _each(after, hold)(y)

    @property
    def aggregate_norms(self) -> tuple[Norm, Norm | None]:
        """Both norms of the aggregate step."""
        return self.aggregate_norm, self.aggregate_out_norm

    @property
    def filter_norms(self) -> tuple[Norm | None, Norm | None]:
        """Both norms of the filter step."""
        return self.filter_norm, self.filter_out_norm

    def _arrive(self, x: Array, norm: Norm, hold: bool) -> Array:
        return _each(norm, hold)(x) if self.placement == "post" else x


class State(NamedTuple):
    """What decoding carries from token to token: each layer's state, the position, and how many there may be."""

    layers: tuple[Any, ...]
    position: Int[Array, ""]
    length: Int[Array, ""]


@module
class Transformer(nnx.Module):
    """Token vectors (and positions) -> layers -> final norm -> logits. Written for one path; batch it with vmap."""

    embed: Embed = nnx.data()
    positions: LearnedPositions | SinusoidalPositions | None = nnx.data()
    layers: tuple[Layer, ...] = nnx.data()
    norm: Norm | None = nnx.data()
    unembed: Unembed = nnx.data()
    max_length: int
    scan: bool = False
    remat: bool = False

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
    def token_vectors(self) -> Float[Array, "V D"]:
        """e_v, one row a token: the embedding matrix, times its scale, each row normed where there is a norm of it."""
        return jax.vmap(self.embed.vector)(self.embed.table)

    @property
    def output_vectors(self) -> Float[Array, "V D"]:
        """U, one row a token; the embedding matrix (neither scaled nor normed) where tied."""
        return self.embed.table if self.unembed.weight is None else self.unembed.weight

    def context(self, station: Float[Array, " D"], *, hold: bool = False) -> Float[Array, " D"]:
        """The final norm: from the last station to the context vector (a logit lens takes other stations)."""
        return station if self.norm is None else self.norm(station, hold=hold)

    def logits(self, context: Float[Array, " D"]) -> Float[Array, " V"]:
        """c . u_v + b_v for each v, soft-capped where the model caps its logits."""
        return self.unembed(context, self.embed.table)

    def with_layer(self, number: int, **fields: Any) -> "Transformer":
        """This model with other `fields` (aggregate, filter, a norm, placement) in layer `number`; all else is shared.

        Raises ValueError for a layer that does not exist, TypeError for a field that a layer does not have.
        """
        if not 0 <= number < self.depth:
            raise ValueError(f"layer: expected one from 0 to {self.depth - 1}, got {number}.")
        layers = list(self.layers)
        layers[number] = dataclasses.replace(layers[number], **fields)
        return dataclasses.replace(self, layers=tuple(layers))

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
        """The encoding walk of a path.

        tokens: [T]. Ids that are out of range raise; under jit they give NaN.
        segments: [T], the document each position is in; 0 is padding, positions restart at each border, and
            nothing crosses one.
        nudge: [S, T, D], added at each station. Its gradient at zero is that of every station at once; a steering
            vector is a nudge.
        patch: (where [S, T], by [S, T, D]), stations to replace, and what by: those of another path's walk, say. A
            nudge comes after it.
        vectors: [T, D], token vectors to use instead of the model's own.
        mixing: {layer: A}, mixing matrices to use instead of the layers' own, or functions that make them of these.
        record_mixing: the layers whose mixing matrices are returned.
        hold: hold all data-dependent coefficients (mixing, norms, gates) at their values, which leaves the walk
            affine in the token vectors.
        """
        tokens = check_tokens(self, tokens)
        T, S = len(tokens), 2 * self.depth + 1
        segments = None if segments is None else jnp.asarray(segments)
        check_shape("segments", segments, (T,))
        where, by = (None, None) if patch is None else (jnp.asarray(patch[0]), jnp.asarray(patch[1]))
        check_shape("nudge", nudge, (S, T, self.width))
        check_shape("patch[0]", where, (S, T))
        check_shape("patch[1]", by, (S, T, self.width))
        check_shape("vectors", vectors, (T, self.width))
        edits = _Edits(nudge, where, by)
        overrides = dict(mixing or {})
        for number, given in overrides.items():
            if not callable(given):
                check_shape(f"mixing[{number}]", given, (None, T, T))
        for what, asked in (("mixing", overrides), ("record_mixing", record_mixing)):
            if any(not 0 <= layer < self.depth for layer in asked):
                raise ValueError(f"{what}: expected layers from 0 to {self.depth - 1}, got {sorted(asked)}.")
        recorded: dict[int, Array] = {}

        def run(layer: Layer, x: Array, edits: _Edits, number: int | None = None) -> tuple[Array, Array]:
            def aggregate(h: Array) -> Array:
                override = None if number is None else overrides.get(number)
                if override is not None and not callable(override):
                    A = override
                elif override is not None or hold or number in record_mixing:
                    A = layer.aggregate.mixing(h, segments=segments)
                    if override is not None:
                        own, A = A, override(A)
                        check_shape(f"mixing[{number}] as a function", A, own.shape)
                    A = lax.stop_gradient(A) if hold else A
                else:
                    return layer.aggregate(h, segments)
                if number is not None and number in record_mixing:
                    recorded[number] = A
                return layer.aggregate.apply_mixing(h, A, segments, hold=hold)

            return layer(x, aggregate, edits, hold)

        x = jax.vmap(self.embed)(tokens) if vectors is None else vectors
        if self.positions is not None:
            x = x + self.position_vectors(T, segments).astype(x.dtype)
        x = edits.apply(x, 0)
        stations, moves = [x[None]], [jnp.zeros_like(x, shape=(0, *x.shape))]
        if self.scan and self.depth and not overrides and not record_mixing:
            passed, added = self._scan(run, x, edits)
            stations.append(passed)
            moves.append(added)
        else:
            for number, layer in enumerate(self.layers):
                step: Callable[..., tuple[Array, Array]] = functools.partial(run, number=number)
                if self.remat and number not in record_mixing:
                    step = jax.checkpoint(step)
                pair = slice(2 * number + 1, 2 * number + 3)
                passed, added = step(layer, stations[-1][-1], jax.tree.map(lambda a, pair=pair: a[pair], edits))
                stations.append(passed)
                moves.append(added)
        walked = jnp.concatenate(stations)
        context = jax.vmap(functools.partial(self.context, hold=hold))(walked[-1])
        return Walk(walked, context, recorded, jnp.concatenate(moves))

    def state_size(self, length: int) -> int:
        """How many numbers decoding carries from token to token after `length` tokens, in all layers."""
        return sum(layer.aggregate.state_size(length) for layer in self.layers)

    def position_vectors(self, length: int, segments: Segments | None = None) -> Float[Array, "T D"]:
        """What is added to the token vectors of a path of `length` tokens; zeros where a model has none."""
        if self.positions is None:
            return jnp.zeros_like(self.embed.table, shape=(length, self.width))
        if isinstance(self.positions, LearnedPositions) and segments is None:
            rows = self.positions.max_length
            if length > rows:
                raise ValueError(
                    f"positions: expected at most {rows} tokens, the rows of the table, got {length}. A longer path "
                    "needs a longer table, or a model without one (RoPE, ALiBi, sinusoidal)."
                )
        return jax.vmap(self.positions)(
            runs_and_positions(None if segments is None else jnp.asarray(segments), length)[1]
        )

    def _scan(self, run: Callable[..., tuple[Array, Array]], x: Array, edits: _Edits) -> tuple[Array, Array]:
        """The stations after the embedding and the moves, [S-1, T, D] each, compiled for one period of layers."""
        period = layer_period(self.layers)
        stack = tuple(jax.tree.map(lambda *a: jnp.stack(a), *self.layers[i::period]) for i in range(period))
        by_layer = jax.tree.map(lambda a: a[1:].reshape(-1, period, 2, *a.shape[1:]), edits)

        def body(x: Array, args: tuple[tuple[Layer, ...], _Edits]) -> tuple[Array, tuple[Array, Array]]:
            layers, edits = args
            walked = []
            for i, layer in enumerate(layers):
                walked.append(run(layer, x, jax.tree.map(lambda a, i=i: a[i], edits)))
                x = walked[-1][0][-1]
            stations, moves = zip(*walked, strict=True)
            return x, (jnp.concatenate(stations), jnp.concatenate(moves))

        stations, moves = lax.scan(jax.checkpoint(body) if self.remat else body, x, (stack, by_layer))[1]
        return stations.reshape(-1, *x.shape), moves.reshape(-1, *x.shape)


def check_shape(what: str, array: Array | None, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError for a wrong shape, which could broadcast, silently. None stands for any size."""
    if array is None:
        return
    shape = jnp.shape(array)
    if len(shape) != len(expected) or any(e not in (None, n) for n, e in zip(shape, expected, strict=True)):
        readable = str(expected).replace("None", "any")
        raise ValueError(f"{what}: expected shape {readable} for this path, got {shape}.")


def layer_period(layers: Sequence[Layer]) -> int:
    """The shortest period of layers that are alike in structure and shapes; a scan stacks one period with the next."""
    kinds = [(jax.tree.structure(layer), tuple((a.shape, a.dtype) for a in jax.tree.leaves(layer))) for layer in layers]
    n = len(kinds)
    return next((p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p)), max(n, 1))


def check_tokens(model: Transformer, tokens: Tokens, longest: int | None = None) -> Int[Array, " T"]:
    """`tokens` as an array. Raises ValueError if they cannot be a path of this model, of at most `longest` tokens.

    By default `longest` is the model's max_length.

    Under jit nothing can be raised about ids: there an id out of range becomes a NaN token vector.
    """
    given = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if given.ndim != 1 or not given.size:
        raise ValueError(
            f"tokens: expected one path, integers [T] with T >= 1, got shape {given.shape}. "
            "Batches are made with jax.vmap; an empty prompt has no next-step law."
        )
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(f"tokens: expected integer ids, got {given.dtype}. Encode text with the model's vocabulary.")
    longest = model.max_length if longest is None else longest
    if len(given) > longest:
        raise ValueError(
            f"tokens: expected at most {longest} tokens (max_length = {model.max_length}), got {len(given)}. "
            "Cut the path, or, for a model with no table of positions, dataclasses.replace(model, max_length=...)."
        )
    if not isinstance(given, jax.core.Tracer):
        ids = np.asarray(given)
        wrong = ids[(ids < 0) | (ids >= model.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"tokens: expected ids from 0 to {model.vocab_size - 1}, got {', '.join(map(str, wrong[:5]))}"
                f"{', ...' if wrong.size > 5 else ''}. Encode with the vocabulary that the model was trained with."
            )
    return jnp.asarray(given)


def check_index(what: str, index: Index, size: int, *, from_end: bool = True) -> Int[Array, ""]:
    """`index` as one from 0, negative ones counted from the end if they may be. Raises ValueError where there is none.

    Under jit nothing can be raised: there it is -1, which `row` and `embed` turn into NaN.
    """
    least = -size if from_end else 0
    if not isinstance(index, jax.core.Tracer) and not least <= index < size:
        raise ValueError(f"{what}: expected one from {least} to {size - 1}, got {index}.")
    index = jnp.asarray(index)
    return jnp.where((index >= least) & (index < size), index % size, -1)


def init(config: ModelConfig, key: Key) -> Transformer:
    """A model with fresh float32 parameters. The same config and key give the same model.

    Raises ConfigError for choices that do not fit each other, such as heads that do not divide the width.
    """

    def norm() -> Norm:
        if config.norm == "rms_norm":
            return RMSNorm.init(config.width, eps=config.norm_eps, unit_offset=config.norm_unit_offset)
        return LayerNorm.init(config.width, bias=config.norm_bias, scale=config.norm_scale, eps=config.norm_eps)

    positions: LearnedPositions | SinusoidalPositions | None = None
    if config.positions == "learned":
        positions = LearnedPositions.init(
            config.max_length, config.width, offset=config.position_offset, key=stream(key, "positions")
        )
    elif config.positions == "sinusoidal":
        positions = SinusoidalPositions(config.width)

    layers = []
    sandwich = config.placement == "sandwich"
    for number, (aggregate, filter) in enumerate(resolved_layers(config)):
        key_aggregate, key_filter = jax.random.split(jax.random.fold_in(stream(key, "layers"), number))
        layers.append(
            Layer(
                aggregate_norm=norm(),
                aggregate=aggregate.init(
                    width=config.width,
                    max_length=config.max_length,
                    layer=number,
                    depth=config.depth,
                    key=key_aggregate,
                ),
                filter_norm=None if filter is None else norm(),
                filter=None if filter is None else _init_filter(filter, config, key_filter),
                placement=config.placement,
                aggregate_out_norm=norm() if sandwich else None,
                filter_out_norm=norm() if sandwich and filter is not None else None,
            )
        )
    return Transformer(
        embed=Embed.init(
            config.vocab_size,
            config.width,
            scale=config.embed_scale,
            norm=norm() if config.embed_norm else None,
            key=stream(key, "embed"),
        ),
        positions=positions,
        layers=tuple(layers),
        norm=None if config.placement == "post" else norm(),
        unembed=Unembed.init(
            config.vocab_size,
            config.width,
            tied=config.tied,
            bias=config.unembed_bias,
            softcap=config.logit_softcap,
            key=stream(key, "unembed"),
        ),
        max_length=config.max_length,
        scan=config.depth > 12 if config.scan is None else config.scan,
        remat=config.remat,
    )


def resolved_layers(config: ModelConfig) -> list[tuple[AggregateConfig, MLPConfig | None]]:
    """The aggregate and the filter of each layer: names looked up, tuples cycled."""

    def cycled(choice: Any) -> list[Any]:
        choices = choice if isinstance(choice, tuple) else (choice,)
        return [choices[i % len(choices)] for i in range(config.depth)]

    named = [aggregates.config(a) if isinstance(a, str) else a for a in cycled(config.aggregate)]
    return list(zip(named, cycled(config.filter), strict=True))


def resolve(config: ModelConfig) -> ModelConfig:
    """`config` with every default written out, so that later defaults cannot alter this model."""
    layers = resolved_layers(config)
    return dataclasses.replace(
        config,
        aggregate=tuple(a for a, _ in layers) or config.aggregate,
        filter=tuple(f for _, f in layers) or config.filter,
        scan=config.depth > 12 if config.scan is None else config.scan,
    )


def _init_filter(config: MLPConfig, model: ModelConfig, key: Key) -> Filter:
    width, hidden = model.width, config.hidden or 4 * model.width
    key_gate, key_up, key_down = jax.random.split(key, 3)
    up = Linear.init(width, hidden, bias=config.bias, key=key_up)
    down = Linear.init(hidden, width, bias=config.bias, gain=1 / math.sqrt(2 * model.depth), key=key_down)
    if not config.gated:
        return MLP(up, down, config.activation)
    return GatedMLP(Linear.init(width, hidden, bias=config.bias, key=key_gate), up, down, config.activation)


def astype(model: Transformer, dtype: Any) -> Transformer:
    """`model` with parameters, and so computation, in `dtype`; reductions stay in at least float32."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, model)


def plain(model: Transformer) -> Transformer:
    """The same function without fused kernels: every derivative exists, forward mode included."""
    layers = tuple(dataclasses.replace(layer, aggregate=layer.aggregate.plain()) for layer in model.layers)
    return dataclasses.replace(model, layers=layers)


def encoding_walk(model: Transformer, tokens: Tokens, **options: Any) -> Walk:
    """The encoding walk of a path: stations [S, T, D] and context [T, D]. Options are those of `Transformer.walk`."""
    return model.walk(tokens, **options)


def context_vector(model: Transformer, tokens: Tokens, **options: Any) -> Float[Array, " D"]:
    """The context vector c_T [D] that the whole path is folded into: the last position's."""
    return model.walk(tokens, **options).context[-1]


def init_state(model: Transformer, length: int) -> State:
    """The state before the first of at most `length` tokens. Raises ValueError beyond the model's max_length."""
    _check_length(model, length)
    return State(tuple(layer.aggregate.init_state(length) for layer in model.layers), jnp.array(0), jnp.array(length))


def _check_length(model: Transformer, length: int, prompt: int = 0) -> None:
    if not max(prompt, 1) <= length <= model.max_length:
        raise ValueError(
            f"length: expected from {max(prompt, 1)} (the prompt) to max_length = {model.max_length}, got {length}."
        )


def prefill(model: Transformer, tokens: Tokens, length: int) -> tuple[State, Float[Array, " V"]]:
    """The state after a prompt [P], computed in parallel, and the logits [V] of what comes next.

    `length` is the most tokens, prompt included, that the state will see. Raises ValueError for a prompt that is no
    path of the model, and a length that is not from the prompt's to max_length.
    """
    tokens = check_tokens(model, tokens)
    _check_length(model, length, len(tokens))
    x = jax.vmap(model.embed)(tokens)
    if model.positions is not None:
        x = x + model.position_vectors(len(tokens)).astype(x.dtype)
    states = []
    for layer in model.layers:

        def aggregate(h: Array, layer: Layer = layer) -> Array:
            y, state = layer.aggregate.prefill(h, length)
            states.append(state)
            return y

        x = layer(x, aggregate)[0][-1]
    return State(tuple(states), jnp.array(len(tokens)), jnp.array(length)), model.logits(model.context(x[-1]))


def step(model: Transformer, state: State, token: Int[Array, ""] | int) -> tuple[State, Float[Array, " V"]]:
    """Take one token; the new state, and the logits [V] of what comes next.

    Raises ValueError beyond the state's length, and for an id that is out of range; under jit both give NaN.
    """
    if not isinstance(state.position, jax.core.Tracer) and state.position >= state.length:
        raise ValueError(
            f"state: expected room for another token, got one that has taken all {int(state.length)} it was made for. "
            "Make it with a greater length, up to the model's max_length."
        )
    token = check_tokens(model, jnp.asarray(token)[None])[0]
    x = model.embed(token)
    if model.positions is not None:
        x = x + model.positions(state.position).astype(x.dtype)
    x = x[None]
    states = []
    for layer, before in zip(model.layers, state.layers, strict=True):

        def aggregate(h: Array, layer: Layer = layer, before: Any = before) -> Array:
            after, y = layer.aggregate.step(before, h[0])
            states.append(after)
            return y[None]

        x = layer(x, aggregate)[0][-1]
    return State(tuple(states), state.position + 1, state.length), model.logits(model.context(x[0]))
