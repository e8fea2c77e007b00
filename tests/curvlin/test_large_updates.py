"""Many columns of many rows: Gram matrices instead of orthonormal factors, and columns widened by slices of rows.

Both are taken above a size that no law reaches; here the size is set to nothing, and the laws run again.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvlin import Isotropic, LowRankPlusDiag, Woodbury
from curvlin.numerics import tall
from curvlin.testing import LAWS, LawViolation, Spec, make_case

f64 = torch.float64


@pytest.fixture(autouse=True)
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlin.precision.low_rank.ALWAYS_ORTHONORMAL", 0)
    monkeypatch.setattr("curvlin.numerics.tall._SLICE", 10)  # several slices of a few rows


@pytest.mark.parametrize("law", [name for name in LAWS if name != "no_dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["low_rank_plus_diag", "woodbury_blocks", "downdated"])
def test_laws(kind: str, dtype: torch.dtype, law: str) -> None:
    violated = []
    for spectrum, log10cond in (("decay", 1.0), ("decay", 4.0), ("rank-deficient", 3.0), ("clustered", 3.0)):
        for batch in ((), (2,)):
            spec = Spec(
                size=12, log10cond=log10cond, spectrum=spectrum, batch=batch, mixed=True, dtype=dtype, seed=3
            )
            try:
                LAWS[law](make_case(kind, spec))
            except LawViolation as violation:
                violated.append(str(violation))
    assert not violated, "\n".join(violated)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_narrow_matrix_multiplies_like_its_wide_copy(dtype: torch.dtype) -> None:
    U, X, c = randn(7, 3).to(dtype), randn(7, 2, seed=1), randn(3, 2, seed=2)
    wide = U.double()
    torch.testing.assert_close(tall.spread(U, c), wide @ c, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(tall.collect(U, X), wide.mT @ X, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        tall.gram(U, X[:, :1].exp()), (wide * X[:, :1].exp()).mT @ (wide * X[:, :1].exp())
    )


def test_products_with_a_narrow_matrix_have_derivatives_of_two_orders() -> None:
    U, X = randn(5, 3).float(), randn(5, 2, seed=1)

    def both(U: Tensor, X: Tensor) -> Tensor:
        c = tall.collect(U, X)
        return (tall.spread(U, c.sin()) * X).sum()

    def wide(U: Tensor, X: Tensor) -> Tensor:
        U = U.double()
        return ((U @ (U.mT @ X).sin()) * X).sum()

    for fn in (torch.func.grad, torch.func.jacfwd):
        for i in (0, 1):
            found, exact = fn(both, argnums=i)(U, X), fn(wide, argnums=i)(U, X)
            assert fn is torch.func.jacfwd or found.dtype == (U, X)[i].dtype
            torch.testing.assert_close(found.double(), exact.double(), rtol=1e-6, atol=1e-6)
    found, exact = torch.func.hessian(both, argnums=1)(U, X), torch.func.hessian(wide, argnums=1)(U, X)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    Us = randn(4, 5, 3, seed=3).float()
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(both), in_dims=(0, None))(Us, X),
        torch.stack([torch.func.grad(wide)(U, X) for U in Us]),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", ["diagonal", "isotropic"])
def test_gradients_equal_those_of_the_dense_formula(base: str, dtype: torch.dtype) -> None:
    D, k = 40, 4
    U, b = randn(D, k).to(dtype), randn(D, seed=2).to(dtype)
    d = (randn(D, seed=1).abs() + 0.5).to(dtype) if base == "diagonal" else torch.tensor(0.7, dtype=dtype)

    def ours(d: Tensor, U: Tensor, b: Tensor) -> Tensor:
        P = LowRankPlusDiag(d, U) if base == "diagonal" else Isotropic(d, D).update(U)
        assert isinstance(P, Woodbury)
        F = P.factor()
        return F.logdet().double() + F.inv_quad(b).double() + F.solve(b).double().sin().sum()

    def dense(d: Tensor, U: Tensor, b: Tensor) -> Tensor:
        M = torch.diag(d.double().expand(D)) + U.double() @ U.double().mT
        x = torch.linalg.solve(M, b.double())
        return torch.logdet(M) + b.double() @ x + x.sin().sum()

    leaves = [[t.clone().requires_grad_() for t in (d, U, b)] for _ in range(2)]
    found = torch.autograd.grad(ours(*leaves[0]), leaves[0])
    exact = torch.autograd.grad(dense(*leaves[1]), leaves[1])
    tolerance = 1e-11 if dtype == f64 else 1e-6
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=tolerance, atol=tolerance)


def test_nothing_wide_of_the_size_of_the_columns_is_formed() -> None:
    """Float32 columns are never copied to float64 as a whole."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = fn(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == f64:
                largest = max(largest, result.numel())
            return result

    U, b = randn(500, 8).float(), torch.ones(500)
    leaves = [t.requires_grad_() for t in (torch.ones(500), U, b)]
    with Watch():
        F = LowRankPlusDiag(leaves[0], leaves[1]).factor()
        (F.logdet() + F.inv_quad(b)).backward()
        with torch.no_grad():
            F.solve(b), F.inverse_diagonal(), F.unwhiten(b), F.root_matvec(b)
    assert 500 <= largest < U.numel() / 4
