"""Matrices have the spectrum that was asked for, and cases are what they say."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlin.testing import (
    Case,
    Spec,
    index_sets,
    make_case,
    operator_pairs,
    operators,
    rhs,
    right_hand_sides,
    spd,
)
from curvlin.testing.matrices import SPECTRA, eigenvalues, root_matrix, spd_matrix


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_matrices_have_the_prescribed_spectrum(spectrum: str, n: int) -> None:
    values = eigenvalues(n, spectrum, log10cond=6.0)
    assert float(values[0]) == 1.0
    assert bool((values.diff() <= 0).all())
    positive = values[values > 0]
    if n > 1 and not (spectrum == "rank-deficient" and n == 2):
        assert float(positive[-1]) == pytest.approx(1e-6, rel=1e-6)
    assert bool((values == 0).any()) == (spectrum == "rank-deficient" and n > 1)
    matrix = spd_matrix(values, torch.Generator().manual_seed(0))
    assert torch.equal(matrix, matrix.mT)
    torch.testing.assert_close(torch.linalg.eigvalsh(matrix).flip(0), values, rtol=0.0, atol=1e-14)


def test_a_repeated_eigenvalue_is_repeated_to_the_bit() -> None:
    assert torch.equal(
        spd_matrix(eigenvalues(5, "step", 0.0) * 3, torch.Generator()), 3 * torch.eye(5).double()
    )


@pytest.mark.parametrize("rows", [2, 4, 9])
def test_roots_have_the_prescribed_spectrum(rows: int) -> None:
    values = eigenvalues(4, "decay", 3.0)
    R = root_matrix(values, rows, torch.Generator().manual_seed(1))
    assert R.shape == (rows, 4)
    expected = values.clone()
    expected[rows:] = 0.0
    torch.testing.assert_close(torch.linalg.eigvalsh(R.mT @ R).flip(0), expected, rtol=1e-10, atol=1e-15)


@given(matrix=spd(n=st.integers(1, 6)))
def test_spd_draws_semidefinite_matrices(matrix: Tensor) -> None:
    values = torch.linalg.eigvalsh(matrix)
    assert bool((values >= -1e-14 * values[-1]).all())
    assert 1e-9 < float(values[-1]) < 1e9


@given(case=operators(sizes=(4, 6)))
def test_cases_are_reproducible_and_hold_parameters_of_the_right_dtype(case: Case) -> None:
    again = make_case(case.kind, case.spec)
    assert all(torch.equal(a, b) for a, b in zip(case.tensors, again.tensors, strict=True))
    assert all(t.dtype == case.dtype == case.spec.dtype for t in case.tensors)
    assert case.batch_shape == case.spec.batch
    assert case.matrix.shape == (*case.spec.batch, case.size, case.size)
    assert not case.recipe.singular
    assert pickle.loads(pickle.dumps(case.spec)) == case.spec


@given(pair=operator_pairs(sizes=(4, 6)))
def test_pairs_share_a_space(pair: tuple[Case, Case]) -> None:
    left, right = pair
    assert (left.size, left.dtype, left.batch_shape) == (right.size, right.dtype, right.batch_shape)


@given(index=index_sets(7))
def test_index_sets_are_distinct_and_not_empty(index: Tensor) -> None:
    assert 1 <= len(index) == len(set(index.tolist())) <= 7


@given(data=st.data())
def test_right_hand_sides_lie_where_they_say(data: st.DataObject) -> None:
    case = make_case("dense", Spec(size=8, log10cond=6.0, seed=2))
    X = data.draw(rhs(case, kinds=("in_range",)))
    # The two largest of eight eigenvalues decay by a factor of ten each: P acts on their span by at least 1e-1.
    assert float((case.matrix @ X).norm() / X.norm()) > 0.1
    sides = right_hand_sides(case)
    assert float((case.matrix @ sides["in_complement"]).norm()) < 1e-4 * float(sides["in_complement"].norm())
    assert not bool(sides["zero"].any())
    assert float(sides["huge"].norm()) > 1e10


def test_mixed_batches_leave_some_parameters_without_batch() -> None:
    case = make_case("kronecker_shifted", Spec(size=6, batch=(3,), mixed=True))
    assert {
        t.shape[: t.ndim - p.ndim] for t, p in zip(case.tensors, case.recipe.parameters, strict=True)
    } == {
        torch.Size([3]),
        torch.Size([]),
    }
    assert case.operator.batch_shape == (3,)


def test_a_case_around_an_operator_keeps_its_definition() -> None:
    original = make_case("dense", Spec(size=4))
    case = Case.of(original.operator, dense=lambda P: P.to_dense())
    assert torch.equal(case.matrix, original.matrix)
    assert case.recipe.parameters[0].symmetric
    torch.testing.assert_close(case.exact().logdet(), original.exact().logdet())
