"""The curvature of each output by itself, for a noise scale of each: ``H(sigma) = sum_c H_c / sigma_c^2``.

Exact columns of a Gaussian likelihood belong to one output each. Full, diagonal and block curvatures of the outputs add
up; in a Kronecker product only the factor of gradients knows of outputs, ``(sum_c G_c / sigma_c^2) (x) A``, which is
KFAC at that noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlin import BlockDiag, Dense, Diagonal, KroneckerSum
from curvlin.precision.base import PrecisionOperator
from curvlin_nn.capture import Block, Captures
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures import Diagonal as DiagonalStructure
from curvlin_nn.structures import Full, Kronecker, Structure, StructureFactory
from curvlin_nn.structures.mixed import SideBySide


class PerOutput(Structure):
    """One state for each output.

    Args:
        space: all parameters.
        structure: what makes the state of an output: full, diagonal, block, Kronecker, or a mix of these by layer.
        n_outputs: C.

    Raises:
        UnsupportedError: if the structure is no sum over outputs.
    """

    name = "per output"

    def __init__(self, space: ParameterSpace, *, structure: StructureFactory, n_outputs: int) -> None:
        super().__init__(space)
        self._states = tuple(structure(space) for _ in range(n_outputs))
        for part in _parts(self._states[0]):
            if type(part) not in (Full, DiagonalStructure, Kronecker):
                raise UnsupportedError(
                    f"hessian_structure={part.name!r} is not served with one sigma_noise for each output, expected "
                    "'full', 'block', 'diag' or 'kron'; give one number"
                )
        self._tied = any(isinstance(part, Kronecker) for part in _parts(self._states[0]))
        self._column = 0  # of a batch: how many came before

    def update(self, captures: Captures) -> None:
        """See `Structure.update`.

        Raises:
            UnsupportedError: for Kronecker factors of a parameter that is used both as it is and transposed.
        """
        if self._tied and (tied := [block.parameter for block in captures.blocks if block.uses]):
            raise UnsupportedError(
                f"parameter {tied[0]!r} is used both as it is and transposed, which 'kron' does not serve with one "
                "sigma_noise for each output; give one number, or another structure there"
            )
        before = 0 if captures.first else self._column
        n_columns, n_outputs = captures.parts[0].left.shape[1], len(self._states)
        self._column = before + n_columns
        for column in range(min(n_columns, n_outputs)):  # the first of its output among these
            blocks = tuple(_of_output(block, column, n_outputs) for block in captures.blocks)
            state = self._states[(before + column) % n_outputs]
            state.update(replace(captures, parts=blocks, first=captures.first and column == 0))

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return {"states": [state.state_dict() for state in self._states]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        for mine, stored in zip(self._states, state["states"], strict=True):
            mine.load_state_dict(stored)

    def check_merge(self, other: PerOutput) -> None:
        """See `Structure.check_merge`."""
        if len(self._states) != len(other._states):
            raise UnsupportedError(
                f"the two fits have {len(self._states)} and {len(other._states)} noise scales, expected as many"
            )
        for mine, theirs in zip(self._states, other._states, strict=True):
            mine.check_merge(theirs)

    def merge(self, other: PerOutput) -> None:
        """See `Structure.merge`."""
        self.check_merge(other)
        for mine, theirs in zip(self._states, other._states, strict=True):
            mine.merge(theirs)

    def outputs(self) -> tuple[PrecisionOperator, ...]:
        """The curvature of each output at sigma = 1; Kronecker factors of inputs are only in that of the first."""
        return tuple(state.finish() for state in self._states)

    def finish(self) -> PrecisionOperator:
        """See `Structure.finish`."""
        operators = self.outputs()
        return weighted_sum(operators, torch.ones(len(operators), dtype=torch.float64))


def weighted_sum(operators: Sequence[PrecisionOperator], weights: Float[Tensor, " C"]) -> PrecisionOperator:
    """``sum_c weights_c H_c`` of the curvatures of outputs, differentiable in the weights."""
    first = operators[0]
    if isinstance(first, BlockDiag):
        blocks = zip(*(H.blocks for H in operators if isinstance(H, BlockDiag)), strict=True)
        return first.with_blocks([weighted_sum(parts, weights) for parts in blocks])
    if isinstance(first, KroneckerSum):
        ((_, right),) = first.terms
        lefts = [H.terms[0][0] for H in operators if isinstance(H, KroneckerSum)]
        return KroneckerSum([(_total([left for left in lefts if left is not None], weights), right)])
    if isinstance(first, Diagonal):
        return Diagonal(_total([H.diagonal() for H in operators], weights))
    return Dense(_total([H.to_dense() for H in operators], weights))


def _total(tensors: Sequence[Tensor], weights: Float[Tensor, " C"]) -> Tensor:
    return torch.stack([w.to(t) * t for w, t in zip(weights, tensors, strict=True)]).sum(0)


def _of_output(block: Block, column: int, n_outputs: int) -> Block:
    """This column and the others of its output; they come term by term, and within a term output by output."""
    uses = tuple(_of_output(use, column, n_outputs) for use in block.uses)
    return replace(block, left=block.left[:, column::n_outputs], uses=uses)


def _parts(state: Structure) -> list[Structure]:
    """The states that see captures themselves."""
    if isinstance(state, SideBySide):
        return [part for inner in state._parts for part in _parts(inner)]
    return [state]
