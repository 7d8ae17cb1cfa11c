"""Findings, told: a terminal table, `findings.json`, arrays, figures for paper, and one page that needs no network.

    print(table(findings, skipped))
    written = write(findings, skipped, "runs/mess3/analysis", title="mess3", facts={"steps": "2000"})

A `Figure` says what is seen, not how it is drawn. It is laid out once, in numbers (`_lay_out`), and two short
renderers draw the same layout: matplotlib for PNG and SVG (`_paper`), plotly for the page (`_interactive`).

Names, labels and tokens are untrusted text. They stay raw in the layout and meet their escape where they are
written: `_visible` everywhere (nothing unprintable leaves this file), then `_html` or `_pseudo` (plotly renders
a dialect of HTML in its labels); in matplotlib nothing is parsed as mathematics. The page forbids itself, by its
content security policy, every request and every script but its own.

Neither plotting library is needed to import this file, nor for the table, the JSON and the arrays.
"""

import base64
import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxwalk.evidence.finding import Cell, Comparison, Figure, Finding, Series

INSTALL = "pip install 'jaxwalk[report]'"
OPENING = "belief_geometry"
"""The analysis whose first figure opens the page, where it was run."""


class Written(NamedTuple):
    """What `write` wrote, by the path below the folder ("figures/x.png"), and what it could not, in sentences."""

    paths: dict[str, Path]
    notices: tuple[str, ...]


# Text and numbers.


def _visible(text: object) -> str:
    """`text` with what cannot be printed (control and format characters, lone surrogates) as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _html(text: object) -> str:
    return html.escape(_visible(text), quote=True)


def _pseudo(text: object, width: int | None = None) -> str:
    """`text` for a label that plotly draws, where tags and entities mean something; wrapped at `width` characters."""
    lines = [_visible(text)] if width is None else textwrap.wrap(_visible(text), width) or [""]
    # A dollar sign would ask plotly for mathematics.
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in lines)


def _cut(text: str, most: int) -> str:
    """`text`, visible, and cut where it is longer than `most` characters."""
    text = _visible(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _number(value: Any) -> str:
    """Four significant digits, whole numbers in full, and a dash where there is no number."""
    if value is None or math.isnan(value := float(value)):
        return "-"
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:.0f}" if value else "0"
    return f"{value:.4g}"


def _interval(bounds: Sequence[Any] | None) -> str:
    return "" if bounds is None else f"[{_number(bounds[0])}, {_number(bounds[1])}]"


class _Row(NamedTuple):
    """A measured number and the nulls of its own; or, with an empty name, the nulls of the whole finding."""

    name: str
    value: str
    interval: str
    nulls: list[tuple[str, str]]


def _rows(finding: Finding) -> list[_Row]:
    """What was measured, each with what it is held against: a null `r2.untrained` belongs to the measured `r2`, a
    plain `untrained` to the first number, which is the headline."""
    rows = {k: _Row(k, _number(v), _interval(finding.interval.get(k)), []) for k, v in finding.measured.items()}
    whole = _Row("", "", "", [])
    for name, value in finding.null.items():
        parts = name.split(".")
        heads = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        owner = next((head for head in heads if head in rows), None)
        if owner is not None:
            rows[owner].nulls.append((name[len(owner) + 1 :], _number(value)))
        else:
            row = next(iter(rows.values()), whole) if len(parts) == 1 else whole
            row.nulls.append((name, _number(value)))
    return [*rows.values(), *([whole] if whole.nulls else [])]


def _plain(value: Any) -> Any:
    """Any value as strict JSON data: numpy as Python, numbers that JSON lacks as None, the unknown as text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# The terminal.


def table(findings: Iterable[Finding], skipped: Mapping[str, str] = {}, *, width: int | None = None) -> str:
    """The findings as text: each claim and verdict, then every number with its interval and what it is held against.

    skipped: analysis -> why it was not run. width: columns of the terminal, by default its own.
    """
    width = max(40, shutil.get_terminal_size((100, 24)).columns if width is None else width)
    findings = tuple(findings)
    blocks = [_table_of(finding, min(width, 120)) for finding in findings]
    if findings:
        blocks.append("vs: the null, or the exact reference, that the numbers are held against.")
    if skipped:
        lines = ["not run"]
        for name, reason in skipped.items():
            lines += _hanging(f"  {_visible(name)}: ", _visible(reason), width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _hanging(head: str, text: str, width: int) -> list[str]:
    """`text` wrapped, its first line after `head` and the others below the start of the text."""
    indent = " " * min(len(head), 12)
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=indent) or [head.rstrip()]


def _table_of(finding: Finding, width: int) -> str:
    lines = [_visible(finding.name)]
    lines += _hanging("  claim    ", _visible(finding.claim), width)
    if finding.verdict:
        lines += _hanging("  verdict  ", _visible(finding.verdict), width)
    rows = [("measured", "value", "95% interval")]
    for row in _rows(finding):
        if row.name:
            rows.append((_visible(row.name), row.value, row.interval))
        rows += [(f"{'  ' if row.name else ''}vs {_visible(name)}", value, "") for name, value in row.nulls]
    values, intervals = (max(len(row[i]) for row in rows) for i in (1, 2))
    names = min(max(len(row[0]) for row in rows), max(16, width - values - intervals - 6))
    lines.append("")
    for name, value, interval in rows:
        *above, last = textwrap.wrap(name, names, subsequent_indent="  ") or [""]
        lines += [f"  {part}" for part in above]
        lines.append(f"  {last:<{names}}  {value:<{values}}  {interval}".rstrip())
    return "\n".join(lines)


def comparison_table(compared: Comparison, *, width: int | None = None) -> str:
    """Runs side by side as text: a column for each run; as many at a time as the terminal is wide enough for."""
    width = max(40, shutil.get_terminal_size((100, 24)).columns if width is None else width)
    lines = [line for note in compared.notes for line in _hanging("note: ", _visible(note), width)]
    for section in compared.sections:
        lines += ["", _visible(section.name)]
        if section.claim:
            lines += _hanging("  claim  ", _visible(section.claim), width)
        heads = [f"{'    vs ' if row.against else '  '}{_cut(row.name, 40)}" for row in section.rows]
        cells = [[_cut(text, 32) for text in map(_cell, row.cells)] for row in section.rows]
        first = max(map(len, heads))
        columns = [max(len(_cut(name, 32)), *(len(row[n]) for row in cells)) for n, name in enumerate(compared.names)]
        at = 0
        while at < len(columns):
            end = at + 1
            while end < len(columns) and first + sum(columns[at : end + 1]) + 2 * (end + 1 - at) <= width:
                end += 1
            texts = [[_cut(name, 32) for name in compared.names], *cells]
            for head, row in zip(["", *heads], texts, strict=True):
                shown = "".join(f"  {row[n]:>{columns[n]}}" for n in range(at, end))
                lines.append(f"{head:<{first}}{shown}".rstrip())
            at = end
    against = "the null, or the exact reference, that the number above is held against."
    lines += ["", *_hanging("vs: ", against, width)]
    return "\n".join(lines).strip("\n")


def _cell(cell: Cell) -> str:
    if isinstance(cell.value, str):
        return _visible(cell.value)
    return f"{_number(cell.value)} {_interval(cell.interval)}".strip()


# Files.


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` if the block ends well and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz that loads without pickle: strings as strings, types numpy does not know as float32."""
    with _replacing(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            value = np.asarray(value)
            if value.dtype.kind == "O":
                value = value.astype(str)
            elif value.dtype.kind == "V" and not value.dtype.names:  # bfloat16
                value = value.astype(np.float32)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


def _file_names(names: Iterable[tuple[str, str]]) -> list[str]:
    """A file name of its own for each (name, owner): the name, the owner's before it where it is taken."""
    used: set[str] = set()
    result = []
    for name, owner in names:
        wanted = [name, f"{owner}.{name}", *(f"{owner}.{name}.{n}" for n in range(2, 1000))]
        safe = (re.sub(r"[^\w.-]+", "_", w, flags=re.ASCII).lstrip(".")[:120] or "figure" for w in wanted)
        result.append(next(s for s in safe if s.lower() not in used))
        used.add(result[-1].lower())
    return result


def write(
    findings: Iterable[Finding],
    skipped: Mapping[str, str],
    folder: str | Path,
    *,
    title: str,
    facts: Mapping[str, object] | None = None,
    training: Iterable[Mapping[str, Any]] = (),
) -> Written:
    """Write `findings.json`, `arrays/*.npz`, `figures/*.png` and `.svg`, and `report.html` into `folder`.

    skipped: analysis -> why it was not run. title: of the run. facts: what the page says about it (config, step,
    parameters, data). training: the rows of the run's `metrics.jsonl`, drawn as curves of the loss.

    A figure that cannot be drawn, or a plotting library that is missing, costs what needs it and no more: the
    rest is written, and a notice says what was left out and why. Each file is replaced whole or not at all.
    Raises OSError if the folder cannot be written.
    """
    findings, files = tuple(findings), _Files(Path(folder))
    files.json("findings.json", [_plain(f.to_dict()) for f in findings])
    for finding, name in zip(findings, _file_names((f.name, "finding") for f in findings), strict=True):
        if finding.arrays:
            files.arrays(name, finding.arrays)
    plots = [_Plot(f, figure, f.arrays) for f in findings for figure in f.figures]
    plots += [_Plot(None, figure, arrays) for figure, arrays in _training_figures(training)]
    files.figures(plots)
    told = {} if facts is None else facts
    files.page("report.html", lambda notices: _page(findings, skipped, plots, title=title, facts=told, notices=notices))
    return Written(files.paths, tuple(files.notices))


def write_comparison(compared: Comparison, folder: str | Path, *, title: str = "runs side by side") -> Written:
    """Write `comparison.json`, `arrays/comparison.npz`, `figures/` and `compare.html` into `folder`."""
    files = _Files(Path(folder))
    sections = [
        {
            "name": section.name,
            "claim": section.claim,
            "rows": [
                {
                    "name": row.name,
                    "against": row.against,
                    "values": [cell.value for cell in row.cells],
                    "intervals": [cell.interval for cell in row.cells],
                }
                for row in section.rows
            ],
        }
        for section in compared.sections
    ]
    files.json("comparison.json", _plain({"runs": compared.names, "notes": compared.notes, "sections": sections}))
    if compared.arrays:
        files.arrays("comparison", compared.arrays)
    plots = [_Plot(None, figure, compared.arrays) for figure in compared.figures]
    files.figures(plots)
    files.page("compare.html", lambda notices: _comparison_page(compared, plots, title))
    return Written(files.paths, tuple(files.notices))


_CURVES = (
    ("training_loss", "Loss while training", "nats per token", {"loss": "training", "eval_loss": "held out"}, False),
    ("training_excess", "Loss above the ideal observer's", "nats per token", {"excess_loss": "held out"}, True),
    ("training_bits", "Bits per byte of held-out text", "bits per byte", {"bits_per_byte": "held out"}, False),
)


def _training_figures(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Figure, dict[str, np.ndarray]]]:
    """The curves that the rows of metrics.jsonl hold."""
    rows = [r for r in rows if isinstance(r.get("step"), int | float)]
    for name, title, unit, keys, log in _CURVES:
        arrays, series = {}, []
        for key, label in keys.items():
            points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]
            if points:
                arrays[f"{key}.step"], arrays[key] = np.array(points, float).T
                series.append(Series(label, y=key, x=f"{key}.step"))
        if series:
            yield Figure(name, title, "training step", unit, tuple(series), log_x=log, log_y=log), arrays


# Layout: a figure in numbers, before any library draws it.

# Okabe and Ito's colours, told apart by colour-blind readers, in the order in which they also stand out from both a
# white and a dark page. Nulls and references are grey and broken.
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GREYS = ("#808080", "#6e6e6e", "#999999")
_BREAKS = (((6, 3), "6px,3px"), ((1.5, 2), "2px,3px"), ((7, 2.5, 1.5, 2.5), "8px,3px,2px,3px"), ((12, 4), "12px,4px"))


_HATCHES = (("////", "/"), ("....", "."), ("xxxx", "x"), ("----", "-"))
"""Of the bars of nulls, as matplotlib and as plotly names them."""


@dataclass
class _Mark:
    """A series in numbers: positions on the axes, NaN where nothing is drawn."""

    series: Series
    y: np.ndarray
    x: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: np.ndarray | None = None
    text: np.ndarray | None = None
    hue: str = _HUES[0]
    broken: int | None = None
    """Which of _BREAKS."""
    thickness: float = 0.8
    """Of bars, on the x axis."""


@dataclass
class _Axis:
    label: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    """Whether only whole numbers lie on it."""
    ticks: tuple[tuple[float, str], ...] | None = None
    """Where they are names, or not the renderer's to choose."""
    named: bool = False
    reverse: bool = False
    drawn: bool = True

    def shown(self, most: int) -> list[tuple[float, str]]:
        """At most so many of the ticks, evenly, their names cut where they are long."""
        ticks = self.ticks or ()
        return [(at, _cut(name, 16)) for at, name in ticks[:: max(1, math.ceil(len(ticks) / most))]]


@dataclass
class _Panel:
    title: str
    marks: list[_Mark]
    x: _Axis
    y: _Axis


@dataclass
class _Layout:
    figure: Figure
    panels: list[_Panel]
    references: list[tuple[str, float, str, int]]
    """Label, height, hue, which of _BREAKS."""
    colours: tuple[float, float] | None
    """Least and largest of the numbers that are shown as colours."""
    diverging: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def heat(self) -> bool:
        return any(m.series.style == "heatmap" for p in self.panels for m in p.marks)

    @property
    def keyed(self) -> list[_Mark]:
        """The marks that a legend must name: all but heatmaps, and those that a panel's title names."""
        if len(self.panels) > 1:
            return []
        marks = [m for m in self.panels[0].marks if m.series.style != "heatmap"]
        return marks if len(marks) > 1 or self.references else []

    def columns(self, most: int) -> int:
        n = len(self.panels)
        return math.ceil(n / math.ceil(n / most))


@dataclass
class _Plot:
    """A figure on its way to the files and the page."""

    finding: Finding | None
    figure: Figure
    arrays: Mapping[str, np.ndarray]
    file: str = ""
    layout: _Layout | None = None
    spec: dict[str, Any] | None = None
    """For plotly.js."""
    problem: str = ""

    @property
    def owner(self) -> str:
        return self.finding.name if self.finding else "training"


class _Files:
    """What is written into one folder: `paths`, by the path below it, and `notices` of what could not be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}
        self.notices: list[str] = []

    def attempt(self, what: str, act: Callable[[], None], *files: str) -> None:
        """Do it; what cannot be drawn is noticed, what cannot be written raises."""
        try:
            act()
        except ImportError as error:
            self.notices.append(f"{what}: not drawn, {error}. To have it: {INSTALL}")
        except OSError:
            raise
        except Exception as error:
            self.notices.append(f"{what}: not drawn, {type(error).__name__}: {error}")
        else:
            self.paths.update((f, self.folder / f) for f in files)

    def json(self, name: str, data: Any) -> None:
        """Strict JSON."""
        with _replacing(self.folder / name) as draft:
            draft.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        self.paths[name] = self.folder / name

    def arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """An .npz."""
        file = f"arrays/{name}.npz"
        self.attempt(file, lambda: _write_arrays(self.folder / file, arrays), file)

    def figures(self, plots: Sequence[_Plot]) -> None:
        """Lay out all, and draw them as PNG and SVG."""
        for plot, name in zip(plots, _file_names((p.figure.name, p.owner) for p in plots), strict=True):
            plot.file = name
            try:
                plot.layout = _lay_out(plot.figure, plot.arrays)
                plot.spec = _interactive(plot.layout)
            except Exception as error:
                plot.problem = f"{type(error).__name__}: {error}"
                self.notices.append(f"figure {name} of {plot.owner}: not drawn, {plot.problem}")
        drawable = [p for p in plots if p.layout is not None]
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            if drawable:
                self.notices.append(f"figures (PNG, SVG): not drawn, {error}. To have them: {INSTALL}")
            return
        for plot in drawable:
            names = [f"figures/{plot.file}.{ending}" for ending in ("png", "svg")]
            paths = [self.folder / name for name in names]
            self.attempt(names[0][:-4], lambda p=plot, paths=paths: _write_paper(p.layout, *paths), *names)  # type: ignore[misc]

    def page(self, name: str, text: Callable[[Sequence[str]], str]) -> None:
        """An HTML page, which is told of what is missing."""

        def write() -> None:
            page = text(self.notices)
            with _replacing(self.folder / name) as draft:
                draft.write_bytes(page.encode())

        self.attempt(name, write, name)


def _lay_out(figure: Figure, arrays: Mapping[str, np.ndarray]) -> _Layout:
    """The figure in numbers. Raises ValueError where its arrays do not fit together."""
    if not figure.series:
        raise ValueError("expected at least one series, got none")
    heat = [s for s in figure.series if s.style == "heatmap"]
    if heat and len(heat) < len(figure.series):
        raise ValueError("expected heatmaps alone in a figure, got other series beside them")
    notes: list[str] = []
    if heat:
        panels = [_heat_panel(figure, s, arrays) for s in heat]
    else:
        panels = _mark_panels(figure, arrays, notes)

    marks = [m for p in panels for m in p.marks]
    hues, greys = itertools.cycle(_HUES), itertools.count()
    for mark in marks:
        if mark.series.dashed:
            mark.broken = next(greys)
            mark.hue = _GREYS[mark.broken % len(_GREYS)]
        elif mark.colour is None or mark.colour.ndim == 1:
            mark.hue = _HUES[0] if len(panels) > 1 else next(hues)
    references = [
        (label, float(y), _GREYS[n % len(_GREYS)], n)
        for (label, y), n in zip(figure.references.items(), greys, strict=False)
        if math.isfinite(y)
    ]
    shades = [m.y for m in marks] if heat else [m.colour for m in marks if m.colour is not None and m.colour.ndim == 1]
    shown = np.concatenate([np.ravel(s)[np.isfinite(np.ravel(s))] for s in shades]) if shades else np.zeros(0)
    colours = (float(np.min(shown)), float(np.max(shown))) if shown.size else ((0.0, 1.0) if shades else None)
    diverging = colours is not None and colours[0] < 0 < colours[1]
    if colours and diverging:
        colours = (-max(-colours[0], colours[1]), max(-colours[0], colours[1]))
    elif colours and colours[0] == colours[1]:
        colours = (colours[0] - 0.5, colours[1] + 0.5)
    return _Layout(figure, panels, references, colours, diverging, notes)


def _heat_panel(figure: Figure, series: Series, arrays: Mapping[str, np.ndarray]) -> _Panel:
    y = np.asarray(arrays[series.y], float)
    if y.ndim != 2 or 0 in y.shape:
        raise ValueError(f"{series.y}: expected [rows, columns], got shape {list(y.shape)}")
    text = np.asarray(arrays[series.text], str) if series.text else None
    if text is not None and text.shape != y.shape:
        raise ValueError(f"{series.text}: expected shape {list(y.shape)}, got {list(text.shape)}")
    axes = []
    for label, name, n in ((figure.x_label, series.x, y.shape[1]), (figure.y_label, series.rows, y.shape[0])):
        names = _names(np.asarray(arrays[name])) if name else [str(i) for i in range(n)]
        if len(names) != n:
            raise ValueError(f"{name}: expected {n} names, got {len(names)}")
        ticks = tuple((float(i), n) for i, n in enumerate(names))
        axes.append(_Axis(label, -0.5, n - 0.5, ticks=ticks, named=name is not None))
    axes[1].reverse = True
    columns = np.arange(y.shape[1], dtype=float)
    return _Panel(series.label, [_Mark(series, y, columns, text=text)], *axes)


def _names(values: np.ndarray) -> list[str]:
    return [_number(v) if isinstance(v, float) else str(v) for v in values.ravel().tolist()]


def _is_text(values: np.ndarray) -> bool:
    return values.dtype.kind in "USO"


def _mark_panels(figure: Figure, arrays: Mapping[str, np.ndarray], notes: list[str]) -> list[_Panel]:
    xs: list[np.ndarray] = []
    marks: list[_Mark] = []
    for s in figure.series:
        y = np.asarray(arrays[s.y], float)
        if y.ndim != 1:
            raise ValueError(f"{s.y}: expected one number for each x, got shape {list(y.shape)}")
        fields: dict[str, np.ndarray | None] = {}
        for key in ("x", "low", "high", "colour", "text"):
            name = getattr(s, key)
            value = None if name is None else np.asarray(arrays[name])
            if (
                value is not None
                and (len(value) != len(y) or value.ndim != 1)
                and not (key == "colour" and value.shape == (len(y), 3))
            ):
                raise ValueError(f"{name}: expected {len(y)} values to go with {s.y}, got shape {list(value.shape)}")
            fields[key] = value
        x = fields.pop("x")
        xs.append(np.arange(len(y)) if x is None else x)
        numbers = {k: None if v is None or k == "text" else np.asarray(v, float) for k, v in fields.items()}
        if fields["text"] is not None:
            numbers["text"] = fields["text"].astype(str)
        marks.append(_Mark(s, y.copy(), np.zeros(0), **numbers))  # type: ignore[arg-type]

    x_axis = _Axis(figure.x_label, log=figure.log_x, drawn=bool(figure.x_label) or not figure.equal_aspect)
    y_axis = _Axis(figure.y_label, log=figure.log_y, drawn=bool(figure.y_label) or not figure.equal_aspect)
    if any(s.style == "bars" for s in figure.series) or any(map(_is_text, xs)):
        positions = _name_positions(xs)
        x_axis.ticks, x_axis.named, x_axis.log = positions.ticks, True, False
        for mark, x in zip(marks, positions.each, strict=True):
            mark.x = x
    else:
        x_axis.whole = not figure.log_x and all(np.issubdtype(x.dtype, np.integer) for x in xs)
        for mark, x in zip(marks, xs, strict=True):
            mark.x = x.astype(float)
        if figure.log_x:
            _logarithmic_x(x_axis, marks, notes)
    bars = [m for m in marks if m.series.style == "bars"]
    share = 1 if figure.panels else max(1, len(bars))
    for n, mark in enumerate(bars):
        mark.thickness = 0.8 / share
        if not figure.panels:
            mark.x = mark.x + (n - (share - 1) / 2) * mark.thickness
    if figure.log_y:
        _logarithmic_y(marks, notes)

    wide = [m.x + d * m.thickness / 2 for m in bars for d in (-1, 1)]
    _span(x_axis, [m.x for m in marks] + wide)
    heights = [a for m in marks for a in (m.y, m.low, m.high) if a is not None]
    heights += [np.array([y], float) for y in figure.references.values()]
    if bars and not figure.log_y:
        heights.append(np.zeros(1))
    _span(y_axis, heights)
    if bars and not figure.log_y and min(np.nanmin(h, initial=0) for h in heights) >= 0:
        y_axis.low = 0.0
    if figure.panels:
        return [_Panel(m.series.label, [m], x_axis, y_axis) for m in marks]
    return [_Panel("", marks, x_axis, y_axis)]


class _Positions(NamedTuple):
    ticks: tuple[tuple[float, str], ...]
    each: list[np.ndarray]


def _name_positions(xs: Sequence[np.ndarray]) -> _Positions:
    """Whole numbers for names, the same for the same name in every series; within one series names may recur."""
    slots: dict[tuple[str, int], int] = {}
    each = []
    for x in xs:
        seen: dict[str, int] = {}
        places = []
        for name in _names(x):
            seen[name] = seen.get(name, -1) + 1
            places.append(slots.setdefault((name, seen[name]), len(slots)))
        each.append(np.array(places, float))
    return _Positions(tuple((float(i), name) for (name, _), i in slots.items()), each)


def _logarithmic_x(axis: _Axis, marks: list[_Mark], notes: list[str]) -> None:
    """Zero (the untrained step) has a place of its own, left of the least positive x; below zero nothing has."""
    values = np.concatenate([m.x for m in marks]) if marks else np.zeros(0)
    positive = values[np.isfinite(values) & (values > 0)]
    if np.any(values == 0) and positive.size:
        least, most = float(np.min(positive)), float(np.max(positive))
        place = least / max(2.0, (most / least) ** 0.12)
        decades = range(math.ceil(math.log10(least) - 1e-9), math.floor(math.log10(most) + 1e-9) + 1)
        steps = [10.0**d for d in decades] if len(decades) > 1 else sorted({least, *(10.0**d for d in decades), most})
        axis.ticks = ((place, "0"), *((s, _number(s)) for s in steps))
        for mark in marks:
            mark.x = np.where(mark.x == 0, place, mark.x)
        notes.append("0 has a place of its own on the logarithmic axis.")
    for mark in marks:
        mark.x = np.where(mark.x > 0, mark.x, np.nan)


def _logarithmic_y(marks: list[_Mark], notes: list[str]) -> None:
    """What is not positive is not drawn, and said so; a band that reaches below is cut at half of the least y."""
    positive = np.concatenate([m.y for m in marks])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    floor = float(np.min(positive)) / 2 if positive.size else 1.0
    lost = sum(int(np.sum(m.y <= 0)) for m in marks)
    if lost:
        notes.append(f"Not drawn on the logarithmic axis: {lost} value{'s' if lost > 1 else ''} at or below 0.")
    for mark in marks:
        mark.y = np.where(mark.y > 0, mark.y, np.nan)
        if mark.low is not None:
            mark.low = np.where(mark.low < floor, np.minimum(floor, mark.y), mark.low)
        if mark.high is not None:
            mark.high = np.where(mark.high > 0, mark.high, np.nan)


def _span(axis: _Axis, values: Sequence[np.ndarray]) -> None:
    """Set the axis' ends: all the values, and a little air."""
    every = np.concatenate([np.ravel(v) for v in values]) if values else np.zeros(0)
    every = every[np.isfinite(every) & (every > 0 if axis.log else True)]
    if not every.size:
        axis.low, axis.high = (1.0, 10.0) if axis.log else (0.0, 1.0)
        return
    low, high = (float(f(np.log10(every) if axis.log else every)) for f in (np.min, np.max))
    air = 0.04 * (high - low) or (0.3 if axis.log else 0.05 * abs(low) or 0.5)
    low, high = low - air, high + air
    axis.low, axis.high = (10**low, 10**high) if axis.log else (low, high)
    if axis.log and axis.ticks is None:
        every_nth = max(1, math.ceil((high - low) / 7))
        steps = [10.0**d * m for d in range(math.floor(low), math.ceil(high) + 1, every_nth) for m in (1, 2, 5)]
        steps = [s for s in steps if axis.low <= s <= axis.high]
        decades = [s for s in steps if math.log10(s) == round(math.log10(s))]
        axis.ticks = tuple((s, _number(s)) for s in (decades if len(decades) > 2 else steps))


def _dot(mark: _Mark) -> float:
    """Diameter of a point, in points: the more there are, the smaller."""
    return float(np.clip(90 / math.sqrt(max(1, len(mark.y))), 1.6, 6.0))


def _colours(mark: _Mark) -> list[str] | None:
    """The points' own colours as #rrggbb, where they have any; grey where one is not a colour."""
    if mark.colour is None or mark.colour.ndim == 1:
        return None
    rgb = np.nan_to_num(np.clip(mark.colour, 0, 1), nan=0.5)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.round(255 * rgb).astype(int).tolist()]


def _cell_text(mark: _Mark) -> np.ndarray | None:
    """What is written in the cells of a heatmap: its text, or its numbers where they are few."""
    if mark.text is not None:
        return np.vectorize(lambda t: _cut(t, 8), otypes=[object])(mark.text) if mark.y.size <= 400 else None
    if mark.y.size > 80:
        return None
    return np.array([[f"{v:.2g}" if math.isfinite(v) else "" for v in row] for row in mark.y.tolist()])


# Paper: matplotlib, without pyplot and so without windows or global state.

_INK = "#24292f"
_PAPER: Any = {
    "text.parse_math": False,  # a token may hold dollar signs
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


def _write_paper(layout: _Layout, png: Path, svg: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(_PAPER):
        figure = _paper(layout)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        with _replacing(png) as draft:
            figure.savefig(draft, format="png", dpi=160)
        with _replacing(svg) as draft:
            figure.savefig(draft, format="svg", dpi=200, metadata={"Date": None})


def _drawable() -> Callable[[object], str]:
    """Text for matplotlib: characters that its font lacks as backslash escapes."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()

    def text(value: object) -> str:
        return "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in _visible(value))

    return text


def _paper(layout: _Layout) -> Any:
    """The layout as a matplotlib figure, ready to be saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    text = _drawable()
    columns = layout.columns(4)
    rows = math.ceil(len(layout.panels) / columns)
    width, height = _paper_size(layout, columns)
    canvas = Canvas(figsize=(width, 0), layout="constrained")
    FigureCanvasAgg(canvas)
    title = textwrap.fill(text(layout.figure.title), int(width * 10.5))
    canvas.set_size_inches(width, rows * height + 0.22 * (title.count("\n") + 1) + 0.2)
    canvas.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    every = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes in every[len(layout.panels) :]:
        axes.set_axis_off()
    handles: dict[int, Any] = {}
    shade = None
    for k, (axes, panel) in enumerate(zip(every, layout.panels, strict=False)):
        if panel.title and len(layout.panels) > 1:
            axes.set_title(textwrap.fill(text(panel.title), max(20, int(width * 15 / columns))), fontsize=9)
        for mark in panel.marks:
            handle = _paper_mark(axes, layout, mark, text)
            handles[id(mark)] = handle
            if mark.series.style == "heatmap" or (mark.colour is not None and mark.colour.ndim == 1):
                shade = handle
        _paper_axes(axes, panel, layout, text, width / columns)
        if not layout.heat:  # the panels share their axes: name them once
            axes.xaxis.label.set_visible(k + columns >= len(layout.panels))
            axes.yaxis.label.set_visible(k % columns == 0)
        for _, y, hue, broken in layout.references:
            axes.axhline(y, color=hue, linewidth=1.2, linestyle=(0, _BREAKS[broken % len(_BREAKS)][0]), zorder=1.5)
    keys = [(handles[id(m)], text(m.series.label)) for m in layout.keyed]
    for label, y, hue, broken in layout.references:
        line = every[0].plot([], [], color=hue, linewidth=1.2, linestyle=(0, _BREAKS[broken % len(_BREAKS)][0]))[0]
        keys.append((line, f"{text(label)} = {_number(y)}"))
    if keys:
        longest = max(len(label) for _, label in keys)
        # A label that starts with an underscore is left out of legends, so a space goes before it.
        canvas.legend(
            [h for h, _ in keys],
            [f" {label}" if label.startswith("_") else textwrap.fill(label, int(width * 14)) for _, label in keys],
            loc="outside lower center",
            ncols=max(1, min(len(keys), int(width * 13 / (longest + 7)))),
            fontsize=8.5,
        )
    if shade is not None:
        bar = canvas.colorbar(shade, ax=list(every), shrink=0.9, aspect=28, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(text(_shade_label(layout)), fontsize=8.5)
    return canvas


def _shade_label(layout: _Layout) -> str:
    """What the colours of a figure say: the name of the one array that they show."""
    marks = [m for p in layout.panels for m in p.marks if m.colour is not None and m.colour.ndim == 1]
    if marks:
        return (marks[0].series.colour or "").replace("_", " ")
    first = layout.panels[0].marks[0].series
    return first.label if len(layout.panels) == 1 else ""


def _paper_size(layout: _Layout, columns: int) -> tuple[float, float]:
    """Width of the figure and height of one row of panels, in inches."""
    width = 6.6 if columns == 1 else min(3.1 * columns, 10.5)
    if layout.figure.equal_aspect:
        return (5.2, 4.8) if columns == 1 else (width, width / columns + 0.1)
    if layout.heat:
        rows = max(len(m.y) for p in layout.panels for m in p.marks)
        return width, float(np.clip(0.26 * rows + 1.0, 2.2, 6.0))
    return width, 3.5 if columns == 1 else 2.6


def _paper_mark(axes: Any, layout: _Layout, mark: _Mark, text: Callable[[object], str]) -> Any:
    """Draw one mark; what a legend or a colour bar shows for it."""
    s = mark.series
    style: Any = "-" if mark.broken is None else (0, _BREAKS[mark.broken % len(_BREAKS)][0])
    if s.style == "heatmap":
        return _paper_heatmap(axes, layout, mark, text)
    if s.style == "points":
        shade = mark.colour if mark.colour is not None and mark.colour.ndim == 1 else None
        many = len(mark.y) > 200
        paint: dict[str, Any] = (
            {"c": shade, "cmap": _ramp(layout), "vmin": layout.colours[0], "vmax": layout.colours[1]}
            if shade is not None and layout.colours
            else {"c": _colours(mark) or mark.hue}
        )
        size = _dot(mark) * (1 if len(layout.panels) == 1 else 0.8)
        handle: Any = axes.scatter(mark.x, mark.y, s=size**2, linewidths=0, rasterized=many, zorder=2.5, **paint)
        if mark.low is not None and mark.high is not None:
            axes.errorbar(mark.x, mark.y, yerr=_spread(mark), fmt="none", ecolor=mark.hue, elinewidth=0.9)
        return handle
    if s.style == "bars":
        hatch = (
            {}
            if mark.broken is None
            else {"hatch": _HATCHES[mark.broken % 4][0], "facecolor": "#e3e3e3", "edgecolor": mark.hue}
        )
        handle = axes.bar(mark.x, mark.y, mark.thickness * 0.94, **(hatch or {"color": mark.hue}), zorder=2)
        if mark.low is not None and mark.high is not None:
            axes.errorbar(mark.x, mark.y, yerr=_spread(mark), fmt="none", ecolor=_INK, elinewidth=1.0, capsize=2.5)
        return handle
    dots = "o" if len(mark.y) <= 24 and mark.broken is None else ""
    line = axes.plot(mark.x, mark.y, color=mark.hue, linestyle=style, linewidth=1.6, marker=dots, markersize=3.2)[0]
    if len(mark.y) == 1 and not dots:
        line.set_marker("D")
    if mark.low is not None and mark.high is not None:
        axes.fill_between(mark.x, mark.low, mark.high, color=mark.hue, alpha=0.18, linewidth=0)
    return line


def _spread(mark: _Mark) -> np.ndarray:
    """Lengths of the error bars below and above, 0 where the interval does not hold the value."""
    if mark.low is None or mark.high is None:
        return np.zeros((2, len(mark.y)))
    return np.maximum(np.nan_to_num(np.stack([mark.y - mark.low, mark.high - mark.y])), 0)


def _ramp(layout: _Layout) -> str:
    return "RdBu_r" if layout.diverging else "viridis"


def _paper_heatmap(axes: Any, layout: _Layout, mark: _Mark, text: Callable[[object], str]) -> Any:
    low, high = layout.colours or (0.0, 1.0)
    image = axes.imshow(mark.y, cmap=_ramp(layout), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.grid(False)
    cells = _cell_text(mark)
    # A panel is about 330 points wide, and a digit 0.6 of its size: what would run into its neighbours is not written.
    if cells is not None and 330 / mark.y.shape[1] >= 0.6 * 3.5 * max(map(len, cells.ravel())):
        size = float(np.clip(90 / max(mark.y.shape[1], 1), 4, 8.5))
        for (row, column), label in np.ndenumerate(cells):
            value = (mark.y[row, column] - low) / (high - low)
            dark = abs(value - 0.5) > 0.3 if layout.diverging else value < 0.6
            axes.text(
                column, row, text(label), ha="center", va="center", fontsize=size, color="white" if dark else "black"
            )
    return image


def _paper_axes(axes: Any, panel: _Panel, layout: _Layout, text: Callable[[object], str], inches: float) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.spines[["top", "right"]].set_visible(False)
    for axis, side, scale, limits in (
        (panel.x, axes.xaxis, axes.set_xscale, axes.set_xlim),
        (panel.y, axes.yaxis, axes.set_yscale, axes.set_ylim),
    ):
        if axis.log:
            scale("log")
            side.set_minor_locator(NullLocator())
        elif axis.whole:
            side.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        if axis.ticks is not None:
            ticks = axis.shown(32 if inches > 5 else 16)
            labels = [text(label) for _, label in ticks]
            side.set_ticks([p for p, _ in ticks], labels)
            if side is axes.xaxis and sum(map(len, labels)) > inches * 9:
                side.set_tick_params(rotation=90 if len(ticks) > 12 else 40)
                for label in axes.get_xticklabels():
                    label.set(
                        ha="center" if len(ticks) > 12 else "right",
                        rotation_mode="anchor" if len(ticks) <= 12 else "default",
                    )
            if axis.named:
                side.grid(False)
        limits(*((axis.high, axis.low) if axis.reverse else (axis.low, axis.high)))
        if not axis.drawn:
            side.set_visible(False)
            axes.spines["bottom" if side is axes.xaxis else "left"].set_visible(False)
    axes.set_xlabel(textwrap.fill(text(panel.x.label), max(16, int(inches * 11))))
    axes.set_ylabel(textwrap.fill(text(panel.y.label), 34))
    if layout.figure.equal_aspect and not layout.heat:
        axes.set_aspect("equal", adjustable="box")


# The page: plotly, whose figures are plain data here.


def _values(array: np.ndarray) -> list[float | None]:
    """Numbers for JSON, six significant digits of each; None where there is none."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in array.tolist()]


def _interactive(layout: _Layout) -> dict[str, Any]:
    """The layout as data for plotly.js: traces, and a layout for a wide and for a narrow place."""
    traces: list[dict[str, Any]] = []
    total = sum(len(m.y) for p in layout.panels for m in p.marks if m.series.style == "points")
    keyed = {id(m) for m in layout.keyed}
    for n, panel in enumerate(layout.panels):
        suffix = "" if n == 0 else str(n + 1)
        place = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        for k, mark in enumerate(panel.marks):
            named = {
                "name": _pseudo(mark.series.label, 44),
                "legendgroup": f"{n}.{k}",
                "showlegend": id(mark) in keyed,
            }
            for trace in _traces(layout, panel, mark, gl=total > 1500):
                traces.append({**named, **place, **trace})
        for r, (label, y, hue, broken) in enumerate(layout.references):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": _values(np.array([panel.x.low, panel.x.high])),
                    "y": _values(np.array([y, y])),
                    "name": _pseudo(f"{label} = {_number(y)}", 44),
                    "legendgroup": f"reference {r}",
                    "showlegend": n == 0,
                    "hoverinfo": "name",
                    "line": {"color": hue, "width": 1.6, "dash": _BREAKS[broken % len(_BREAKS)][1]},
                    **place,
                }
            )
    return {"data": traces, "wide": _page_layout(layout, narrow=False), "narrow": _page_layout(layout, narrow=True)}


def _traces(layout: _Layout, panel: _Panel, mark: _Mark, *, gl: bool) -> Iterator[dict[str, Any]]:
    s = mark.series
    x_name, y_name = _pseudo(panel.x.label) or "x", _pseudo(panel.y.label) or "y"
    if s.style == "heatmap":
        yield _heat_trace(layout, panel, mark, x_name, y_name)
        return
    if s.style == "line" and mark.low is not None and mark.high is not None:
        yield from _band(mark)
    names = dict(panel.x.ticks or ()) if panel.x.named else None
    if names is None:
        where = [_number(v) for v in mark.x.tolist()]
        if panel.x.ticks and panel.x.ticks[0][1] == "0":
            where = ["0" if v == panel.x.ticks[0][0] else w for v, w in zip(mark.x.tolist(), where, strict=True)]
    else:
        where = [names.get(float(np.round(v)), "") for v in mark.x.tolist()]
    many = len(mark.y) > 1500
    trace: dict[str, Any] = {"x": _values(mark.x), "y": _values(mark.y)}
    if mark.text is not None:
        trace["text"] = [_pseudo(t, 60) for t in mark.text.tolist()]
        trace["hovertemplate"] = "%{text}<extra></extra>"
    elif many:
        trace["hovertemplate"] = "%{x:.4~g}, %{y:.4~g}<extra></extra>"
    else:
        hover = []
        for i, name in enumerate(where):
            lines = [_pseudo(s.label, 60), f"{x_name}: {_pseudo(name)}", f"{y_name}: {_number(mark.y[i])}"]
            if mark.low is not None and mark.high is not None:
                lines[-1] += f"  {_interval((mark.low[i], mark.high[i]))}"
            hover.append("<br>".join(lines))
        trace["text"] = hover
        trace["hovertemplate"] = "%{text}<extra></extra>"
    if s.style == "bars":
        trace |= {"type": "bar", "width": round(mark.thickness * 0.94, 4), "textposition": "none"}
        trace["marker"] = {"color": mark.hue}
        if mark.broken is not None:
            trace["marker"] |= {
                "pattern": {
                    "shape": _HATCHES[mark.broken % 4][1],
                    "fgcolor": mark.hue,
                    "bgcolor": "rgba(128,128,128,.25)",
                    "size": 6,
                }
            }
    elif s.style == "points":
        size = round(1.25 * _dot(mark), 2)
        trace |= {"type": "scattergl" if gl else "scatter", "mode": "markers"}
        trace["marker"] = {"size": size, "color": _colours(mark) or mark.hue, "line": {"width": 0}}
        if mark.colour is not None and mark.colour.ndim == 1:
            trace["marker"] |= {"color": _values(mark.colour), "coloraxis": "coloraxis"}
    else:
        few = len(mark.y) <= 24 and mark.broken is None
        dash = "solid" if mark.broken is None else _BREAKS[mark.broken % len(_BREAKS)][1]
        trace |= {"type": "scatter", "mode": "lines+markers" if few or len(mark.y) == 1 else "lines"}
        trace |= {"line": {"color": mark.hue, "width": 2, "dash": dash}, "marker": {"size": 5, "color": mark.hue}}
    if s.style != "line" and mark.low is not None and mark.high is not None:
        below, above = _spread(mark)
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": _values(above),
            "arrayminus": _values(below),
            "thickness": 1.3,
            "width": 4,
            "color": "#808080",
        }
    yield trace


def _band(mark: _Mark) -> Iterator[dict[str, Any]]:
    """The band around a line as closed outlines, one for each stretch without a gap."""
    if mark.low is None or mark.high is None:
        return
    whole = np.isfinite(mark.x) & np.isfinite(mark.low) & np.isfinite(mark.high)
    x: list[float | None] = []
    y: list[float | None] = []
    for there, stretch in itertools.groupby(range(len(whole)), key=lambda i: bool(whole[i])):
        i = np.array(list(stretch))
        if there:
            x += [*([None] if x else []), *_values(np.concatenate([mark.x[i], mark.x[i][::-1]]))]
            y += [*([None] if y else []), *_values(np.concatenate([mark.low[i], mark.high[i][::-1]]))]
    red, green, blue = (int(mark.hue[k : k + 2], 16) for k in (1, 3, 5))
    yield {
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


def _heat_trace(layout: _Layout, panel: _Panel, mark: _Mark, x_name: str, y_name: str) -> dict[str, Any]:
    columns, rows = (dict(axis.ticks or ()) for axis in (panel.x, panel.y))
    hover = []
    for r, row in enumerate(mark.y.tolist()):
        line = []
        for c, value in enumerate(row):
            at = f"{y_name}: {_pseudo(rows[r])}<br>{x_name}: {_pseudo(columns[c])}<br>{_number(value)}"
            line.append(at if mark.text is None else f"{_pseudo(mark.text[r, c])}<br>{at}")
        hover.append(line)
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [_values(row) for row in mark.y],
        "x": list(range(mark.y.shape[1])),
        "y": list(range(mark.y.shape[0])),
        "coloraxis": "coloraxis",
        "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    cells = _cell_text(mark)
    if cells is not None:
        trace |= {"text": [[_pseudo(t) for t in row] for row in cells.tolist()], "texttemplate": "%{text}"}
    return trace


# Matplotlib's RdBu_r, which plotly's scale of a like name is not.
_DIVERGING = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]]


def _page_layout(layout: _Layout, *, narrow: bool) -> dict[str, Any]:
    n = len(layout.panels)
    columns = layout.columns((1 if not layout.figure.equal_aspect or n <= 3 else 2) if narrow else (3 if n != 4 else 4))
    rows = math.ceil(n / columns)
    bare = not (layout.panels[0].x.drawn or layout.panels[0].y.drawn)
    gap_x = 0.03 if bare else (0.12 if layout.heat else 0.07)
    titled, keyed = n > 1, bool(layout.keyed or layout.references)
    aspect = None
    if layout.figure.equal_aspect and not layout.heat:
        first = layout.panels[0]
        aspect = float(np.clip((first.y.high - first.y.low) / (first.x.high - first.x.low), 0.3, 1.6))
    height: float = (240 if narrow else 300) if n > 1 else (320 if narrow else 380)
    if layout.heat:
        most = max(len(m.y) for p in layout.panels for m in p.marks)
        height = float(np.clip(22 * most + 70, 180, 560))
    # Between rows of panels there is place for what stands under and over them, as a share of a panel's height.
    between = (36 if bare else 96 if layout.heat else 72) / height
    gap_y = between / (rows + (rows - 1) * between)
    barred = narrow and layout.colours is not None
    above = (30 if titled else 12) + (26 if keyed and titled else 0) + (44 if barred else 0)
    result: dict[str, Any] = {
        # For the page's own script: the height follows from the width where the aspect is fixed.
        "meta": {
            "columns": columns,
            "rows": rows,
            "aspect": aspect,
            "height": height,
            "bare": bare,
            "gap": gap_x,
            "between": between,
            "cells": columns * max(_cells_width(m) for p in layout.panels for m in p.marks),
        },
        "barmode": "overlay",
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8 if bare else 12, "r": 12, "t": above, "b": 10},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "itemsizing": "constant",
        },
        "showlegend": keyed,
        "annotations": [],
    }
    if titled:
        result["legend"] |= {"yref": "container", "y": 1, "yanchor": "top"}
    across, down = (1 - gap_x * (columns - 1)) / columns, (1 - gap_y * (rows - 1)) / rows
    for k, panel in enumerate(layout.panels):
        row, column = divmod(k, columns)
        suffix = "" if k == 0 else str(k + 1)
        left, top = column * (across + gap_x), 1 - row * (down + gap_y)
        x = _page_axis(panel.x, most=(8 if narrow else 24) // (1 if columns == 1 or narrow else 2))
        y = _page_axis(panel.y, most=24)
        x |= {"anchor": f"y{suffix}", "domain": [round(left, 5), round(min(1.0, left + across), 5)]}
        y |= {"anchor": f"x{suffix}", "domain": [round(max(0.0, top - down), 5), round(top, 5)]}
        if aspect:
            x["constrain"] = "domain"
            y |= {"scaleanchor": f"x{suffix}", "scaleratio": 1, "constrain": "domain"}
        if not layout.heat and k:
            x["matches"] = "x"
            y["matches"] = "y"
            if aspect:
                del y["scaleanchor"], y["scaleratio"]
        if not layout.heat and column:
            y["title"] = {"text": ""}
        if not layout.heat and row < rows - 1 and k + columns < n:
            x["title"] = {"text": ""}
        result[f"xaxis{suffix}"], result[f"yaxis{suffix}"] = x, y
        if titled:
            result["annotations"].append(
                {
                    "text": f"<b>{_pseudo(panel.title, 40)}</b>",
                    "x": round(left + across / 2, 5),
                    "y": round(top, 5),
                    "xref": "paper",
                    "yref": "paper",
                    "xanchor": "center",
                    "yanchor": "bottom",
                    "yshift": 3,
                    "showarrow": False,
                    "font": {"size": 13},
                }
            )
    if layout.colours is not None:
        bar = {
            "thickness": 12,
            "outlinewidth": 0,
            "title": {"text": _pseudo(_shade_label(layout), 30), "side": "right"},
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
        result["coloraxis"] = {
            "cmin": layout.colours[0],
            "cmax": layout.colours[1],
            "colorscale": _DIVERGING if layout.diverging else "Viridis",
            "colorbar": bar,
        }
    return result


def _cells_width(mark: _Mark) -> int:
    """Pixels that the writing in a heatmap's cells needs, side by side."""
    cells = _cell_text(mark) if mark.series.style == "heatmap" else None
    return 0 if cells is None else 8 * cells.shape[1] * max(map(len, cells.ravel()), default=0)


def _page_axis(axis: _Axis, most: int) -> dict[str, Any]:
    ends = [math.log10(axis.low), math.log10(axis.high)] if axis.log else [axis.low, axis.high]
    result: dict[str, Any] = {
        "type": "log" if axis.log else "linear",
        "range": ends[::-1] if axis.reverse else ends,
        "title": {"text": _pseudo(axis.label, 44), "standoff": 8},
        "automargin": True,
        "gridcolor": "rgba(128,128,128,.22)",
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "visible": axis.drawn,
    }
    if axis.ticks is not None:
        ticks = axis.shown(most)
        result |= {"tickvals": [p for p, _ in ticks], "ticktext": [_pseudo(t) for _, t in ticks]}
        result |= {"showgrid": not axis.named}
    elif axis.whole:
        step = max(1, 10 ** math.floor(math.log10(max(1.0, axis.high - axis.low))))
        step = next(
            s for s in (step // 5, step // 2, step, 2 * step, 5 * step) if s and (axis.high - axis.low) / s <= most / 2
        )
        result |= {"tick0": 0, "dtick": step}
    return result


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #f6f6f3; --card: #ffffff; --edge: #dedfdb;
  --accent: #0072b2; --wash: #eef5fa; --warn: #a34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3acb6; --page: #111418; --card: #191d23;
  --edge: #30363d; --accent: #56b4e9; --wash: #16232e; --warn: #f0a35e; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
body > * { max-width: 1120px; margin-inline: auto; padding-inline: 20px; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; margin: 0; }
h1 { font-size: 1.75rem; letter-spacing: -.015em; }
h2, h2.name { font-size: 1.25rem; letter-spacing: -.01em; font-weight: 700; }
p { margin: .5em 0; text-wrap: pretty; }
a { color: var(--accent); text-underline-offset: .3em; text-decoration-thickness: 1px; }
code, .name { font-size: .92em;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td, th, dd, dt, figcaption, .token { unicode-bidi: isolate; }
header { padding-block: 22px 14px; }
header .brand { color: var(--soft); font-size: .88rem; margin: 0 0 4px; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 20px 24px;
  margin-block: 0 18px; }
main > section, main > figure { scroll-margin-top: 12px; }
figure { margin: 18px 0 0; }
figure.card { margin: 0 0 18px; }
figcaption { font-weight: 600; margin-bottom: 6px; text-wrap: pretty; }
#picture figcaption { font-size: 1.2rem; line-height: 1.35; margin-bottom: 10px; }
.plot { position: relative; width: 100%; min-height: 180px; }
.note { color: var(--soft); font-size: .88rem; }
.verdict { border-left: 4px solid var(--accent); background: var(--wash); padding: 10px 14px;
  border-radius: 0 8px 8px 0; margin: 12px 0 16px; font-weight: 500; }
#picture .verdict { margin-bottom: 0; }
.claim { color: var(--soft); margin-top: 6px; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; padding: 4px 14px 4px 0;
  vertical-align: bottom; }
td { padding: 7px 14px 7px 0; border-top: 1px solid var(--edge); vertical-align: top; }
.numbers { width: auto; min-width: min(100%, 720px); }
.numbers td:nth-child(2), .numbers td:nth-child(3), .numbers th:nth-child(2), .numbers th:nth-child(3) {
  text-align: right; white-space: nowrap; padding-left: 14px; }
.numbers td:nth-child(2) { font-weight: 600; }
.numbers td.against, .numbers th:last-child { padding-left: 26px; }
.numbers .against div { display: inline-block; margin-right: 20px; color: var(--soft); }
.vs { font-size: .78rem; border: 1px dashed #808080; border-radius: 4px; padding: 0 4px; margin-right: 7px; }
.numbers tr:not(.null) td:nth-child(2) { font-weight: 600; }
.against div { padding-bottom: 3px; }
.against b { font-weight: 600; white-space: nowrap; }
.runs { width: auto; min-width: min(100%, 720px); }
.runs td:not(:first-child), .runs th:not(:first-child) { text-align: right; padding-left: 22px; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--soft); font-size: .92rem; }
dl { display: grid; grid-template-columns: minmax(7em, max-content) 1fr; gap: 4px 18px; margin: 10px 0 0;
  font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; }
.facts dl { grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px 22px; margin-top: 12px; }
.facts dt { font-size: .82rem; }
.problem { color: var(--warn); }
ul { padding-left: 1.2em; margin: 8px 0 0; }
footer { color: var(--soft); font-size: .88rem; padding-block: 6px 40px; }
@media (max-width: 640px) {
  body > * { padding-inline: 12px; }
  .card { padding: 16px 14px; border-radius: 10px; }
  h1 { font-size: 1.45rem; }
  .summary thead { display: none; }
  .summary tr, .summary td { display: block; border: 0; padding: 2px 0; }
  .summary tr + tr { border-top: 1px solid var(--edge); margin-top: 10px; padding-top: 10px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dt { margin-top: 8px; font-size: .85rem; }
  .facts dl { grid-template-columns: 1fr 1fr; gap: 10px 14px; }
  .facts dt { margin-top: 0; }
  table { font-size: .88rem; }
  .numbers thead { display: none; }
  .numbers, .numbers tbody { display: block; min-width: 0; }
  .numbers tr { display: grid; grid-template-columns: 1fr auto auto; padding: 6px 0;
    border-top: 1px solid var(--edge); }
  .numbers tr td { border: 0; padding: 0 0 0 10px; overflow-wrap: anywhere; }
  .numbers tr td:first-child { padding: 0; }
  .numbers tr td.against { grid-column: 1 / -1; padding: 2px 0 0; }
}
@media print { body { background: none; } .card { break-inside: avoid; border-color: #ccc; } }
"""

# Draws each figure when it comes near the window, for the width it has; anew when that, or light and dark, change.
_SCRIPT = """
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const night = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const webgl = (() => {
    try {
      const context = document.createElement("canvas").getContext("webgl");
      context.getExtension("WEBGL_lose_context")?.loseContext();
      return true;
    } catch { return false; }
  })();
  const drawn = new Map();
  const lighter = (colour) => "#" + [1, 3, 5].map((k) =>
    Math.round(90 + parseInt(colour.slice(k, k + 2), 16) * 165 / 255).toString(16)).join("");

  function draw(place) {
    const width = place.clientWidth;
    if (!width) return;
    const spec = specs[place.dataset.figure], narrow = width < 560;
    const layout = structuredClone(narrow ? spec.narrow : spec.wide);
    const { columns, rows, aspect, height, bare, gap, between, cells } = layout.meta;
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), card = style.getPropertyValue("--card").trim();
    const soft = style.getPropertyValue("--soft").trim(), edge = style.getPropertyValue("--edge").trim();
    layout.width = width;
    const panel = (width - 20 - (bare ? 0 : 60)) * (1 - gap * (columns - 1)) / columns;
    const tall = aspect ? Math.min(panel * aspect, 560) : height;
    layout.height = Math.round(tall * (rows + (rows - 1) * between) + (bare ? 8 : 50) + layout.margin.t);
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: soft };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink };
    layout.hoverlabel = { bgcolor: card, bordercolor: edge, font: { color: ink }, align: "left" };
    layout.legend.font = { color: ink, size: 12.5 };
    layout.annotations.forEach((a) => { a.font.color = ink; });
    layout.dragmode = touch ? false : "zoom";
    const data = spec.data.map((trace) => {
      const t = { ...trace };
      if (t.type === "scattergl" && !webgl) t.type = "scatter";
      if (t.texttemplate && width - 130 < cells) delete t.texttemplate;
      // The points' own colours are made for a white page: on a dark one pure blue would be lost.
      if (night.matches && Array.isArray(t.marker?.color) && typeof t.marker.color[0] === "string")
        t.marker = { ...t.marker, color: t.marker.color.map(lighter) };
      return t;
    });
    drawn.set(place, width);
    Plotly.react(place, data, layout, { displaylogo: false, displayModeBar: touch || narrow ? false : "hover",
      // Named one by one: by default there is one that sends the figure to plotly's cloud.
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], plotlyServerURL: "", scrollZoom: false,
      responsive: false,
      toImageButtonOptions: { filename: place.dataset.file, scale: 2 }, doubleClick: "reset" })
      .catch((error) => { place.textContent = "This figure could not be drawn here: " + error; });
  }

  const places = [...document.querySelectorAll(".plot")];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  places.forEach((place) => near.observe(place));
  let waiting;
  const resized = new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(() => drawn.forEach((width, place) => { if (place.clientWidth !== width) draw(place); }), 120);
  });
  places.forEach((place) => resized.observe(place));
  night.addEventListener("change", () => drawn.forEach((_, place) => draw(place)));
  addEventListener("beforeprint", () => places.forEach(draw));
})();
"""


def _page(
    findings: Sequence[Finding],
    skipped: Mapping[str, str],
    plots: Sequence[_Plot],
    *,
    title: str,
    facts: Mapping[str, object],
    notices: Sequence[str],
) -> str:
    """The whole report as one HTML file. Raises ImportError without plotly."""
    specs: list[dict[str, Any]] = []

    def plot(p: _Plot) -> str:
        return _placed(p, specs)

    opening = _opening(plots)
    body = []
    if opening is not None:
        body.append(
            f'<figure class="card" id="picture"><figcaption>{_html(opening.figure.title)}</figcaption>{plot(opening)}'
            f"{_opening_text(opening)}</figure>"
        )
    if facts:
        pairs = "".join(f"<div><dt>{_html(k)}</dt><dd>{_html(v)}</dd></div>" for k, v in facts.items())
        body.append(f'<section class="card facts"><h2>The run</h2><dl>{pairs}</dl></section>')
    if findings:
        body.append(_summary(findings))
    for n, finding in enumerate(findings):
        figures = []
        for p in plots:
            if p.finding is finding:
                if p is opening:
                    figures.append(
                        '<p class="note">Its first figure is the <a href="#picture">picture at the top</a>.</p>'
                    )
                else:
                    figures.append(f"<figure><figcaption>{_html(p.figure.title)}</figcaption>{plot(p)}</figure>")
        body.append(_section(n, finding, "".join(figures)))
    curves = [p for p in plots if p.finding is None and p is not opening]
    if curves:
        body.append('<section class="card"><h2>Training</h2>')
        body += [f"<figure><figcaption>{_html(p.figure.title)}</figcaption>{plot(p)}</figure>" for p in curves]
        body.append("</section>")
    if skipped:
        rows = "".join(f'<dt class="name">{_html(k)}</dt><dd>{_html(v)}</dd>' for k, v in skipped.items())
        body.append(f'<section class="card"><h2>Not run</h2><dl>{rows}</dl></section>')
    if notices:
        items = "".join(f"<li>{_html(n)}</li>" for n in notices)
        body.append(f'<section class="card problem"><h2>Left out of this report</h2><ul>{items}</ul></section>')
    return _document(title, "".join(body), specs, "findings.json")


def _placed(p: _Plot, specs: list[dict[str, Any]]) -> str:
    """Where a figure is drawn; what is drawn there is added to `specs`."""
    if p.layout is None or p.spec is None:
        return f'<p class="problem">This figure was not drawn: {_html(p.problem)}</p>'
    specs.append(p.spec)
    notes = "".join(f'<p class="note">{_html(note)}</p>' for note in p.layout.notes)
    return (
        f'<div class="plot" role="img" aria-label="{_html(p.figure.title)}" data-figure="{len(specs) - 1}"'
        f' data-file="{_html(p.file)}"></div>{notes}'
    )


def _document(title: str, body: str, specs: Sequence[Mapping[str, Any]], numbers: str) -> str:
    """One HTML file that asks for no other. Raises ImportError without plotly."""
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs().replace("\r\n", "\n")
    # "<" never appears in the data, so no text in it can end its element or start another.
    data = json.dumps(specs, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (library, _SCRIPT)]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    # Nothing is loaded, and no script runs but these two. (Plotly compiles what it draws with WebGL: unsafe-eval.)
    policy = (
        f"default-src 'none'; script-src 'unsafe-eval' {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_html(title)} - jaxwalk</title><style>{_STYLE}</style></head><body>"
        f'<header><p class="brand">jaxwalk: movement through embedding space</p><h1>{_html(title)}</h1></header>'
        f"<main>{body}</main><footer><p>The numbers of this page are in <code>{numbers}</code> beside it, what the "
        "figures show in <code>arrays/</code>, and the figures for print in <code>figures/</code>. Claims: S. S. "
        "Singh, Analyzing Transformer Dynamics as Movement through Embedding Space, arXiv 2308.10874.</p></footer>"
        '<noscript><p class="problem">The figures of this page need JavaScript. The folder figures/ beside it has them '
        "as images.</p></noscript>"
        f'<script type="application/json" id="figures">{data}</script>'
        f"<script>{library}</script><script>{_SCRIPT}</script></body></html>\n"
    )


def _comparison_page(compared: Comparison, plots: Sequence[_Plot], title: str) -> str:
    specs: list[dict[str, Any]] = []
    body = [f'<p class="card problem">{_html(note)}</p>' for note in compared.notes]
    if plots:
        body.append('<section class="card"><h2>Learning</h2>')
        for p in plots:
            body.append(f"<figure><figcaption>{_html(p.figure.title)}</figcaption>{_placed(p, specs)}</figure>")
        body.append("</section>")
    heads = "".join(f"<th>{_html(name)}</th>" for name in compared.names)
    for section in compared.sections:
        rows = ""
        for row in section.rows:
            mark = '<span class="vs">vs</span>' if row.against else ""
            cells = "".join(f"<td>{_html(_cell(cell))}</td>" for cell in row.cells)
            rows += f"<tr><td>{mark}{_html(row.name)}</td>{cells}</tr>"
        claim = f'<p class="claim">{_html(section.claim)}</p>' if section.claim else ""
        body.append(
            f'<section class="card"><h2 class="name">{_html(section.name)}</h2>{claim}<div class="scroll">'
            f'<table class="runs"><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>'
        )
    return _document(title, "".join(body), specs, "comparison.json")


def _opening(plots: Sequence[_Plot]) -> _Plot | None:
    """The figure that opens the page."""
    drawable = [p for p in plots if p.spec is not None]
    return next((p for p in drawable if p.owner == OPENING), drawable[0] if drawable else None)


def _opening_text(plot: _Plot) -> str:
    notes = ""
    if plot.finding is not None and plot.finding.verdict:
        notes = f'<p class="verdict">{_html(plot.finding.verdict)}</p>'
    return notes


def _against(finding: Finding) -> str:
    """The first few references, which an analysis gives in the order of their weight; all are in its own section."""
    shown = [(k, _number(v)) for k, v in finding.null.items()][:4]
    more = len(finding.null) - len(shown)
    return _nulls(shown) + (f"<div>and {more} more, below</div>" if more else "")


def _nulls(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<div><span class="vs">vs</span>{_html(name)} <b>{value}</b></div>' for name, value in pairs)


def _summary(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f'<tr><td><a class="name" href="#finding-{n}">{_html(f.name)}</a></td><td>{_html(f.verdict or f.claim)}</td>'
        f'<td class="against">{_against(f)}</td></tr>'
        for n, f in enumerate(findings)
    )
    return (
        '<section class="card"><h2>What this run shows</h2><div class="scroll"><table class="summary"><thead><tr>'
        "<th>Analysis</th><th>Finding</th><th>Null or exact reference</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _section(n: int, finding: Finding, figures: str) -> str:
    rows = "".join(
        f"<tr><td>{_html(row.name) or 'in all'}</td><td>{row.value}</td><td>{row.interval}</td>"
        f'<td class="against">{_nulls(row.nulls)}</td></tr>'
        for row in _rows(finding)
    )
    chosen = "".join(
        f"<dt>{_html(k)}</dt><dd>{_html(v if isinstance(v, str) else json.dumps(_plain(v), ensure_ascii=False))}</dd>"
        for k, v in finding.conventions.items()
    )
    details = f"<details><summary>Conventions</summary><dl>{chosen}</dl></details>" if chosen else ""
    if finding.arrays:
        shapes = "".join(
            f"<dt>{_html(k)}</dt><dd>{_html(list(np.shape(a)))} {_html(np.asarray(a).dtype)}</dd>"
            for k, a in finding.arrays.items()
        )
        details += f"<details><summary>Arrays</summary><dl>{shapes}</dl></details>"
    verdict = f'<p class="verdict">{_html(finding.verdict)}</p>' if finding.verdict else ""
    return (
        f'<section class="card" id="finding-{n}"><h2 class="name">{_html(finding.name)}</h2>'
        f'<p class="claim">{_html(finding.claim)}</p>{verdict}'
        '<div class="scroll"><table class="numbers"><thead><tr><th>Measured</th><th>Value</th><th>95% interval</th>'
        f"<th>Null or exact reference</th></tr></thead><tbody>{rows}</tbody></table></div>{figures}{details}</section>"
    )
