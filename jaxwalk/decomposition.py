"""Exact decompositions of a context vector, or of any station: parts that sum to the whole, and prove it.

Every nonlinearity here is a data-dependent coefficient times a linear map: mixing weights times values, 1/std times a
centred vector, a gate times its argument. With the coefficients held at the values they took, the walk is affine in
the token vectors, and what it adds up is known term by term ("detached Jacobian": Golden, arXiv 2505.24293). The
biases' part is a derivative of its own, never the remainder, so that the sum is a check: each result carries its
relative error, and beyond rounding it raises.

The token cut is total: what comes from a token by all ways. The cuts by step, head and neuron are direct: what that
piece itself adds, carried to the end by the residual stream and the held norms alone. All functions take one path
and are batched with `jax.vmap`, under which, as under jit, nothing raises: look at `error`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxwalk.filters import MLP, GatedMLP, row, softcap_gate, wide
from jaxwalk.transformer import Index, Layer, Segments, Tokens, Transformer, Walk, check_index, check_tokens, plain

ADDITIVE = frozenset({"bias"})
"""Names of the parameters that are added to the stream or to what goes into it: all other coefficients multiply."""
TOLERANCE = {jnp.dtype("float32"): 1e-5, jnp.dtype("float64"): 1e-12}
"""The largest relative error of a decomposition that is rounding."""
PASSED = 1 << 20
"""How many numbers the cotangents of the backward passes that run together may have, of at most 16 passes."""


class DecompositionError(ArithmeticError):
    """The parts do not sum to the whole: some coefficient is not held, or some additive part is not known."""


class Decomposition(NamedTuple):
    """A target vector split by source token: by_token.sum(0) + by_position.sum(0) + bias = whole.

    by_token: [T, D], of each token vector, through everything. by_position: [T, D], likewise of each position's
    vector (zeros in a model without a table). bias: [D], of all biases, computed by a derivative of its own.
    whole: [D], the target itself. error: |sum - whole| / |whole|. Of a target that is read along n directions, all of
    these have n in place of D, and the error is the largest |sum - whole| / (|target| |direction|).
    """

    by_token: Float[Array, "T D"]
    by_position: Float[Array, "T D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class StepDecomposition(NamedTuple):
    """A target vector split by the steps of the walk: token + position + by_step.sum(0) + by_step_bias.sum(0) + bias.

    token, position: [D], of the position's own token and position vector, carried directly. by_step: [2L, D], what
    each step (2l the aggregate, 2l+1 the filter of layer l) makes of the stream. by_step_bias: [2L, D], what it adds
    by the biases within it. bias: [D], of the norms on the way. whole, error: as in `Decomposition`.
    """

    token: Float[Array, " D"]
    position: Float[Array, " D"]
    by_step: Float[Array, "2L D"]
    by_step_bias: Float[Array, "2L D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class StepTokenDecomposition(NamedTuple):
    """What each step adds, split by the source token that its input came from, through all steps before it.

    token, position, bias: [D], what is carried directly, as in `StepDecomposition`. by_token, by_position:
    [2L, T, D]. by_step_bias: [2L, D], of all biases up to and within the step. Summed over steps this is the token
    cut; summed over tokens, positions and biases the step cut. whole, error: as in `Decomposition`.
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
    """What one layer's aggregate adds, split by head (or channel) and source position: by_head.sum((0, 1)) + bias.

    by_head: [G, T, D], A_tj times the value at j, read out and carried. bias: [D], of the readout and of a norm of it;
    the bias of the values travels with the values. whole: [D], the aggregate's own move, carried. error: as in
    `Decomposition`.
    """

    by_head: Float[Array, "G T D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class NeuronDecomposition(NamedTuple):
    """What one layer's filter adds, split by neuron: by_neuron.sum(0) + bias = whole, all carried.

    by_neuron: [E, D], each neuron's activation times its row of `down`. bias: [D], of `down` and of a norm
    of its output. whole: [D], the filter's own move, carried. error: as in `Decomposition`.
    """

    by_neuron: Float[Array, "E D"]
    bias: Float[Array, " D"]
    whole: Float[Array, " D"]
    error: Float[Array, ""]


class Readout(NamedTuple):
    """A scalar as a function of the context vector c that is linear in it: direction . c + constant.

    direction: [D]. constant: [], which no part of the context has a share in. Parts of a decomposition of the
    context dotted with `direction` sum, with the constant, to the scalar.
    """

    direction: Float[Array, " D"]
    constant: Float[Array, ""]


def decompose(
    model: Transformer,
    tokens: Tokens,
    at: Index = -1,
    *,
    station: int | None = None,
    segments: Segments | None = None,
    along: Float[Array, "n D"] | None = None,
) -> Decomposition:
    """The context vector of position `at`, or its `station` (0 to S-1), split exactly by source token.

    along: directions that the parts are wanted along, as products with them; by default the parts are vectors. The
    parts take D backward passes, in bounded memory, those along n directions n.

    Raises ValueError for a position or station that does not exist or a dtype below float32, DecompositionError if the
    parts do not sum to the whole.
    """
    return _asked(_by_token, model, tokens, at, station, segments, along=along)


def decompose_steps(
    model: Transformer, tokens: Tokens, at: Index = -1, *, station: int | None = None, segments: Segments | None = None
) -> StepDecomposition:
    """The context vector of position `at`, or its `station`, split exactly by the steps that added to it.

    Steps after `station` have zero parts. Raises as `decompose` does.
    """
    return _asked(_by_step, model, tokens, at, station, segments)


def decompose_steps_by_token(
    model: Transformer, tokens: Tokens, at: Index = -1, *, station: int | None = None, segments: Segments | None = None
) -> StepTokenDecomposition:
    """Both cuts at once: each step's part of the target, split by source token. 2L x D backward passes.

    Raises as `decompose` does.
    """
    return _asked(_by_step_and_token, model, tokens, at, station, segments)


def decompose_heads(
    model: Transformer,
    tokens: Tokens,
    layer: int,
    at: Index = -1,
    *,
    station: int | None = None,
    segments: Segments | None = None,
) -> HeadDecomposition:
    """What the aggregate of `layer` adds to the target, split exactly by head and source position.

    Raises ValueError for a layer that does not exist or lies after `station`, and as `decompose` does.
    """
    _check_layer(model, layer, station, 2 * layer + 1)
    return _asked(_by_head, model, tokens, at, station, segments, layer)


def decompose_neurons(
    model: Transformer,
    tokens: Tokens,
    layer: int,
    at: Index = -1,
    *,
    station: int | None = None,
    segments: Segments | None = None,
) -> NeuronDecomposition:
    """What the filter of `layer` adds to the target, split exactly by neuron.

    Raises ValueError for a layer that does not exist, has no MLP or lies after `station`, and as `decompose` does.
    """
    _check_layer(model, layer, station, 2 * layer + 2)
    if not isinstance(model.layers[layer].filter, MLP | GatedMLP):
        with_neurons = [n for n, one in enumerate(model.layers) if isinstance(one.filter, MLP | GatedMLP)]
        raise ValueError(f"layer: expected one whose filter has neurons, of {with_neurons}, got {layer}.")
    return _asked(_by_neuron, model, tokens, at, station, segments, layer)


def logit_readout(model: Transformer, token: Index, context: Float[Array, " D"] | None = None) -> Readout:
    """The logit of `token`: u . c + b. Where the model soft-caps its logits, g (u . c + b) with g held.

    context: what g is held at, tanh(a / cap) / (a / cap) for the logit a before the cap. Raises ValueError where it is
    needed and not given, and for an id that is out of range.
    """
    token = check_index("token", token, model.vocab_size, from_end=False)
    U, bias = model.output_vectors, model.unembed.bias
    direction, constant = row(U, token), jnp.zeros((), U.dtype) if bias is None else bias[token]
    if model.unembed.softcap is None:
        return Readout(direction, constant)
    if context is None:
        raise ValueError(
            f"context: expected a context vector, as this model soft-caps its logits at {model.unembed.softcap:g}, and "
            "how much depends on it; got None."
        )
    gate = softcap_gate(direction @ context + constant, model.unembed.softcap)
    return Readout(gate * direction, gate * constant)


def log_prob_readout(model: Transformer, context: Float[Array, " D"], token: Index) -> Readout:
    """log p(token) at the law p of this context, in nats: (u - E_p u) . c + (b - E_p b) - H(p), with p held.

    The constant holds the entropy -H(p), without which the parts would sum to the centred logit and no more. Where the
    model soft-caps its logits, each u and b is times its gate, as in `logit_readout`. Raises ValueError for an id that
    is out of range.
    """
    direction, constant = logit_readout(model, token, context)
    logits = model.logits(context)
    p, log_p = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0))
    if model.unembed.softcap is not None:
        p = p * softcap_gate(model.unembed.uncapped(context, model.embed.table), model.unembed.softcap)
    mean_bias = 0 if model.unembed.bias is None else p @ model.unembed.bias
    return Readout(direction - p @ model.output_vectors, constant - mean_bias - entropy)


# What is asked for.


def _asked(
    cut: Callable[..., Any],
    model: Transformer,
    tokens: Tokens,
    at: Index,
    station: int | None,
    segments: Segments | None,
    layer: int | None = None,
    along: Float[Array, "n D"] | None = None,
) -> Any:
    """The result of a cut, jitted, if it is one."""
    tokens = check_tokens(model, tokens)
    dtype = model.embed.table.dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"model: expected float32 or float64, got {dtype}. Use jw.astype(model, jnp.float32).")
    T, S = len(tokens), 2 * model.depth + 1
    at = check_index("at", at, T)
    if station is not None and not 0 <= station < S:
        raise ValueError(
            f"station: expected one from 0 to {S - 1} (0 the embedding, 2l+1 after aggregate l, 2l+2 after filter l), "
            f"got {station}."
        )
    segments = None if segments is None else jnp.asarray(segments)
    tokens = jnp.where(at < 0, -1, tokens)  # of a position that is not there everything is NaN
    with jax.default_matmul_precision("highest"):
        result = _run(cut, plain(model), tokens, segments, at, station, layer, along)
    if not isinstance(result.error, jax.core.Tracer) and not result.error <= TOLERANCE[dtype]:
        raise DecompositionError(
            f"the parts do not sum to the whole: expected a relative error of at most {TOLERANCE[dtype]:g}, got "
            f"{float(result.error):.2g}. A NaN is in the walk itself; else a module of the model has a coefficient "
            f"that `hold` does not hold, or an additive parameter with another name than {', '.join(ADDITIVE)}."
        )
    return result


def _check_layer(model: Transformer, layer: int, station: int | None, reached: int) -> None:
    if not 0 <= layer < model.depth:
        raise ValueError(f"layer: expected one from 0 to {model.depth - 1}, got {layer}.")
    if station is not None and station < reached:
        raise ValueError(
            f"station: expected one from {reached} on, where layer {layer} has added its part, got {station}."
        )


@functools.partial(jax.jit, static_argnames=("cut", "station", "layer"))
def _run(
    cut: Callable[..., Any],
    model: Transformer,
    tokens: Array,
    segments: Array | None,
    at: Array,
    station: int | None,
    layer: int | None,
    along: Array | None,
) -> Any:
    target = _Target(model, tokens, segments, at, station)
    return cut(target, *(given for given in (layer, along) if given is not None))


class _Target:
    """One position's context vector or station: the walk that leads to it, held, and what is carried to it."""

    def __init__(
        self, model: Transformer, tokens: Array, segments: Array | None, at: Array, station: int | None
    ) -> None:
        self.model, self.tokens, self.segments, self.at, self.station = model, tokens, segments, at, station
        self.vectors = jax.vmap(model.embed)(tokens)
        self.places = model.position_vectors(len(tokens), segments).astype(self.vectors.dtype)
        self.walk = model.walk(tokens, segments=segments)
        self.last = 2 * model.depth if station is None else station
        self.whole = self.of(self.walk)

    def of(self, walk: Walk) -> Float[Array, " D"]:
        """The target in a walk."""
        return walk.context[self.at] if self.station is None else walk.stations[self.station, self.at]

    def held(self, model: Transformer, vectors: Array) -> Walk:
        """The walk with its coefficients held."""
        return model.walk(self.tokens, vectors=vectors, segments=self.segments, hold=True)

    def norms(self) -> dict[int, tuple[Any, Array]]:
        """The norms that the stream itself passes, and what each is given at the position: {station: (norm, x)}.

        The final norm, which comes after the last station, is at S.
        """
        passed = {}
        for number, layer in enumerate(self.model.layers):
            for step, norm in ((2 * number, layer.aggregate_norm), (2 * number + 1, layer.filter_norm)):
                if layer.placement == "post" and norm is not None and step < self.last:
                    passed[step + 1] = (norm, self.walk.stations[step, self.at] + self.walk.moves[step, self.at])
        if self.station is None and self.model.norm is not None:
            passed[2 * self.model.depth + 1] = (self.model.norm, self.walk.stations[-1, self.at])
        return passed

    def carry(self, arriving: int, parts: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """What is added to the stream on the way to station `arriving`, carried to the target by the norms after it."""
        flat = parts.reshape(-1, parts.shape[-1])
        for station, (norm, x) in self.norms().items():
            if station >= arriving:
                derivative = functools.partial(_derivative, functools.partial(norm, hold=True), x)
                flat = jax.vmap(derivative)(flat)
        return flat.reshape(parts.shape)

    def carry_move(self, step: int, parts: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """Parts of what a step adds, carried to the target; 0 for a step after it."""
        return self.carry(step + 1, parts) if step < self.last else jnp.zeros_like(parts)

    def norm_biases(self) -> Float[Array, " D"]:
        """The biases of the norms that the stream passes, carried to the target."""
        total = jnp.zeros_like(self.whole)
        for station, (norm, x) in self.norms().items():
            bias = _along_biases(lambda norm, x=x: norm(x, hold=True), norm)  # type: ignore[misc]
            total = total + self.carry(station + 1, bias)
        return total

    def moves(self, layer: Layer, number: int) -> tuple[tuple[Callable[..., Array], Array], ...]:
        """Both steps of a layer at the position, held, as functions of (layer, stream [T, D]), and that stream."""
        walked = self.walk.stations
        before = walked[2 * number], layer.read_by_filter(*walked[2 * number : 2 * number + 2])

        def aggregate(layer: Layer, x: Array) -> Array:
            h = layer.source(x, layer.aggregate_norm, hold=True)
            A = lax.stop_gradient(layer.aggregate.mixing(h, segments=self.segments))
            y = layer.aggregate.apply_mixing(h, A, self.segments, hold=True)[self.at]
            return layer.added(y[None], *layer.aggregate_norms, hold=True)[0]

        def filter(layer: Layer, x: Array) -> Array:
            return layer.filtered(x[self.at][None], hold=True)[0]

        return (aggregate, before[0]), (filter, before[1])


def _derivative(function: Callable[[Array], Array], x: Array, tangent: Array) -> Array:
    """Of function at x along `tangent`."""
    return jax.jvp(function, (x,), (tangent,))[1]


def _along_biases(function: Callable[[Any], Array], tree: Any) -> Array:
    """The part of function(tree) that is due to the additive parameters in `tree`: its derivative along them."""

    def additive(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf if getattr(path[-1], "name", None) in ADDITIVE else jnp.zeros_like(leaf)

    return jax.jvp(function, (tree,), (jax.tree_util.tree_map_with_path(additive, tree),))[1]


def _by_source(target: _Target, function: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The parts of function(vectors) [n], affine, due to each token's and each position's vector: [T, n] both."""
    out, pull = jax.vjp(function, target.vectors)

    def one(index: Array) -> tuple[Array, Array]:
        (slope,) = pull(jnp.zeros_like(out).at[index].set(1))
        return jnp.sum(slope * target.vectors, axis=-1), jnp.sum(slope * target.places, axis=-1)

    together = max(1, min(len(out), 16, PASSED // target.vectors.size))
    by_token, by_position = lax.map(one, jnp.arange(len(out)), batch_size=together)
    return by_token.T, by_position.T


def _error(whole: Array, parts: Array) -> Array:
    difference = jnp.linalg.norm((parts - whole).astype(wide(whole.dtype)))
    return difference / jnp.maximum(jnp.linalg.norm(whole), jnp.finfo(whole.dtype).tiny)


# The cuts.


def _by_token(target: _Target, along: Array | None = None) -> Decomposition:
    read = (lambda whole: whole) if along is None else (lambda whole: along @ whole)
    by_token, by_position = _by_source(target, lambda vectors: read(target.of(target.held(target.model, vectors))))
    bias = _along_biases(lambda model: read(target.of(target.held(model, target.vectors))), target.model)
    whole, total = read(target.whole), by_token.sum(0) + by_position.sum(0) + bias
    if along is None:
        error = _error(whole, total)
    else:  # a whole may be small where its parts cancel
        scale = jnp.linalg.norm(target.whole) * jnp.linalg.norm(along, axis=-1)
        error = jnp.max(jnp.abs(total - whole) / jnp.maximum(scale, jnp.finfo(whole.dtype).tiny))
    return Decomposition(by_token, by_position, bias, whole, error)


def _direct(target: _Target) -> tuple[Array, Array]:
    """The position's own token vector and position vector, carried."""
    return target.carry(0, target.vectors[target.at]), target.carry(0, target.places[target.at])


def _by_step(target: _Target) -> StepDecomposition:
    streams, biases = [], []
    for number, layer in enumerate(target.model.layers):
        for step, (move, x) in enumerate(target.moves(layer, number), start=2 * number):
            streams.append(target.carry_move(step, _derivative(functools.partial(move, layer), x, x)))
            biases.append(target.carry_move(step, _along_biases(functools.partial(move, x=x), layer)))
    none = jnp.zeros((0, len(target.whole)), target.whole.dtype)
    by_step = jnp.stack(streams) if streams else none
    by_step_bias = jnp.stack(biases) if biases else none
    token, position = _direct(target)
    bias = target.norm_biases()
    error = _error(target.whole, token + position + by_step.sum(0) + by_step_bias.sum(0) + bias)
    return StepDecomposition(token, position, by_step, by_step_bias, bias, target.whole, error)


def _by_step_and_token(target: _Target) -> StepTokenDecomposition:
    T, D = target.vectors.shape

    def carried(walk: Walk) -> Array:
        moves = [target.carry_move(step, walk.moves[step, target.at]) for step in range(len(walk.moves))]
        return jnp.stack(moves) if moves else jnp.zeros((0, D), target.vectors.dtype)

    steps = 2 * target.model.depth
    if steps:
        parts = _by_source(target, lambda vectors: carried(target.held(target.model, vectors)).reshape(-1))
    else:
        parts = (jnp.zeros((T, 0), target.vectors.dtype),) * 2
    by_token, by_position = (part.reshape(T, steps, D).swapaxes(0, 1) for part in parts)
    by_step_bias = _along_biases(lambda model: carried(target.held(model, target.vectors)), target.model)
    token, position = _direct(target)
    bias = target.norm_biases()
    total = by_token.sum((0, 1)) + by_position.sum((0, 1)) + by_step_bias.sum(0) + token + position + bias
    error = _error(target.whole, total)
    return StepTokenDecomposition(token, position, by_token, by_position, by_step_bias, bias, target.whole, error)


def _by_head(target: _Target, number: int) -> HeadDecomposition:
    layer, at = target.model.layers[number], target.at
    h = layer.source(target.walk.stations[2 * number], layer.aggregate_norm, hold=True)
    values = layer.aggregate.values(h, target.segments, hold=True)  # [G, T, K]
    parts = layer.aggregate.mixing(h, at[None], target.segments)[:, 0, :, None] * values

    def readout(layer: Layer, y: Array) -> Array:
        y = layer.aggregate.readout(y[:, None], h[at][None], hold=True)
        return layer.added(y, *layer.aggregate_norms, hold=True)[0]

    y = parts.sum(1)

    def of_head(g: Array) -> Array:
        def read(part: Array) -> Array:
            return _derivative(functools.partial(readout, layer), y, jnp.zeros_like(y).at[g].set(part))

        return target.carry_move(2 * number, jax.vmap(read)(parts[g]))

    by_head = lax.map(of_head, jnp.arange(len(parts)))
    bias = target.carry_move(2 * number, _along_biases(lambda layer: readout(layer, y), layer))
    whole = target.carry_move(2 * number, target.walk.moves[2 * number, at])
    return HeadDecomposition(by_head, bias, whole, _error(whole, by_head.sum((0, 1)) + bias))


def _by_neuron(target: _Target, number: int) -> NeuronDecomposition:
    layer, at = target.model.layers[number], target.at
    filter, norm = layer.filter, layer.filter_norm
    before = layer.read_by_filter(*target.walk.stations[2 * number : 2 * number + 2])
    active = filter.hidden(layer.source(before[at][None], norm)[0])  # type: ignore[union-attr, arg-type]

    def out(layer: Layer, y: Array) -> Array:
        return layer.added(y[None], *layer.filter_norms, hold=True)[0]

    y = filter.down(active)  # type: ignore[union-attr]
    parts = active[:, None] * filter.down.weight  # type: ignore[union-attr]
    parts = jax.vmap(functools.partial(_derivative, functools.partial(out, layer), y))(parts)
    by_neuron = target.carry_move(2 * number + 1, parts)
    biases = _along_biases(lambda layer: out(layer, layer.filter.down(active)), layer)
    bias = target.carry_move(2 * number + 1, biases)
    whole = target.carry_move(2 * number + 1, target.walk.moves[2 * number + 1, at])
    return NeuronDecomposition(by_neuron, bias, whole, _error(whole, by_neuron.sum(0) + bias))
