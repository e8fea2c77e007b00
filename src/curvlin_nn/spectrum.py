"""Eigenvalues of a curvature, block by block: all that the evidence needs to know of it.

One rule per type of operator; a new operator enters its own with ``spectrum.register``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, singledispatch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlin import (
    BlockDiag,
    Dense,
    Diagonal,
    Isotropic,
    KroneckerSum,
    NotPositiveDefiniteError,
    SpectralKronecker,
    Woodbury,
)
from curvlin.numerics.rounding import without_rounding
from curvlin.precision.base import PrecisionOperator

SUM_ROUNDING = 2**10
"""The rounding of a sum over data, in multiples of that of its largest eigenvalue; it grows with their number."""


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of an operator, each standing at some coordinate of the block it belongs to.

    With a prior precision delta at each coordinate the posterior has the eigenvalues ``delta prod_k (1 + ratio_k)``,
    where ``ratio_k = (scale / delta)^power eigenvalues_k``: of a sum with the prior there is one k, and the power is 1.

    Attributes:
        eigenvalues: float64, none negative; within a block in no particular order.
        block: for each coordinate the first coordinate of its block.
        floor: what is lost when it is added to the diagonal of the block; zero where nothing is added up.
        power: see above.
    """

    eigenvalues: Float[Tensor, "*k D"]
    block: Int[Tensor, " D"]
    floor: Float[Tensor, " D"]
    power: Float[Tensor, " D"] | float = 1.0

    @cached_property
    def floored(self) -> tuple[Int[Tensor, " F"], ...]:
        """The coordinates where something is lost, if there are any."""
        found = self.floor.nonzero().squeeze(1)
        return (found,) if len(found) else ()

    def resolves(self, groups: Int[Tensor, " D"]) -> bool:
        """Whether every block lies within one group, so that a shift per group keeps the eigenvectors."""
        return bool((groups == groups[self.block]).all())

    def ratios(self, scale: Float[Tensor, ""], delta: Float[Tensor, " D"]) -> Float[Tensor, "*k D"]:
        """How much the data say at each eigenvector, relative to the prior."""
        return (scale / delta) ** self.power * self.eigenvalues


@singledispatch
def spectrum(H: PrecisionOperator) -> Spectrum | None:
    """The spectrum of H, or None where no rule gives it.

    Raises:
        NotPositiveDefiniteError: if an eigenvalue is negative beyond rounding.
    """
    return None


@spectrum.register
def _(H: Isotropic) -> Spectrum:
    return _separate(H.diagonal())


@spectrum.register
def _(H: Diagonal) -> Spectrum:
    return _separate(H.diagonal())


@spectrum.register
def _(H: Dense) -> Spectrum:
    spectrum = _together(_eigenvalues("Dense", H.to_dense(), H.resolution))
    # Where `Dense` refuses a pivot of its Cholesky factor.
    floor = H.size * torch.finfo(torch.float64).eps * H.diagonal().double().max()
    return replace(spectrum, floor=floor.expand(H.size))


@spectrum.register
def _(H: SpectralKronecker) -> Spectrum:
    return _together(non_negative("SpectralKronecker", H.eigenvalues.double().flatten()))


@spectrum.register
def _(H: KroneckerSum) -> Spectrum | None:
    if len(H.terms) != 1:
        return None
    sides = [
        torch.ones(size, dtype=torch.float64, device=H.device)
        if factor is None
        else _eigenvalues(f"KroneckerSum.{name}", factor, H.resolution)
        for name, factor, size in zip(("left", "right"), H.terms[0], H.sizes, strict=True)
    ]
    eigenvalues = torch.outer(*sides).flatten()
    return _together(eigenvalues if H.shift is None else eigenvalues + H.shift.double())


@spectrum.register
def _(H: Woodbury) -> Spectrum | None:
    # What is positive semidefinite is zero where its diagonal is.
    alone = H.core is None and H.weight is None and H.sign > 0
    if not alone or H.batch_shape or bool((H.base.diagonal() != 0).any()):
        return None
    if isinstance(H.U, Tensor):
        values = torch.linalg.svdvals(H.U.double()).square()
    else:
        gram = H.U.to(torch.float64).gram().flatten(2).flatten(0, 1)
        values = _eigenvalues("Woodbury", gram, H.resolution)[-H.size :]  # of more rows, the others are zero
    return _together(torch.cat([values, values.new_zeros(H.size - len(values))]))


@spectrum.register
def _(H: BlockDiag) -> Spectrum | None:
    eigenvalues, floor = torch.empty(2, H.size, dtype=torch.float64, device=H.device)
    block = torch.empty(H.size, dtype=torch.long, device=H.device)
    for part, coordinates in zip(H.blocks, H.indices.blocks, strict=True):
        index = coordinates.to(H.device)
        inner = spectrum(part)
        if inner is None:
            return None
        eigenvalues[index], block[index], floor[index] = inner.eigenvalues, index[inner.block], inner.floor
    return Spectrum(eigenvalues, block, floor)


def _separate(diagonal: Tensor) -> Spectrum:
    """Every coordinate is an eigenvector."""
    eigenvalues = non_negative("Diagonal", diagonal.double())
    return Spectrum(
        eigenvalues, torch.arange(len(diagonal), device=diagonal.device), eigenvalues.new_zeros(len(diagonal))
    )


def _together(eigenvalues: Tensor) -> Spectrum:
    """The coordinates are one block."""
    block = torch.zeros(len(eigenvalues), dtype=torch.long, device=eigenvalues.device)
    return Spectrum(eigenvalues, block, torch.zeros_like(eigenvalues))


def eigenpairs(
    where: str, matrix: Float[Tensor, "D D"], resolution: float
) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Eigenvalues, as those of `spectrum`, with eigenvectors.

    Raises:
        NotPositiveDefiniteError: if an eigenvalue is negative beyond rounding.
    """
    eigenvalues, Q = torch.linalg.eigh(matrix.double())
    return non_negative(where, without_rounding(eigenvalues, resolution)), Q


def _eigenvalues(where: str, matrix: Tensor, resolution: float) -> Tensor:
    """Those of a matrix, with zeros where the posterior's factorisation has them."""
    return non_negative(where, without_rounding(torch.linalg.eigvalsh(matrix.double()), resolution))


def non_negative(where: str, eigenvalues: Tensor) -> Tensor:
    """The eigenvalues of a sum over data, with zeros for those that its rounding made negative.

    Raises:
        NotPositiveDefiniteError: if one is too negative for that.
    """
    least = float(eigenvalues.min())
    if least < -SUM_ROUNDING * torch.finfo(eigenvalues.dtype).eps * float(eigenvalues.max()):
        raise NotPositiveDefiniteError(where, least)
    return eigenvalues.clamp(min=0)
