"""`check_operator` and `assert_exact`: what they ask for, what they report, how they shrink, what they refuse."""

from typing import Any

import pytest
import torch
from soils import spectrum
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin.precision.diagonal import Diagonal
from curvlin.testing import (
    KINDS,
    LAWS,
    LawViolation,
    Measurement,
    OperatorViolation,
    Spec,
    assert_exact,
    check_operator,
    make_case,
)
from curvlin.testing.check import CONDITIONS, smallest


def healthy(size: int, log10cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Diagonal:
    return Diagonal(spectrum(size, log10cond, batch, generator))


class HardToFind(Diagonal):
    """Wrong from four rows on, for batches, at condition 1e8 and above."""

    def _solve(self, X: Tensor, factors: Any) -> Tensor:
        hard = self.size >= 4 and self.batch_shape and float(self.values.max() / self.values.min()) > 1e7
        return super()._solve(X, factors) * (1.001 if hard else 1)


def hard_to_find(size: int, log10cond: float, batch: tuple[int, ...], generator: torch.Generator) -> Diagonal:
    return HardToFind(spectrum(size, log10cond, batch, generator))


def matrix(P: Diagonal) -> Tensor:
    return torch.diag(P.values)


def positive(generator: torch.Generator, dtype: torch.dtype) -> Diagonal:
    return Diagonal(torch.rand(6, generator=generator, dtype=dtype) + 0.5)


# -- the report ---------------------------------------------------------------------------------------------------


def test_the_report_has_one_entry_for_each_law_dtype_and_condition() -> None:
    report = check_operator(healthy, matrix, laws=["solve", "roots"], sizes=[3])
    assert report.holds
    assert [(e.law, e.dtype, e.condition) for e in report.entries] == [
        (law, dtype, condition)
        for law in ("solve", "roots")
        for dtype, conditions in CONDITIONS.items()
        for condition in conditions
    ]
    head, *rows = str(report).splitlines()[:3]
    assert head.split()[0] == "Diagonal"
    assert [row.split()[0] for row in rows] == ["solve", "roots"]
    assert all(row.count("<") == 7 for row in rows)


def test_an_operator_is_checked_as_it_is() -> None:
    P = Diagonal(torch.tensor([1.0, 10.0]).double())
    report = check_operator(P, matrix, ["solve"])
    assert [(e.dtype, round(e.condition, 4)) for e in report.entries] == [
        (torch.float64, 10.0),
        (torch.float32, 10.0),
    ]


def test_what_a_maker_takes_is_varied_and_the_rest_is_left_alone() -> None:
    asked: list[tuple[Any, ...]] = []

    def make(size: int, scale: float, condition: float, seed: int, *, extra: int = 7) -> Diagonal:
        asked.append((size, scale, condition, seed, extra))
        return Diagonal(scale * torch.logspace(0, -torch.tensor(condition).log10(), size).double())

    check_operator(make, laws="matrix", dtypes=[torch.float64], sizes=(4, 2), conditions=(1e1, 1e3), seed=5)
    assert sorted(asked) == [
        (2, 1e6, 1e1, 5, 7),
        (2, 1e6, 1e3, 5, 7),
        (4, 1.0, 1e1, 5, 7),
        (4, 1.0, 1e3, 5, 7),
    ]


def test_kinds_are_checked_by_name() -> None:
    assert check_operator("kronecker_two", laws=["solve", "inverse"], sizes=[6]).holds


def test_dense_matrices_are_looked_for_at_a_size_where_they_show() -> None:
    class Densifying(Diagonal):
        def _matmul(self, X: Tensor) -> Tensor:
            return self.to_dense() @ X

    def make(size: int) -> Diagonal:
        return Densifying(torch.ones(size, dtype=torch.float64))

    report = check_operator(make, laws="no_dense", sizes=[4], raises=False)
    assert {e.law for e in report.violations} == {"no_dense"}
    assert report.violations[0].worst is not None
    assert report.violations[0].worst.observed == 1000**2
    assert not check_operator(make, laws="no_dense", sizes=[300], large=None, raises=False).holds


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_as_an_operator_of_which_nothing_is_known(kind: str) -> None:
    """Without recipe or definition: what the laws assume of a stranger holds for all of ours."""

    def make(
        size: int, log10cond: float, log10scale: float, batch: tuple[int, ...], spectrum: str, seed: int
    ) -> PrecisionOperator:
        spec = Spec(
            size=size, log10cond=log10cond, log10scale=log10scale, batch=batch, spectrum=spectrum, seed=seed
        )
        return make_case(kind, spec).operator

    assert check_operator(make, sizes=(6, 4), large=192).holds


# -- shrinking ----------------------------------------------------------------------------------------------------


def test_a_violation_comes_with_the_smallest_case_that_shows_it() -> None:
    with pytest.raises(OperatorViolation) as caught:
        check_operator(hard_to_find, matrix, laws=["matrix", "solve"])
    report = caught.value.report
    assert {e.law for e in report.violations} == {"solve"}
    assert "size=4, log10cond=8.0, batch=(2,)" in report.reproduction
    assert report.reproduction.splitlines()[-1] == "LAWS['solve'](Case.of(P, matrix))"
    assert report.reproduction.splitlines()[0] in str(caught.value)
    with pytest.raises(LawViolation, match="'solve' is violated"):
        exec(report.reproduction, {})


def test_a_reproduction_of_what_cannot_be_imported_says_so() -> None:
    report = check_operator(
        lambda size: HardToFind(torch.ones(size)), lambda P: 2 * P.to_dense(), "matrix", raises=False
    )
    assert "# make_op and dense: as given to check_operator" in report.reproduction
    assert "P = make_op(size=1).to(torch.float64)" in report.reproduction


def test_the_smallest_spec_is_smallest_in_every_direction() -> None:
    seen = Spec(size=12, batch=(2,), log10cond=12.0, log10scale=6.0, spectrum="step", seed=3)
    assert smallest(lambda s: s.size >= 5 and s.log10cond >= 3, seen) == Spec(size=6, log10cond=4.0, seed=3)
    assert smallest(lambda s: s == seen, seen) == seen
    assert smallest(lambda s: bool(s.batch) and s.spectrum == "step", seen) == Spec(
        size=1, batch=(2,), log10cond=0.0, spectrum="step", seed=3
    )


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_law_that_cannot_be_asked_is_a_violation() -> None:
    def broken(P: Any) -> Tensor:
        raise RuntimeError("no matrix today")

    report = check_operator(positive, dense=broken, laws=["no_dense", "matrix"], raises=False)
    assert not report.holds
    assert "no matrix today" in str(report)


def test_refusing_is_right_only_for_what_is_singular_to_rounding() -> None:
    class Timid(Diagonal):
        def _factorize(self) -> None:
            from curvlin import NotPositiveDefiniteError

            if float(self.values.min()) < 1e-5:
                raise NotPositiveDefiniteError("Timid", 0.0)

    values = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    report = check_operator(Timid(values), matrix, ["solve"], raises=False)
    assert [e.holds for e in report.entries] == [False, True]  # float64 holds 1e-9, float32 does not


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(KeyError, match="laws must name"):
        check_operator(positive, laws=["gravity"])
    with pytest.raises(TypeError, match="make_op must return a PrecisionOperator, found Tensor"):
        check_operator(lambda: torch.eye(3))  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="found the parameter 'colour' without a default"):
        check_operator(lambda size, colour: Diagonal(torch.ones(size)))
    with pytest.raises(ValueError, match=r"make_op must serve size=5, found AssertionError: .*sizes="):

        def even(size: int) -> Diagonal:
            assert size % 2 == 0
            return Diagonal(torch.ones(size))

        check_operator(even)


def test_assert_exact_finds_an_absolute_constant() -> None:
    class Jittered(Diagonal):
        def _solve(self, X: Tensor, factors: Any) -> Tensor:
            return X / (self._column() + 1e-6)

    values = torch.rand(6, dtype=torch.float64) + 0.5
    assert_exact(Diagonal(values))
    with pytest.raises(LawViolation):
        assert_exact(Jittered(values), dense=torch.diag(values))


def test_a_batch_is_compared_with_the_truth_of_each_element() -> None:
    """The exact reference is that of the element, also where `dense` is a function of the operator."""
    case = make_case("diagonal", size=3, batch=(2,))
    from curvlin.testing import Case

    around = Case.of(case.operator, matrix)
    assert torch.allclose(around.logdet, case.logdet, rtol=1e-14)
    assert torch.allclose(around.inverse, case.inverse, rtol=1e-14)


def test_nan_is_never_allowed() -> None:
    assert not Measurement("x", float("nan"), 1.0).holds
    assert not Measurement("x", 1.0, float("nan")).holds
    assert Measurement("x", 0.0, 0.0).holds


def test_the_law_groups_are_all_there_and_say_what_they_are() -> None:
    assert [law.number for law in LAWS.values()] == list(range(1, 19))
    assert all(len(law.doc) > 20 for law in LAWS.values())
