"""A layer: an aggregate step, then a filter step, on the residual stream."""

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
"""How positions are combined: (aggregate of the layer, its input) -> (its output, anything else to return)."""


class Interventions(NamedTuple):
    """Interventions per station: a patch, then a nudge. Stations are the first axis of each field.

    Attributes:
        nudge: [S, T, D], added to the stations; None for no nudge.
        where: [S, T], where stations are replaced; None for no patch.
        by: [S, T, D], the replacements.
        nudge_where: [S, T], where the nudge is added; None for everywhere.
    """

    nudge: Any = None
    where: Any = None
    by: Any = None
    nudge_where: Any = None

    def apply(self, x: Float[Array, "T D"], station: int) -> Float[Array, "T D"]:
        """Apply the intervention at index `station` to the station `x`."""
        if self.where is not None and self.by is not None:
            x = jnp.where(self.where[station][:, None], self.by[station].astype(x.dtype), x)
        if self.nudge is None:
            return x
        nudge = self.nudge[station].astype(x.dtype)
        return x + nudge if self.nudge_where is None else x + jnp.where(self.nudge_where[station][:, None], nudge, 0)


NO_INTERVENTIONS = Interventions()


class LayerWalk(NamedTuple):
    """The outputs of a layer.

    Attributes:
        stations: [2, T, D], the stream after the aggregate step and after the filter step.
        moves: [2, T, D], what each step adds to the stream (post-norm: before the norm of the sum).
        extra: the second result of `combine`.
    """

    stations: Float[Array, "2 T D"]
    moves: Float[Array, "2 T D"]
    extra: Any


def apply_aggregate(aggregate: Aggregate, x: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], None]:
    """Apply the aggregate to a single document: the default `Combine`."""
    return aggregate(x), None


@module
class Layer(nnx.Module):
    """An aggregate step, then a filter step, each added to the residual stream.

    The placement of the norms is one of:

    - pre: x + aggregate(norm(x)), then x + filter(norm(x)).
    - post: norm(x + aggregate(x)), then norm(x + filter(x)). Stations are after the norm.
    - parallel: x + aggregate(norm(x)) + filter(norm(x)), both from the same x. The first station includes only the
      output of the aggregate.
    - res_post: x + norm(aggregate(x)), then x + norm(filter(x)) (Liu et al., arXiv 2111.09883; OLMo 2).
    - sandwich: x + out_norm(aggregate(norm(x))), and the same for the filter (Ding et al., arXiv 2105.13290; Gemma 2).
      Only this placement has the norms `aggregate_out_norm` and `filter_out_norm`.

    Without a filter, the second station equals the first.
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
        """The two stations and the two moves of this layer.

        Args:
            x: [T, D], the residual stream before the layer.
            combine: how positions are combined.
            interventions: interventions at the two stations of this layer.
            hold: whether to hold the data-dependent coefficients of norms and filter. Those of the aggregate are up to
                `combine`.
            filter_step: replaces `filtered`, the map from the stream to what the filter step adds.
        """
        y, extra = combine(self.aggregate, self.step_input(x, self.aggregate_norm, hold))
        first = self.step_output(y, self.aggregate_norm, self.aggregate_out_norm, hold)
        after_aggregate = interventions.apply(self._post_norm(x + first, self.aggregate_norm, hold), 0)
        source = self.filter_source(x, after_aggregate)
        second = self.filtered(source, hold) if filter_step is None else filter_step(source)
        after_filter = after_aggregate
        if self.filter_norm is not None:
            after_filter = self._post_norm(after_aggregate + second, self.filter_norm, hold)
        after_filter = interventions.apply(after_filter, 1)
        return LayerWalk(jnp.stack([after_aggregate, after_filter]), jnp.stack([first, second]), extra)

    def filter_source(self, x: Float[Array, "T D"], after_aggregate: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The stream that the filter step reads: that before the aggregate step (x), or that after it."""
        return x if self.placement == "parallel" else after_aggregate

    def filtered(self, x: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        """What the filter step adds to the stream, given the stream x that it reads; zeros without a filter."""
        if self.filter is None or self.filter_norm is None:
            return jnp.zeros_like(x)
        y = each_position(self.filter, hold)(self.step_input(x, self.filter_norm, hold))
        return self.step_output(y, self.filter_norm, self.filter_out_norm, hold)

    def aggregated(self, y: Float[Array, "T D"], hold: bool = False) -> Float[Array, "T D"]:
        """What the aggregate step adds to the stream, given the output y of the aggregate."""
        return self.step_output(y, self.aggregate_norm, self.aggregate_out_norm, hold)

    def step_input(self, x: Float[Array, "T D"], norm: Norm, hold: bool = False) -> Float[Array, "T D"]:
        """The input of a step: the norm of the stream x, unless norms come after the steps."""
        return x if self.placement in ("post", "res_post") else each_position(norm, hold)(x)

    def step_output(
        self, y: Float[Array, "T D"], norm: Norm | None, out_norm: Norm | None, hold: bool = False
    ) -> Float[Array, "T D"]:
        """What a step adds to the stream: its output y, normalised if a norm comes after the step."""
        norm_after = {"res_post": norm, "sandwich": out_norm}.get(self.placement)
        return y if norm_after is None else each_position(norm_after, hold)(y)

    def _post_norm(self, x: Array, norm: Norm, hold: bool) -> Array:
        return each_position(norm, hold)(x) if self.placement == "post" else x


def each_position(filter: Callable[..., Array], hold: bool = False) -> Callable[[Array], Array]:
    """Map a filter over positions: [T, D] -> [T, E]."""
    return jax.vmap(functools.partial(filter, hold=hold))
