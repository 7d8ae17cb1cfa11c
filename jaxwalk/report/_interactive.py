"""Figures for the page, as JSON data that plotly.js draws; the plotly library is not needed here.

The page's script draws each figure in one of two layouts, for a wide and for a narrow window.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxwalk.report._layout import Axis, Layout, Mark, Panel
from jaxwalk.report._text import escape_plotly, format_interval, format_number

Json = dict[str, Any]

# matplotlib's RdBu_r. Plotly's own RdBu has other colours.
_DIVERGING_SCALE = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]]


def interactive_figure(layout: Layout) -> Json:
    """`layout` for plotly.js: the traces as `data`, and the layouts `wide` and `narrow`."""
    traces = [trace for index in range(len(layout.panels)) for trace in _panel_traces(layout, index)]
    return {"data": traces, "wide": _page_layout(layout, narrow=False), "narrow": _page_layout(layout, narrow=True)}


def _numbers(array: np.ndarray) -> list[float | None]:
    """The elements of `array` to six significant digits, None for NaN and infinities."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in array.tolist()]


def _axis_suffix(index: int) -> str:
    """What plotly appends to "x", "y", "xaxis" and "yaxis" for the panel `index`."""
    return "" if index == 0 else str(index + 1)


# Traces.


def _panel_traces(layout: Layout, index: int) -> Iterator[Json]:
    panel, suffix = layout.panels[index], _axis_suffix(index)
    axes = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    legend_marks = layout.legend_marks
    for n, mark in enumerate(panel.marks):
        legend = {
            "name": escape_plotly(mark.series.label, 44),
            "legendgroup": f"{index}.{n}",
            "showlegend": mark in legend_marks,
        }
        for trace in _mark_traces(layout, panel, mark):
            yield {**legend, **axes, **trace}
    for n, reference in enumerate(layout.references):
        yield {
            "type": "scatter",
            "mode": "lines",
            "x": _numbers(np.array([panel.x.low, panel.x.high])),
            "y": _numbers(np.array([reference.y, reference.y])),
            "name": escape_plotly(f"{reference.label} = {format_number(reference.y)}", 44),
            "legendgroup": f"reference {n}",
            "showlegend": index == 0,
            "hoverinfo": "name",
            "line": {"color": reference.hue, "width": 1.6, "dash": reference.pattern.plotly_dash},
            **axes,
        }


def _mark_traces(layout: Layout, panel: Panel, mark: Mark) -> Iterator[Json]:
    """The traces of one mark: a line with an interval has a second one, of the band below it."""
    style = mark.series.style
    if style == "heatmap":
        yield _heatmap_trace(panel, mark)
        return
    if style == "line" and mark.interval is not None:
        yield _band_trace(mark, *mark.interval)
    trace = {"x": _numbers(mark.x), "y": _numbers(mark.y), **_hover(panel, mark)}
    if style == "bars":
        trace |= _bar_style(mark)
    elif style == "points":
        trace |= _point_style(layout, mark)
    else:
        trace |= _line_style(mark)
    if style != "line" and mark.interval is not None:
        trace["error_y"] = _error_bars(mark)
    yield trace


def _hover(panel: Panel, mark: Mark) -> Json:
    """What is shown at the pointer: the mark's text, or else its label, position and interval."""
    if mark.text is not None:
        return {"text": [escape_plotly(t, 60) for t in mark.text.tolist()], "hovertemplate": "%{text}<extra></extra>"}
    if len(mark.y) > 1500:  # a text for each point would make the page large
        return {"hovertemplate": "%{x:.4~g}, %{y:.4~g}<extra></extra>"}
    x_label, y_label = _axis_labels(panel)
    texts = []
    for i, position in enumerate(_position_names(panel.x, mark.x)):
        y = format_number(mark.y[i])
        if mark.interval is not None:
            low, high = mark.interval
            y += f"  {format_interval((low[i], high[i]))}"
        lines = [escape_plotly(mark.series.label, 60), f"{x_label}: {escape_plotly(position)}", f"{y_label}: {y}"]
        texts.append("<br>".join(lines))
    return {"text": texts, "hovertemplate": "%{text}<extra></extra>"}


def _axis_labels(panel: Panel) -> tuple[str, str]:
    return escape_plotly(panel.x.label) or "x", escape_plotly(panel.y.label) or "y"


def _position_names(axis: Axis, x: np.ndarray) -> list[str]:
    """The categories, or the numbers, at the positions `x` on `axis`."""
    if axis.categorical:
        names = dict(axis.ticks or ())
        # Bars that stand side by side are shifted from the position of their category.
        return [names.get(float(np.round(v)), "") for v in x.tolist()]
    zero = axis.ticks[0][0] if axis.ticks and axis.ticks[0][1] == "0" else None
    return ["0" if v == zero else format_number(v) for v in x.tolist()]


def _bar_style(mark: Mark) -> Json:
    marker: Json = {"color": mark.hue}
    if mark.pattern is not None:
        marker["pattern"] = {
            "shape": mark.pattern.plotly_hatch,
            "fgcolor": mark.hue,
            "bgcolor": "rgba(128,128,128,.25)",
            "size": 6,
        }
    return {"type": "bar", "width": round(mark.bar_width * 0.94, 4), "textposition": "none", "marker": marker}


def _point_style(layout: Layout, mark: Mark) -> Json:
    point_count = sum(len(m.y) for p in layout.panels for m in p.marks if m.series.style == "points")
    marker: Json = {
        "size": round(1.25 * mark.diameter, 2),
        "color": mark.hex_colours or mark.hue,
        "line": {"width": 0},
    }
    if mark.colour_values is not None:
        marker |= {"color": _numbers(mark.colour_values), "coloraxis": "coloraxis"}
    # WebGL draws many points faster, but browsers limit how many figures may use it.
    return {"type": "scattergl" if point_count > 1500 else "scatter", "mode": "markers", "marker": marker}


def _line_style(mark: Mark) -> Json:
    with_markers = len(mark.y) == 1 or (len(mark.y) <= 24 and mark.pattern is None)
    return {
        "type": "scatter",
        "mode": "lines+markers" if with_markers else "lines",
        "line": {
            "color": mark.hue,
            "width": 2,
            "dash": "solid" if mark.pattern is None else mark.pattern.plotly_dash,
        },
        "marker": {"size": 5, "color": mark.hue},
    }


def _error_bars(mark: Mark) -> Json:
    below, above = mark.error_lengths
    return {
        "type": "data",
        "symmetric": False,
        "array": _numbers(above),
        "arrayminus": _numbers(below),
        "thickness": 1.3,
        "width": 4,
        "color": "#808080",
    }


def _band_trace(mark: Mark, low: np.ndarray, high: np.ndarray) -> Json:
    """The band around a line: closed outlines, one for each stretch without gaps, with None between them."""
    complete = np.isfinite(mark.x) & np.isfinite(low) & np.isfinite(high)
    x: list[float | None] = []
    y: list[float | None] = []
    for is_complete, stretch in itertools.groupby(range(len(complete)), key=lambda i: bool(complete[i])):
        if is_complete:
            i = np.array(list(stretch))
            x += [*([None] if x else []), *_numbers(np.concatenate([mark.x[i], mark.x[i][::-1]]))]
            y += [*([None] if y else []), *_numbers(np.concatenate([low[i], high[i][::-1]]))]
    red, green, blue = (int(mark.hue[k : k + 2], 16) for k in (1, 3, 5))
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},.2)",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _heatmap_trace(panel: Panel, mark: Mark) -> Json:
    x_label, y_label = _axis_labels(panel)
    columns, rows = (dict(axis.ticks or ()) for axis in (panel.x, panel.y))
    hover = []
    for r, row in enumerate(mark.y.tolist()):
        texts = []
        for c, value in enumerate(row):
            text = (
                f"{y_label}: {escape_plotly(rows[r])}<br>{x_label}: {escape_plotly(columns[c])}"
                f"<br>{format_number(value)}"
            )
            texts.append(text if mark.text is None else f"{escape_plotly(mark.text[r, c])}<br>{text}")
        hover.append(texts)
    trace: Json = {
        "type": "heatmap",
        "z": [_numbers(row) for row in mark.y],
        "x": list(range(mark.y.shape[1])),
        "y": list(range(mark.y.shape[0])),
        "coloraxis": "coloraxis",
        "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    labels = mark.cell_labels
    if labels is not None:
        trace |= {"text": [[escape_plotly(t) for t in row] for row in labels.tolist()], "texttemplate": "%{text}"}
    return trace


# Layouts.


@dataclass(frozen=True)
class _Grid:
    """The arrangement of the panels; lengths are shares of the plotting area unless they are in pixels."""

    columns: int
    rows: int
    panel_height: float
    """In pixels, where the aspect does not determine it."""
    aspect: float | None
    """Height by width, where both axes have the same unit."""
    bare: bool
    """Whether the axes are invisible, so that panels need little space between them."""
    gap_x: float
    gap_in_heights: float
    """The gap between rows, as a share of a panel's height. It holds the tick labels, the axis label and the title."""

    @property
    def gap_y(self) -> float:
        return self.gap_in_heights / (self.rows + (self.rows - 1) * self.gap_in_heights)

    @property
    def width(self) -> float:
        return (1 - self.gap_x * (self.columns - 1)) / self.columns

    @property
    def height(self) -> float:
        return (1 - self.gap_y * (self.rows - 1)) / self.rows

    def corner(self, index: int) -> tuple[float, float]:
        """The left and the top edge of a panel; y points up."""
        row, column = divmod(index, self.columns)
        return column * (self.width + self.gap_x), 1 - row * (self.height + self.gap_y)


def _grid(layout: Layout, *, narrow: bool) -> _Grid:
    count, first = len(layout.panels), layout.panels[0]
    if narrow:
        max_columns = 1 if not layout.figure.equal_aspect or count <= 3 else 2
    else:
        max_columns = 4 if count == 4 else 3
    columns = layout.columns(max_columns)
    bare = not (first.x.visible or first.y.visible)
    aspect = None
    if layout.figure.equal_aspect and not layout.is_heatmap:
        aspect = float(np.clip((first.y.high - first.y.low) / (first.x.high - first.x.low), 0.3, 1.6))
    height: float = (240 if narrow else 300) if count > 1 else (320 if narrow else 380)
    if layout.is_heatmap:
        cells = max(len(m.y) for p in layout.panels for m in p.marks)
        height = float(np.clip(22 * cells + 70, 180, 560))
    return _Grid(
        columns=columns,
        rows=math.ceil(count / columns),
        panel_height=height,
        aspect=aspect,
        bare=bare,
        gap_x=0.03 if bare else (0.12 if layout.is_heatmap else 0.07),
        gap_in_heights=(36 if bare else 96 if layout.is_heatmap else 72) / height,
    )


def _page_layout(layout: Layout, *, narrow: bool) -> Json:
    grid = _grid(layout, narrow=narrow)
    has_titles = len(layout.panels) > 1
    result = _base_layout(layout, grid, narrow=narrow, has_titles=has_titles)
    for index, panel in enumerate(layout.panels):
        suffix = _axis_suffix(index)
        result[f"xaxis{suffix}"], result[f"yaxis{suffix}"] = _panel_axes(layout, grid, index, narrow=narrow)
        if has_titles:
            result["annotations"].append(_panel_title(panel, grid, index))
    if layout.colour_range is not None:
        result["coloraxis"] = _colour_axis(layout, *layout.colour_range, narrow=narrow)
    return result


def _base_layout(layout: Layout, grid: _Grid, *, narrow: bool, has_titles: bool) -> Json:
    """The layout without its axes: margins, legend, and under `meta` the numbers that the page's script reads."""
    has_legend = bool(layout.legend_marks or layout.references)
    has_bar_on_top = narrow and layout.colour_range is not None
    top = (30 if has_titles else 12) + (26 if has_legend and has_titles else 0) + (44 if has_bar_on_top else 0)
    legend = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "itemsizing": "constant",
    }
    if has_titles:
        legend |= {"yref": "container", "y": 1, "yanchor": "top"}
    return {
        # The script computes the height of the figure from the width of the window.
        "meta": {
            "columns": grid.columns,
            "rows": grid.rows,
            "aspect": grid.aspect,
            "height": grid.panel_height,
            "bare": grid.bare,
            "gap": grid.gap_x,
            "between": grid.gap_in_heights,
            "cells": grid.columns * max(_cell_labels_width(m) for p in layout.panels for m in p.marks),
        },
        "barmode": "overlay",
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8 if grid.bare else 12, "r": 12, "t": top, "b": 10},
        "legend": legend,
        "showlegend": has_legend,
        "annotations": [],
    }


def _cell_labels_width(mark: Mark) -> int:
    """The pixels that the labels of a heatmap's cells need, side by side; 0 without labels."""
    labels = mark.cell_labels if mark.series.style == "heatmap" else None
    return 0 if labels is None else 8 * labels.shape[1] * max(map(len, labels.ravel()), default=0)


def _panel_axes(layout: Layout, grid: _Grid, index: int, *, narrow: bool) -> tuple[Json, Json]:
    """The x and y axis of one panel. Except in heatmaps, all panels zoom together, and only the outer are labelled."""
    panel, suffix = layout.panels[index], _axis_suffix(index)
    left, top = grid.corner(index)
    row, column = divmod(index, grid.columns)
    max_x_ticks = (8 if narrow else 24) // (1 if grid.columns == 1 or narrow else 2)
    x, y = _plotly_axis(panel.x, max_x_ticks), _plotly_axis(panel.y, 24)
    x |= {"anchor": f"y{suffix}", "domain": [round(left, 5), round(min(1.0, left + grid.width), 5)]}
    y |= {"anchor": f"x{suffix}", "domain": [round(max(0.0, top - grid.height), 5), round(top, 5)]}
    follows_first = index > 0 and not layout.is_heatmap
    if grid.aspect:
        x["constrain"] = "domain"
        if not follows_first:
            y |= {"scaleanchor": f"x{suffix}", "scaleratio": 1}
        y["constrain"] = "domain"
    if follows_first:
        x["matches"] = "x"
        y["matches"] = "y"
    if not layout.is_heatmap and column:
        y["title"] = {"text": ""}
    if not layout.is_heatmap and row < grid.rows - 1 and index + grid.columns < len(layout.panels):
        x["title"] = {"text": ""}
    return x, y


def _plotly_axis(axis: Axis, max_ticks: int) -> Json:
    limits = [math.log10(axis.low), math.log10(axis.high)] if axis.log else [axis.low, axis.high]
    result: Json = {
        "type": "log" if axis.log else "linear",
        "range": limits[::-1] if axis.reverse else limits,
        "title": {"text": escape_plotly(axis.label, 44), "standoff": 8},
        "automargin": True,
        "gridcolor": "rgba(128,128,128,.22)",
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "visible": axis.visible,
    }
    if axis.ticks is not None:
        ticks = axis.thinned_ticks(max_ticks)
        result["tickvals"] = [position for position, _ in ticks]
        result["ticktext"] = [escape_plotly(label) for _, label in ticks]
        result["showgrid"] = not axis.categorical
    elif axis.integer:
        result |= {"tick0": 0, "dtick": _integer_step(axis.high - axis.low, max_ticks)}
    return result


def _integer_step(length: float, max_ticks: int) -> int:
    """The least of the integers 1, 2 and 5, times powers of ten, that has at most `max_ticks` / 2 steps in `length`."""
    power = max(1, 10 ** math.floor(math.log10(max(1.0, length))))
    steps = (power // 5, power // 2, power, 2 * power, 5 * power)
    return next(step for step in steps if step and length / step <= max_ticks / 2)


def _panel_title(panel: Panel, grid: _Grid, index: int) -> Json:
    left, top = grid.corner(index)
    return {
        "text": f"<b>{escape_plotly(panel.title, 40)}</b>",
        "x": round(left + grid.width / 2, 5),
        "y": round(top, 5),
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "yshift": 3,
        "showarrow": False,
        "font": {"size": 13},
    }


def _colour_axis(layout: Layout, low: float, high: float, *, narrow: bool) -> Json:
    """The colour scale from `low` to `high`, with its bar on the right, or on top in a narrow window."""
    bar: Json = {
        "thickness": 12,
        "outlinewidth": 0,
        "title": {"text": escape_plotly(layout.colour_label, 30), "side": "right"},
    }
    if narrow:
        bar |= {
            "orientation": "h",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "ypad": 0,
            "title": {"text": ""},
            "len": 0.9,
        }
    return {
        "cmin": low,
        "cmax": high,
        "colorscale": _DIVERGING_SCALE if layout.diverging else "Viridis",
        "colorbar": bar,
    }
