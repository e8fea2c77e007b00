"""Randomised Nystrom approximation of a positive semidefinite matrix from one product with a random block."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlin._random import random_signs, standard_normal
from curvlin.errors import NotPositiveDefiniteError
from curvlin.iterative.krylov import LinearMap, dot
from curvlin.iterative.results import LowRankApproximation, estimate


def nystrom(
    A: LinearMap,
    size: int,
    rank: int,
    oversampling: int,
    power_iterations: int,
    probes: int,
    generator: torch.Generator | None,
    like: Tensor,
) -> LowRankApproximation:
    """``A ~ A X (X^T A X)^-1 X^T A`` for an orthonormal random X, cut to `rank`.

    Computed with a shift of the size of rounding that is taken off again (Tropp, Yurtsever, Udell & Cevher 2017,
    algorithm 3), and `power_iterations` products more to turn X towards the large eigenvalues (block subspace
    iteration).
    """
    width = min(size, rank + oversampling)
    X = torch.linalg.qr(standard_normal((size, width), torch.Size(), generator, like)).Q
    for _ in range(power_iterations):
        X = torch.linalg.qr(A(X)).Q
    Y = A(X)
    shift = torch.finfo(Y.dtype).eps * size**0.5 * torch.linalg.matrix_norm(Y)
    if float(shift) == 0:
        U = torch.zeros(size, min(rank, size), dtype=like.dtype, device=like.device)
    else:
        U = _columns(Y + shift * X, X, float(shift), rank)
    Z = random_signs((size, probes), generator, like)
    return LowRankApproximation(
        U, estimate(dot(Z, A(Z) - U @ (U.mT @ Z)), width * (1 + power_iterations) + probes)
    )


def _columns(Y: Tensor, X: Tensor, shift: float, rank: int) -> Tensor:
    """U with ``U U^T`` the best approximation of this rank to ``Y (X^T Y)^-1 Y^T`` less the shift."""
    core = (X.mT @ Y).double()
    lower, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
    if bool(info > 0):
        raise NotPositiveDefiniteError("IterativePrecision", float(torch.linalg.eigvalsh(core).min()) - shift)
    B = torch.linalg.solve_triangular(lower, Y.double().mT, upper=False).mT
    V, s, _ = torch.linalg.svd(B, full_matrices=False)
    values = (s.square() - shift).clamp(min=0.0)[:rank]
    return (V[:, :rank] * values.sqrt()).to(X.dtype)
