"""Updates so much larger than their base that a difference of the two has no digits left; the truth is exact to 80."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curvlin import BlockDiag, Dense, Diagonal, Isotropic, KroneckerSum, LowRankPlusDiag, Woodbury
from curvlin.precision.base import PrecisionOperator
from curvlin.testing import Reference, reference

f64 = torch.float64
D = 6
STRENGTHS = [1e2, 1e5, 1e8]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def spd(n: int, seed: int) -> Tensor:
    X = randn(n, 2 * n, seed=seed)
    return X @ X.mT / n


def updated(base: str, columns: int, strength: float) -> Any:
    """An operator of moderate condition, far larger than its base."""
    U = strength * randn(D, columns, seed=1)
    if base == "diagonal":
        return LowRankPlusDiag(0.5 + torch.arange(D, dtype=f64), U)
    if base == "kronecker":
        return KroneckerSum.shifted(spd(2, 1), spd(3, 2), 0.1).update(U)
    return Woodbury(Isotropic(torch.tensor(2.0, dtype=f64), D), U, core=spd(columns, 3))


UPDATED = [("diagonal", D), ("diagonal", D + 3), ("kronecker", D), ("kronecker", D + 3), ("core", D), ("core", D + 3)]


def exact(P: Any) -> Reference:
    """The operator as its definition, to 80 digits: ``to_dense`` has rounded the base away."""
    import mpmath

    with mpmath.workdps(80):
        U = mpmath.matrix(P.U.tolist())
        core = mpmath.eye(U.cols) if P.core is None else mpmath.matrix(P.core.tolist())
        M = mpmath.matrix(P.base.to_dense().tolist()) + U * core * U.T
        return Reference([[M[i, j] for j in range(D)] for i in range(D)])


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("base", "columns"), UPDATED)
def test_quadratic_form_and_its_gradients(base: str, columns: int, strength: float) -> None:
    """What ``U^T Z^-1 x`` has beside the range of ``U^T`` is rounding, which no gain divides."""
    P = updated(base, columns, strength)
    x, U = randn(D, seed=2).requires_grad_(), P.U.clone().requires_grad_()
    truth = exact(P)
    quad = P._with(U=U).inv_quad(x)
    torch.testing.assert_close(quad, truth.inv_quad(x), rtol=1e-12, atol=0.0)
    y = truth.solve(x)
    along = P.U.mT @ y if P.core is None else P.core @ (P.U.mT @ y)
    found = torch.autograd.grad(quad, (x, U))
    for gradient, right in zip(found, (2 * y, -2 * torch.outer(y, along)), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-10 * float(right.abs().max()))


OTHERS: dict[str, PrecisionOperator] = {
    "isotropic": Isotropic(torch.tensor(0.5, dtype=f64), D),
    "diagonal": Diagonal(1.0 + torch.arange(D, dtype=f64)),
    "dense": Dense(spd(D, 5)),
    "kronecker": KroneckerSum([(spd(2, 6), spd(3, 7))]),
    "two kronecker": KroneckerSum([(spd(2, 6), spd(3, 7)), (spd(2, 8), spd(3, 9))]),
    "blocks": BlockDiag([Dense(spd(2, 6)), Diagonal(torch.ones(4, dtype=f64))], [[4, 1], [0, 2, 3, 5]]),
    "low rank": LowRankPlusDiag(torch.ones(D, dtype=f64), randn(D, 2, seed=8)),
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("base", "columns"), UPDATED)
@pytest.mark.parametrize("other", OTHERS)
def test_trace_of_a_solve(other: str, base: str, columns: int, strength: float) -> None:
    """The base's trace less what the update takes was off by a factor, or negative."""
    P, Q = updated(base, columns, strength), OTHERS[other]
    if base == "kronecker" and other in ("two kronecker", "blocks"):
        Q = OTHERS["kronecker"]
    trace = P.trace_solve(Q)
    torch.testing.assert_close(trace, exact(P).solve(Q.to_dense()).trace(), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("other", OTHERS)
def test_trace_of_a_solve_has_derivatives(other: str) -> None:
    """Where columns are solved for as where a difference is taken: those of the dense formula."""
    Q = OTHERS[other]
    for strength in (1.0, 1e3):
        d = (1.0 + torch.arange(D, dtype=f64)).requires_grad_()
        U = (strength * randn(D, D, seed=1)).requires_grad_()
        weights = (1e5 * torch.ones(()), torch.ones(()))  # of the two gradients, to be of one size
        found, right = (
            torch.autograd.grad(value, (d, U), create_graph=True)
            for value in (
                LowRankPlusDiag(d, U).trace_solve(Q),
                (torch.linalg.inv(torch.diag(d) + U @ U.mT) * Q.to_dense()).sum(),
            )
        )
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-8 * float(right[0].abs().max()))
        second, truth = (
            torch.autograd.grad(sum((w * t).square().sum() for w, t in zip(weights, g, strict=True)), (d, U))
            for g in (found, right)
        )
        torch.testing.assert_close(second, truth, rtol=1e-7, atol=1e-7 * float(truth[0].abs().max()))


def test_the_reference_of_a_strong_update_is_not_that_of_its_rounded_matrix() -> None:
    P = updated("diagonal", 3, 1e8)
    with pytest.raises(ValueError, match="positive definite"):
        reference(P)
    assert float(P.logdet()) == pytest.approx(float(exact(P).logdet()), rel=1e-13)
