"""`check_operator`, `assert_exact`, `condition_sweep`: what they report, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlin.precision.diagonal import Diagonal
from curvlin.testing import (
    LAWS,
    LawViolation,
    Measurement,
    assert_exact,
    check_operator,
    condition_sweep,
    make_case,
)


def positive(generator: torch.Generator, dtype: torch.dtype) -> Diagonal:
    return Diagonal(torch.rand(6, generator=generator, dtype=dtype) + 0.5)


def test_the_report_has_one_row_per_law_and_dtype_and_prints_them() -> None:
    report = check_operator(positive, dense=lambda P: torch.diag(P.values), laws=["solve", "roots"])
    assert [(e.law, e.dtype) for e in report.entries] == [
        ("solve", torch.float64),
        ("roots", torch.float64),
        ("solve", torch.float32),
        ("roots", torch.float32),
    ]
    table = str(report).splitlines()
    assert len(table) == 2 + len(report.entries)
    assert all("ok" in row for row in table[2:])


def test_a_law_that_cannot_be_asked_is_a_violation() -> None:
    def broken(P: Any) -> Tensor:
        raise RuntimeError("no matrix today")

    report = check_operator(positive, dense=broken, laws=["no_dense", "matrix"], raises=False)
    assert not report.holds
    assert "no matrix today" in str(report)


def test_unknown_laws_and_wrong_results_are_refused() -> None:
    with pytest.raises(KeyError, match="laws must name"):
        check_operator(positive, laws=["gravity"])
    with pytest.raises(TypeError, match="make_op must return a PrecisionOperator, found Tensor"):
        check_operator(lambda: torch.eye(3))


def test_assert_exact_finds_an_absolute_constant() -> None:
    class Jittered(Diagonal):
        def _solve(self, X: Tensor, factors: Any) -> Tensor:
            return X / (self._column() + 1e-6)

    values = torch.rand(6, dtype=torch.float64) + 0.5
    assert_exact(Diagonal(values))
    with pytest.raises(LawViolation):
        assert_exact(Jittered(values), dense=torch.diag(values))


def test_condition_sweep_measures_against_arbitrary_precision() -> None:
    rows = condition_sweep(
        lambda cond, dtype: make_case("dense", size=8, log10cond=math.log10(cond), dtype=dtype),
        [1e2, 1e8],
        [torch.float64],
    )
    assert [row.condition for row in rows] == [1e2, 1e8]
    mild, harsh = (row.errors for row in rows)
    assert 0 < mild["inverse_diagonal"] < 1e-12
    assert mild["inverse_diagonal"] < harsh["inverse_diagonal"] < 1e-6


def test_nan_is_never_allowed() -> None:
    assert not Measurement("x", float("nan"), 1.0).holds
    assert not Measurement("x", 1.0, float("nan")).holds
    assert Measurement("x", 0.0, 0.0).holds


def test_the_law_groups_are_all_there_and_say_what_they_are() -> None:
    assert [law.number for law in LAWS.values()] == list(range(1, 19))
    assert all(len(law.doc) > 20 for law in LAWS.values())
