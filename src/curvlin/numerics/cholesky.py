"""Cholesky factorisations that name what is not positive definite, and do not depend on scale."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlin._tree import is_concrete
from curvlin.errors import NotPositiveDefiniteError
from curvlin.numerics.scaling import power_of_two


def normalised_cholesky(A: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """``A = s L L^T`` with s a power of two per matrix.

    A pivot counts as zero when it is within ``n eps`` of the largest diagonal entry: what Cholesky leaves
    there is rounding, and dividing by it would answer a question that the data do not settle.

    Args:
        A: ``(..., n, n)``, symmetric.
        where: the name under which a failure is reported.

    Raises:
        NotPositiveDefiniteError: if a pivot is not positive (in eager mode; inside transforms the result is NaN).
    """
    scale = power_of_two(A)
    normalised = A / scale[..., None, None]
    lower, info = torch.linalg.cholesky_ex(normalised)
    if not is_concrete(A):
        return torch.where(info[..., None, None] > 0, torch.nan, lower), scale
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    tiny = A.shape[-1] * torch.finfo(A.dtype).eps
    diagonal = normalised.diagonal(dim1=-2, dim2=-1)
    # Relative to each row's own diagonal entry: a badly scaled but well conditioned matrix passes.
    if bool((info > 0).any()) or bool((pivots <= tiny * diagonal.abs()).any()):
        spectrum = torch.linalg.eigvalsh(normalised)
        worst = spectrum[..., 0].min()
        raise NotPositiveDefiniteError(where, float((spectrum[..., 0] * scale).min()), _damping(worst, tiny))
    return lower, scale


def cholesky(A: Tensor, where: str) -> Tensor:
    """The differentiable Cholesky factor L of ``A = L L^T``; errors as in `normalised_cholesky`."""
    lower, info = torch.linalg.cholesky_ex(A)
    if is_concrete(A):
        normalised_cholesky(A.detach(), where)
        return lower
    return torch.where(info[..., None, None] > 0, torch.nan, lower)


def _damping(smallest: Tensor, tiny: float) -> float:
    return max(2 * -float(smallest), 100 * tiny)
