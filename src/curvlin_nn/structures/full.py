"""The full matrix: every pair of parameters. Costs P^2 memory and N P^2 work without weight sharing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Dense
from curvlin_nn.capture import Block, Captures
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.registry import register

ROW_BUDGET = 2**23
"""Entries of the rows that are multiplied out at once, where weights are shared."""


@register
class Full(Structure):
    """``H = sum_n J_n^T Lambda_n J_n``, dense, by pairs of blocks.

    A row of a block without weight sharing is one outer product, so between two such blocks the columns fold
    first, ``sum_n (sum_v l_nv l'_nv^T)[o, p] r_n r'_n^T``: a factor V less work than with rows multiplied out.
    Products are float64: in float32 the rounding of the sum outweighs a small prior where H has no rank.
    """

    name = "full"
    restricts = True

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self._upper: Tensor | None = None

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        if self._upper is None:
            device = captures.blocks[0].left.device
            self._upper = torch.zeros(self.space.size, self.space.size, dtype=torch.float64, device=device)
        for blocks in _chunks(captures):
            shared = [block.left.shape[2] > 1 for block in blocks]
            rows = [_rows(block) for block in blocks] if any(shared) else []
            for i, first in enumerate(blocks):
                for j, second in enumerate(blocks[i:], start=i):
                    pair = rows[i].mT @ rows[j] if shared[i] or shared[j] else _folded(first, second)
                    self._upper[_slice(first), _slice(second)] += _placed(pair, first, second)

    def merge(self, other: Full) -> None:
        """See `Structure.merge`."""
        if other._upper is not None:
            self._upper = other._upper.clone() if self._upper is None else self._upper + other._upper

    def finish(self) -> Dense:
        """See `Structure.finish`."""
        assert self._upper is not None
        H = self._upper.triu()
        H += H.triu(1).mT
        return Dense(H)

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {"upper": self._upper}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        self._upper = state["upper"]


def _chunks(captures: Captures) -> Iterator[list[Block]]:
    """The blocks, a number of samples at a time that keeps their rows within the budget."""
    n_columns = captures.blocks[0].left.shape[1]
    size = max(1, ROW_BUDGET // (n_columns * sum(block.size for block in captures.blocks)))
    for start in range(0, captures.n_samples, size):
        n = slice(start, start + size)
        yield [block.of_samples(n) for block in captures.blocks]


def _slice(block: Block) -> slice:
    return slice(block.span.start, block.span.stop)


def _placed(pair: Tensor, first: Block, second: Block) -> Tensor:
    """A block of H from the order (out, in) of its rows and columns to that of the flat vector."""
    if first.place.transposed:
        pair = pair.unflatten(0, first.shape).transpose(0, 1).flatten(0, 1)
    if second.place.transposed:
        pair = pair.unflatten(1, second.shape).transpose(1, 2).flatten(1, 2)
    return pair


def _rows(block: Block) -> Float[Tensor, "NV size"]:
    """The rows of a block multiplied out, ``sum_s left_s (x) right_s``, float64.

    Multiplied in float64 too: rounded here but not in `_folded`, H would be of two Jacobians, and indefinite.
    """
    right = None if block.right is None else block.right.double()
    return replace(block, left=block.left.double(), right=right).rows().flatten(0, 1)


def _folded(first: Block, second: Block) -> Float[Tensor, "P1 P2"]:
    """``sum_nv row_nv(first)^T row_nv(second)`` with ``S = 1`` in both."""
    if first.right is None and second.right is None:
        return first.left.double().flatten(0, 2).mT @ second.left.double().flatten(0, 2)
    fold = torch.einsum("nvo,nvp->onp", first.left.squeeze(2).double(), second.left.squeeze(2).double())
    right, right_of_second = _right(first), _right(second)
    by_output = [right.mT @ (weight[:, :, None] * right_of_second[:, None, :]).flatten(1) for weight in fold]
    return torch.cat(by_output)


def _right(block: Block) -> Float[Tensor, "N in"]:
    right = block.left.new_ones(len(block.left), 1) if block.right is None else block.right.squeeze(1)
    return right.double()
