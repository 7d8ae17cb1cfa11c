"""C4: knowledge is in the arrangement of vectors, not in particular neurons or layers.

The loss after the arrangement of the token vectors is destroyed, beside the loss without the most damaging single
neuron, head or layer, and the loss after every token vector has moved equally far in a random direction. And two
transplants into freshly initialised models, of all vectors and of all layers, retrained alike: which learns faster.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk import training
from jaxwalk._loops import map_in_batches
from jaxwalk.aggregates._contract import Aggregate, documents_of
from jaxwalk.config import OptimConfig
from jaxwalk.evidence.decision import Contrast, Quantity, numbers, untestable
from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import check_data
from jaxwalk.evidence.statistics import permute_within, quantile_groups
from jaxwalk.evidence.subject import Subject
from jaxwalk.model import Layer, Transformer, astype, init, plain
from jaxwalk.model.layer import each_position
from jaxwalk.model.stack import Place
from jaxwalk.paths.law import log_probs_of, scores

CLAIM = "C4: knowledge is in the arrangement of vectors, not in particular neurons or layers."
MATTERS = 0.01
"""Nats per token: one percent of the probability of every token, about what a better choice of optimizer is worth."""
KINDS = ("neuron", "head", "layer")
PERMUTATIONS, RANDOM_DRAWS = 4, 20
ALIKE = 8
"""The number of tokens that are taken to be of like frequency."""
CANDIDATES, TOGETHER = 16, 4
"""How many neurons and heads are tried, and how many removals are computed together."""
PATHS, LONGEST = 128, 64
"""The most paths, unless more are asked for, and the most tokens of each that are scored."""
WORK = 2e12
"""About the most floating-point operations, unless 8 paths need more."""
SEEDS, BATCH, RATE, WARMUP, SCORED_TIMES = 8, 16, 3e-3, 4, 2
"""Of retraining: fresh models, paths per step, learning rate, steps of its rise, and how often the loss is measured."""
STEPS, RETRAINED = 16, 500_000
"""Steps of retraining by default, of models of at most so many parameters."""
STATEMENTS = {
    "component": "permuting the token vectors costs more than removing any one neuron, head or layer",
    "random_damage": "permuting the token vectors costs more than moving each as far in a random direction",
    "retrained_layers": "trained vectors with fresh layers learn faster than trained layers with fresh vectors",
}


def analyse(subject: Subject, *, paths: int | None = None, steps: int | None = None) -> Finding:
    """The loss after the arrangement of vectors is destroyed, beside other damage, and two transplants.

    Args:
        subject: the subject.
        paths: the number of held-out paths; 128 by default, fewer for large models.
        steps: the number of steps that transplants are retrained for, 0 for none; by default 16 for a model of at most
            500,000 parameters, and otherwise none.

    Raises:
        NotApplicable: without data, layers, or two tokens to permute.
    """
    check_data(subject)
    model, untrained = subject.model, subject.untrained
    if not model.depth or model.vocab_size < 2:
        raise NotApplicable(f"it needs layers and two tokens; got {model.depth} layers and {model.vocab_size} tokens")
    parameters = sum(a.size for a in jax.tree.leaves(model))
    length = min(subject.length, LONGEST) + 1
    budget = int(WORK / (2 * parameters * length * (3 * CANDIDATES + RANDOM_DRAWS)))
    n = paths or min(PATHS, max(8, budget))
    fit, held_out = subject.draw(n, length, to_fit=True), subject.draw(n, length)

    orders = _orders(fit.tokens, model.vocab_size, subject.seed)
    single = _most_damaging(model, fit.tokens)
    without = _without(model, held_out.tokens, np.array([[-1, 0, 0], *(place[:3] for place in single.values())]))
    base = without[:, 0]
    removed = dict(zip(single, without[:, 1:].T - base, strict=True))
    worst = max(single, key=lambda kind: single[kind].cost)
    nulls = {
        "component": removed[worst],
        "random_damage": _random_damage(model, orders, fit.tokens, held_out.tokens, subject.seed),
    }
    if untrained is not None:
        nulls["untrained"] = _permuted(untrained, orders, held_out.tokens)
    cost = functools.partial(Quantity, unit="nats per token", documents=held_out.documents)
    permuted = cost("permuted", _permuted(model, orders, held_out.tokens), nulls)
    quantities = [permuted, *(cost(f"without_{kind}", values) for kind, values in removed.items())]
    quantities.append(cost("relabelled", _permuted(model, orders, held_out.tokens, outputs=True)))
    place = single[worst]
    name = f"{worst} {place.number} of layer {place.layer}" if worst != "layer" else f"layer {place.layer}"
    labels = {"component": name, "random_damage": f"the most damaging of {RANDOM_DRAWS} random directions"}
    primary = [permuted.contrast(k, "C4", STATEMENTS[k], at_least=MATTERS, label=labels[k]) for k in labels]

    steps = (STEPS if parameters <= RETRAINED else 0) if steps is None else steps
    curves = _curves(subject, steps, fit.tokens.shape[1], held_out.tokens) if steps and subject.config else {}
    retrained, contrast = _transplants(curves, parameters, steps)
    arrays, figures = _figures(quantities, curves, steps)
    return Finding(
        name="organisation",
        claim=CLAIM,
        **numbers([*quantities, cost("loss", base), *retrained]),
        conventions=_conventions(held_out.tokens, single, steps),
        arrays=arrays,
        figures=figures,
        primary=(*primary, contrast),
    )


def _conventions(tokens: np.ndarray, single: Mapping[str, "Single"], steps: int) -> dict[str, Any]:
    return {
        "units": "nats per token",
        "paths": f"{len(tokens)} of {tokens.shape[1]} tokens; choices are made on as many others",
        "permuted": f"each token gets the vector of another one of like frequency (groups of about {ALIKE} or more); "
        "the output vectors stay, of a tied model too, and so do all other parameters; mean of "
        f"{PERMUTATIONS} permutations",
        "relabelled": "the output vectors move with the token vectors, which changes the names of the tokens only",
        "removed": f"a neuron or head has the output 0, a layer is skipped. Of neurons and of heads (groups of an "
        f"aggregate) the {CANDIDATES} that matter most to first order are tried, and every layer",
        "most_damaging": {kind: {"layer": p.layer, "number": p.number} for kind, p in single.items()},
        "retrained": f"{steps} steps (rounded up to a multiple of {SCORED_TIMES}) of AdamW at {RATE:g} on {BATCH} "
        f"paths, {SEEDS} fresh models; the vectors are those of tokens, positions and outputs, and the final norm "
        "belongs to the layers",
        "intervals": "95%; of retraining, over fresh models",
    }


# Destroying the arrangement.


def losses(model: Transformer, path: Int[Array, " N"]) -> Float[Array, ""]:
    """The mean loss of a path, in nats per token."""
    return -scores(model, path).mean()


def with_tables(model: Transformer, tokens: Array, outputs: Array, bias: Array | None) -> Transformer:
    """The model with other token and output vectors, which are untied if they were tied."""
    unembed = dataclasses.replace(model.unembed, weight=outputs, bias=bias)
    return dataclasses.replace(model, embed=dataclasses.replace(model.embed, table=tokens), unembed=unembed)


def _untied(model: Transformer) -> Transformer:
    return with_tables(model, model.embed.table, model.output_vectors, model.unembed.bias)


def _orders(tokens: np.ndarray, vocab_size: int, seed: int) -> list[Int[np.ndarray, " V"]]:
    """Random permutations without fixed points, each a cycle through every group of tokens of like frequency."""
    groups = quantile_groups(np.bincount(tokens.ravel(), minlength=vocab_size), max(1, vocab_size // ALIKE))
    orders = []
    for number in range(PERMUTATIONS):
        rng = np.random.default_rng([seed, number])
        mixed, order = permute_within(groups, rng), np.empty(vocab_size, int)
        for group in range(groups.max() + 1):
            members = mixed[groups == group]
            order[members] = np.roll(members, 1)
        orders.append(order)
    return orders


def _permuted(
    model: Transformer, orders: list[np.ndarray], tokens: np.ndarray, *, outputs: bool = False
) -> Float[np.ndarray, " n"]:
    """The cost of permuting the token vectors for each path, and also the output vectors if `outputs`."""
    table, unembedding, bias = model.embed.table, model.output_vectors, model.unembed.bias
    base = measure(losses, _untied(model), tokens)
    costs = []
    for order in orders:
        moved = (unembedding[order], None if bias is None else bias[order]) if outputs else (unembedding, bias)
        costs.append(measure(losses, with_tables(model, table[order], *moved), tokens) - base)
    return np.mean(costs, axis=0)


def _random_damage(
    model: Transformer, orders: list[np.ndarray], fit: np.ndarray, held_out: np.ndarray, seed: int
) -> Float[np.ndarray, " n"]:
    """The cost of moving each token vector as far as a permutation does, in the most damaging of random directions.

    It is chosen on the paths `fit`.
    """
    table = np.asarray(model.embed.table, np.float32)

    def damaged(draw: int) -> Transformer:
        direction = np.random.default_rng([seed, 1, draw]).normal(size=table.shape)
        distance = np.linalg.norm(table[orders[draw % len(orders)]] - table, axis=1, keepdims=True)
        moved = table + direction * distance / np.linalg.norm(direction, axis=1, keepdims=True)
        moved = jnp.asarray(moved, model.embed.table.dtype)
        return with_tables(model, moved, model.output_vectors, model.unembed.bias)

    strongest = max(range(RANDOM_DRAWS), key=lambda draw: measure(losses, damaged(draw), fit).mean())
    return measure(losses, damaged(strongest), held_out) - measure(losses, _untied(model), held_out)


# Removing one component.


class Gates(NamedTuple):
    """Factors of the outputs of components: 1, or 0 for those that are removed. With the axes of `_gates`."""

    neuron: Any
    head: Any
    layer: Any


class Single(NamedTuple):
    """A component, such as neuron `number` of a layer, and the cost of its removal."""

    kind: int
    layer: int
    number: int
    cost: float = 0.0


def _gates(model: Transformer) -> Gates:
    """Gates of 1: neurons [L, most neurons of a layer], heads [L, most heads], layers [L]."""
    neurons = [_neurons(layer) for layer in model.layers]
    heads = [_heads(layer, model.width) for layer in model.layers]
    ones = lambda *shape: np.ones((model.depth, *shape), np.float32)
    return Gates(ones(max(neurons)), ones(max(heads)), ones())


def _neurons(layer: Layer) -> int:
    return 0 if layer.filter is None else layer.filter.down.weight.shape[-2]


def _heads(layer: Layer, width: int) -> int:
    """The number of groups whose mixing matrix is their own; 0 if the aggregate has no such matrix."""
    if layer.aggregate.kind == "none":
        return 0
    return jax.eval_shape(layer.aggregate.mixing, jax.ShapeDtypeStruct((1, width), jnp.float32)).shape[0]


def gated_loss(model: Transformer, path: Int[Array, " N"], gates: Gates) -> Float[Array, ""]:
    """The mean loss of a path, where the output of each component is multiplied by its gate."""
    before, after = path[:-1], path[1:]
    documents = documents_of(None, len(before))

    def body(layer: Layer, place: Place, x: Array, gates: Gates) -> tuple[Array, None]:
        def combine(aggregate: Aggregate, h: Array) -> tuple[Array, None]:
            if aggregate.kind == "none":
                return aggregate.parallel(h, documents)[0], None
            A = aggregate.mixing(h, segments=documents)
            return aggregate.apply_mixing(h, A * gates.head[: len(A), None, None].astype(A.dtype), documents), None

        def filter_step(source: Array) -> Array:
            if layer.filter is None or layer.filter_norm is None:
                return jnp.zeros_like(source)
            hidden = each_position(layer.filter.hidden)(layer.step_input(source, layer.filter_norm))
            hidden = hidden * gates.neuron[: hidden.shape[1]].astype(hidden.dtype)
            return layer.step_output(jax.vmap(layer.filter.down)(hidden), layer.filter_norm, layer.filter_out_norm)

        kept, gate = layer(x, combine, filter_step=filter_step).stations[1], gates.layer.astype(x.dtype)
        return gate * kept + (1 - gate) * x, None

    x, _ = model.layers.scan(body, model.embedded(before, documents), model.layers.split(gates))
    return -log_probs_of(model, jax.vmap(model.context)(x), after).mean()


def removals(model: Transformer, path: Int[Array, " N"], places: Int[Array, "M 3"], gates: Gates) -> Float[Array, " M"]:
    """The mean loss of a path without the component at each place (kind, layer, index); of kind -1, without none."""

    def loss(place: Array) -> Array:
        kind, layer, index = place
        zero = lambda gate, number, *at: gate.at[at].multiply(jnp.where(kind == number, 0, 1))
        neuron, head, whole = (jnp.asarray(gate) for gate in gates)
        neuron, head = (zero(g, n, layer, index) if g.size else g for n, g in enumerate((neuron, head)))
        return gated_loss(model, path, Gates(neuron, head, zero(whole, 2, layer)))

    return map_in_batches(loss, places, TOGETHER)


def first_order(model: Transformer, path: Int[Array, " N"], gates: Gates) -> tuple[Array, Array]:
    """The change of a path's loss by the removal of each neuron, and of each head, to first order."""
    slope = jax.grad(gated_loss, argnums=2)(model, path, jax.tree.map(jnp.asarray, gates))
    return -slope.neuron, -slope.head


def _without(model: Transformer, tokens: np.ndarray, places: np.ndarray) -> Float[np.ndarray, "n M"]:
    """`removals` of any number of places by one program."""
    places = np.asarray(places, np.int32)
    filled = np.concatenate([places, np.repeat(places[-1:], -len(places) % TOGETHER, axis=0)])
    gates = _gates(model)
    parts = [
        measure(removals, model, tokens, shared=(filled[i : i + TOGETHER], gates))
        for i in range(0, len(filled), TOGETHER)
    ]
    return np.concatenate(parts, axis=1)[:, : len(places)]


def _most_damaging(model: Transformer, tokens: np.ndarray) -> dict[str, Single]:
    """The component of each kind whose removal costs most on these paths."""
    slopes = [slope.mean(axis=0) for slope in measure(first_order, model, tokens, shared=(_gates(model),))]
    places = [[-1, 0, 0], *([2, layer, 0] for layer in range(model.depth))]
    sizes = [[_neurons(layer), _heads(layer, model.width)] for layer in model.layers]
    for kind, slope in enumerate(slopes):
        exists = np.arange(slope.shape[1]) < np.array(sizes)[:, kind, None]
        best = np.argsort(-np.where(exists, slope, -np.inf).ravel())[: min(CANDIDATES, exists.sum())]
        places += [[kind, *divmod(int(i), slope.shape[1])] for i in best]
    costs = _without(model, tokens, np.array(places)).mean(axis=0)
    candidates = [
        Single(place[0], place[1], place[2], float(cost - costs[0])) for place, cost in zip(places, costs, strict=True)
    ]
    chosen: dict[str, Single] = {}
    for kind, name in enumerate(KINDS):
        if of_kind := [c for c in candidates if c.kind == kind]:
            chosen[name] = max(of_kind, key=lambda c: c.cost)
    return chosen


# Transplants.


def _curves(subject: Subject, steps: int, length: int, held_out: np.ndarray) -> dict[str, Float[np.ndarray, "R E"]]:
    """The held-out loss of each transplant before, during and after retraining, for each fresh model."""
    trained = astype(subject.model, jnp.float32)
    times, each = SCORED_TIMES, math.ceil(steps / SCORED_TIMES)
    rows = subject.draw(times * each * BATCH, length, to_fit=True).tokens
    curves: dict[str, list[np.ndarray]] = {"vectors": [], "layers": [], "fresh": []}
    for seed in range(SEEDS):
        key = jax.random.fold_in(jax.random.key(subject.seed), 0xF4E5 + seed)
        fresh = plain(init(subject.config, key))  # type: ignore[arg-type]  # there is one
        chosen = np.random.default_rng([subject.seed, 2, seed]).permutation(len(rows))
        batches = rows[np.resize(chosen, times * each * BATCH)].reshape(times, each, BATCH, length)
        models = {"vectors": _transplant(fresh, trained), "layers": _transplant(trained, fresh), "fresh": fresh}
        for name, model in models.items():
            curve, moments = [measure(losses, _untied(model), held_out).mean()], _optimizer().init(model)
            for batch in batches:
                model, moments = _retrained(model, moments, batch)
                curve.append(measure(losses, _untied(model), held_out).mean())
            curves[name].append(np.array(curve))
    return {name: np.stack(of_seeds) for name, of_seeds in curves.items()}


def _transplant(layers: Transformer, vectors: Transformer) -> Transformer:
    """The layers and final norm of one model with the token, position and output vectors of another."""
    return dataclasses.replace(layers, embed=vectors.embed, positions=vectors.positions, unembed=vectors.unembed)


def _optimizer() -> optax.GradientTransformation:
    return training.optimizer(OptimConfig(lr=RATE, schedule="constant", warmup=WARMUP), STEPS)


@jax.jit
def _retrained(model: Transformer, moments: Any, batches: Int[Array, "K B N"]) -> tuple[Transformer, Any]:
    """The model, and the moments of the optimizer, after a step on each batch."""

    def loss(model: Transformer, tokens: Array) -> Array:
        total, count = training.batch_loss(model, tokens)
        return total / count

    def step(state: Any, tokens: Array) -> tuple[Any, None]:
        model, moments = state
        updates, moments = _optimizer().update(jax.grad(loss)(model, tokens), moments, model)
        return (optax.apply_updates(model, updates), moments), None

    return lax.scan(step, (model, moments), batches)[0]


def _transplants(curves: dict[str, np.ndarray], parameters: int, steps: int) -> tuple[list[Quantity], Contrast]:
    """The losses after retraining, and which transplant learned faster."""
    statement = STATEMENTS["retrained_layers"]
    if not curves:
        reason = (
            "the configuration of the model is not known, from which fresh ones are made"
            if steps
            else f"{parameters:,} parameters are many to retrain: set organisation.steps"
        )
        return [], untestable("C4", statement, "retrained_vectors", reason)
    last = {name: curve[:, -1] for name, curve in curves.items()}
    nulls = {"layers": last["layers"], "fresh": last["fresh"]}
    retrained = Quantity("retrained_vectors", last["vectors"], nulls, "nats per token")
    label = "trained layers with fresh vectors"
    return [retrained], retrained.contrast("layers", "C4", statement, at_most=-MATTERS, label=label)


# Figures.


def _figures(
    quantities: list[Quantity], curves: dict[str, np.ndarray], steps: int
) -> tuple[dict[str, np.ndarray], tuple[Figure, ...]]:
    permuted = quantities[0]
    bars = {"permuted": permuted.value, **permuted.references} | {q.name: q.value for q in quantities[1:]}
    del bars["component"]  # which is one of those without a neuron, head or layer
    arrays = {"damage": np.array([name.replace("_", " ") for name in bars]), "cost": np.array(list(bars.values()))}
    figures = [
        Figure(
            name="damage",
            title="What damage to the vectors costs, beside the most damaging single removals",
            x_label="",
            y_label="cost, nats per token",
            series=(Series("cost", "cost", "damage", "bars"),),
        )
    ]
    if curves:
        labels = {"vectors": "trained vectors", "layers": "trained layers", "fresh": "all fresh"}
        points = next(iter(curves.values())).shape[1]
        arrays["step"] = np.arange(points) * math.ceil(steps / SCORED_TIMES)
        arrays |= {f"retrained_{name}": curve.mean(axis=0) for name, curve in curves.items()}
        series = [Series(labels[name], f"retrained_{name}", "step", dashed=name == "fresh") for name in curves]
        title = "Held-out loss of transplants in retraining"
        figures.append(Figure("transplants", title, "step", "loss, nats per token", tuple(series)))
    return arrays, tuple(figures)
