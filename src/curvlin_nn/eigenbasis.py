"""Features in the eigenbasis of a curvature, where the posterior precision is diagonal whatever the scalar prior.

One rule per type of operator, beside those of `spectrum`; a new operator enters its own with ``eigenbasis.register``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import (
    BlockDiag,
    BlockFeatures,
    Dense,
    DenseFeatures,
    Diagonal,
    FeatureOperator,
    Isotropic,
    KhatriRaoFeatures,
    KroneckerSum,
    SpectralKronecker,
)
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.spectrum import eigenpairs, non_negative


@dataclass(frozen=True)
class Eigenbasis:
    """``H = Q diag(eigenvalues) Q^T``.

    Attributes:
        eigenvalues: float64, none negative.
        rotated: ``Phi -> Phi Q``, in factored form where Q and Phi have it.
        dense: how many coordinates of a rotated row are multiplied out.
    """

    eigenvalues: Float[Tensor, " D"]
    rotated: Callable[[FeatureOperator], FeatureOperator]
    dense: int = 0


@singledispatch
def eigenbasis(H: PrecisionOperator) -> Eigenbasis | None:
    """The eigenbasis of H, or None where no rule gives it.

    Raises:
        NotPositiveDefiniteError: if an eigenvalue is negative beyond rounding.
    """
    return None


@eigenbasis.register
def _(H: Isotropic) -> Eigenbasis:
    return Eigenbasis(non_negative("Isotropic", H.diagonal().double()), lambda Phi: Phi)


@eigenbasis.register
def _(H: Diagonal) -> Eigenbasis:
    return Eigenbasis(non_negative("Diagonal", H.diagonal().double()), lambda Phi: Phi)


@eigenbasis.register
def _(H: Dense) -> Eigenbasis:
    eigenvalues, Q = eigenpairs("Dense", H.to_dense(), H.resolution)

    def rotated(Phi: FeatureOperator) -> FeatureOperator:
        rows = Phi.to_dense()
        return DenseFeatures((rows.double() @ Q).to(rows.dtype))

    return Eigenbasis(eigenvalues, rotated, H.size)


@eigenbasis.register
def _(H: SpectralKronecker) -> Eigenbasis:
    eigenvalues = non_negative("SpectralKronecker", H.eigenvalues.double().flatten())
    return _product(eigenvalues, H.QL.double(), H.QR.double())


@eigenbasis.register
def _(H: KroneckerSum) -> Eigenbasis | None:
    if len(H.terms) != 1:
        return None
    sides = []
    for name, factor, size in zip(("left", "right"), H.terms[0], H.sizes, strict=True):
        if factor is None:
            factor = torch.eye(size, dtype=H.dtype, device=H.device)
        sides.append(eigenpairs(f"KroneckerSum.{name}", factor, H.resolution))
    (left, QL), (right, QR) = sides
    eigenvalues = torch.outer(left, right).flatten()
    return _product(eigenvalues if H.shift is None else eigenvalues + H.shift.double(), QL, QR)


@eigenbasis.register
def _(H: BlockDiag) -> Eigenbasis | None:
    found = [eigenbasis(block) for block in H.blocks]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None

    def rotated(Phi: FeatureOperator) -> FeatureOperator:
        if isinstance(Phi, BlockFeatures) and Phi.indices == H.indices:
            pieces: list[FeatureOperator] = list(Phi.parts)
        else:
            pieces = [DenseFeatures(Phi.columns(index)) for index in H.indices.blocks]
        return BlockFeatures([b.rotated(p) for b, p in zip(parts, pieces, strict=True)], H.indices)

    eigenvalues = H.indices.join([part.eigenvalues for part in parts], dim=0)
    return Eigenbasis(eigenvalues, rotated, sum(part.dense for part in parts))


def _product(eigenvalues: Tensor, QL: Tensor, QR: Tensor) -> Eigenbasis:
    sizes = len(QL), len(QR)

    def rotated(Phi: FeatureOperator) -> FeatureOperator:
        if isinstance(Phi, KhatriRaoFeatures) and (Phi.out_features, Phi.in_features) == sizes:
            left, right = (Phi.left.double() @ QL, Phi.right.double() @ QR)
            return KhatriRaoFeatures(left.to(Phi.left.dtype), right.to(Phi.right.dtype))
        rows = Phi.to_dense()
        matrices = QL.mT @ rows.double().unflatten(-1, sizes) @ QR
        return DenseFeatures(matrices.flatten(-2).to(rows.dtype))

    return Eigenbasis(eigenvalues, rotated)
