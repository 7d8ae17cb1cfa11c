"""The figures of `belief_geometry`: beliefs that models' context vectors show, and R^2 of each station."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.decision import Quantity
from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import Figure, Series
from jaxwalk.evidence.regression import Affine, Deal, Fit, predict, r_squared
from jaxwalk.model import Transformer
from jaxwalk.worlds import HiddenMarkov

Arrays = dict[str, np.ndarray]


def picture(
    world: HiddenMarkov,
    shown: Mapping[str, tuple[Transformer, list[Affine], float]],
    deal: Deal,
    beliefs: Float[np.ndarray, "n T N"],
    points: int,
) -> tuple[Arrays, Figure, str]:
    """One point for each possible word, coloured by its belief: the world's, and those that models' contexts show.

    Args:
        world: the world.
        shown: for each name, a model, the maps from its context vectors to beliefs, and their R^2.
        deal: the folds of prefixes that the maps were fitted without.
        beliefs: beliefs [n, T, N] after prefixes of paths, which determine the projection.
        points: the most words.

    Returns:
        The arrays, the figure, and what was chosen.
    """
    V, T = world.vocab_size, beliefs.shape[1]
    depth = max(d for d in range(1, T + 1) if d == 1 or V**d <= points)
    words = np.stack(np.unravel_index(np.arange(V**depth), (V,) * depth), axis=1).astype(np.int32)
    true = np.asarray(jax.vmap(world.beliefs)(words), float)[:, -1]
    possible = np.isfinite(true).all(axis=1)
    words, true = words[possible], true[possible]
    project, colour, view = _projection(beliefs.reshape(-1, beliefs.shape[-1]))
    arrays = {"words": words, "true_beliefs": true, "colour": colour(true)}

    def panel(name: str, label: str, predicted: np.ndarray) -> Series:
        xy = project(true, predicted)
        arrays[f"{name}_x"], arrays[f"{name}_y"] = xy.T
        return Series(label, f"{name}_y", f"{name}_x", style="points", colour="colour")

    panels = [panel("true", "The world's beliefs", true)]
    folds = deal.folds(words)[:, -1:]
    for name, (model, maps, r2) in shown.items():
        context = measure(_last_context, model, words)[:, None]
        arrays[f"{name}_beliefs"] = predicted = predict(maps, context, folds)[:, 0]
        panels.append(panel(name, f"{name.capitalize()} model, R² {r2:.4f}", predicted))
    what = f"one point for each possible word of {depth} tokens, coloured by its true belief, by maps not fitted to it"
    title = "The context vectors, through one affine map, beside the beliefs of an observer who knows the world"
    figure = Figure("beliefs", title, view[0], view[1], tuple(panels), equal_aspect=True, panels=True)
    return arrays, figure, f"{view[2]}; {what}"


def _projection(
    beliefs: Float[np.ndarray, "n N"],
) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray], tuple[str, str, str]]:
    """How beliefs are drawn: (true, shown) -> [n, 2]; true -> colours [n, 3]; and what the axes are."""
    if beliefs.shape[1] == 3 and beliefs.min() > -1e-6 and np.allclose(beliefs.sum(1), 1, atol=1e-5):
        corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
        return (
            lambda true, shown: shown @ corners,
            lambda true: np.clip(true, 0, 1),
            ("belief state, drawn in the triangle of the three hidden states", "", "triangle of the three states"),
        )
    mean = beliefs.mean(0)
    _, lengths, axes = np.linalg.svd(beliefs - mean, full_matrices=False)
    axes = axes[: max(1, min(3, int((lengths > 1e-6 * lengths[0]).sum())))]
    scores = (beliefs - mean) @ axes.T
    low, span = scores.min(0), np.ptp(scores, axis=0)

    def colour(true: np.ndarray) -> np.ndarray:
        scaled = np.clip(((true - mean) @ axes.T - low) / span, 0, 1)
        return np.pad(scaled, ((0, 0), (0, 3 - scaled.shape[1])), constant_values=0.5)

    if len(axes) == 1:
        return (
            lambda true, shown: np.column_stack([(true - mean) @ axes[0], (shown - mean) @ axes[0]]),
            colour,
            ("true belief, its one component", "belief shown", "the beliefs lie on a line: shown against true"),
        )
    return (
        lambda true, shown: (shown - mean) @ axes[:2].T,
        colour,
        (
            "belief state, first principal component",
            "second principal component",
            "principal components of the beliefs",
        ),
    )


def _last_context(model: Transformer, path: Int[Array, " T"]) -> Array:
    """The context vector of a whole path, [D]."""
    return model.walk(path).context[-1]


def by_station(shown: Mapping[str, Sequence[Fit]], references: Mapping[str, float]) -> tuple[Arrays, Figure]:
    """1 - R^2 of each station of each of these models, with intervals, and of other vectors as references."""
    arrays: Arrays = {"station": np.arange(len(next(iter(shown.values()))))}
    series: list[Series] = []
    for label, fits in shown.items():
        each = [Quantity("r2", fit.sums, statistic=r_squared) for fit in fits]
        values = np.array([(q.value, *reversed(q.interval or (q.value, q.value))) for q in each])
        names = [f"{label}_{what}_by_station" for what in ("unexplained", "low", "high")]
        arrays |= dict(zip(names, np.maximum(1 - values.T, 1e-12), strict=True))
        arrays[f"{label}_r2_by_station"] = values[:, 0]
        series.append(Series(label, names[0], "station", low=names[1], high=names[2], dashed=len(series) > 0))
    return arrays, Figure(
        name="belief_r2_by_station",
        title="Share of the belief that an affine map of one station leaves unexplained (1 - R², held-out)",
        x_label="station of the encoding walk (0: after the embedding)",
        y_label="1 - R²",
        series=tuple(series),
        references={name: max(1 - r2, 1e-12) for name, r2 in references.items()},
        log_y=True,
    )
