"""Matrices with known spectra, and what is said of them by dense algebra alone."""

import torch
from torch import Tensor

SPECTRA = {
    "decay": lambda n: torch.logspace(0, -4, n, dtype=torch.float64),
    "polynomial": lambda n: 1 / torch.arange(1, n + 1, dtype=torch.float64),
    "step": lambda n: torch.cat(
        [torch.full((n // 10,), 100.0, dtype=torch.float64), torch.ones(n - n // 10, dtype=torch.float64)]
    ),
    "flat": lambda n: torch.linspace(1, 2, n, dtype=torch.float64),
}


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    A = (Q * eigenvalues) @ Q.mT
    return (A + A.mT) / 2


def problem(spectrum: str = "decay", size: int = 60, seed: int = 0) -> Tensor:
    return symmetric(SPECTRA[spectrum](size), seed)


def near(A: Tensor, amount: float = 0.1, seed: int = 7) -> Tensor:
    """A positive definite matrix whose whitening leaves something of A to do."""
    size = len(A)
    return A + amount * A.diagonal().mean() * symmetric(
        torch.linspace(0.1, 1, size, dtype=torch.float64), seed
    )
