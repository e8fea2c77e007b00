"""Work on many items, some at a time: what bounds the memory of temporaries.

A chunk takes the items that the caller says, or as many as fit `BUDGET` (`CEILING` where a chunk has a price of its
own, to be shared by several items). With several chunks and a gradient asked for, what a chunk needs for the backward
pass is recomputed there instead of kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from curvlin._tree import is_concrete

BUDGET = 2**21
"""Bytes of temporaries that a chunk takes when the caller leaves the choice to the library: they stay in cache."""

CEILING = 2**26
"""Bytes that a chunk may take where smaller ones would repeat work."""


def pieces(total: int, bytes_each: int, chunk: int | None = None, least: int = 1) -> list[slice]:
    """``range(total)`` cut into slices of `chunk` items, or of what the budget holds.

    Args:
        total: the number of items.
        bytes_each: of temporaries, per item.
        chunk: the caller's choice.
        least: as many items as a slice should have below the ceiling, budget or not.
    """
    bytes_each = max(1, bytes_each)
    step = chunk if chunk is not None else max(BUDGET // bytes_each, min(least, CEILING // bytes_each), 1)
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts along `dim`; a single one is not copied."""
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]


def recomputing(
    kernel: Callable[..., Tensor], n_chunks: int, *tensors: Tensor | None
) -> Callable[..., Tensor]:
    """`kernel`, or where it is one of several and needs a gradient, one that keeps nothing for backward.

    Args:
        kernel: called once per chunk.
        n_chunks: how often.
        *tensors: whatever it may need a gradient for, arguments or not.
    """
    given = [t for t in tensors if t is not None]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    # Inside torch.func transforms checkpointing does not exist: its hooks do not see wrapped tensors.
    if n_chunks == 1 or not wanted or not all(map(is_concrete, given)):
        return kernel

    def checkpointed(*args: Any) -> Tensor:
        result: Tensor = checkpoint(kernel, *args, use_reentrant=False, preserve_rng_state=False)
        return result

    return checkpointed
