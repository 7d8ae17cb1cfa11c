"""Findings and comparisons as text for the terminal."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from jaxwalk.evidence.finding import Comparison, Finding, Section, scoreboard
from jaxwalk.report._text import (
    escape_unprintable,
    format_cell,
    format_contrast,
    format_number,
    measured_rows,
    truncate,
)


def scores(findings: Sequence[Finding], skipped: Mapping[str, str] = {}, *, width: int | None = None) -> str:
    """The scoreboard: for each claim, what is decided, the number that decides, and where to look.

    Args:
        findings: the findings of one report.
        skipped: why each analysis that was not run was skipped, by its name.
        width: characters per line; by default the width of the terminal.
    """
    width = min(_line_width(width), 120)
    lines = []
    for line in scoreboard(findings):
        lines.append(truncate(f"{line.claim}  {line.decision:<18}{line.statement}", width))
        if line.contrast is not None:
            where = f"{line.contrast.quantity} ({line.finding})"
            lines += _wrap("      ", f"{where}: {line.contrast.reason or format_contrast(line.contrast)}", width)
    checks = [(finding.name, check) for finding in findings for check in finding.checks]
    failed = [f"{name}.{check.name} {format_number(check.value)}" for name, check in checks if not check.passed]
    lines += [""] if checks or skipped else []
    if checks:
        result = f"FAILED {', '.join(failed)}" if failed else f"all {len(checks)} passed"
        lines += _wrap("self-checks  ", result, width)
    if skipped:
        lines += _wrap("not run      ", f"{', '.join(skipped)} (--verbose says why)", width)
    return "\n".join(lines)


def table(findings: Iterable[Finding], skipped: Mapping[str, str] = {}, *, width: int | None = None) -> str:
    """The claim and the verdict of each finding, then each number with its interval and the nulls it is compared with.

    Args:
        findings: the findings to print.
        skipped: why each analysis that was not run was skipped, by its name.
        width: characters per line; by default the width of the terminal.
    """
    width = _line_width(width)
    blocks = [_finding_table(finding, min(width, 120)) for finding in findings]
    if blocks:
        blocks.append("vs: the null, or the exact reference, that the numbers are held against.")
    if skipped:
        lines = ["not run"]
        for name, reason in skipped.items():
            lines += _wrap(f"  {escape_unprintable(name)}: ", reason, width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def comparison_table(compared: Comparison, *, width: int | None = None) -> str:
    """Runs side by side, one column each; columns that do not fit into the width follow below.

    Args:
        compared: the comparison, from `jaxwalk.comparison.compare`.
        width: characters per line; by default the width of the terminal.
    """
    width = _line_width(width)
    lines = [line for note in compared.notes for line in _wrap("note: ", note, width)]
    for section in compared.sections:
        lines += ["", *_section_lines(section, compared.names, width)]
    legend = "the null, or the exact reference, that the number above is held against."
    lines += ["", *_wrap("vs: ", legend, width)]
    return "\n".join(lines).strip("\n")


def _line_width(width: int | None) -> int:
    return max(40, shutil.get_terminal_size((100, 24)).columns if width is None else width)


def _wrap(prefix: str, text: str, width: int) -> list[str]:
    """The lines of `text`, wrapped, the first after `prefix` and the others indented to match."""
    indent = " " * min(len(prefix), 12)
    text = escape_unprintable(text)
    return textwrap.wrap(text, width, initial_indent=prefix, subsequent_indent=indent) or [prefix.rstrip()]


def _finding_table(finding: Finding, width: int) -> str:
    lines = [escape_unprintable(finding.name), *_wrap("  claim    ", finding.claim, width)]
    if finding.summary:
        lines += _wrap("  verdict  ", finding.summary, width)
    for contrast in finding.primary:
        heading = f"{contrast.claim} {contrast.decision}: {contrast.quantity}: "
        lines += _wrap("  primary  ", heading + (contrast.reason or format_contrast(contrast)), width)
    for check in finding.checks:
        result = f"{'passed' if check.passed else 'FAILED'}: {check.name} {format_number(check.value)}"
        lines += _wrap("  check    ", f"{result}, at most {format_number(check.limit)}: {check.meaning}", width)
    rows = [("measured", "value", "95% interval")]
    for row in measured_rows(finding):
        if row.name:
            rows.append((escape_unprintable(row.name), row.value, row.interval))
        indent = "  " if row.name else ""
        rows += [(f"{indent}vs {escape_unprintable(name)}", value, "") for name, value in row.nulls]
    name_width, value_width, interval_width = (max(map(len, column)) for column in zip(*rows, strict=True))
    name_width = min(name_width, max(16, width - value_width - interval_width - 6))
    lines.append("")
    for name, value, interval in rows:
        *first, last = textwrap.wrap(name, name_width, subsequent_indent="  ") or [""]
        lines += [f"  {part}" for part in first]
        lines.append(f"  {last:<{name_width}}  {value:<{value_width}}  {interval}".rstrip())
    return "\n".join(lines)


def _section_lines(section: Section, run_names: Sequence[str], width: int) -> list[str]:
    lines = [escape_unprintable(section.name)]
    if section.claim:
        lines += _wrap("  claim  ", section.claim, width)
    heads = ["", *(f"{'    vs ' if row.against else '  '}{truncate(row.name, 40)}" for row in section.rows)]
    rows = [run_names, *(map(format_cell, row.cells) for row in section.rows)]
    cells = [[truncate(text, 32) for text in row] for row in rows]
    head_width = max(map(len, heads))
    column_widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for columns in _column_groups(column_widths, width - head_width):
        for head, row in zip(heads, cells, strict=True):
            texts = "".join(f"  {row[n]:>{column_widths[n]}}" for n in columns)
            lines.append(f"{head:<{head_width}}{texts}".rstrip())
    return lines


def _column_groups(widths: Sequence[int], available: int) -> list[range]:
    """Consecutive columns that fit into `available` characters, two spaces before each, and at least one a group."""
    groups, start = [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or sum(widths[start : end + 1]) + 2 * (end + 1 - start) > available:
            groups.append(range(start, end))
            start = end
    return groups
