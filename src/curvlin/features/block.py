"""Features of several blocks of coordinates side by side: a network's Jacobian, one part per parameter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin._check import broadcastable, same_kind
from curvlin._tree import static_field, tensor_field
from curvlin.features.base import FeatureOperator
from curvlin.index import Index, IndexSet


@dataclass(eq=False, repr=False, init=False)
class BlockFeatures(FeatureOperator):
    """``[Phi_1, ..., Phi_B]``, part b acting on the coordinates ``indices[b]``; a `BlockDiag`'s other half.

    Args:
        parts: feature operators with the same N and R.
        indices: the flat coordinates of each part, together a partition; None puts them one after another.

    Raises:
        TypeError: if a part is not a feature operator, or dtypes differ.
        ValueError: if there is no part, their N or R differ, or `indices` is not a partition that fits.
    """

    parts: tuple[FeatureOperator, ...] = tensor_field(3)
    indices: IndexSet = static_field()

    def __init__(
        self, parts: Sequence[FeatureOperator], indices: IndexSet | Sequence[Index] | None = None
    ) -> None:
        parts = tuple(parts)
        if not parts:
            raise ValueError("parts must hold at least one feature operator, found none")
        batch = torch.Size()
        for b, part in enumerate(parts):
            if not isinstance(part, FeatureOperator):
                raise TypeError(f"parts[{b}] must be a FeatureOperator, found {type(part).__name__}")
            same_kind(f"parts[{b}]", next(part._tensors())[0], next(parts[0]._tensors())[0])
            if (part.n_samples, part.n_rows) != (parts[0].n_samples, parts[0].n_rows):
                raise ValueError(
                    f"parts[{b}] must have {parts[0].n_samples} samples of {parts[0].n_rows} rows like "
                    f"parts[0], found shape {tuple(part.shape)}"
                )
            batch = broadcastable(f"parts[{b}]", part.batch_shape, batch)
        sizes = tuple(part.size for part in parts)
        if indices is None:
            indices = IndexSet.of_sizes(sizes)
        elif not isinstance(indices, IndexSet):
            indices = IndexSet(indices)
        if indices.sizes != sizes:
            raise ValueError(f"indices must hold {sizes} coordinates per part, found {indices.sizes}")
        self.parts = parts
        self.indices = indices

    @property
    def n_samples(self) -> int:
        return self.parts[0].n_samples

    @property
    def n_rows(self) -> int:
        return self.parts[0].n_rows

    @property
    def size(self) -> int:
        return self.indices.size

    def flatten(self) -> BlockFeatures:
        return BlockFeatures([part.flatten() for part in self.parts], self.indices)

    def to_dense(self) -> Float[Tensor, "*batch N R D"]:
        return self.indices.join(_same_batch([part.to_dense() for part in self.parts], own=3), dim=-1)

    def _matmul(self, v: Tensor) -> Tensor:
        products = (part._matmul(x) for part, x in zip(self.parts, self.indices.split(v), strict=True))
        return functools.reduce(torch.add, products)

    def _rmatmul(self, u: Tensor) -> Tensor:
        return self.indices.join(_same_batch([part._rmatmul(u) for part in self.parts], own=2), dim=-2)

    def _gram(self, Psi: FeatureOperator) -> Tensor | None:
        if not isinstance(Psi, BlockFeatures):
            return None
        same_partition("Psi", Psi.indices, self.indices)
        return functools.reduce(torch.add, (p.gram(q) for p, q in zip(self.parts, Psi.parts, strict=True)))

    def _mix(self, S: Tensor) -> BlockFeatures:
        return BlockFeatures([part._mix(S) for part in self.parts], self.indices)

    def _scale(self, c: Tensor) -> BlockFeatures:
        return BlockFeatures([part._scale(c) for part in self.parts], self.indices)

    def _select(self, samples: slice | Tensor) -> BlockFeatures:
        return BlockFeatures([part._select(samples) for part in self.parts], self.indices)

    def _columns(self, index: Tensor) -> Tensor:
        blocks, positions = self._located(index)
        owned = [(blocks == b).nonzero().squeeze(-1) for b in range(len(self.parts))]
        columns = [
            part._columns(positions[k]) for part, k in zip(self.parts, owned, strict=True) if len(k) > 0
        ]
        order = torch.cat(owned)
        return torch.cat(_same_batch(columns, own=3), dim=-1).index_select(-1, order.argsort())

    def _located(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The block of each coordinate, and its position there."""
        sizes = torch.tensor(self.indices.sizes, device=index.device)
        ends = sizes.cumsum(0)
        if not self.indices.consecutive:
            place = torch.empty(self.size, dtype=torch.long)
            place[torch.cat(self.indices.blocks)] = torch.arange(self.size)
            index = place.to(index.device)[index]
        blocks = torch.searchsorted(ends, index, right=True)
        return blocks, index - (ends - sizes)[blocks]


def _same_batch(blocks: list[Tensor], own: int) -> list[Tensor]:
    """The blocks with the batch dimensions that any of them has, sizes of the last `own` dimensions kept."""
    batch = torch.broadcast_shapes(*(block.shape[:-own] for block in blocks))
    return [block.expand(*batch, *block.shape[-own:]) for block in blocks]


def same_partition(name: str, found: IndexSet, expected: IndexSet) -> None:
    """Two partitions of the coordinates are equal, block by block.

    Raises:
        ValueError: if they are not.
    """
    if found != expected:
        raise ValueError(
            f"{name} must be cut into the same blocks of coordinates; found blocks of sizes {found.sizes}, "
            f"expected {expected.sizes} with the same indices"
        )
