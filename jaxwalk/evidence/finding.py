"""What analyses return: numbers with their interval, their null and their conventions, and runs side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np


class NotApplicable(ValueError):
    """Raised by an analysis that makes no sense for this model, or has too little data. The message says why."""


@dataclass(frozen=True)
class Series:
    """One series of a figure; every field but `label` and `style` names an array of the finding.

    line: y [n] against x [n], with a band from `low` to `high`. points: y against x, each in its `colour`
    ([n, 3], red, green and blue from 0 to 1, or [n] numbers). bars: y [n] over the names in x [n], with error
    bars from `low` to `high`. heatmap: y [rows, columns], the first row on top, columns named by x, rows by `rows`.
    Names may be numbers or strings; a line or points against strings are drawn over their names too.
    """

    label: str
    y: str
    x: str | None = None
    style: Literal["line", "points", "bars", "heatmap"] = "line"
    low: str | None = None
    high: str | None = None
    colour: str | None = None
    dashed: bool = False
    """How a null or a reference is drawn."""
    text: str | None = None
    """Labels of the cells or points: an array of strings of the shape of y. Tokens are untrusted text."""
    rows: str | None = None
    """Names of the rows of a heatmap."""


@dataclass(frozen=True)
class Figure:
    """A figure as data: the report draws it for paper (PNG, SVG) and for the page."""

    name: str
    """File name, without ending."""
    title: str
    """A sentence that says what is seen."""
    x_label: str
    """With `equal_aspect`, an empty label says that the axis has no meaning of its own: it is not drawn. So for y."""
    y_label: str
    series: tuple[Series, ...]
    references: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines: label -> y."""
    log_x: bool = False
    log_y: bool = False
    equal_aspect: bool = False
    panels: bool = False
    """Draw each series in a panel of its own, on the same axes."""


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured, and what it was held against.

    name: the analysis. claim: the claim of the paper, in a sentence, with its number in THEORY.md's table.
    measured: name -> number. Units are in the names' `conventions` (nats unless said).
    interval: name -> (low, high), 95% bootstrap over paths, for names of `measured`; exact numbers have none.
    null: name -> number: what the measured numbers are held against (a null model, or an exact reference). The
        report sets `r2.untrained` beside the measured `r2`, and a plain `untrained` beside the first, the headline.
    conventions: name -> what was chosen where a choice changes the numbers, and units.
    arrays: name -> array, everything that the figures show and that a user may want.
    figures: how to draw the arrays; the first of the first finding opens the report.
    verdict: one sentence, with the numbers, that says what this run shows.
    """

    name: str
    claim: str
    measured: Mapping[str, float]
    interval: Mapping[str, tuple[float, float]]
    null: Mapping[str, float]
    conventions: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    verdict: str = ""

    def __post_init__(self) -> None:
        if not self.null:
            raise ValueError(
                f"Finding {self.name!r}: expected a null or an exact reference beside the numbers, got none."
            )
        if stray := set(self.interval) - set(self.measured):
            raise ValueError(f"Finding {self.name!r}: intervals of what was not measured: {', '.join(sorted(stray))}.")
        for figure in self.figures:
            for series in figure.series:
                named = (series.x, series.y, series.low, series.high, series.colour, series.text, series.rows)
                if missing := [n for n in named if n is not None and n not in self.arrays]:
                    raise ValueError(f"Finding {self.name!r}, figure {figure.name!r}: no array {', '.join(missing)}.")

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON data, without its arrays and figures. Numbers that JSON lacks (NaN) are None."""

        def number(value: Any) -> float | None:
            return float(value) if value is not None and np.isfinite(value) else None

        return {
            "name": self.name,
            "claim": self.claim,
            "verdict": self.verdict,
            "measured": {k: number(v) for k, v in self.measured.items()},
            "interval": {k: [number(low), number(high)] for k, (low, high) in self.interval.items()},
            "null": {k: number(v) for k, v in self.null.items()},
            "conventions": dict(self.conventions),
        }


class Cell(NamedTuple):
    """A number of one run with its interval where it has one, or a text; nothing where the run has no such number."""

    value: float | str | None
    interval: tuple[float, float] | None = None


class Row(NamedTuple):
    """One quantity, of each run in turn. against: it is a null or an exact reference of the row above."""

    name: str
    cells: tuple[Cell, ...]
    against: bool = False


class Section(NamedTuple):
    """Rows that belong together, such as what one analysis measured; claim: what is said of them, or nothing."""

    name: str
    claim: str
    rows: tuple[Row, ...]


class Comparison(NamedTuple):
    """Runs side by side. notes: what a reader must know before comparing them, such as that their data differ."""

    names: tuple[str, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]
    arrays: Mapping[str, np.ndarray]
