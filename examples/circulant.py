"""A precision operator of one's own: couplings on a ring, diagonalised by a Fourier transform.

The tutorial "A new operator" walks through this file; `tests/test_circulant.py` puts it through every law.
"""

# --8<-- [start:operator]
from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Isotropic
from curvlin.extend import (
    ADD,
    TRACE_SOLVE,
    EigenbasisOperator,
    floating,
    positive_integer,
    register,
    static_field,
    tensor_field,
)


@dataclass(eq=False, repr=False, init=False)
class Circulant(EigenbasisOperator):
    """``P_ij = c_d`` with d the distance of i and j on a ring of D sites.

    Args:
        couplings: c, ``(*batch, D // 2 + 1)``: the entry at distance 0, 1, ..., ``D // 2``.
        size: D.

    Raises:
        TypeError: if `couplings` is not a floating tensor.
        ValueError: if it is not finite or not of this length, or `size` is not a positive integer.
    """

    couplings: Float[Tensor, "*batch H"] = tensor_field(1)
    dimension: int = static_field()

    def __init__(self, couplings: Float[Tensor, "*batch H"], size: int) -> None:
        self.couplings = floating("couplings", couplings, ndim=1)
        self.dimension = positive_integer("size", size)
        if couplings.shape[-1] != size // 2 + 1:
            raise ValueError(
                f"couplings must end in {size // 2 + 1} entries for size {size}, "
                f"found shape {tuple(couplings.shape)}"
            )

    @property
    def size(self) -> int:
        return self.dimension

    def _eigenvalues(self) -> Tensor:
        # The first column: c_0, c_1, ..., and back around the ring. Its transform is the spectrum.
        half = self.couplings
        column = torch.cat([half, half[..., 1 : (self.size + 1) // 2].flip(-1)], dim=-1)
        return hartley(column.unsqueeze(-1)).squeeze(-1) * self.size**0.5

    def _to_basis(self, X: Tensor) -> Tensor:
        return hartley(X)

    def _from_basis(self, V: Tensor) -> Tensor:
        return hartley(V)

    def _diagonal_of(self, values: Tensor) -> Tensor:
        return values.mean(-1, keepdim=True).expand(values.shape)  # every site is like any other

    def _scale(self, c: Tensor) -> Circulant:
        return Circulant(self.couplings * c.unsqueeze(-1), self.size)


def hartley(X: Float[Tensor, "*batch D K"]) -> Float[Tensor, "*batch D K"]:
    """``H X`` with ``H_jk = (cos + sin)(2 pi jk / D) / sqrt(D)``: real, symmetric and orthogonal."""
    F = torch.fft.fft(X.double(), dim=-2)
    return ((F.real - F.imag) / X.shape[-2] ** 0.5).to(X.dtype)


# --8<-- [end:operator]


# --8<-- [start:rules]
@register(ADD, Circulant, Circulant)
def circulant_circulant(P: Circulant, Q: Circulant) -> Circulant:
    """Couplings add up."""
    return Circulant(P.couplings + Q.couplings, P.size)


@register(ADD, Circulant, Isotropic)
def circulant_isotropic(P: Circulant, Q: Isotropic) -> Circulant:
    """A multiple of the identity is a coupling at distance 0."""
    here = torch.zeros_like(P.couplings[..., :1]) + Q.value.unsqueeze(-1)
    rest = P.couplings[..., 1:].expand(*here.shape[:-1], -1)
    return Circulant(torch.cat([P.couplings[..., :1] + Q.value.unsqueeze(-1), rest], dim=-1), P.size)


@register(TRACE_SOLVE, Circulant, Circulant)
def trace_of_circulants(P: Circulant, Q: Circulant, factors: None) -> Tensor:
    """``sum_k mu_k / lambda_k``: all circulants share their eigenvectors."""
    return (Q._eigenvalues() / P._eigenvalues()).sum(-1)


# --8<-- [end:rules]


# --8<-- [start:check]
def make_circulant(
    size: int, log10cond: float, log10scale: float, batch: tuple[int, ...], generator: torch.Generator
) -> Circulant:
    """A circulant precision of any size, condition and scale: what `check_operator` asks for."""
    H = size // 2 + 1
    spectrum = torch.logspace(log10scale, log10scale - log10cond, H, dtype=torch.float64)
    order = torch.rand(*batch, H, generator=generator).argsort(-1)
    half = spectrum[order]
    # The inverse transform of an even spectrum: c_d = sum_k lambda_k cos(2 pi kd / D) / D.
    values = torch.cat([half, half[..., 1 : (size + 1) // 2].flip(-1)], dim=-1)
    return Circulant(torch.fft.fft(values).real[..., :H] / size, size)


def circulant_matrix(P: Circulant) -> Tensor:
    """The matrix that `Circulant` is meant to be, entry by entry; shares nothing with the operator."""
    site = torch.arange(P.size)
    apart = (site[:, None] - site).abs()
    return P.couplings[..., torch.minimum(apart, P.size - apart)]


# --8<-- [end:check]
