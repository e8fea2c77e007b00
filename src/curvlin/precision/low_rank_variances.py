"""Variances and traces under ``P = Z + s U U^T``: what a change removes from those of its base.

    P^-1 = Z^-1 - s Z^-1 U H^-1 U^T Z^-1,    H = I + s U^T Z^-1 U

Nothing but the diagonal or the trace is kept of the second term, and of its D x k halves only as many columns at a
time as take the memory of the operator. P has no core and no weight here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlin._tree import is_concrete
from curvlin.index import identity_columns
from curvlin.numerics.implicit import graft
from curvlin.numerics.low_rank import LowRankFactors, leverage_split, leverages, root_of_middle
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.diagonal import Diagonal, Isotropic

if TYPE_CHECKING:
    from curvlin.precision.low_rank import Woodbury


def inverse_diagonal(P: Woodbury, factors: LowRankFactors) -> Tensor:
    """``diag(P^-1)``, differentiable."""
    value = _accurate_inverse_diagonal(P, factors)
    if not P._needs_grad():
        return value
    prior = P.base._inverse_diagonal(factors.base)
    live = prior - P.sign * _removed_diagonal(P, _live_root_of_middle(P, factors), factors)
    for rows in _cancelled(P, value, prior):
        live = live.index_copy(-1, rows, P._inv_quad(identity_columns(rows, P.size, P.dtype), factors))
    return graft(value, live)


def _accurate_inverse_diagonal(P: Woodbury, factors: LowRankFactors) -> Tensor:
    """``diag(Z^-1)`` less what the change removes; where that cancels, a leverage split or single solves."""
    if isinstance(P.U, Tensor) and isinstance(P.base, (Diagonal, Isotropic)):
        scale = P.base._column().rsqrt()
        return from_leverage(P, leverages(P.U, scale, factors), factors)
    prior = P.base._inverse_diagonal(factors.base)
    if factors.Q is None:
        removed = _removed_diagonal(P, root_of_middle(factors), factors)
    else:
        columns = P.base._unwhiten(factors.Q, factors.base)
        removed = (columns.square() * (factors.gain / factors.h).unsqueeze(-2)).sum(-1)
    result = prior - P.sign * removed
    for rows in _cancelled(P, result, prior):
        result[..., rows] = P._inv_quad_value(identity_columns(rows, P.size, P.dtype), factors)
    return result


def _cancelled(P: Woodbury, variances: Tensor, prior: Tensor) -> Iterator[Tensor]:
    """The coordinates in which an update takes more than half of the prior's variance, some at a time."""
    if P.sign > 0 and is_concrete(variances):
        taken = (variances < prior / 2).reshape(-1, P.size).any(0)
        yield from taken.nonzero().squeeze(-1).split(P._width())


def from_leverage(P: Woodbury, leverage: Tensor, factors: LowRankFactors) -> Tensor:
    """``diag(P^-1)_i = (1 - s h_i) / d_i`` for a diagonal base, with the leverages split off that come near 1."""
    prior = P.base._inverse_diagonal(factors.base)
    share = 1 - P.sign * leverage
    # Inside transforms values cannot be looked at, and the formula as it stands has to do.
    if P.sign > 0 and is_concrete(leverage) and bool((leverage > 0.5).any()):
        assert isinstance(P.U, Tensor)
        V, batch = P.base._root_solve(P.U.double(), factors.base), P.batch_shape
        each = V.expand(*batch, *V.shape[-2:]).reshape(-1, *V.shape[-2:])
        rows = leverage.expand(*batch, P.size).reshape(-1, P.size)
        shares = [leverage_split(v, h) for v, h in zip(each, rows, strict=True)]
        share = torch.stack(shares).reshape(*batch, P.size)
    return prior * share


def removed_trace(P: Woodbury, Q: PrecisionOperator, factors: LowRankFactors) -> Tensor:
    """``tr(Q Z^-1 U H^-1 U^T Z^-1)``, differentiable."""

    def trace(root: Tensor) -> Tensor:
        parts = _solved_parts(P, root, factors)
        return functools.reduce(torch.add, ((w * Q._matmul(w)).sum((-2, -1)) for w in parts))

    value = trace(root_of_middle(factors))
    return graft(value, trace(_live_root_of_middle(P, factors))) if P._needs_grad() else value


def _removed_diagonal(P: Woodbury, root: Tensor, factors: LowRankFactors) -> Tensor:
    """The diagonal of ``Z^-1 U H^-1 U^T Z^-1``, given R with ``R R^T = H^-1``."""
    return functools.reduce(torch.add, (w.square().sum(-1) for w in _solved_parts(P, root, factors)))


def _solved_parts(P: Woodbury, root: Tensor, factors: LowRankFactors) -> Iterator[Tensor]:
    """The columns of ``Z^-1 U R``, as many at a time as may be formed."""
    for part in root.split(P._width(), dim=-1):
        yield P.base._solve(P._spread(part), factors.base)


def _live_root_of_middle(P: Woodbury, factors: LowRankFactors) -> Tensor:
    """``L^-T`` of ``H = L L^T``, differentiable: another root of ``H^-1`` than `root_of_middle`."""
    H = P._capacitance(factors.base)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(H).L.mT, eye.expand_as(H), upper=True)
