"""The full matrix: every pair of parameters. Costs P^2 memory and N P^2 work without weight sharing."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Dense
from curvlin_nn.capture import Block, Captures
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.registry import register


@register
class Full(Structure):
    """``H = sum_n J_n^T Lambda_n J_n``, dense, by pairs of blocks."""

    name = "full"

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self._upper: Tensor | None = None

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        if self._upper is None:
            self._upper = captures.blocks[0].left.new_zeros(self.space.size, self.space.size)
        for i, first in enumerate(captures.blocks):
            for second in captures.blocks[i:]:
                rows, columns = _slice(first), _slice(second)
                self._upper[rows, columns] += _pair(first, second)

    def merge(self, other: Full) -> None:
        """See `Structure.merge`."""
        if other._upper is not None:
            self._upper = other._upper.clone() if self._upper is None else self._upper + other._upper

    def finish(self) -> Dense:
        """See `Structure.finish`."""
        assert self._upper is not None
        return Dense(self._upper.triu() + self._upper.triu(1).mT)


def _slice(block: Block) -> slice:
    return slice(block.span.start, block.span.stop)


def _pair(first: Block, second: Block) -> Float[Tensor, "P1 P2"]:
    """``sum_nv row_nv(first)^T row_nv(second)``.

    Without weight sharing a row is one outer product, so the columns fold first:
    ``sum_n (sum_v l_nv l'_nv^T)[o, p] r_n r'_n^T``, a factor V less work than with the rows multiplied out.
    """
    if first.left.shape[2] == second.left.shape[2] == 1:
        return _folded_pair(first, second)
    return rows(first).flatten(0, 1).mT @ rows(second).flatten(0, 1)


def _folded_pair(first: Block, second: Block) -> Float[Tensor, "P1 P2"]:
    fold = torch.einsum("nvo,nvp->onp", first.left.squeeze(2), second.left.squeeze(2))
    right, right_of_second = _right(first), _right(second)
    by_output = [right.mT @ (weight[:, :, None] * right_of_second[:, None, :]).flatten(1) for weight in fold]
    return torch.cat(by_output)


def _right(block: Block) -> Float[Tensor, "N in"]:
    return block.left.new_ones(len(block.left), 1) if block.right is None else block.right.squeeze(1)


def rows(block: Block) -> Float[Tensor, "N V size"]:
    """The rows of a block multiplied out: ``sum_s left_s (x) right_s``."""
    if block.right is None:
        return block.left.squeeze(2)
    return torch.einsum("nvso,nsi->nvoi", block.left, block.right).flatten(2)
