"""``P + s U U^T`` in the simplest type that holds it exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlin.features.base import FeatureOperator
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.dense import Dense
from curvlin.precision.diagonal import Diagonal, Isotropic
from curvlin.precision.low_rank import LowRankPlusDiag, Woodbury, check_columns


def low_rank_update(P: PrecisionOperator, U: Tensor | FeatureOperator, sign: int) -> PrecisionOperator:
    """``P + s U U^T`` in the simplest type that holds it exactly."""
    check_columns(U, P)
    if isinstance(P, Dense):
        change = Woodbury(Dense(torch.zeros_like(P.matrix)), U)._to_dense()
        return Dense(P.matrix + sign * change)
    if sign > 0 and isinstance(U, Tensor):
        if isinstance(P, (Isotropic, Diagonal)):
            # On P itself: a multiple of the identity adds to more than a diagonal matrix does.
            return Woodbury(P, U)._with(LowRankPlusDiag)
        if isinstance(P, Woodbury) and P.sign > 0 and isinstance(P.U, Tensor):
            return _updated_again(P, U)
    changed = Woodbury(P, U)
    return changed if sign > 0 else changed._with(sign=-1)


def _updated_again(P: Woodbury, U: Tensor) -> Woodbury:
    """One change with the columns of both instead of a change of a change."""
    if P.core is None:
        return P._with(U=joined_columns(unit_weight(P), U), weight=None)
    assert isinstance(P.U, Tensor)
    core = P.core if P.weight is None else P.core * P.weight[..., None, None]
    k, m = core.shape[-1], U.shape[-1]
    pad = torch.nn.functional.pad
    both = pad(core, (0, m, 0, m)) + pad(torch.eye(m, dtype=U.dtype, device=U.device), (k, 0, k, 0))
    return P._with(U=joined_columns(P.U, U), core=both, weight=None)


def unit_weight(P: Woodbury) -> Tensor:
    """The columns ``sqrt(w) U`` of an update by a tensor."""
    assert isinstance(P.U, Tensor)
    return P.U if P.weight is None else P.U * P.weight.sqrt()[..., None, None]


def joined_columns(first: Tensor, second: Tensor) -> Tensor:
    """Columns side by side, batch dimensions broadcast."""
    batch = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return torch.cat([t.expand(*batch, *t.shape[-2:]) for t in (first, second)], dim=-1)
