"""``P = Z + s w U C U^T`` with a core C that may be singular or indefinite.

Values come from an operator without a core that equals P. Their derivatives must not go through a root of C, which
may have none, and come from formulas in C itself: for ``w = 1``, ``G = U^T Z^-1 U`` and ``W = Z^-1 U``,

    log det P = log det Z + log det (I + s G C)
    P^-1      = Z^-1 - s W M W^T,    M = C (I + s G C)^-1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlin._tree import Tree, static_field, tensor_field
from curvlin.features.combined import combined_columns
from curvlin.numerics import linear
from curvlin.numerics.implicit import without_derivative
from curvlin.numerics.rounding import rounding_level

if TYPE_CHECKING:
    from curvlin.precision.low_rank import Woodbury


@dataclass(eq=False, repr=False)
class CanonicalFactors(Tree):
    """An operator without a core that equals the one with it, and its factors."""

    operator: Any = tensor_field(0)
    factors: Any = tensor_field(0)
    definite: bool = static_field()


_LEAST_PIVOT = 1e-10
"""The smallest squared pivot of a core, relative to its diagonal entry, that counts as definite."""


def canonical(P: Woodbury) -> CanonicalFactors:
    """The core as ``L L^T``, or as ``E diag(gamma) E^T``: its positive part an update, its negative part a downdate."""
    assert P.core is not None
    lower, info = torch.linalg.cholesky_ex(P.core)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    # A pivot near rounding would have a Cholesky factor without usable derivatives.
    regular = pivots > _LEAST_PIVOT * P.core.diagonal(dim1=-2, dim2=-1)
    if bool((info == 0).all()) and bool(regular.all()):
        definite = P._with(core=None, U=combined_columns(P.U, lower))
        return CanonicalFactors(definite, definite._factorize(), True)
    gamma, E = torch.linalg.eigh(P.core)
    gamma = torch.where(gamma.abs() <= rounding_level(gamma, P.resolution), 0.0, gamma)
    total = P._with(core=None, U=combined_columns(P.U, E * gamma.clamp(min=0.0).sqrt().unsqueeze(-2)))
    if bool((gamma < 0).any()):
        lost = combined_columns(P.U, E * (-gamma).clamp(min=0.0).sqrt().unsqueeze(-2))
        total = total._with(base=total, U=lost, sign=-P.sign)
    return CanonicalFactors(total, total._factorize(), False)


def factors_of_base(P: Woodbury, factors: CanonicalFactors) -> Any:
    """The factors of Z, on which one change of the canonical form lies, or two of opposite signs."""
    inner = factors.factors.base
    return inner if factors.operator.sign == P.sign else inner.base


# -- roots ---------------------------------------------------------------------------------------------------


def without_core(P: Woodbury, factors: CanonicalFactors) -> Woodbury:
    """What has the canonical factors, differentiable where the core is definite."""
    if not (P._needs_grad() and factors.definite):
        operator: Woodbury = factors.operator
        return operator
    assert P.core is not None
    changed: Woodbury = P._with(core=None, U=combined_columns(P.U, torch.linalg.cholesky_ex(P.core).L))
    return changed


def checked_root(P: Woodbury, result: Tensor, factors: CanonicalFactors) -> Tensor:
    """What a root returns: a core without a Cholesky factor leaves it without a derivative in P."""
    if factors.definite or not P._needs_grad():
        return result
    return without_derivative(
        result,
        [t for t, _ in P._tensors()],
        "the root of Woodbury with a singular or indefinite core has no derivative; make the core positive "
        "definite, or detach the operator",
    )


# -- differentiable, without a root of the core --------------------------------------------------------------


def log_det(P: Woodbury, factors: CanonicalFactors) -> Tensor:
    """``log det Z + log det (I + s G C)``."""
    normal, base = P._unweighted(), factors_of_base(P, factors)
    H = normal._capacitance(base)
    return P._weighted_logdet(normal.base._logdet(base)) + torch.linalg.slogdet(H).logabsdet


def inverse_diagonal(P: Woodbury, factors: CanonicalFactors) -> Tensor:
    """``diag(Z^-1)`` less the diagonal of ``s W M W^T``."""
    normal, base = P._unweighted(), factors_of_base(P, factors)
    WM, W = removed(normal, base)
    return P._over_weight(normal.base._inverse_diagonal(base) - P.sign * (WM * W).sum(-1), 1)


def removed(P: Woodbury, base_factors: Any) -> tuple[Tensor, Tensor]:
    """``W M`` and W, for P without a weight."""
    assert P.core is not None
    columns = P.U.double() if isinstance(P.U, Tensor) else torch.cat([*P._column_parts()], dim=-1)
    W = P.base._solve(columns, base_factors)
    return W @ linear.solve(P._capacitance(base_factors), P.core, left=False), W
