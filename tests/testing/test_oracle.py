"""The reference is right where the answer is known in closed form, far beyond float64."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from curvlin.testing import KINDS, Reference, Spec, make_case, reference
from curvlin.testing.cases import TORCH


def hilbert(n: int) -> np.ndarray:
    with mpmath.workdps(80):
        return np.array([[mpmath.mpf(1) / (i + j + 1) for j in range(n)] for i in range(n)], dtype=object)


def test_logdet_of_the_hilbert_matrix() -> None:
    """Its condition is 1e16 at 12 rows; the determinant is a ratio of factorials."""
    n = 12
    c = math.prod(math.factorial(i) for i in range(n))
    determinant = Fraction(c**4, math.prod(math.factorial(i) for i in range(2 * n)))
    exact = math.log(determinant.numerator) - math.log(determinant.denominator)
    assert float(Reference(hilbert(n)).logdet()) == pytest.approx(exact, rel=1e-15)


def test_inverse_of_the_hilbert_matrix_is_integer() -> None:
    R = Reference(hilbert(8))
    inverse = R.solve(torch.eye(8, dtype=torch.float64))
    assert torch.equal(inverse, inverse.round())
    assert float(inverse[0, 0]) == 64.0
    assert torch.equal(R.inverse_diagonal(), inverse.diagonal())
    x = torch.arange(8, dtype=torch.float64)
    assert float(R.inv_quad(x)) == pytest.approx(float(x @ inverse @ x), rel=1e-6)


def test_solve_takes_vectors_and_columns() -> None:
    R = Reference(torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)))
    assert torch.equal(R.solve(torch.tensor([2.0, 4.0])), torch.ones(2, dtype=torch.float64))
    assert R.solve(torch.ones(2, 3)).shape == (2, 3)


def test_what_is_not_definite_or_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        Reference(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="at most 60 rows"):
        Reference(torch.eye(61))
    with pytest.raises(ValueError, match="square"):
        Reference(torch.ones(2, 3))


def test_reference_of_an_operator() -> None:
    case = make_case("dense", size=5)
    assert torch.allclose(reference(case.operator).logdet(), case.matrix.logdet(), rtol=1e-12)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_float64_and_exact_assembly_agree(kind: str) -> None:
    """One formula, three number systems: the float64 matrix is the exact one, rounded."""
    case = make_case(kind, Spec(size=6, log10cond=3.0, seed=4))
    exact = case.exact()
    matrix = case.recipe.assemble(TORCH, *case.tensors)
    torch.testing.assert_close(exact.logdet(), torch.linalg.slogdet(matrix)[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        exact.inverse_diagonal(), torch.linalg.inv(matrix).diagonal(), rtol=1e-9, atol=0.0
    )
