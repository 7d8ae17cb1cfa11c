"""What decides a claim: the paired difference of a measure from its null, and the rule that turns it into a word.

A `Quantity` is what was measured of each independent unit, such as a path, a document or a trained model, beside the
same measure of each null. A `Contrast` is one of its differences, about which a claim predicts something that was
written down first: in which direction it lies, and the smallest size that would matter. `decide` corrects for how many
are tested together.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

Decision = Literal["supported", "contradicted", "undecided", "not testable here"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
LEVEL = 0.05
"""The probability, at most, of any wrong decision in a report."""
FEWEST_UNITS = 8
"""The fewest paths or documents that intervals are computed from."""
SKEWNESS_UNITS = 16
"""From how many units on the skewness can be estimated well enough to correct for it."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""A function of means, [..., columns] -> [...], such as a ratio."""


@dataclass(frozen=True)
class Units:
    """A sample of independent numbers, whose mean is the estimate.

    Attributes:
        values: [n]. Of a statistic that is not a mean, the jackknife's pseudo-values, whose mean is the statistic with
            its bias of order 1/n removed, and whose variance is n times that of the statistic (Tukey 1958).
    """

    values: Float[np.ndarray, " n"]

    @property
    def mean(self) -> float:
        """The estimate."""
        return float(np.mean(self.values))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The central interval of the mean, by a t statistic that is corrected for skewness (Hall 1992)."""
        low, high = ((1 - level) / 2, (1 + level) / 2)
        return self._bound(high), self._bound(low)

    def p_value(self, threshold: float) -> float:
        """The two-sided p-value of the hypothesis that the mean is `threshold`, by the same statistic."""
        n, error = len(self.values), self._error
        if not error > 0:
            return 1.0 if self.mean == threshold else 0.0
        t, skew = (self.mean - threshold) / error, self._skewness / math.sqrt(n)
        corrected = t + skew * (t * t / 3 + 1 / 6) + skew**2 * t**3 / 27
        return float(2 * stats.t.sf(abs(corrected), n - 1))

    def _bound(self, level: float) -> float:
        """The value that the mean exceeds as much as `p_value` allows at this level."""
        n = len(self.values)
        quantile, skew = float(stats.t.ppf(level, n - 1)), self._skewness / math.sqrt(n)
        if abs(skew) > 1e-9:
            quantile = 3 / skew * (math.cbrt(1 + skew * (quantile - skew / 6)) - 1)
        return self.mean - quantile * self._error

    @property
    def _error(self) -> float:
        """The standard error of the mean; 0 where the values differ by rounding only."""
        spread = np.std(self.values, ddof=1)
        return 0.0 if spread <= 1e-13 * np.abs(self.values).max() else float(spread / math.sqrt(len(self.values)))

    @property
    def _skewness(self) -> float:
        return 0.0 if len(self.values) < SKEWNESS_UNITS or not self._error > 0 else float(stats.skew(self.values))


@dataclass(frozen=True, eq=False)
class Quantity:
    """A measure of the model, and the same measure of what it is compared with.

    Attributes:
        name: such as "excess_loss".
        values: [n], or [n, columns] for a `statistic`: a number for each path. Or one exact number.
        nulls: the name of each null or exact reference -> its measure, on the same paths, or one exact number.
        unit: of the numbers.
        statistic: the number as a function of the columns' means; by default the mean itself.
        documents: [n], the document that each path belongs to, for paths that are not independent. The documents are
            the units then.
        fewest_units: the fewest units that an interval is computed from.
    """

    name: str
    values: Float[np.ndarray, "n ..."] | float
    nulls: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "nats"
    statistic: Statistic | None = None
    documents: Int[np.ndarray, " n"] | None = None
    fewest_units: int = FEWEST_UNITS

    @property
    def value(self) -> float:
        """The measured number."""
        return self._number(self.values)

    @property
    def references(self) -> dict[str, float]:
        """The number of each null."""
        return {name: self._number(values) for name, values in self.nulls.items()}

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the measured number; None if it is exact, or there are too few units."""
        return self._interval(self._units(self.values))

    def contrast(
        self,
        null: str,
        claim: str,
        statement: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        label: str | None = None,
    ) -> "Contrast":
        """The difference from a null, about which a claim predicts that it is at least, or at most, a number.

        Args:
            null: which of the nulls.
            claim: such as "C2".
            statement: what the claim predicts, as a sentence without its full stop.
            at_least: the smallest difference that would matter, if the claim predicts a larger one.
            at_most: the largest difference that would not matter, if the claim predicts a smaller one.
            label: what the null is called in sentences; by default its name.

        Raises:
            ValueError: unless exactly one of `at_least` and `at_most` is given.
        """
        if (at_least is None) == (at_most is None):
            raise ValueError(f"contrast: expected either at_least or at_most, got {at_least} and {at_most}.")
        model, other = self._units(self.values), self._units(self.nulls[null])
        contrast = Contrast(
            claim=claim,
            statement=statement,
            quantity=self.name,
            null=null,
            label=label or null.replace("_", " "),
            unit=self.unit,
            at_least=at_least,
            at_most=at_most,
            value=self.value,
            reference=self._number(self.nulls[null]),
        )
        if not (math.isfinite(contrast.value) and math.isfinite(contrast.reference)):
            return dataclasses.replace(contrast, reason=f"{self.name} is not a finite number")
        if model is None and other is None:
            return dataclasses.replace(contrast, p_value=0.0 if contrast.difference != contrast.threshold else 1.0)
        both = [np.zeros(1) if units is None else units.values for units in (model, other)]
        offsets = [value if units is None else 0.0 for units, value in
                   ((model, contrast.value), (other, contrast.reference))]  # fmt: skip
        paired = Units(both[0] + offsets[0] - both[1] - offsets[1])
        if len(paired.values) < self.fewest_units:
            return dataclasses.replace(contrast, units=len(paired.values))
        return dataclasses.replace(
            contrast,
            units=len(paired.values),
            interval=paired.interval(),
            p_value=paired.p_value(contrast.threshold),
        )

    def _number(self, values: Any) -> float:
        values = np.asarray(values, float)
        if values.ndim == 0:
            return float(values)
        means = values.mean(axis=0)
        return float(means if self.statistic is None else self.statistic(means))

    def _units(self, values: Any) -> Units | None:
        """The independent units of some values; None if they are one exact number."""
        values = np.asarray(values, float)
        if values.ndim == 0:
            return None
        if self.statistic is None and self.documents is None:
            return Units(values)
        statistic = self.statistic or (lambda means: means)
        groups = self._groups(len(values))
        G = int(groups.max()) + 1
        if G < 2:
            return Units(np.array([self._number(values)]))
        counts = np.bincount(groups, minlength=G)
        sums = np.zeros((G, *values.shape[1:]))
        np.add.at(sums, groups, values)
        rest = (len(values) - counts).reshape(G, *[1] * (values.ndim - 1))
        without_each = statistic((sums.sum(axis=0) - sums) / rest)
        return Units(G * self._number(values) - (G - 1) * without_each)

    def _groups(self, n: int) -> Int[np.ndarray, " n"]:
        """The number of the unit that each path belongs to."""
        return np.arange(n) if self.documents is None else np.unique(self.documents, return_inverse=True)[1]

    def _interval(self, units: Units | None) -> tuple[float, float] | None:
        if units is None or len(units.values) < self.fewest_units or not np.isfinite(units.values).all():
            return None
        low, high = units.interval()
        # Pseudo-values are about the statistic without its bias: the interval is moved to be about the reported number.
        shift = self.value - units.mean
        return low + shift, high + shift


@dataclass(frozen=True)
class Contrast:
    """A difference that decides a claim.

    Attributes:
        claim: such as "C2".
        statement: what the claim predicts, as a sentence without its full stop.
        quantity: the name of the quantity.
        null: the name of the null or exact reference.
        label: what the null is called in sentences.
        unit: of the numbers.
        at_least: the claim predicts a difference of at least this; None if it predicts `at_most`.
        at_most: the claim predicts a difference of at most this; None if it predicts `at_least`.
        value: the measured number.
        reference: the same of the null.
        interval: the 95% interval of their paired difference; None if both are exact, or there are too few units.
        units: the number of independent units; 0 if both numbers are exact.
        p_value: two-sided, of the hypothesis that the difference is the predicted bound; None without an interval.
        adjusted: the p-value, corrected for the number of contrasts that are decided together.
        reason: why the claim cannot be tested here, or an empty string.
    """

    claim: str
    statement: str
    quantity: str
    null: str
    label: str = ""
    unit: str = "nats"
    at_least: float | None = None
    at_most: float | None = None
    value: float = math.nan
    reference: float = math.nan
    interval: tuple[float, float] | None = None
    units: int = 0
    p_value: float | None = None
    adjusted: float | None = None
    reason: str = ""

    @property
    def difference(self) -> float:
        """The measured number minus that of the null."""
        return self.value - self.reference

    @property
    def threshold(self) -> float:
        """The bound that the claim predicts."""
        return float(self.at_least if self.at_least is not None else self.at_most or 0.0)

    @property
    def decision(self) -> Decision:
        """Supported or contradicted if the difference is significantly beyond, or short of, the predicted bound."""
        if self.reason:
            return "not testable here"
        p = self.p_value if self.adjusted is None else self.adjusted
        if p is None or not p <= LEVEL:
            return "undecided"
        above = self.difference > self.threshold
        return "supported" if above == (self.at_least is not None) else "contradicted"

    @property
    def sentence(self) -> str:
        """The decision, and the two numbers that it follows from."""
        if self.reason:
            return f"Not testable here: {self.reason}."
        numbers = f"{self.value:.4g} against {self.reference:.4g} ({self.label}), {self.unit}"
        few = f"; {self.units} independent units are too few" if self.p_value is None else ""
        return f"{self.decision.capitalize()}: {self.statement}; {numbers}{few}."

    def to_dict(self) -> dict[str, Any]:
        """The contrast as JSON data. NaN, which JSON lacks, becomes None."""
        data: dict[str, Any] = {"decision": self.decision, "difference": self.difference, **dataclasses.asdict(self)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def untestable(claim: str, statement: str, quantity: str, reason: str) -> Contrast:
    """A contrast that cannot be tested on this model and data, and why, as a clause without its full stop."""
    return Contrast(claim, statement, quantity, "", reason=reason)


@dataclass(frozen=True)
class Check:
    """A self-check: something that holds by construction if the software is right. It supports no claim.

    Attributes:
        name: the number.
        value: what was measured.
        limit: the largest value that passes.
        meaning: what holds by construction.
    """

    name: str
    value: float
    limit: float
    meaning: str

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit. NaN is not."""
        return bool(self.value <= self.limit)

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON data."""
        value = self.value if math.isfinite(self.value) else None
        return {"name": self.name, "value": value, "limit": self.limit, "passed": self.passed, "meaning": self.meaning}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): all decisions at a level are right with that probability."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()


def adjust(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The same contrasts, with p-values adjusted for the number of those that have one."""
    tested = [contrast.p_value for contrast in contrasts if contrast.p_value is not None and not contrast.reason]
    adjusted = iter(holm(tested))
    return [
        dataclasses.replace(c, adjusted=next(adjusted)) if c.p_value is not None and not c.reason else c
        for c in contrasts
    ]


def combined(decisions: Iterable[Decision]) -> Decision:
    """The decision of a claim from those of its contrasts.

    A claim is supported only if every testable contrast supports it, and contradicted if one contradicts it.
    """
    testable = [decision for decision in decisions if decision != "not testable here"]
    if not testable:
        return "not testable here"
    if "contradicted" in testable:
        return "contradicted"
    return "undecided" if "undecided" in testable else "supported"


def deciding(contrasts: Sequence[Contrast]) -> Contrast:
    """The contrast that the combined decision follows from: the clearest contradiction, or else the weakest support."""
    decision = combined(contrast.decision for contrast in contrasts)
    chosen = [contrast for contrast in contrasts if contrast.decision == decision]

    def strength(contrast: Contrast) -> float:
        p = contrast.p_value if contrast.adjusted is None else contrast.adjusted
        return 1.0 if p is None else p

    pick = min if decision == "contradicted" else max
    return pick(chosen, key=strength)


def numbers(quantities: Iterable[Quantity]) -> dict[str, Any]:
    """The arguments `measured`, `interval` and `null` of a `Finding` of these quantities.

    Nulls are named after their quantity, as in "r2.untrained", but those of the first quantity plainly.
    """
    measured: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    null: dict[str, float] = {}
    for number, quantity in enumerate(quantities):
        measured[quantity.name] = quantity.value
        if (ends := quantity.interval) is not None:
            interval[quantity.name] = ends
        prefix = f"{quantity.name}." if number else ""
        null |= {f"{prefix}{name}": value for name, value in quantity.references.items()}
    return {"measured": measured, "interval": interval, "null": null}
