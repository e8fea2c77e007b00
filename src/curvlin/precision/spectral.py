"""Kronecker eigenbases with free eigenvalues: what EKFAC makes, and functions of one Kronecker term and a shift."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, floating, square
from curvlin._tree import is_concrete, tensor_field
from curvlin.numerics.kronecker import congruence, in_basis, product, rotate
from curvlin.precision.eigenbasis import EigenbasisOperator


@dataclass(eq=False, repr=False, init=False)
class SpectralKronecker(EigenbasisOperator):
    """``(QL (x) QR) diag(eigenvalues.flatten()) (QL (x) QR)^T`` with orthogonal QL, QR: EKFAC, for one.

    The bases are constants: no gradient flows into them.

    Args:
        QL: orthogonal ``(*batch, a, a)``.
        QR: orthogonal ``(*batch, b, b)``.
        eigenvalues: ``(*batch, a, b)``, non-negative.

    Raises:
        TypeError, ValueError: if a basis is not a square floating orthogonal matrix, or shapes do not match.
    """

    QL: Float[Tensor, "*batch a a"] = tensor_field(2, constant=True)
    QR: Float[Tensor, "*batch b b"] = tensor_field(2, constant=True)
    eigenvalues: Float[Tensor, "*batch a b"] = tensor_field(2)

    def __init__(
        self,
        QL: Float[Tensor, "*batch a a"],
        QR: Float[Tensor, "*batch b b"],
        eigenvalues: Float[Tensor, "*batch a b"],
    ) -> None:
        for name, Q in (("QL", QL), ("QR", QR)):
            square(name, Q, like=QL)
            eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
            if is_concrete(Q):
                gap = (Q.mT @ Q - eye).abs().amax((-2, -1))
                if bool((gap > 32 * Q.shape[-1] * torch.finfo(Q.dtype).eps).any()):
                    raise ValueError(
                        f"{name} must be orthogonal, found Q^T Q - I of size {float(gap.max()):.1e}"
                    )
        broadcastable("QR", QR.shape[:-2], QL.shape[:-2])
        self.QL, self.QR = QL.detach(), QR.detach()
        self.eigenvalues = self._check_eigenvalues(eigenvalues)

    def _check_eigenvalues(self, eigenvalues: Tensor) -> Tensor:
        floating("eigenvalues", eigenvalues, ndim=2, like=self.QL)
        if tuple(eigenvalues.shape[-2:]) != self.sizes:
            raise ValueError(f"eigenvalues must end in {self.sizes}, found shape {tuple(eigenvalues.shape)}")
        for Q in (self.QL, self.QR):
            broadcastable("eigenvalues", eigenvalues.shape[:-2], Q.shape[:-2])
        return eigenvalues

    @property
    def size(self) -> int:
        return self.sizes[0] * self.sizes[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """(a, b), the sizes of the two bases."""
        return self.QL.shape[-1], self.QR.shape[-1]

    @property
    def orthogonal(self) -> bool:
        """True: the bases are orthogonal by construction."""
        return True

    def _factors_need_grad(self) -> bool:
        return False

    def _eigenvalues(self) -> Tensor:
        return self.eigenvalues.flatten(-2)

    def _to_basis(self, X: Tensor) -> Tensor:
        return congruence(self.QL, X.mT.unflatten(-1, self.sizes), self.QR).flatten(-2).mT

    def _from_basis(self, V: Tensor) -> Tensor:
        return rotate(self.QL, V.mT.unflatten(-1, self.sizes), self.QR).flatten(-2).mT

    def _diagonal_of(self, values: Tensor) -> Tensor:
        grid = values.unflatten(-1, self.sizes).unsqueeze(-3)
        return rotate(self.QL.square(), grid, self.QR.square()).squeeze(-3).flatten(-2)

    def _draw(self, Z: Tensor, factors: None) -> Tensor:
        if self._needs_grad():
            return super()._draw(Z, factors)
        return in_basis(self.QL, self.eigenvalues.rsqrt(), self.QR, Z)

    def _scale(self, c: Tensor) -> SpectralKronecker:
        return self._with(eigenvalues=self.eigenvalues * c[..., None, None])

    def with_eigenvalues(self, eigenvalues: Float[Tensor, "*batch a b"]) -> SpectralKronecker:
        """Other eigenvalues in the same basis."""
        return self._with(eigenvalues=self._check_eigenvalues(eigenvalues))

    def _to_dense(self) -> Tensor:
        basis = product(self.QL, self.QR)
        return (basis * self.eigenvalues.flatten(-2).unsqueeze(-2)) @ basis.mT
