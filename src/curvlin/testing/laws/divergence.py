"""Law 11: the Kullback-Leibler divergence of Gaussians, and projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.testing.cases import Case
from curvlin.testing.laws._larger import larger
from curvlin.testing.laws._law import (
    CONSTANT,
    EPS64,
    Measurement,
    differing,
    eps,
    forward,
    law,
    product,
    worst,
    worst_counted,
)


@law(11)
def divergence(case: Case) -> Iterator[Measurement]:
    """KL(P, P) is exactly 0, KL is never negative, does not see units, and keeps its digits when tiny."""
    from curvlin.gaussian import Gaussian

    P, n = case.operator, case.size
    shape = (*case.batch_shape, n)
    mean = torch.randn(shape, dtype=torch.float64, generator=case.generator(51)).to(case.dtype)
    mean = mean / case.norm.sqrt().to(case.dtype).unsqueeze(-1)
    p = Gaussian(mean, P)
    zero = kl_divergence(p, Gaussian(mean, P))
    yield differing("KL(p, p)", zero, torch.zeros_like(zero))
    for name, Q in _others(P):
        other = Gaussian(torch.zeros_like(mean), Q)
        try:
            value = kl_divergence(p, other).double()
        except NotClosedError:
            continue
        yield worst(f"KL(p, {name}) is negative", (-value).clamp(min=0), 0.0)
        exact = _dense_kl(mean.double(), case.matrix, torch.zeros_like(mean.double()), Q.to_dense().double())
        # An error of the pencil, n u cond, moves the sum of r - log1p(r) and the quadratic term alike.
        limit = torch.as_tensor(2 * n * forward(case)) * (1 + exact.abs())
        yield from worst_counted(f"KL(p, {name})", (value - exact).abs(), limit, 1 + exact.abs())
        scaled = kl_divergence(
            Gaussian(mean / 2**10, 4.0**10 * P), Gaussian(other.mean / 2**10, 4.0**10 * Q)
        ).double()
        yield worst(
            f"KL(p, {name}) in other units",
            (scaled - value).abs(),
            CONSTANT * (eps(case) + n * EPS64) * (n + value),
        )
    # Q = (1 + r) P: the divergence is n (r - log1p(r)) / 2, about n r^2 / 4, which a difference of logs
    # loses.
    r = 2.0**-10
    tiny = kl_divergence(Gaussian(mean, P), Gaussian(mean, (1 + r) * P)).double()
    exact = torch.tensor(
        n / 2 * (r - torch.tensor(r, dtype=torch.float64).log1p().item()), dtype=torch.float64
    )
    # Scaling rounds every parameter once, which moves r by as much: relative 2 eps / r of the result.
    rounding = (1 + case.recipe.storage_roundings) * eps(case) + n * EPS64
    limit = exact * CONSTANT * rounding * case.condition / r
    yield from worst_counted("a small KL", (tiny - exact).abs(), limit.expand(tiny.shape), exact)
    yield from _projection(case)


def _others(P: PrecisionOperator) -> Iterator[tuple[str, PrecisionOperator]]:
    yield from larger(P)
    yield "Isotropic", Isotropic(P.diagonal().detach().mean(-1), P.size)
    yield "Diagonal", Diagonal(P.diagonal().detach().clone())


def _dense_kl(m1: Tensor, P1: Tensor, m2: Tensor, P2: Tensor) -> Tensor:
    """``1/2 [tr(P1^-1 P2) - n - log det(P1^-1 P2) + dm^T P2 dm]``, by the eigenvalues of the pencil."""
    lower = torch.linalg.cholesky(P1)
    half = torch.linalg.solve_triangular(lower, P2, upper=False)
    pencil = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    r = torch.linalg.eigvalsh((pencil + pencil.mT) / 2) - 1
    dm = (m1 - m2).unsqueeze(-1)
    value: Tensor = ((r - r.log1p()).sum(-1) + (dm.mT @ P2 @ dm)[..., 0, 0]) / 2
    return value


def _projection(case: Case) -> Iterator[Measurement]:
    """Pythagoras: ``|P - Q|^2 = |P - proj P|^2 + |proj P - Q|^2`` for every Q of the structure."""
    P, n = case.operator, case.size
    try:
        projection = P.project(Diagonal)
    except NotClosedError:  # a norm that only its dense matrix would give
        return
    nearest, error = projection.operator, projection.relative_error
    size = torch.linalg.matrix_norm(case.matrix)
    gap = torch.linalg.matrix_norm(case.matrix - nearest.to_dense().double())
    allowed = CONSTANT * (n * eps(case)) * torch.ones_like(size)
    yield worst("the error of a projection", (error.double() - gap / size).abs(), allowed.sqrt())
    Q = Isotropic(P.diagonal().detach().mean(-1), n)
    away, along = (case.matrix - Q.to_dense().double()), (nearest.to_dense().double() - Q.to_dense().double())
    total = torch.linalg.matrix_norm(away).square()
    sides = gap.square() + torch.linalg.matrix_norm(along).square()
    yield worst("Pythagoras for a projection", (total - sides).abs(), product(case) * size.square())
