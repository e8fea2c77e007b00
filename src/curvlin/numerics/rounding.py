"""What rounding leaves of an eigenvalue that should be zero."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding_level(spectrum: Tensor, resolution: float) -> Tensor:
    """How far from zero rounding may have moved a zero eigenvalue, ``(..., 1)``.

    Rounding the entries moves an eigenvalue by up to ``resolution / 2`` of the Frobenius norm, the decomposition by
    some eps of the largest.

    Args:
        spectrum: all eigenvalues of a symmetric matrix (or the singular values of a root of it), ``(..., n)``.
        resolution: relative rounding of the entries.
    """
    largest = spectrum.abs().amax(-1, keepdim=True)
    return torch.maximum(
        resolution * torch.linalg.vector_norm(spectrum, dim=-1, keepdim=True),
        spectrum.shape[-1] * torch.finfo(spectrum.dtype).eps * largest,
    )


def without_rounding(spectrum: Tensor, resolution: float) -> Tensor:
    """The spectrum of a matrix that should be positive semidefinite, with zeros where it is zero up to rounding.

    A positive eigenvalue above the rounding level is taken at its word. A negative one can only come from rounding, of
    the entries or of the sums that they were, unless it is too large for that; then it stays, and whoever combines
    the eigenvalues says whether the operator is positive definite.
    """
    n, level = spectrum.shape[-1], rounding_level(spectrum, resolution)
    negative = torch.maximum(n * resolution * spectrum.abs().amax(-1, keepdim=True), level)
    return torch.where((spectrum <= level) & (spectrum >= -negative), 0.0, spectrum)
