"""Solves with small matrices, for batches that broadcast."""

from __future__ import annotations

import torch
from torch import Tensor


def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """``A^-1 B``, or ``B A^-1`` where `left` is False.

    Both get the same batch first. `torch.linalg.solve` takes B for vectors where its shape is that of A without the
    last dimension, whatever is meant, and does not broadcast under `torch.vmap`.

    Args:
        A: ``(..., n, n)``.
        B: ``(..., n, K)``, or ``(..., K, n)``.
        left: the side on which A stands.
    """
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = (M.expand(*batch, *M.shape[-2:]) for M in (A, B))
    return torch.linalg.solve(A, B, left=left)
