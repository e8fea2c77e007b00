"""Parts of one operator with different batches: each element of the whole answers as the operator made of its parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from draws import randn
from torch import Tensor

from curvlin import BlockDiag, Diagonal, KroneckerSum, LowRankPlusDiag, Woodbury
from curvlin.precision.base import PrecisionOperator

f64 = torch.float64


def spd(n: int, seed: int) -> Tensor:
    X = randn(n, n + 3, seed=seed)
    return X @ X.mT / n


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("kept", [2, 3, 4])
def test_marginal_of_shared_columns_over_a_batch_of_diagonals(rank: int, kept: int) -> None:
    """As many columns as batch elements and kept coordinates: `torch.linalg.solve` took the columns for vectors."""
    d, U = 1.0 + randn(3, 7).square(), randn(7, rank, seed=1)
    index = [6, 1, 4, 3][:kept]
    covariance = torch.linalg.inv(torch.diag_embed(d) + U @ U.mT)
    right = torch.linalg.inv(covariance[:, index][:, :, index])
    torch.testing.assert_close(
        LowRankPlusDiag(d, U).marginal(index).to_dense(), right, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("mapped", [2, 3, 4])
def test_derivatives_of_variances_with_a_shared_core_under_vmap(mapped: int) -> None:
    """A batch inside the one that is mapped over, and a core with neither."""
    d, U, core = 1.0 + randn(mapped, 3, 5).square(), randn(5, 2, seed=1), spd(2, 2)

    def found(d: Tensor) -> Tensor:
        return Woodbury(Diagonal(d), U, core=core).inverse_diagonal().square().sum()

    def right(d: Tensor) -> Tensor:
        inverse = torch.linalg.inv(torch.diag_embed(d) + U @ core @ U.mT)
        return inverse.diagonal(dim1=-2, dim2=-1).square().sum()

    gradients = torch.vmap(torch.func.grad(found))(d)
    expected = torch.stack([torch.func.grad(right)(element) for element in d])
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [(4,), (3,), (2, 4), (4, 1)])
@pytest.mark.parametrize("root", ["unwhiten", "whiten", "root_matvec", "root_solve"])
@pytest.mark.parametrize("kind", ["blocks", "updated"])
def test_derivatives_of_a_root_of_kronecker_factors_beside_a_batch(
    kind: str, root: str, batch: tuple[int, ...]
) -> None:
    """The nodes of the quadrature stand left of whatever batch the draws have, four at a time."""
    factors = spd(2, 1).requires_grad_(), spd(3, 2).requires_grad_()
    other = 1.0 + randn(*batch, 2).square() if kind == "blocks" else randn(*batch, 6, 2)

    def operator(A: Tensor, B: Tensor, other: Tensor) -> PrecisionOperator:
        K = KroneckerSum.shifted(A, B, 0.3)
        return BlockDiag([K, Diagonal(other)]) if kind == "blocks" else K.update(other)

    P = operator(*factors, other)
    z, w = (randn(*batch, P.size, seed=s) for s in (3, 4))
    together = torch.autograd.grad((getattr(P, root)(z) * w).sum(), factors)
    parts = [
        (getattr(operator(*factors, other[i]), root)(z[i]) * w[i]).sum()
        for i in itertools.product(*map(range, batch))
    ]
    apart = torch.autograd.grad(torch.stack(parts).sum(), factors)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)

    def forwards(*factors: Tensor) -> Tensor:
        result: Tensor = (getattr(operator(*factors, other), root)(z) * w).sum()
        return result

    tangents = tuple(randn(*t.shape, seed=5) for t in factors)
    along = torch.func.jvp(forwards, tuple(t.detach() for t in factors), tangents)[1]
    symmetric = ((t + t.mT) / 2 for t in tangents)
    expected = sum((g * t).sum() for g, t in zip(apart, symmetric, strict=True))
    torch.testing.assert_close(along, expected, rtol=1e-9, atol=1e-9)
