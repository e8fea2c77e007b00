"""Cholesky factorisations that name what is not positive definite, and do not depend on scale."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlin.errors import NotPositiveDefiniteError
from curvlin.numerics.implicit import graft
from curvlin.numerics.scaling import power_of_two


def normalised_cholesky(A: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """``A = s L L^T`` with s a power of two per matrix.

    A pivot counts as zero when it is within ``n eps`` of the largest diagonal entry: what Cholesky leaves
    there is rounding, and dividing by it would answer a question that the data do not settle.

    Args:
        A: ``(..., n, n)``, symmetric.
        where: the name under which a failure is reported.

    Raises:
        NotPositiveDefiniteError: if a pivot is not positive.
    """
    scale = power_of_two(A)
    normalised = A / scale[..., None, None]
    lower, info = torch.linalg.cholesky_ex(normalised)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    tiny = A.shape[-1] * torch.finfo(A.dtype).eps
    diagonal = normalised.diagonal(dim1=-2, dim2=-1)
    # Relative to each row's own diagonal entry: a badly scaled but well conditioned matrix passes.
    if bool((info > 0).any()) or bool((pivots <= tiny * diagonal.abs()).any()):
        spectrum = torch.linalg.eigvalsh(normalised)
        relative = float((spectrum[..., 0] / spectrum.abs().amax(-1).clamp(min=tiny)).min())
        smallest = float((spectrum[..., 0] * scale).min())
        raise NotPositiveDefiniteError(where, smallest, max(2 * -relative, 100 * tiny))
    return lower, scale


def follow(lower: Tensor, A: Tensor) -> Tensor:
    """The constant L with the derivatives of ``chol(A)``: accurate also where ``chol(A)`` would not be.

    ``chol(L (I + E) L^T) = L chol(I + E)``, and E, zero in value, carries the derivatives of ``L^-1 A L^-T``.
    """
    half = torch.linalg.solve_triangular(lower, A, upper=False)
    inner = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    change = graft(torch.zeros_like(inner), (inner + inner.mT) / 2)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return lower @ torch.linalg.cholesky_ex(eye + change).L
