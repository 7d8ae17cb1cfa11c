"""One layer: an aggregate step and a filter step on the residual stream."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxwalk.aggregates._contract import Aggregate
from jaxwalk.config import Placement
from jaxwalk.filters import MLP, GatedMLP, Norm, module

Filter = MLP | GatedMLP
Combine = Callable[[Aggregate, Float[Array, "T D"]], tuple[Float[Array, "T D"], Any]]
"""How positions are combined: (the layer's aggregate, its input) -> (its output, anything else to be returned)."""


class Interventions(NamedTuple):
    """Interventions per station, with stations as the first axis of each field: patch first, then add the nudge.

    nudge: [S, T, D], added to the stations. where, by: [S, T] and [S, T, D]: stations are replaced by `by` where
        `where` is true. nudge_where: [S, T], where the nudge is added; None is everywhere. Otherwise None intervenes
        nowhere.
    """

    nudge: Any = None
    where: Any = None
    by: Any = None
    nudge_where: Any = None

    def apply(self, x: Float[Array, "T D"], station: int) -> Float[Array, "T D"]:
        """The station `x` after the intervention at it."""
        if self.where is not None and self.by is not None:
            x = jnp.where(self.where[station][:, None], self.by[station].astype(x.dtype), x)
        if self.nudge is None:
            return x
        nudge = self.nudge[station].astype(x.dtype)
        return x + nudge if self.nudge_where is None else x + jnp.where(self.nudge_where[station][:, None], nudge, 0)


NO_INTERVENTIONS = Interventions()


class LayerWalk(NamedTuple):
    """What a layer returns.

    stations: [2, T, D], the stream after the aggregate step and after the filter step.
    moves: [2, T, D], what each step adds to the stream (post-norm: before the norm of the sum).
    extra: whatever `combine` returned besides the output of the aggregate.
    """

    stations: Float[Array, "2 T D"]
    moves: Float[Array, "2 T D"]
    extra: Any


def apply_aggregate(aggregate: Aggregate, x: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], None]:
    """The aggregate on one document: the simplest `Combine`."""
    return aggregate(x), None


@module
class Layer(nnx.Module):
    """An aggregate step, then a filter step, each added to the residual stream.

    pre: x + aggregate(norm(x)), then x + filter(norm(x)).
    post: norm(x + aggregate(x)), then norm(x + filter(x)); the stations are after the norm.
    parallel: x + aggregate(norm(x)) + filter(norm(x)), both from the same x; the first station has the aggregate's part
        only.
    res_post: x + norm(aggregate(x)), then x + norm(filter(x)) (Liu et al., arXiv 2111.09883; OLMo 2).
    sandwich: x + out_norm(aggregate(norm(x))), then the filter likewise (Ding et al., arXiv 2105.13290; Gemma 2). Only
        this placement has the norms `_out_norm`.

    Without a filter the second station repeats the first.
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
        combine: Combine = apply_aggregate,
        interventions: Interventions = NO_INTERVENTIONS,
        *,
        hold: bool = False,
        filter_step: Callable[[Float[Array, "T D"]], Float[Array, "T D"]] | None = None,
    ) -> LayerWalk:
        """Both stations of this layer, and both moves.

        Args:
            x: the residual stream before the layer.
            combine: how positions are combined.
            interventions: at the two stations of this layer.
            hold: whether the data-dependent coefficients of norms and filter are held. `combine` holds its own.
            filter_step: replaces `filtered`, the map from the stream to what the filter step adds.
        """
        y, extra = combine(self.aggregate, self.step_input(x, self.aggregate_norm, hold))
        first = self.step_output(y, self.aggregate_norm, self.aggregate_out_norm, hold)
        after_aggregate = interventions.apply(self._arrive(x + first, self.aggregate_norm, hold), 0)
        source = self.filter_source(x, after_aggregate)
        second = self.filtered(source, hold) if filter_step is None else filter_step(source)
        after_filter = after_aggregate
        if self.filter_norm is not None:
            after_filter = self._arrive(after_aggregate + second, self.filter_norm, hold)
        after_filter = interventions.apply(after_filter, 1)
        return LayerWalk(jnp.stack([after_aggregate, after_filter]), jnp.stack([first, second]), extra)

    def filter_source(self, x: Float[Array, "T D"], after_aggregate: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The stream that the filter step reads, of those before and after the aggregate step."""
        return x if self.placement == "parallel" else after_aggregate

    def filtered(self, x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        """What the filter step adds to the stream x, position by position; zeros without a filter."""
        if self.filter is None or self.filter_norm is None:
            return jnp.zeros_like(x)
        y = each_position(self.filter, hold)(self.step_input(x, self.filter_norm, hold))
        return self.step_output(y, self.filter_norm, self.filter_out_norm, hold)

    def aggregated(self, y: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        """What the aggregate step adds to the stream, from the output y of the aggregate."""
        return self.step_output(y, self.aggregate_norm, self.aggregate_out_norm, hold)

    def step_input(self, x: Float[Array, "T D"], norm: Norm, hold: bool = False) -> Float[Array, "T D"]:
        """The input of a step with this norm: the norm of the stream x, unless norms come after the steps."""
        return x if self.placement in ("post", "res_post") else each_position(norm, hold)(x)

    def step_output(
        self, y: Float[Array, "T D"], norm: Norm | None, out_norm: Norm | None, hold: bool = False
    ) -> Float[Array, "T D"]:
        """What a step with these norms adds to the stream: y, or y normalised where a norm comes after the step."""
        after = {"res_post": norm, "sandwich": out_norm}.get(self.placement)
        return y if after is None else each_position(after, hold)(y)

    def _arrive(self, x: Array, norm: Norm, hold: bool) -> Array:
        return each_position(norm, hold)(x) if self.placement == "post" else x


def each_position(filter: Callable[..., Array], hold: bool = False) -> Callable[[Array], Array]:
    """A filter lifted to all positions, [T, D] -> [T, E]."""
    return jax.vmap(functools.partial(filter, hold=hold))
