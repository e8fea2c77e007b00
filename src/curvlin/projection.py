"""Projections onto a structure: the nearest operator in the Frobenius norm, asked for by name, with its error.

For a structured P nothing dense is formed: traces, diagonals and inner products of factors suffice. The nearest
Kronecker product is the leading singular triple of the rearranged matrix (Van Loan & Pitsianis 1993), which for
a sum of r Kronecker terms has rank r and needs matrices of size r only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import pair_of_sizes
from curvlin.errors import NotClosedError
from curvlin.index import Index, IndexSet
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.eigenbasis import EigenbasisOperator
from curvlin.precision.kronecker import KroneckerSum
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.spectral import SpectralKronecker


@dataclass(frozen=True)
class Projection:
    """A projected operator and what the projection lost.

    Attributes:
        operator: the nearest operator of the wanted structure.
        relative_error: ``|P - operator|_F / |P|_F``, one per batch element.
    """

    operator: PrecisionOperator
    relative_error: Float[Tensor, "*batch"]


def project(
    P: PrecisionOperator,
    onto: type[PrecisionOperator],
    *,
    indices: Sequence[Index] | IndexSet | None = None,
    sizes: tuple[int, int] | None = None,
) -> Projection:
    """The operator of type `onto` nearest to P in the Frobenius norm.

    Args:
        P: what to project.
        onto: `Isotropic`, `Diagonal`, `BlockDiag` or `KroneckerSum` (one term).
        indices: the partition, for `BlockDiag`; its blocks become `Dense` unless P keeps its structure on them.
        sizes: the factor sizes (a, b), for `KroneckerSum`.

    Raises:
        NotClosedError: if the projection needs entries that P cannot give without a dense matrix.
        ValueError: if `indices` or `sizes` are missing or do not fit.
    """
    total = squared_norm(P)
    operator: PrecisionOperator
    if onto is Isotropic:
        value = P.diagonal().double().mean(-1)
        operator, kept = Isotropic(value.to(P.dtype), P.size), P.size * value.square()
    elif onto is Diagonal:
        diagonal = P.diagonal()
        operator, kept = Diagonal(diagonal), diagonal.double().square().sum(-1)
    elif onto is BlockDiag:
        if indices is None:
            raise ValueError("indices must give the partition to project onto, found None")
        partition = indices if isinstance(indices, IndexSet) else IndexSet(indices)
        if partition.size != P.size:
            raise ValueError(f"indices must partition {P.size} coordinates, found {partition.size}")
        operator = BlockDiag([P.conditional(block.to(P.device)) for block in partition.blocks], partition)
        kept = squared_norm(operator)
    elif onto is KroneckerSum:
        if sizes is None or math.prod(pair_of_sizes("sizes", sizes)) != P.size:
            raise ValueError(f"sizes must be (a, b) with a b = {P.size}, found {sizes}")
        operator, kept = _nearest_product(P, sizes)
    else:
        name = getattr(onto, "__name__", repr(onto))
        raise NotClosedError(
            f"no projection onto {name}; choose Isotropic, Diagonal, BlockDiag or KroneckerSum"
        )
    # Every target is a linear space or a cone through P's best multiple: what is lost is orthogonal to what is kept.
    lost = (total - kept).clamp(min=0.0)
    return Projection(operator, (lost / total).sqrt().to(P.dtype))


def _inner(A: Tensor, B: Tensor) -> Tensor:
    return (A * B).sum((-2, -1))


def squared_norm(P: PrecisionOperator) -> Tensor:
    """``|P|_F^2`` in float64."""
    P = P.to(torch.float64)
    if isinstance(P, Isotropic):
        return P.size * P.value.square()
    if isinstance(P, Diagonal):
        return P.values.square().sum(-1)
    if isinstance(P, Dense):
        return P.matrix.square().sum((-2, -1))
    if isinstance(P, EigenbasisOperator):
        return P._eigenvalues().square().sum(-1)
    if isinstance(P, KroneckerSum):
        terms = _full_terms(P)
        pairs = [_inner(L, M) * _inner(R, S) for L, R in terms for M, S in terms]
        return torch.stack(torch.broadcast_tensors(*pairs)).sum(0)
    if isinstance(P, BlockDiag):
        return torch.stack(torch.broadcast_tensors(*(squared_norm(b) for b in P.blocks))).sum(0)
    if isinstance(P, Woodbury):
        # |Z|^2 + 2 <Z, U C U^T> + |U C U^T|^2, by k x k matrices: U^T Z U and U^T U.
        core = torch.eye(P.rank, dtype=P.dtype, device=P.device) if P.core is None else P.core
        products = [(P._collect(P.base._matmul(part)), P._collect(part)) for part in P._column_parts()]
        through, direct = (torch.cat(side, dim=-1) for side in zip(*products, strict=True))
        cross, gram = P._weighted(through @ core), P._weighted(direct @ core)
        trace = cross.diagonal(dim1=-2, dim2=-1).sum(-1)
        return squared_norm(P.base) + 2 * trace + (gram * gram.mT).sum((-2, -1))
    raise NotClosedError(
        f"the Frobenius norm of {type(P).__name__} needs its dense matrix; project Dense(P.to_dense())"
    )


def _full_terms(P: KroneckerSum) -> list[tuple[Tensor, Tensor]]:
    """All terms of P with identities written out, the shift as one more term."""
    eyes = [torch.eye(n, dtype=P.dtype, device=P.device) for n in P.sizes]
    terms = [(eyes[0] if L is None else L, eyes[1] if R is None else R) for L, R in P.terms]
    if P.shift is not None:
        terms.append((P.shift[..., None, None] * eyes[0], eyes[1]))
    return terms


def _nearest_product(P: PrecisionOperator, sizes: tuple[int, int]) -> tuple[KroneckerSum, Tensor]:
    a, b = sizes
    Q = P.to(torch.float64)
    if isinstance(Q, KroneckerSum) and Q.sizes == sizes:
        terms = _full_terms(Q)
        batch = Q.batch_shape
        left, right = (
            torch.stack([M.expand(*batch, *M.shape[-2:]).flatten(-2) for M in side], dim=-1)
            for side in zip(*terms, strict=True)
        )
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
        U, s, Vh = torch.linalg.svd(r_left @ r_right.mT)
        u, v = (q_left @ U[..., :1]).squeeze(-1), (q_right @ Vh.mT[..., :1]).squeeze(-1)
    elif isinstance(Q, (Isotropic, Diagonal)):
        U, s, Vh = torch.linalg.svd(Q.diagonal().unflatten(-1, sizes), full_matrices=False)
        u = torch.diag_embed(U[..., 0]).flatten(-2)
        v = torch.diag_embed(Vh[..., 0, :]).flatten(-2)
    elif isinstance(Q, SpectralKronecker) and Q.sizes == sizes:
        U, s, Vh = torch.linalg.svd(Q.eigenvalues, full_matrices=False)
        u = ((Q.QL * U[..., :1].mT) @ Q.QL.mT).flatten(-2)
        v = ((Q.QR * Vh[..., :1, :]) @ Q.QR.mT).flatten(-2)
    elif isinstance(Q, Dense):
        rearranged = (
            Q.matrix.unflatten(-2, sizes).unflatten(-1, sizes).movedim(-2, -3).flatten(-2).flatten(-3, -2)
        )
        U, s, Vh = torch.linalg.svd(rearranged, full_matrices=False)
        u, v = U[..., 0], Vh[..., 0, :]
    else:
        raise NotClosedError(
            f"{type(P).__name__} has no structured nearest Kronecker product; project Dense(P.to_dense())"
        )
    # The singular vectors are symmetric matrices; give both factors the sign that makes their traces positive.
    left, right = u.unflatten(-1, (a, a)), v.unflatten(-1, (b, b))
    sign = torch.where(left.diagonal(dim1=-2, dim2=-1).sum(-1) < 0, -1.0, 1.0)[..., None, None]
    root = s[..., 0].sqrt()[..., None, None] * sign
    product = KroneckerSum([((root * left).to(P.dtype), (root * right).to(P.dtype))])
    return product, s[..., 0].square()
