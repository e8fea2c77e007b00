"""Products with Kronecker factors: batches of ``a x b`` matrices multiplied from both sides, None as the identity."""

from __future__ import annotations

from torch import Tensor


def rotate(left: Tensor | None, V: Tensor, right: Tensor | None) -> Tensor:
    """``L V R^T``, which is ``(L (x) R) vec(V)`` for row-major vec.

    Args:
        left: L, ``(..., a', a)``.
        V: ``(..., K, a, b)``: K right-hand sides.
        right: R, ``(..., b', b)``.
    """
    if left is not None:
        V = left.unsqueeze(-3) @ V
    if right is not None:
        V = V @ right.mT.unsqueeze(-3)
    return V


def congruence(left: Tensor | None, V: Tensor, right: Tensor | None) -> Tensor:
    """``L^T V R``, which is ``(L (x) R)^T vec(V)``."""
    if left is not None:
        V = left.mT.unsqueeze(-3) @ V
    if right is not None:
        V = V @ right.unsqueeze(-3)
    return V


def in_basis(left: Tensor | None, values: Tensor, right: Tensor | None, X: Tensor) -> Tensor:
    """``Q diag(values) Q^T X`` with an orthogonal ``Q = L (x) R``, in the dtype of X.

    Args:
        left: L, ``(..., a, a)``.
        values: ``(..., a, b)``.
        right: R, ``(..., b, b)``.
        X: ``(..., a b, K)``.
    """
    left, right = (None if Q is None else Q.to(X.dtype) for Q in (left, right))
    V = congruence(left, X.mT.unflatten(-1, values.shape[-2:]), right)
    return rotate(left, V * values.to(X.dtype).unsqueeze(-3), right).flatten(-2).mT


def product(left: Tensor, right: Tensor) -> Tensor:
    """The Kronecker product itself, ``(..., ab, ab)``; only for ways out to dense matrices."""
    grid = left[..., :, None, :, None] * right[..., None, :, None, :]
    rows, columns = left.shape[-2] * right.shape[-2], left.shape[-1] * right.shape[-1]
    return grid.reshape(*grid.shape[:-4], rows, columns)
