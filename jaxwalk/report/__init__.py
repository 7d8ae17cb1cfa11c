"""Findings as a terminal table, JSON, arrays, PNG and SVG figures, and one HTML page that needs no network.

    print(scores(findings, skipped))  # a line for each claim; `table` has every number
    written = write(findings, skipped, "runs/mess3/analysis", title="mess3", facts={"steps": "2000"})

A `Figure` describes what is shown, not how it is drawn. It is laid out once, in numbers (`_layout`), and two renderers
draw this layout: matplotlib for PNG and SVG (`_paper`), plotly for the page (`_interactive`, `page`).

Names, labels and tokens are untrusted text. They stay raw in the layout and are escaped where they are written: no
unprintable character is written anywhere, HTML and plotly labels are escaped by their own rules (`_text`), and
matplotlib parses no text as mathematics.

The plotting libraries are imported when something is drawn. The table, the JSON and the arrays do not need them.
"""

from jaxwalk.report.files import INSTALL, Written, write, write_comparison
from jaxwalk.report.page import OPENING
from jaxwalk.report.terminal import comparison_table, scores, table

__all__ = ["INSTALL", "OPENING", "Written", "comparison_table", "scores", "table", "write", "write_comparison"]
