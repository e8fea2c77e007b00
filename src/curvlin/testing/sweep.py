"""The accuracy of a family of operators over condition numbers, as a table for a paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from curvlin.errors import NotPositiveDefiniteError
from curvlin.testing.cases import Case
from curvlin.testing.kinds import Spec
from curvlin.testing.maker import Dense, MakeOperator, Maker
from curvlin.testing.oracle import MAX_SIZE
from curvlin.testing.tables import latex, markdown, plain

QUANTITIES = ("solve", "inv_quad", "logdet", "inverse_diagonal")
"""What is measured: relative errors, that of the log-determinant absolute."""
INDEFINITE = "not PD"


@dataclass(frozen=True)
class SweepRow:
    """Errors at one condition and dtype: relative for solve, inv_quad and variances, absolute for logdet.

    NaN where the matrix, its entries rounded to that dtype, is not positive definite.
    """

    condition: float
    dtype: torch.dtype
    errors: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """The result of `condition_sweep`. Prints as plain text; `to_markdown` and `to_latex` are for papers."""

    operator: str
    rows: tuple[SweepRow, ...]

    def __str__(self) -> str:
        return plain(*self._table("{:.0e}"))

    def to_markdown(self) -> str:
        """A Markdown table."""
        return markdown(*self._table("{:.1e}"))

    def to_latex(self) -> str:
        r"""A ``tabular`` for the package booktabs, numbers as ``$1.2 \cdot 10^{-3}$``."""
        head, rows = self._table("{:.1e}")
        return latex(
            [name.replace("_", r"\_") for name in head],
            [[row[0], *(_power(cell) for cell in row[1:])] for row in rows],
        )

    def _table(self, number: str) -> tuple[list[str], list[list[str]]]:
        head = ["dtype", "condition", *QUANTITIES]
        rows = []
        for row in self.rows:
            errors = [row.errors[q] for q in QUANTITIES]
            cells = [INDEFINITE if math.isnan(e) else number.format(e) for e in errors]
            rows.append([str(row.dtype).removeprefix("torch."), f"{row.condition:.0e}", *cells])
        return head, rows


def condition_sweep(
    make_op: MakeOperator,
    conditions: Sequence[float] = (1e2, 1e4, 1e6, 1e8, 1e10, 1e12),
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    *,
    dense: Dense = None,
    size: int = 12,
    draws: int = 3,
    seed: int = 0,
) -> Sweep:
    """The accuracy of a family of operators over condition numbers, against 80 digits.

        print(condition_sweep("kronecker_shifted", [1e2, 1e6]).to_latex())

    Right-hand sides lie in the range of P, where solutions are small and digits are lost: residuals and gradients
    do as well.

    Args:
        make_op: the name of a kind in `KINDS`, or a function as for `check_operator` that takes ``condition`` or
            ``log10cond``.
        conditions: condition numbers to ask for.
        dtypes: storage dtypes. The truth is that of the parameters as stored, for kinds with no rounding at all,
            for other operators that of `dense` in float64.
        dense: the matrix that the operator is meant to be, as for `check_operator`.
        size: number of rows, at most 60.
        draws: how many operators are drawn at each condition; the largest error is kept.
        seed: of the first draw.

    Raises:
        TypeError: if a function takes no condition.
        ValueError: if `size` is above 60.
    """
    if size > MAX_SIZE:
        raise ValueError(f"size must be at most {MAX_SIZE}, found {size}")
    maker = Maker(make_op, dense)
    if "log10cond" not in maker.takes:
        raise TypeError("make_op must take condition or log10cond by name, found neither")
    rows, title = [], make_op if isinstance(make_op, str) else ""
    for dtype in dtypes:
        for condition in conditions:
            errors = dict.fromkeys(QUANTITIES, 0.0)
            for draw in range(draws):
                spec = Spec(size=size, dtype=dtype, log10cond=math.log10(condition), seed=seed + draw)
                case = maker.case(spec)
                title = title or type(case.operator).__name__
                for name, error in _errors(case).items():
                    errors[name] = max(errors[name], error) if error == error else error
            rows.append(SweepRow(condition, dtype, errors))
    return Sweep(title, tuple(rows))


def _errors(case: Case) -> dict[str, float]:
    P, smallest = case.operator, case.eigen[0][..., 0]
    b = case.matrix @ torch.randn(case.size, dtype=torch.float64, generator=case.generator())
    b = b.to(case.dtype)
    try:
        answers = [P.solve(b), P.inv_quad(b), P.logdet(), P.inverse_diagonal()]
    except NotPositiveDefiniteError:
        return dict.fromkeys(QUANTITIES, math.nan)
    if bool((smallest <= 0).any()):  # rounding made it so; there is no truth to compare with
        return dict.fromkeys(QUANTITIES, math.nan)
    exact = case.exact()
    x, q, logdet, d = (answer.double() for answer in answers)
    truth, energy, variances = exact.solve(b), exact.inv_quad(b), exact.inverse_diagonal()
    return {
        "solve": float((x - truth).norm() / truth.norm()),
        "inv_quad": float((q - energy).abs() / energy),
        "logdet": float((logdet - exact.logdet()).abs()),
        "inverse_diagonal": float(((d - variances).abs() / variances).max()),
    }


def _power(cell: str) -> str:
    r"""``1.2e-03`` as ``$1.2 \cdot 10^{-3}$``."""
    if "e" not in cell or cell == INDEFINITE:
        return cell
    digits, exponent = cell.split("e")
    return rf"$10^{{{int(exponent)}}}$" if digits == "1" else rf"${digits} \cdot 10^{{{int(exponent)}}}$"
