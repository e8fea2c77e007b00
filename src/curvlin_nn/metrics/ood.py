"""Whether a score tells inputs out of distribution from those within."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvlin_nn._extras import import_extra
from curvlin_nn.errors import DataError
from curvlin_nn.metrics._check import not_empty


def auroc(inside: Float[Tensor, "*N"], outside: Float[Tensor, "*M"]) -> Float[Tensor, ""]:
    """The probability that a score out of distribution exceeds one within, ties counting half.

    By scikit-learn. (`torchmetrics` sends scores that exceed one, as entropies do, through a sigmoid in float32, which
    makes ties of them.)

    Args:
        inside: a score for each input in distribution, such as `entropy` or ``1 - max_probability``.
        outside: likewise out of distribution, where it should be larger.

    Raises:
        DataError: if there are no scores on either side, or one is not finite.
        ImportError: without the extra ``metrics``.
    """
    return _by_sklearn("roc_auc_score", inside, outside)


def aupr(inside: Float[Tensor, "*N"], outside: Float[Tensor, "*M"]) -> Float[Tensor, ""]:
    """The average precision of detecting what is out of distribution, ``sum_k (R_k - R_{k-1}) P_k``.

    By scikit-learn; a step function, not interpolated. A score that says nothing has the share of inputs that are out
    of distribution. See `auroc`.
    """
    return _by_sklearn("average_precision_score", inside, outside)


def scikit_learn() -> ModuleType:
    """Its metrics.

    Raises:
        ImportError: without the extra ``metrics``.
    """
    return import_extra("sklearn.metrics", "metrics", "curvlin_nn.metrics")


def _by_sklearn(metric: str, inside: Tensor, outside: Tensor) -> Tensor:
    scores = []
    for name, values in (("inside", inside), ("outside", outside)):
        not_empty(values, f"scores {name}")
        if values.is_complex() or not bool(torch.isfinite(values).all()):
            raise DataError(f"the scores {name} must be real and finite")
        scores.append(values.detach().double().flatten().cpu().numpy())
    is_outside = np.repeat([0, 1], [len(values) for values in scores])
    value = getattr(scikit_learn(), metric)(is_outside, np.concatenate(scores))
    return torch.tensor(float(value), dtype=torch.float64, device=inside.device)
