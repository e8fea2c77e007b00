"""Symmetric positive (semi)definite matrices with a prescribed spectrum.

Random Gaussian matrices are well conditioned and have no repeated eigenvalues; errors hide from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPECTRA = ("decay", "step", "repeated", "clustered", "rank-deficient")
"""Shapes of a spectrum between 1 and 1/cond; see `eigenvalues`."""


def eigenvalues(n: int, spectrum: str = "decay", log10cond: float = 2.0) -> Tensor:
    """n eigenvalues in descending order, the largest 1, the smallest non-zero one ``10^-log10cond``.

    Args:
        n: how many.
        spectrum: ``"decay"`` (geometric), ``"step"`` (half large, half small), ``"repeated"`` (all equal but
            the last), ``"clustered"`` (a step whose halves spread by a relative 1e-10), or
            ``"rank-deficient"`` (geometric over half of the dimensions, exactly zero on the others).
        log10cond: of the non-zero part.
    """
    smallest = 10.0**-log10cond
    ones = torch.ones(n, dtype=torch.float64)
    if n == 1:
        return ones
    if spectrum == "decay":
        return torch.logspace(0, -log10cond, n, dtype=torch.float64)
    if spectrum == "repeated":
        ones[-1] = smallest
        return ones
    if spectrum in ("step", "clustered"):
        ones[n // 2 :] = smallest
        if spectrum == "clustered":
            ones *= 1 - 1e-10 * torch.linspace(0, 1, n, dtype=torch.float64)
        return ones
    if spectrum == "rank-deficient":
        rank = (n + 1) // 2
        ones[:rank] = torch.logspace(0, -log10cond if rank > 1 else 0, rank, dtype=torch.float64)
        ones[rank:] = 0.0
        return ones
    raise ValueError(f"spectrum must be one of {SPECTRA}, found {spectrum!r}")


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (Haar up to signs)."""
    Q: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    return Q


def spd_matrix(values: Tensor, generator: torch.Generator) -> Tensor:
    """``Q diag(values) Q^T`` with a random orthogonal Q; exactly ``c I`` if all values are c."""
    if bool((values == values[0]).all()):
        return torch.diag(values)
    Q = orthogonal(values.numel(), generator)
    matrix = (Q * values) @ Q.mT
    return (matrix + matrix.mT) / 2


def root_matrix(values: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """A ``rows x n`` matrix R whose ``R^T R`` has the given eigenvalues (zeros if rows < n)."""
    n = values.numel()
    k = min(rows, n)
    left: Tensor = torch.linalg.qr(torch.randn(rows, k, dtype=torch.float64, generator=generator))[0]
    return (left * values[:k].sqrt()) @ orthogonal(n, generator)[:, :k].mT
