"""Powers of two: removed before a factorisation and put back after it, exactly, so that no result depends on scale."""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_two(A: Tensor) -> Tensor:
    """For each matrix of a batch, the power of two next above its largest entry (1 for a zero matrix)."""
    largest = A.detach().abs().amax(dim=(-2, -1))
    mantissa, _ = torch.frexp(largest)
    # The quotient of a number and its own mantissa is an exact power of two.
    return torch.where(
        largest > 0, largest / torch.where(largest > 0, mantissa, 1.0), torch.ones_like(largest)
    )
