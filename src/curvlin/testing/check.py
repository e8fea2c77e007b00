"""Checking an operator of one's own against the laws, and measuring its accuracy over conditions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin.testing.cases import Case
from curvlin.testing.laws import LAWS, Law, Measurement

MakeOperator = Callable[..., PrecisionOperator]
Dense = Tensor | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Entry:
    """One law on one case.

    Attributes:
        law: its name.
        dtype: of the case.
        condition: of the case.
        worst: the measurement that came closest to its limit, or exceeded it most; None where the law had
            nothing to measure.
        error: what was raised instead of an answer.
    """

    law: str
    dtype: torch.dtype
    condition: float
    worst: Measurement | None
    error: Exception | None = None

    @property
    def holds(self) -> bool:
        """Whether every measurement was within its limit."""
        return self.error is None and (self.worst is None or self.worst.holds)


@dataclass(frozen=True)
class Report:
    """What `check_operator` found: one entry per law and dtype. ``print(report)`` is a table."""

    operator: str
    entries: tuple[Entry, ...]

    @property
    def holds(self) -> bool:
        """Whether every law holds."""
        return all(e.holds for e in self.entries)

    @property
    def violations(self) -> tuple[Entry, ...]:
        """The entries that do not hold."""
        return tuple(e for e in self.entries if not e.holds)

    def __str__(self) -> str:
        lines = [
            f"{self.operator}",
            f"{'law':<18}{'dtype':<10}{'cond':>9}{'observed':>11}{'allowed':>11}  {'':<5}worst quantity",
        ]
        for e in self.entries:
            dtype = str(e.dtype).removeprefix("torch.")
            row = f"{e.law:<18}{dtype:<10}{e.condition:>9.1e}"
            if e.error is not None:
                row += f"{'':>11}{'':>11}  FAIL {type(e.error).__name__}: {e.error}"
            elif e.worst is None:
                row += f"{'-':>11}{'-':>11}  -"
            else:
                verdict = "ok" if e.holds else "FAIL"
                row += f"{e.worst.observed:>11.1e}{e.worst.allowed:>11.1e}  {verdict:<5}{e.worst.quantity}"
            lines.append(row)
        return "\n".join(lines)


class OperatorViolation(AssertionError):
    """An operator that breaks at least one law; `report` has all entries."""

    def __init__(self, report: Report) -> None:
        self.report = report
        names = ", ".join(dict.fromkeys(e.law for e in report.violations))
        super().__init__(f"laws violated: {names}\n{report}")


def check_operator(
    make_op: MakeOperator | PrecisionOperator,
    *,
    dense: Dense = None,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    laws: str | Iterable[str] = "all",
    singular: bool = False,
    seed: int = 0,
    raises: bool = True,
) -> Report:
    """Run the laws on an operator, in several dtypes.

        report = check_operator(lambda generator: MyOperator(torch.randn(8, generator=generator).exp()),
                                dense=lambda P: torch.diag(P.d))

    Args:
        make_op: a function that returns the operator, or the operator. It may take `generator` (a seeded
            `torch.Generator`) and `dtype` by name; where it does not take `dtype`, the result is converted.
        dense: the matrix that the operator is meant to be: a tensor, or a differentiable function from an
            operator to it. Without it an operator can only be found to contradict itself.
        dtypes: storage dtypes to check.
        laws: "all", or names from `curvlin.testing.laws.LAWS`.
        singular: the operator has no inverse: laws that need one are left out, and asking must be refused.
        seed: of the generator.
        raises: raise on a violation; otherwise it is only reported.

    Raises:
        OperatorViolation: if a law does not hold, with the report.
        KeyError: if a law is not known.
    """
    chosen = list(LAWS) if laws == "all" else ([laws] if isinstance(laws, str) else list(laws))
    selected = [_named(name) for name in chosen]
    entries, title = [], ""
    for dtype in dtypes:
        P = _made(make_op, dtype, seed)
        title = title or repr(P)
        case = Case.of(P, dense, singular=singular)
        entries += [_entry(law, case) for law in selected]
    report = Report(title, tuple(entries))
    if raises and not report.holds:
        raise OperatorViolation(report)
    return report


def assert_exact(P: PrecisionOperator, dense: Dense = None) -> None:
    """Fail unless the operator is exact in its own dtype: memory, determinism, scale and residual laws.

    Raises:
        LawViolation: naming the law and the quantity.
    """
    case = Case.of(P, dense)
    for name in ("solve", "scale", "no_dense", "determinism"):
        LAWS[name](case)


@dataclass(frozen=True)
class SweepRow:
    """Errors of one operator of a family: relative for solve, inv_quad and variances, absolute for logdet."""

    condition: float
    dtype: torch.dtype
    errors: dict[str, float]


def condition_sweep(
    family: Callable[[float, torch.dtype], Case],
    conditions: Sequence[float],
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
) -> list[SweepRow]:
    """The accuracy of a family of operators over condition numbers, against arbitrary precision.

    Args:
        family: from a condition number and a dtype to a case without batch of at most 60 rows, for example
            ``lambda cond, dtype: make_case("kronecker", size=12, log10cond=math.log10(cond), dtype=dtype)``.
        conditions: condition numbers.
        dtypes: storage dtypes.
    """
    rows = []
    for dtype in dtypes:
        for condition in conditions:
            case = family(condition, dtype)
            P, exact = case.operator, case.exact()
            # A right-hand side in the range of the large eigenvalues: what residuals and gradients look like.
            b = (case.matrix @ torch.randn(case.size, dtype=torch.float64, generator=case.generator())).to(
                dtype
            )
            x, q, d = exact.solve(b), exact.inv_quad(b), exact.inverse_diagonal()
            errors = {
                "solve": float((P.solve(b).double() - x).norm() / x.norm()),
                "inv_quad": float((P.inv_quad(b).double() - q).abs() / q),
                "logdet": float((P.logdet().double() - exact.logdet()).abs()),
                "inverse_diagonal": float(((P.inverse_diagonal().double() - d).abs() / d).max()),
            }
            rows.append(SweepRow(condition, dtype, errors))
    return rows


def _named(name: str) -> Law:
    if name not in LAWS:
        raise KeyError(f"laws must name laws among {sorted(LAWS)}, found {name!r}")
    return LAWS[name]


def _made(make_op: MakeOperator | PrecisionOperator, dtype: torch.dtype, seed: int) -> PrecisionOperator:
    if isinstance(make_op, PrecisionOperator):
        return make_op.to(dtype)
    takes = inspect.signature(make_op).parameters
    offered = {"generator": torch.Generator().manual_seed(seed), "dtype": dtype}
    P = make_op(**{name: value for name, value in offered.items() if name in takes})
    if not isinstance(P, PrecisionOperator):
        raise TypeError(f"make_op must return a PrecisionOperator, found {type(P).__name__}")
    return P.to(dtype)


def _entry(law: Law, case: Case) -> Entry:
    worst: Measurement | None = None
    condition = float("nan")
    try:
        for measurement in law.measure(case):
            if worst is None or not measurement.ratio <= worst.ratio:
                worst = measurement
        condition = case.condition
    except Exception as error:  # a law that cannot be asked is a law that does not hold
        return Entry(law.name, case.dtype, condition, None, error)
    return Entry(law.name, case.dtype, condition, worst)
