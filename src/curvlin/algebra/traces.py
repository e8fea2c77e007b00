"""The table of ``tr(P^-1 Q)``.

    Q: Isotropic, Diagonal       sum of q times the diagonal of P^-1, for every P
    Q: Woodbury kinds            the base's trace plus tr(C U^T P^-1 U), for every P
    P: Isotropic, Diagonal       sum of Q's diagonal over p, for every Q
    P or Q: Dense                a dense solve
    P: Woodbury kinds            the base's trace less tr(H^-1 W^T Q W), W = Z^-1 U, for every Q that the base knows
    Kronecker with Kronecker     in the eigenbasis of P, equal sizes
    BlockDiag with BlockDiag     block by block, equal partitions

A rule takes P and Q in float64 and the factors of P.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlin._tables import TRACE_SOLVE, lookup, register
from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerFactors, KroneckerSum, spectral_form
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.spectral import SpectralKronecker


def trace_solve(P: PrecisionOperator, Q: PrecisionOperator, factors: Any) -> Tensor:
    """``tr(P^-1 Q)`` by the table, with factors at hand.

    Raises:
        NotClosedError: if the table has no rule for the pair.
    """
    if isinstance(Q, Woodbury):
        return _of_low_rank(P, Q, factors)
    if isinstance(Q, (Isotropic, Diagonal)):
        return _of_diagonal(P, Q, factors)
    rule = lookup(TRACE_SOLVE, type(P), type(Q))
    if rule is None:
        raise NotClosedError(
            f"no exact rule for tr(P^-1 Q) with P a {type(P).__name__} and Q a {type(Q).__name__}"
        )
    trace: Tensor = rule(P, Q, factors)
    return trace


def _of_low_rank(P: PrecisionOperator, Q: Woodbury, factors: Any) -> Tensor:
    if isinstance(Q.U, Tensor):
        columns = Q.U if Q.core is None else Q.U @ Q.core
        change = (columns * P._solve(Q.U, factors)).sum((-2, -1))
    else:
        change = P.inv_congruence_diagonal(Q.U).sum((-2, -1))
    return trace_solve(P, Q.base, factors) + Q._weighted(change[..., None, None])[..., 0, 0]


def _of_diagonal(P: PrecisionOperator, Q: Isotropic | Diagonal, factors: Any) -> Tensor:
    return (P._inverse_diagonal(factors) * Q.diagonal()).sum(-1)


@register(TRACE_SOLVE, PrecisionOperator, Isotropic)
@register(TRACE_SOLVE, PrecisionOperator, Diagonal)
@register(TRACE_SOLVE, PrecisionOperator, Woodbury)
def by_the_right_operand(P: PrecisionOperator, Q: PrecisionOperator, factors: Any) -> Tensor:
    return trace_solve(P, Q, factors)


@register(TRACE_SOLVE, Isotropic, PrecisionOperator)
@register(TRACE_SOLVE, Diagonal, PrecisionOperator)
def diagonal_anything(P: Isotropic | Diagonal, Q: PrecisionOperator, factors: None) -> Tensor:
    return (Q.diagonal() / P.diagonal()).sum(-1)


@register(TRACE_SOLVE, Dense, PrecisionOperator)
@register(TRACE_SOLVE, PrecisionOperator, Dense)
def dense_anything(P: PrecisionOperator, Q: PrecisionOperator, factors: Any) -> Tensor:
    return P._solve(Q.to_dense(), factors).diagonal(dim1=-2, dim2=-1).sum(-1)


@register(TRACE_SOLVE, Woodbury, PrecisionOperator)
def low_rank_anything(P: Woodbury, Q: PrecisionOperator, factors: Any) -> Tensor:
    P, factors, scale = P._rooted_normal(factors)
    Q = Q / scale
    eye = torch.eye(P.rank, dtype=P.dtype, device=P.device)
    W = P.base._solve(P._spread(eye), factors.base)
    removed = (W * torch.linalg.solve(P._capacitance(factors), Q._matmul(W).mT).mT).sum((-2, -1))
    return trace_solve(P.base, Q, factors.base) - P.sign * removed


@register(TRACE_SOLVE, SpectralKronecker, KroneckerSum)
@register(TRACE_SOLVE, KroneckerSum, KroneckerSum)
def kronecker_kronecker(P: KroneckerSum | SpectralKronecker, Q: KroneckerSum, factors: Any) -> Tensor:
    """``sum_ij (X^T L X)_ii (Y^T R Y)_jj / d_ij`` over the terms ``L (x) R`` of Q."""
    _check_sizes(P, Q)
    left, right, d = spectral_form(P, factors)
    total = torch.zeros((), dtype=d.dtype, device=d.device)
    for L, R in Q.terms:
        total = (
            total
            + _rotated_diagonal(left, L, P.sizes[0], d)
            @ (1 / d)
            @ _rotated_diagonal(right, R, P.sizes[1], d).mT
        )
    trace = total.sum((-2, -1)) if total.ndim > 1 else total
    if Q.shift is not None:
        trace = trace + Q.shift * P._inverse_diagonal(factors).sum(-1)
    return trace


@register(TRACE_SOLVE, SpectralKronecker, SpectralKronecker)
@register(TRACE_SOLVE, KroneckerSum, SpectralKronecker)
def kronecker_spectral(
    P: KroneckerSum | SpectralKronecker, Q: SpectralKronecker, factors: KroneckerFactors
) -> Tensor:
    """``sum_ij (X^T Q_L)_ik^2 (Y^T Q_R)_jl^2 q_kl / d_ij``."""
    _check_sizes(P, Q)
    left, right, d = spectral_form(P, factors)
    L2, R2 = (
        (Q_side if X is None else X.mT @ Q_side).square() for X, Q_side in ((left, Q.QL), (right, Q.QR))
    )
    return ((L2 @ Q.eigenvalues @ R2.mT) / d).sum((-2, -1))


def _check_sizes(P: KroneckerSum | SpectralKronecker, Q: KroneckerSum | SpectralKronecker) -> None:
    if P.sizes != Q.sizes:
        raise NotClosedError(
            f"tr(P^-1 Q) of Kronecker operators needs equal factor sizes, found {P.sizes} and {Q.sizes}"
        )
    if P._factors_need_grad():
        raise NotClosedError(
            "tr(P^-1 Q) has no structured derivative in the Kronecker factors of P; detach P, or differentiate "
            "Dense(P.to_dense()).trace_solve(...)"
        )


def _rotated_diagonal(X: Tensor | None, M: Tensor | None, size: int, like: Tensor) -> Tensor:
    """The diagonal of ``X^T M X`` as a row ``(..., 1, n)``; None is the identity."""
    if X is None:
        diagonal = (
            torch.ones(size, dtype=like.dtype, device=like.device)
            if M is None
            else M.diagonal(dim1=-2, dim2=-1)
        )
    else:
        diagonal = (X * (X if M is None else M @ X)).sum(-2)
    return diagonal.unsqueeze(-2)


@register(TRACE_SOLVE, BlockDiag, BlockDiag)
def blocks_blocks(P: BlockDiag, Q: BlockDiag, factors: tuple[Any, ...]) -> Tensor:
    if P.indices != Q.indices:
        raise NotClosedError("tr(P^-1 Q) of two BlockDiag needs equal partitions, found different ones")
    terms = [trace_solve(p, q, f) for p, q, f in zip(P.blocks, Q.blocks, factors, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
