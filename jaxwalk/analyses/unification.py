"""C7: filters and aggregates describe every sequence model.

That the output of an aggregate is readout(A values) holds by construction, and is checked here in this very model: by
its mixing matrices, in parallel, and position by position. What is measured is how much of A depends on the data: its
variance over paths, beyond what the layer, the head and the two positions determine.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxwalk.aggregates._contract import Aggregate, documents_of
from jaxwalk.evidence.decision import Check, Quantity, numbers, untestable
from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import Figure, Finding, NotApplicable, Series
from jaxwalk.evidence.laws import check_data
from jaxwalk.evidence.subject import Subject
from jaxwalk.filters import indices
from jaxwalk.model import Layer, Transformer
from jaxwalk.model.stack import Place

CLAIM = "C7: filters and aggregates describe every sequence model."
STATEMENT = "one description fits all sequence models"
REASON = (
    "that this model's aggregates are readout(A v) holds by construction, whatever A; evidence takes models of several "
    "families, trained alike"
)
LIMIT = 1e-4
"""The largest relative error of equal forms, in float32."""
PATHS, LONGEST = 64, 64
"""The most paths, unless more are asked for, and the most tokens of each."""
ELEMENTS = 1 << 25
"""The most entries of all mixing matrices of all paths, unless those of 8 paths are more."""


def analyse(subject: Subject, *, paths: int | None = None) -> Finding:
    """How much of the mixing matrices depends on the data, layer by layer.

    Args:
        subject: the subject.
        paths: the number of held-out paths; by default 64, fewer if the mixing matrices are large.

    Raises:
        NotApplicable: without data, or without a layer that has a mixing matrix.
    """
    check_data(subject)
    model = subject.model
    layers = _with_matrices(model)
    if not layers:
        raise NotApplicable("it needs a layer with a mixing matrix, and this model has none")
    length = min(subject.length, LONGEST)
    size = sum(_size(model.layers[number], model.width, length) for number in layers)
    n = paths or min(PATHS, max(8, ELEMENTS // size))
    fit, held_out = subject.draw(n, length, to_fit=True), subject.draw(n, length)
    models = {"model": model} if subject.untrained is None else {"model": model, "untrained": subject.untrained}
    sums = {name: _about_the_mean(m, fit.tokens, held_out.tokens) for name, m in models.items()}

    quantities = []
    for name, statistic in {"data_share": _mean_share, "largest_data_share": _largest_share}.items():
        nulls = {"fixed_A": 0.0} | ({"untrained": sums["untrained"]} if "untrained" in sums else {})
        quantities.append(
            Quantity(name, sums["model"], nulls, "share of the variance of A", statistic, held_out.documents)
        )
    errors = measure(form_errors, model, held_out.tokens[:8])
    checks = [
        Check(
            "parallel_form",
            float(errors.parallel.max()),
            LIMIT,
            "readout(A values) is the parallel form of every layer",
        ),
        Check("recurrent_form", float(errors.recurrent.max()), LIMIT, "decoding step by step gives the parallel form"),
    ]
    arrays = {"layer": np.array(layers), "error_parallel": errors.parallel, "error_recurrent": errors.recurrent}
    arrays |= {f"data_share_{name}": _shares(s.mean(axis=0)) for name, s in sums.items()}
    series = [Series(name, f"data_share_{name}", "layer", "bars", dashed=name != "model") for name in sums]
    figure = Figure("data_share", "How much of A depends on the data", "layer", "share of the variance", tuple(series))
    return Finding(
        name="unification",
        claim=CLAIM,
        **numbers(quantities),
        conventions={
            "units": "shares of the variance of A",
            "paths": f"{len(held_out.tokens)} of {length} tokens; the mean A is of {len(fit.tokens)} others",
            "data_share": "variance of A over paths, around its mean for the layer, head and positions, as a share of "
            "its variance around its mean for the layer, over all pairs of positions j <= i; mean over layers",
            "fixed_A": "an aggregate whose A does not depend on the data",
            "aggregates": [_described(layer.aggregate) for layer in model.layers],
            "attention": "shares of other families are of other matrices: per channel, not normalised, or applied to "
            "values that depend on the past; compare them between trained models, not as one scale",
        },
        arrays=arrays,
        figures=(figure,),
        primary=(untestable("C7", STATEMENT, "data_share", REASON),),
        checks=tuple(checks),
    )


def _described(aggregate: Aggregate) -> str:
    """The family of an aggregate, and what its A acts on."""
    acts_on = {
        "exact": "acts on values of one position each",
        "conditional": "acts on values that depend on the past",
        "none": "does not exist",
    }
    return f"{type(aggregate).__name__}: A, one per {aggregate.granularity}, {acts_on[aggregate.kind]}"


# How much of A depends on the data.


def _shares(sums: Float[np.ndarray, "*n L 2"]) -> Float[np.ndarray, "*n L"]:
    """The share of each layer; 0 for a matrix that does not vary at all."""
    return np.where(sums[..., 1] > 0, sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], 1), 0.0)


def _mean_share(means: np.ndarray) -> np.ndarray:
    return np.asarray(_shares(means).mean(axis=-1))


def _largest_share(means: np.ndarray) -> np.ndarray:
    return np.asarray(_shares(means).max(axis=-1))


def patterns(model: Transformer, path: Int[Array, " T"]) -> list[Array]:
    """The mixing matrices [G, T, T] of all layers that have one, for one path."""
    layers = _with_matrices(model)
    recorded = model.walk(path, record_mixing=layers).mixing
    return [recorded[layer].astype(jnp.float32) for layer in layers]


def deviations(
    model: Transformer, path: Int[Array, " T"], means: list[Array], centres: list[Array]
) -> Float[Array, "L 2"]:
    """Squared deviations of A from its mean matrix, and from its mean entry, summed over the entries with j <= i.

    A row for each layer that has a matrix; G may differ.
    """

    def of_layer(A: Array, mean: Array, centre: Array) -> Array:
        causal = jnp.tril(jnp.ones(A.shape[1:], A.dtype))
        return jnp.stack([(causal * (A - mean) ** 2).sum(), (causal * (A - centre) ** 2).sum()])

    return jnp.stack([of_layer(*each) for each in zip(patterns(model, path), means, centres, strict=True)])


def _with_matrices(model: Transformer) -> tuple[int, ...]:
    return tuple(number for number, layer in enumerate(model.layers) if layer.aggregate.kind != "none")


def _about_the_mean(model: Transformer, fit: np.ndarray, tokens: np.ndarray) -> Float[np.ndarray, "n L 2"]:
    """`deviations` of each path from the mean matrices of the paths `fit`."""
    means = [A.mean(axis=0).astype(np.float32) for A in measure(patterns, model, fit)]
    T = tokens.shape[1]
    centres = [np.float32(np.tril(A).sum() / (len(A) * T * (T + 1) / 2)) for A in means]
    sums: np.ndarray = measure(deviations, model, tokens, shared=(means, centres))
    return sums


def _size(layer: Layer, width: int, length: int) -> int:
    """The number of entries of the layer's mixing matrices."""
    return jax.eval_shape(layer.aggregate.mixing, jax.ShapeDtypeStruct((length, width), jnp.float32)).size


# The three forms of an aggregate.


class Errors(NamedTuple):
    """Relative errors [L] of two forms of each aggregate, as a share of its largest output."""

    parallel: Any
    recurrent: Any


def form_errors(model: Transformer, path: Int[Array, " T"]) -> Errors:
    """How far readout(A values), and decoding step by step, are from each aggregate's output along a path.

    All forms read the same input, so that errors do not accumulate over layers.
    """
    documents = documents_of(None, len(path))

    def body(layer: Layer, place: Place, x: Array, _: Any) -> tuple[Array, Errors]:
        def combine(aggregate: Aggregate, h: Array) -> tuple[Array, Errors]:
            y = aggregate.parallel(h, documents)[0]
            by_matrix = y if aggregate.kind == "none" else aggregate.apply_mixing(h, aggregate.mixing(h), documents)

            def step(memory: Any, at: tuple[Array, Array]) -> tuple[Any, Array]:
                return aggregate.advance(memory, at[0], at[1])

            stepped = lax.scan(step, aggregate.init_memory(len(h)), (h, indices(len(h))))[1]
            return y, Errors(_relative(by_matrix, y), _relative(stepped, y))

        output = layer(x, combine)
        return output.stations[1], output.extra

    _, errors = model.layers.scan(body, model.embedded(path, documents))
    joined: Errors = model.layers.join(errors)
    return joined


def _relative(a: Array, b: Array) -> Array:
    """The largest difference, as a share of the largest number; 0 for zeros."""
    largest = jnp.abs(b).max()
    return jnp.abs(a - b).max() / jnp.where(largest > 0, largest, 1)
