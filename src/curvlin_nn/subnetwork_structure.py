"""The curvature of a subnetwork in any structure.

Some structures of a submatrix need the rows of its coordinates only (``restricts``): full, diagonal, dense blocks, low
rank. For these the rows are cut before anything is summed, and nothing has more than k rows or columns. The others
(Kronecker products) are summed for the whole parameters and cut at the end: a product stays one where the coordinates
chosen in a weight are rows times columns, and is the exact dense submatrix otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlin.precision.base import PrecisionOperator
from curvlin.precision.kronecker import product_index
from curvlin_nn.capture import Block, Captures
from curvlin_nn.errors import UnsupportedError
from curvlin_nn.feature_maps.jacobian import features
from curvlin_nn.parameters import ParameterSpace
from curvlin_nn.structures.base import Structure, StructureFactory
from curvlin_nn.structures.kronecker import MAX_BLOCK
from curvlin_nn.subnetwork_space import Subnetwork


class SubnetworkStructure(Structure):
    """A structure over the chosen coordinates, fed with captures of the whole parameters that they lie in.

    Args:
        touched: the whole parameters.
        subnetwork: the chosen coordinates.
        factory: what makes the state of a structure.
    """

    name = "subnetwork"

    def __init__(self, touched: ParameterSpace, *, subnetwork: Subnetwork, factory: StructureFactory) -> None:
        super().__init__(subnetwork.space)
        self._subnetwork = subnetwork
        inner = factory(subnetwork.space)
        self._by_rows = inner.restricts
        self._inner = inner if self._by_rows else factory(touched)
        self.passes = self._inner.passes
        self.takes_output_curvature = self._inner.takes_output_curvature and not self._by_rows
        self._checked = self._by_rows

    def begin(self, pass_index: int) -> None:
        """See `Structure.begin`."""
        self._inner.begin(pass_index)

    def update(self, captures: Captures) -> None:
        """See `Structure.update`.

        Raises:
            UnsupportedError: if the coordinates of a weight with Kronecker factors are no rows times columns, and too
                many for a dense matrix.
        """
        if not self._checked:
            _check_affordable(captures, self._subnetwork)
            self._checked = True
        self._inner.update(rows(captures, self._subnetwork) if self._by_rows else captures)

    def check_merge(self, other: SubnetworkStructure) -> None:
        """See `Structure.check_merge`."""
        if self._subnetwork != other._subnetwork:
            raise UnsupportedError(
                "the two states are of different subnetworks, expected the same subnetwork_indices"
            )
        self._inner.check_merge(other._inner)

    def merge(self, other: SubnetworkStructure) -> None:
        """See `Structure.merge`."""
        self.check_merge(other)
        self._inner.merge(other._inner)

    def finish(self) -> PrecisionOperator:
        """See `Structure.finish`."""
        H = self._inner.finish()
        if self._by_rows:
            return H
        index = self._subnetwork.index
        return H.conditional(index.to(H.device), max_size=len(index))

    def state_dict(self) -> dict[str, Any]:
        """See `Structure.state_dict`."""
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Structure.load_state_dict`."""
        self._inner.load_state_dict(state)


def rows(captures: Captures, subnetwork: Subnetwork) -> Captures:
    """The rows of the chosen coordinates, multiplied out: ``N V k`` numbers."""
    Phi = features(captures)
    columns = Phi.columns(subnetwork.index.to(Phi.device))
    blocks = [
        Block(name, span.start, columns[:, :, None, span.start : span.stop], None)
        for name, span in subnetwork.space.spans.items()
    ]
    return replace(captures, parts=tuple(blocks))


def _check_affordable(captures: Captures, subnetwork: Subnetwork) -> None:
    """Whether every product that is cut stays one, or becomes a matrix that can be held."""
    chosen = torch.zeros(captures.partition.size, dtype=torch.bool)
    chosen[subnetwork.index] = True
    for block, local in zip(captures.blocks, captures.partition.split(chosen, dim=0), strict=True):
        index: Tensor = local.nonzero().squeeze(1)
        if len(index) <= MAX_BLOCK or product_index(index, block.shape[1]) is not None:
            continue
        raise UnsupportedError(
            f"subnetwork_indices chooses {len(index)} coordinates of parameter {block.parameter!r} that are no rows "
            f"times columns, whose submatrix of a Kronecker product is dense; expected at most {MAX_BLOCK}; choose "
            "whole rows or columns, or take hessian_structure='diag'"
        )
