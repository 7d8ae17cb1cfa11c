"""Text of the report: escaping, truncation, numbers, the rows of a finding, JSON data and file names.

Names, labels and tokens are untrusted text. They are escaped where they are written, each output in its own way.
"""

import html
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxwalk.evidence.decision import Contrast
from jaxwalk.evidence.finding import Cell, Finding


def escape_unprintable(text: object) -> str:
    """`text` with unprintable characters (control, format, lone surrogates) written as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def escape_html(text: object) -> str:
    """`text` for the content and the quoted attributes of HTML elements."""
    return html.escape(escape_unprintable(text), quote=True)


def escape_plotly(text: object, width: int | None = None) -> str:
    """`text` for a plotly label, wrapped at `width` characters.

    Plotly interprets tags and entities in labels as HTML, and text between dollar signs as LaTeX.
    """
    text = escape_unprintable(text)
    lines = [text] if width is None else textwrap.wrap(text, width) or [""]
    return "<br>".join(html.escape(line, quote=False).replace("$", "&#36;") for line in lines)


def truncate(text: object, max_length: int) -> str:
    """`text` with unprintable characters escaped, shortened to `max_length` characters by an ellipsis."""
    text = escape_unprintable(text)
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def format_number(value: Any) -> str:
    """`value` to four significant digits, integers in full, and "-" for None and NaN."""
    if value is None or math.isnan(value := float(value)):
        return "-"
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:.0f}" if value else "0"
    return f"{value:.4g}"


def format_interval(bounds: Sequence[Any] | None) -> str:
    """`bounds` as "[low, high]"; empty for None."""
    return "" if bounds is None else f"[{format_number(bounds[0])}, {format_number(bounds[1])}]"


def format_cell(cell: Cell) -> str:
    """The text, or the number and its interval, of one cell of a comparison."""
    if isinstance(cell.value, str):
        return escape_unprintable(cell.value)
    return f"{format_number(cell.value)} {format_interval(cell.interval)}".strip()


def format_contrast(contrast: Contrast) -> str:
    """A contrast in numbers: the measured number, that of the null, their difference with its interval, and p."""
    difference = f"{format_number(contrast.difference)} {format_interval(contrast.interval)}".strip()
    bound = "at least" if contrast.at_least is not None else "at most"
    p = contrast.p_value if contrast.adjusted is None else contrast.adjusted
    chance = "" if p is None or not contrast.units else f", p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'}"
    return (
        f"{format_number(contrast.value)} vs {format_number(contrast.reference)} {contrast.label}; difference "
        f"{difference} {contrast.unit}, predicted {bound} {format_number(contrast.threshold)}{chance}"
    )


class MeasuredRow(NamedTuple):
    """A measured number, formatted, and its nulls as pairs (name, value).

    The row of the nulls that belong to no single number has an empty name.
    """

    name: str
    value: str
    interval: str
    nulls: list[tuple[str, str]]


def measured_rows(finding: Finding) -> list[MeasuredRow]:
    """The rows of a finding's table: each measured number with the nulls that it is compared with.

    A null `r2.untrained` belongs to the measured number `r2`, the longest prefix that was measured. A name without a
    dot, such as `untrained`, belongs to the first number, the headline. Other nulls share a last row without a name.
    """
    rows = {
        name: MeasuredRow(name, format_number(value), format_interval(finding.interval.get(name)), [])
        for name, value in finding.measured.items()
    }
    shared = MeasuredRow("", "", "", [])
    for name, value in finding.null.items():
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        prefix = next((p for p in prefixes if p in rows), None)
        if prefix is not None:
            rows[prefix].nulls.append((name[len(prefix) + 1 :], format_number(value)))
        else:
            row = next(iter(rows.values()), shared) if len(parts) == 1 else shared
            row.nulls.append((name, format_number(value)))
    return [*rows.values(), *([shared] if shared.nulls else [])]


def json_data(value: Any) -> Any:
    """`value` as strict JSON data: NumPy values as Python's, NaN and infinities as None, unknown types as text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): json_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_data(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def unique_file_names(names: Iterable[tuple[str, str]]) -> list[str]:
    """A safe and unique file name for each pair (name, owner), prefixed by the owner where the name is taken."""
    taken: set[str] = set()  # in lower case: some file systems are case-insensitive
    result = []
    for name, owner in names:
        candidates = [name, f"{owner}.{name}", *(f"{owner}.{name}.{n}" for n in range(2, 1000))]
        safe = (re.sub(r"[^\w.-]+", "_", c, flags=re.ASCII).lstrip(".")[:120] or "figure" for c in candidates)
        result.append(next(s for s in safe if s.lower() not in taken))
        taken.add(result[-1].lower())
    return result
