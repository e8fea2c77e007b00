"""Checks of arguments that are numbers, with the one-line messages that users read."""

from __future__ import annotations

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
