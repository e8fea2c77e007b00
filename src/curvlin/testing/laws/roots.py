"""Law 9: roots, whitening and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from curvlin.testing.cases import Case, right_hand_sides
from curvlin.testing.laws._law import (
    Measurement,
    backward,
    claim,
    differing,
    forward,
    law,
    spectral,
    whitened,
    worst,
    worst_counted,
)


@law(9)
def roots(case: Case) -> Iterator[Measurement]:
    """``R R^T = P`` and ``F F^T = P^-1``, shown by pushing the identity through; no Monte Carlo."""
    P = case.operator.factor()
    # Rows of the result are R e_i, so that result^T result = sum_i R e_i e_i^T R^T.
    R = through(P.root_matvec, case)
    yield worst("R R^T = P", spectral(R.mT @ R - case.matrix), whitened(case) * case.norm)
    F = through(P.unwhiten, case)
    identity = torch.eye(case.size, dtype=torch.float64)
    gap = spectral(F @ case.matrix @ F.mT - identity)
    limit = torch.as_tensor(forward(case))
    yield from worst_counted("F^T P F = I", gap, limit, torch.ones(()))
    # One R in all four methods: R^T is the transpose of R, R^-T that of R^-1.
    for name, left, right in (
        ("whiten is the transpose of root_matvec", through(P.whiten, case), R),
        ("unwhiten is the transpose of root_solve", F, through(P.root_solve, case)),
    ):
        gap = spectral(left - right.mT) / spectral(right)
        yield from worst_counted(name, gap, torch.as_tensor(forward(case)), torch.ones(()))
    smallest = case.eigen[0][..., 0]
    covariance = spectral(F.mT @ F - case.inverse) * smallest
    yield from worst_counted("F F^T = P^-1", covariance, limit, torch.ones(()))
    z = torch.randn(3, *case.batch_shape, case.size, dtype=torch.float64, generator=case.generator(11)).to(
        case.dtype
    )
    for name, there, back in (
        ("whiten undoes unwhiten", P.unwhiten, P.whiten),
        ("unwhiten undoes whiten", P.whiten, P.unwhiten),
        ("root_solve undoes root_matvec", P.root_matvec, P.root_solve),
        ("root_matvec undoes root_solve", P.root_solve, P.root_matvec),
    ):
        gap = _length(back(there(z)) - z) / _length(z)
        yield from worst_counted(name, gap, limit, torch.ones(()))
    for kind, B in right_hand_sides(case).items():
        b = B[..., 0]
        square, q = P.root_solve(b).double().square().sum(-1), P.inv_quad(b).double()
        # A root has the square root of the condition of P.
        allowed = 4 * backward(case) * case.condition**0.5 * q
        yield from worst_counted(f"|root_solve|^2 = inv_quad, {kind}", (square - q).abs(), allowed, q)
    drawn = P.sample((4,), generator=torch.Generator().manual_seed(3))
    noise = torch.randn(drawn.shape, dtype=case.dtype, generator=torch.Generator().manual_seed(3))
    yield claim("shape of samples", drawn.shape == (4, *case.batch_shape, case.size))
    yield differing("sample = unwhiten(noise)", drawn, P.unwhiten(noise))


def through(fn: Callable[[Tensor], Tensor], case: Case) -> Tensor:
    """The identity pushed through a map of vectors: row i is ``fn(e_i)``, ``(*batch, D, D)``."""
    n, batch = case.size, case.batch_shape
    eye = torch.eye(n, dtype=case.dtype).reshape(n, *(1,) * len(batch), n).expand(n, *batch, n)
    rows: Tensor = fn(eye).double().movedim(0, -2)
    return rows


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x.double(), dim=-1)
    return length
