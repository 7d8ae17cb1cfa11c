"""Figures in numbers: `lay_out` computes the panels, axes, marks and colours that both renderers draw.

Labels stay raw here. The renderers, `_paper` (matplotlib) and `_interactive` (plotly), escape them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxwalk.evidence.finding import Figure, Series
from jaxwalk.report._text import format_number, truncate

# The palette of Okabe and Ito, distinct for colour-blind readers, ordered by contrast with both a white and a dark
# background.
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Nulls and references are grey and dashed or hatched.
GREYS = ("#808080", "#6e6e6e", "#999999")


class Pattern(NamedTuple):
    """The dashes of a line and the hatching of a bar, in the notation of each library."""

    dash: tuple[float, ...]
    plotly_dash: str
    hatch: str
    plotly_hatch: str


PATTERNS = (
    Pattern((6, 3), "6px,3px", "////", "/"),
    Pattern((1.5, 2), "2px,3px", "....", "."),
    Pattern((7, 2.5, 1.5, 2.5), "8px,3px,2px,3px", "xxxx", "x"),
    Pattern((12, 4), "12px,4px", "----", "-"),
)


@dataclass(eq=False)
class Mark:
    """A series in numbers: positions on the axes, NaN where nothing is drawn. Hashed and compared by identity."""

    series: Series
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    rgb: np.ndarray | None = None
    """Colours [n, 3] of the points, from 0 to 1."""
    colour_values: np.ndarray | None = None
    """Numbers [n] that the points show on the colour scale of the figure."""
    text: np.ndarray | None = None
    hue: str = HUES[0]
    pattern: Pattern | None = None
    """None for solid lines and bars."""
    bar_width: float = 0.8
    """In units of the x axis."""

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The lower and the upper bounds, where the series has both."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def error_lengths(self) -> np.ndarray:
        """Lengths of the error bars below and above the values, [2, n]; 0 where the interval excludes the value."""
        if self.interval is None:
            return np.zeros((2, len(self.y)))
        low, high = self.interval
        return np.maximum(np.nan_to_num(np.stack([self.y - low, high - self.y])), 0)

    @property
    def diameter(self) -> float:
        """Diameter of the points, in typographic points; smaller the more points there are."""
        return float(np.clip(90 / math.sqrt(max(1, len(self.y))), 1.6, 6.0))

    @property
    def hex_colours(self) -> list[str] | None:
        """`rgb` as strings "#rrggbb", grey for NaN."""
        if self.rgb is None:
            return None
        rgb = np.nan_to_num(np.clip(self.rgb, 0, 1), nan=0.5)
        return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.round(255 * rgb).astype(int).tolist()]

    @property
    def cell_labels(self) -> np.ndarray | None:
        """Labels of the cells of a heatmap: its text, or else its numbers; None if there are too many to read."""
        if self.text is not None:
            return np.vectorize(lambda t: truncate(t, 8), otypes=[object])(self.text) if self.y.size <= 400 else None
        if self.y.size > 80:
            return None
        return np.array([[f"{v:.2g}" if math.isfinite(v) else "" for v in row] for row in self.y.tolist()])


@dataclass
class Axis:
    """An axis: its label, limits, scale and ticks."""

    label: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    """Whether all positions are integers, so that ticks between them would mean nothing."""
    ticks: tuple[tuple[float, str], ...] | None = None
    """Positions and labels; None leaves the choice to the renderer."""
    categorical: bool = False
    """Whether the ticks are names, which take no grid lines."""
    reverse: bool = False
    visible: bool = True

    def thinned_ticks(self, max_count: int) -> list[tuple[float, str]]:
        """Every n-th tick, so that there are at most `max_count`, with long labels truncated."""
        ticks = self.ticks or ()
        return [(at, truncate(name, 16)) for at, name in ticks[:: max(1, math.ceil(len(ticks) / max_count))]]


@dataclass
class Panel:
    """Marks that share a pair of axes."""

    title: str
    marks: list[Mark]
    x: Axis
    y: Axis


class Reference(NamedTuple):
    """A horizontal line."""

    label: str
    y: float
    hue: str
    pattern: Pattern


@dataclass
class Layout:
    """A figure in numbers, ready to be drawn."""

    figure: Figure
    panels: list[Panel]
    references: list[Reference]
    colour_range: tuple[float, float] | None
    """Limits of the colour scale; None if no numbers are shown as colours."""
    diverging: bool = False
    """Whether the colour scale is centred on zero."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know about how the values are drawn."""

    @property
    def is_heatmap(self) -> bool:
        """Whether the panels are heatmaps."""
        return any(m.series.style == "heatmap" for p in self.panels for m in p.marks)

    @property
    def legend_marks(self) -> list[Mark]:
        """The marks that the legend lists: none where panels have titles, or for one mark without references."""
        if len(self.panels) > 1:
            return []
        marks = [m for m in self.panels[0].marks if m.series.style != "heatmap"]
        return marks if len(marks) > 1 or self.references else []

    @property
    def colour_label(self) -> str:
        """The label of the colour bar: what the colours of the first series that has any stand for."""
        marks = [m for p in self.panels for m in p.marks if m.colour_values is not None]
        if marks:
            return (marks[0].series.colour or "").replace("_", " ")
        return self.panels[0].marks[0].series.label if len(self.panels) == 1 else ""

    def columns(self, max_columns: int) -> int:
        """The number of columns that fills the rows of panels most evenly."""
        n = len(self.panels)
        return math.ceil(n / math.ceil(n / max_columns))


def lay_out(figure: Figure, arrays: Mapping[str, np.ndarray]) -> Layout:
    """The layout of `figure`, whose series name their data in `arrays`.

    Raises:
        ValueError: if there are no series, heatmaps beside other series, or arrays whose shapes do not match.
    """
    if not figure.series:
        raise ValueError("expected at least one series, got none")
    heatmaps = [s for s in figure.series if s.style == "heatmap"]
    if heatmaps and len(heatmaps) < len(figure.series):
        raise ValueError("expected heatmaps alone in a figure, got other series beside them")
    notes: list[str] = []
    if heatmaps:
        panels = [_heatmap_panel(figure, s, arrays) for s in heatmaps]
    else:
        panels = _mark_panels(figure, arrays, notes)
    references = _style_marks(figure, panels)
    colour_range, diverging = _colour_scale(panels)
    return Layout(figure, panels, references, colour_range, diverging, notes)


# Heatmaps.


def _heatmap_panel(figure: Figure, series: Series, arrays: Mapping[str, np.ndarray]) -> Panel:
    cells = np.asarray(arrays[series.y], float)
    if cells.ndim != 2 or 0 in cells.shape:
        raise ValueError(f"{series.y}: expected [rows, columns], got shape {list(cells.shape)}")
    text = np.asarray(arrays[series.text], str) if series.text else None
    if text is not None and text.shape != cells.shape:
        raise ValueError(f"{series.text}: expected shape {list(cells.shape)}, got {list(text.shape)}")
    rows, columns = cells.shape
    x = _heatmap_axis(figure.x_label, series.x, columns, arrays)
    y = _heatmap_axis(figure.y_label, series.rows, rows, arrays)
    y.reverse = True
    mark = Mark(series, np.arange(columns, dtype=float), cells, text=text)
    return Panel(series.label, [mark], x, y)


def _heatmap_axis(label: str, array: str | None, size: int, arrays: Mapping[str, np.ndarray]) -> Axis:
    """The axis of `size` rows or columns, labelled by the array called `array`, or by their indices if it is None."""
    names = [str(i) for i in range(size)] if array is None else _names(np.asarray(arrays[array]))
    if len(names) != size:
        raise ValueError(f"{array}: expected {size} names, got {len(names)}")
    ticks = tuple((float(i), name) for i, name in enumerate(names))
    return Axis(label, -0.5, size - 0.5, ticks=ticks, categorical=array is not None)


def _names(values: np.ndarray) -> list[str]:
    return [format_number(v) if isinstance(v, float) else str(v) for v in values.ravel().tolist()]


# Lines, points and bars.


def _mark_panels(figure: Figure, arrays: Mapping[str, np.ndarray], notes: list[str]) -> list[Panel]:
    """One panel of all series, or one each with `figure.panels`, on the same axes. Adds to `notes`."""
    marks = [_read_mark(series, arrays) for series in figure.series]
    x, y = (
        Axis(label, log=log, visible=bool(label) or not figure.equal_aspect)
        for label, log in ((figure.x_label, figure.log_x), (figure.y_label, figure.log_y))
    )
    _place_on_x(x, marks, notes)
    bars = [m for m in marks if m.series.style == "bars"]
    if not figure.panels:
        _place_side_by_side(bars)
    if figure.log_y:
        _drop_nonpositive_y(marks, notes)
    bar_edges = [bar.x + side * bar.bar_width / 2 for bar in bars for side in (-1, 1)]
    _set_limits(x, [m.x for m in marks] + bar_edges)
    _set_y_limits(y, marks, figure.references, from_zero=bool(bars) and not figure.log_y)
    if figure.panels:
        return [Panel(m.series.label, [m], x, y) for m in marks]
    return [Panel("", marks, x, y)]


def _read_mark(series: Series, arrays: Mapping[str, np.ndarray]) -> Mark:
    """The mark of a line, points or bars, with x as in its array: numbers or names."""
    y = np.asarray(arrays[series.y], float)
    if y.ndim != 1:
        raise ValueError(f"{series.y}: expected one number for each x, got shape {list(y.shape)}")
    fields: dict[str, np.ndarray] = {}
    for key in ("x", "low", "high", "colour", "text"):
        name = getattr(series, key)
        if name is None:
            continue
        values = np.asarray(arrays[name])
        if values.shape != y.shape and not (key == "colour" and values.shape == (len(y), 3)):
            raise ValueError(f"{name}: expected {len(y)} values to go with {series.y}, got shape {list(values.shape)}")
        fields[key] = values
    mark = Mark(series, fields.get("x", np.arange(len(y))), y)
    if "low" in fields:
        mark.low = fields["low"].astype(float)
    if "high" in fields:
        mark.high = fields["high"].astype(float)
    if "colour" in fields:
        colour = fields["colour"].astype(float)
        mark.rgb, mark.colour_values = (None, colour) if colour.ndim == 1 else (colour, None)
    if "text" in fields:
        mark.text = fields["text"].astype(str)
    return mark


def _place_on_x(axis: Axis, marks: Sequence[Mark], notes: list[str]) -> None:
    """Replace the x values of `marks` by positions on `axis`, and set its ticks if they are names."""
    if any(m.series.style == "bars" or m.x.dtype.kind in "USO" for m in marks):
        axis.ticks, positions = _categories([m.x for m in marks])
        axis.categorical, axis.log = True, False
        for mark, x in zip(marks, positions, strict=True):
            mark.x = x
        return
    axis.integer = not axis.log and all(np.issubdtype(m.x.dtype, np.integer) for m in marks)
    for mark in marks:
        mark.x = mark.x.astype(float)
    if axis.log:
        _place_on_log_x(axis, marks, notes)


def _categories(xs: Sequence[np.ndarray]) -> tuple[tuple[tuple[float, str], ...], list[np.ndarray]]:
    """Ticks for the names in `xs`, and the positions of each array.

    A name has the same position in every array. Where it recurs within one array, each occurrence has its own.
    """
    slots: dict[tuple[str, int], int] = {}
    positions = []
    for x in xs:
        counts: dict[str, int] = {}
        places = []
        for name in _names(x):
            occurrence = counts[name] = counts.get(name, -1) + 1
            places.append(slots.setdefault((name, occurrence), len(slots)))
        positions.append(np.array(places, float))
    return tuple((float(i), name) for (name, _), i in slots.items()), positions


def _place_on_log_x(axis: Axis, marks: Sequence[Mark], notes: list[str]) -> None:
    """Place x = 0, the untrained step, to the left of the least positive x, and drop negative x."""
    x = np.concatenate([m.x for m in marks])
    positive = x[np.isfinite(x) & (x > 0)]
    if np.any(x == 0) and positive.size:
        least, most = float(np.min(positive)), float(np.max(positive))
        zero = least / max(2.0, (most / least) ** 0.12)
        axis.ticks = ((zero, "0"), *((tick, format_number(tick)) for tick in _decade_ticks(least, most)))
        for mark in marks:
            mark.x = np.where(mark.x == 0, zero, mark.x)
        notes.append("0 has a place of its own on the logarithmic axis.")
    for mark in marks:
        mark.x = np.where(mark.x > 0, mark.x, np.nan)


def _decade_ticks(least: float, most: float) -> list[float]:
    """The powers of ten from `least` to `most`, and these two where there is at most one power between them."""
    exponents = range(math.ceil(math.log10(least) - 1e-9), math.floor(math.log10(most) + 1e-9) + 1)
    decades = [10.0**e for e in exponents]
    return decades if len(decades) > 1 else sorted({least, *decades, most})


def _place_side_by_side(bars: Sequence[Mark]) -> None:
    """Shift and narrow the series of bars so that those of one name stand side by side."""
    for n, bar in enumerate(bars):
        bar.bar_width = 0.8 / len(bars)
        bar.x = bar.x + (n - (len(bars) - 1) / 2) * bar.bar_width


def _drop_nonpositive_y(marks: Sequence[Mark], notes: list[str]) -> None:
    """Drop what a logarithmic y axis cannot show, and note how many values; cut bands at half of the least y."""
    positive = np.concatenate([m.y for m in marks])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    floor = float(np.min(positive)) / 2 if positive.size else 1.0
    dropped = sum(int(np.sum(m.y <= 0)) for m in marks)
    if dropped:
        notes.append(f"Not drawn on the logarithmic axis: {dropped} value{'s' if dropped > 1 else ''} at or below 0.")
    for mark in marks:
        mark.y = np.where(mark.y > 0, mark.y, np.nan)
        if mark.low is not None:
            mark.low = np.where(mark.low < floor, np.minimum(floor, mark.y), mark.low)
        if mark.high is not None:
            mark.high = np.where(mark.high > 0, mark.high, np.nan)


# Limits and ticks.


def _set_y_limits(axis: Axis, marks: Sequence[Mark], references: Mapping[str, float], *, from_zero: bool) -> None:
    """Set the limits of the y axis to what the marks and references span, and to zero with `from_zero`."""
    values = [a for m in marks for a in (m.y, m.low, m.high) if a is not None]
    values += [np.array([y], float) for y in references.values()]
    if from_zero:
        values.append(np.zeros(1))
    _set_limits(axis, values)
    if from_zero and min(np.nanmin(v, initial=0) for v in values) >= 0:
        axis.low = 0.0  # no margin below bars


def _set_limits(axis: Axis, values: Sequence[np.ndarray]) -> None:
    """Set the limits of `axis` to the range of `values` with a margin, and the ticks if the scale is logarithmic."""
    points = np.concatenate([np.ravel(v) for v in values])
    points = points[np.isfinite(points) & (points > 0 if axis.log else True)]
    if not points.size:
        axis.low, axis.high = (1.0, 10.0) if axis.log else (0.0, 1.0)
        return
    if axis.log:
        points = np.log10(points)
    low, high = float(np.min(points)), float(np.max(points))
    margin = 0.04 * (high - low) or (0.3 if axis.log else 0.05 * abs(low) or 0.5)
    low, high = low - margin, high + margin
    axis.low, axis.high = (10**low, 10**high) if axis.log else (low, high)
    if axis.log and axis.ticks is None:
        axis.ticks = _log_ticks(low, high)


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Ticks from 10^low to 10^high: powers of ten if there are more than two, else also their double and quintuple."""
    stride = max(1, math.ceil((high - low) / 7))
    ticks = [10.0**e * m for e in range(math.floor(low), math.ceil(high) + 1, stride) for m in (1, 2, 5)]
    ticks = [t for t in ticks if 10**low <= t <= 10**high]
    decades = [t for t in ticks if math.log10(t) == round(math.log10(t))]
    return tuple((t, format_number(t)) for t in (decades if len(decades) > 2 else ticks))


# Colours.


def _style_marks(figure: Figure, panels: Sequence[Panel]) -> list[Reference]:
    """Set the hues and patterns of all marks, and return the reference lines, with the greys that follow theirs."""
    hues = itertools.cycle(HUES)
    null_styles: Iterator[tuple[str, Pattern]] = zip(itertools.cycle(GREYS), itertools.cycle(PATTERNS), strict=False)
    for mark in (m for p in panels for m in p.marks):
        if mark.series.dashed:
            mark.hue, mark.pattern = next(null_styles)
        elif mark.rgb is None:
            mark.hue = HUES[0] if len(panels) > 1 else next(hues)
    return [
        Reference(label, float(y), hue, pattern)
        for (label, y), (hue, pattern) in zip(figure.references.items(), null_styles, strict=False)
        if math.isfinite(y)
    ]


def _colour_scale(panels: Sequence[Panel]) -> tuple[tuple[float, float] | None, bool]:
    """The range of the numbers that are shown as colours, and whether it is centred on zero: if they have two signs."""
    marks = [m for p in panels for m in p.marks]
    values = [m.y if m.series.style == "heatmap" else m.colour_values for m in marks]
    arrays = [np.ravel(v) for v in values if v is not None]
    if not arrays:
        return None, False
    numbers = np.concatenate(arrays)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return (0.0, 1.0), False
    low, high = float(np.min(numbers)), float(np.max(numbers))
    if low < 0 < high:
        limit = max(-low, high)
        return (-limit, limit), True
    return ((low - 0.5, high + 0.5) if low == high else (low, high)), False
