"""Solves and quadratic forms of ``P = Z + s U U^T``, without a core or a weight.

    P^-1 x     = R_Z^-T (I + s V V^T)^-1 R_Z^-1 x,    V = R_Z^-1 U
    x^T P^-1 x = min_t (x - U t)^T Z^-1 (x - U t) + t^T t      for an update
               = |(I - V V^T)^{-1/2} R_Z^-1 x|^2               for a downdate

The minimum is at ``t = U^T P^-1 x``, from k equations ``(I + U^T Z^-1 U) t = U^T Z^-1 x``, and leaves ``x - U t = Z
P^-1 x``; errors of t count squared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlin.numerics.low_rank import INVERSE, INVERSE_ROOT, LowRankFactors, over_capacitance
from curvlin.numerics.refinement import refine
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.low_rank_roots import ChangedIdentity

if TYPE_CHECKING:
    from curvlin.precision.low_rank import Woodbury


def solve(P: Woodbury, X: Tensor, factors: LowRankFactors) -> Tensor:
    """``P^-1 X``."""

    def once(B: Tensor) -> Tensor:
        white = ChangedIdentity(P, factors).shrink(P.base._root_solve(B, factors.base), INVERSE)
        return P.base._unwhiten(white, factors.base)

    # Refinement repairs what whitening by an ill-conditioned base, or a Gram matrix, has cost.
    return refine(once(X), X, P._matmul, once, _least_norm(P, factors))


def _least_norm(P: Woodbury, factors: LowRankFactors) -> Tensor:
    """A lower bound of the norms that rounding in ``P x`` is relative to."""
    diagonal = P.base._diagonal()
    largest = diagonal.amax(-1)
    if isinstance(P.base, (Diagonal, Isotropic)):
        largest = torch.maximum(largest, factors.gain.amax(-1) * diagonal.amin(-1))
    return largest


def inv_quad(P: Woodbury, X: Tensor, factors: LowRankFactors) -> Tensor:
    """``x^T P^-1 x`` of each column, a sum of squares."""
    if P.sign > 0:
        return _minimum(P, X, factors)[0]
    white = P.base._root_solve(X, factors.base)
    return ChangedIdentity(P, factors).shrink(white, INVERSE_ROOT).square().sum(-2)


def inv_quad_and_solution(P: Woodbury, X: Tensor, factors: LowRankFactors) -> tuple[Tensor, Tensor]:
    """``x^T P^-1 x`` of each column, and ``P^-1 X``, from the same k equations where they are good, for an update."""
    quad, rest = _minimum(P, X, factors)
    # The rest cancels where X lies near the range of U; a solve of its own does not.
    return quad, P.base._solve(rest, factors.base) if has_safe_gram(P, factors) else solve(P, X, factors)


def _minimum(P: Woodbury, X: Tensor, factors: LowRankFactors) -> tuple[Tensor, Tensor]:
    """The minimum over t, and ``X - U t`` there."""
    t = coefficients(P, X, factors)
    rest = X - P._spread(t)
    return P.base._inv_quad(rest, factors.base) + t.square().sum(-2), rest


def coefficients(P: Woodbury, X: Tensor, factors: LowRankFactors) -> Tensor:
    """``t = U^T P^-1 X = H^-1 U^T Z^-1 X`` with ``H = I + s U^T Z^-1 U``, small beside ``|U| |P^-1 X|``."""
    t = over_capacitance(P._collect(P.base._solve(X, factors.base)), factors)
    if P.sign > 0 and not has_safe_gram(P, factors):
        for _ in range(2):  # t = U^T Z^-1 (X - U t) at the minimum
            rest = X - P._spread(t)
            t = t + over_capacitance(P._collect(P.base._solve(rest, factors.base)) - t, factors)
    return t


def has_safe_gram(P: Woodbury, factors: Any) -> bool:
    """Whether the k equations are good to about ten digits."""
    return isinstance(factors, LowRankFactors) and factors.Q is None and isinstance(P.U, Tensor)
