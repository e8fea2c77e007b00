"""Checks that several families share, with the one-line messages that users read."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlin_nn._check import numbers
from curvlin_nn.errors import DataError


def weights(name: str, value: object) -> Tensor:
    """`value` as finite numbers that are not negative, float64."""
    found = numbers(name, value).detach().double()
    if not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ValueError(f"{name} must be finite and not negative, found {_worst(found)}")
    return found


def variances(name: str, value: object) -> Tensor:
    """`value` as finite positive numbers, float64."""
    found = numbers(name, value).detach().double()
    if not bool((torch.isfinite(found) & (found > 0)).all()):
        raise ValueError(f"{name} must be finite and positive, found {_worst(found)}")
    return found


def target_shape(targets: Tensor, expected: torch.Size, where: str) -> None:
    """Whether targets have the shape that the outputs ask for.

    Raises:
        DataError: if they do not.
    """
    if targets.shape != expected:
        raise DataError(
            f"targets of {where} must have shape {tuple(expected)}, found {tuple(targets.shape)}; nothing is broadcast"
        )


def labels(targets: Tensor, n_classes: int, where: str) -> None:
    """Whether targets are class labels.

    Raises:
        DataError: if they are no integers, or out of range.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise DataError(f"targets of {where} must be integer class labels, found dtype {targets.dtype}")
    outside = targets[(targets < 0) | (targets >= n_classes)]
    if len(outside):
        raise DataError(
            f"targets of {where} must lie in 0..{n_classes - 1} like the model's {n_classes} outputs, found "
            f"{int(outside[0])}"
        )


def real_targets(targets: Tensor, where: str) -> None:
    """Whether targets are finite floating numbers.

    Raises:
        DataError: if they are not.
    """
    if not targets.is_floating_point():
        raise DataError(f"targets of {where} must be floating numbers, found dtype {targets.dtype}")
    if not bool(torch.isfinite(targets).all()):
        raise DataError(f"targets of {where} must be finite, found NaN or Inf")


def _worst(values: Tensor) -> float:
    """An entry that is not finite, or else the smallest."""
    bad = values[~torch.isfinite(values)]
    return float(bad[0]) if len(bad) else float(values.min())
