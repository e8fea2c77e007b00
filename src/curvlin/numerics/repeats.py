"""Tensors that repeat themselves along a dimension, as `Tensor.expand` makes them: one copy is held and worked on.

The Jacobian of a network's outputs in the outputs of its last layer is the identity for every sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlin._tree import is_concrete


def repeats(X: Tensor, dim: int) -> bool:
    """Whether X holds one tensor several times along `dim`, and says so by its strides."""
    return X.shape[dim] > 1 and is_concrete(X) and X.stride(dim) == 0


def distinct(X: Tensor) -> Tensor:
    """Every entry of X once: with one place along each dimension that repeats."""
    for dim in range(X.ndim):
        if repeats(X, dim):
            X = X.narrow(dim, 0, 1)
    return X


def once(function: Callable[[Tensor], Tensor], X: Tensor, dim: int) -> Tensor:
    """``function(X)``, of one place along `dim` (counted from the right, and kept) where X repeats itself there."""
    if not repeats(X, dim):
        return function(X)
    result = function(X.narrow(dim, 0, 1))
    shape = [*result.shape]
    shape[dim] = X.shape[dim]
    return result.expand(torch.Size(shape))
