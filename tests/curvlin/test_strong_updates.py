"""Updates so much larger than their base that a difference of the two has no digits left; the truth is exact to 80."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from draws import randn
from torch import Tensor

from curvlin import BlockDiag, Dense, Diagonal, Isotropic, KroneckerSum, LowRankPlusDiag, Woodbury
from curvlin.algebra.inverses import inverse_operator
from curvlin.precision.base import PrecisionOperator
from curvlin.testing import Reference

f64 = torch.float64
D = 6
STRENGTHS = [1e2, 1e5, 1e8]


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


UPDATED = [
    ("diagonal", D),
    ("diagonal", D + 3),
    ("kronecker", D),
    ("kronecker", D + 3),
    ("core", D),
    ("core", D + 3),
]


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


@pytest.mark.parametrize("columns", [D, D + 3])
@pytest.mark.parametrize("other", OTHERS)
def test_trace_of_a_solve_has_derivatives(other: str, columns: int) -> None:
    """Where columns are solved for as where a difference is taken: those of the dense formula, of two orders."""
    Q = OTHERS[other]
    for strength in (1.0, 1e3):
        d = (1.0 + torch.arange(D, dtype=f64)).requires_grad_()
        U = (strength * randn(D, columns, seed=1)).requires_grad_()
        dense = torch.linalg.inv(torch.diag(d) + U @ U.mT)
        both = LowRankPlusDiag(d, U).trace_solve(Q), (dense * Q.to_dense()).sum()
        _same_derivatives(*both, (d, U))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("columns", [D, D + 3])
@pytest.mark.parametrize("question", ["logdet", "variances"])
def test_derivatives_for_the_base(question: str, columns: int, batch: tuple[int, ...]) -> None:
    """They were differences of two orders of the gain, and did not have the right sign."""
    weights = 1.0 + torch.arange(D, dtype=f64)
    for strength in (1.0, 1e3):
        d = (1.0 + torch.arange(D, dtype=f64)).requires_grad_()
        U = (strength * randn(*batch, D, columns, seed=1)).requires_grad_()
        P, M = LowRankPlusDiag(d, U), torch.diag(d) + U @ U.mT
        if question == "logdet":
            both = P.logdet().sum(), M.logdet().sum()
        else:
            right = torch.linalg.inv(M).diagonal(dim1=-2, dim2=-1)
            both = (P.inverse_diagonal() * weights).sum(), (right * weights).sum()
        _same_derivatives(*both, (d, U))


def _same_derivatives(found: Tensor, right: Tensor, tensors: tuple[Tensor, ...]) -> None:
    """Each gradient relative to its own size; of the second order, that of each gradient's sum of squares."""
    firsts = [torch.autograd.grad(value, tensors, create_graph=True) for value in (found, right)]
    for g, h in zip(*firsts, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-8 * float(h.detach().abs().max()))
        seconds = [torch.autograd.grad(t.square().sum(), tensors, retain_graph=True) for t in (g, h)]
        for s, t in zip(*seconds, strict=True):
            torch.testing.assert_close(s, t, rtol=1e-6, atol=1e-6 * float(t.abs().max()))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("columns", [3, D, D + 3, "one of them twice"])
@pytest.mark.parametrize("base", ["diagonal", "kronecker"])
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_inverse_as_an_operator(base: str, columns: int | str, strength: float, weight: float) -> None:
    """H of dependent columns is singular to rounding; a difference of matrices that are all but equal has no digits."""
    P = updated(base, 3 if isinstance(columns, str) else columns, strength)
    if isinstance(columns, str):
        P = P._with(U=torch.cat([P.U, P.U[:, :1]], dim=1))
    truth, Q = exact(P), inverse_operator(weight * P)
    right = truth.solve(torch.eye(D, dtype=f64)) / weight
    torch.testing.assert_close(Q.to_dense(), right, rtol=0.0, atol=1e-14 * float(right.abs().max()))
    if isinstance(Q, Dense):
        torch.testing.assert_close(Q.logdet(), -truth.logdet() - D * math.log(weight), rtol=1e-13, atol=0.0)
        x = randn(D, seed=2)
        torch.testing.assert_close(Q.solve(x), weight * P @ x, rtol=1e-11, atol=0.0)
    assert isinstance(Q, Woodbury) == (P.rank < D)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_the_inverse_of_a_batch_of_strong_updates(dtype: torch.dtype) -> None:
    for columns in (4, D + 3):
        U = 1e8 * randn(2, D, columns, seed=1).to(dtype)
        U[..., 1] = U[..., 0]
        P = Diagonal(1.0 + torch.arange(D, dtype=dtype)).update(U)
        Q = inverse_operator(P)
        assert Q.dtype == dtype and Q.shape == P.shape
        for i in range(2):
            right = exact(updated("diagonal", 1, 1.0)._with(base=P.base, U=U[i]))
            expected = right.solve(torch.eye(D, dtype=f64))
            atol = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(Q.to_dense()[i].double(), expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("columns", [3, D + 3])
def test_the_inverse_has_derivatives(columns: int) -> None:
    X = spd(D, 4)
    for strength in (1.0, 1e2):  # beyond which a dense inverse has no digits for the second order
        d = (1.0 + torch.arange(D, dtype=f64)).requires_grad_()
        U = (strength * randn(D, columns, seed=1)).requires_grad_()
        dense = torch.linalg.inv(torch.diag(d) + U @ U.mT)
        Q = inverse_operator(LowRankPlusDiag(d, U))
        _same_derivatives((Q.to_dense() * X).sum(), (dense * X).sum(), (d, U))
