"""What analyses return: numbers with intervals, nulls and conventions; and comparisons of several runs."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxwalk.evidence.decision import Check, Contrast, Decision, adjust, combined, deciding


class NotApplicable(ValueError):
    """Raised by an analysis that does not apply to a model, or has too little data. The message says why."""


MOST_PRIMARY = 3
"""The most contrasts that an analysis may decide a claim by."""


@dataclass(frozen=True)
class Series:
    """One series of a figure. Every field but `label`, `style` and `dashed` names an array of the finding.

    line: y [n] against x [n], with a band from `low` to `high`. points: y against x, each point in its `colour` ([n, 3]
    RGB from 0 to 1, or [n] numbers). bars: y [n] over the names in x [n], with error bars from `low` to `high`.
    heatmap: y [rows, columns], the first row on top, with columns named by `x` and rows by `rows`. Names may be numbers
    or strings; lines and points can also be drawn over names, if x holds strings.
    """

    label: str
    y: str
    x: str | None = None
    style: Literal["line", "points", "bars", "heatmap"] = "line"
    low: str | None = None
    high: str | None = None
    colour: str | None = None
    dashed: bool = False
    """Whether the line is dashed, as for a null or a reference."""
    text: str | None = None
    """Labels of the cells or points: an array of strings with the shape of y. Tokens in it are untrusted text."""
    rows: str | None = None
    """Names of the rows of a heatmap."""


@dataclass(frozen=True)
class Figure:
    """A figure as data, which the report draws for paper (PNG, SVG) and for the page."""

    name: str
    """The file name without extension."""
    title: str
    """A sentence that says what the figure shows."""
    x_label: str
    """With `equal_aspect`, an empty label means that the axis has no meaning and is not drawn; likewise for y."""
    y_label: str
    series: tuple[Series, ...]
    references: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines: label -> y."""
    log_x: bool = False
    log_y: bool = False
    equal_aspect: bool = False
    panels: bool = False
    """Draw each series in its own panel, with shared axes."""


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured, and the null or exact reference it is compared with.

    Attributes:
        name: the analysis.
        claim: the claim of the paper, in a sentence, after its number, such as C1.
        measured: name -> number, in the units given in `conventions` (nats by default).
        interval: name -> (low, high), 95%, over paths or documents, for names in `measured`; exact numbers have none.
        null: name -> number that the measured numbers are compared with: a null model or an exact reference. The report
            puts `r2.untrained` beside the measured `r2`, and `untrained` beside the first measured number, the
            headline.
        conventions: name -> the convention chosen, where a choice changes the numbers; and units.
        arrays: name -> array: all data of the figures, and further arrays for the user.
        figures: how to draw the arrays. The report opens with the first figure of the first finding.
        verdict: one sentence, with numbers, that says what this run shows, where nothing is decided.
        primary: at most three contrasts, from which the decision follows.
        checks: self-checks, which can support no claim.
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
    primary: tuple[Contrast, ...] = ()
    checks: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        if len(self.primary) > MOST_PRIMARY:
            raise ValueError(
                f"Finding {self.name!r}: expected at most {MOST_PRIMARY} primary contrasts, got {len(self.primary)}."
            )
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

    @property
    def claims(self) -> tuple[str, ...]:
        """The numbers of the claims that the finding is about, such as "C3"."""
        decided = tuple(dict.fromkeys(contrast.claim for contrast in self.primary))
        return decided or tuple(re.findall(r"\bC[1-8]\b", self.claim.partition(":")[0]))

    @property
    def decision(self) -> Decision:
        """What the primary contrasts decide together; "not testable here" without any."""
        return combined(contrast.decision for contrast in self.primary)

    @property
    def summary(self) -> str:
        """A sentence that says what the finding decides, and on what numbers."""
        return deciding(self.primary).sentence if self.primary else self.verdict

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON data, without arrays and figures. NaN and infinities, which JSON lacks, become None."""

        def number(value: Any) -> float | None:
            return float(value) if value is not None and np.isfinite(value) else None

        return {
            "name": self.name,
            "claim": self.claim,
            "claims": list(self.claims),
            "decision": self.decision,
            "verdict": self.summary,
            "primary": [contrast.to_dict() for contrast in self.primary],
            "checks": [check.to_dict() for check in self.checks],
            "measured": {k: number(v) for k, v in self.measured.items()},
            "interval": {k: [number(low), number(high)] for k, (low, high) in self.interval.items()},
            "null": {k: number(v) for k, v in self.null.items()},
            "conventions": dict(self.conventions),
        }


def decide(findings: Iterable[Finding]) -> list[Finding]:
    """The findings of one report, with the p-values of all their primary contrasts adjusted for their number."""
    findings = list(findings)
    adjusted = iter(adjust([contrast for finding in findings for contrast in finding.primary]))
    return [dataclasses.replace(f, primary=tuple(next(adjusted) for _ in f.primary)) for f in findings]


CLAIMS: Mapping[str, str] = {
    "C1": "Behaviours are paths that the model random-walks",
    "C2": "Training learns a distribution over all paths, not only those trained on",
    "C3": "There is no learning in context: a context only narrows the set of paths",
    "C4": "Knowledge is in the arrangement of vectors, not in neurons or layers",
    "C5": "Proximity of context and token vectors gives the probability of tokens",
    "C6": "Contexts are composed by an encoding walk; attention adds a bias",
    "C7": "Filters and aggregates describe every sequence model",
    "C8": "Embeddings are concepts: a context vector is the composed concept",
}
"""The claims of Singh, arXiv 2308.10874, in short."""


class Verdict(NamedTuple):
    """One claim, as all findings of a report decide it.

    Attributes:
        claim: such as "C2".
        statement: the claim in short.
        decision: what is decided.
        contrast: the contrast that decides; None if none was tested.
        finding: the name of the finding that it is in, or an empty string.
    """

    claim: str
    statement: str
    decision: Decision
    contrast: Contrast | None
    finding: str


def scoreboard(findings: Iterable[Finding]) -> list[Verdict]:
    """One line for each claim. The findings are those of one report, after `decide`."""
    where = [(contrast, finding.name) for finding in findings for contrast in finding.primary]
    lines = []
    for claim, statement in CLAIMS.items():
        contrasts = [contrast for contrast, _ in where if contrast.claim == claim]
        chosen = deciding(contrasts) if contrasts else None
        name = next((name for contrast, name in where if contrast is chosen), "")
        lines.append(Verdict(claim, statement, combined(c.decision for c in contrasts), chosen, name))
    return lines


class Cell(NamedTuple):
    """One number or text of one run.

    Attributes:
        value: None if the run has no such number.
        interval: its interval, if there is one.
    """

    value: float | str | None
    interval: tuple[float, float] | None = None


class Row(NamedTuple):
    """One quantity across runs.

    Attributes:
        name: the quantity.
        cells: one cell per run.
        against: whether the row is a null or an exact reference of the row above.
    """

    name: str
    cells: tuple[Cell, ...]
    against: bool = False


class Section(NamedTuple):
    """A group of related rows, such as the numbers of one analysis.

    Attributes:
        name: the heading.
        claim: the claim that the numbers are about, or an empty string.
        rows: the rows.
    """

    name: str
    claim: str
    rows: tuple[Row, ...]


class Comparison(NamedTuple):
    """Runs side by side.

    Attributes:
        names: the names of the runs.
        sections: tables of their numbers.
        notes: caveats for the reader, such as that the runs were trained on different data.
        figures: figures of all runs.
        arrays: the arrays that the figures draw.
    """

    names: tuple[str, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]
    arrays: Mapping[str, np.ndarray]
