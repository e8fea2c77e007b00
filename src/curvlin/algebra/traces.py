"""The table of ``tr(P^-1 Q)``.

    Q: Isotropic, Diagonal       sum of q times the diagonal of P^-1, for every P
    Q: Woodbury kinds            the base's trace plus tr(C U^T P^-1 U), for every P
    P: Isotropic, Diagonal       sum of Q's diagonal over p, for every Q
    P or Q: Dense                a dense solve
    P: Woodbury kinds            the base's trace less tr(M W^T Q W), W = Z^-1 U, for every other Q that the base knows
    Kronecker with Kronecker     in the eigenbasis of P, equal sizes (Isotropic is I (x) I)
    BlockDiag with BlockDiag     block by block, equal partitions

A rule takes P and Q in float64 and the factors of P.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from curvlin._tables import TRACE_SOLVE, lookup, register
from curvlin._tree import is_concrete
from curvlin.algebra.congruence import KEPT
from curvlin.errors import NotClosedError
from curvlin.index import identity_columns
from curvlin.numerics import frozen_basis
from curvlin.numerics.chunks import pieces, recomputing
from curvlin.numerics.implicit import graft
from curvlin.numerics.low_rank import LowRankFactors
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.block_diag import BlockDiag
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.kronecker import KroneckerSum, frozen
from curvlin.precision.low_rank import Woodbury
from curvlin.precision.low_rank_core import CanonicalFactors, factors_of_base, removed
from curvlin.precision.low_rank_variances import removed_trace
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
        U = Q.U.double()
        columns = U if Q.core is None else U @ Q.core
        change = (columns * P._solve(U, factors)).sum((-2, -1))
    elif Q.core is None:
        change = P.inv_congruence_diagonal(Q.U).sum((-2, -1))
    else:
        K = P.inv_congruence(Q.U, joint=True).flatten(-2).flatten(-3, -2)
        change = (K * Q.core).sum((-2, -1))
    return trace_solve(P, Q.base, factors) + Q._weighted(change[..., None, None])[..., 0, 0]


def _of_diagonal(P: PrecisionOperator, Q: Isotropic | Diagonal, factors: Any) -> Tensor:
    if isinstance(Q, Isotropic) and isinstance(P, (KroneckerSum, SpectralKronecker)):
        # I is a Kronecker product, and its trace has cheaper derivatives than D variances.
        return frozen_basis.trace(frozen(P, factors), [(Q.value, None, None)])
    return (P._inverse_diagonal(factors) * Q.diagonal()).sum(-1)


@register(TRACE_SOLVE, PrecisionOperator, Isotropic)
@register(TRACE_SOLVE, PrecisionOperator, Diagonal)
@register(TRACE_SOLVE, PrecisionOperator, Woodbury)
@register(TRACE_SOLVE, Woodbury, Isotropic)
@register(TRACE_SOLVE, Woodbury, Diagonal)
@register(TRACE_SOLVE, Woodbury, Woodbury)
def by_the_right_operand(P: PrecisionOperator, Q: PrecisionOperator, factors: Any) -> Tensor:
    return trace_solve(P, Q, factors)


@register(TRACE_SOLVE, Isotropic, PrecisionOperator)
@register(TRACE_SOLVE, Diagonal, PrecisionOperator)
def diagonal_anything(P: Isotropic | Diagonal, Q: PrecisionOperator, factors: None) -> Tensor:
    return (Q.diagonal() / P.diagonal()).sum(-1)


@register(TRACE_SOLVE, Dense, PrecisionOperator)
@register(TRACE_SOLVE, PrecisionOperator, Dense)
@register(TRACE_SOLVE, Woodbury, Dense)
def dense_anything(P: PrecisionOperator, Q: PrecisionOperator, factors: Any) -> Tensor:
    return P._solve(Q.to_dense(), factors).diagonal(dim1=-2, dim2=-1).sum(-1)


@register(TRACE_SOLVE, Woodbury, PrecisionOperator)
def low_rank_anything(P: Woodbury, Q: PrecisionOperator, factors: Any) -> Tensor:
    if isinstance(factors, LowRankFactors):
        normal = P._unweighted()
        before = trace_solve(normal.base, Q, factors.base)
        trace = before - P.sign * removed_trace(normal, Q, factors)
        if P.sign > 0 and is_concrete(trace) and bool((trace < KEPT * before).any()):
            return _by_columns(P, Q, factors)
        return P._over_weight(trace, 0)
    value = trace_solve(factors.operator, Q, factors.factors)
    return graft(value, _with_core(P, Q, factors)) if P._needs_grad() else value


def _by_columns(P: Woodbury, Q: PrecisionOperator, factors: LowRankFactors) -> Tensor:
    """The diagonal of ``P^-1 Q``, solved for by the columns of Q: where the update takes nearly all of the trace."""

    def some(columns: slice) -> Tensor:
        index = torch.arange(P.size, device=P.device)[columns]
        solved = P._solve(Q._matmul(identity_columns(index, P.size, P.dtype)), factors)
        return solved[..., columns, :].diagonal(dim1=-2, dim2=-1).sum(-1)

    batch = torch.broadcast_shapes(P.batch_shape, Q.batch_shape).numel()
    parts = pieces(P.size, 2 * 8 * batch * P.size, least=P.rank)
    kernel = recomputing(some, len(parts), *(t for X in (P, Q) for t, _ in X._tensors()))
    return functools.reduce(torch.add, (kernel(columns) for columns in parts))


def _with_core(P: Woodbury, Q: PrecisionOperator, factors: CanonicalFactors) -> Tensor:
    """``tr(Z^-1 Q) - s tr(M W^T Q W)``, as in `curvlin.precision.low_rank_core`: no root of the core."""
    normal, base = P._unweighted(), factors_of_base(P, factors)
    WM, W = removed(normal, base)
    less = (WM * Q._matmul(W)).sum((-2, -1))
    return P._over_weight(trace_solve(normal.base, Q, base) - P.sign * less, 0)


@register(TRACE_SOLVE, SpectralKronecker, KroneckerSum)
@register(TRACE_SOLVE, KroneckerSum, KroneckerSum)
def kronecker_kronecker(P: KroneckerSum | SpectralKronecker, Q: KroneckerSum, factors: Any) -> Tensor:
    """``sum_ij (X^T L X)_ii (Y^T R Y)_jj / d_ij`` over the terms ``L (x) R`` of Q."""
    _check_sizes(P, Q)
    terms = [(None, L, R) for L, R in Q.terms]
    return frozen_basis.trace(
        frozen(P, factors), terms if Q.shift is None else [*terms, (Q.shift, None, None)]
    )


@register(TRACE_SOLVE, SpectralKronecker, SpectralKronecker)
@register(TRACE_SOLVE, KroneckerSum, SpectralKronecker)
def kronecker_spectral(P: KroneckerSum | SpectralKronecker, Q: SpectralKronecker, factors: Any) -> Tensor:
    """The eigenvalues of Q times the diagonal of ``P^-1`` in its basis."""
    _check_sizes(P, Q)
    variances = frozen_basis.inverse_diagonal(frozen(P, factors).seen_from(Q.QL, Q.QR))
    return (variances * Q.eigenvalues).sum((-2, -1))


def _check_sizes(P: KroneckerSum | SpectralKronecker, Q: KroneckerSum | SpectralKronecker) -> None:
    if P.sizes != Q.sizes:
        raise NotClosedError(
            f"tr(P^-1 Q) of Kronecker operators needs equal factor sizes, found {P.sizes} and {Q.sizes}"
        )


@register(TRACE_SOLVE, BlockDiag, BlockDiag)
def blocks_blocks(P: BlockDiag, Q: BlockDiag, factors: tuple[Any, ...]) -> Tensor:
    if P.indices != Q.indices:
        raise NotClosedError("tr(P^-1 Q) of two BlockDiag needs equal partitions, found different ones")
    terms = [trace_solve(p, q, f) for p, q, f in zip(P.blocks, Q.blocks, factors, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
