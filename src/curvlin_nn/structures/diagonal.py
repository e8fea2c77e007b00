"""The diagonal: one number per parameter. Costs P memory and N P work without weight sharing."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import Diagonal as DiagonalOperator
from curvlin_nn.capture import Block, Captures, OneHot
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure
from curvlin_nn.structures.registry import register


@register
class Diagonal(Structure):
    """``diag(H) = sum_nv (row_nv)^2``, exact under weight sharing."""

    name = "diag"
    restricts = True
    takes_output_curvature = True

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__(space)
        self._diagonal: Tensor | None = None

    def update(self, captures: Captures) -> None:
        """See `Structure.update`."""
        if self._diagonal is None:
            device = captures.parts[0].left.device
            self._diagonal = torch.zeros(self.space.size, dtype=torch.float64, device=device)
        closed = captures.output_curvature
        diagonal = None if closed is None else closed.diagonal().flatten(0, 1)
        for block in captures.parts:
            place = block.place
            new = squares(block) if diagonal is None else _of_last_layer(block, diagonal)
            if place.consecutive:
                self._diagonal[place.start : place.start + place.size] += new
            else:
                self._diagonal[place.coordinates.to(new.device)] += new

    def merge(self, other: Diagonal) -> None:
        """See `Structure.merge`."""
        if other._diagonal is not None:
            own = self._diagonal
            self._diagonal = other._diagonal.clone() if own is None else own + other._diagonal

    def finish(self) -> DiagonalOperator:
        """See `Structure.finish`."""
        assert self._diagonal is not None
        return DiagonalOperator(self._diagonal.clone())

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {"diagonal": self._diagonal}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        self._diagonal = state["diagonal"]


def _of_last_layer(block: Block, diagonal: Float[Tensor, "NR out"]) -> Float[Tensor, " size"]:
    """`squares` of a linear layer whose outputs have curvature with these diagonals."""
    if block.right is None:
        return diagonal.sum(0)
    return (diagonal.mT @ block.right.double().square().flatten(0, 1)).flatten()


def squares(block: Block) -> Float[Tensor, " size"]:
    """``sum_nv row_nv^2``, in the order (out, in)."""
    if isinstance(block.compact, OneHot):
        return _squares_of_tokens(block.left, block.compact).mT.flatten()
    block = block.dense()
    left, right = block.left, block.right
    if right is None:
        return _summed_squares(left).sum((0, 1))
    if left.shape[2] == 1:  # one outer product per row: the columns fold before anything of size out x in
        return (_summed_squares(left).squeeze(1).mT @ right.squeeze(1).square()).flatten()
    total = left.new_zeros(left.shape[1] * left.shape[3], right.shape[-1])
    rows = torch.empty_like(total)
    for left_n, right_n in zip(left, right, strict=True):  # one sample's rows at a time stay in cache
        torch.mm(left_n.mT.flatten(0, 1), right_n, out=rows)
        total.addcmul_(rows, rows)
    return total.unflatten(0, (left.shape[1], -1)).sum(0).flatten()


def _summed_squares(left: Float[Tensor, "N V S out"]) -> Float[Tensor, "N S out"]:
    """``sum_v left_v^2``, with no tensor of the size of all columns."""
    total = left.new_zeros(len(left), *left.shape[2:])
    for of_column in left.unbind(1):
        total.addcmul_(of_column, of_column)
    return total


def _squares_of_tokens(left: Float[Tensor, "N V S out"], inputs: OneHot) -> Float[Tensor, "size out"]:
    """The same for unit vectors: the gradients at one sample's positions with the same token add up first."""
    samples = torch.arange(len(left), device=left.device)[:, None]
    kept = inputs.index >= 0
    pairs, which = (samples * inputs.size + inputs.index)[kept].unique(return_inverse=True)
    rows = left.transpose(1, 2)[kept].flatten(1)  # (kept positions, V out)
    summed = rows.new_zeros(len(pairs), rows.shape[1]).index_add_(0, which, rows)
    by_pair = summed.unflatten(1, (left.shape[1], left.shape[3])).square().sum(1)
    return OneHot(pairs % inputs.size, inputs.size).summed(by_pair)
