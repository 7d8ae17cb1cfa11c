"""Figures for print, PNG and SVG, drawn with matplotlib.

pyplot is not used, so that there are no windows and no global state. matplotlib is imported when a figure is drawn.
"""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxwalk.report._layout import Axis, Layout, Mark, Panel, Pattern, Reference
from jaxwalk.report._text import escape_unprintable, format_number

_INK = "#24292f"
_RC_PARAMS: Any = {
    "text.parse_math": False,  # tokens may contain dollar signs
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": "#8c959f",
    "axes.linewidth": 0.8,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxwalk",
}
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"dpi": 160},
    "svg": {"dpi": 200, "metadata": {"Date": None}},  # no date, so that equal figures give equal files
}

Escape = Callable[[object], str]


def draw(layout: Layout) -> Any:
    """`layout` as a `matplotlib.figure.Figure`, for `save`."""
    import matplotlib

    with matplotlib.rc_context(_RC_PARAMS):
        canvas = _draw_figure(layout, _font_escape())
        # The constrained layout is computed once, for all formats.
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")
    return canvas


def save(canvas: Any, file: Path, file_format: str) -> None:
    """Write a figure from `draw` to `file`, in one of `FORMATS`."""
    import matplotlib

    with matplotlib.rc_context(_RC_PARAMS):
        canvas.savefig(file, format=file_format, **FORMATS[file_format])


def _font_escape() -> Escape:
    """A function that writes unprintable characters, and those the font lacks, as backslash escapes."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()

    def escape(text: object) -> str:
        printable = escape_unprintable(text)
        return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in printable)

    return escape


# The figure.


def _draw_figure(layout: Layout, escape: Escape) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = layout.columns(4)
    rows = math.ceil(len(layout.panels) / columns)
    width, row_height = _size(layout, columns)
    canvas = Canvas(figsize=(width, 0), layout="constrained")
    FigureCanvasAgg(canvas)
    title = textwrap.fill(escape(layout.figure.title), int(width * 10.5))
    canvas.set_size_inches(width, rows * row_height + 0.22 * (title.count("\n") + 1) + 0.2)
    canvas.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    grid = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(layout.panels) :]:
        axes.set_axis_off()
    artists: dict[Mark, Any] = {}
    for n, axes in enumerate(grid[: len(layout.panels)]):
        artists |= _draw_panel(axes, layout, n, columns, width / columns, escape)
    _draw_legend(canvas, grid[0], layout, artists, width, escape)
    _draw_colour_bar(canvas, grid, layout, artists, escape)
    return canvas


def _size(layout: Layout, columns: int) -> tuple[float, float]:
    """The width of the figure and the height of one row of panels, in inches."""
    width = 6.6 if columns == 1 else min(3.1 * columns, 10.5)
    if layout.figure.equal_aspect:
        return (5.2, 4.8) if columns == 1 else (width, width / columns + 0.1)
    if layout.is_heatmap:
        cells = max(len(m.y) for p in layout.panels for m in p.marks)
        return width, float(np.clip(0.26 * cells + 1.0, 2.2, 6.0))
    return width, 3.5 if columns == 1 else 2.6


def _draw_panel(axes: Any, layout: Layout, index: int, columns: int, inches: float, escape: Escape) -> dict[Mark, Any]:
    """Draw the panel `index`, `inches` wide, and return the artist of each mark."""
    panel = layout.panels[index]
    if panel.title and len(layout.panels) > 1:
        axes.set_title(textwrap.fill(escape(panel.title), max(20, int(inches * 15))), fontsize=9)
    artists = {mark: _draw_mark(axes, layout, mark, escape) for mark in panel.marks}
    _draw_axes(axes, panel, inches, escape)
    if layout.figure.equal_aspect and not layout.is_heatmap:
        axes.set_aspect("equal", adjustable="box")
    if not layout.is_heatmap:  # panels have the same axes: label only the outer ones
        axes.xaxis.label.set_visible(index + columns >= len(layout.panels))
        axes.yaxis.label.set_visible(index % columns == 0)
    for reference in layout.references:
        axes.axhline(reference.y, **_reference_style(reference), zorder=1.5)
    return artists


def _reference_style(reference: Reference) -> dict[str, Any]:
    return {"color": reference.hue, "linewidth": 1.2, "linestyle": _line_style(reference.pattern)}


def _line_style(pattern: Pattern | None) -> Any:
    return "-" if pattern is None else (0, pattern.dash)


def _draw_legend(
    canvas: Any, first_axes: Any, layout: Layout, artists: dict[Mark, Any], width: float, escape: Escape
) -> None:
    handles = [artists[mark] for mark in layout.legend_marks]
    labels = [escape(mark.series.label) for mark in layout.legend_marks]
    for reference in layout.references:
        handles += first_axes.plot([], [], **_reference_style(reference))
        labels.append(f"{escape(reference.label)} = {format_number(reference.y)}")
    if not handles:
        return
    longest = max(map(len, labels))
    canvas.legend(
        handles,
        # matplotlib leaves labels that start with an underscore out of the legend, so a space goes before them.
        [f" {label}" if label.startswith("_") else textwrap.fill(label, int(width * 14)) for label in labels],
        loc="outside lower center",
        ncols=max(1, min(len(handles), int(width * 13 / (longest + 7)))),
        fontsize=8.5,
    )


def _draw_colour_bar(canvas: Any, grid: Any, layout: Layout, artists: dict[Mark, Any], escape: Escape) -> None:
    marks = [m for p in layout.panels for m in p.marks]
    coloured = [m for m in marks if m.series.style == "heatmap" or m.colour_values is not None]
    if not coloured:
        return
    bar = canvas.colorbar(artists[coloured[-1]], ax=list(grid), shrink=0.9, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(escape(layout.colour_label), fontsize=8.5)


# Axes.


def _draw_axes(axes: Any, panel: Panel, inches: float, escape: Escape) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    _draw_axis(axes, "x", panel.x, inches, escape)
    _draw_axis(axes, "y", panel.y, inches, escape)
    axes.set_xlabel(textwrap.fill(escape(panel.x.label), max(16, int(inches * 11))))
    axes.set_ylabel(textwrap.fill(escape(panel.y.label), 34))


def _draw_axis(axes: Any, name: str, axis: Axis, inches: float, escape: Escape) -> None:
    """Set the scale, ticks and limits of one axis, "x" or "y", of a panel that is `inches` wide."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    target = axes.xaxis if name == "x" else axes.yaxis
    if axis.log:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        target.set_minor_locator(NullLocator())
    elif axis.integer:
        target.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    if axis.ticks is not None:
        ticks = axis.thinned_ticks(32 if inches > 5 else 16)
        labels = [escape(label) for _, label in ticks]
        target.set_ticks([position for position, _ in ticks], labels)
        if name == "x" and sum(map(len, labels)) > inches * 9:
            _rotate_tick_labels(axes, vertical=len(ticks) > 12)
        if axis.categorical:
            target.grid(False)
    (axes.set_xlim if name == "x" else axes.set_ylim)(
        *((axis.high, axis.low) if axis.reverse else (axis.low, axis.high))
    )
    if not axis.visible:
        target.set_visible(False)
        axes.spines["bottom" if name == "x" else "left"].set_visible(False)


def _rotate_tick_labels(axes: Any, *, vertical: bool) -> None:
    axes.xaxis.set_tick_params(rotation=90 if vertical else 40)
    for label in axes.get_xticklabels():
        label.set(ha="center" if vertical else "right", rotation_mode="default" if vertical else "anchor")


# Marks. Each function returns the artist that the legend or the colour bar refers to.


def _draw_mark(axes: Any, layout: Layout, mark: Mark, escape: Escape) -> Any:
    if mark.series.style == "heatmap":
        return _draw_heatmap(axes, layout, mark, escape)
    if mark.series.style == "points":
        return _draw_points(axes, layout, mark)
    if mark.series.style == "bars":
        return _draw_bars(axes, mark)
    return _draw_line(axes, mark)


def _draw_points(axes: Any, layout: Layout, mark: Mark) -> Any:
    style: dict[str, Any] = {"c": mark.hex_colours or mark.hue}
    if mark.colour_values is not None and layout.colour_range:
        low, high = layout.colour_range
        style = {"c": mark.colour_values, "cmap": _colour_map(layout), "vmin": low, "vmax": high}
    diameter = mark.diameter * (1 if len(layout.panels) == 1 else 0.8)
    rasterized = len(mark.y) > 200  # an SVG with a path for each of many points is slow to show
    points = axes.scatter(mark.x, mark.y, s=diameter**2, linewidths=0, rasterized=rasterized, zorder=2.5, **style)
    if mark.interval is not None:
        axes.errorbar(mark.x, mark.y, yerr=mark.error_lengths, fmt="none", ecolor=mark.hue, elinewidth=0.9)
    return points


def _draw_bars(axes: Any, mark: Mark) -> Any:
    style = {"color": mark.hue}
    if mark.pattern is not None:
        style = {"hatch": mark.pattern.hatch, "facecolor": "#e3e3e3", "edgecolor": mark.hue}
    bars = axes.bar(mark.x, mark.y, mark.bar_width * 0.94, **style, zorder=2)
    if mark.interval is not None:
        axes.errorbar(mark.x, mark.y, yerr=mark.error_lengths, fmt="none", ecolor=_INK, elinewidth=1.0, capsize=2.5)
    return bars


def _draw_line(axes: Any, mark: Mark) -> Any:
    marker = "o" if len(mark.y) <= 24 and mark.pattern is None else ""
    if len(mark.y) == 1 and not marker:
        marker = "D"
    (line,) = axes.plot(
        mark.x,
        mark.y,
        color=mark.hue,
        linestyle=_line_style(mark.pattern),
        linewidth=1.6,
        marker=marker,
        markersize=3.2,
    )
    if mark.interval is not None:
        axes.fill_between(mark.x, *mark.interval, color=mark.hue, alpha=0.18, linewidth=0)
    return line


def _draw_heatmap(axes: Any, layout: Layout, mark: Mark, escape: Escape) -> Any:
    low, high = layout.colour_range or (0.0, 1.0)
    image = axes.imshow(mark.y, cmap=_colour_map(layout), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.grid(False)
    labels = mark.cell_labels
    columns = mark.y.shape[1]
    # Omit labels that would overlap: a panel is about 330 points wide, a character 0.6 of a font size of 3.5 points.
    if labels is None or 330 / columns < 0.6 * 3.5 * max(map(len, labels.ravel())):
        return image
    size = float(np.clip(90 / columns, 4, 8.5))
    for (row, column), label in np.ndenumerate(labels):
        value = (mark.y[row, column] - low) / (high - low)
        dark = abs(value - 0.5) > 0.3 if layout.diverging else value < 0.6
        axes.text(
            column,
            row,
            escape(label),
            ha="center",
            va="center",
            fontsize=size,
            color="white" if dark else "black",
        )
    return image


def _colour_map(layout: Layout) -> str:
    return "RdBu_r" if layout.diverging else "viridis"
