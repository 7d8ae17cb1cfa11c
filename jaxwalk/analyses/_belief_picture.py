"""The picture of `belief_geometry`: beliefs of the world, and those that models' context vectors show."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxwalk.evidence.engine import measure
from jaxwalk.evidence.finding import Series
from jaxwalk.evidence.regression import Affine, Deal, predict
from jaxwalk.model import Transformer
from jaxwalk.worlds import HiddenMarkov


def picture(
    world: HiddenMarkov,
    shown: Mapping[str, tuple[Transformer, list[Affine], float]],
    deal: Deal,
    beliefs: Float[np.ndarray, "n T N"],
    points: int,
) -> tuple[tuple[Series, ...], dict[str, np.ndarray], tuple[str, str, str]]:
    """One point for each possible word, coloured by its belief: the world's, and those that models' contexts show.

    Args:
        world: the world.
        shown: for each name, a model, the maps from its context vectors to beliefs, and their R^2.
        deal: the folds of prefixes that the maps were fitted without.
        beliefs: beliefs [n, T, N] after prefixes of paths, which determine the projection.
        points: the most words.

    Returns:
        The panels, their arrays, and (label of x, label of y, convention).
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
    return tuple(panels), arrays, (view[0], view[1], f"{view[2]}; {what}")


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
