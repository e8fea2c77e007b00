"""The noise of linear observations, as what a conditioning needs of it: a root that acts on rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlin._check import floating, same_kind
from curvlin._tree import common_shape, is_concrete
from curvlin.errors import NotClosedError
from curvlin.precision.base import PrecisionOperator
from curvlin.precision.dense import Dense


class Noise(NamedTuple):
    """Lambda, the precision of the noise, as a root ``S^T S = Lambda`` that acts on rows."""

    mix: Callable[[Any], Any]
    """``S Phi``, in the dtype of Phi."""
    whiten: Callable[[Tensor], Tensor]
    """``S r``, in float64."""
    logdet: Tensor
    """``log det Lambda`` over all rows, in float64."""


def observation_noise(precision: float | Tensor | PrecisionOperator, y: Tensor, rows: torch.Size) -> Noise:
    """The noise of observations y whose own dimensions are `rows`, ``(R,)`` or ``(N, R)``.

    Args:
        precision: one positive number; positive numbers that broadcast to y; or a positive definite matrix
            ``(..., R, R)``, or operator of size R, for rows that share noise.
        y: the observations.
        rows: the trailing shape of y that is not batch.

    Raises:
        TypeError, ValueError: if it is none of these, or not positive.
        NotClosedError: for noise that couples samples.
        NotPositiveDefiniteError: for a matrix or operator that is not positive definite.
    """
    if isinstance(precision, (int, float)):
        precision = torch.tensor(float(precision), dtype=y.dtype, device=y.device)
    R = rows[-1]
    if isinstance(precision, Tensor):
        floating("noise_precision", precision, like=y)
        if precision.ndim == 0:
            return _uniform_noise(precision, rows)
        per_row = (
            precision.ndim <= y.ndim
            and common_shape(precision.shape, y.shape) == y.shape
            and precision.shape[-1] == R
        )
        matrix = precision.ndim >= 2 and precision.shape[-2:] == (R, R)
        if per_row and matrix and R > 1:
            raise ValueError(
                f"noise_precision of shape {tuple(precision.shape)} may be a matrix or one number per row; "
                "wrap the matrix in Dense, or expand the numbers by a leading dimension"
            )
        if per_row:
            return _independent_noise(precision, rows)
        if not matrix:
            raise ValueError(
                f"noise_precision must be a number, one per row of y {tuple(y.shape)}, or a matrix "
                f"(..., {R}, {R}); found shape {tuple(precision.shape)}"
            )
        precision = Dense(precision)
    if not isinstance(precision, PrecisionOperator):
        raise TypeError(
            "noise_precision must be a number, a tensor or a PrecisionOperator, found "
            f"{type(precision).__name__}"
        )
    return _correlated_noise(precision, y, rows)


def _positive(precision: Tensor) -> None:
    if is_concrete(precision) and not bool((precision > 0).all()):
        raise ValueError(f"noise_precision must be positive, found {float(precision.min()):.3e}")


def _uniform_noise(precision: Tensor, rows: torch.Size) -> Noise:
    _positive(precision)
    root, root64 = precision.sqrt(), precision.double().sqrt()

    def mix(Phi: Any) -> Any:
        return root * Phi if isinstance(Phi, Tensor) else Phi._scale(root)

    return Noise(mix, lambda r: root64 * r, rows.numel() * precision.double().log())


def _independent_noise(precision: Tensor, rows: torch.Size) -> Noise:
    _positive(precision)
    precision = precision.expand(torch.broadcast_shapes(precision.shape, rows))
    root, root64 = precision.sqrt(), precision.double().sqrt()

    def mix(Phi: Any) -> Any:
        return root.unsqueeze(-1) * Phi if isinstance(Phi, Tensor) else Phi._mix(torch.diag_embed(root))

    return Noise(mix, lambda r: root64 * r, precision.double().log().sum(tuple(range(-len(rows), 0))))


def _correlated_noise(precision: PrecisionOperator, y: Tensor, rows: torch.Size) -> Noise:
    R = rows[-1]
    same_kind("noise_precision", next(precision._tensors())[0], y)
    if precision.size != R:
        mend = "; correlation between samples is not closed" if precision.size == rows.numel() else ""
        raise NotClosedError(f"noise_precision must have {R} rows, found {precision.size}{mend}")
    if common_shape(precision.batch_shape, y.shape[:-1]) != y.shape[:-1]:
        raise ValueError(
            f"noise_precision must have a batch shape that broadcasts to {tuple(y.shape[:-1])}, found "
            f"{tuple(precision.batch_shape)}"
        )
    Lambda, factors = precision._factored()
    eye = torch.eye(R, dtype=torch.float64, device=y.device)
    S = Lambda._whiten(eye, factors)  # R^T with R R^T = Lambda
    logdet = Lambda._logdet(factors)
    if len(rows) == 2:  # one Lambda per sample, or one for all of them
        logdet = logdet.expand(torch.broadcast_shapes(logdet.shape, rows[:1])).sum(-1)

    def mix(Phi: Any) -> Any:
        return S.to(y.dtype) @ Phi if isinstance(Phi, Tensor) else Phi._mix(S.to(y.dtype))

    return Noise(mix, lambda r: (S @ r.unsqueeze(-1)).squeeze(-1), logdet)
