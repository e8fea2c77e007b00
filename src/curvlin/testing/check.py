"""Checking an operator of one's own against the laws, over dtypes, conditions, sizes, scales and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from curvlin.errors import NotPositiveDefiniteError
from curvlin.precision.base import PrecisionOperator
from curvlin.testing.cases import Case
from curvlin.testing.kinds import Spec
from curvlin.testing.laws import LAWS, Law, Measurement
from curvlin.testing.maker import Dense, MakeOperator, Maker
from curvlin.testing.tables import plain

DTYPES = (torch.float64, torch.float32)
CONDITIONS = {torch.float64: (1.0, 1e4, 1e8, 1e12), torch.float32: (1.0, 1e2, 1e5)}
"""Conditions that are swept over; the last is the greatest at which answers are promised."""
LARGE_LAWS = ("solve", "log_determinant", "inverse", "no_dense")
"""What `check_operator` asks of one large operator: dense matrices show there, and algorithms that size switches."""


@dataclass(frozen=True)
class Entry:
    """One law at one dtype and condition.

    Attributes:
        law: its name.
        dtype: of the operator.
        condition: as asked of `make_op`, or as measured where it was not asked.
        worst: the measurement that came closest to its limit, or exceeded it most; None where the law had
            nothing to measure.
        error: what was raised instead of an answer.
        spec: what was asked of `make_op` where that happened.
    """

    law: str
    dtype: torch.dtype
    condition: float
    worst: Measurement | None
    error: Exception | None = None
    spec: Spec | None = None

    @property
    def holds(self) -> bool:
        """Whether every measurement was within its limit."""
        return self.error is None and (self.worst is None or self.worst.holds)

    @property
    def cell(self) -> str:
        """Observed and allowed error in a few characters."""
        if self.error is not None:
            return "raised"
        if self.worst is None:
            return "-"
        if self.holds and self.worst.allowed == 0:
            return "exact"
        sign = "<" if self.holds else ">"
        return f"{self.worst.observed:.0e} {sign} {self.worst.allowed:.0e}"

    def __str__(self) -> str:
        found = f"{type(self.error).__name__}: {self.error}" if self.error is not None else str(self.worst)
        return f"{self.law}, {_name(self.dtype)}, condition {self.condition:.0e}: {found}"

    @property
    def _badness(self) -> float:
        if self.error is not None:
            return math.inf
        ratio = 0.0 if self.worst is None else self.worst.ratio
        return math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class Report:
    """What `check_operator` found: one entry for each law, dtype and condition. ``print(report)`` is a table.

    Attributes:
        operator: which one was checked.
        entries: in the order of the laws.
        reproduction: code that shows the first violation on the smallest case that was found; empty if none.
    """

    operator: str
    entries: tuple[Entry, ...]
    reproduction: str = ""

    @property
    def holds(self) -> bool:
        """Whether every law holds."""
        return all(e.holds for e in self.entries)

    @property
    def violations(self) -> tuple[Entry, ...]:
        """The entries that do not hold."""
        return tuple(e for e in self.entries if not e.holds)

    def __str__(self) -> str:
        columns = list(dict.fromkeys((e.dtype, e.condition) for e in self.entries))
        cells = {(e.law, e.dtype, e.condition): e.cell for e in self.entries}
        table = plain(
            [self.operator, *(f"{_name(dtype)} {condition:.0e}" for dtype, condition in columns)],
            [
                [law, *(cells.get((law, *column), "-") for column in columns)]
                for law in dict.fromkeys(e.law for e in self.entries)
            ],
        )
        parts = [
            table,
            "observed < allowed error, by dtype and condition number; - where there is nothing to ask",
        ]
        if not self.holds:
            worst = {(e.law, e.dtype): e for e in sorted(self.violations, key=lambda e: e._badness)}
            lines = [str(worst[key]) for key in dict.fromkeys((e.law, e.dtype) for e in self.violations)]
            parts.append("violated:\n" + "\n".join(f"  {line}" for line in lines))
            parts.append("smallest case found:\n\n" + _indented(self.reproduction))
        return "\n\n".join(parts)


class OperatorViolation(AssertionError):
    """An operator that breaks at least one law; `report` has all entries."""

    def __init__(self, report: Report) -> None:
        self.report = report
        names = ", ".join(dict.fromkeys(e.law for e in report.violations))
        super().__init__(f"laws violated: {names}\n\n{report}")


def check_operator(
    make_op: MakeOperator,
    dense: Dense = None,
    laws: str | Iterable[str] = "all",
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    sizes: Sequence[int] = (12, 5, 1),
    conditions: Sequence[float] | None = None,
    large: int | None = 1000,
    singular: bool = False,
    seed: int = 0,
    raises: bool = True,
) -> Report:
    """Run the laws on an operator, over dtypes, conditions, sizes, scales and batches.

        def make(size, log10cond, generator):
            d = torch.logspace(0, -log10cond, size, dtype=torch.float64)
            return MyOperator(d[torch.randperm(size, generator=generator)])

        report = check_operator(make, dense=lambda P: torch.diag(P.d))

    `make_op` is asked for what it takes by name: ``size``, ``condition`` or ``log10cond``, ``scale`` or
    ``log10scale``, ``batch`` (a tuple), ``spectrum`` (one of `SPECTRA`), ``dtype``, ``generator`` or ``seed``. What it
    takes is varied; one that takes none of these (or an operator) is checked as it is. Where it does not take
    ``dtype``, its result is converted.

    Args:
        make_op: a function that returns the operator, or the operator, or the name of a kind in `KINDS`.
        dense: the matrix that the operator is meant to be: a tensor, or a differentiable function from an
            operator without batch to it. Without it an operator can only be found to contradict itself.
        laws: "all", or names from `LAWS`.
        dtypes: storage dtypes.
        sizes: numbers of rows; every second one comes with a batch and another scale.
        conditions: condition numbers; `CONDITIONS` of each dtype when None.
        large: the size of one more operator, for the laws in `LARGE_LAWS`; None for none. Matrices of a few rows
            hide between vectors, and other libraries change the algorithm at some hundred rows.
        singular: the operators have no inverse: laws that need one are left out, and asking must be refused.
        seed: of the generator.
        raises: raise on a violation; otherwise it is only reported.

    Raises:
        OperatorViolation: if a law does not hold, with the report and the smallest case that still breaks it.
        KeyError: if a law is not known.
        TypeError: if `make_op` needs arguments that are not offered, or returns no operator.
        ValueError: if `make_op` fails.
    """
    selected = named_laws(laws)
    maker = Maker(make_op, dense, singular)
    found: dict[tuple[str, torch.dtype, float], Entry] = {}
    title = ""
    for dtype in dtypes:
        asked = CONDITIONS.get(dtype, CONDITIONS[torch.float32]) if conditions is None else conditions
        specs = list(maker.sweep(dtype, sizes, [math.log10(c) for c in asked], seed))
        for spec in specs:
            case = maker.case(spec)
            title = title or type(case.operator).__name__
            for law in selected:
                _keep(found, _entry(law, case, spec, maker))
        thorough = [law for law in selected if law.name in LARGE_LAWS]
        if large is not None and thorough and "size" in maker.takes:
            spec = maker.restricted(
                replace(specs[0], size=large, log10cond=math.log10(asked[len(asked) // 2]))
            )
            case = maker.case(spec)
            for law in thorough:
                _keep(found, _entry(law, case, spec, maker))
    order = {law.name: i for i, law in enumerate(selected)}
    entries = sorted(found.values(), key=lambda e: order[e.law])
    report = Report(title, tuple(entries))
    if not report.holds:
        report = replace(report, reproduction=_reproduction(report.violations[0], maker))
        if raises:
            raise OperatorViolation(report)
    return report


def assert_exact(P: PrecisionOperator, dense: Dense = None) -> None:
    """Fail unless the operator is exact in its own dtype: residual, scale, memory and determinism laws.

    Raises:
        LawViolation: naming the law and the quantity.
    """
    case = Case.of(P, dense)
    for name in ("solve", "scale", "no_dense", "determinism"):
        LAWS[name](case)


def named_laws(laws: str | Iterable[str]) -> list[Law]:
    """The laws of these names.

    Raises:
        KeyError: if one is not known.
    """
    names = [laws] if isinstance(laws, str) else list(laws)
    if names == ["all"]:
        names = list(LAWS)
    for name in names:
        if name not in LAWS:
            raise KeyError(f"laws must name laws among {sorted(LAWS)}, found {name!r}")
    return [LAWS[name] for name in names]


def _keep(found: dict[tuple[str, torch.dtype, float], Entry], entry: Entry) -> None:
    """The worst entry for each law, dtype and condition."""
    key = entry.law, entry.dtype, entry.condition
    kept = found.get(key)
    empty = kept is not None and kept.worst is None and kept.error is None
    if kept is None or empty or entry._badness > kept._badness:
        found[key] = entry


def _entry(law: Law, case: Case, spec: Spec, maker: Maker) -> Entry:
    """What a law finds on a case."""
    asked = "log10cond" in maker.takes
    worst: Measurement | None = None
    error: Exception | None = None
    try:
        for measurement in law.measure(case):
            if worst is None or not measurement.ratio <= worst.ratio:
                worst = measurement
    except Exception as raised:  # a law that cannot be asked is a law that does not hold
        if not (isinstance(raised, NotPositiveDefiniteError) and _beyond(case)):
            error = raised
    condition = 10.0**spec.log10cond if asked else _condition(case)
    return Entry(law.name, case.dtype, condition, worst, error, spec)


def _beyond(case: Case) -> bool:
    """Whether the matrix, as stored, is singular to rounding of its dtype: refusing it is right."""
    smallest, largest = case.eigen[0][..., 0], case.norm
    return bool((smallest < case.size * torch.finfo(case.dtype).eps * largest).any())


def _condition(case: Case) -> float:
    try:
        return case.condition
    except Exception:  # no dense matrix to take it from
        return math.nan


def _reproduction(violation: Entry, maker: Maker) -> str:
    """Code for the smallest spec that breaks the law, at the dtype where it was seen."""
    assert violation.spec is not None
    law, seen = LAWS[violation.law], violation.spec
    answers: dict[Spec, bool] = {}

    def violates(spec: Spec) -> bool:
        spec = maker.restricted(spec)
        if spec not in answers:
            try:
                case = maker.case(spec)
            except ValueError:  # not a case that exists
                answers[spec] = False
            else:
                answers[spec] = not _entry(law, case, spec, maker).holds
        return answers[spec]

    return maker.reproduction(law.name, maker.restricted(smallest(violates, seen)))


def smallest(violates: Callable[[Spec], bool], seen: Spec) -> Spec:
    """The smallest spec that still violates, in size, batch, condition, scale and spectrum.

    One coordinate at a time takes the first of its values, from the simplest on, with which the law is still broken,
    until no coordinate changes: some ten cases, where a search that knows nothing of their order needs a hundred.

    Args:
        violates: whether a spec does.
        seen: one that does.
    """
    found, before = seen, None
    while found != before:
        before = found
        for name, values in SIMPLER.items():
            last = getattr(found, name)
            for value in values:
                if value == last or (name in ("size", "log10cond") and value > last):
                    break
                if violates(simpler := replace(found, **{name: value})):
                    found = simpler
                    break
    return found


SIMPLER: dict[str, tuple[Any, ...]] = {
    "size": (1, 2, 3, 4, 6, 9, 12, 24, 48, 96, 192, 384, 768),
    "batch": ((),),
    "log10cond": (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0),
    "log10scale": (0.0,),
    "spectrum": ("decay",),
}
"""What is tried for each coordinate of a spec, from the simplest on."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _indented(code: str) -> str:
    return "\n".join(f"    {line}" for line in code.splitlines())
