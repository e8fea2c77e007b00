"""Sets of coordinates: the index argument of marginals and conditionals, and the partition behind `BlockDiag`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Index = Tensor | Sequence[int] | slice
"""Coordinates, in the order in which they are wanted."""


def as_index(index: Index, size: int, device: torch.device) -> Tensor:
    """`index` as a LongTensor of distinct coordinates of a space of `size`.

    Raises:
        TypeError: if it is not made of integers.
        ValueError: if it is empty, out of range, or names a coordinate twice.
    """
    if isinstance(index, slice):
        indices = torch.arange(size, device=device)[index]
    else:
        indices = torch.as_tensor(index, device=device)
        if indices.numel() and (indices.is_floating_point() or indices.dtype == torch.bool):
            raise TypeError(f"index must hold integers, found {indices.dtype}; use mask.nonzero().squeeze(-1)")
        indices = indices.long()
    if indices.ndim != 1 or indices.numel() == 0:
        raise ValueError(f"index must be a non-empty list of coordinates, found shape {tuple(indices.shape)}")
    if int(indices.min()) < 0 or int(indices.max()) >= size:
        raise ValueError(
            f"index must lie in 0 .. {size - 1}, found {int(indices.min())} .. {int(indices.max())}"
        )
    if indices.unique().numel() != indices.numel():
        raise ValueError("index must name each coordinate once, found a repeated one")
    return indices


class IndexSet:
    """A partition of ``0 .. size - 1`` into blocks, hashable, so that it can be structure rather than data.

    Args:
        blocks: one tensor of distinct coordinates per block, together covering every coordinate once.

    Raises:
        ValueError: if a block is empty, two blocks overlap, or a coordinate is missing.
    """

    __slots__ = ("_hash", "blocks", "consecutive", "size")

    def __init__(self, blocks: Sequence[Index]) -> None:
        if len(blocks) == 0:
            raise ValueError("indices must hold at least one block, found none")
        tensors = tuple(torch.as_tensor(b).detach().cpu() for b in blocks)
        for i, block in enumerate(tensors):
            if block.ndim != 1 or block.numel() == 0:
                raise ValueError(f"indices[{i}] must be a non-empty vector, found shape {tuple(block.shape)}")
            if block.is_floating_point() or block.dtype == torch.bool:
                raise TypeError(f"indices[{i}] must hold integers, found {block.dtype}")
        self.blocks = tuple(t.long() for t in tensors)
        everything = torch.cat(self.blocks)
        self.size = everything.numel()
        counts = torch.bincount(everything.clamp(min=0, max=self.size), minlength=self.size + 1)
        if int(everything.min()) < 0 or int(counts[self.size]) > 0 or bool((counts[: self.size] != 1).any()):
            raise ValueError(
                f"indices must name each of the {self.size} coordinates exactly once; found overlapping blocks, "
                "or a coordinate out of range"
            )
        self.consecutive = bool((everything == torch.arange(self.size)).all())
        digest = hashlib.sha256(everything.numpy().tobytes()).digest()
        self._hash = hash((self.sizes, digest))

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> IndexSet:
        """Consecutive blocks of the given sizes."""
        return cls(torch.arange(sum(sizes)).split(list(sizes)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of coordinates of each block."""
        return tuple(b.numel() for b in self.blocks)

    def split(self, X: Tensor, dim: int = -2) -> list[Tensor]:
        """X cut along `dim` into its blocks."""
        if self.consecutive:
            return list(X.split(list(self.sizes), dim=dim))
        return [X.index_select(dim, b.to(X.device)) for b in self.blocks]

    def join(self, parts: Sequence[Tensor], dim: int = -2) -> Tensor:
        """The inverse of `split`."""
        joined = torch.cat(list(parts), dim=dim)
        if self.consecutive:
            return joined
        order = torch.cat(self.blocks)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(self.size)
        return joined.index_select(dim, inverse.to(joined.device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IndexSet):
            return NotImplemented
        if self is other:
            return True
        return (
            self._hash == other._hash
            and len(self.blocks) == len(other.blocks)
            and all(torch.equal(a, b) for a, b in zip(self.blocks, other.blocks, strict=True))
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"IndexSet(sizes={self.sizes}, consecutive={self.consecutive})"
