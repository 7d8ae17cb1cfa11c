"""Figures prepared for the files and the page, and the figures of a run's training curves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxwalk.evidence.finding import Figure, Finding, Series
from jaxwalk.report._interactive import interactive_figure
from jaxwalk.report._layout import Layout, lay_out
from jaxwalk.report._text import unique_file_names


class FigureData(NamedTuple):
    """A figure, its arrays, and the finding that it belongs to: None for training curves and comparisons."""

    finding: Finding | None
    figure: Figure
    arrays: Mapping[str, np.ndarray]

    @property
    def owner(self) -> str:
        """The name of the analysis, or "training"."""
        return self.finding.name if self.finding else "training"


@dataclass
class Plot:
    """A figure laid out for both renderers, or the problem that prevents it."""

    data: FigureData
    file_name: str
    layout: Layout | None = None
    spec: dict[str, Any] | None = None
    """Traces and layouts for plotly.js."""
    problem: str = ""

    @property
    def title(self) -> str:
        """The title of the figure."""
        return self.data.figure.title


def prepare_plots(figures: Sequence[FigureData]) -> list[Plot]:
    """The figures, laid out. A figure that cannot be laid out has no layout or no spec, and a `problem`."""
    names = unique_file_names((data.figure.name, data.owner) for data in figures)
    plots = [Plot(data, name) for data, name in zip(figures, names, strict=True)]
    for plot in plots:
        try:
            plot.layout = lay_out(plot.data.figure, plot.data.arrays)
            plot.spec = interactive_figure(plot.layout)
        except Exception as error:  # a figure that fails, for whatever reason, must not prevent the others
            plot.problem = f"{type(error).__name__}: {error}"
    return plots


class _Curves(NamedTuple):
    """A figure of the training, whose curves are the `labels`, by the key of their metric."""

    name: str
    title: str
    unit: str
    labels: Mapping[str, str]
    log: bool = False
    """Whether both axes are logarithmic."""


_TRAINING_CURVES = (
    _Curves("training_loss", "Loss while training", "nats per token", {"loss": "training", "eval_loss": "held out"}),
    _Curves(
        "training_excess",
        "Loss above the ideal observer's",
        "nats per token",
        {"excess_loss": "held out"},
        log=True,
    ),
    _Curves("training_bits", "Bits per byte of held-out text", "bits per byte", {"bits_per_byte": "held out"}),
)


def training_figures(metrics: Iterable[Mapping[str, Any]]) -> Iterator[FigureData]:
    """The training curves for which the rows of `metrics.jsonl` hold numbers."""
    rows = [row for row in metrics if isinstance(row.get("step"), int | float)]
    for curves in _TRAINING_CURVES:
        arrays: dict[str, np.ndarray] = {}
        series = []
        for key, label in curves.labels.items():
            points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
            if points:
                arrays[f"{key}.step"], arrays[key] = np.array(points, float).T
                series.append(Series(label, y=key, x=f"{key}.step"))
        if series:
            figure = Figure(
                curves.name,
                curves.title,
                "training step",
                curves.unit,
                tuple(series),
                log_x=curves.log,
                log_y=curves.log,
            )
            yield FigureData(None, figure, arrays)
