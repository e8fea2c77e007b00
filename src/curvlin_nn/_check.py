"""Checks of arguments that are numbers, with the one-line messages that users read."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from curvlin_nn.inference_mode import ordinary


def numbers(name: str, value: object) -> Tensor:
    """`value` as a tensor: itself, or float64 made of a number or a sequence of numbers."""
    if isinstance(value, Tensor):
        return ordinary(value)
    try:
        with torch.inference_mode(False):
            return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = type(value).__name__
        raise TypeError(f"{name} must be a number or a tensor, found {found} {value!r:.40}") from None


def count(name: str, value: object) -> int:
    """`value` as an integer of at least one."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # which is what is asked
    except TypeError:
        raise TypeError(f"{name} must be an integer, found {type(value).__name__} {value!r:.40}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, found {number}")
    return number
