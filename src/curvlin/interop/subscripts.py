"""What may stand in ``[...]``, made explicit: slices, integers counted from the front, and tensors of such integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlin._tree import is_concrete

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def resolved(index: Any, shape: torch.Size, device: torch.device) -> list[Any]:
    """An index with one entry for each dimension of `shape`: a slice, an int or an int64 tensor.

    Raises:
        IndexError: for None, a second ellipsis, too many entries, an entry outside of its dimension, a mask that does
            not fit its dimension, or tensors that do not broadcast against each other.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(i is None for i in parts):
        raise IndexError("index must not hold None; use unsqueeze")
    dots = [n for n, i in enumerate(parts) if i is Ellipsis]
    if len(dots) > 1 or len(parts) - len(dots) > len(shape):
        raise IndexError(f"index must have at most {len(shape)} entries and one ellipsis, found {index!r}")
    place = dots[0] if dots else len(parts)
    missing = len(shape) - (len(parts) - len(dots))
    parts[place : place + len(dots)] = [slice(None)] * missing
    parts = [_entry(i, size, device) for i, size in zip(parts, shape, strict=True)]
    shapes = [tuple(i.shape) for i in parts if isinstance(i, Tensor)]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise IndexError(f"index tensors must broadcast against each other, found shapes {shapes}") from None
    return parts


def coordinates(index: Any, size: int, device: torch.device) -> Tensor | None:
    """An index of one matrix dimension as coordinates, or None where it is the whole dimension."""
    if isinstance(index, slice):
        chosen = torch.arange(size, device=device)[index]
        return None if len(chosen) == size else chosen
    chosen = torch.as_tensor(_entry(index, size, device), device=device)
    if chosen.ndim != 1:
        raise IndexError(
            f"index of a matrix dimension must have one dimension, found shape {tuple(chosen.shape)}"
        )
    return chosen


def from_the_front(index: Tensor, size: int) -> Tensor:
    """Integers in ``-size .. size - 1`` as int64 ones in ``0 .. size - 1``.

    Raises:
        IndexError: if there are others, or another dtype: torch would take a uint8 for a mask.
    """
    if index.dtype not in _INTEGERS:
        raise IndexError(
            f"index must hold signed integers, or bools for a mask, found {index.dtype}; convert it with .long() "
            "or .bool()"
        )
    if is_concrete(index):
        outside = index[(index < -size) | (index >= size)]
        if outside.numel() > 0:
            raise IndexError(f"index must lie in {-size} .. {size - 1}, found {int(outside[0])}")
    index = index.long()
    return torch.where(index < 0, index + size, index)


def _entry(index: Any, size: int, device: torch.device) -> slice | int | Tensor:
    if isinstance(index, slice):
        return index
    try:
        chosen = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise IndexError(
            f"index must hold slices, integers or masks, found a {type(index).__name__}"
        ) from None
    if chosen.numel() == 0 and not isinstance(index, Tensor):
        chosen = chosen.long()  # an empty list has no dtype of its own
    if chosen.dtype == torch.bool:
        if chosen.shape != (size,):
            raise IndexError(f"a mask must have shape ({size},), found {tuple(chosen.shape)}")
        return chosen.nonzero().squeeze(-1)
    chosen = from_the_front(chosen, size)
    return int(chosen) if chosen.ndim == 0 else chosen
