"""Iterative refinement of a solution by its own residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlin._tree import is_concrete

_ROUNDING = 4.0
_MAX_STEPS = 20
_UNSEEN_STEPS = 3
"""Steps taken where values may not be looked at."""


def refine(
    x: Tensor,
    B: Tensor,
    apply: Callable[[Tensor], Tensor],
    solve: Callable[[Tensor], Tensor],
    norm: Tensor,
) -> Tensor:
    """``P^-1 B`` improved from x until its residual is rounding or shrinks no further.

    With a solver that is right to some digits, each step adds as many, down to a residual of some
    ``eps |P| |x|``: what a backward stable solver leaves (Higham, Accuracy and Stability, 12.1).

    Args:
        x: a first solution ``(..., D, K)``.
        B: the right-hand sides ``(..., D, K)``.
        apply: ``X -> P X``.
        solve: ``X -> P^-1 X``, roughly.
        norm: a number ``(...)`` that ``|P|`` is not less than, to know rounding by; what is too small costs time.
    """
    residual = B - apply(x)
    if not is_concrete(residual):
        for _ in range(_UNSEEN_STEPS):
            x = x + solve(residual)
            residual = B - apply(x)
        return x
    size = torch.linalg.vector_norm(residual, dim=-2, keepdim=True)
    given = torch.linalg.vector_norm(B, dim=-2, keepdim=True)
    for _ in range(_MAX_STEPS):
        reached = given + norm[..., None, None] * torch.linalg.vector_norm(x, dim=-2, keepdim=True)
        if bool((size <= _ROUNDING * torch.finfo(x.dtype).eps * reached).all()):
            break
        step = x + solve(residual)
        left = B - apply(step)
        left_size = torch.linalg.vector_norm(left, dim=-2, keepdim=True)
        better = left_size < size
        if bool(better.all()):
            x, residual = step, left
        else:
            x, residual = torch.where(better, step, x), torch.where(better, left, residual)
        if not bool((left_size < size / 2).any()):
            break
        size = torch.minimum(size, left_size)
    return x
