"""Sets of coordinates: the index argument of marginals and conditionals, and the partition behind `BlockDiag`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
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
        try:
            indices = torch.as_tensor(index, device=device)
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(f"index must hold integers, found {type(index).__name__}") from None
        indices = _constant(indices)
        whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
        if indices.numel() and not whole:
            raise TypeError(
                f"index must hold integers, found {indices.dtype}; use mask.nonzero().squeeze(-1)"
            )
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

    __slots__ = ("_arrays", "_hash", "_inverse", "consecutive", "size")

    def __init__(self, blocks: Sequence[Index] | Sequence[NDArray[Any]]) -> None:
        if len(blocks) == 0:
            raise ValueError("indices must hold at least one block, found none")
        # NumPy, not torch: a partition is structure, which no transform in progress may wrap.
        arrays = [_as_array(b) for b in blocks]
        for i, array in enumerate(arrays):
            if array.ndim != 1 or array.size == 0:
                raise ValueError(f"indices[{i}] must be a non-empty vector, found shape {array.shape}")
            if array.dtype.kind not in "iu":
                raise TypeError(f"indices[{i}] must hold integers, found {array.dtype}")
        order = np.concatenate(arrays).astype(np.int64)
        self.size = order.size
        if order.min() < 0 or order.max() >= self.size or np.unique(order).size != self.size:
            raise ValueError(
                f"indices must name each of the {self.size} coordinates exactly once; found overlapping blocks, "
                "or a coordinate out of range"
            )
        self._arrays = tuple(a.astype(np.int64) for a in arrays)
        self.consecutive = bool((order == np.arange(self.size)).all())
        self._inverse = np.argsort(order)
        # The same number in every process, unlike the hash of bytes: it travels with pickles.
        digest = hashlib.sha256(order.tobytes()).digest()
        self._hash = hash((self.sizes, int.from_bytes(digest, "big")))

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> IndexSet:
        """Consecutive blocks of the given sizes."""
        return cls(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """The coordinates of each block, as tensors made on the spot: one kept would outlive its transform."""
        return tuple(torch.from_numpy(a) for a in self._arrays)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of coordinates of each block."""
        return tuple(a.size for a in self._arrays)

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
        return joined.index_select(dim, torch.from_numpy(self._inverse).to(joined.device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IndexSet):
            return NotImplemented
        if self is other:
            return True
        return (
            self._hash == other._hash
            and self.sizes == other.sizes
            and all(np.array_equal(a, b) for a, b in zip(self._arrays, other._arrays, strict=True))
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"IndexSet(sizes={self.sizes}, consecutive={self.consecutive})"


def identity_columns(index: Tensor, size: int, dtype: torch.dtype) -> Float[Tensor, "D k"]:
    """The columns of the identity of `size` rows that `index` names, on its device."""
    columns = torch.zeros(size, len(index), dtype=dtype, device=index.device)
    columns[index, torch.arange(len(index), device=index.device)] = 1.0
    return columns


def _as_array(block: Index | NDArray[Any]) -> NDArray[Any]:
    """The coordinates without a torch operation, which a transform would record."""
    if isinstance(block, Tensor):
        block = _constant(block)
        shared = block.device.type == "cpu" and block.dtype == torch.int64
        return np.from_dlpack(block) if shared else np.array(block.tolist())
    return np.asarray(block)


def _constant(index: Tensor) -> Tensor:
    """The integers under the wrappers of transforms in progress, which wrap whatever is made inside them."""
    while torch._C._functorch.is_functorch_wrapped_tensor(index):
        if torch._C._functorch.is_batchedtensor(index):
            raise TypeError(
                "an index must be the same for all elements of a vmap, found one that is mapped over; indices are "
                "structure: keep them out of in_dims"
            )
        index = torch._C._functorch.get_unwrapped(index)
    return index
