"""The report and the comparison of runs as one HTML page each, which needs no network.

The page contains plotly.js, the script `page.js`, which draws each figure once it is scrolled into view and again when
the width or the colour scheme changes, and the styles of `page.css`. Its content security policy forbids all requests,
and all scripts but these two.
"""

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxwalk.evidence.decision import Decision
from jaxwalk.evidence.finding import Comparison, Finding, Section, scoreboard
from jaxwalk.report._plots import Plot
from jaxwalk.report._text import escape_html, format_cell, format_contrast, format_number, json_data, measured_rows

OPENING = "belief_geometry"
"""The analysis whose first figure opens the page, if it was run."""

_OPENING_LINK = '<p class="note">Its first figure is the <a href="#picture">picture at the top</a>.</p>'

Place = Callable[[Plot], str]
"""Returns the HTML element in which a figure is drawn."""


def report_page(
    findings: Sequence[Finding],
    skipped: Mapping[str, str],
    plots: Sequence[Plot],
    *,
    title: str,
    facts: Mapping[str, object],
    notices: Sequence[str],
) -> str:
    """The report as an HTML document.

    Args:
        findings: the findings, a section each.
        skipped: why each analysis that was not run was skipped, by its name.
        plots: the figures of the findings, and of the training.
        title: the title of the run.
        facts: what the page says about the run.
        notices: what could not be written or drawn.

    Raises:
        ImportError: without plotly.
    """
    specs: list[Mapping[str, Any]] = []

    def place(plot: Plot) -> str:
        return _placeholder(plot, specs)

    opening = _opening_plot(plots)
    body = []
    if findings:
        body.append(_scoreboard_section(findings))
    if opening is not None:
        body.append(_opening_section(opening, place))
    if facts:
        pairs = "".join(f"<div><dt>{escape_html(k)}</dt><dd>{escape_html(v)}</dd></div>" for k, v in facts.items())
        body.append(f'<section class="card facts"><h2>The run</h2><dl>{pairs}</dl></section>')
    if findings:
        body.append(_summary_section(findings))
    for n, finding in enumerate(findings):
        figures = "".join(
            _OPENING_LINK if p is opening else _figure_element(p, place) for p in plots if p.data.finding is finding
        )
        body.append(_finding_section(n, finding, figures))
    training = [p for p in plots if p.data.finding is None and p is not opening]
    if training:
        body.append(_figures_section("Training", training, place))
    if skipped:
        rows = "".join(f'<dt class="name">{escape_html(k)}</dt><dd>{escape_html(v)}</dd>' for k, v in skipped.items())
        body.append(f'<section class="card"><h2>Not run</h2><dl>{rows}</dl></section>')
    if notices:
        items = "".join(f"<li>{escape_html(n)}</li>" for n in notices)
        body.append(f'<section class="card problem"><h2>Left out of this report</h2><ul>{items}</ul></section>')
    return _document(title, "".join(body), specs, "findings.json")


def comparison_page(compared: Comparison, plots: Sequence[Plot], title: str) -> str:
    """Runs side by side as an HTML document.

    Raises:
        ImportError: without plotly.
    """
    specs: list[Mapping[str, Any]] = []
    body = [f'<p class="card problem">{escape_html(note)}</p>' for note in compared.notes]
    if plots:
        body.append(_figures_section("Learning", plots, lambda plot: _placeholder(plot, specs)))
    body += [_comparison_section(section, compared.names) for section in compared.sections]
    return _document(title, "".join(body), specs, "comparison.json")


# Figures.


def _placeholder(plot: Plot, specs: list[Mapping[str, Any]]) -> str:
    """The element in which the page's script draws a figure. Appends the figure's data to `specs`."""
    if plot.layout is None or plot.spec is None:
        return f'<p class="problem">This figure was not drawn: {escape_html(plot.problem)}</p>'
    specs.append(plot.spec)
    notes = "".join(f'<p class="note">{escape_html(note)}</p>' for note in plot.layout.notes)
    return (
        f'<div class="plot" role="img" aria-label="{escape_html(plot.title)}" data-figure="{len(specs) - 1}"'
        f' data-file="{escape_html(plot.file_name)}"></div>{notes}'
    )


def _figure_element(plot: Plot, place: Place) -> str:
    return f"<figure><figcaption>{escape_html(plot.title)}</figcaption>{place(plot)}</figure>"


def _figures_section(heading: str, plots: Sequence[Plot], place: Place) -> str:
    figures = "".join(_figure_element(plot, place) for plot in plots)
    return f'<section class="card"><h2>{heading}</h2>{figures}</section>'


def _opening_plot(plots: Sequence[Plot]) -> Plot | None:
    """The figure that opens the page: the first one of `OPENING`, or else of any analysis."""
    drawable = [p for p in plots if p.spec is not None]
    return next((p for p in drawable if p.data.owner == OPENING), drawable[0] if drawable else None)


def _opening_section(plot: Plot, place: Place) -> str:
    finding = plot.data.finding
    return (
        f'<figure class="card" id="picture"><figcaption>{escape_html(plot.title)}</figcaption>{place(plot)}'
        f"{_verdict(finding) if finding else ''}</figure>"
    )


# Findings.


def _summary_section(findings: Sequence[Finding]) -> str:
    rows = "".join(
        f'<tr><td><a class="name" href="#finding-{n}">{escape_html(f.name)}</a></td>'
        f'<td>{escape_html(f.summary or f.claim)}</td><td class="against">{_first_nulls(f)}</td></tr>'
        for n, f in enumerate(findings)
    )
    return (
        '<section class="card"><h2>What this run shows</h2><div class="scroll"><table class="summary"><thead><tr>'
        "<th>Analysis</th><th>Finding</th><th>Null or exact reference</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _first_nulls(finding: Finding) -> str:
    """The first four nulls, which analyses order by importance; the section of the finding has all of them."""
    first = [(name, format_number(value)) for name, value in finding.null.items()][:4]
    remaining = len(finding.null) - len(first)
    return _null_elements(first) + (f"<div>and {remaining} more, below</div>" if remaining else "")


def _null_elements(nulls: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<div><span class="vs">vs</span>{escape_html(name)} <b>{value}</b></div>' for name, value in nulls)


def _verdict(finding: Finding) -> str:
    return f'<p class="verdict">{escape_html(finding.summary)}</p>' if finding.summary else ""


def _scoreboard_section(findings: Sequence[Finding]) -> str:
    """For each claim, what is decided, the number that decides, and a link to its finding."""
    places = {finding.name: n for n, finding in enumerate(findings)}
    rows = ""
    for line in scoreboard(findings):
        numbers, where = "no analysis of this report tests it", ""
        if line.contrast is not None:
            numbers = line.contrast.reason or format_contrast(line.contrast)
            where = f'<a class="name" href="#finding-{places[line.finding]}">{escape_html(line.finding)}</a>'
        rows += (
            f"<tr><td>{line.claim}</td><td>{escape_html(line.statement)}</td><td>{_badge(line.decision)}</td>"
            f"<td>{escape_html(numbers)}</td><td>{where}</td></tr>"
        )
    checks = [check for finding in findings for check in finding.checks]
    failed = sum(not check.passed for check in checks)
    note = (
        f'<p class="{"problem" if failed else "note"}">Self-checks: {len(checks) - failed} passed, {failed} failed.</p>'
    )
    return (
        '<section class="card" id="scoreboard"><h2>What this run decides</h2><div class="scroll">'
        '<table class="scores"><thead><tr><th></th><th>Claim</th><th>Decision</th><th>The number that decides</th>'
        f"<th>Where</th></tr></thead><tbody>{rows}</tbody></table></div>{note if checks else ''}</section>"
    )


def _badge(decision: Decision) -> str:
    return f'<span class="badge {decision.split()[0]}">{decision}</span>'


def _primary_rows(finding: Finding) -> str:
    """The contrasts that decide, and the self-checks, as a table; empty without any."""
    rows = "".join(
        f"<tr><td>{escape_html(c.claim)}</td><td>{_badge(c.decision)}</td><td>{escape_html(c.statement)}</td>"
        f"<td>{escape_html(c.quantity)}: {escape_html(c.reason or format_contrast(c))}</td></tr>"
        for c in finding.primary
    ) + "".join(
        f"<tr><td>check</td><td>{'passed' if c.passed else 'FAILED'}</td><td>{escape_html(c.meaning)}</td>"
        f"<td>{escape_html(c.name)}: {format_number(c.value)}, at most {format_number(c.limit)}</td></tr>"
        for c in finding.checks
    )
    return f'<div class="scroll"><table class="scores"><tbody>{rows}</tbody></table></div>' if rows else ""


def _finding_section(n: int, finding: Finding, figures: str) -> str:
    rows = "".join(
        f"<tr><td>{escape_html(row.name) or 'in all'}</td><td>{row.value}</td><td>{row.interval}</td>"
        f'<td class="against">{_null_elements(row.nulls)}</td></tr>'
        for row in measured_rows(finding)
    )
    conventions = {
        name: value if isinstance(value, str) else json.dumps(json_data(value), ensure_ascii=False)
        for name, value in finding.conventions.items()
    }
    arrays = {name: f"{list(np.shape(a))} {np.asarray(a).dtype}" for name, a in finding.arrays.items()}
    return (
        f'<section class="card" id="finding-{n}"><h2 class="name">{escape_html(finding.name)}</h2>'
        f'<p class="claim">{escape_html(finding.claim)}</p>{_verdict(finding)}'
        f"{_primary_rows(finding)}"
        '<div class="scroll"><table class="numbers"><thead><tr><th>Measured</th><th>Value</th><th>95% interval</th>'
        f"<th>Null or exact reference</th></tr></thead><tbody>{rows}</tbody></table></div>{figures}"
        f"{_details('Conventions', conventions)}{_details('Arrays', arrays)}</section>"
    )


def _details(summary: str, entries: Mapping[str, str]) -> str:
    """A list of names and texts that opens on a click; empty without entries."""
    if not entries:
        return ""
    items = "".join(f"<dt>{escape_html(name)}</dt><dd>{escape_html(text)}</dd>" for name, text in entries.items())
    return f"<details><summary>{summary}</summary><dl>{items}</dl></details>"


# Comparisons.


def _comparison_section(section: Section, run_names: Sequence[str]) -> str:
    heads = "".join(f"<th>{escape_html(name)}</th>" for name in run_names)
    rows = ""
    for row in section.rows:
        prefix = '<span class="vs">vs</span>' if row.against else ""
        cells = "".join(f"<td>{escape_html(format_cell(cell))}</td>" for cell in row.cells)
        rows += f"<tr><td>{prefix}{escape_html(row.name)}</td>{cells}</tr>"
    claim = f'<p class="claim">{escape_html(section.claim)}</p>' if section.claim else ""
    return (
        f'<section class="card"><h2 class="name">{escape_html(section.name)}</h2>{claim}<div class="scroll">'
        f'<table class="runs"><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


# The document.


def _document(title: str, body: str, specs: Sequence[Mapping[str, Any]], numbers_file: str) -> str:
    """An HTML document that requests no other file. Raises ImportError without plotly.

    Args:
        title: raw text.
        body: HTML.
        specs: the data of the figures, as the script reads it.
        numbers_file: the file that the footer names as the source of the numbers.
    """
    from plotly.offline import get_plotlyjs

    library, script = get_plotlyjs().replace("\r\n", "\n"), _resource("page.js")
    # Without "<" in the data, no text in it can end the script element or start another.
    data = json.dumps(specs, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (library, script)]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    # Plotly compiles code for what it draws with WebGL, hence unsafe-eval.
    policy = (
        f"default-src 'none'; script-src 'unsafe-eval' {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape_html(title)} - jaxwalk</title><style>{_resource('page.css')}</style></head><body>"
        '<header><p class="brand">jaxwalk: movement through embedding space</p>'
        f"<h1>{escape_html(title)}</h1></header>"
        f"<main>{body}</main><footer><p>The numbers of this page are in <code>{numbers_file}</code> beside it, what "
        "the figures show in <code>arrays/</code>, and the figures for print in <code>figures/</code>. Claims: S. S. "
        "Singh, Analyzing Transformer Dynamics as Movement through Embedding Space, arXiv 2308.10874.</p></footer>"
        '<noscript><p class="problem">The figures of this page need JavaScript. The folder figures/ beside it has them '
        "as images.</p></noscript>"
        f'<script type="application/json" id="figures">{data}</script>'
        f"<script>{library}</script><script>{script}</script></body></html>\n"
    )


def _resource(name: str) -> str:
    """The text of a file beside this one, on lines of its own."""
    # read_text also normalises line ends. Browsers do so too before they hash a script.
    return "\n" + importlib.resources.files("jaxwalk.report").joinpath(name).read_text("utf-8")
