"""Block-diagonal precisions: independent groups of coordinates, each with an operator of its own kind and size.

Everything is done block by block; blocks are never merged or enlarged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvlin._check import broadcastable, same_kind
from curvlin._tree import static_field, tensor_field
from curvlin.errors import NotPositiveDefiniteError
from curvlin.index import Index, IndexSet
from curvlin.precision.base import PrecisionOperator, exact_operator


@dataclass(eq=False, repr=False, init=False)
class BlockDiag(PrecisionOperator):
    """Blocks of any type and size, each acting on coordinates of its own.

    Args:
        blocks: precision operators, one per group.
        indices: the coordinates on which each block acts, together a partition of ``0 .. D - 1``; consecutive
            groups when None. An `IndexSet` is taken as it is.

    Raises:
        TypeError: if a block is not a precision operator, or dtypes differ.
        ValueError: if there are no blocks, the indices overlap or leave a gap, or a size does not match its block.
    """

    blocks: tuple[PrecisionOperator, ...] = tensor_field(0)
    indices: IndexSet = static_field()

    def __init__(
        self, blocks: Sequence[PrecisionOperator], indices: Sequence[Index] | IndexSet | None = None
    ) -> None:
        if len(blocks) == 0:
            raise ValueError("blocks must hold at least one operator, found none")
        batch = torch.Size()
        for i, block in enumerate(blocks):
            exact_operator(f"blocks[{i}]", block)
            same_kind(f"blocks[{i}]", next(block._tensors())[0], next(blocks[0]._tensors())[0])
            batch = broadcastable(f"blocks[{i}]", block.batch_shape, batch)
        sizes = tuple(block.size for block in blocks)
        if indices is None:
            partition = IndexSet.of_sizes(sizes)
        else:
            partition = indices if isinstance(indices, IndexSet) else IndexSet(indices)
        if partition.sizes != sizes:
            raise ValueError(f"indices must have the sizes of the blocks {sizes}, found {partition.sizes}")
        self.blocks = tuple(blocks)
        self.indices = partition

    @property
    def size(self) -> int:
        return self.indices.size

    def with_blocks(self, blocks: Sequence[PrecisionOperator]) -> BlockDiag:
        """Other blocks on the same coordinates."""
        return BlockDiag(blocks, self.indices)

    def _factorize(self) -> tuple[Any, ...]:
        factors = []
        for i, block in enumerate(self.blocks):
            try:
                factors.append(block._factorize())
            except NotPositiveDefiniteError as error:
                raise error.within(f"BlockDiag.blocks[{i}]") from None
        return tuple(factors)

    def _columnwise(self, hook: Callable[..., Tensor], X: Tensor, factors: tuple[Any, ...]) -> Tensor:
        """A hook that maps ``(..., D, K)`` to ``(..., D, K)``, applied to each block's rows."""
        parts = zip(self.blocks, self.indices.split(X), factors, strict=True)
        return self.indices.join(_broadcast_batch([hook(block, part, f) for block, part, f in parts], 2))

    def _matmul(self, X: Tensor) -> Tensor:
        return self._columnwise(lambda block, part, _: block._matmul(part), X, (None,) * len(self.blocks))

    def _energy(self, X: Tensor) -> Tensor:
        return functools.reduce(
            torch.add,
            [block._energy(part) for block, part in zip(self.blocks, self.indices.split(X), strict=True)],
        )

    def _solve(self, X: Tensor, factors: tuple[Any, ...]) -> Tensor:
        return self._columnwise(lambda block, part, f: block._solve(part, f), X, factors)

    def _inv_quad(self, X: Tensor, factors: tuple[Any, ...]) -> Tensor:
        parts = zip(self.blocks, self.indices.split(X), factors, strict=True)
        return functools.reduce(torch.add, [block._inv_quad(part, f) for block, part, f in parts])

    def _logdet(self, factors: tuple[Any, ...]) -> Tensor:
        return functools.reduce(
            torch.add, [block._logdet(f) for block, f in zip(self.blocks, factors, strict=True)]
        )

    def _diagonal(self) -> Tensor:
        return self.indices.join(_broadcast_batch([block.diagonal() for block in self.blocks], 1), dim=-1)

    def _inverse_diagonal(self, factors: tuple[Any, ...]) -> Tensor:
        pairs = zip(self.blocks, factors, strict=True)
        return self.indices.join(
            _broadcast_batch([block._inverse_diagonal(f) for block, f in pairs], 1), dim=-1
        )

    def _whiten(self, X: Tensor, factors: tuple[Any, ...]) -> Tensor:
        return self._columnwise(lambda block, part, f: block._whiten(part, f), X, factors)

    def _unwhiten(self, Z: Tensor, factors: tuple[Any, ...]) -> Tensor:
        return self._columnwise(lambda block, part, f: block._unwhiten(part, f), Z, factors)

    def _draw(self, Z: Tensor, factors: tuple[Any, ...]) -> Tensor:
        return self._columnwise(lambda block, part, f: block._draw(part, f), Z, factors)

    def _root_matvec(self, Z: Tensor, factors: tuple[Any, ...]) -> Tensor:
        return self._columnwise(lambda block, part, f: block._root_matvec(part, f), Z, factors)

    def _root_solve(self, G: Tensor, factors: tuple[Any, ...]) -> Tensor:
        return self._columnwise(lambda block, part, f: block._root_solve(part, f), G, factors)

    def _scale(self, c: Tensor) -> BlockDiag:
        return self.with_blocks([block._scale(c) for block in self.blocks])

    def _marginal(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        return self._parts(index, lambda block, local: block.marginal(local, max_size=max_size))

    def _conditional(self, index: Tensor, max_size: int) -> PrecisionOperator | None:
        return self._parts(index, lambda block, local: block.conditional(local, max_size=max_size))

    def _parts(
        self, index: Tensor, part_of: Callable[[PrecisionOperator, Tensor], PrecisionOperator]
    ) -> PrecisionOperator:
        """Blocks are independent, so a marginal (or conditional) is one of each block that is touched."""
        owner = torch.empty(self.size, dtype=torch.long)
        position = torch.empty(self.size, dtype=torch.long)
        for i, block_index in enumerate(self.indices.blocks):
            owner[block_index] = i
            position[block_index] = torch.arange(len(block_index))
        owners, positions = owner[index.cpu()], position[index.cpu()]
        parts, groups = [], []
        for i, block in enumerate(self.blocks):
            where = (owners == i).nonzero().squeeze(-1)
            if len(where) == 0:
                continue
            local, order = positions[where].sort()  # in the block's own order, in which it may have structure
            local, where = local.to(index.device), where[order]
            whole = torch.equal(local.cpu(), torch.arange(block.size))
            parts.append(block if whole else part_of(block, local))
            groups.append(where)
        if len(parts) == 1 and torch.equal(groups[0], torch.arange(len(index))):
            return parts[0]
        return BlockDiag(parts, groups)

    def _to_dense(self) -> Tensor:
        rows, start = [], 0
        for block in self.blocks:
            rows.append(pad(block.to_dense(), (start, self.size - start - block.size)))
            start += block.size
        # In the order of the blocks so far; the rows go where they belong, then the columns.
        return self.indices.join([self.indices.join(_broadcast_batch(rows, 2), dim=-2)], dim=-1)


def _broadcast_batch(parts: Sequence[Tensor], own: int) -> list[Tensor]:
    """The parts with equal batch dimensions, so that they can be concatenated."""
    batch = torch.broadcast_shapes(*(p.shape[: p.ndim - own] for p in parts))
    return [p.expand(*batch, *p.shape[p.ndim - own :]) for p in parts]
